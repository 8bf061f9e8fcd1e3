"""Chains of operations behind a layer, as the tests of fusion share them: the functions, and an independent evaluation.

All numbers are small multiples of powers of two, so that sums and products are exact in whatever order they are taken,
and they are chosen so that every side of every clipping is reached.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressx.kernels import graph, pattern_conv
from compressx.trace import trace

N, H, W, C = 2, 4, 4, 3  # as many rows as columns, so that they can change positions
Image = jax.Array
Chain = tuple[str, ...]


def _steps(rng: np.random.Generator, shape: Sequence[int], high: int, unit: float) -> np.ndarray:
    return (rng.integers(-high, high + 1, shape) * unit).astype(np.float32)


def variables(seed: int = 0) -> dict[str, np.ndarray]:
    """Kernels and the numbers that chains add, multiply and compare with."""
    rng = np.random.default_rng(seed)
    v = {
        "plain": _steps(rng, (3, 3, C, C), 2, 0.5),
        "depthwise": _steps(rng, (3, 3, 1, C), 2, 1.0),
        "point": _steps(rng, (1, 1, C, C), 2, 0.5),
        "other": _steps(rng, (1, 1, C, C), 2, 0.5),
        "dense": _steps(rng, (C, C), 2, 0.5),
        "shift": np.array([1.5, -2.0, 0.5], np.float32),
        "negative": np.array([-1.0, -3.0, -0.5], np.float32),
        "scale": np.array([2.0, -0.5, 1.0], np.float32),
        "mean": np.array([0.5, -1.0, 2.0], np.float32),
        "var": np.array([3.0, 0.0, 15.0], np.float32),  # with 1 added, the squares of powers of two
        "bound": np.array([0.0, 1.0, -1.0], np.float32),
        "position": _steps(rng, (1, H, W, C), 4, 0.5),
        "row": _steps(rng, (1, 1, W, 1), 4, 0.5),
        "image": _steps(rng, (N, 1, 1, 1), 4, 0.5),
    }
    v["plain"][:, :, 0, 1] = 0  # kernels that are pruned
    v["point"][:, :, 1, 2] = 0
    return v


def inputs(seed: int = 1) -> np.ndarray:
    """Images whose convolutions lie on both sides of every bound, often by far."""
    return _steps(np.random.default_rng(seed), (N, H, W, C), 6, 0.5)


class State:
    """What a chain is made from: the input, the layer's own output, variables, and outputs beside the last one."""

    def __init__(self, v: dict[str, Image], x: Image, first: Image):
        self.v, self.x, self.first = v, x, first
        self.outputs: list[Image] = []

    def conv(self, name: str) -> Image:
        return _conv(self.x, self.v[name])

    def wide(self, name: str) -> Image:
        return self.v[name][None, None, None]


def _conv(x: Image, w: Image, groups: int = 1, strides: int = 1, padding: str = "SAME") -> Image:
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(
        x, w, (strides, strides), padding, dimension_numbers=numbers, feature_group_count=groups
    )


def _tap(y: Image, s: State) -> Image:
    s.outputs.append(y)
    return y


def _norm(y: Image, s: State) -> Image:
    gain = s.v["scale"] * lax.rsqrt(s.v["var"] + 1.0)
    return (y - s.wide("mean")) * gain[None, None, None] + s.wide("shift")


def _pool(y: Image, window: int, stride: int, pads: str | list[tuple[int, int]], padded: bool = False) -> Image:
    return nn.max_pool(y, (window, window), (stride, stride), pads)


Operation = Callable[[Image, State], Image]

