"""Random networks for compaction: layers that make channels, and operations between that move, mix and repeat them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressx.compaction import Group
from compressx.tree import paths

Image = jax.Array
Numbers = np.random.Generator


class Network(NamedTuple):
    """A network and what is known of it.

    Attributes:
      apply: `apply(variables, x)`.
      variables: leaves by name.
      shape: of an input, without the batch.
      names: of its operations, in order.
    """

    apply: Callable[[Any, Any], Any]
    variables: dict[str, Image]
    shape: tuple[int, ...]
    names: tuple[str, ...]


def _channels(y: Image) -> int:
    return y.shape[-1]


def _along(numbers: Any, y: Image) -> Image:
    """Numbers by channel, as wide as y."""
    return jnp.expand_dims(numbers, tuple(range(y.ndim - 1)))


def _ids(y: Image, k: int) -> np.ndarray:
    """Channels in an order of their own, some twice, some missing."""
    return np.random.default_rng(_channels(y)).integers(0, _channels(y), k)


def _rolled(y: Image, shape: tuple[int, ...]) -> Image:
    return jnp.roll(y.reshape(shape), 1, 0).reshape(y.shape)


def _shuffled(y: Image) -> Image:
    c = _channels(y)
    groups = next(g for g in (2, 3, 1) if c % g == 0)
    return jnp.swapaxes(y.reshape(*y.shape[:-1], groups, c // groups), -1, -2).reshape(y.shape)


# Channels pass, in place or to other positions, and one that is zero stays zero: it can always go.
KEEPS: dict[str, Callable[[Image], Image]] = {
    "relu": jax.nn.relu,
    "negative": lambda y: -2.0 * y,
    "where": lambda y: jnp.where(y > 0, y, 0.5 * y),
    "stack first": lambda y: jnp.stack([y, 2 * y]).sum(0),
    "stack middle": lambda y: jnp.stack([y, jnp.tanh(y), -y], 1).max(1),
    "stack last": lambda y: jnp.stack([y, 2 * y], -1).reshape(*y.shape[:-1], -1),
    "stack and take apart": lambda y: sum(jnp.unstack(jnp.stack([y, 2 * y], 2), axis=2)),
    "tile": lambda y: jnp.tile(y, 2),
    "tile rows": lambda y: jnp.tile(y, (1, 2, *(1,) * (y.ndim - 2))),
    "tile before": lambda y: jnp.tile(y, (2, *(1,) * y.ndim)).mean(0),
    "repeat": lambda y: jnp.repeat(y, 2, -1),
    "repeat rows": lambda y: jnp.repeat(y, 2, 1),
    "concatenate": lambda y: jnp.concatenate([y, 3 * y], -1),
    "concatenate rows": lambda y: jnp.concatenate([y, 3 * y], 1),
    "roll": lambda y: jnp.roll(y, 1, -1),
    "roll rows": lambda y: jnp.roll(y, 1, 1),
    "broadcast": lambda y: jnp.broadcast_to(y[None], (3, *y.shape)).sum(0),
    "expand and squeeze": lambda y: jnp.squeeze(jnp.expand_dims(y, (0, 2)), (0, 2)),
    "flip": lambda y: jnp.flip(y, -1),
    "flip rows": lambda y: jnp.flip(y, 1),
    "take": lambda y: jnp.take(y, _ids(y, 5), -1),
    "pick": lambda y: y[..., _ids(y, 3)],
    "take rows": lambda y: jnp.take(y, np.array([1, 0, 1]), 1),
    "every second": lambda y: jnp.concatenate([y[..., ::2], y[..., 1::2]], -1),
    "reversed": lambda y: y[..., ::-1],
    "all but one": lambda y: y[..., 1:] if _channels(y) > 2 else y,
    "cumsum": lambda y: jnp.cumsum(y, 1),
    "pad rows": lambda y: jnp.pad(y, ((0, 0), (1, 1), *((0, 0),) * (y.ndim - 2))),
    "pad channels": lambda y: jnp.pad(y, (*((0, 0),) * (y.ndim - 1), (1, 2))),
    "reflect rows": lambda y: jnp.pad(y, ((0, 0), (1, 1), *((0, 0),) * (y.ndim - 2)), mode="reflect"),
    "edge rows": lambda y: jnp.pad(y, ((0, 0), (1, 0), *((0, 0),) * (y.ndim - 2)), mode="edge"),
    "wrap rows": lambda y: jnp.pad(y, ((0, 0), (1, 0), *((0, 0),) * (y.ndim - 2)), mode="wrap"),
    "sort rows": lambda y: jnp.sort(y, 1),
    "largest rows": lambda y: jnp.moveaxis(lax.top_k(jnp.moveaxis(y, 1, -1), 2)[0], -1, 1),
    "transpose": lambda y: jnp.tanh(jnp.moveaxis(y, -1, 0)).transpose(*range(1, y.ndim), 0),
    "split": lambda y: jnp.concatenate(jnp.split(y, [1], -1)[::-1], -1),
    "dynamic slice": lambda y: lax.dynamic_slice_in_dim(y, 1, _channels(y) - 1, y.ndim - 1) if _channels(y) > 2 else y,
    "write a row": lambda y: lax.dynamic_update_slice_in_dim(y, 2 * y[:, :1], 1, 1),
    "barrier": lambda y: sum(lax.optimization_barrier((y, 2 * y))),
    "gate": lambda y: y * jax.nn.sigmoid(y),
    "constant by channel": lambda y: y * _along(jnp.cos(jnp.arange(0.0, _channels(y))), y),
    "constant tiled": lambda y: y * _along(jnp.tile(jnp.arange(1.0, 3.0), _channels(y))[: _channels(y)], y),
    "positions": lambda y: y * jnp.expand_dims(jnp.arange(1.0, y.shape[1] + 1.0), (0, *range(2, y.ndim))),
    "mask": lambda y: jnp.where(jnp.expand_dims(jnp.arange(y.shape[1]) > 0, (0, *range(2, y.ndim))), y, 0.0),
    "clamp": lambda y: lax.clamp(-1.0, y, 1.0),
    "resize": lambda y: jax.image.resize(y, (y.shape[0], 2 * y.shape[1], *y.shape[2:]), "bilinear"),
    "nearest": lambda y: jax.image.resize(y, (y.shape[0], 3, *y.shape[2:]), "nearest"),
    "mean of rows": lambda y: jnp.broadcast_to(y.mean(1, keepdims=True), y.shape) + y,
    "largest pools": lambda y: lax.reduce_window(
        y, -jnp.inf, lax.max, (1, 2, *(1,) * (y.ndim - 2)), (1,) * y.ndim, "SAME"
    ),
    "scan": lambda y: lax.fori_loop(0, 2, lambda i, s: 0.5 * s, y),
    "sum pools": lambda y: lax.reduce_window(y, 0.0, lax.add, (1, 2, *(1,) * (y.ndim - 2)), (1,) * y.ndim, "SAME"),
}
# Channels are mixed, shifted or counted: the network must stay the same, whatever can go.
MIXES: dict[str, Callable[[Image], Image]] = {
    "shift": lambda y: y + 1.0,
    "cosine": jnp.cos,
    "softmax": lambda y: jax.nn.softmax(y, -1),
    "normalise": lambda y: (y - y.mean(-1, keepdims=True)) / (1 + y.std(-1, keepdims=True)),
    "cumsum of channels": lambda y: jnp.cumsum(y, -1),
    "sort channels": lambda y: jnp.sort(y, -1),
    "largest channels": lambda y: lax.top_k(y, min(2, _channels(y)))[0],
    "argmax": lambda y: jax.nn.one_hot(jnp.argmax(y, -1), 4) + y.sum(-1, keepdims=True),
    "along": lambda y: jnp.take_along_axis(y, jnp.argsort(y, -1), -1),
    "shuffle": _shuffled,
    "roll all": lambda y: jnp.roll(y, 3),
    "fold rows": lambda y: _rolled(y, (y.shape[0] * y.shape[1], *y.shape[2:])),
    "reshape": lambda y: y.reshape(y.shape[0], -1)[:, :, None] * jnp.ones((1, 1, 2)),
    "set": lambda y: y.at[..., 0].set(1.0),
    "add at": lambda y: y.at[:, np.array([0, 1])].add(1.0),
    "reflect channels": lambda y: jnp.pad(y, (*((0, 0),) * (y.ndim - 1), (1, 0)), mode="edge"),
    "pad with ones": lambda y: jnp.pad(y, (*((0, 0),) * (y.ndim - 1), (1, 1)), constant_values=1.0),
    "row by input": lambda y: lax.dynamic_slice_in_dim(y, jnp.argmax(y.sum((0, *range(2, y.ndim)))), 1, 1) + y,
    "pick by input": lambda y: lax.dynamic_slice_in_dim(y, jnp.int32(y.sum() > 0), 1, y.ndim - 1) + y,
    "outer": lambda y: jnp.einsum("...i,...j->...ij", y, y[..., :2]).reshape(*y.shape[:-1], -1),
    "with itself": lambda y: jnp.einsum("nr...c,ns...c->nrs", y, y),
    "sum of channels": lambda y: y + y.sum(-1, keepdims=True),
    "channels before": lambda y: jnp.moveaxis(jnp.cumsum(jnp.moveaxis(y, -1, 1), 1), 1, -1),
    "constant beside": lambda y: jnp.concatenate([y, jnp.ones((*y.shape[:-1], 2))], -1),
    "constant below": lambda y: jnp.concatenate([y, jnp.zeros_like(y) + _along(jnp.arange(0.0, _channels(y)), y)], 1),
    "noise": lambda y: y + jax.random.normal(jax.random.key(1), y.shape[1:])[None],
    "ones": lambda y: y + jnp.ones((1,) * y.ndim),
    "triangle": lambda y: (
        y
        * jnp.tril(jnp.ones((y.shape[1], _channels(y))))[None].reshape(
            1, y.shape[1], *(1,) * (y.ndim - 3), _channels(y)
        )
    ),
    "unstack channels": lambda y: sum(jnp.unstack(y, axis=-1))[..., None] + y,
    "mean of the batch": lambda y: y - y.mean(0, keepdims=True),
    "select": lambda y: jnp.select([y > 1, y < -1], [y, 2 * y], 0.1 * y),
}
# No rule says what these do to channels: they are refused by name.
REFUSED: dict[str, Callable[[Image], Image]] = {
    "while": lambda y: lax.while_loop(lambda s: s.max() > 1, lambda s: 0.5 * s, y),
    "cond": lambda y: lax.cond(y.sum() > 0, lambda s: s, lambda s: 2 * s, y),
    "fft": lambda y: jnp.fft.rfft(y).real,
}


class _Maker:
    def __init__(self, rng: Numbers, kinds: dict[str, Callable[[Image], Image]]):
        self.rng, self.kinds = rng, list(kinds)
        self.operations = kinds
        self.variables: dict[str, Image] = {}

    def leaf(self, name: str, *shape: int) -> str:
        scale = max(1, int(np.prod(shape[:-1]))) ** 0.5
        self.variables[name] = jnp.asarray(self.rng.standard_normal(shape) / scale, jnp.float32)
        return name


def network(rng: Numbers, operations: dict[str, Callable[[Image], Image]], most: int = 4) -> Network:
    """A few layers with operations between, and a head over rows; sometimes a second branch and another output."""
    m = _Maker(rng, operations)
    images = bool(rng.random() < 0.6)
    shape = tuple(int(n) for n in ((5, 4, 2) if images else (6, 3)))
    tokens = not images and rng.random() < 0.3
    steps: list[tuple[str, Callable[[Any, list[Image]], Image]]] = []
    spec = [jax.ShapeDtypeStruct((2, *(shape[:1] if tokens else shape)), jnp.int32 if tokens else jnp.float32)]

    def push(name: str, f: Callable[[Any, list[Image]], Image]) -> bool:
        leaves = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in m.variables.items()}
        out = jax.eval_shape(f, leaves, spec)
        if min(out.shape) < 1 or np.prod(out.shape) > 3000 or out.ndim < 3:
            return False
        steps.append((name, f))
        spec.append(out)
        return True

    if tokens:
        table, position = m.leaf("embedding", 7, 6), m.leaf("position", shape[0], 6)
        tiled = bool(rng.random() < 0.5)

        def embed(v: Any, s: list[Image]) -> Image:
            n, length = s[0].shape
            at = (
                jnp.tile(jnp.arange(length), (n, 1))
                if tiled
                else jnp.broadcast_to(jnp.arange(length)[None], (n, length))
            )
            return v[table][s[0]] + v[position][at]

        push("embedding", embed)
    for number in range(int(rng.integers(1, 3))):
        _layer(m, push, spec, number)
        for _ in range(int(rng.integers(0, most))):
            name = str(rng.choice(m.kinds))
            f = operations[name]
            last = len(spec) - 1
            push(name, lambda v, s, f=f, at=last: f(s[at]))
        if rng.random() < 0.3:
            same = [i for i, s in enumerate(spec[1:], 1) if s.shape == spec[-1].shape and s.dtype == jnp.float32]
            other, last = int(rng.choice(same)), len(spec) - 1
            push("join", lambda v, s, a=last, b=other: s[a] + s[b])
    c = spec[-1].shape[-1]
    head, last = m.leaf("head", c, 3), len(spec) - 1
    names = tuple(name for name, _ in steps)
    way = int(rng.integers(3))
    if way == 1:
        m.leaf("head", int(np.prod(spec[-1].shape[1:])), 3)

    def apply(v: Any, x: Any) -> Any:
        values = [x]
        for _, f in steps:
            values.append(f(v, values))
        y = values[last]
        if way == 0:
            return y.mean(tuple(range(1, y.ndim - 1))) @ v[head]
        if way == 1:
            return y.reshape(y.shape[0], v[head].shape[0]) @ v[head]
        return {"last": y @ v[head], "mean": y.mean()}

    return Network(apply, m.variables, spec[0].shape[1:], ("tokens",) * tokens + names)


def _layer(m: _Maker, push: Callable[..., bool], spec: list[Any], number: int) -> None:
    """A convolution or product, with or without a bias and a normalisation."""
    last, rng = len(spec) - 1, m.rng
    c, ndim = spec[-1].shape[-1], len(spec[-1].shape)
    cout = int(rng.integers(2, 6))
    kind = str(rng.choice(["conv", "dense", "depthwise", "transposed"])) if ndim == 4 else "dense"
    bias = m.leaf(f"{number}/bias", c if kind == "depthwise" else cout) if rng.random() < 0.7 else None
    if kind == "dense":
        w = m.leaf(f"{number}/kernel", c, cout)
        product = lambda v, y: y @ v[w]
    elif kind == "transposed":
        w = m.leaf(f"{number}/kernel", cout, c)
        product = lambda v, y: jnp.einsum("nhwc,dc->nhwd", y, v[w])
    else:
        groups = c if kind == "depthwise" else 1
        size = (min(2, spec[-1].shape[1]), min(3, spec[-1].shape[2]))
        w = m.leaf(f"{number}/kernel", *size, c // groups, c if kind == "depthwise" else cout)
        padding = str(rng.choice(["SAME", "VALID"]))
        numbers = ("NHWC", "HWIO", "NHWC")
        product = lambda v, y: lax.conv_general_dilated(
            y, v[w], (1, 1), padding, dimension_numbers=numbers, feature_group_count=groups
        )
    if bias is None:
        push(kind, lambda v, s: product(v, s[last]))
    else:
        push(kind, lambda v, s: (y := product(v, s[last])) + _along(v[bias], y))


def emptied(variables: Any, found: tuple[Group, ...], rng: Numbers) -> tuple[Any, list[np.ndarray]]:
    """Variables with about half the units of every group zero, in what makes and shifts them; and the units."""
    leaves, names = [np.array(x) for x in jax.tree.leaves(variables)], paths(variables)
    removed = []
    for group in found:
        gone = rng.permutation(group.size)[: group.size // 2]
        removed.append(gone)
        for slot in group.slots:
            if slot.role != "in":
                np.moveaxis(leaves[names.index(slot.path)], slot.axis, 0)[np.isin(slot.units, gone)] = 0
    return jax.tree.unflatten(jax.tree.structure(variables), [jnp.asarray(x) for x in leaves]), removed


def thinned(variables: Any, rng: Numbers) -> Any:
    """Variables with some indices of random axes zero: filters, inputs, shifts, whatever they are."""
    out = {}
    for name, leaf in variables.items():
        array = np.array(leaf)
        for axis in range(array.ndim):
            if rng.random() < 0.5:
                np.moveaxis(array, axis, 0)[rng.random(array.shape[axis]) < 0.5] = 0
        out[name] = jnp.asarray(array)
    return out
