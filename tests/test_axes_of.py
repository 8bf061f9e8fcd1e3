"""Axes read off the traced program: layers of four libraries, loops, lookups, and compositions drawn at random."""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax import lax

import compressx as cx


def _ones(*shape: int) -> Any:
    return jnp.ones(shape)


def _linen(module: nn.Module, *shape: int) -> dict[str, str]:
    x = _ones(*shape)
    return cx.axes_of(module, module.init(jax.random.key(0), x), x)


def test_layers_of_linen() -> None:
    assert _linen(nn.Dense(4), 2, 8) == {"params/kernel": "in out"}
    assert _linen(nn.Conv(4, (3, 3)), 2, 8, 8, 3) == {"params/kernel": "taps taps in out"}
    assert _linen(nn.Conv(4, (3,)), 2, 8, 3) == {"params/kernel": "taps in out"}
    assert _linen(nn.Conv(6, (3, 3), feature_group_count=3), 2, 8, 8, 3) == {"params/kernel": "taps taps in out"}
    assert _linen(nn.ConvTranspose(4, (3, 3)), 2, 8, 8, 3) == {"params/kernel": "taps taps in out"}
    assert _linen(nn.ConvTranspose(4, (3, 3), transpose_kernel=True), 2, 8, 8, 3) == {
        "params/kernel": "taps taps out in"
    }
    assert _linen(nn.DenseGeneral((2, 4)), 2, 8) == {"params/kernel": "in out out"}
    assert _linen(nn.DenseGeneral(4, axis=(-2, -1)), 2, 3, 8) == {"params/kernel": "in in out"}
    attention = _linen(nn.MultiHeadDotProductAttention(num_heads=2), 1, 5, 8)
    heads = {f"params/{name}/kernel": "in out out" for name in ("query", "key", "value")}
    assert attention == heads | {"params/out/kernel": "in in out"}


def test_shape_alone_decides_nothing() -> None:
    """A `DenseGeneral` kernel and dense layers under `nn.scan`, both [4, 4, 4]."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return jnp.tanh(nn.Dense(4)(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
            return stack(name="layers")(x, None)[0]

    assert _linen(Deep(), 2, 4) == {"params/layers/Dense_0/kernel": "stack in out"}
    assert _linen(nn.DenseGeneral((4, 4)), 2, 4) == {"params/kernel": "in out out"}


def test_modules_of_nnx_and_equinox() -> None:
    mha = nnx.MultiHeadAttention(num_heads=2, in_features=8, decode=False, rngs=nnx.Rngs(0))
    said = cx.axes_of(mha, nnx.state(mha, nnx.Param), _ones(1, 5, 8))
    assert said["query/kernel"] == "in out out" and said["out/kernel"] == "in in out"
    key = jax.random.key(0)
    net = eqx.nn.MLP(4, 3, 8, 1, key=key)
    assert set(cx.axes_of(lambda m, x: jax.vmap(m)(x), net, _ones(2, 4)).values()) == {"out in"}
    conv = eqx.nn.Conv2d(3, 4, 3, key=key)
    assert cx.axes_of(lambda m, x: jax.vmap(m)(x), conv, _ones(2, 3, 8, 8)) == {"weight": "out in taps taps"}


def test_other_uses_of_a_weight() -> None:
    ids = jnp.zeros((2, 5), jnp.int32)
    table = {"table": _ones(7, 4)}
    assert cx.axes_of(lambda w, i: w["table"][i], table, ids) == {"table": "in out"}
    tied = lambda w, i: w["table"][i] @ w["table"].T
    assert cx.axes_of(tied, table, ids) == {}, "two uses that differ"
    lora = {"w": _ones(4, 6), "a": _ones(4, 2), "b": _ones(2, 6)}
    every = dict.fromkeys(lora, "in out")
    assert cx.axes_of(lambda w, x: x @ w["w"] + x @ w["a"] @ w["b"], lora, _ones(3, 4)) == every
    assert cx.axes_of(lambda w, x: x @ (w["w"] + w["a"] @ w["b"] * 0.5), lora, _ones(3, 4)) == every
    fused = {"qkv": _ones(4, 3 * 2 * 4), "o": _ones(8, 4)}

    def attend(w: Any, x: Any) -> Any:
        q, k, v = jnp.split((x @ w["qkv"]).reshape(*x.shape[:2], 6, 4), 3, axis=2)
        mixed = jnp.einsum("bqhd,bkhd->bhqk", q, k) @ jnp.moveaxis(v, 1, 2)
        return jnp.moveaxis(mixed, 1, 2).reshape(*x.shape[:2], -1) @ w["o"]

    assert cx.axes_of(attend, fused, _ones(1, 5, 4)) == dict.fromkeys(fused, "in out")
    experts = {"w": _ones(3, 4, 6)}
    assert cx.axes_of(lambda w, x: jnp.einsum("etd,edf->etf", x, w["w"]), experts, _ones(3, 2, 4)) == {
        "w": "stack in out"
    }
    ragged = lambda w, x: lax.ragged_dot(x, w["w"], jnp.array([1, 1, 0]))
    assert cx.axes_of(ragged, experts, _ones(2, 4)) == {"w": "stack in out"}
    one_by_one = {"w": _ones(3, 4, 4)}

    def unrolled(w: Any, x: Any) -> Any:
        for i in range(3):
            x = jnp.tanh(x @ w["w"][i])
        return x

    assert cx.axes_of(unrolled, one_by_one, _ones(2, 4)) == {"w": "stack in out"}
    fori = lambda w, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ w["w"][i]), x)
    assert cx.axes_of(fori, one_by_one, _ones(2, 4)) == {"w": "stack in out"}
    by_number = lambda w, i: jnp.einsum("ti,tio->to", jnp.ones((2, 4)), w["w"][i])
    assert cx.axes_of(by_number, experts, ids[:, 0]) == {}, "rows of a table, or experts"
    transposed = {"w": _ones(3, 6, 4)}  # OI, a stack of them
    assert cx.axes_of(lambda w, x: jax.vmap(jnp.matmul)(w["w"], x), transposed, _ones(3, 4)) == {"w": "stack out in"}


@st.composite
def layouts(draw: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Words in any order, and extents that may be equal, so that only the program tells them apart."""
    words = draw(st.lists(st.sampled_from(["stack", "in", "out"]), min_size=2, max_size=5))
    words = draw(st.permutations([*words, "in", "out"]))
    return tuple(words), tuple(draw(st.sampled_from([2, 3])) for _ in words)


