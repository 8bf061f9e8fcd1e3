"""A network as a short list of fused steps: convolutions with their bias, residual and activation, poolings, the rest.

The traced program (`compaction.trace`) is read once. What depends on the variables alone is computed. What follows a
convolution becomes part of it where `RULES` has a row for it: scalings and shifts by channel (batch normalisation), an
addition of two images, a ReLU. Everything else stays the operation that it is.
"""

from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from compressx.kernels.pattern_conv import SLOPE
from compressx.kernels.schedule import Geometry, Pads
from compressx.trace import Op, Program, arrays

# The algebra of fusion. `y` is a convolution with a scale and a shift for each of its channels; `v` are known numbers,
# one a channel or one for all; `r` is an image of y's shape. What has no row here is not folded.
RULES: dict[tuple[str, str], str] = {
    # what it is, what follows: what it is then
    ("y", "+ v"): "y",
    ("y", "- v"): "y",
    ("y", "* v"): "y",
    ("y", "/ v"): "y",
    ("y", "+ r"): "y + r",
    ("y + r", "+ v"): "y + r",
    ("y + r", "- v"): "y + r",
    ("y", "max 0"): "relu(y)",
    ("y + r", "max 0"): "relu(y + r)",
    ("relu(y)", "min 6"): "relu6(y)",
    ("relu(y + r)", "min 6"): "relu6(y + r)",
    ("y", "max 0.1 y"): "leaky(y)",
    ("y + r", "max 0.1 y"): "leaky(y + r)",
    ("relu(y)", "+ r"): "relu(y) + r",
    ("relu6(y)", "+ r"): "relu6(y) + r",
    ("leaky(y)", "+ r"): "leaky(y) + r",
}
_ACTIVATES = {"max 0": "relu", "min 6": "relu6", "max 0.1 y": "leaky"}
_NAMES = {"add": "+", "add_any": "+", "sub": "-", "mul": "*", "div": "/", "max": "max", "min": "min"}
_ROUNDS = float(2**22)  # beside a number of this size, what is added is rounded to halves
_LARGE = float(2**64)  # beyond this, and below its inverse, factors are not moved


