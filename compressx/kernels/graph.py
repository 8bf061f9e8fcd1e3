"""A network as a short list of fused steps: convolutions with their bias, residual and activation, poolings, the rest.

The traced program (`compaction.trace`) is read once. What depends on the variables alone is computed; scalings and
shifts by channel that follow a convolution (batch normalisation) go into its weights and bias; an addition of two
images and a rectifier, in either order, go into the convolution that feeds them. Everything else stays the operation
that it is.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax import lax

from compressx.kernels.pattern_conv import SLOPE
from compressx.kernels.schedule import Geometry, Pads
from compressx.trace import Op, Program


class Conv(NamedTuple):
    """`y = act(conv(x, w) + bias + residual)`, or with `residual_after` `act(conv(x, w) + bias) + residual`.

    Values are numbers, -1 stands for none.
    """

    x: int
    y: int
    w: np.ndarray
    path: str | None
    scale: np.ndarray
    bias: np.ndarray
    geometry: Geometry
    residual: int
    activation: str
    residual_after: bool = False


class Pool(NamedTuple):
    """The largest value of each window."""

    x: int
    y: int
    window: tuple[int, int]
    strides: tuple[int, int]
    pads: Pads


class Other(NamedTuple):
    """An operation left as it is, on values and constants."""

    op: Op
    constants: dict[int, Any]


Step = Conv | Pool | Other


def steps(program: Program, variables: Any) -> tuple[list[Step], dict[int, Any]]:
    """Fuses a traced program.

    Args:
      program: of a network in evaluation mode.
      variables: concrete arrays, as traced.

    Returns:
      The steps in order, and what is known of values without inputs (the program's outputs may be among them).
    """
    known: dict[int, Any] = dict(enumerate(jax.tree.leaves(variables))) | dict(program.constants)
    uses = program.readers()
    readers = {value: len(where) for value, where in uses.items()}
    found: list[Step] = []
    open_convs: dict[int, Conv] = {}  # value -> a convolution that later operations may still join
    nonnegative: set[int] = set()
    rectified: set[int] = set()  # operations that are already part of a convolution

    def close(value: int) -> None:
        if value in open_convs:
            conv = open_convs.pop(value)
            if conv.activation in ("relu", "relu6") and not conv.residual_after:
                nonnegative.add(value)
            found.append(conv)

    for number, op in enumerate(program.ops):
        if number in rectified:
            continue
        if all(v in known for v in op.inputs):
            known |= zip(op.outputs, _bind(op, [known[v] for v in op.inputs]), strict=True)
            continue
        out = op.outputs[0]
        leaky = _leaky(op, open_convs, known, uses, program)
        if leaky is not None:
            before, last = leaky
            out = program.ops[last].outputs[0]
            open_convs[out] = open_convs.pop(before)._replace(y=out, activation="leaky")
            rectified.add(last)
            continue
        joined = _join(op, open_convs, known, readers, program.shapes)
        if joined is not None:
            before, conv = joined
            del open_convs[before]
            if conv.residual >= 0:
                close(conv.residual)
            open_convs[out] = conv._replace(y=out)
            continue
        fresh = _conv(op, known, program)
        if fresh is not None:
            close(fresh.x)
            open_convs[out] = fresh
            continue
        for v in op.inputs:
            close(v)
        pool = _pool(op, nonnegative)
        if pool is not None:
            found.append(pool)
            if pool.x in nonnegative:
                nonnegative.add(out)
        else:
            found.append(Other(op, {v: known[v] for v in op.inputs if v in known}))
    for v in program.outputs:
        close(v)
    return found, known


def _bind(op: Op, arguments: list[Any]) -> list[Any]:
    out = op.primitive.bind(*arguments, **op.params)
    return list(out) if op.primitive.multiple_results else [out]


def _conv(op: Op, known: dict[int, Any], program: Program) -> Conv | None:
    """A convolution of NHWC images with known HWIO kernels, without dilation."""
    if op.primitive.name != "conv_general_dilated" or op.inputs[1] not in known or op.inputs[0] in known:
        return None
    p = op.params
    x, w = program.shapes[op.inputs[0]], known[op.inputs[1]]
    numbers = lax.conv_dimension_numbers(x, w.shape, ("NHWC", "HWIO", "NHWC")) if len(x) == 4 else None
    pads = p["padding"]
    plain = (
        p["dimension_numbers"] == numbers
        and set(p["lhs_dilation"]) == set(p["rhs_dilation"]) == {1}
        and p["batch_group_count"] == 1
        and all(v >= 0 for pair in pads for v in pair)
        and np.dtype(w.dtype) == np.float32
    )
    if not plain:
        return None
    name = program.paths[op.inputs[1]] if op.inputs[1] < len(program.paths) else None
    (t, b), (l, r) = pads
    geometry = Geometry(
        (int(w.shape[0]), int(w.shape[1])),
        (int(p["window_strides"][0]), int(p["window_strides"][1])),
        ((int(t), int(b)), (int(l), int(r))),
        int(p["feature_group_count"]),
    )
    cout = w.shape[3]
    scale, bias = np.ones(cout, np.float32), np.zeros(cout, np.float32)
    return Conv(op.inputs[0], op.outputs[0], np.asarray(w), name, scale, bias, geometry, -1, "none")


def _pool(op: Op, nonnegative: set[int]) -> Pool | None:
    """A maximum over windows; with padding only of values that are not negative, where zeros never win wrongly."""
    if op.primitive.name != "reduce_window_max":
        return None
    p = op.params
    window, strides, pads = p["window_dimensions"], p["window_strides"], p["padding"]
    if len(window) != 4 or {window[0], window[3], strides[0], strides[3]} != {1} or any(pads[0]) or any(pads[3]):
        return None
    if set(p["base_dilation"]) | set(p["window_dilation"]) != {1}:
        return None
    padded = any(pads[1]) or any(pads[2])
    if padded and op.inputs[0] not in nonnegative or any(v < 0 for pair in pads for v in pair):
        return None
    if any(max(pad) >= size for pad, size in zip(pads, window, strict=True)):
        return None  # a window may lie beyond the image
    sides = ((int(pads[1][0]), int(pads[1][1])), (int(pads[2][0]), int(pads[2][1])))
    return Pool(
        op.inputs[0], op.outputs[0], (int(window[1]), int(window[2])), (int(strides[1]), int(strides[2])), sides
    )


def _by_channel(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """A known operand as one number a channel: float32 `[c]`, or None where it varies otherwise."""
    v = np.asarray(value)
    if v.ndim == 0:
        return np.full(shape[-1], v, np.float32)
    if v.ndim != len(shape):
        return None
    row = v.reshape(-1, v.shape[-1])[0]
    if not np.array_equal(v, np.broadcast_to(row, v.shape), equal_nan=True):
        return None
    return np.broadcast_to(row, shape[-1:]).astype(np.float32)


def _leaky(
    op: Op,
    convs: dict[int, Conv],
    known: dict[int, Any],
    uses: dict[int, list[tuple[int, int]]],
    program: Program,
) -> tuple[int, int] | None:
    """The open convolution y of which `op` is the first half of `max(y, 0.1 y)`, and the other half's number."""
    if op.primitive.name != "mul" or len(op.inputs) != 2:
        return None
    out = op.outputs[0]
    for value, factor in (op.inputs, op.inputs[::-1]):
        if value not in convs or factor not in known or convs[value].activation != "none":
            continue
        slope = _by_channel(known[factor], program.shapes[value])
        last = uses[out][0][0] if len(uses.get(out, ())) == 1 else -1
        if last < 0 or slope is None or not (slope == np.float32(SLOPE)).all():
            continue
        other = program.ops[last]
        if other.primitive.name == "max" and set(other.inputs) == {value, out} and len(uses[value]) == 2:
            return value, last
    return None


def _join(
    op: Op,
    convs: dict[int, Conv],
    known: dict[int, Any],
    readers: dict[int, int],
    shapes: tuple[tuple[int, ...], ...],
) -> tuple[int, Conv] | None:
    """The open convolution that an elementwise operation becomes part of: the value it was, and what it is then."""
    name = op.primitive.name
    if name not in ("add", "add_any", "sub", "mul", "div", "max", "min") or len(op.inputs) != 2:
        return None
    for side, other in ((0, 1), (1, 0)):
        value, rest = op.inputs[side], op.inputs[other]
        conv = convs.get(value)
        if conv is None or readers.get(value, 0) != 1 or shapes[value] != shapes[op.outputs[0]]:
            continue
        if rest not in known:
            same = name in ("add", "add_any") and shapes[rest] == shapes[value] and rest != value
            if same and conv.residual < 0:
                return value, conv._replace(residual=rest, residual_after=conv.activation != "none")
            continue
        v = _by_channel(known[rest], shapes[value])
        if v is None:
            continue
        if name in ("max", "min"):
            if name == "max" and conv.activation == "none" and not v.any():
                return value, conv._replace(activation="relu")
            if name == "min" and conv.activation == "relu" and (v == 6).all():
                return value, conv._replace(activation="relu6")
            continue
        if conv.activation != "none" or name in ("sub", "div") and side == 1:
            continue
        if name in ("add", "add_any", "sub"):
            with np.errstate(invalid="ignore", over="ignore"):
                return value, conv._replace(bias=conv.bias - v if name == "sub" else conv.bias + v)
        if conv.residual < 0:
            with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
                factor = v if name == "mul" else 1 / v
                if not np.isfinite(factor).all():
                    continue  # an infinite one times the bias 0 is NaN
                return value, conv._replace(scale=conv.scale * factor, bias=conv.bias * factor)
    return None
