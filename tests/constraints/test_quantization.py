"""Quantization against brute force over all levels, its invariants to the bit, and the straight-through activations."""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import compressx as cx
from compressx._harden import check, structures
from compressx._retrain import find_state
from compressx.constraints.activations import activation_codes, quantize_activations
from compressx.constraints.levels import Levels, decode, encode, levels_of
from compressx.constraints.quantization import fit
from tests.thinning import some

CASES = [("uniform", 2), ("uniform", 4), ("uniform", 8), ("power_of_two", 4), ("cells", 4), ("codebook", 3)]
CASES += [("float8_e4m3", 8), ("float8_e5m2", 8)]
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
WIDE = [("uniform", 4), ("power_of_two", 4), ("codebook", 3), ("float8_e4m3", 8)]  # one of each way to round


def normal(shape: tuple[int, ...], seed: int = 0, dtype: Any = np.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def table(levels: Levels, structure: Any) -> np.ndarray:
    """Every magnitude a weight may take, in float64, from the definition."""
    s = np.asarray(structure, np.float64)
    if levels.grid == "codebook":
        return s
    if levels.grid.startswith("float8"):
        kind = ml_dtypes.float8_e4m3fn if levels.grid.endswith("4m3") else ml_dtypes.float8_e5m2
        return s * np.sort([float(v) for v in np.arange(256, dtype=np.uint8).view(kind) if 0 < float(v) < np.inf])
    k = np.arange(1, levels.top + 1)
    return s * (2.0 ** (k - 1) if levels.grid == "power_of_two" else k)


@pytest.mark.parametrize(
    ("grid", "bits", "zero_level"),
    [
        pytest.param(*case, zero, marks=[] if case in WIDE or zero else pytest.mark.slow)
        for case in CASES
        for zero in (False, True)
    ],
)
def test_every_weight_goes_to_its_nearest_level(grid: str, bits: int, zero_level: bool) -> None:
    c = cx.quantize(bits, grid=grid, zero_level=zero_level)
    w = normal((7, 30)).at[0].set(0)
    s = c.init(w)
    z = np.asarray(c.project(w, s), np.float64)
    levels = table(levels_of(c.spec), s)
    options = np.concatenate([-levels, levels, [0.0] if zero_level else []])
    for v, got in zip(np.asarray(w, np.float64).ravel(), z.ravel(), strict=True):
        if v == 0:
            assert got == 0
        else:
            assert got in options
            assert abs(got - v) <= np.min(np.abs(options - v)) * (1 + 1e-6)


_QUICK = (("uniform", "row"), ("codebook", 5), ("float8_e4m3", 100))


@pytest.mark.parametrize(
    ("grid", "bits", "per"),
    [
        pytest.param(grid, bits, per, marks=[] if (grid, per) in _QUICK else pytest.mark.slow)
        for grid, bits in (("uniform", 4), ("codebook", 3), ("float8_e4m3", 8), ("float8_e5m2", 8))
        for per in ("row", 1, 5, 100)
    ],
)
def test_rows_and_groups_are_sets_of_their_own(grid: str, bits: int, per: str | int, tmp_path: Path) -> None:
    """Every row, or group of consecutive inputs of an output, is what a set of its own makes of it."""
    shape = (3, 4, 6)  # 12 inputs
    w = normal(shape) * jnp.exp(normal(shape, 1) * 2)
    constraint, alone = cx.quantize(bits, grid=grid, per=per), cx.quantize(bits, grid=grid, per="channel")
    z = np.asarray(constraint.project(w, constraint.init(w))).reshape(12, 6)
    m = w.reshape(12, 6)
    if per == "row":
        np.testing.assert_array_equal(z.T, alone.project(m.T, alone.init(m.T)))
    else:
        for start in range(0, 12, int(per)):
            part = m[start : start + int(per)]
            np.testing.assert_array_equal(z[start : start + int(per)], alone.project(part, alone.init(part)))
    rules = [("w", constraint, "in in out")]
    hard = cx.harden({"w": w}, rules, fresh=True)
    tx = optax.chain(optax.sgd(0.01), cx.retrain(rules, hard))
    updates, state = tx.update({"w": w}, tx.init(hard.params), hard.params)
    done = cx.retract(optax.apply_updates(hard.params, updates), rules, state)
    flat = [("w", constraint)]
    kept = cx.Hardened({"w": done.params["w"].reshape(12, 6)}, done.structures)
    sizes = cx.save_model(tmp_path / "m", kept, flat, layout=[("w", "quantized")])
    scales = np.asarray(done.structures["w"][0]).size * 4
    assert sizes.packed == -(-72 * bits // 8) + scales  # a code a weight, and the scales or codebooks
    back = cx.load_model(tmp_path / "m")
    np.testing.assert_array_equal(back.params["w"], kept.params["w"])
    cx.check(back, back.rules)


def test_what_shares_a_scale_is_checked() -> None:
    for per in (0, -1, True, 2.5, "group", None):
        with pytest.raises(ValueError, match="per must be"):
            cx.quantize(4, per=per)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs a weight of at least 2 axes"):
        cx.harden({"b": jnp.ones(8)}, [("b", cx.quantize(4, per=4))], fresh=True)
    with pytest.raises(ValueError, match="a block shares one magnitude"):
        cx.unify((2, 2), 0.5) & cx.quantize(4, per=32)


@pytest.mark.parametrize(("grid", "bits"), some(WIDE, CASES))
def test_a_tie_goes_to_the_smaller_magnitude(grid: str, bits: int) -> None:
    levels = Levels(bits, grid)
    structure = jnp.asarray([0.5, 1.0, 3.0]) if grid == "codebook" else jnp.asarray(0.25)
    magnitudes = table(levels, structure)
    middle = (magnitudes[:-1] + magnitudes[1:]) / 2
    w = jnp.asarray(np.concatenate([middle, -middle]), jnp.float32)
    got = np.asarray(decode(encode(w, structure, levels), structure, levels))
    np.testing.assert_array_equal(np.abs(got), np.tile(magnitudes[:-1], 2))
    above = jnp.asarray(middle * (1 + 1e-6), jnp.float32)
    np.testing.assert_array_equal(decode(encode(above, structure, levels), structure, levels), magnitudes[1:])


@pytest.mark.parametrize(("grid", "bits"), some(WIDE, CASES))
def test_all_levels_survive_encode_and_decode(grid: str, bits: int) -> None:
    levels = Levels(bits, grid)
    structure = fit(normal((40, 5)), levels)
    codes = jnp.arange(-levels.top, levels.top + 1)
    w = decode(codes, structure, levels)
    np.testing.assert_array_equal(encode(w, structure, levels), codes)
    assert w[levels.top] == 0 and not np.signbit(w[levels.top])
    if grid in ("uniform", "cells"):  # the product is exact, so integer arithmetic times the scale is the layer itself
        np.testing.assert_array_equal(np.asarray(w, np.float64), np.float64(structure) * np.asarray(codes))


@given(
    case=st.sampled_from(CASES),
    per=st.sampled_from(["tensor", "channel", "row", 2, 3]),
    zero_level=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    values=hnp.arrays(
        np.float32,
        (5, 3),
        elements=st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 0.5]),
            st.floats(-1000, 1000, width=16, allow_subnormal=False),
        ),
    ),
)
def test_invariants(case: tuple[str, int], per: str | int, zero_level: bool, dtype: str, values: np.ndarray) -> None:
    c = cx.quantize(case[1], grid=case[0], per=per, zero_level=zero_level)
    w = jnp.asarray(values.astype(DTYPES[dtype]))
    s = c.init(w)
    z = c.project(w, s)
    assert z.dtype == w.dtype and bool(jnp.all(jnp.isfinite(z)))
    np.testing.assert_array_equal(c.project(z, s), z)  # idempotent, to the bit
    if not zero_level:
        np.testing.assert_array_equal(z != 0, w != 0)  # no kept weight becomes 0, no pruned weight comes back
    assert bool(jnp.all(z * w >= 0))  # signs are kept
    piece = c.freeze(z, s)
    np.testing.assert_array_equal(c.retract(z, piece), z)
    inside = c.retract(z * 1.25, piece)
    np.testing.assert_array_equal(c.retract(inside, piece), inside)
    np.testing.assert_array_equal(jnp.sign(inside), jnp.sign(z))


