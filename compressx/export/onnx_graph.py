"""A traced JAX program as an ONNX graph: one node, or a few, per primitive.

What depends on constants alone is computed here. A broadcast is written only as far as ONNX needs it: elementwise
nodes broadcast by themselves, and anything else that would read such a value is an error, never a wrong graph.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from onnx import TensorProto, helper, numpy_helper

OPSET, IR = 17, 9
_LIMIT = (1 << 31) - (1 << 20)  # protobuf's 2 GiB, with room for the nodes

_UNARY = {
    "neg": "Neg",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "tanh": "Tanh",
    "logistic": "Sigmoid",
    "abs": "Abs",
    "floor": "Floor",
    "ceil": "Ceil",
    "erf": "Erf",
    "not": "Not",
    "copy": "Identity",
    "copy_p": "Identity",
    "stop_gradient": "Identity",
    "optimization_barrier": "Identity",
}
_BINARY = {
    "add": "Add",
    "add_any": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "pow": "Pow",
    "max": "Max",
    "min": "Min",
    "gt": "Greater",
    "ge": "GreaterOrEqual",
    "lt": "Less",
    "le": "LessOrEqual",
    "eq": "Equal",
    "and": "And",
    "or": "Or",
}
_CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")


class _Value:
    """What a variable of the program is in the graph: a name or a constant; `loose` where not yet broadcast."""

    def __init__(self, name: str = "", constant: np.ndarray | None = None, loose: bool = False) -> None:
        self.name, self.constant, self.loose = name, constant, loose


class _Graph:
    """Nodes and initializers under construction."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.size = 0

    def name(self) -> str:
        return f"v{len(self.nodes) + len(self.constants)}"

    def constant(self, array: Any) -> str:
        array = np.ascontiguousarray(array) if np.ndim(array) else np.asarray(array)
        self.size += array.nbytes
        if self.size > _LIMIT:
            raise ValueError("the weights take more than the 2 GiB that a single ONNX file may hold; export StableHLO")
        name = self.name()
        self.constants.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = self.name()
        self.nodes.append(helper.make_node(op, list(inputs), [name], **attributes))
        return name

    def of(self, value: _Value) -> str:
        return value.name if value.constant is None else self.constant(value.constant)

    def firm(self, value: _Value, what: str) -> str:
        if value.loose:
            raise ValueError(f"ONNX: {what} reads a value broadcast over the batch, which has no counterpart here")
        return self.of(value)


def convert(program: ClosedJaxpr, name: str) -> bytes:
    """The ONNX model of a program with one input `x` and one output `y`.

    Raises:
      ValueError: a primitive without a counterpart, several outputs, or a model beyond 2 GiB.
    """
    if len(program.jaxpr.outvars) != 1:
        raise ValueError(f"the network has {len(program.jaxpr.outvars)} outputs, and one is written; export StableHLO")
    g = _Graph()
    (x,), (y,) = program.jaxpr.invars, program.jaxpr.outvars
    (out,) = _run(g, program.jaxpr, program.consts, [_Value("x")])
    g.nodes.append(helper.make_node("Identity", [g.firm(out, "the output")], ["y"]))
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, _dims(v.aval.shape)) for n, v in (("x", x), ("y", y))]
    graph = helper.make_graph(g.nodes, name, [ends[0]], [ends[1]], g.constants)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name="compressx")
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())


def _dims(shape: Any) -> list[int | str]:
    return [n if isinstance(n, int) else "batch" for n in shape]


def _run(g: _Graph, jaxpr: Jaxpr, consts: Any, inputs: list[_Value]) -> list[_Value]:
    known: dict[Any, _Value] = dict(zip(jaxpr.invars, inputs, strict=True))
    known |= {v: _Value(constant=np.asarray(c)) for v, c in zip(jaxpr.constvars, consts, strict=True)}

    def read(v: Any) -> _Value:
        if isinstance(v, Literal):
            return _Value(constant=np.asarray(v.val, v.aval.dtype))  # type: ignore[attr-defined]
        return known[v]

    for equation in jaxpr.eqns:
        values = [read(v) for v in equation.invars]
        for v, value in zip(equation.outvars, _equation(g, equation, values), strict=True):
            known[v] = value
    return [read(v) for v in jaxpr.outvars]


