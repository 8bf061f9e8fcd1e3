"""The rules and structures of a saved model, read back: every count of a spec is bounded before it costs anything.

What a rule may take is what its leaves allow. Its arguments have their declared types (`constraints.from_spec`), its
lists fit its leaves, and its projection is traced, which runs nothing: no array in it may take more than `max_bytes`,
and all projections of a file together may have no more operations than `max_bytes` allows, for tracing and compiling
them takes time. Sets that are alike, on leaves of the same shapes, are traced once.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr

from compressx.axes import parse
from compressx.constraints import Constraint, from_spec
from compressx.formats.base import fail
from compressx.formats.container import to_json
from compressx.rules import Bound, bind
from compressx.tree import Key, in_their_precision, path_name, paths

# Operations that the projections of a file may have: some, and more for a file that may be large. Of the default 4 GiB
# they are 139264; 80 different sets of supports have 2**13, as do three codebooks of 8 bits.
OPERATIONS = 1 << 13
BYTES_AN_OPERATION = 1 << 15
_PER_LEAF = 64  # operations that a set over several leaves takes for each, at least; it is not traced to be counted
_PER_LINE = 32  # bytes that tracing takes for each index of a leaf's rows and columns, in lists of them
_PER_NUMBER = 512  # bytes that a callback on the host takes for each number it is given, as Python objects


class Traced(NamedTuple):
    """What tracing a set on leaves of certain shapes says.

    Attributes:
      structure: shapes and dtypes of the structure of the set.
      operations: of `init` and `project`.
      largest: bytes of the largest array that they make.
    """

    structure: Any
    operations: int
    largest: int


def read_path(path: Any, version: int, entry: str) -> tuple[Key, ...]:
    """The keys of a path in a file: of version 1 the parts of one string, later a list of strings and integers."""
    if version == 1:
        if not isinstance(path, str):
            fail(entry, "has no path")
        return tuple(path.split("/"))
    if not isinstance(path, list) or not path or not all(type(k) is str or (type(k) is int and 0 <= k) for k in path):
        fail(entry, "its path is not a list of names and numbers")
    return tuple(path)


def bound_rules(
    listed: Sequence[Any], version: int, params: dict[Key, Any], arrays: dict[str, np.ndarray], max_bytes: int
) -> tuple[tuple[Bound, ...], dict[str, tuple[Any, ...]]]:
    """The rules of a file bound to its leaves, and their structures by name; takes these out of `arrays`.

    Raises:
      CompressedFileError: a rule is not understood, does not fit its leaves, or would take too much.
    """
    leaves = jax.tree.leaves(params)
    index = {name: i for i, name in enumerate(paths(params))}
    bounds, structures = [], {}
    traces = _Traces(max_bytes)
    free = set(index)
    for number, about in enumerate(listed):
        b = _bind(f"rules[{number}]", about, version, index, free, leaves)
        free.difference_update(b.paths)
        template = traces.structure(b, b.take(leaves))
        structures[b.name] = _structure(b, template, about.get("structure"), arrays)
        bounds.append(b)
    return tuple(bounds), structures


def check_cost(bound: Sequence[Bound], params: Any, max_bytes: int) -> None:
    """Raises CompressedFileError where projecting leaves onto their sets would take too much, as for a saved model."""
    traces, leaves = _Traces(max_bytes), jax.tree.leaves(params)
    for b in bound:
        traces.structure(b, b.take(leaves))


def pattern_of(b: Bound) -> str:
    """A regular expression that matches the leaves of a rule and no others."""
    return "|".join(map(re.escape, b.paths))


def _bind(entry: str, about: Any, version: int, index: dict[str, int], free: set[str], leaves: Sequence[Any]) -> Bound:
    if not isinstance(about, dict) or not isinstance(about.get("spec"), dict):
        fail(entry, "has no constraint")
    named = about.get("paths")
    if not isinstance(named, list):
        fail(f"{entry}/paths", "is not a list")
    named = [path_name(read_path(p, version, f"{entry}/paths")) for p in named]
    known = named and all(p in free for p in named)
    if not known or len(set(named)) < len(named):
        fail(entry, "its paths are not leaves of the file, or another rule applies to them")
    mine = sorted(named, key=index.__getitem__)
    try:
        constraint = from_spec(about["spec"])
    except Exception as error:  # a hostile spec may upset a factory in any way
        fail(mine[0], f"its constraint {_short(about['spec'])} is refused: {_short(error)}")
    if not constraint.joint and len(mine) != 1:
        fail(mine[0], f"{_short(constraint)} applies to one leaf, the file names {len(mine)}")
    for path in mine:
        if not jnp.issubdtype(leaves[index[path]].dtype, jnp.floating):
            fail(path, f"only floating-point leaves can be constrained, got {leaves[index[path]].dtype}")
    said = about.get("axes") if version > 1 else None
    if said is not None and (not isinstance(said, list) or not all(isinstance(w, str) for w in said)):
        fail(f"{entry}/axes", "are not a list of words")
    try:
        b = bind(mine[0], mine, [index[p] for p in mine], leaves, constraint, parse(said) if said else None)
    except ValueError as error:
        fail(f"{entry}/axes", _short(error))
    return b._replace(name=pattern_of(b)) if constraint.joint else b


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


class _Traces:
    """Sets traced so far, and the operations that are left for others."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.limit = self.left = OPERATIONS + max_bytes // BYTES_AN_OPERATION
        self.found: dict[Any, Traced] = {}

    def structure(self, b: Bound, w: Any) -> Any:
        """The shapes and dtypes of a rule's structure, each of its sets checked on its leaves w."""
        each = []
        for one in b.constraint.sets:
            if one.leaf is not None:  # a set over a single leaf, which applies to every leaf of the tuple
                each.append(tuple(self._of(b, one.leaf, x) for x in w))
            else:
                each.append(self._of(b, one, w))
        return tuple(each)

    def _of(self, b: Bound, one: Constraint, w: Any) -> Any:
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), w)
        shapes = [(x.shape, x.dtype.name) for x in jax.tree.leaves(like)]
        kind = (to_json(one.spec), one.slice is not None, *shapes)
        if kind not in self.found:
            lines = sum(math.prod(shape[:-1]) + math.prod(shape[-1:]) for shape, _ in shapes)
            if _PER_LINE * lines > self.max_bytes:
                fail(b.paths[0], f"{_short(one)} applies to {lines} rows and columns, too many for max_bytes")
            self._spend(b, _PER_LEAF * len(shapes) if one.joint else 0, take=False)
            try:
                with in_their_precision(like):
                    traced = trace(one, like)
            except Exception as error:  # as above
                fail(b.paths[0], f"{_short(one)} does not fit {_short([s for s, _ in shapes])}: {_short(error)}")
            if traced.largest > self.max_bytes:
                fail(b.paths[0], f"projecting onto {_short(one)} makes an array of more than {self.max_bytes} bytes")
            self._spend(b, traced.operations)
            self.found[kind] = traced
        return self.found[kind].structure

    def _spend(self, b: Bound, operations: int, take: bool = True) -> None:
        if operations > self.left:
            fail(
                b.paths[0],
                f"the projections of the rules up to this one have more than {self.limit} operations, which "
                f"max_bytes={self.max_bytes} allows; raise it",
            )
        self.left -= operations if take else 0