@pytest.mark.parametrize(
    ("grid", "bits", "per"),
    [
        pytest.param(*case, per, marks=[] if per == "channel" and case in WIDE else pytest.mark.slow)
        for case in CASES
        for per in ("tensor", "channel")
    ],
)
def test_weights_on_levels_give_their_scale_back(grid: str, bits: int, per: str) -> None:
    c = cx.quantize(bits, grid=grid, per=per)
    w = normal((3, 3, 8, 6), 1)
    s = c.init(w)
    piece = c.freeze(c.project(w, s), s)
    moved = c.retract(c.project(w, s) * 1.037, piece)  # retraining moves the scale, so the old one no longer holds
    found = c.init(moved)
    np.testing.assert_array_equal(c.project(moved, found), moved)
    assert int(cx.constraints.violations(c, moved, found)) == 0


@pytest.mark.parametrize(("grid", "bits"), [("uniform", 3), ("power_of_two", 3), ("cells", 2)])
def test_scale_is_as_good_as_a_fine_search(grid: str, bits: int) -> None:
    c = cx.quantize(bits, grid=grid)
    levels = levels_of(c.spec)
    for seed in range(5):
        w = normal((6, 9), seed)
        z = c.project(w, c.init(w))
        x = np.abs(np.asarray(w, np.float64))[..., None]
        best = min(
            float(np.sum(np.min(np.abs(x - table(levels, s)), axis=-1) ** 2)) for s in np.geomspace(0.01, 4, 4000)
        )
        assert float(jnp.sum(jnp.square(z - w))) <= best * 1.02


