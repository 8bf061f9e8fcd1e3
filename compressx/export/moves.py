"""Primitives that move, cut, join, sort and reduce arrays."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from onnx import helper

from compressx.export.graph import MOST, Call, Graph, Rule, Unsupported, Value, boolean, held, info, onnx_type, static


def _broadcast(g: Graph, call: Call) -> list[Value]:
    """Aligns the axes and leaves the repetition to whoever reads the value."""
    (value,), shape, places = call.values, call.params["shape"], call.params["broadcast_dimensions"]
    if value.shape == () or tuple(value.shape) == tuple(shape):
        return [Value(value.shape, value.name, value.array)]
    aligned: list[Any] = [1] * len(shape)
    for n, place in zip(value.shape, places, strict=True):
        aligned[place] = n
    if value.array is not None:
        return [Value(aligned, array=np.reshape(value.array, aligned))]
    new = [i for i in range(len(shape)) if i not in places]
    return [Value(aligned, g.unsqueeze(g.loose(value), new))]


def _iota(g: Graph, call: Call) -> list[Value]:
    shape, axis, dtype = call.params["shape"], call.params["dimension"], call.out_dtypes[0]
    aligned = [n if i == axis else 1 for i, n in enumerate(shape)]
    if static([shape[axis]]):
        return [Value(aligned, array=np.asarray(jnp.arange(shape[axis], dtype=dtype)).reshape(aligned))]
    counted = g.node("Range", g.like(0, np.int64), g.squeeze(g.dim(shape[axis]), [0]), g.like(1, np.int64))
    counted = g.cast(counted, np.int64, dtype)
    return [Value(aligned, g.unsqueeze(counted, [i for i in range(len(shape)) if i != axis]))]


def _dim_as_value(g: Graph, call: Call) -> str:
    return g.cast(g.squeeze(g.dim(call.params["dim"]), [0]), np.int64, call.out_dtypes[0])


def _reshape(g: Graph, call: Call) -> str:
    if call.params.get("dimensions") is not None:
        raise Unsupported("a reshape that permutes axes")
    return g.reshape(g.read(call, 0), call.shapes[0], call.out_shapes[0])


def _squeeze(g: Graph, call: Call) -> str:
    return g.squeeze(g.read(call, 0), [int(a) for a in call.params["dimensions"]])


def _transpose(g: Graph, call: Call) -> str:
    return g.transpose(g.read(call, 0), call.params["permutation"])


def _concatenate(g: Graph, call: Call) -> str:
    return str(
        g.node("Concat", *(g.read(call, i) for i in range(len(call.values))), axis=int(call.params["dimension"]))
    )


def _split(g: Graph, call: Call) -> list[Value]:
    x, sizes = g.read(call, 0), call.params["sizes"]
    names = g.several("Split", [x, g.dims(sizes)], len(sizes), axis=int(call.params["axis"]))
    return [Value(shape, name) for shape, name in zip(call.out_shapes, names, strict=True)]


def _stack(g: Graph, call: Call) -> str:
    axis = int(call.params["axis"])
    return g.node("Concat", *(g.unsqueeze(g.read(call, i), [axis]) for i in range(len(call.values))), axis=axis)


def _unstack(g: Graph, call: Call) -> list[Value]:
    axis, number, x = int(call.params["axis"]), len(call.out_shapes), g.read(call, 0)
    parts = g.several("Split", [x, g.ints(*[1] * number)], number, axis=axis)
    return [Value(shape, g.squeeze(part, [axis])) for shape, part in zip(call.out_shapes, parts, strict=True)]


def _tile(g: Graph, call: Call) -> str:
    return g.node("Tile", g.read(call, 0), g.dims(call.params["reps"]))


def _slice(g: Graph, call: Call) -> str:
    starts, ends = call.params["start_indices"], call.params["limit_indices"]
    steps = call.params["strides"] or [1] * len(starts)
    whole = zip(starts, ends, steps, call.shapes[0], strict=True)
    axes = [i for i, (low, high, step, n) in enumerate(whole) if low != 0 or high != n or step != 1]
    if not axes:
        return g.read(call, 0)
    cut = [g.dims([part[i] for i in axes]) for part in (starts, ends)]
    return g.slice(g.read(call, 0), cut[0], cut[1], axes, [steps[i] for i in axes])


def _rev(g: Graph, call: Call) -> str:
    axes = [int(a) for a in call.params["dimensions"]]
    starts, ends = g.ints(*[-1] * len(axes)), g.ints(*[-MOST] * len(axes))
    return g.slice(g.read(call, 0), starts, ends, axes, [-1] * len(axes)) if axes else g.read(call, 0)


def pad(g: Graph, x: str, shape: Sequence[Any], config: Sequence[tuple[int, int, int]], value: str) -> str:
    """x with `(before, after, between)` values added on each axis; what is negative is cut off."""
    if not all(static(entry) for entry in config):
        raise Unsupported(f"the padding {config}, which depends on the batch,")
    extents = list(shape)
    for axis, (_, _, between) in enumerate(config):
        if between:  # each entry becomes a block of itself and the values after it; those after the last one go
            n = extents[axis]
            x = g.unsqueeze(x, [axis + 1])
            pads = np.zeros((2, len(extents) + 1), np.int64)
            pads[1, axis + 1] = between
            x = g.node("Pad", x, g.constant(pads.reshape(-1)), value)
            longer = [*extents[:axis], n * (between + 1), *extents[axis + 1 :]]
            x = g.reshape(x, (), longer)
            x = g.slice(x, g.ints(0), g.ints(-between), [axis])
            extents[axis] = n * (between + 1) - between
    pads = np.array([[max(low, 0) for low, _, _ in config], [max(high, 0) for _, high, _ in config]], np.int64)
    if pads.any():
        x = g.node("Pad", x, g.constant(pads.reshape(-1)), value)
    cut = [i for i, (low, high, _) in enumerate(config) if low < 0 or high < 0]
    if cut:
        starts = [max(-config[i][0], 0) for i in cut]
        x = g.slice(x, g.ints(*starts), g.ints(*(config[i][1] if config[i][1] < 0 else MOST for i in cut)), cut)
    return x


def _pad(g: Graph, call: Call) -> str:
    return pad(g, g.read(call, 0), call.shapes[0], call.params["padding_config"], g.read(call, 1))


def _reduce(op: str) -> Rule:
    def make(g: Graph, call: Call) -> str:
        x, axes = g.read(call, 0), [int(a) for a in call.params["axes"]]
        if not axes:
            return x
        if not boolean(call.dtypes[0]):
            return g.node(op, x, g.ints(*axes), keepdims=0)
        number = g.node(op, g.node("Cast", x, to=onnx_type("int32")), g.ints(*axes), keepdims=0)
        return g.node("Cast", number, to=onnx_type("bool"))

    return make


def _arg(op: str) -> Rule:
    def make(g: Graph, call: Call) -> str:
        (axis,), x = call.params["axes"], g.read(call, 0)
        x = g.node("Cast", x, to=onnx_type("int32")) if boolean(call.dtypes[0]) else x
        return g.cast(g.node(op, x, axis=int(axis), keepdims=0), np.int64, call.out_dtypes[0])

    return make


def _cumsum(g: Graph, call: Call) -> str:
    axis, reverse = g.constant(np.int64(call.params["axis"])), int(call.params["reverse"])
    return g.node("CumSum", g.read(call, 0), axis, reverse=reverse)


def _cumulative(op: str, first: float) -> Rule:
    """Scan along an axis, the operator between what has come before and each entry."""

    def make(g: Graph, call: Call) -> str:
        axis, dtype = int(call.params["axis"]), call.dtypes[0]
        if not jnp.issubdtype(dtype, jnp.floating):
            raise Unsupported(f"the operation {call.name!r} of {dtype}")
        sides = [n for i, n in enumerate(call.shapes[0]) if i != axis]
        before, entry = g.fresh(), g.fresh()
        with g.body() as nodes:
            now = g.node(op, before, entry)
            ends = [g.node("Identity", now), g.node("Identity", now)]
        declare = lambda names: [info(name, sides, held(dtype)) for name in names]
        body = helper.make_graph(nodes, g.fresh(), declare([before, entry]), declare(ends))
        start = g.node("Expand", g.like(first, dtype), g.dims(sides))
        attributes = {"scan_input_axes": [axis], "scan_output_axes": [axis]}
        back = [int(call.params["reverse"])]
        attributes |= {"scan_input_directions": back, "scan_output_directions": back}
        names = g.several("Scan", [start, g.read(call, 0)], 2, body=body, num_scan_inputs=1, **attributes)
        return str(names[1])

    return make


def _top_k(g: Graph, call: Call) -> list[Value]:
    axis = int(call.params.get("axis", -1)) % len(call.shapes[0])
    names = g.several("TopK", [g.read(call, 0), g.dims([call.params["k"]])], 2, axis=axis)
    return [
        Value(call.out_shapes[0], names[0]),
        Value(call.out_shapes[1], g.cast(names[1], np.int64, call.out_dtypes[1])),
    ]


def _sort(g: Graph, call: Call) -> list[Value]:
    """By the first operand; equal ones stay in order, as TopK has it."""
    axis = int(call.params["dimension"])
    if call.params["num_keys"] != 1:
        raise Unsupported(f"a sort by {call.params['num_keys']} keys")
    if boolean(call.dtypes[0]):
        raise Unsupported("a sort of truth values")
    keys, *others = (g.read(call, i) for i in range(len(call.values)))
    ordered, places = g.several("TopK", [keys, g.dims([call.shapes[0][axis]])], 2, axis=axis, largest=0)
    moved = [ordered, *(g.node("GatherElements", x, places, axis=axis) for x in others)]
    return [Value(shape, name) for shape, name in zip(call.out_shapes, moved, strict=True)]


def _barrier(g: Graph, call: Call) -> list[Value]:
    return [Value(v.shape, v.name, v.array) for v in call.values]


TABLE: dict[str, Rule] = {
    "argmax": _arg("ArgMax"),
    "argmin": _arg("ArgMin"),
    "broadcast_in_dim": _broadcast,
    "concatenate": _concatenate,
    "cummax": _cumulative("Max", -np.inf),
    "cummin": _cumulative("Min", np.inf),
    "cumprod": _cumulative("Mul", 1.0),
    "cumsum": _cumsum,
    "dim_as_value": _dim_as_value,
    "iota": _iota,
    "optimization_barrier": _barrier,
    "pad": _pad,
    "reduce_and": _reduce("ReduceMin"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _reduce("ReduceMax"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_sum": _reduce("ReduceSum"),
    "reshape": _reshape,
    "rev": _rev,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "tile": _tile,
    "top_k": _top_k,
    "transpose": _transpose,
    "unstack": _unstack,
}

EXACT = frozenset(TABLE) - {"cumprod", "cumsum", "reduce_prod", "reduce_sum"}