class Conv(NamedTuple):
    """`y = act(conv(x, w) * scale + bias + residual)`, or with `residual_after` `act(...) + residual`.

    Values are numbers, -1 stands for none.

    Attributes:
      x, y: values it reads and makes.
      w: `[kh, kw, cin / groups, cout]`.
      path: of the leaf that w is, or None where it is computed or is none of the variables.
      scale, bias: float32 `[cout]` (float64 while operations are folded).
      geometry: size, strides, pads, groups.
      residual: a value of the shape of y.
      activation: one of `pattern_conv.ACTIVATIONS`.
      residual_after: whether the residual is added after the activation.
      folded: known values that went into scale and bias.
      precision: of the products, as lax has it.
      kernel: the value that w is.
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
    folded: tuple[int, ...] = ()
    precision: Any = None
    kernel: int = -1


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


def form(conv: Conv) -> str:
    """What a convolution has become, as `RULES` names it."""
    inner = "y + r" if conv.residual >= 0 and not conv.residual_after else "y"
    whole = inner if conv.activation == "none" else f"{conv.activation}({inner})"
    return f"{whole} + r" if conv.residual_after else whole


class _Next(NamedTuple):
    """An operation that follows an open convolution.

    Attributes:
      value: of the convolution.
      what: the operation, as `RULES` names it.
      rest: its other operand.
      numbers: that operand by channel, where it is known.
      last: number of the operation whose result the convolution then is.
    """

    value: int
    what: str
    rest: int
    numbers: np.ndarray | None
    last: int


def steps(program: Program, variables: Any) -> tuple[list[Step], dict[int, Any]]:
    """Fuses a traced program.

    Args:
      program: of a network in evaluation mode.
      variables: concrete arrays, as traced.

    Returns:
      The steps in order, and what is known of values without inputs (the program's outputs may be among them).
    """
    known: dict[int, Any] = dict(enumerate(arrays(variables))) | dict(program.constants)
    uses = program.readers()
    found: list[Step] = []
    open_convs: dict[int, Conv] = {}  # value -> a convolution that later operations may still join
    nonnegative: set[int] = set()
    joined: set[int] = set()  # operations that are already part of a convolution

    def close(value: int) -> None:
        if value in open_convs:
            conv = open_convs.pop(value)
            conv = conv._replace(scale=conv.scale.astype(np.float32), bias=conv.bias.astype(np.float32))
            if conv.activation in ("relu", "relu6") and not conv.residual_after:
                nonnegative.add(value)
            found.append(conv)

    for number, op in enumerate(program.ops):
        if number in joined:
            continue
        if all(v in known for v in op.inputs):
            known |= zip(op.outputs, _bind(op, [known[v] for v in op.inputs]), strict=True)
            continue
        for following in _following(number, program, open_convs, known, uses):
            conv = _fold(open_convs[following.value], following)
            if conv is not None:
                del open_convs[following.value]
                close(conv.residual)
                out = program.ops[following.last].outputs[0]
                open_convs[out] = conv._replace(y=out)
                joined.add(following.last)
                break
        else:
            fresh = _conv(op, known, program)
            for v in op.inputs:
                close(v)
            if fresh is not None:
                open_convs[op.outputs[0]] = fresh
                continue
            pool = _pool(op, nonnegative, program)
            if pool is not None:
                found.append(pool)
                if pool.x in nonnegative:
                    nonnegative.add(pool.y)
            else:
                found.append(Other(op, {v: known[v] for v in op.inputs if v in known}))
    for v in program.outputs:
        close(v)
    return found, known


def _bind(op: Op, arguments: list[Any]) -> list[Any]:
    out = op.primitive.bind(*arguments, **op.params)
    return list(out) if op.primitive.multiple_results else [out]


def _following(
    number: int,
    program: Program,
    convs: dict[int, Conv],
    known: dict[int, Any],
    uses: dict[int, list[tuple[int, int]]],
) -> Iterator[_Next]:
    """The ways in which an operation may become part of an open convolution, that nobody else reads."""
    op, shapes = program.ops[number], program.shapes
    name = op.primitive.name
    if name not in _NAMES or len(op.inputs) != 2:
        return
    for side in (0, 1):
        value, rest = op.inputs[side], op.inputs[1 - side]
        if value not in convs or shapes[value] != shapes[op.outputs[0]]:
            continue
        v = _by_channel(known[rest], shapes[value]) if rest in known else None
        if name == "mul" and v is not None and (v == np.float32(SLOPE)).all():
            last = _leaky_end(op, value, program, uses)
            if last is not None:
                yield _Next(value, "max 0.1 y", rest, v, last)
        if len(uses[value]) != 1:
            continue
        what = None
        if rest not in known:
            what = "+ r" if _NAMES[name] == "+" and shapes[rest] == shapes[value] else None
        elif v is not None and name in ("max", "min"):
            bound = {"max": 0, "min": 6}[name]
            what = f"{name} {bound}" if (v == bound).all() else None
        elif v is not None and (side == 0 or name not in ("sub", "div")):
            what = f"{_NAMES[name]} v"
        if what is not None:
            yield _Next(value, what, rest, v, number)


def _leaky_end(op: Op, value: int, program: Program, uses: dict[int, list[tuple[int, int]]]) -> int | None:
    """The number of the maximum in `max(y, 0.1 y)`, where `op` is the product and y is read by the two alone."""
    out = op.outputs[0]
    if len(uses[value]) != 2 or len(uses[out]) != 1 or uses[out][0][0] < 0:
        return None
    last = uses[out][0][0]
    other = program.ops[last]
    return last if other.primitive.name == "max" and set(other.inputs) == {value, out} else None


def _fold(conv: Conv, n: _Next) -> Conv | None:
    """The convolution with an operation in it, or None where `RULES` has no row or the numbers do not allow it."""
    becomes = RULES.get((form(conv), n.what))
    if becomes is None:
        return None
    if n.what in _ACTIVATES:
        after = conv._replace(activation=_ACTIVATES[n.what])
    elif n.numbers is None:
        after = conv._replace(residual=n.rest, residual_after=conv.activation != "none")
    else:
        changed = _moved(conv, n.what[0], n.numbers)
        if changed is None:
            return None
        after = conv._replace(scale=changed[0], bias=changed[1], folded=(*conv.folded, n.rest))
    assert form(after) == becomes, f"{form(conv)!r} and {n.what!r} make {form(after)!r}, the table says {becomes!r}"
    return after


@np.errstate(divide="ignore", invalid="ignore", over="ignore")
def _moved(conv: Conv, sign: str, v: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Scale and bias after an operation with numbers, or None where they might not compute the same.

    Nothing follows a bias so large, by itself or beside the weights, that adding it rounded: `(y + 1.5e7) - 1.5e7` is a
    way to round. A product is moved while the weights stay far from infinity, and not where it brings back what was
    nearly flushed to zero.
    """
    v = v.astype(np.float64)
    size = np.abs(conv.w.reshape(-1, conv.w.shape[-1]))
    largest = size.max(0, initial=0, where=np.isfinite(size))
    unit = np.abs(conv.scale) * largest  # what an input of 1 adds at most
    unit = np.where(unit > 0, np.minimum(unit, 1), 1)
    if (np.abs(conv.bias) >= _ROUNDS * unit).any():
        return None
    if sign in "+-":
        return conv.scale, conv.bias + v if sign == "+" else conv.bias - v
    if sign == "/" and not v.all():
        return None
    factor = v if sign == "*" else 1 / v
    scale, bias = conv.scale * factor, conv.bias * factor
    reached = (factor, scale, scale * np.maximum(largest, 1), bias)
    within = all((np.abs(x) <= _LARGE).all() for x in reached)  # false for NaN
    tiny = (conv.scale != 0) & (np.abs(conv.scale) < 1 / _LARGE)
    return (scale, bias) if within and not (tiny & (np.abs(factor) > 1)).any() else None


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


def unfit(op: Op, known: Container[int], program: Program) -> str:
    """Why a convolution is no step of its own but is left to XLA; empty where it is one."""
    p, image, kernel = op.params, op.inputs[0], op.inputs[1]
    x, w, y = (program.shapes[v] for v in (image, kernel, op.outputs[0]))
    types = {str(program.dtypes[v]) for v in (image, kernel, op.outputs[0])}
    if kernel not in known:
        return "the kernel depends on the network's input"
    if len(x) != 4:
        along = "one axis" if len(x) == 3 else f"{len(x) - 2} axes"
        return f"it slides along {along}, the kernels along two"
    if types != {"float32"}:
        return f"it computes in {' and '.join(sorted(types))}, and the kernels in float32"
    if p["dimension_numbers"] != lax.conv_dimension_numbers(x, w, ("NHWC", "HWIO", "NHWC")):
        return "its axes are not images [n, h, w, c] and kernels [kh, kw, cin, cout]"
    if set(p["lhs_dilation"]) != {1}:
        return f"it is transposed: its image is dilated by {_times(p['lhs_dilation'])}"
    if set(p["rhs_dilation"]) != {1}:
        return f"its kernel is dilated by {_times(p['rhs_dilation'])}"
    if p["batch_group_count"] != 1:
        return f"its batch is in {p['batch_group_count']} groups"
    if any(v < 0 for pair in p["padding"] for v in pair):
        return f"its padding {[tuple(map(int, pair)) for pair in p['padding']]} cuts the image"
    if 0 in (*x, *w, *y):
        return f"there is nothing to compute: image {list(x)}, kernel {list(w)}, output {list(y)}"
    return ""


def _times(sizes: Sequence[int]) -> str:
    return "x".join(str(int(v)) for v in sizes)


def _conv(op: Op, known: dict[int, Any], program: Program) -> Conv | None:
    """A convolution of NHWC images with known HWIO kernels, without dilation."""
    if op.primitive.name != "conv_general_dilated" or unfit(op, known, program):
        return None
    p, kernel = op.params, op.inputs[1]
    w = np.asarray(known[kernel])
    (t, b), (l, r) = p["padding"]
    geometry = Geometry(
        (int(w.shape[0]), int(w.shape[1])),
        (int(p["window_strides"][0]), int(p["window_strides"][1])),
        ((int(t), int(b)), (int(l), int(r))),
        int(p["feature_group_count"]),
    )
    return Conv(
        x=op.inputs[0],
        y=op.outputs[0],
        w=w,
        path=program.paths[kernel] if kernel < len(program.paths) else None,
        scale=np.ones(w.shape[3]),
        bias=np.zeros(w.shape[3]),
        geometry=geometry,
        residual=-1,
        activation="none",
        precision=p["precision"],
        kernel=kernel,
    )


def _pool(op: Op, nonnegative: set[int], program: Program) -> Pool | None:
    """A maximum over windows; with padding only of values that are not negative, where zeros never win wrongly."""
    if op.primitive.name != "reduce_window_max":
        return None
    x, y = program.shapes[op.inputs[0]], program.shapes[op.outputs[0]]
    p = op.params
    window, strides, pads = p["window_dimensions"], p["window_strides"], p["padding"]
    if len(window) != 4 or {window[0], window[3], strides[0], strides[3]} != {1} or any(pads[0]) or any(pads[3]):
        return None
    if set(p["base_dilation"]) | set(p["window_dilation"]) != {1}:
        return None
    if program.dtypes[op.inputs[0]] != np.float32 or 0 in (*x, *y):
        return None
    padded = any(pads[1]) or any(pads[2])
    if padded and op.inputs[0] not in nonnegative or any(v < 0 for pair in pads for v in pair):
        return None
    if any(pads[a][0] >= window[a] or (y[a] - 1) * strides[a] - pads[a][0] >= x[a] for a in (1, 2)):
        return None  # a window of padding alone, whose maximum is -inf
    sides = ((int(pads[1][0]), int(pads[1][1])), (int(pads[2][0]), int(pads[2][1])))
    return Pool(
        op.inputs[0], op.outputs[0], (int(window[1]), int(window[2])), (int(strides[1]), int(strides[2])), sides
    )