def test_channel_scales_are_those_of_the_channels_alone() -> None:
    w = normal((3, 3, 4, 5)) * jnp.asarray([0.1, 1.0, 2.0, 5.0, 0.01])[None, None, None]
    each, whole = cx.quantize(4, per="channel"), cx.quantize(4)
    s = each.init(w)
    assert s.shape == (5,)
    z = each.project(w, s)
    for f in range(5):
        alone = w[..., f]
        np.testing.assert_array_equal(z[..., f], whole.project(alone, s[f]))
        np.testing.assert_allclose(s[f], whole.init(alone), rtol=1e-4)


def test_codebook_is_the_best_clustering_of_a_small_leaf() -> None:
    """K-means in one dimension by trying every cut of the sorted magnitudes."""
    good = 0
    for seed in range(8):
        w = normal((3, 4), seed)
        c = cx.quantize(3, grid="codebook")
        z = c.project(w, c.init(w))
        x = np.sort(np.abs(np.asarray(w, np.float64)).ravel())
        cuts = itertools.combinations(range(1, x.size), 2)
        best = min(sum(float(np.sum((p - p.mean()) ** 2)) for p in np.split(x, cut)) for cut in cuts)
        loss = float(jnp.sum(jnp.square(z - w)))
        assert loss >= best * (1 - 1e-5)
        good += loss <= best * 1.05
    assert good >= 5  # k-means stops at local optima; most are the global one


def test_codebook_keeps_magnitudes_that_are_few_enough() -> None:
    w = jnp.asarray([[0.3, -0.1, 0.0], [0.1, 0.7, -0.7]])
    c = cx.quantize(3, grid="codebook")
    np.testing.assert_array_equal(c.init(w), np.asarray([0.1, 0.3, 0.7], np.float32))
    np.testing.assert_array_equal(c.project(w, c.init(w)), w)


def test_large_codebook_leaf_is_sampled_and_still_good() -> None:
    w = normal((1024, 300))
    c = cx.quantize(4, grid="codebook")
    s = c.init(w)
    z = c.project(w, s)
    means = [float(jnp.mean(jnp.abs(w)[jnp.abs(z) == level])) for level in s]
    np.testing.assert_allclose(means, s, rtol=0.02)  # entries are the means of their weights: Lloyd's fixpoint


def test_pruned_and_quantized_weights_keep_mask_and_levels_in_retraining() -> None:
    rules = [("w", cx.unstructured(0.25) & cx.quantize(4))]
    hard = cx.harden({"w": normal((20, 12))}, rules, fresh=True).params
    assert int(jnp.count_nonzero(hard["w"])) == 60
    tx = optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05, momentum=0.9), cx.retrain(rules))
    state, params = tx.init(hard), hard
    step = jax.jit(lambda p, s: tx.update({"w": p["w"] - normal((20, 12), 3)}, s, p))
    for _ in range(20):
        updates, state = step(params, state)
        params = cx.retract(optax.apply_updates(params, updates), rules, find_state(state)).params
    w = np.asarray(params["w"], np.float64)
    np.testing.assert_array_equal(w != 0, np.asarray(hard["w"]) != 0)
    assert not np.array_equal(w, hard["w"])
    codes = np.asarray(encode(hard["w"], cx.quantize(4).init(hard["w"]), Levels(4)))
    ratio = w[codes != 0] / codes[codes != 0]
    assert np.unique(ratio).size == 1 and ratio[0] > 0  # one scale, exactly, the integers unchanged
    check(params, rules, structures(params, rules))


def test_frozen_levels_do_not_move() -> None:
    c = cx.quantize(4, tune=False)
    w = normal((4, 4))
    s = c.init(w)
    z = c.project(w, s)
    np.testing.assert_array_equal(c.retract(z + 0.3, c.freeze(z, s)), z)


