"""What is known of a network's values without its inputs: exact zeros and constants, and which products can matter."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.compaction.channels import Channels, Scope, parts_of
from compressx.compaction.primitives import (
    CUMULATIVE,
    ELEMENTWISE,
    REDUCTIONS,
    STRUCTURE,
    WINDOWS,
    Contraction,
    reaches_border,
)
from compressx.trace import Op, Program, arrays


class Value(NamedTuple):
    """A value of which some elements depend on the inputs.

    Attributes:
      value: array, 0 where the element is unknown.
      unknown: bool array of its shape; None where everything is known.
    """

    value: Any
    unknown: Any = None

    def mask(self) -> Array:
        return jnp.zeros(jnp.shape(self.value), bool) if self.unknown is None else self.unknown


class Flow(NamedTuple):
    """What one contraction can carry.

    Attributes:
      left: bool `[P, F]`, whether position p of the left operand can be non-zero for free index f (F = 1: any).
      right: the same of the right operand.
      shift: float `[P, O]`, what position p adds to output o at every place, where that is one known constant.
      exact: bool `[P, O]`, whether it is (False also where `shift` is not computed).
    """

    left: Array
    right: Array
    shift: Array
    exact: Array


class Flows(NamedTuple):
    """What the contractions of a scope can carry.

    Attributes:
      own: one for each contraction of the scope, in order.
      inner: number of a scan's op -> of its body, every array with the steps before its own axes.
    """

    own: list[Flow]
    inner: dict[int, "Flows"]


def flows(found: Channels, variables: Any, x: Any) -> tuple[Flows, dict[int, Array]]:
    """Runs a network with unknown inputs, and reports what its contractions can carry.

    Inputs are assumed to be finite, and to index no row that a table lacks where that gives a row of NaN (`jnp.take`).

    Every element is either known (it depends on the variables alone, or is multiplied by an exact zero) or unknown; a
    sum is known if all terms with non-zero weight are. Pure; jits.

    Returns:
      The flows, and the vectors `[c]` among the values that depend on the variables alone.
    """
    program = found.program
    given = {i: Value(jnp.asarray(leaf)) for i, leaf in enumerate(arrays(variables))}
    for v, leaf in zip(program.inputs, jax.tree.leaves(x), strict=True):
        given[v] = Value(jnp.zeros(leaf.shape, leaf.dtype), jnp.ones(leaf.shape, bool))
    values, result = _walk(found.scope, given)
    return result, {v: values[v].value for v in found.weights if len(program.shapes[v]) == 1}


def _walk(scope: Scope, given: dict[int, Value]) -> tuple[dict[int, Value], Flows]:
    """All values of a scope whose leaves and inputs are given, and its flows."""
    values = {v: Value(jnp.asarray(c)) for v, c in scope.program.constants.items()} | given
    by_op: dict[int, list[int]] = {}
    for k, c in enumerate(scope.contractions):
        by_op.setdefault(c.op, []).append(k)
    own: dict[int, Flow] = {}
    inner: dict[int, Flows] = {}
    for number, op in enumerate(scope.program.ops):
        ins = [values[v] for v in op.inputs]
        for k in by_op.get(number, ()):
            own[k] = _flow(op, scope.contractions[k], ins)
        if number in scope.inner:
            results, inner[number] = _scan(op, scope.program, scope.inner[number][0], ins)
        else:
            results = _step(op, ins)
        values |= zip(op.outputs, results, strict=True)
    return values, Flows([own[k] for k in range(len(own))], inner)


def _scan(op: Op, outer: Program, scope: Scope, ins: list[Value]) -> tuple[list[Value], Flows]:
    """A scan with what is known of its carry from step to step."""
    body = scope.program
    fixed, carried = parts_of(op, outer, body)
    over = fixed + carried

    def step(carry: list[Value], slices: list[Value]) -> tuple[list[Value], tuple[list[Value], Flows]]:
        given = dict(zip(body.inputs, (*ins[:fixed], *carry, *slices), strict=True))
        values, result = _walk(scope, given)
        outs = [values[v] for v in body.outputs]
        marked = [Value(jnp.asarray(x.value), x.mask()) for x in outs]
        return marked[:carried], (marked[carried:], result)

    start = [Value(jnp.asarray(x.value), x.mask()) for x in ins[fixed:over]]
    p = op.params
    last, (stacked, result) = lax.scan(step, start, ins[over:], length=p["length"], reverse=p["reverse"])
    return [*last, *stacked], result


def _bind(op: Op, *arguments: Any) -> list[Any]:
    out = op.primitive.bind(*arguments, **op.params)
    return list(out) if op.primitive.multiple_results else [out]


def _step(op: Op, ins: list[Value]) -> list[Value]:
    name = op.primitive.name
    if all(x.unknown is None for x in ins):
        return [Value(v) for v in _bind(op, *(x.value for x in ins))]
    if name == "conv_general_dilated" or name == "dot_general":
        return [_product(op, *ins)]
    shapes = jax.eval_shape(lambda *a: _bind(op, *a), *(x.value for x in ins))
    unknown: list[Array]
    if name in ELEMENTWISE:
        unknown = [_any_of(name, ins, shapes[0].shape)]
    elif name in STRUCTURE:
        unknown = _bind(op, *(x.mask() for x in ins))
    elif name in ("gather", "dynamic_slice", "dynamic_update_slice"):
        return _moved(op, ins)
    elif name in CUMULATIVE or name in ("sort", "top_k"):
        along = op.params.get("axis", op.params.get("dimension", -1))
        mixed = [jnp.any(x.mask(), axis=along, keepdims=True) for x in ins]
        unknown = [jnp.broadcast_to(functools.reduce(jnp.logical_or, mixed), s.shape) for s in shapes]
    elif name == "pad":
        unknown = _bind(op, ins[0].mask(), jnp.zeros((), bool))
    elif name in REDUCTIONS or name in ("argmax", "argmin"):
        unknown = [jnp.any(ins[0].mask(), axis=op.params["axes"])]
    elif name in WINDOWS:
        p = {k: op.params[k] for k in ("window_dimensions", "window_strides", "padding", "base_dilation")}
        dilation = op.params["window_dilation"]
        ones = ins[0].mask().astype(jnp.float32)
        unknown = [lax.reduce_window(ones, -np.inf, lax.max, window_dilation=dilation, **p) > 0.5]
    else:  # no rule: whatever it makes is unknown
        return [Value(jnp.zeros(s.shape, s.dtype), jnp.ones(s.shape, bool)) for s in shapes]
    results = _bind(op, *(x.value for x in ins))
    return [Value(jnp.where(u, jnp.zeros((), v.dtype), v), u) for v, u in zip(results, unknown, strict=True)]


def _moved(op: Op, ins: list[Value]) -> list[Value]:
    """A selection by indices: of unknown ones, known is only what is one number wherever they point."""
    x, indices = ins[0], ins[2:] if op.primitive.name == "dynamic_update_slice" else ins[1:]
    if all(i.unknown is None for i in indices):
        (value,) = _bind(op, *(i.value for i in ins))
        moved = [i.mask() for i in ins[: len(ins) - len(indices)]]
        if op.primitive.name == "gather" and op.params["fill_value"] is not None:
            op = op._replace(params={**op.params, "fill_value": False})
        (unknown,) = _bind(op, *moved, *(i.value for i in indices))
        return [Value(jnp.where(unknown, jnp.zeros((), value.dtype), value), unknown)]
    (shape,) = jax.eval_shape(lambda *a: _bind(op, *a), *(i.value for i in ins))
    nothing = Value(jnp.zeros(shape.shape, shape.dtype), jnp.ones(shape.shape, bool))
    if op.primitive.name == "dynamic_update_slice":
        return [nothing]
    if op.primitive.name == "gather" and op.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP:
        fill = op.params["fill_value"]
        if not jnp.issubdtype(shape.dtype, jnp.inexact) or not (fill is None or np.isnan(fill)):
            return [nothing]  # beyond the operand there is another number; else NaN in whole rows, see `flows`
        op = op._replace(params={**op.params, "mode": lax.GatherScatterMode.CLIP})
    sizes = op.params["slice_sizes"]
    axes = tuple(a for a, size in enumerate(x.value.shape) if sizes[a] != size)
    flat = ~jnp.any(x.mask(), axes, keepdims=True)
    flat &= x.value.max(axes, keepdims=True) == x.value.min(axes, keepdims=True)
    (value,) = _bind(op, x.value, *(i.value for i in indices))
    (same,) = _bind(op, jnp.broadcast_to(flat, x.value.shape), *(i.value for i in indices))
    return [Value(jnp.where(same, value, jnp.zeros((), value.dtype)), ~same)]


def _any_of(name: str, ins: list[Value], shape: tuple[int, ...]) -> Array:
    """Where an elementwise result is unknown: where any operand is, unless a known 0 multiplies it."""

    def spread(mask: Array) -> Array:
        return jnp.broadcast_to(mask, shape) if mask.ndim == 0 or mask.ndim == len(shape) else mask

    if name == "select_n" and ins[0].unknown is None:
        return lax.select_n(ins[0].value, *(spread(x.mask()) for x in ins[1:]))
    unknown = jnp.zeros(shape, bool)
    for x in ins:
        if x.unknown is not None:
            unknown = unknown | spread(x.unknown)
    if name == "mul":
        for x in ins:
            unknown = unknown & ~spread((x.value == 0) & ~x.mask())
    return unknown


def _product(op: Op, lhs: Value, rhs: Value) -> Value:
    """A convolution or matrix product: an output is unknown if a product with non-zero weight is."""
    (value,) = _bind(op, lhs.value, rhs.value)
    reach = jnp.zeros(value.shape, jnp.float32)
    plain = op._replace(params={**op.params, "preferred_element_type": None})
    for a, b in ((lhs.mask(), (rhs.value != 0) | rhs.mask()), (lhs.value != 0, rhs.mask())):
        reach = reach + _bind(plain, a.astype(jnp.float32), b.astype(jnp.float32))[0]
    unknown = reach > 0.5
    return Value(jnp.where(unknown, jnp.zeros((), value.dtype), value), unknown)


def _matrix(x: Value, summed: int, free: int | None) -> Array:
    """Whether any element at (summed, free) can be non-zero, bool `[P, F]`."""
    live = (x.value != 0) | x.mask()
    kept = [summed] if free is None else [summed, free]
    flat = jnp.any(live, axis=tuple(a for a in range(live.ndim) if a not in kept))
    if free is None:
        return flat[:, None]
    return flat if summed < free else flat.T


def _flow(op: Op, c: Contraction, ins: list[Value]) -> Flow:
    if c.axes[1] is None:  # a plain sum
        left = _matrix(ins[0], c.axes[0], None)
        return Flow(left, jnp.ones_like(left), jnp.zeros(left.shape, jnp.float32), jnp.zeros(left.shape, bool))
    lhs, rhs = ins
    left, right = _matrix(lhs, c.axes[0], c.free[0]), _matrix(rhs, c.axes[1], c.free[1])
    none = Flow(left, right, jnp.zeros(right.shape, jnp.float32), jnp.zeros(right.shape, bool))
    if c.free[1] is None or rhs.unknown is not None or lhs.unknown is None:
        return none
    kernel = jnp.moveaxis(rhs.value, (c.axes[1], c.free[1]), (-2, -1))  # [taps..., P, O]
    if op.primitive.name == "conv_general_dilated":
        if set(op.params["lhs_dilation"]) != {1}:
            return none
        edge = _edge_taps(op, lhs.value.shape, rhs.value.shape)
    elif kernel.ndim == 2 and not op.params["dimension_numbers"][1][0]:
        edge = np.zeros((), bool)
    else:
        return none
    taps = tuple(range(kernel.ndim - 2))
    inside = ~jnp.any((kernel != 0) & edge[..., None, None], axis=taps)
    others = tuple(a for a in range(lhs.value.ndim) if a != c.axes[0])
    flat = ~jnp.any(lhs.mask(), axis=others) & (lhs.value.max(others) == lhs.value.min(others))
    level = jnp.where(flat, lhs.value.max(others), jnp.zeros((), lhs.value.dtype))
    return Flow(left, right, level[:, None] * kernel.sum(taps), flat[:, None] & inside)


def _edge_taps(op: Op, image: tuple[int, ...], kernel: tuple[int, ...]) -> np.ndarray:
    """Bool `[taps...]`: taps that read padding at some place, where a constant map would not be one."""
    p = op.params
    numbers = p["dimension_numbers"]
    masks = []
    for k, (at_image, at_kernel) in enumerate(zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], strict=True)):
        size, taps = image[at_image], kernel[at_kernel]
        stride, dilation, pad = p["window_strides"][k], p["rhs_dilation"][k], p["padding"][k]
        out = (size + sum(pad) - dilation * (taps - 1) - 1) // stride + 1
        masks.append(np.array(reaches_border(size, out, taps, stride, pad[0], dilation), bool))
    grid = np.zeros([m.size for m in masks], bool)
    for a, m in enumerate(masks):
        grid |= np.expand_dims(m, [i for i in range(len(masks)) if i != a])
    return grid
