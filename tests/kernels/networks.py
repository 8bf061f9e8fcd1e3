"""Random networks of convolutions, products, lookups, normalisations and loops, with the kernels that each has."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Layer = Callable[[dict[str, Any], Any], Any]


class Network(NamedTuple):
    """A network and what is known of it without reading its program.

    Attributes:
      apply: `apply(variables, x)`, its outputs every value that no layer reads.
      variables: name of the layer -> leaves.
      x: images.
      kernels: weights of its convolutions and products, by path, in any order.
      native: those that the native kernels should run.
    """

    apply: Callable[[Any, Any], Any]
    variables: dict[str, dict[str, np.ndarray]]
    x: np.ndarray
    kernels: list[str]
    native: list[str]


class _Maker:
    """Collects layers; values are numbered, the input is 0."""

    def __init__(self, rng: np.random.Generator):
        self.rng = rng
        n, h, w, c = (int(rng.integers(*r)) for r in ((1, 4), (4, 9), (4, 9), (1, 5)))
        self.x = rng.standard_normal((n, h, w, c)).astype(np.float32)
        self.variables: dict[str, dict[str, np.ndarray]] = {}
        self.layers: list[tuple[Callable[..., Any], tuple[int, ...], str]] = []
        self.shapes: list[tuple[int, ...]] = [self.x.shape]
        self.read: set[int] = set()
        self.kernels: list[str] = []
        self.native: list[str] = []

    def pick(self, *options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def weight(self, name: str, leaf: str, shape: tuple[int, ...], kernel: bool = False, native: bool = False) -> None:
        """A leaf; half of a kernel's numbers are zero."""
        w = self.rng.standard_normal(shape) / max(1, np.prod(shape[:-1])) ** 0.5
        if kernel:
            w *= self.rng.random(shape) < 0.7
            self.kernels.append(f"{name}/{leaf}")
            if native:
                self.native.append(f"{name}/{leaf}")
        self.variables.setdefault(name, {})[leaf] = w.astype(np.float32)

    def add(self, f: Callable[..., Any], sources: tuple[int, ...], name: str = "") -> None:
        """`f(leaves, *values)` as a layer; one without a result of a sensible size is not added."""
        spec = lambda a: jax.ShapeDtypeStruct(np.shape(a), np.float32)
        given = [jax.ShapeDtypeStruct(self.shapes[s], np.float32) for s in sources]
        out = jax.eval_shape(f, jax.tree.map(spec, self.variables.get(name, {})), *given)
        self.layers.append((f, sources, name))
        self.shapes.append(out.shape)
        self.read.update(sources)

    def images(self) -> list[int]:
        return [i for i, s in enumerate(self.shapes) if len(s) == 4]