@pytest.mark.parametrize("grid", ["uniform", "codebook"])
def test_retraction_is_the_nearest_point_of_the_piece(grid: str) -> None:
    c = cx.quantize(3, grid=grid)
    w = normal((4, 5))
    s = c.init(w)
    piece = c.freeze(c.project(w, s), s)
    v = np.asarray(normal((4, 5), 7) * 0.2 + c.project(w, s), np.float64)
    codes = np.asarray(piece.codes)
    if grid == "uniform":
        nearest = codes * max(np.sum(v * codes) / np.sum(codes * codes), 0)
    else:
        nearest = np.zeros_like(v)
        for k in np.unique(np.abs(codes)):
            at = np.abs(codes) == k
            nearest[at] = np.sign(codes[at]) * np.mean(v[at] * np.sign(codes[at]))
    np.testing.assert_allclose(c.retract(jnp.asarray(v, jnp.float32), piece), nearest, rtol=3e-5)


def test_extreme_magnitudes_neither_vanish_nor_overflow() -> None:
    for factor in (1e-34, 1e37):
        for grid, bits in CASES:
            c = cx.quantize(bits, grid=grid)
            w = normal((5, 6)) * np.float32(factor)
            z = c.project(w, c.init(w))
            assert bool(jnp.all((z != 0) & jnp.isfinite(z)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 1}, "bits must be in 2..16"),
        ({"bits": 9, "grid": "codebook"}, "2..8"),
        ({"bits": 5, "grid": "cells"}, "not a multiple of cell_bits=2"),
        ({"bits": 4, "grid": "floaty"}, "grid must be one of"),
        ({"bits": 4, "grid": "cells", "symmetric": False}, 'symmetric=False is for the grid "uniform"'),
        ({"bits": 4, "per": "rows"}, 'per must be "tensor", "channel", "row" or a number'),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cx.quantize(**arguments)


def test_a_dtype_without_room_for_the_levels_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bfloat16 has 8 bits of precision, too few for the 511 levels"):
        cx.resolve([("w", cx.quantize(10))], {"w": jnp.ones((2, 2), jnp.bfloat16)})


@pytest.mark.parametrize(("bits", "signed"), [(1, False), (4, False), (8, False), (2, True), (8, True)])
def test_activations_are_integers_times_the_scale(bits: int, signed: bool) -> None:
    x = normal((6, 50), 2) * 3
    scale = 0.037
    low, high = (-(2 ** (bits - 1) - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    codes = np.asarray(activation_codes(x, bits, scale, signed))
    wanted = np.clip(np.round(np.asarray(x, np.float64) / np.float32(scale)), low, high)
    np.testing.assert_array_equal(codes, wanted)
    y = jax.jit(lambda x: quantize_activations(x, bits, scale, signed))(x)
    np.testing.assert_array_equal(y, codes.astype(np.float32) * np.float32(scale))


def test_activation_gradient_is_straight_through_and_stops_at_the_clip() -> None:
    x, scale = jnp.asarray([-1.0, 0.2, 0.74, 0.76, 3.0]), jnp.asarray(0.25)

    def loss(x: jax.Array, scale: jax.Array) -> jax.Array:
        return jnp.sum(quantize_activations(x, 2, scale) * jnp.asarray([1.0, 10.0, 100.0, 1000.0, 10000.0]))

    dx, dscale = jax.grad(loss, argnums=(0, 1))(x, scale)
    np.testing.assert_array_equal(dx, [0, 10, 100, 0, 0])
    np.testing.assert_allclose(dscale, 3 * (1000 + 10000))  # d(3 * scale) / d scale where x is clipped
    per_channel = jax.grad(lambda s: jnp.sum(quantize_activations(x[None], 2, s)))(jnp.full(5, 0.25))
    np.testing.assert_array_equal(per_channel, [0, 0, 0, 3, 3])


@pytest.mark.parametrize("signed", [False, True])
def test_activations_keep_nan_and_clip_infinities(signed: bool) -> None:
    x = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, -0.0, 0.9])
    y = jax.jit(lambda x: quantize_activations(x, 2, 0.25, signed))(x)
    np.testing.assert_array_equal(y, [np.nan, 0.25, -0.25, 0, 0.25] if signed else [np.nan, 0.75, 0, 0, 0.75])


def test_bad_activation_bits_are_named() -> None:
    with pytest.raises(ValueError, match=r"2\.\.16 for signed=True"):
        quantize_activations(jnp.ones(2), 1, 1.0, signed=True)