def trace(constraint: Constraint, w: Any) -> Traced:
    """Traces `init` and `project` of a set on a leaf, or a tuple of leaves, given as shapes and dtypes."""

    def run(w: Any) -> tuple[Any, Any]:
        structure = constraint.init(w)
        return structure, constraint.project(w, structure)

    traced, (structure, _) = jax.make_jaxpr(run, return_shape=True)(w)
    return Traced(structure, *_cost(traced.jaxpr))


def _cost(jaxpr: Jaxpr) -> tuple[int, int]:
    """Operations, those of inner programs included, and bytes of the largest array that is made."""
    operations, largest = 0, 0
    for equation in jaxpr.eqns:
        operations += 1
        avals = [v.aval for v in equation.outvars]
        largest = max(largest, *(a.size * a.dtype.itemsize for a in avals if isinstance(a, ShapedArray)), 0)
        if "callback" in equation.primitive.name:
            given = [v.aval for v in equation.invars]
            largest = max(largest, _PER_NUMBER * sum(a.size for a in given if isinstance(a, ShapedArray)))
        inside = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: isinstance(x, _JAXPRS))
        for inner in (x for x in inside if isinstance(x, _JAXPRS)):
            more, size = _cost(inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner)
            operations, largest = operations + more, max(largest, size)
    return operations, largest


_JAXPRS = (ClosedJaxpr, Jaxpr)


def _structure(b: Bound, template: Any, names: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The pytree that the constraint makes, filled with the file's arrays."""
    likes, treedef = jax.tree.flatten(template)
    if not isinstance(names, list):
        fail(b.paths[0], "its structure is not a list of arrays")
    if len(names) != len(likes):
        fail(b.paths[0], f"its structure has {len(names)} arrays, {_short(b.constraint)} needs {len(likes)}")
    filled = []
    for name, like in zip(names, likes, strict=True):
        a = claim(arrays, name, b.paths[0])
        if a.shape != like.shape or a.dtype != like.dtype:
            found, expected = f"{a.dtype} {list(a.shape)}", f"{like.dtype} {list(like.shape)}"
            fail(b.paths[0], f"its structure holds {found}, expected {expected}")
        filled.append(a)
    return jax.tree.unflatten(treedef, filled)


def claim(arrays: dict[str, np.ndarray], name: Any, entry: str) -> np.ndarray:
    """Takes an array out of the file's, so that each is used once."""
    if not isinstance(name, str) or name not in arrays:
        fail(entry, f"its array {str(name)[:80]!r} is not in the file, or is used twice")
    return arrays.pop(name)
