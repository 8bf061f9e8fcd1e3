"""All that the golden figures ask of compressx and its drivers: where a name moves, this file alone follows it."""

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

import compressx
from compressx import compaction, constraints, formats, kernels
from compressx.tree import paths
from experiments.common import models


class SetOfWeights(NamedTuple):
    """A constraint as four functions of a leaf, or of a tuple of leaves where it is joint."""

    init: Callable[[Any], Any]
    project: Callable[[Any, Any], Any]
    freeze: Callable[[Any, Any], Any]
    retract: Callable[[Any, Any], Any]
    joint: bool


def kinds() -> set[str]:
    """The names of all factories of constraints."""
    return set(constraints.KINDS)


def format_names() -> set[str]:
    """The names of all storage formats."""
    return set(formats.FORMATS)


def set_of(spec: Mapping[str, Any]) -> SetOfWeights:
    """The constraint of a spec, as saved files hold it."""
    c = constraints.from_spec(spec)
    return SetOfWeights(c.init, c.project, c.freeze, c.retract, c.joint)


class Loaded(NamedTuple):
    """A saved model: leaves by path, structures, formats by path, bytes of the packed leaves, and the rest as read."""

    leaves: dict[str, np.ndarray]
    structures: dict[str, Any]
    formats: dict[str, str]
    packed_bytes: int
    saved: Any


def save(
    path: Path,
    params: Any,
    specs: Sequence[tuple[str, Mapping[str, Any]]],
    layout: Sequence[tuple[str, str]] = (),
    coding: str = "none",
    model: Mapping[str, Any] | None = None,
) -> None:
    """Hardens the params onto their sets and writes them, with the structures that the sets had."""
    bound = [(pattern, constraints.from_spec(spec)) for pattern, spec in specs]
    structures = compressx.structures(params, bound) if bound else {}
    hard = compressx.harden(params, bound, fresh=True).params if bound else params
    compressx.save_model(
        path, hard, bound, structures, model=model, extra={"made": "golden"}, layout=layout, coding=coding
    )


def load(path: Path) -> Loaded:
    """Reads a saved model."""
    s = compressx.load_model(path)
    leaves = dict(zip(paths(s.params), map(np.asarray, jax.tree.leaves(s.params)), strict=True))
    return Loaded(leaves, s.structures, {p: x.format for p, x in s.packed.items()}, s.sizes.packed, s)


def save_again(path: Path, loaded: Loaded, layout: Sequence[tuple[str, str]], coding: str) -> None:
    """Writes what was read."""
    s = loaded.saved
    compressx.save_model(
        path, s.params, s.rules, s.structures, model=s.model, extra=s.extra, layout=layout, coding=coding
    )


def violations(loaded: Loaded) -> int:
    """How many weights lie outside their sets."""
    if not loaded.saved.rules:
        return 0
    count = jax.jit(lambda p, s: compressx.count_violations(p, loaded.saved.rules, s))
    return sum(int(n) for n in count(loaded.saved.params, loaded.structures).values())


def network(name: str, classes: int, options: Mapping[str, Any]) -> Any:
    """A network of that name."""
    return models.build(name, classes, **options)


def shapes_of(model: Any, shape: Sequence[int]) -> tuple[list[str], list[tuple[int, ...]], Any]:
    """The variables of a network for inputs of that shape: paths, shapes and tree."""
    key, x = jax.random.key(0), jax.ShapeDtypeStruct(tuple(shape), np.float32)
    tree = jax.eval_shape(model.init, key, x)
    leaves, treedef = jax.tree.flatten(tree)
    return paths(tree), [leaf.shape for leaf in leaves], treedef


def compiled(model: Any, variables: Any = None) -> Callable[[Any], Any]:
    """A network, or a saved one, in compressed form."""
    return compressx.compile(models.named(model), model) if variables is None else compressx.compile(model, variables)


def compacted(model: Any, variables: Any, x: np.ndarray) -> tuple[Callable[[Any, Any], Any], Any]:
    """A network without its useless channels: `apply(variables, x)` and its variables."""
    small = compaction.compact(model, variables, x)
    return small.apply, small.variables


def recurrent(cell: str, gates: Sequence[np.ndarray], format: str) -> Callable[..., tuple[Any, Any]]:
    """A recurrent cell on packed matrices: all states and the last one of `cell(x, h, c, bias)`."""
    return kernels.prepare_recurrent(cell, [formats.pack(w, format=format) for w in gates])


def product(w: np.ndarray, format: str) -> Callable[[Any], Any]:
    """`x @ w` on a packed matrix."""
    return kernels.prepare_product(formats.pack(w, format=format))


def run(driver: str, variant: str, changes: Mapping[str, Any], workdir: Path) -> dict[str, Any]:
    """The summary of a driver's run; `changes` are settings by dotted key."""
    options = importlib.import_module("experiments.common.driver").Options
    module = importlib.import_module(f"experiments.{driver}.task")
    read = importlib.import_module(f"experiments.{driver}.config").read
    settings = importlib.import_module(f"configs.{driver}").get_config(variant).unlock()
    settings.update_from_flattened_dict(dict(changes))
    summary = module.train_and_evaluate(read(settings), options(workdir, command="golden"))
    return dict(summary)


def about() -> dict[str, str]:
    """The code that is measured, and the versions that its figures may depend on."""
    import jaxlib

    return {
        "compressx": str(Path(compressx.__file__).parent),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "numpy": np.__version__,
    }