# The operations of fusion and what lies nearest to them, in every order up to four.
CORE: dict[str, Operation] = {
    "+ v": lambda y, s: y + s.wide("shift"),
    "* v": lambda y, s: y * s.wide("scale"),
    "v -": lambda y, s: s.wide("shift") - y,
    "relu": lambda y, s: nn.relu(y),
    "min 6": lambda y, s: jnp.minimum(y, 6.0),
    "max -1": lambda y, s: jnp.maximum(-1.0, y),
    "min 4": lambda y, s: jnp.minimum(4.0, y),
    "+ x": lambda y, s: y + s.x,
    "conv +": lambda y, s: s.conv("other") + y,
    "leaky": lambda y, s: jnp.maximum(y, 0.1 * y),
    "pool": lambda y, s: _pool(y, 3, 1, "SAME"),
    "neg": lambda y, s: -y,
    "output": _tap,
}
MORE: dict[str, Operation] = {
    "v +": lambda y, s: s.wide("negative") + y,
    "+ 2": lambda y, s: y + 2.0,
    "-3 +": lambda y, s: -3.0 + y,
    "- v": lambda y, s: y - s.wide("shift"),
    "- 1": lambda y, s: y - 1.0,
    "1 -": lambda y, s: 1.0 - y,
    "v *": lambda y, s: s.wide("scale") * y,
    "* -2": lambda y, s: y * -2.0,
    "* 0": lambda y, s: y * 0.0,
    "/ v": lambda y, s: y / s.wide("scale"),
    "/ 4": lambda y, s: y / 4.0,
    "norm": _norm,
    "norm late": lambda y, s: (y * s.wide("scale") + s.wide("shift") - s.wide("mean")) / s.wide("scale"),
    "max 0 left": lambda y, s: jnp.maximum(0.0, y),
    "max 0 wide": lambda y, s: jnp.maximum(y, jnp.zeros_like(y)),
    "max v": lambda y, s: jnp.maximum(y, s.wide("bound")),
    "max 1": lambda y, s: jnp.maximum(y, 1.0),
    "max position": lambda y, s: jnp.maximum(y, jnp.broadcast_to(s.v["position"], y.shape)),
    "min 0": lambda y, s: jnp.minimum(y, 0.0),
    "6 min": lambda y, s: jnp.minimum(6.0, y),
    "min v": lambda y, s: jnp.minimum(y, s.wide("shift")),
    "relu6": lambda y, s: nn.relu6(y),
    "relu6 turned": lambda y, s: jnp.maximum(jnp.minimum(y, 6.0), 0.0),
    "clip": lambda y, s: jnp.clip(y, -1.0, 1.0),
    "clip 0 6": lambda y, s: jnp.clip(y, 0.0, 6.0),
    "clip 0 4": lambda y, s: jnp.clip(y, 0.0, 4.0),
    "clamp": lambda y, s: lax.clamp(0.0, y, 6.0),
    "where": lambda y, s: jnp.where(y > 0, y, 0.0),
    "abs": lambda y, s: jnp.abs(y),
    "square": lambda y, s: 0.25 * jnp.square(y),
    "y * y": lambda y, s: 0.25 * (y * y),
    "y + y": lambda y, s: y + y,
    "y - y": lambda y, s: (y - y) + s.x,
    "leaky left": lambda y, s: jnp.maximum(0.1 * y, y),
    "leaky flax": lambda y, s: nn.leaky_relu(y, 0.25),
    "leaky min": lambda y, s: jnp.minimum(y, 0.1 * y),
    "leaky quarter": lambda y, s: jnp.maximum(y, 0.25 * y),
    "leaky read": lambda y, s: jnp.maximum(y, _tap(0.1 * y, s)),
    "x +": lambda y, s: s.x + y,
    "- x": lambda y, s: y - s.x,
    "x -": lambda y, s: s.x - y,
    "* x": lambda y, s: y * s.x,
    "max x": lambda y, s: jnp.maximum(y, s.x),
    "min x": lambda y, s: jnp.minimum(s.x, y),
    "+ conv": lambda y, s: y + s.conv("other"),
    "- conv": lambda y, s: y - s.conv("other"),
    "+ relu conv": lambda y, s: y + nn.relu(s.conv("other")),
    "+ conv + v": lambda y, s: y + (s.conv("other") + s.wide("shift")),
    "+ read conv": lambda y, s: y + _tap(s.conv("other"), s),
    "+ same": lambda y, s: y + s.conv("plain"),
    "+ first": lambda y, s: y + s.first,
    "first -": lambda y, s: s.first - y,
    "+ relu y": lambda y, s: y + nn.relu(y),
    "relu y - y": lambda y, s: nn.relu(y) - y,
    "max pool y": lambda y, s: y + _pool(y, 3, 1, "SAME"),
    "+ position": lambda y, s: y + jnp.broadcast_to(s.v["position"], y.shape),
    "* position": lambda y, s: 0.5 * y * jnp.broadcast_to(s.v["position"], y.shape),
    "+ row": lambda y, s: y + jnp.broadcast_to(s.v["row"], y.shape),
    "+ image": lambda y, s: y + jnp.broadcast_to(s.v["image"], y.shape),
    "+ mean": lambda y, s: y + jnp.broadcast_to(y.mean((1, 2), keepdims=True), y.shape),
    "relu pool": lambda y, s: _pool(nn.relu(y), 2, 1, [(1, 0), (0, 1)]),
    "pool valid": lambda y, s: jnp.pad(_pool(y, 2, 1, "VALID"), ((0, 0), (0, 1), (0, 1), (0, 0))),
    "pool far": lambda y, s: lax.slice(_pool(nn.relu(y), 2, 1, [(2, 2), (1, 3)]), (0, 0, 0, 0), y.shape),
    "pool stride": lambda y, s: jnp.repeat(jnp.repeat(_pool(y, 2, 2, "VALID"), 2, 1), 2, 2),
    "average": lambda y, s: lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") * 0.25,
    "min pool": lambda y, s: -_pool(-y, 3, 1, "SAME"),
    "transpose": lambda y, s: y.transpose(0, 2, 1, 3),
    "transpose channels": lambda y, s: jnp.concatenate([y, y[..., :1]], 3).transpose(0, 1, 3, 2)[:, :, :W, :C],
    "flip": lambda y, s: y[:, :, ::-1, ::-1],
    "flatten": lambda y, s: y.reshape(N, -1).reshape(y.shape),
    "rows": lambda y, s: nn.relu(y.reshape(N * H * W, C) + s.v["shift"][None]).reshape(y.shape),
    "pad": lambda y, s: jnp.pad(y, ((0, 0), (1, 0), (0, 1), (0, 0)), constant_values=1.0)[:, :H, 1:],
    "point": lambda y, s: _conv(y, s.v["point"]),
    "point relu": lambda y, s: nn.relu(_conv(y, s.v["point"]) + s.wide("negative")),
    "depthwise": lambda y, s: 0.5 * _conv(y, s.v["depthwise"], groups=C),
    "dense": lambda y, s: y @ s.v["dense"] + s.wide("shift"),
    "strided": lambda y, s: jnp.repeat(jnp.repeat(_conv(y, s.v["point"], strides=2), 2, 1), 2, 2),
    "tanh": lambda y, s: jnp.tanh(y),
    "half": lambda y, s: y.astype(jnp.bfloat16).astype(jnp.float32),
    "as integers": lambda y, s: jnp.floor(y).astype(jnp.int32).astype(jnp.float32),
}
OPERATIONS = CORE | MORE
LAYERS: dict[str, Operation] = {
    "conv": lambda y, s: _conv(s.x, s.v["plain"]),
    "conv and bias": lambda y, s: _conv(s.x, s.v["plain"]) + s.wide("shift"),
    "point": lambda y, s: _conv(s.x, s.v["point"]),
    "depthwise": lambda y, s: _conv(s.x, s.v["depthwise"], groups=C),
    "dense": lambda y, s: s.x @ s.v["dense"],
    "valid": lambda y, s: jnp.pad(_conv(s.x, s.v["plain"], padding="VALID"), ((0, 0), (1, 1), (1, 1), (0, 0))),
    "the input": lambda y, s: s.x,
}


