"""The ONNX graph under construction: values, constants, dimensions of symbolic size, and the rules of the primitives.

A value is held as it is in the program but for three things:

- What is broadcast stays small until somebody must read it whole (`Graph.firm` writes an Expand): elementwise nodes
  broadcast by themselves.
- What depends on constants alone is an array, computed here.
- Types that runtimes do not compute with are held in wider ones (`_HELD`), and rounded after each operation that is
  not exact: bfloat16 as the float32 of the same value, int8 as int32.
"""

import ast
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from compressx.trace import Op, Program

BATCH = "batch"
MOST = 1 << 62  # an end beyond every axis, for Slice
_LIMIT = (1 << 31) - (1 << 20)  # protobuf's 2 GiB, with room for the nodes

_TYPES = {
    "bool": TensorProto.BOOL,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "float8_e4m3fn": TensorProto.FLOAT8E4M3FN,
    "float8_e5m2": TensorProto.FLOAT8E5M2,
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "int8": TensorProto.INT8,
    "int16": TensorProto.INT16,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "uint16": TensorProto.UINT16,
    "uint32": TensorProto.UINT32,
}
_HELD = {
    "bfloat16": "float32",
    "float8_e4m3fn": "float32",
    "float8_e5m2": "float32",
    "int8": "int32",
    "int16": "int32",
    "uint8": "int32",
    "uint16": "int32",
    "uint32": "int64",
}


class Value:
    """What a value of the program is in the graph.

    Attributes:
      shape: of what is held; an axis that is still to be broadcast is 1, or missing in a scalar.
      name: in the graph; a constant has one once it is read.
      array: of a constant.
    """

    def __init__(self, shape: Sequence[Any], name: str | None = None, array: Any = None) -> None:
        self.shape, self.name, self.array = tuple(shape), name, array


class Call(NamedTuple):
    """One operation of the program, as a rule sees it: `outs` are shape and type of each output."""

    name: str
    params: Mapping[str, Any]
    values: tuple[Value, ...]
    shapes: tuple[tuple[Any, ...], ...]
    dtypes: tuple[Any, ...]
    out_shapes: tuple[tuple[Any, ...], ...]
    out_dtypes: tuple[Any, ...]


Rule = Callable[["Graph", Call], "str | list[Value]"]  # the name of the only output, or all outputs


class Rules(NamedTuple):
    """Primitive -> what is written for it.

    Attributes:
      elementwise: functions of (graph, names, call) whose nodes broadcast.
      whole: rules that read values as they are in the program.
      exact: the primitives whose results need no rounding.
    """

    elementwise: Mapping[str, Callable[["Graph", list[str], Call], str]]
    whole: Mapping[str, Rule]
    exact: frozenset[str]


class Unsupported(ValueError):
    """An operation that has no counterpart in ONNX here."""

    def __init__(self, what: str, advice: str = "") -> None:
        advice = advice or "export StableHLO, or write it with other operations"
        super().__init__(f"ONNX: {what} has no counterpart here; {advice}")


def held(dtype: Any) -> str:
    """The name of the type that stands for a type of the program inside the graph."""
    name = str(jnp.dtype(dtype)) if not jax.dtypes.issubdtype(dtype, jax.dtypes.extended) else str(dtype)
    if name not in _TYPES:
        raise Unsupported(f"the type {name}")
    return _HELD.get(name, name)


def onnx_type(dtype: Any) -> int:
    """ONNX' number of a type."""
    return int(_TYPES[str(jnp.dtype(dtype))])


def boolean(dtype: Any) -> bool:
    """True for truth values, which runtimes neither add, compare nor select."""
    return bool(jnp.dtype(dtype) == np.dtype(np.bool_))


def static(shape: Sequence[Any]) -> bool:
    """True where no extent depends on the batch."""
    return all(isinstance(n, (int, np.integer)) for n in shape)