@given(layouts(), st.booleans(), st.booleans())
def test_any_layout_of_a_product(drawn: Any, moved: bool, joined: bool) -> None:
    """An einsum over a leaf in any order of axes, after transpositions and joined axes, and the axes said back."""
    words, shape = drawn
    letters = "abcdefghij"[: len(words)]
    of = lambda word: "".join(c for c, w in zip(letters, words, strict=True) if w == word)
    size = dict(zip(letters, shape, strict=True))

    def network(w: Any, x: Any) -> Any:
        order = np.argsort(words) if moved else np.arange(len(words))
        w, names = w.transpose(order) * 0.5, "".join(letters[i] for i in order)
        if joined and moved:  # axes of one word lie side by side: one product over [stack, in, out]
            w = w.reshape([np.prod([size[c] for c in of(k)], dtype=int) for k in ("in", "out", "stack")])
            return jnp.einsum("iov,nvi->nvo", w, x.reshape(2, w.shape[2], w.shape[0]))
        return jnp.einsum(f"{names},z{of('stack')}{of('in')}->z{of('stack')}{of('out')}", w, x)

    x = _ones(2, *(size[c] for c in of("stack") + of("in")))
    assert cx.axes_of(network, _ones(*shape), x) == {"": " ".join(words)}


def test_rules_say_the_axes_that_were_found() -> None:
    m, x = nn.MultiHeadDotProductAttention(num_heads=2), _ones(1, 5, 8)
    v = m.init(jax.random.key(0), x)
    found = cx.axes_of(m, v, x)
    rules = cx.with_axes([(".*/out/kernel", cx.filters(0.5), "in in out"), (".*/kernel", cx.filters(0.5))], v, found)
    assert {pattern.replace("\\", ""): axes for pattern, _, axes in rules} == {
        ".*/out/kernel": "in in out",
        ".*/kernel": "in out out",
    }
    mixed = cx.with_axes([(".*/kernel", cx.filters(0.5)), (".*", None)], v, found)
    assert [r[2] for r in mixed] == ["in out out", "in in out", None]
    small = cx.harden(v, mixed, fresh=True)
    kept = (np.asarray(small.params["params"]["query"]["kernel"]) != 0).any(0)
    assert kept.sum() == 4 and len(cx.resolve(mixed, v)) == 4
    with pytest.raises(ValueError, match="the tree has no such leaf"):
        cx.with_axes(mixed, v, {"params/quern/kernel": "in out out"})
    joint = [(".*/kernel", cx.unstructured(0.5, scope="rule"))]
    with pytest.raises(ValueError, match="whose axes differ"):
        cx.with_axes(joint, v, found)
