"""Asymmetric levels: nearest to the weights, as good as a search over all scales and zero points, exact, and kept."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import compressx as cx
from compressx.formats.quantized import read_levels

KINDS = {"normal": lambda x: x, "skew": lambda x: np.exp(x) - 0.7, "positive": np.abs}


def drawn(kind: str, shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(KINDS[kind](np.random.default_rng(seed).standard_normal(shape)).astype(dtype))


def levels_at(structure: Any, bits: int, zero_level: bool = False) -> np.ndarray:
    """Every level in float64, from the definition."""
    s, low = np.asarray(structure, np.float64)
    q = low + np.arange(2**bits)
    return s * (q if zero_level else q[q != 0])


@pytest.mark.parametrize("zero_level", [False, True])
def test_every_weight_goes_to_its_nearest_level(zero_level: bool) -> None:
    c = cx.quantize(3, symmetric=False, zero_level=zero_level)
    w = drawn("skew", (7, 30)).at[0].set(0)
    s = c.init(w)
    z, levels = np.asarray(c.project(w, s), np.float64), levels_at(s, 3, zero_level)
    for v, got in zip(np.asarray(w, np.float64).ravel(), z.ravel(), strict=True):
        if v == 0:
            assert got == 0
        else:
            assert got in levels
            assert abs(got - v) <= np.min(np.abs(levels - v)) * (1 + 1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_scale_and_zero_point_are_as_good_as_a_search_over_both(bits: int, kind: str) -> None:
    c, symmetric = cx.quantize(bits, symmetric=False), cx.quantize(bits)
    w = drawn(kind, (6, 9), seed=3)
    x = np.asarray(w, np.float64).reshape(-1, 1)
    best = min(
        float(np.sum(np.min(np.abs(x - levels_at((s, low), bits)), 1) ** 2))
        for low in range(2 - 2**bits, 0)
        for s in np.geomspace(0.02, 4, 400)
    )
    found, other = (float(jnp.sum(jnp.square(each.project(w, each.init(w)) - w))) for each in (c, symmetric))
    assert found <= best * 1.01
    assert found < 0.9 * other  # one level more, and few of them on a side with few weights


@pytest.mark.parametrize(
    ("per", "dtype"), [("tensor", np.float32), ("channel", ml_dtypes.bfloat16), ("row", np.float32), (3, np.float32)]
)
def test_levels_are_kept_to_the_bit(per: str | int, dtype: Any) -> None:
    c = cx.quantize(4, per=per, symmetric=False)
    w = drawn("skew", (9, 4), dtype=dtype).at[2].set(0)
    s = c.init(w)
    z = c.project(w, s)
    assert z.dtype == w.dtype
    np.testing.assert_array_equal(c.project(z, s), z)
    np.testing.assert_array_equal(np.sign(np.asarray(z, np.float32)), np.sign(np.asarray(w, np.float32)))
    active = c.freeze(z, s)
    moved = c.retract((z * 1.3).astype(dtype), active)
    np.testing.assert_array_equal(c.retract(moved, active), moved)
    again = c.moved((z * 1.3).astype(dtype), active)
    np.testing.assert_array_equal(c.project(moved, again), moved)  # the scale has moved, the zero point has not
    np.testing.assert_array_equal(again[1], s[1])
    np.testing.assert_array_equal(c.project(z, c.init(z)), z)  # weights on levels give levels back that hold them


def test_rows_and_groups_are_sets_of_their_own() -> None:
    w = drawn("skew", (9, 4)) * jnp.exp(drawn("normal", (9, 4), 1))
    alone = cx.quantize(4, per="channel", symmetric=False)
    for per in ("row", 3):
        c = cx.quantize(4, per=per, symmetric=False)
        z = c.project(w, c.init(w))
        parts = [(w.T, z.T)] if per == "row" else [(w[i : i + 3], z[i : i + 3]) for i in (0, 3, 6)]
        for part, got in parts:
            np.testing.assert_array_equal(got, alone.project(part, alone.init(part)))


def test_the_way_through_training_a_file_and_back(tmp_path: Path) -> None:
    """ADMM with refreshed levels, hardening, retraining, a file whose zero points are its own, a compiled network."""
    target = {"w": drawn("skew", (16, 6))}
    rules = [("w", cx.quantize(4, per="channel", symmetric=False))]
    tx = optax.chain(cx.admm(rules, rho=0.5, every=5), optax.sgd(0.1))
    params = jax.tree.map(jnp.zeros_like, target)  # a scale of the start would be of no use
    state = tx.init(params)
    step = jax.jit(lambda p, s: tx.update(jax.tree.map(jnp.subtract, p, target), s, p))
    for _ in range(60):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    hard = cx.harden(params, rules, state)
    c = rules[0][1]
    alone = c.project(target["w"], c.init(target["w"]))
    lost, least = (float(jnp.mean(jnp.square(w - target["w"]))) for w in (hard.params["w"], alone))
    assert lost < 1.3 * least
    sizes = cx.save_model(tmp_path / "m", hard, rules, layout=[("w", "quantized")])
    assert sizes.packed == 16 * 6 // 2 + 6 * 8  # 4 bits a code; scale and smallest code a channel
    saved = cx.load_model(tmp_path / "m")
    np.testing.assert_array_equal(saved.params["w"], hard.params["w"])
    np.testing.assert_array_equal(read_levels(saved.packed["w"])[1], hard.structures["w"][0])
    cx.check(saved, saved.rules)
    x = drawn("normal", (3, 16), 5)
    run = cx.compile(lambda v, x: x @ v["w"], saved)
    np.testing.assert_allclose(run(x), x @ hard.params["w"], rtol=1e-5, atol=1e-5)


def test_every_format_of_levels_gives_the_weights_back() -> None:
    c = cx.quantize(4, per=3, symmetric=False)
    w = drawn("skew", (9, 4)).at[3].set(0)
    s = c.init(w)
    z = np.asarray(c.project(w, s))
    for name in ("quantized", "cells", "bit-planes", "bit-planes-complement", "csr-coded", "compact-coded"):
        for structure in (s, None):  # without a structure it is fitted again
            np.testing.assert_array_equal(cx.formats.unpack(cx.formats.pack(z, c, structure, name)), z)


def test_a_file_with_an_impossible_zero_point_is_refused() -> None:
    w = np.asarray([[1.0, -1.0, 3.0, 5.0]], np.float32)
    packed = cx.formats.pack(w, cx.quantize(3, symmetric=False), jnp.asarray([1.0, -2.0]), "quantized")
    np.testing.assert_array_equal(cx.formats.unpack(packed), w)
    for low in (0.0, -7.0, -1.5, np.nan):
        bad = packed._replace(arrays={**packed.arrays, "levels": np.asarray([1.0, low], np.float32)})
        with pytest.raises(cx.formats.CompressedFileError, match="quantized/levels"):
            cx.formats.unpack(bad)
    with pytest.raises(ValueError, match="one magnitude for both signs"):
        cx.unify((1, 2), 0.5) & cx.quantize(4, symmetric=False)