class Graph:
    """Nodes and initializers under construction.

    Args:
      rules: of the primitives.
      inputs: the names of the graph's inputs; the first axis of each is the batch.
    """

    def __init__(self, rules: Rules, inputs: Sequence[str]) -> None:
        self.rules, self.inputs = rules, tuple(inputs)
        self.prelude: list[Any] = []  # nodes that read constants or inputs alone, and are seen from every subgraph
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.size = 0
        self._names = 0
        self._known: dict[Any, str] = {}

    # Names, nodes, constants

    def fresh(self) -> str:
        self._names += 1
        name = f"v{self._names}"
        return name if name not in self.inputs else self.fresh()

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        """Writes a node with one output; gives its name."""
        return self.several(op, inputs, 1, **attributes)[0]

    def several(self, op: str, inputs: Sequence[str], outputs: int, /, **attributes: Any) -> list[str]:
        """Writes a node; gives the names of its outputs."""
        names = [self.fresh() for _ in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, **attributes))
        return names

    def once(self, key: Any, op: str, *inputs: str, **attributes: Any) -> str:
        """The output of a node that reads inputs of the graph or initializers alone; it is written once."""
        if key not in self._known:
            self._known[key] = self.fresh()
            self.prelude.append(helper.make_node(op, list(inputs), [self._known[key]], **attributes))
        return self._known[key]

    def constant(self, array: Any) -> str:
        """An initializer; equal arrays are stored once."""
        array = np.asarray(array)
        array = np.ascontiguousarray(array).reshape(array.shape)
        key = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._known:
            kept = held(array.dtype)
            self.size += array.nbytes
            if self.size > _LIMIT:
                raise ValueError("the weights take more than the 2 GiB that one ONNX file may hold; export StableHLO")
            name = self.fresh()
            self.initializers.append(numpy_helper.from_array(array, name))
            self._known[key] = name
            if kept != str(array.dtype):
                self._known[key] = self.once((key, kept), "Cast", name, to=onnx_type(kept))
        return self._known[key]

    def ints(self, *numbers: Any) -> str:
        """A constant vector of int64."""
        return self.constant(np.array(numbers, np.int64))

    def like(self, number: Any, dtype: Any) -> str:
        """A constant number of the type that stands for `dtype`."""
        return self.constant(np.asarray(number, held(dtype)))

    # Values

    def loose(self, value: Value) -> str:
        """The name of a value, broadcast or not."""
        if value.name is None:
            value.name = self.constant(value.array)
        return value.name

    def firm(self, value: Value, shape: Sequence[Any]) -> str:
        """The name of a value that has this shape."""
        name = self.loose(value)
        return name if value.shape == tuple(shape) else self.node("Expand", name, self.dims(shape))

    def read(self, call: Call, i: int) -> str:
        """The name of an operand in its whole shape."""
        return self.firm(call.values[i], call.shapes[i])

    def array(self, call: Call, i: int) -> np.ndarray | None:
        """An operand that is constant, in its whole shape; None where it is not."""
        held_as = call.values[i].array
        if held_as is None or not static(call.shapes[i]):
            return None
        return np.broadcast_to(np.asarray(held_as), call.shapes[i])

    def cast(self, x: str, source: Any, target: Any) -> str:
        """x in the type that stands for `target`, not rounded to it."""
        return x if held(source) == held(target) else self.node("Cast", x, to=onnx_type(held(target)))

    def rounded(self, x: str, dtype: Any) -> str:
        """x on the numbers of a type."""
        kept = held(dtype)
        if kept == str(jnp.dtype(dtype)):
            return x
        saturate = {"saturate": 0} if "float8" in str(jnp.dtype(dtype)) else {}
        return self.node("Cast", self.node("Cast", x, to=onnx_type(dtype), **saturate), to=onnx_type(kept))

    # Shapes

    def dims(self, shape: Sequence[Any]) -> str:
        """A shape as a vector of int64."""
        if static(shape):
            return self.ints(*shape)
        parts = [self.dim(n) for n in shape]
        return parts[0] if len(parts) == 1 else self.node("Concat", *parts, axis=0)

    def dim(self, extent: Any) -> str:
        """An extent as a vector of one int64. Those that depend on the batch are read in JAX' notation of them."""
        if isinstance(extent, (int, np.integer)):
            return self.ints(extent)
        return self._term(ast.parse(str(extent).replace("^", "**").strip(), mode="eval").body)

    def _term(self, term: ast.expr) -> str:
        binary = {ast.Add: "Add", ast.Sub: "Sub", ast.Mult: "Mul", ast.Pow: "Pow"}
        called = {"max": "Max", "min": "Min", "mod": "Mod"}
        match term:
            case ast.Constant(value=int(number)):
                return self.ints(number)
            case ast.Name(id=name) if name == BATCH:
                return self.once(BATCH, "Shape", self.inputs[0], start=0, end=1)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return self.node("Neg", self._term(inner))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in binary:
                return self.node(binary[type(op)], self._term(left), self._term(right))
            case ast.Call(func=ast.Name(id=name), args=args) if name in called:
                return self.node(called[name], *map(self._term, args))
            case ast.Call(func=ast.Name(id="floordiv"), args=[left, right]):
                a, b = self._term(left), self._term(right)  # ONNX' division rounds towards zero
                return self.node("Div", self.node("Sub", a, self.node("Mod", a, b)), b)
        raise Unsupported(f"the extent {ast.unparse(term)}")

    def reshape(self, x: str, old: Sequence[Any], new: Sequence[Any]) -> str:
        if tuple(old) == tuple(new):
            return x
        free = [not isinstance(n, (int, np.integer)) for n in new]
        if sum(free) == 1 and 0 not in new:
            return self.node("Reshape", x, self.ints(*(-1 if f else n for n, f in zip(new, free, strict=True))))
        return self.node("Reshape", x, self.dims(new), allowzero=1)

    def transpose(self, x: str, perm: Iterable[Any]) -> str:
        places = [int(p) for p in perm]
        return x if places == sorted(places) else self.node("Transpose", x, perm=places)

    def squeeze(self, x: str, axes: Sequence[int]) -> str:
        return self.node("Squeeze", x, self.ints(*axes)) if axes else x

    def unsqueeze(self, x: str, axes: Sequence[int]) -> str:
        return self.node("Unsqueeze", x, self.ints(*axes)) if axes else x

    def slice(self, x: str, starts: str, ends: str, axes: Sequence[int], steps: Sequence[int] = ()) -> str:
        return self.node("Slice", x, starts, ends, self.ints(*axes), *([self.ints(*steps)] if steps else []))

    # Programs

    def run(self, program: Program, inputs: Sequence[Value]) -> list[Value]:
        """Writes a program on these values; gives its outputs."""
        known: dict[int, Value] = dict(zip(program.inputs, inputs, strict=True))
        known |= {n: Value(np.shape(c), array=c) for n, c in program.constants.items()}
        for op in program.ops:
            outs = self._apply(op, program, tuple(known[n] for n in op.inputs))
            known |= dict(zip(op.outputs, outs, strict=True))
        return [known[n] for n in program.outputs]

    def _apply(self, op: Op, program: Program, values: tuple[Value, ...]) -> list[Value]:
        shapes = [tuple(program.shapes[n] for n in numbers) for numbers in (op.inputs, op.outputs)]
        dtypes = [tuple(program.dtypes[n] for n in numbers) for numbers in (op.inputs, op.outputs)]
        call = Call(op.primitive.name, op.params, values, shapes[0], dtypes[0], shapes[1], dtypes[1])
        constants = self._constants(call)
        if constants is not None:
            made = op.primitive.bind(*map(jnp.asarray, constants), **op.params)
            return [_computed(x) for x in (made if op.primitive.multiple_results else [made])]
        if call.name in self.rules.elementwise:
            name = self.rules.elementwise[call.name](self, [self.loose(v) for v in values], call)
            outs = [Value(_broadcast(v.shape for v in values), name)]
        elif call.name in self.rules.whole:
            written = self.rules.whole[call.name](self, call)
            outs = [Value(call.out_shapes[0], written)] if isinstance(written, str) else written
        else:
            raise Unsupported(f"the operation {call.name!r} (to {_sorts(call)})", _advice(call.name))
        if call.name not in self.rules.exact:
            for out, dtype in zip(outs, call.out_dtypes, strict=True):
                out.name = self.rounded(out.name, dtype) if out.name is not None else None
        return outs

    def _constants(self, call: Call) -> list[Any] | None:
        """The operands, where the operation is computed here.

        What broadcasts stays small. A transposed weight is a node: tied weights are stored once.
        """
        arrays = [v.array for v in call.values]
        if any(a is None for a in arrays) or call.name in ("broadcast_in_dim", "iota", "dim_as_value"):
            return None
        if call.name in self.rules.elementwise:
            shape = _broadcast(v.shape for v in call.values)
            return [
                a if v.shape == shape else jnp.broadcast_to(a, shape) for a, v in zip(arrays, call.values, strict=True)
            ]
        if not all(map(static, (*call.shapes, *call.out_shapes))):
            return None
        if call.name == "transpose" and jnp.issubdtype(call.dtypes[0], jnp.floating):
            return None
        wanted = zip(arrays, call.values, call.shapes, strict=True)
        return [a if v.shape == tuple(s) else jnp.broadcast_to(a, s) for a, v, s in wanted]

    @contextmanager
    def body(self) -> Iterator[list[Any]]:
        """Nodes written inside belong to a subgraph: the list that is given."""
        outer, self.nodes = self.nodes, []
        try:
            yield self.nodes
        finally:
            self.nodes = outer


