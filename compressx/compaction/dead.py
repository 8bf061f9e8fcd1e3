"""Channels that can go without a change of the outputs: unused paths, exact zeros, and constants that a bias takes."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from compressx.compaction.channels import Channels, CompactionError, Scope, channels
from compressx.compaction.known import Flows, flows
from compressx.compaction.primitives import Axis
from compressx.compaction.stacked import equalise
from compressx.trace import Function, arrays


class Dead(NamedTuple):
    """What can be removed from a network.

    Attributes:
      kept: path -> per axis, the indices that stay (int32), or None where all do; leaves that lose nothing are not in.
        Of an axis of which every slice of a stacked leaf keeps others they are `[steps, indices]`.
      folded: path -> what the removed constant channels add to that leaf (float32, of the whole leaf's shape).
      stuck: "path[axis]" -> the operation that keeps an index at which all weights are 0: one that fixes the axis, or,
        of an axis that makes channels, one that reads a channel which is not zero for all that.

    Example:
      >>> two = lambda v, x: jnp.maximum(x @ v["a"], 0) @ v["b"]
      >>> variables = {"a": jnp.asarray([[1.0, 0.0, 2.0]]), "b": jnp.ones((3, 1))}  # the second unit is never on
      >>> compressx.compaction.dead(two, variables, jnp.zeros((1, 1))).kept["b"]
      (array([0, 2], dtype=int32), None)
    """

    kept: dict[str, tuple[np.ndarray | None, ...]]
    folded: dict[str, np.ndarray]
    stuck: dict[str, str]


class Absorber(NamedTuple):
    """A vector that is added to a product after known gains: it can take a constant.

    Attributes:
      leaf: number of the leaf.
      sign: -1 where it is subtracted.
      gains: values `[c]` that multiply the product on the way.
    """

    leaf: int
    sign: int
    gains: tuple[int, ...]


def dead(model: nn.Module | Function, variables: Any, x: Any, keep: tuple[str, ...] = ()) -> Dead:
    """Finds every channel whose removal leaves the outputs unchanged, to a fixed point.

    A channel stays if an output reads it, through products that are not exactly zero. It goes if nobody reads it (all
    weights on it are zero, or lead only to channels that go), if it is exactly zero (an empty filter whose bias, or
    normalisation, is zero too), or if it is one constant that every reader can take into a bias: a filter that is empty
    but shifted emits such a map. Behind zero padding a constant map is not constant any more; there the channel stays,
    unless the taps that reach the padding are zero. Coupled channels go only together.

    Args:
      model: a flax module (in evaluation mode, see `trace.function_of`), or any `f(variables, x)`.
      variables: pytree of concrete arrays, parameters and batch statistics.
      x: inputs, arrays or shapes; only the shape matters, and a batch of 1 is the fastest.
      keep: see `channels`.

    Returns:
      `Dead`: the indices that stay, and what the constants among those that go add to biases.

    Raises:
      CompactionError: see `channels`; or inputs without an element, of which every channel would be dead.

    Example:
      >>> biased = lambda v, x: jnp.maximum(x @ v["a"] + v["s"][None], 0) @ v["b"] + v["t"][None]
      >>> first = {"a": jnp.asarray([[1.0, 0.0]]), "s": jnp.asarray([0.0, 3.0])}
      >>> variables = first | {"b": jnp.ones((2, 1)), "t": jnp.zeros(1)}
      >>> compressx.compaction.dead(biased, variables, jnp.zeros((1, 1))).folded  # the second unit is always 3
      {'t': array([3.], dtype=float32)}
    """
    for leaf in jax.tree.leaves(x):
        if 0 in leaf.shape:
            raise CompactionError(f"inputs of shape {leaf.shape} hold nothing: give those of a batch of 1")
    found = channels(model, variables, x, keep)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    carried, vectors = jax.device_get(jax.jit(lambda v: flows(found, v, spec))(arrays(variables)))
    takers = [_taker(found, c.op) if c.axes[1] is not None else None for c in found.contractions]
    edges = list(_edges(found.scope, carried, takers))
    live, readers = _live(found, edges)
    equalise(found.scope, live)
    folded: dict[str, np.ndarray] = {}
    for c, f, taker in zip(found.contractions, carried.own, takers, strict=True):
        units = found.axes[found.program.ops[c.op].inputs[0]][c.axes[0]]
        if taker is None or units is None:
            continue
        gone = ~live[units]
        if (f.exact & (f.shift != 0))[gone].any():
            shift = np.where(f.exact[gone], f.shift[gone], 0).sum(0, dtype=np.float64) * taker.sign
            for gain in taker.gains:
                shift = shift * vectors[gain]
            path = found.program.paths[taker.leaf]
            folded[path] = folded.get(path, np.zeros(shift.shape, np.float32)) + shift.astype(np.float32)
    kept = {}
    for leaf, path in enumerate(found.program.paths):
        masks = [None if units is None else live[units] for units in found.axes[leaf]]
        if any(m is not None and not m.all() for m in masks):
            kept[path] = tuple(None if m is None or m.all() else _indices(m) for m in masks)
    return Dead(kept, folded, _stuck(found, variables, {u: edges[k].name for u, k in readers.items()}))


def _indices(mask: np.ndarray) -> np.ndarray:
    """Where a mask is true; of a stacked leaf in each slice, or in all where they agree."""
    if mask.ndim == 2 and (mask == mask[0]).all():
        mask = mask[0]
    return np.nonzero(mask)[-1].astype(np.int32).reshape(*mask.shape[:-1], -1)


def _stuck(found: Channels, variables: Any, readers: dict[int, str]) -> dict[str, str]:
    """Why axes of weights keep indices at which all weights are 0; `readers` are what reads a unit, by name."""
    stuck = {}
    for leaf, array in enumerate(arrays(variables)):
        if np.ndim(array) < 2:
            continue
        empty = np.asarray(array) == 0
        for a, units in enumerate(found.axes[leaf]):
            if empty.all():
                continue
            where = f"{found.program.paths[leaf]}[{a}]"
            zero = empty.all(tuple(k for k in range(empty.ndim) if k != a))
            held = np.zeros((1, empty.shape[a]), int) if units is None else np.atleast_2d(units)
            if (leaf, a) in found.reasons and ((held == 0).any(0) & zero).any():
                stuck[where] = found.reasons[leaf, a]
            elif found.roles[leaf, a] == "out":
                read = [readers[int(u)] for u in held[:, zero].ravel() if int(u) in readers]
                if read:
                    stuck[where] = f"{read[0]} reads it"
    return stuck


class Edge(NamedTuple):
    """A contraction, as far as liveness goes.

    Attributes:
      name: of the operation.
      summed: per operand, the units of the summed axis.
      free: per operand, the units that the sums are told apart by, or None.
      left: bool `[P, F]`, see `Flow`.
      right: the same, without what a bias takes.
    """

    name: str
    summed: tuple[Axis, Axis]
    free: tuple[Axis, Axis]
    left: np.ndarray
    right: np.ndarray


def _edges(scope: Scope, carried: Flows, takers: Sequence[Absorber | None] | None) -> Iterator[Edge]:
    """The contractions of a scope and of all within it; in a scan that has the same units in all steps, once."""
    for k, (c, f) in enumerate(zip(scope.contractions, carried.own, strict=True)):
        values = scope.program.ops[c.op].inputs[:2]
        ends = [scope.axes[v] for v in values] * (3 - len(values))  # a plain sum has one operand
        right = f.right & ~f.exact if takers is not None and takers[k] is not None else f.right
        name = scope.program.ops[c.op].primitive.name
        yield Edge(name, _at(ends, c.axes), _at(ends, c.free), np.asarray(f.left), np.asarray(right))
    for number, bodies in scope.inner.items():
        inside = carried.inner[number]
        for step, body in enumerate(bodies):
            ever = len(bodies) == 1  # what any step can carry
            leaves, treedef = jax.tree.flatten(inside)
            held = [np.asarray(x).any(0) if ever else np.asarray(x)[step] for x in leaves]
            yield from _edges(body, jax.tree.unflatten(treedef, held), None)


def _at(ends: Sequence[tuple[Axis, ...]], axes: tuple[int | None, int | None]) -> tuple[Axis, Axis]:
    left, right = (None if a is None else units[a] for units, a in zip(ends, axes, strict=True))
    return left, right


def _live(found: Channels, edges: Sequence[Edge]) -> tuple[np.ndarray, dict[int, int]]:
    """unit -> whether it must stay: the least set that holds the fixed units and whatever a member reads.

    Returns:
      That, and unit -> the edge by which it was found to be read.
    """
    readers: dict[int, int] = {}
    live = np.ones(found.units, bool)
    leaf_axes = [
        row
        for leaf in range(len(found.program.paths))
        for units in found.axes[leaf]
        if units is not None and units.size
        for row in np.atleast_2d(units)
    ]
    for units in leaf_axes:  # units that no leaf has (of constants, of broadcasts) cannot be cut
        live[units] = False
    live[0] = True

    def alive(units: Axis) -> np.ndarray:
        return np.ones(1, bool) if units is None else live[units]

    before = -1
    while before != live.sum():
        before = int(live.sum())
        for number, edge in reversed(list(enumerate(edges))):
            read = (edge.left & alive(edge.free[0])[None]).any(1)
            read &= (edge.right & alive(edge.free[1])[None]).any(1)
            for summed in edge.summed:
                if summed is not None:
                    new = summed[read][~live[summed[read]]]
                    readers |= dict.fromkeys(map(int, new), number)
                    live[new] = True
        if before == live.sum():  # no axis may become empty: its first unit stays
            for units in leaf_axes:
                if not live[units].any():
                    live[units[0]] = True
    return live, readers


def _taker(found: Channels, number: int) -> Absorber | None:
    """The leaf that can take a constant added to the result of an op, if there is one."""
    program = found.program
    op = program.ops[number]
    if op.primitive.name == "conv_general_dilated":
        axis = op.params["dimension_numbers"].out_spec[1]
    else:
        axis = len(program.shapes[op.outputs[0]]) - 1
    readers = program.readers()
    made = {v: o for o in program.ops for v in o.outputs}

    def vector(value: int) -> tuple[int, bool] | None:
        """The `[c]` value that this one repeats along every axis but the channels', and if nobody else reads it."""
        shape, alone = program.shapes[value], True
        while len(program.shapes[value]) != 1:
            source = made.get(value)
            alone &= len(readers.get(value, ())) == 1
            if source is None or source.primitive.name not in ("broadcast_in_dim", "reshape"):
                return None
            inner = program.shapes[source.inputs[0]]
            if source.primitive.name == "reshape":
                if len(inner) != 1 or any(n != 1 for a, n in enumerate(shape) if a != axis):
                    return None
            else:
                where = source.params["broadcast_dimensions"]
                if len(inner) == 1:
                    if where != (axis,) or inner[0] != shape[axis]:
                        return None
                elif where != tuple(range(len(shape))) or any(n != 1 for a, n in enumerate(inner) if a != axis):
                    return None
                else:
                    shape = inner
            value = source.inputs[0]
        return value, alone

    def leaf_of(value: int) -> int | None:
        """The leaf that this vector is, or that a sum starts from, if it is read nowhere else."""
        while len(readers.get(value, ())) == 1:
            if value < len(program.paths):
                return value
            source = made.get(value)
            if source is None or source.primitive.name not in ("add", "sub"):
                return None
            value = source.inputs[0]
        return None

    value, gains = op.outputs[0], []
    while len(readers.get(value, ())) == 1:
        reader, operand = readers[value][0]
        if reader < 0:
            return None
        step = program.ops[reader]
        name = step.primitive.name
        if name not in ("add", "sub", "mul") or len(program.shapes[step.outputs[0]]) != len(program.shapes[value]):
            return None
        other = step.inputs[1 - operand]
        along = vector(other)
        if name == "mul":
            if along is None or along[0] not in found.weights:
                return None
            gains.append(along[0])
        elif name == "sub" and operand == 1:
            return None
        elif along is not None and along[1] and program.shapes[along[0]] == (program.shapes[value][axis],):
            leaf = leaf_of(along[0])
            if leaf is not None:
                return Absorber(leaf, -1 if name == "sub" else 1, tuple(gains))
        value = step.outputs[0]
    return None