def function(layer: str, chain: Chain) -> Callable[..., tuple[Image, ...]]:
    """The layer and the chain behind it as `f(variables, x)`: its result, and what it gives out on the way."""

    def f(v: dict[str, Image], x: Image) -> tuple[Image, ...]:
        state = State(v, x, x)
        y = state.first = LAYERS[layer](x, state)
        for name in chain:
            y = OPERATIONS[name](y, state)
        return (y, *state.outputs)

    return f


def together(cases: Sequence[tuple[str, Chain]]) -> Callable[..., list[tuple[Image, ...]]]:
    """Many chains as one function, so that one compilation serves them all."""
    return lambda v, x: [function(*case)(v, x) for case in cases]


def chains(longest: int, names: Sequence[str] = tuple(CORE)) -> Iterator[Chain]:
    """Every chain of one to `longest` operations."""
    for n in range(1, longest + 1):
        yield from itertools.product(names, repeat=n)


def sampled(rng: np.random.Generator, longest: int) -> tuple[str, Chain]:
    """A layer and a chain of any operations."""
    n = int(rng.integers(1, longest + 1))
    return str(rng.choice(list(LAYERS))), tuple(map(str, rng.choice(list(OPERATIONS), n)))


def folded(f: Callable[..., object], v: object, x: np.ndarray) -> int:
    """Operations of a traced function that its steps no longer have: those that convolutions took in."""
    program = trace(f, v, x)
    steps, known = graph.steps(program, v)
    return sum(any(out not in known for out in op.outputs) for op in program.ops) - len(steps)


def evaluate(f: Callable[..., object], v: object, x: np.ndarray) -> object:
    """What the fused steps of a function compute, by the definition of each, in NumPy where they are convolutions."""
    program = trace(f, v, x)
    steps, known = graph.steps(program, v)
    values = dict(zip(program.inputs, jax.tree.leaves(x), strict=True)) | known
    for s in steps:
        if isinstance(s, graph.Conv):
            more = None if s.residual < 0 else np.asarray(values[s.residual])
            weight = s.w * s.scale
            given = (s.geometry, s.bias, s.activation, more, s.residual_after)
            values[s.y] = pattern_conv.reference(np.asarray(values[s.x]), weight, *given).astype(np.float32)
        elif isinstance(s, graph.Pool):
            values[s.y] = _windows(np.asarray(values[s.x]), s)
        else:
            out = s.op.primitive.bind(*(values[i] for i in s.op.inputs), **s.op.params)
            values |= zip(s.op.outputs, out if s.op.primitive.multiple_results else [out], strict=True)
    return jax.tree.unflatten(program.treedef, [values[i] for i in program.outputs])


def _windows(x: np.ndarray, s: graph.Pool) -> np.ndarray:
    """The largest of each window as the native loops see it: what lies outside of the image is zero."""
    (kh, kw), (sh, sw) = s.window, s.strides
    wide = np.pad(x, ((0, 0), *s.pads, (0, 0)))
    views = np.lib.stride_tricks.sliding_window_view(wide, (kh, kw), axis=(1, 2))[:, ::sh, ::sw]
    return np.asarray(views.max(axis=(-2, -1)))