def _conv(m: _Maker, source: int, name: str) -> None:
    n, h, w, c = m.shapes[source]
    kind = m.pick(
        "plain", "plain", "plain", "plain", "dilated", "transposed", "bfloat16", "nchw", "negative", "computed"
    )
    size = (min(h, m.pick(1, 2, 3)), min(w, m.pick(1, 3)))
    groups = m.pick(1, 1, c, next(g for g in (2, 1) if c % g == 0))
    cout = groups * m.pick(1, 2, 3)
    strides = m.pick((1, 1), (1, 1), (2, 2), (1, 2))
    pads: Any = m.pick("SAME", "VALID", ((1, 2), (0, 3)), ((0, 1), (2, 0)))
    options: dict[str, Any] = {"feature_group_count": groups, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    if kind == "dilated":
        options["rhs_dilation"], pads = m.pick((2, 2), (1, 2)), "SAME"
    if kind == "dilated" and options["rhs_dilation"][0] == 1 and size[1] == 1:
        pass  # one tap is dilated too, as far as the program says
    if kind == "transposed":
        options["lhs_dilation"], strides, pads = (2, 2), (1, 1), ((1, 2), (2, 1))
    if kind == "negative":
        pads, size, strides = ((1, 0), (-1, 0)), (1, 1), (1, 1)
    if kind == "nchw":
        options["dimension_numbers"] = ("NCHW", "HWIO", "NCHW")
    plain = kind in ("plain", "computed")
    m.weight(name, "kernel", (*size, c // groups, cout), kernel=True, native=plain)
    bias = m.pick(True, False)
    if bias:
        m.weight(name, "bias", (cout,))
    if kind == "computed":
        m.weight(name, "gain", (1, 1, 1, 1))

    def f(v: Any, x: Any) -> Any:
        w, low = v["kernel"], jnp.bfloat16 if kind == "bfloat16" else jnp.float32
        if kind == "computed":
            w = jnp.flip(w, 0) * jnp.broadcast_to(v["gain"], w.shape)
        if kind == "nchw":
            x = x.transpose(0, 3, 1, 2)
        y = lax.conv_general_dilated(x.astype(low), w.astype(low), strides, pads, **options).astype(jnp.float32)
        if kind == "nchw":
            y = y.transpose(0, 2, 3, 1)
        return y + v["bias"][None, None, None] if bias else y

    m.add(f, (source,), name)


def _dynamic(m: _Maker, source: int, name: str) -> None:
    """A convolution whose kernel the input makes: it has no weight, and a line of its own."""
    c = m.shapes[source][3]
    m.kernels.append("")

    def f(v: Any, x: Any) -> Any:
        w = jnp.broadcast_to(jnp.tanh(x.mean((0, 1, 2)))[None, None, :, None], (1, 1, c, 2))
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    m.add(f, (source,), name)


def _rows(m: _Maker, source: int, name: str) -> None:
    """A convolution along one axis."""
    n, h, w, c = m.shapes[source]
    m.weight(name, "kernel", (2, c, 3), kernel=True)
    m.weight(name, "bias", (3,))

    def f(v: Any, x: Any) -> Any:
        y = x.reshape(-1, w, c)
        y = lax.conv_general_dilated(y, v["kernel"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"))
        return (y + v["bias"][None, None]).reshape(x.shape[0], h, w, 3)

    m.add(f, (source,), name)


def _norm(m: _Maker, source: int, name: str) -> None:
    c = m.shapes[source][-1]
    for leaf in ("mean", "var", "scale", "bias"):
        m.weight(name, leaf, (c,))
    m.variables[name]["var"] = np.abs(m.variables[name]["var"]) + 0.5
    wide = lambda x, like: jnp.expand_dims(x, tuple(range(like.ndim - 1)))
    m.add(
        lambda v, x: (x - wide(v["mean"], x)) * wide(v["scale"] * lax.rsqrt(v["var"]), x) + wide(v["bias"], x),
        (source,),
        name,
    )


def _layer_norm(m: _Maker, source: int, name: str) -> None:
    c = m.shapes[source][-1]
    m.weight(name, "scale", (c,))
    m.weight(name, "bias", (c,))

    def f(v: Any, x: Any) -> Any:
        wide = lambda w: jnp.expand_dims(w, tuple(range(x.ndim - 1)))
        x = x - x.mean(-1, keepdims=True)
        return x * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1.0) * wide(v["scale"]) + wide(v["bias"])

    m.add(f, (source,), name)


def _activation(m: _Maker, source: int, name: str) -> None:
    f = m.pick(
        jax.nn.relu,
        jax.nn.relu6,
        lambda y: jnp.maximum(y, 0.1 * y),
        lambda y: jnp.minimum(y, 6.0),
        lambda y: -0.5 * y + 1.0,
        jnp.tanh,
        lambda y: jnp.flip(y, 1),
        lambda y: jnp.tile(y, (1,) * (y.ndim - 1) + (2,)),
        lambda y: y + y,
    )
    m.add(lambda v, x: f(x), (source,), name)


def _pool(m: _Maker, source: int, name: str) -> None:
    n, h, w, c = m.shapes[source]
    size = (min(h, m.pick(1, 2, 3)), min(w, m.pick(1, 2, 3)))
    strides = (m.pick(1, 2), m.pick(1, 2))
    pads = m.pick("VALID", "SAME", ((0, 0), (1, 1), (0, 1), (0, 0)), ((0, 0), (3, 0), (0, 3), (0, 0)))
    first = m.pick(jax.nn.relu, lambda y: y)
    least = jnp.float32(-2.0)  # a window of padding alone has this, rather than -inf

    def f(v: Any, x: Any) -> Any:
        y = lax.reduce_window(first(x), -jnp.inf, lax.max, (1, *size, 1), (1, *strides, 1), pads)
        return jnp.maximum(y, least)

    m.add(f, (source,), name)


def _join(m: _Maker, source: int, name: str) -> None:
    same = [i for i, s in enumerate(m.shapes) if s == m.shapes[source]]
    other = m.pick(*same)
    f = m.pick(jnp.add, jnp.add, jnp.subtract, jnp.multiply, jnp.maximum, lambda a, b: jnp.concatenate([a, b], -1))
    m.add(lambda v, a, b: f(a, b), (source, other), name)


def _dense(m: _Maker, source: int, name: str) -> None:
    c, transposed = m.shapes[source][-1], m.pick(True, False)
    m.weight(name, "kernel", (3, c) if transposed else (c, 3), kernel=True)
    m.weight(name, "bias", (3,))

    def f(v: Any, x: Any) -> Any:
        w = v["kernel"].T if transposed else v["kernel"]
        return x @ w + jnp.expand_dims(v["bias"], tuple(range(x.ndim - 1)))

    m.add(f, (source,), name)


def _head(m: _Maker, source: int, name: str) -> None:
    n, h, w, c = m.shapes[source]
    flat = m.pick(True, False)
    m.weight(name, "kernel", (h * w * c if flat else c, 4), kernel=True)
    m.add(lambda v, x: (x.reshape(x.shape[0], -1) if flat else x.mean((1, 2))) @ v["kernel"], (source,), name)


def _lookup(m: _Maker, source: int, name: str) -> None:
    c = m.shapes[source][-1]
    m.weight(name, "table", (c, 3))
    m.add(lambda v, x: v["table"][jnp.argmax(x, -1)], (source,), name)


def _loop(m: _Maker, source: int, name: str) -> None:
    """Rows as a sequence: a recurrence with two matrices and a shift."""
    n, h, w, c = m.shapes[source]
    m.weight(name, "input", (c, 3), kernel=True)
    m.weight(name, "hidden", (3, 3), kernel=True)
    m.weight(name, "shift", (3,))
    m.weight(name, "start", (1, 1, 3))

    def f(v: Any, x: Any) -> Any:
        def step(state: Any, row: Any) -> Any:
            state = jnp.tanh(row @ v["input"] + state @ v["hidden"] + v["shift"][None, None])
            return state, state

        start = jnp.broadcast_to(v["start"], (x.shape[0], w, 3))
        return lax.scan(step, start, x.transpose(1, 0, 2, 3))[1].transpose(1, 0, 2, 3)

    m.add(f, (source,), name)


def _stacked(m: _Maker, source: int, name: str) -> None:
    """Layers of one shape, scanned over."""
    c = m.shapes[source][-1]
    m.weight(name, "kernel", (2, c, c), kernel=True)
    m.add(lambda v, x: lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, v["kernel"])[0], (source,), name)


def _branch(m: _Maker, source: int, name: str) -> None:
    c = m.shapes[source][-1]
    m.weight(name, "kernel", (c, c), kernel=True)
    m.add(lambda v, x: lax.cond(x.sum() > 0, lambda y: y @ v["kernel"], lambda y: y, x), (source,), name)


def _while(m: _Maker, source: int, name: str) -> None:
    c = m.shapes[source][-1]
    m.weight(name, "kernel", (c, c), kernel=True)

    def f(v: Any, x: Any) -> Any:
        body = lambda s: (s[0] + 1, jnp.tanh(s[1] @ v["kernel"]))
        return lax.while_loop(lambda s: s[0] < 2, body, (jnp.int32(0), x))[1]

    m.add(f, (source,), name)


def _token(m: _Maker, source: int, name: str) -> None:
    """A row of variables before the others."""
    n, h, w, c = m.shapes[source]
    m.weight(name, "token", (1, 1, w, c))
    m.add(lambda v, x: jnp.concatenate([jnp.broadcast_to(v["token"], (x.shape[0], 1, w, c)), x], 1), (source,), name)


def _attend(m: _Maker, source: int, name: str) -> None:
    """A product of the image with itself, which has no parameters, and one of variables alone, which has."""
    c = m.shapes[source][-1]
    m.weight(name, "left", (c, 2))
    m.weight(name, "kernel", (2, c), kernel=True)
    m.kernels.append(f"{name}/kernel")

    def f(v: Any, x: Any) -> Any:
        return jnp.einsum("nhwc,nhwd->nhcd", x, x)[:, :, None].sum(3) @ (v["left"] @ v["kernel"])

    m.add(f, (source,), name)


OF_IMAGES = (_conv,) * 8 + (_dynamic, _rows, _pool, _pool, _head, _loop, _token, _attend)
OF_ALL = (_norm,) * 3 + (_activation,) * 5 + (_join,) * 4 + (_dense, _dense, _layer_norm, _lookup)
OF_ALL += (_stacked, _branch, _while)


def network(rng: np.random.Generator, most: int = 9) -> Network:
    """A network of up to so many layers, each behind any earlier value, mostly the last."""
    m = _Maker(rng)
    for number in range(int(rng.integers(1, most + 1))):
        last = len(m.shapes) - 1
        source = last if rng.random() < 0.75 else int(rng.integers(len(m.shapes)))
        of_images = len(m.shapes[source]) == 4 and min(m.shapes[source]) > 0
        make = m.pick(*OF_IMAGES, *OF_ALL) if of_images else m.pick(*OF_ALL)
        make(m, source, f"layer{number}")
    layers, read = m.layers, m.read

    def apply(variables: Any, x: Any) -> Any:
        values = [x]
        for f, sources, name in layers:
            values.append(f(variables.get(name, {}), *(values[s] for s in sources)))
        return [y for i, y in enumerate(values) if i not in read or i == len(values) - 1]

    return Network(apply, m.variables, m.x, m.kernels, m.native)
