"""Channels that can go without a change of the outputs: unused paths, exact zeros, and constants that a bias takes."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

from compressx.compaction.channels import Channels, CompactionError, channels
from compressx.compaction.known import Flow, flows
from compressx.trace import Function


class Dead(NamedTuple):
    """What can be removed from a network.

    Attributes:
      kept: path -> per axis, the indices that stay (int32), or None where all do; leaves that lose nothing are not in.
      folded: path -> what the removed constant channels add to that leaf (float32, of the whole leaf's shape).
    """

    kept: dict[str, tuple[np.ndarray | None, ...]]
    folded: dict[str, np.ndarray]


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

    Raises:
      CompactionError: see `channels`; or inputs without an element, of which every channel would be dead.
    """
    for leaf in jax.tree.leaves(x):
        if 0 in leaf.shape:
            raise CompactionError(f"inputs of shape {leaf.shape} hold nothing: give those of a batch of 1")
    found = channels(model, variables, x, keep)
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), x)
    carried, vectors = jax.device_get(jax.jit(lambda v: flows(found, v, spec))(variables))
    takers = [_taker(found, c.op) for c in found.contractions]
    stays = [f.right & ~f.exact if taker is not None else f.right for f, taker in zip(carried, takers, strict=True)]
    live = _live(found, carried, stays)
    folded: dict[str, np.ndarray] = {}
    for c, f, taker in zip(found.contractions, carried, takers, strict=True):
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
            kept[path] = tuple(None if m is None or m.all() else np.flatnonzero(m).astype(np.int32) for m in masks)
    return Dead(kept, folded)


def _live(found: Channels, carried: list[Flow], stays: list[np.ndarray]) -> np.ndarray:
    """unit -> whether it must stay: the least set that holds the fixed units and whatever a member reads."""
    live = np.ones(found.units, bool)
    leaf_axes = [u for leaf in range(len(found.program.paths)) for u in found.axes[leaf] if u is not None and u.size]
    for units in leaf_axes:  # units that no leaf has (of constants, of broadcasts) cannot be cut
        live[units] = False
    live[0] = True

    def alive(value: int, axis: int | None) -> np.ndarray:
        units = None if axis is None else found.axes[value][axis]
        return np.ones(1, bool) if units is None else live[units]

    before = -1
    while before != live.sum():
        before = int(live.sum())
        for k in reversed(range(len(carried))):
            c = found.contractions[k]
            lhs, rhs = found.program.ops[c.op].inputs
            read = (carried[k].left & alive(lhs, c.free[0])[None]).any(1)
            read &= (stays[k] & alive(rhs, c.free[1])[None]).any(1)
            for value, axis in ((lhs, c.axes[0]), (rhs, c.axes[1])):
                summed = found.axes[value][axis]
                if summed is not None:
                    live[summed[read]] = True
        if before == live.sum():  # no axis may become empty: its first unit stays
            for units in leaf_axes:
                if not live[units].any():
                    live[units[0]] = True
    return live


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
