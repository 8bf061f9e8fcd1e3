"""Random compositions of operations, exported to ONNX, against the traced function: batch 1 and 3, onnxruntime."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

from compressx import export

pytest.importorskip("onnx", reason="needs the extra 'export'")
ort = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")

Function = Callable[[jax.Array], jax.Array]
Shape = tuple[int, ...]  # of one input, without the batch


def _session(f: Function, shape: Any) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(export.onnx(lambda _, x: f(x), {}, shape), options, ["CPUExecutionProvider"])


def _numbers(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def _agrees(f: Function, shape: Shape, x: Any = None, atol: float = 1e-4) -> None:
    """ONNX computes what `f` computes, at two batch sizes."""
    x = _numbers(3, *shape) if x is None else x
    session = _session(f, jax.ShapeDtypeStruct(x.shape, x.dtype))
    for batch in (3, 1):
        theirs = session.run(None, {"x": np.asarray(x[:batch])})[0]
        ours = np.asarray(jax.jit(f)(x[:batch]))
        assert theirs.shape == ours.shape
        np.testing.assert_allclose(theirs, ours, rtol=1e-4, atol=atol)


# Steps of a composition. Each is drawn for the shape that comes before it, and keeps the batch as the first axis.


def _axis(draw: Any, shape: Shape, start: int = 1) -> int:
    return draw(st.integers(start, len(shape)))


def _elementwise(draw: Any, shape: Shape) -> Function:
    return draw(
        st.sampled_from(
            [
                jnp.abs,
                jnp.tanh,
                jnp.sin,
                jnp.square,
                jnp.negative,
                jnp.arctan,
                jax.nn.sigmoid,
                jax.nn.relu,
                jax.nn.elu,
                jax.nn.selu,
                jax.nn.gelu,
                jax.nn.swish,
                jax.nn.softplus,
                jax.nn.hard_swish,
                jax.nn.leaky_relu,
                lambda x: jax.nn.gelu(x, approximate=False),
                lambda x: jnp.exp(-x),
                lambda x: jnp.expm1(x),
                lambda x: jnp.log1p(jnp.abs(x)),
                lambda x: jnp.sqrt(jnp.abs(x) + 0.1),
                lambda x: lax.rsqrt(jnp.abs(x) + 0.5),
                lambda x: lax.integer_pow(x, 3),
                lambda x: jnp.power(jnp.abs(x) + 0.5, 1.5),
                lambda x: jnp.clip(x, -0.5, 0.5),
                lambda x: jnp.where(x > 0, x, 0.5 * x),
                lambda x: jnp.where(jnp.isfinite(x) & ~(x > 9), x, jnp.zeros_like(x)),
                lambda x: jnp.arctan2(x, jnp.abs(x) + 0.1),
                lambda x: x.astype(jnp.int32).astype(jnp.float32) * 0.0 + x,
            ]
        )
    )


def _constants(draw: Any, shape: Shape) -> Function:
    """Joins a constant that broadcasts, or one broadcast over the batch."""
    sizes = tuple(draw(st.sampled_from([1, n])) for n in shape)
    w = _numbers(1, *sizes, seed=draw(st.integers(0, 9)))
    way = draw(st.sampled_from(["add", "mul", "max", "select", "whole"]))

    def f(x: jax.Array) -> jax.Array:
        if way == "whole":
            return jnp.broadcast_to(jnp.tanh(w), x.shape) + jnp.sum(
                jnp.broadcast_to(w, x.shape), axis=-1, keepdims=True
            )
        if way == "select":
            return jnp.where(jnp.broadcast_to(w > 0, x.shape), x, jnp.broadcast_to(w, x.shape))
        return {"add": jnp.add, "mul": jnp.multiply, "max": jnp.maximum}[way](x, w)

    return f


def _reshape(draw: Any, shape: Shape) -> Function:
    way = draw(st.sampled_from(["flat", "rows", "unit", "transpose", "batch last"]))
    perm = draw(st.permutations(range(1, len(shape) + 1)))
    if way == "flat":
        return lambda x: x.reshape(x.shape[0], -1)
    if way == "rows":  # one axis of the batch and the next, and back
        return lambda x: (jnp.tanh(x.reshape(-1, *x.shape[2:])) * 2).reshape(x.shape)
    if way == "unit":
        return lambda x: jnp.expand_dims(x, len(shape))
    if way == "batch last":
        return lambda x: jnp.moveaxis(jnp.tanh(jnp.moveaxis(x, 0, -1)) * 2, -1, 0)
    return lambda x: jnp.transpose(x, (0, *perm))


def _cut(draw: Any, shape: Shape) -> Function:
    axis, n = (i := _axis(draw, shape)), shape[i - 1]
    low = draw(st.integers(0, n - 1))
    high = draw(st.integers(low + 1, n))
    step = draw(st.sampled_from([1, 2, -1, -2]))
    at: list[Any] = [slice(None)] * (len(shape) + 1)
    at[axis] = slice(low, high, step) if step > 0 else slice(None, None, step)
    return lambda x: x[tuple(at)]


def _index(draw: Any, shape: Shape) -> Function:
    axis, n = (i := _axis(draw, shape)), shape[i - 1]
    number = draw(st.integers(-n, n - 1))
    some = np.array(draw(st.lists(st.integers(-n, n - 1), min_size=1, max_size=4)))
    way = draw(st.sampled_from(["one", "some", "square", "each", "rows", "take", "update", "batch", "two"]))
    at = (slice(None),) * axis
    counted = lambda x: (jnp.arange(x.shape[0], dtype=jnp.int32) + number) % n
    if way == "one" and len(shape) > 1:
        return lambda x: x[(*at, number)]
    if way == "square":
        return lambda x: x[(*at, np.stack([some, some[::-1]]))]
    if way == "each":  # another entry of every input
        return lambda x: jnp.take_along_axis(x, counted(x).reshape(-1, *[1] * len(shape)), axis=axis)
    if way == "rows" and len(shape) > 1:
        return lambda x: jnp.moveaxis(x, axis, 1)[jnp.arange(x.shape[0]), counted(x)]
    if way == "take":
        return lambda x: jnp.take(x, counted(x)[:1], axis=axis)
    if way == "update":
        return lambda x: lax.dynamic_update_slice_in_dim(x, x[(*at, slice(0, 1))] * 2, counted(x)[0], axis)
    if way == "batch":
        return lambda x: x - x[:1] + x[-1:]
    if way == "two" and len(shape) > 1:
        a, b = some % shape[0], some[::-1] % shape[1]
        return lambda x: x[:, a, b]
    return lambda x: x[(*at, some)]


def _write(draw: Any, shape: Shape) -> Function:
    axis, n = (i := _axis(draw, shape)), shape[i - 1]
    some = np.unique(draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=3)))
    at = (*(slice(None),) * axis, some)
    mode = draw(st.sampled_from([None, "clip", "drop"]))
    way = draw(st.sampled_from(["set", "add", "multiply", "max", "moving"]))
    if way == "moving":  # beyond the end for some inputs
        return lambda x: (
            jnp.moveaxis(x, axis, 1).at[jnp.arange(x.shape[0]), jnp.arange(x.shape[0]) + n - 1].add(1.0, mode=mode)
        )
    return lambda x: getattr(x.at[at], way)(0.5, mode=mode)


def _join(draw: Any, shape: Shape) -> Function:
    axis = _axis(draw, shape)
    way = draw(
        st.sampled_from(["token", "twice", "stack", "split", "flip", "roll", "tile", "repeat", "pad", "unstack"])
    )
    sides = tuple(1 if i == axis else n for i, n in enumerate(shape, 1))
    token = _numbers(1, *sides, seed=3)
    entry = st.tuples(st.integers(-1, 2), st.integers(-1, 2), st.integers(0, 2))
    config = [(0, 0, 0), *(draw(entry) if n > 2 else (1, 0, 1) for n in shape)]
    functions: dict[str, Function] = {
        "token": lambda x: jnp.concatenate([jnp.broadcast_to(token, (x.shape[0], *sides)), x], axis),
        "twice": lambda x: jnp.concatenate([x, -x[:, :1], x], 1),
        "stack": lambda x: jnp.stack([x, jnp.flip(x, axis)], axis),
        "split": lambda x: sum(jnp.split(x, shape[axis - 1], axis), jnp.zeros(())),
        "flip": lambda x: jnp.flip(x, (0, axis)),
        "roll": lambda x: jnp.roll(x, 1, axis),
        "tile": lambda x: jnp.tile(x, (1, 2, *[1] * (len(shape) - 1))),
        "repeat": lambda x: jnp.repeat(x, 2, axis),
        "pad": lambda x: lax.pad(x, np.float32(0.5), config),
        "unstack": lambda x: jnp.stack(jnp.unstack(x, axis=axis)[::-1], axis),
    }
    return functions[way]


def _reduce(draw: Any, shape: Shape) -> Function:
    axes = tuple(draw(st.sets(st.integers(1, len(shape)), min_size=1)))
    keep = draw(st.booleans())
    axis = axes[0]
    way = draw(st.sampled_from(["axes", "norm", "softmax", "batch", "cumulative", "sort", "top", "any"]))
    if way == "axes":
        reduction = draw(st.sampled_from([jnp.sum, jnp.mean, jnp.max, jnp.min, jnp.prod, jax.nn.logsumexp, jnp.std]))
        return lambda x: reduction(x, axis=axes, keepdims=keep or len(axes) == len(shape))
    functions: dict[str, Function] = {
        "norm": lambda x: x * lax.rsqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True) + 1e-3),
        "softmax": lambda x: jax.nn.softmax(x, axis=axis),
        "batch": lambda x: x - jnp.mean(x, axis=0, keepdims=True),
        "cumulative": lambda x: jnp.cumsum(x, axis) + lax.cummax(x, axis=axis, reverse=True),
        "sort": lambda x: jnp.sort(x, axis=axis),
        "top": lambda x: lax.top_k(jnp.moveaxis(x, axis, -1), 1)[0],
        "any": lambda x: x * jnp.any(x > 0, axis=axes, keepdims=True) + jnp.argmax(x, axis, keepdims=True),
    }
    return functions[way]


def _product(draw: Any, shape: Shape) -> Function:
    way = draw(st.sampled_from(["dense", "general", "self", "heads", "other way"]))
    n, units = shape[-1], draw(st.integers(1, 4))
    some = draw(st.integers(1, len(shape)))
    if way == "dense":
        return lambda x: x @ _numbers(n, units) * 0.5
    if way == "general":  # the last axes, several together
        w = _numbers(*shape[-some:], 2, units, seed=2)
        return lambda x: lax.dot_general(x, w, ((range(x.ndim - some, x.ndim), range(some)), ((), ()))) * 0.3
    if way == "other way":
        w = _numbers(units, *shape[:some], seed=2)
        return lambda x: jnp.moveaxis(lax.dot_general(w, x, ((range(1, some + 1), range(1, some + 1)), ((), ()))), 1, 0)
    if len(shape) > 1 and way == "heads":
        return lambda x: jnp.einsum("b...hd,b...kd->b...hk", x, jnp.tanh(x)) * 0.3
    return lambda x: jnp.einsum("bi,bj->bij", x.reshape(x.shape[0], -1), x.reshape(x.shape[0], -1)[:, :2])


def _convolve(draw: Any, shape: Shape) -> Function:
    spatial, n = len(shape) - 1, shape[-1]
    groups = draw(st.sampled_from([1, n]))
    small = lambda least: draw(st.tuples(*[st.integers(least, 2)] * spatial))
    kernel, strides, inner, outer = small(1), small(1), small(1), small(1)
    padding = [draw(st.tuples(st.integers(-1, 2), st.integers(1, 3))) for _ in range(spatial)]
    w = _numbers(*kernel, n // groups, 2 * groups, seed=4) * 0.3
    letters = "DHW"[-spatial:]
    return lambda x: lax.conv_general_dilated(
        x, w, strides, padding, inner, outer, (f"N{letters}C", f"{letters}IO", f"N{letters}C"), groups
    )


def _pool(draw: Any, shape: Shape) -> Function:
    along = draw(st.sets(st.integers(1, len(shape)), max_size=3))
    pick = lambda most: [draw(st.integers(1, most)) if i in along else 1 for i in range(len(shape) + 1)]
    window, strides, base, spread = pick(3), pick(2), pick(2), pick(2)
    pads = [(draw(st.integers(0, 3)), draw(st.integers(2, 4))) if i in along else (0, 0) for i in range(len(shape) + 1)]
    start, op = draw(st.sampled_from([(0.0, lax.add), (-np.inf, lax.max), (np.inf, lax.min)]))
    return lambda x: lax.reduce_window(x, np.float32(start), op, window, strides, pads, base, spread)


def _loop(draw: Any, shape: Shape) -> Function:
    axis, way = _axis(draw, shape), draw(st.sampled_from(["scan", "while", "cond", "fori", "switch", "map"]))
    back = draw(st.booleans())
    w = _numbers(shape[-1], seed=5)

    def scan(x: jax.Array) -> jax.Array:
        rows = jnp.moveaxis(x, axis, 0)
        step = lambda c, row: ((d := jnp.tanh(c + row)), d * jnp.ones_like(row))
        last, all_of_it = lax.scan(step, jnp.zeros_like(rows[0]), rows, reverse=back)
        return jnp.moveaxis(all_of_it + last[None], 0, axis)

    functions: dict[str, Function] = {
        "scan": scan,
        "while": lambda x: lax.while_loop(lambda c: jnp.sum(jnp.abs(c)) > 1, lambda c: c * 0.3 * jnp.tanh(w), x),
        "cond": lambda x: lax.cond(jnp.sum(x) > 0, lambda a: a * 2, lambda a: a + w, x),
        "fori": lambda x: lax.fori_loop(0, 3, lambda i, c: c * 0.5 + w * i, x),
        "switch": lambda x: lax.switch(jnp.sum(x > 0), [lambda a: a, lambda a: -a, lambda a: a * 2], x),
        "map": lambda x: lax.map(lambda row: jnp.tanh(row) * 2, x),
    }
    return functions[way]


STEPS = (_elementwise, _constants, _reshape, _cut, _index, _write, _join, _reduce, _product, _convolve, _pool, _loop)


@st.composite
def compositions(draw: Any) -> tuple[Shape, list[str], Function]:
    """A shape, the names of the steps, and a function that applies them, held to moderate numbers after each."""
    start = shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
    steps, names = [], []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(STEPS))
        if kind is _convolve and not 2 <= len(shape) <= 4:
            kind = _product
        if len(shape) > 4 and kind in (_reshape, _join, _product):
            kind = _reduce
        step = kind(draw, shape)
        like = jax.ShapeDtypeStruct((7, *shape), jnp.float32)
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            after = jax.eval_shape(step, like).shape
        if not 0 < np.prod(after) < 30000 or after[0] != 7 or len(after) < 2:
            continue
        steps.append(step)
        names.append(kind.__name__)
        shape = after[1:]

    def f(x: jax.Array) -> jax.Array:
        with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
            for step in steps:
                x = jnp.clip(step(x).astype(jnp.float32), -3, 3)
        return x

    return start, names, f


@given(compositions())
def test_compositions(drawn: tuple[Shape, list[str], Function]) -> None:
    shape, _, f = drawn
    _agrees(f, shape, atol=1e-3)


@pytest.mark.parametrize("pad", [2, 3, 5])
@pytest.mark.parametrize(("op", "start"), [(lax.max, -np.inf), (lax.min, np.inf), (lax.add, 0.0)])
def test_a_dilated_window_may_be_padded_by_more_than_it_holds(op: Any, start: float, pad: int) -> None:
    """onnxruntime refuses a pad of as many values as the window has, however far apart they lie."""

    def f(x: jax.Array) -> jax.Array:
        padding = ((0, 0), (pad, pad), (0, 0))
        y = lax.reduce_window(x, np.float32(start), op, (1, 3, 1), (1, 1, 1), padding, None, (1, 2, 1))
        return jnp.clip(y, -9, 9)  # a window of padding alone has no largest value

    _agrees(f, (9, 2))
