"""A model on its way to an engine: its weights, the sets they lie in, and what these say about each layer."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compressx import compaction
from compressx.constraints import Constraint, on_leaf
from compressx.crossbar import network
from compressx.crossbar.program import rows_of
from compressx.data import Info
from compressx.rules import Rules, resolve
from compressx.training import Weights


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
      bits: of trained levels, or None; scale: their step; grid: of the levels.
    """

    fragment: int | None = None
    rows: np.ndarray | None = None
    bits: int | None = None
    scale: float | None = None
    grid: str | None = None
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
    for part, piece in zip(constraint.sets, structure if constraint.parts else (structure,), strict=True):
        if part.spec["kind"] == "polarize":
            found = found._replace(
                fragment=part.spec["fragment"], order=part.spec["order"], rows=rows_of(piece.order, w)
            )
        if part.spec["kind"] == "quantize" and part.spec["per"] == "tensor" and part.spec["grid"] != "codebook":
            found = found._replace(bits=part.spec["bits"], grid=part.spec["grid"], scale=float(piece))
    return found


def _leaf(tree: Any, path: str) -> np.ndarray:
    for part in path.split("/"):
        tree = tree[part]
    return np.asarray(tree)
