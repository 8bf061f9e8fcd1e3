"""Products, convolutions and pooling."""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressx.export.graph import Call, Graph, Rule, Unsupported, held
from compressx.export.moves import pad


def _product(extents: Any) -> Any:
    """The product of extents, of which some may depend on the batch."""
    return math.prod(extents)


def _dot(g: Graph, call: Call) -> str:
    """MatMul of `[batch axes, free, contracted]` and `[batch axes, contracted, free]`."""
    ((left, right), (lead_left, lead_right)), out = call.params["dimension_numbers"], call.out_shapes[0]
    a, b = (g.cast(g.read(call, i), call.dtypes[i], call.out_dtypes[0]) for i in (0, 1))
    rest = [
        [i for i in range(len(shape)) if i not in (*summed, *lead)]
        for shape, summed, lead in zip(call.shapes, (left, right), (lead_left, lead_right), strict=True)
    ]
    size = lambda operand, axes: [call.shapes[operand][i] for i in axes]
    lead, common = size(0, lead_left), _product(size(0, left))
    rows, columns = size(0, rest[0]), _product(size(1, rest[1]))
    # With batch axes the rows are one axis; without, they are as many as they are, and weights stay two-dimensional.
    rows = [_product(rows)] if lead else rows
    order = ([*lead_left, *rest[0], *left], [*lead_right, *right, *rest[1]])
    a = g.reshape(g.transpose(a, order[0]), size(0, order[0]), [*lead, *rows, common])
    b = g.reshape(g.transpose(b, order[1]), size(1, order[1]), [*lead, common, columns])
    return g.reshape(g.node("MatMul", a, b), [*lead, *rows, columns], out)


def _conv(g: Graph, call: Call) -> str:
    p, numbers = call.params, call.params["dimension_numbers"]
    if p["batch_group_count"] != 1:
        raise Unsupported("a convolution in groups of the batch")
    if not jnp.issubdtype(call.out_dtypes[0], jnp.floating):
        raise Unsupported(f"a convolution of {call.out_dtypes[0]}")
    spatial = len(p["window_strides"])
    if not 1 <= spatial <= 3:
        raise Unsupported(f"a convolution along {spatial} axes")
    x, w = (g.cast(g.read(call, i), call.dtypes[i], call.out_dtypes[0]) for i in (0, 1))
    x, w = g.transpose(x, numbers.lhs_spec), g.transpose(w, numbers.rhs_spec)
    shape, kernel = ([call.shapes[i][axis] for axis in (numbers.lhs_spec, numbers.rhs_spec)[i]] for i in (0, 1))
    y = _transposed(g, x, w, kernel, p) or _direct(g, x, w, shape, call)
    return g.transpose(y, np.argsort(numbers.out_spec))


def _direct(g: Graph, x: str, w: str, shape: Any, call: Call) -> str:
    p, padding = call.params, [tuple(pair) for pair in call.params["padding"]]
    if set(p["lhs_dilation"]) != {1} or min(min(pair) for pair in padding) < 0:
        config = [(low, high, d - 1) for (low, high), d in zip(padding, p["lhs_dilation"], strict=True)]
        x = pad(g, x, shape, [(0, 0, 0), (0, 0, 0), *config], g.like(0, call.out_dtypes[0]))
        padding = [(0, 0)] * len(padding)
    pads = [pair[side] for side in (0, 1) for pair in padding]
    attributes: dict[str, Any] = {
        "strides": list(p["window_strides"]),
        "dilations": list(p["rhs_dilation"]),
        "pads": pads,
    }
    return g.node("Conv", x, w, group=p["feature_group_count"], **attributes)