def _equation(g: _Graph, equation: Any, values: list[_Value]) -> list[_Value]:
    name, params = equation.primitive.name, equation.params
    if name in _CALLS:
        inner = params.get("jaxpr", params.get("call_jaxpr", params.get("fun_jaxpr")))
        if isinstance(inner, ClosedJaxpr):
            return _run(g, inner.jaxpr, inner.consts, values)
        return _run(g, inner, (), values)
    shape = equation.outvars[0].aval.shape
    if all(v.constant is not None and not v.loose for v in values) and all(isinstance(n, int) for n in shape):
        out = equation.primitive.bind(*[jax.numpy.asarray(v.constant) for v in values], **params)
        return [_Value(constant=np.asarray(o)) for o in (out if equation.primitive.multiple_results else [out])]
    avals = [v.aval for v in equation.invars]
    if name == "broadcast_in_dim":
        return [_broadcast(g, values[0], avals[0].shape, params)]
    if name in _UNARY or name in _BINARY:
        op = _UNARY.get(name) or _BINARY[name]
        return [_Value(g.node(op, *map(g.of, values)), loose=all(v.loose or _scalar(v) for v in values))]
    if name == "gather":
        return [_Value(_gather(g, values[0], values[1], params, avals[0].shape))]
    if name not in _NODES:
        raise ValueError(f"ONNX: the operation {name!r} has no counterpart here (output shape {_dims(shape)})")
    return [_Value(_NODES[name](g, [g.firm(v, name) for v in values], avals, params, shape))]


def _scalar(value: _Value) -> bool:
    return value.constant is not None and value.constant.ndim == 0


def _broadcast(g: _Graph, value: _Value, old: Any, params: Any) -> _Value:
    """Aligns the axes and leaves the repetition to whoever reads it."""
    shape, places = params["shape"], params["broadcast_dimensions"]
    aligned: list[Any] = [1] * len(shape)
    for n, place in zip(old, places, strict=True):
        aligned[place] = n
    loose = value.loose or tuple(aligned) != tuple(shape)
    if value.constant is not None:
        return _Value(constant=value.constant.reshape([n if isinstance(n, int) else 1 for n in aligned]), loose=loose)
    if aligned == list(old):
        return _Value(value.name, loose=loose)
    return _Value(_reshaped(g, value.name, aligned), loose=loose)


def _reshaped(g: _Graph, x: str, shape: Any) -> str:
    free = [not isinstance(n, int) for n in shape]
    if sum(free) > 1:
        raise ValueError(f"ONNX: a reshape with two free axes, {shape}, has no counterpart here")
    return g.node(
        "Reshape", x, g.constant(np.array([-1 if f else n for n, f in zip(shape, free, strict=True)], np.int64))
    )


def _conv(g: _Graph, xs: list[str], avals: Any, p: Any, shape: Any) -> str:
    numbers = p["dimension_numbers"]
    if p["batch_group_count"] != 1 or set(p["lhs_dilation"]) != {1}:
        raise ValueError("ONNX: transposed and batch-grouped convolutions have no counterpart here")
    pads = [n for side in (0, 1) for n in (pair[side] for pair in p["padding"])]
    if min(pads) < 0:
        raise ValueError("ONNX: a convolution with negative padding has no counterpart here")
    x = g.node("Transpose", xs[0], perm=list(numbers.lhs_spec))
    w = g.node("Transpose", xs[1], perm=list(numbers.rhs_spec))
    attributes = {"strides": list(p["window_strides"]), "dilations": list(p["rhs_dilation"]), "pads": pads}
    y = g.node("Conv", x, w, group=p["feature_group_count"], **attributes)
    return g.node("Transpose", y, perm=[int(i) for i in np.argsort(numbers.out_spec)])


def _dot(g: _Graph, xs: list[str], avals: Any, p: Any, shape: Any) -> str:
    (left, right), (batch, _) = p["dimension_numbers"]
    if batch or tuple(left) != (avals[0].ndim - 1,) or avals[1].ndim != 2:
        raise ValueError(f"ONNX: the product {p['dimension_numbers']} has no counterpart here")
    w = xs[1] if tuple(right) == (0,) else g.node("Transpose", xs[1], perm=[1, 0])
    return g.node("MatMul", xs[0], w)


def _window_max(g: _Graph, xs: list[str], avals: Any, p: Any, shape: Any) -> str:
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    if len(window) != 4 or (window[0], window[3], strides[0], strides[3]) != (1, 1, 1, 1):
        raise ValueError(f"ONNX: pooling with the window {window} has no counterpart here")
    if set(p["base_dilation"]) != {1} or any(sum(pair) for pair in (padding[0], padding[3])):
        raise ValueError("ONNX: pooling over dilated inputs or channels has no counterpart here")
    pads = [padding[i][side] for side in (0, 1) for i in (1, 2)]
    x = g.node("Transpose", xs[0], perm=[0, 3, 1, 2])
    spans = {"kernel_shape": list(window[1:3]), "strides": list(strides[1:3]), "pads": pads}
    y = g.node("MaxPool", x, dilations=list(p["window_dilation"][1:3]), **spans)
    return g.node("Transpose", y, perm=[0, 2, 3, 1])