def info(name: str, shape: Sequence[Any], dtype: Any) -> Any:
    """The declaration of a value in the type `dtype`."""
    return helper.make_tensor_value_info(
        name, onnx_type(dtype), [int(n) if isinstance(n, (int, np.integer)) else str(n) for n in shape]
    )


def _computed(x: Any) -> Value:
    keys = jax.dtypes.issubdtype(x.dtype, jax.dtypes.extended)
    return Value(np.shape(x), array=x if keys else np.asarray(x))


def _broadcast(shapes: Any) -> tuple[Any, ...]:
    """The shape of what an elementwise node makes of values that broadcast."""
    out: tuple[Any, ...] = ()
    for shape in shapes:
        longer, shorter = (shape, out) if len(shape) >= len(out) else (out, shape)
        padded = (1,) * (len(longer) - len(shorter)) + tuple(shorter)
        out = tuple(b if isinstance(a, int) and a == 1 else a for a, b in zip(longer, padded, strict=True))
    return out


def _sorts(call: Call) -> str:
    return ", ".join(
        f"{jnp.dtype(d) if not jax.dtypes.issubdtype(d, jax.dtypes.extended) else d}[{','.join(map(str, s))}]"
        for s, d in zip(call.out_shapes, call.out_dtypes, strict=True)
    )


def _advice(name: str) -> str:
    if name.startswith(("random", "threefry", "rng")):
        return "random numbers are drawn: call the network without dropout (`deterministic=True`, `train=False`)"
    if "callback" in name or name in ("pallas_call", "ffi_call"):
        return "it is code of this machine: export the plain JAX form"
    return ""
