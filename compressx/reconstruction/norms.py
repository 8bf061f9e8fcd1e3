"""Batch normalisation in a traced program, and its statistics after the layers before it have changed.

A normalisation is found by what it computes, not by its name: a leaf that goes through rsqrt(v + eps) (or a square root
that divides) into a factor is a running variance, and the leaf that is subtracted, directly or times that factor, is
the running mean.

By *moment matching* the statistics move as those of the compressed network do, relative to the dense one on the same
examples, so that a network that has not changed keeps its own:

    v' = v var~ / var,   m' = mean~ - (mean - m) sqrt(v' / v)

Sources: re-estimated statistics: E. Frantar, S. P. Singh, D. Alistarh, "Optimal Brain Compression", 2022; matching the
moments of the dense network instead: ours.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from compressx.reconstruction.blocks import leaf_behind, makers_of
from compressx.trace import Program

RULES = ("match", "estimate", "keep")
_ALIVE = 1e-6  # a channel that varies less than this share of its running variance on the examples says nothing
_LEAST = 1e-2  # share of its variance that a channel keeps: an empty filter has none, and is not amplified for that


class Norm(NamedTuple):
    """A batch normalisation.

    Attributes:
      op: the operation that first takes its input.
      value: the input.
      axis: of the channels in it.
      mean: the leaf of running means, `[c]`.
      var: the leaf of running variances, `[c]`.
    """

    op: int
    value: int
    axis: int
    mean: int
    var: int


def norms(program: Program, data: frozenset[int]) -> list[Norm]:
    """The batch normalisations of a program, in its order; those within loops are not among them."""
    makers = makers_of(program)
    roots = _roots(program, data)
    variances = _variances(program, makers, roots)
    readers = program.readers()
    found: list[Norm] = []
    for number, op in enumerate(program.ops):
        if op.primitive.name not in ("mul", "div") or op.outputs[0] not in data:
            continue
        sides = [k for k in (0, 1) if op.inputs[k] not in data]
        if len(sides) != 1 or (op.primitive.name == "div" and sides != [1]):
            continue
        gain, value = op.inputs[sides[0]], op.inputs[1 - sides[0]]
        var = variances & roots.get(gain, frozenset())
        if len(var) != 1:
            continue
        first, mean = number, None
        if value in makers and program.ops[makers[value]].primitive.name == "sub":
            before = program.ops[makers[value]]
            mean = leaf_behind(program, before.inputs[1], makers)
            first, value = makers[value], before.inputs[0]
        else:
            mean = _mean_within(program, readers.get(op.outputs[0], ()), makers, roots, gain, var)
        axis = _axis(program, gain, makers)
        (variance,) = var
        if mean is None or axis is None or value not in data:
            continue
        if program.shapes[mean] == program.shapes[variance] == (program.shapes[value][axis],):
            found.append(Norm(first, value, axis, mean, variance))
    leaves = [leaf for norm in found for leaf in (norm.mean, norm.var)]
    return [norm for norm in found if leaves.count(norm.mean) == leaves.count(norm.var) == 1]


def _roots(program: Program, data: frozenset[int]) -> dict[int, frozenset[int]]:
    """value that depends on no input -> the leaves that it depends on."""
    roots = {leaf: frozenset((leaf,)) for leaf in range(len(program.paths))}
    for op in program.ops:
        if not any(v in data for v in op.inputs):
            held = frozenset[int]().union(*(roots.get(v, frozenset()) for v in op.inputs))
            roots.update(dict.fromkeys(op.outputs, held))
    return roots


def _variances(program: Program, makers: dict[int, int], roots: dict[int, frozenset[int]]) -> frozenset[int]:
    """The leaves that go, with a constant added, into a square root."""
    found = set[int]()
    for op in program.ops:
        if op.primitive.name in ("rsqrt", "sqrt") and op.outputs[0] in roots:
            value = op.inputs[0]
            inner = program.ops[makers[value]] if value in makers else None
            if inner is not None and inner.primitive.name in ("add", "max"):
                found.update(leaf for v in inner.inputs if (leaf := leaf_behind(program, v, makers)) is not None)
    return frozenset(leaf for leaf in found if len(program.shapes[leaf]) == 1)


def _mean_within(
    program: Program,
    readers: Sequence[tuple[int, int]],
    makers: dict[int, int],
    roots: dict[int, frozenset[int]],
    gain: int,
    var: frozenset[int],
) -> int | None:
    """The leaf m in x * gain + (b - m * gain): multiplied by what depends on the variance, and not in the gain."""
    if len(readers) != 1 or readers[0][0] < 0:
        return None
    op, operand = program.ops[readers[0][0]], readers[0][1]
    if op.primitive.name not in ("add", "sub"):
        return None
    offset = op.inputs[1 - operand]
    waiting, seen, found = [offset], set[int](), set[int]()
    while waiting:
        value = waiting.pop()
        if value in seen or value not in makers or value not in roots:
            continue
        seen.add(value)
        inner = program.ops[makers[value]]
        waiting.extend(inner.inputs)
        if inner.primitive.name in ("mul", "div"):
            for k in (0, 1):
                leaf = leaf_behind(program, inner.inputs[k], makers)
                other = roots.get(inner.inputs[1 - k], frozenset())
                if leaf is not None and leaf not in roots[gain] and var <= other:
                    found.add(leaf)
    return found.pop() if len(found) == 1 else None


def _axis(program: Program, value: int, makers: dict[int, int]) -> int | None:
    """The axis along which a value that depends on vectors alone lies, or None."""
    shape = program.shapes[value]
    wide = [a for a, n in enumerate(shape) if n > 1]
    if value not in makers:
        return wide[0] if len(wide) == 1 else (len(shape) - 1 if shape and not wide else None)
    op = program.ops[makers[value]]
    if op.primitive.name == "broadcast_in_dim":
        inner = _axis(program, op.inputs[0], makers)
        return None if inner is None else op.params["broadcast_dimensions"][inner]
    if len(wide) == 1:
        return wide[0]
    same = [v for v in op.inputs if program.shapes[v] == shape]
    axes = {_axis(program, v, makers) for v in same if v in makers or v < len(program.paths)}
    return axes.pop() if len(axes) == 1 else None


Moments = tuple[NDArray[np.float64], NDArray[np.float64]]


def moments(parts: Sequence[Any], axis: int) -> Moments:
    """Mean and variance of each channel over all other axes of all parts, float64 `[c]`."""
    with jax.enable_x64(True):
        count = sum(x.size // x.shape[axis] for x in parts)
        mean = sum(np.asarray(_sum(x, axis)) for x in parts) / count
        var = sum(np.asarray(_squares(x, axis, mean)) for x in parts) / count
    return mean, var


def _sum(x: Array, axis: int) -> Array:
    return _sums(x, axis, jnp.zeros(x.shape[axis], jnp.float64))[0]


def _squares(x: Array, axis: int, mean: NDArray[np.float64]) -> Array:
    return _sums(x, axis, jnp.asarray(mean, jnp.float64))[1]


def _compiled(x: Array, axis: int, shift: Array) -> tuple[Array, Array]:
    others = tuple(a for a in range(x.ndim) if a != axis)
    moved = x.astype(jnp.float64) - jnp.expand_dims(shift, others)
    return moved.sum(others), jnp.square(moved).sum(others)


_sums = jax.jit(_compiled, static_argnums=1)


def statistics(
    rule: str, mean: NDArray[Any], var: NDArray[Any], now: Moments, dense: Moments
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Running mean and variance of a normalisation for the compressed network.

    Args:
      rule: "match" the moments of the dense network, or "estimate" them on the examples.
      mean: the running mean, `[c]`.
      var: the running variance, `[c]`.
      now: the moments of the input in the compressed network.
      dense: those in the dense one.

    Returns:
      The new running mean and variance, in the precision of the old ones.
    """
    if rule == "estimate":
        new_mean, new_var = now
    else:
        held, seen = np.asarray(var, np.float64), dense[1]
        alive = seen > _ALIVE * held
        ratio = np.where(alive, now[1] / np.where(alive, seen, 1.0), 1.0)
        ratio = np.maximum(ratio, _LEAST)
        new_var = held * ratio
        new_mean = now[0] - (dense[0] - np.asarray(mean, np.float64)) * np.sqrt(ratio)
    return new_mean.astype(mean.dtype), new_var.astype(var.dtype)