def _transposed(g: Graph, x: str, w: str, kernel: Any, p: Any) -> str | None:
    """A convolution of a dilated input as ConvTranspose, which does not multiply by the zeros between; None else."""
    steps, spread, padding = list(p["lhs_dilation"]), list(p["rhs_dilation"]), p["padding"]
    if set(steps) == {1} or set(p["window_strides"]) != {1} or p["feature_group_count"] != 1:
        return None
    whole = [d * (k - 1) for k, d in zip(kernel[2:], spread, strict=True)]  # the padding of the full convolution
    cut = [(n - low, n - high) for n, (low, high) in zip(whole, padding, strict=True)]
    longer = [max(-high, 0) for _, high in cut]
    if any(low < 0 for low, _ in cut) or any(n >= s for n, s in zip(longer, steps, strict=True)):
        return None
    axes = list(range(2, len(kernel)))
    flip = g.slice(w, g.ints(*[-1] * len(axes)), g.ints(*[-(1 << 62)] * len(axes)), axes, [-1] * len(axes))
    pads = [max(pair[side], 0) for side in (0, 1) for pair in cut]
    flip = g.transpose(flip, [1, 0, *axes])
    return g.node("ConvTranspose", x, flip, strides=steps, dilations=spread, pads=pads, output_padding=longer)


def _window(kind: str) -> Rule:
    """Pooling along any one to three axes: the others become the batch and the channels of ONNX' operator."""

    def make(g: Graph, call: Call) -> str:
        p, dtype, shape = call.params, call.dtypes[0], call.shapes[0]
        sizes, strides, spread = p["window_dimensions"], p["window_strides"], p["window_dilation"]
        padding, base = [tuple(pair) for pair in p["padding"]], p["base_dilation"]
        axes = [i for i, n in enumerate(sizes) if n != 1 or strides[i] != 1 or any(padding[i]) or base[i] != 1]
        x = g.read(call, 0)
        if not axes:
            return x
        if len(axes) > 3:
            raise Unsupported(f"pooling along {len(axes)} axes")
        if not jnp.issubdtype(dtype, jnp.floating):
            raise Unsupported(f"pooling of {dtype}")
        odd = any(low < 0 or high < 0 or max(low, high) >= sizes[i] for i, (low, high) in enumerate(padding))
        neutral = {"sum": 0.0, "max": -np.inf, "min": np.inf}[kind]
        extents = list(shape)
        if odd or set(base) != {1}:  # operators pad by less than a window's values, however far apart
            config = [(low, high, d - 1) for (low, high), d in zip(padding, base, strict=True)]
            x = pad(g, x, shape, config, g.like(neutral, dtype))
            extents = [
                n if i not in axes else (n - 1) * d + 1 + low + high
                for i, (n, (low, high), d) in enumerate(zip(shape, padding, base, strict=True))
            ]
            padding = [(0, 0)] * len(sizes)
        others = [i for i in range(len(shape)) if i not in axes]
        order, of = [*others, *axes], lambda values: [values[i] for i in axes]
        lead = [extents[i] for i in others]
        two = lead if len(lead) == 2 and set(spread) == {1} else [_product(lead), 1]
        x = g.reshape(g.transpose(x, order), [extents[i] for i in order], [*two, *of(extents)])
        pads = [padding[i][side] for side in (0, 1) for i in axes]
        attributes: dict[str, Any] = {"kernel_shape": of(sizes), "strides": of(strides), "pads": pads}
        if kind == "sum" and set(spread) == {1}:
            count = g.like(_product(sizes), dtype)
            y = g.node("Mul", g.node("AveragePool", x, count_include_pad=1, **attributes), count)
        elif kind == "sum":
            ones = g.constant(np.ones((1, 1, *of(sizes)), held(dtype)))
            y = g.node("Conv", x, ones, dilations=of(spread), **attributes)
        else:
            signed = x if kind == "max" else g.node("Neg", x)
            y = g.node("MaxPool", signed, dilations=of(spread), **attributes)
            y = y if kind == "max" else g.node("Neg", y)
        out = call.out_shapes[0]
        y = g.reshape(y, [*two, *of(out)], [out[i] for i in order])
        return g.transpose(y, np.argsort(order))

    return make


TABLE: dict[str, Rule] = {
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "reduce_window_max": _window("max"),
    "reduce_window_min": _window("min"),
    "reduce_window_sum": _window("sum"),
}

EXACT = frozenset(("reduce_window_max", "reduce_window_min"))