def _slice(g: _Graph, xs: list[str], avals: Any, p: Any, shape: Any) -> str:
    axes = [i for i, n in enumerate(shape) if isinstance(n, int)]  # the batch axis is never cut
    steps = p["strides"] or [1] * len(shape)
    if any(p["start_indices"][i] != 0 or steps[i] != 1 for i in range(len(shape)) if i not in axes):
        raise ValueError("ONNX: a slice of the batch has no counterpart here")
    parts = (
        [p["start_indices"][i] for i in axes],
        [p["limit_indices"][i] for i in axes],
        axes,
        [steps[i] for i in axes],
    )
    return g.node("Slice", xs[0], *(g.constant(np.array(part, np.int64)) for part in parts))


def _pad(g: _Graph, xs: list[str], avals: Any, p: Any, shape: Any) -> str:
    config = p["padding_config"]
    if any(inner or low < 0 or high < 0 for low, high, inner in config):
        raise ValueError(f"ONNX: the padding {config} has no counterpart here")
    pads = np.array([c[side] for side in (0, 1) for c in config], np.int64)
    return g.node("Pad", xs[0], g.constant(pads), xs[1])


def _reduce(op: str) -> Callable[..., str]:
    def make(g: _Graph, xs: list[str], avals: Any, p: Any, shape: Any) -> str:
        axes = [int(a) for a in p["axes"]]
        if op == "ReduceSum":  # its axes became an input earlier than those of the others
            return g.node(op, xs[0], g.constant(np.array(axes, np.int64)), keepdims=0)
        return g.node(op, xs[0], axes=axes, keepdims=0)

    return make


def _select(g: _Graph, xs: list[str], avals: Any, p: Any, shape: Any) -> str:
    if len(xs) != 3 or avals[0].dtype != bool:
        raise ValueError("ONNX: a selection among more than two has no counterpart here")
    return g.node("Where", xs[0], xs[2], xs[1])


def _gather(g: _Graph, x: _Value, ids: _Value, p: Any, shape: Any) -> str:
    """`x[:, ids]`, `x[:, 1:4]`, `x[:, ::2, ::2]` as JAX traces them with a free batch: constant places on some axes."""
    numbers, axes = p["dimension_numbers"], tuple(p["dimension_numbers"].start_index_map)
    rest = tuple(i for i in range(len(shape)) if i not in axes)
    grid = ids.constant
    if grid is not None and grid.ndim == 1 and tuple(numbers.offset_dims) == tuple(range(len(shape))):
        ends = [int(start) + p["slice_sizes"][axis] for start, axis in zip(grid, axes, strict=True)]
        return g.node("Slice", g.firm(x, "gather"), *(g.constant(np.array(v, np.int64)) for v in (grid, ends, axes)))
    in_place = tuple(numbers.collapsed_slice_dims) == axes and tuple(numbers.offset_dims) == rest
    if grid is None or not in_place or grid.ndim != len(axes) + 1 or numbers.operand_batching_dims:
        raise ValueError(f"ONNX: the gather {numbers} has no counterpart here")
    out = g.firm(x, "gather")
    for i, axis in enumerate(axes):
        along = np.moveaxis(grid[..., i], i, 0).reshape(grid.shape[i], -1)
        if np.any(along != along[:, :1]):
            raise ValueError("ONNX: a gather of scattered points has no counterpart here")
        if not isinstance(shape[axis], int) or along.min(initial=0) < 0 or along.max(initial=0) >= shape[axis]:
            raise ValueError(f"ONNX: a gather beyond the {shape[axis]} entries of axis {axis} has no counterpart here")
        out = g.node("Gather", out, g.constant(along[:, 0].astype(np.int64)), axis=axis)
    return out


def _cast(g: _Graph, xs: list[str], avals: Any, p: Any, shape: Any) -> str:
    return g.node("Cast", xs[0], to=helper.np_dtype_to_tensor_dtype(np.dtype(p["new_dtype"])))


_NODES: dict[str, Callable[..., str]] = {
    "conv_general_dilated": _conv,
    "dot_general": _dot,
    "reduce_window_max": _window_max,
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_sum": _reduce("ReduceSum"),
    "reshape": lambda g, xs, avals, p, shape: _reshaped(g, xs[0], shape),
    "squeeze": lambda g, xs, avals, p, shape: _reshaped(g, xs[0], shape),
    "expand_dims": lambda g, xs, avals, p, shape: _reshaped(g, xs[0], shape),
    "transpose": lambda g, xs, avals, p, shape: g.node("Transpose", xs[0], perm=[int(i) for i in p["permutation"]]),
    "concatenate": lambda g, xs, avals, p, shape: g.node("Concat", *xs, axis=p["dimension"]),
    "slice": _slice,
    "pad": _pad,
    "select_n": _select,
    "convert_element_type": _cast,
    "square": lambda g, xs, avals, p, shape: g.node("Mul", xs[0], xs[0]),
    "rsqrt": lambda g, xs, avals, p, shape: g.node("Reciprocal", g.node("Sqrt", xs[0])),
    "integer_pow": lambda g, xs, avals, p, shape: g.node("Pow", xs[0], g.constant(np.float32(p["y"]))),
}
