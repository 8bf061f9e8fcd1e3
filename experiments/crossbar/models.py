"""A model on its way to an engine: its weights, the sets they lie in, and what these say about each layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compressx import compaction
from compressx.constraints import Constraint, on_leaf
from compressx.constraints.levels import levels_of
from compressx.crossbar import network
from compressx.crossbar.arrays import rows_of
from compressx.rules import Rules, resolve
from experiments.common.data import Info
from experiments.common.training import ConfigError, Weights


class Scene(NamedTuple):
    """The network and the images that everything is measured on.

    Attributes:
      apply: of the network; prepare: from stored images to what it reads.
      calibration: training images that choose the input scales.
      images, labels: what is scored.
      info: of the data set.
    """

    apply: Callable[..., Any]
    prepare: Callable[..., Any]
    calibration: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    info: Info


def cut(scene: Scene, images: int) -> tuple[np.ndarray, np.ndarray]:
    """The first so many test images, or as many as there are; 0 is all. With their labels."""
    n = images or len(scene.images)
    return scene.images[:n], scene.labels[:n]


class Held(NamedTuple):
    """What a layer's sets say.

    Attributes:
      fragment: rows of a polarized fragment, or None; rows: their order on the word lines.
      bits: of trained levels, or None; magnitude: bits of the largest multiple of their step, without a sign.
      scale: the step, a number or one for each filter.
    """

    fragment: int | None = None
    rows: np.ndarray | None = None
    bits: int | None = None
    magnitude: int = 0
    scale: Any = None
    order: str | None = None


class Subject(NamedTuple):
    """A model to be measured.

    Attributes:
      name; weights: on the host; rules: its sets; held: what they say, by module path.
      results: what the training recorded about its last phase, or {}.
    """

    name: str
    weights: Weights
    rules: Rules
    held: dict[str, Held]
    results: dict[str, Any]

    @property
    def variables(self) -> dict[str, Any]:
        """As the network's `apply` takes them."""
        return {**self.weights.params, **self.weights.batch_stats}

    @property
    def fragment(self) -> int | None:
        """The size of its fragments, where all polarized layers have one."""
        sizes = {h.fragment for h in self.held.values() if h.fragment}
        return sizes.pop() if len(sizes) == 1 else None

    @property
    def quantized(self) -> bool:
        """Whether any layer was trained on levels."""
        return any(h.bits for h in self.held.values())


def make_subject(name: str, weights: Weights, rules: Rules, results: dict[str, Any]) -> Subject:
    """Reads a model's sets: fragments and their order, levels and their step."""
    held = {}
    tree = {**weights.params, **weights.batch_stats}
    for b in resolve(rules, tree) if rules else ():
        for number, name_of_leaf in enumerate(b.paths):
            alone, structure = on_leaf(b.constraint, weights.structure[b.name], number)
            path = name_of_leaf.removeprefix("params/").removesuffix("/kernel")
            held[path] = _held(alone, structure, _leaf(tree, name_of_leaf)) if alone else Held()
    return Subject(name, weights, rules, held, results)


def _magnitude(spec: Mapping[str, Any]) -> int:
    """Bits of the largest level over the step, of levels that are whole multiples of one."""
    levels = levels_of(spec)
    return levels.top if levels.grid == "power_of_two" else levels.top.bit_length()


def check_sets(rules: Rules, engine: str) -> None:
    """Raises ConfigError where the weights of a set cannot be laid on the engine as they are."""
    for pattern, constraint in rules:
        for spec in () if constraint is None else (part.spec for part in constraint.sets):
            if engine == "forms" and spec["kind"] == "polarize" and 128 % spec["fragment"]:
                raise ConfigError(
                    f"rule {pattern!r}: fragments of {spec['fragment']} rows do not divide the 128 rows of an array; "
                    "polarize with 1, 2, 4, 8, 16, 32, 64 or 128"
                )
            if spec["kind"] != "quantize":
                continue
            if not levels_of(spec).symmetric:
                raise ConfigError(
                    f"rule {pattern!r}: an engine stores a magnitude and a sign; quantize with symmetric levels"
                )
            if spec["grid"] == "codebook":
                raise ConfigError(
                    f"rule {pattern!r}: a codebook's levels are not multiples of one step, and an engine stores "
                    "integers; use the grid uniform, power_of_two or cells"
                )
            bits, most = _magnitude(spec), 16 if engine == "forms" else 7
            if bits > most:
                raise ConfigError(
                    f"rule {pattern!r}: {spec['bits']} bits on the grid {spec['grid']!r} are magnitudes of {bits} "
                    f"bits; the engine {engine!r} stores up to {most} and a sign"
                )


def live_weights(scene: Scene, variables: Any, names: Sequence[str]) -> dict[str, int] | None:
    """Non-zero weights of each layer on a path from an input to an output: the others could go (`compaction.dead`).

    A filter that nobody reads, a row that reads an empty filter: their weights are kept, and programmed, for nothing.
    None where the network has a primitive that channels cannot be followed through.
    """
    x = scene.prepare(jnp.asarray(scene.calibration[:1]))
    try:
        kept = compaction.dead(lambda v, x: scene.apply(v, x, train=False), variables, x).kept
    except compaction.CompactionError:
        return None
    live = {}
    for name in names:
        w = network.kernel(variables, name)
        for axis, ids in enumerate(kept.get(f"params/{name}/kernel", ())):
            w = w if ids is None else np.take(w, ids, axis)
        live[name] = int(np.count_nonzero(w))
    return live


def _held(constraint: Constraint, structure: Any, w: np.ndarray) -> Held:
    found = Held()
    for part, piece in constraint.each(structure):
        if part.spec["kind"] == "polarize":
            found = found._replace(
                fragment=part.spec["fragment"], order=part.spec["order"], rows=rows_of(piece.order, w)
            )
        if part.spec["kind"] == "quantize":
            step = np.asarray(piece) if part.spec["per"] == "channel" else float(piece)
            found = found._replace(bits=part.spec["bits"], magnitude=_magnitude(part.spec), scale=step)
    return found


def _leaf(tree: Any, path: str) -> np.ndarray:
    for part in path.split("/"):
        tree = tree[part]
    return np.asarray(tree)
