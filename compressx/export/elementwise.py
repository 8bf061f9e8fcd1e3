"""Elementwise primitives: their nodes broadcast their operands."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressx.export.graph import Call, Graph, Unsupported, boolean, held, onnx_type

Elementwise = Callable[[Graph, list[str], Call], str]


def _node(op: str, **attributes: Any) -> Elementwise:
    return lambda g, xs, call: g.node(op, *xs, **attributes)


def _same(g: Graph, xs: list[str], call: Call) -> str:
    return xs[0]


def _is(call: Call, kind: Any) -> bool:
    return bool(jnp.issubdtype(call.dtypes[0], kind))


def _by_type(truth: str, integer: str) -> Elementwise:
    """One operator for truth values and another for integers."""
    return lambda g, xs, call: g.node(truth if boolean(call.dtypes[0]) else integer, *xs)


def _ordered(op: str) -> Elementwise:
    """A comparison; truth values are compared as integers."""

    def make(g: Graph, xs: list[str], call: Call) -> str:
        if boolean(call.dtypes[0]):
            xs = [g.node("Cast", x, to=onnx_type("int32")) for x in xs]
        return g.node(op, *xs)

    return make


def _clamp(g: Graph, xs: list[str], call: Call) -> str:
    low, x, high = xs
    return g.node("Min", g.node("Max", x, low), high)


def _select(g: Graph, xs: list[str], call: Call) -> str:
    which, *cases = xs
    out = cases[0]
    for number, case in enumerate(cases[1:], 1):
        # Index 0 is False. An index beyond the last case is not defined.
        taken = which if boolean(call.dtypes[0]) else g.node("Equal", which, g.like(number, call.dtypes[0]))
        if boolean(call.out_dtypes[0]):  # runtimes have no Where of truth values
            kept = g.node("And", g.node("Not", taken), out)
            out = g.node("Or", g.node("And", taken, case), kept)
        else:
            out = g.node("Where", taken, case, out)
    return out


def _convert(g: Graph, xs: list[str], call: Call) -> str:
    return g.cast(xs[0], call.dtypes[0], call.out_dtypes[0])


def _integer_pow(g: Graph, xs: list[str], call: Call) -> str:
    power = int(call.params["y"])
    raised = xs[0] if abs(power) == 1 else g.node("Pow", xs[0], g.like(abs(power), call.dtypes[0]))
    return g.node("Reciprocal", raised) if power < 0 else raised


def _round(g: Graph, xs: list[str], call: Call) -> str:
    if int(call.params["rounding_method"]) == 1:
        return g.node("Round", xs[0])  # halves to even
    up = g.node("Floor", g.node("Add", g.node("Abs", xs[0]), g.like(0.5, call.dtypes[0])))
    return g.node("Mul", g.node("Sign", xs[0]), up)


def _is_finite(g: Graph, xs: list[str], call: Call) -> str:
    return g.node("Not", g.node("Or", g.node("IsInf", xs[0]), g.node("IsNaN", xs[0])))


def _erfc(g: Graph, xs: list[str], call: Call) -> str:
    return g.node("Sub", g.like(1, call.dtypes[0]), g.node("Erf", xs[0]))


def _log1p(g: Graph, xs: list[str], call: Call) -> str:
    """log(u) x / (u - 1) with u = 1 + x, whose rounding cancels; x where u is 1."""
    one = g.like(1, call.dtypes[0])
    u = g.node("Add", xs[0], one)
    exact = g.node("Div", g.node("Mul", g.node("Log", u), xs[0]), g.node("Sub", u, one))
    small = g.node("Where", g.node("Equal", u, one), xs[0], exact)
    return g.node("Where", g.node("IsInf", u), u, small)


def _expm1(g: Graph, xs: list[str], call: Call) -> str:
    """2 t / (1 - t) with t = tanh(x / 2) near 0, where exp(x) - 1 cancels."""
    number = lambda n: g.like(n, call.dtypes[0])
    t = g.node("Tanh", g.node("Mul", xs[0], number(0.5)))
    near = g.node("Div", g.node("Mul", number(2), t), g.node("Sub", number(1), t))
    far = g.node("Sub", g.node("Exp", xs[0]), number(1))
    return g.node("Where", g.node("Less", g.node("Abs", xs[0]), number(0.5)), near, far)


def _cbrt(g: Graph, xs: list[str], call: Call) -> str:
    root = g.node("Pow", g.node("Abs", xs[0]), g.like(1 / 3, call.dtypes[0]))
    return g.node("Mul", g.node("Sign", xs[0]), root)


def _atan2(g: Graph, xs: list[str], call: Call) -> str:
    """The angle of (x, y): that of the slope, turned by half a circle on the left."""
    y, x = xs
    number = lambda n: g.like(n, call.dtypes[0])
    zero = number(0)
    up = g.node("Where", g.node("Less", y, zero), number(-1), number(1))
    half = g.node("Mul", up, number(np.pi))
    slope = g.node("Atan", g.node("Div", y, x))  # upright where x is 0; nothing where both are
    right = g.node("Where", g.node("Equal", y, zero), g.node("Mul", y, zero), slope)
    left = g.node("Add", right, half)
    return g.node("Where", g.node("Less", x, zero), left, right)


def _reduce_precision(g: Graph, xs: list[str], call: Call) -> str:
    bits = (call.params["exponent_bits"], call.params["mantissa_bits"])
    kinds = {(8, 7): "bfloat16", (5, 10): "float16", (8, 23): "float32"}
    if bits not in kinds or held(call.dtypes[0]) != "float32":
        raise Unsupported(f"the operation 'reduce_precision' to {bits} bits")
    return g.node("Cast", g.node("Cast", xs[0], to=onnx_type(kinds[bits])), to=onnx_type("float32"))


TABLE: dict[str, Elementwise] = {
    "abs": _node("Abs"),
    "acos": _node("Acos"),
    "acosh": _node("Acosh"),
    "add": _node("Add"),
    "add_any": _node("Add"),
    "and": _by_type("And", "BitwiseAnd"),
    "asin": _node("Asin"),
    "asinh": _node("Asinh"),
    "atan": _node("Atan"),
    "atan2": _atan2,
    "atanh": _node("Atanh"),
    "cbrt": _cbrt,
    "ceil": _node("Ceil"),
    "clamp": _clamp,
    "convert_element_type": _convert,
    "copy": _same,
    "cos": _node("Cos"),
    "cosh": _node("Cosh"),
    "device_put": _same,
    "div": _node("Div"),
    "eq": _node("Equal"),
    "erf": _node("Erf"),
    "erfc": _erfc,
    "exp": _node("Exp"),
    "exp2": lambda g, xs, call: g.node("Pow", g.like(2, call.dtypes[0]), xs[0]),
    "expm1": _expm1,
    "floor": _node("Floor"),
    "ge": _ordered("GreaterOrEqual"),
    "gt": _ordered("Greater"),
    "integer_pow": _integer_pow,
    "is_finite": _is_finite,
    "le": _ordered("LessOrEqual"),
    "log": _node("Log"),
    "log1p": _log1p,
    "logistic": _node("Sigmoid"),
    "lt": _ordered("Less"),
    "max": lambda g, xs, call: g.node("Or" if boolean(call.dtypes[0]) else "Max", *xs),
    "min": lambda g, xs, call: g.node("And" if boolean(call.dtypes[0]) else "Min", *xs),
    "mul": lambda g, xs, call: g.node("And" if boolean(call.dtypes[0]) else "Mul", *xs),
    "name": _same,
    "ne": lambda g, xs, call: g.node("Not", g.node("Equal", *xs)),
    "neg": _node("Neg"),
    "not": _by_type("Not", "BitwiseNot"),
    "or": _by_type("Or", "BitwiseOr"),
    "pow": _node("Pow"),
    "reduce_precision": _reduce_precision,
    "rem": _node("Mod", fmod=1),  # the sign of the dividend
    "round": _round,
    "rsqrt": lambda g, xs, call: g.node("Reciprocal", g.node("Sqrt", xs[0])),
    "select_n": _select,
    "sharding_constraint": _same,
    "sign": _node("Sign"),
    "sin": _node("Sin"),
    "sinh": _node("Sinh"),
    "sqrt": _node("Sqrt"),
    "square": lambda g, xs, call: g.node("Mul", xs[0], xs[0]),
    "stop_gradient": _same,
    "sub": _node("Sub"),
    "tan": _node("Tan"),
    "tanh": _node("Tanh"),
    "xor": _by_type("Xor", "BitwiseXor"),
}

EXACT = frozenset(
    (
        "abs",
        "and",
        "ceil",
        "clamp",
        "copy",
        "device_put",
        "eq",
        "floor",
        "ge",
        "gt",
        "is_finite",
        "le",
        "lt",
        "max",
        "min",
    )
    + ("name", "ne", "not", "or", "rem", "round", "select_n", "sharding_constraint", "sign", "stop_gradient", "xor")
)
