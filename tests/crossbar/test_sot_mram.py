"""SOT-MRAM: the bit-plane engine equals integer products at all widths; counts and energies against plain loops."""

from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar import mapping, sot_mram
from compressx.crossbar.sot_mram import Engine


def _draw(rng, shape, bits, signed):
    low = -(2 ** (bits - 1)) if signed else 0
    x = rng.integers(low, low + 2**bits, shape)
    x.flat[0], x.flat[-1] = low, low + 2**bits - 1
    return x


@pytest.mark.parametrize("x_signed", [False, True])
@pytest.mark.parametrize("w_signed", [False, True])
def test_the_formula_is_the_integer_product_at_all_widths(x_signed, w_signed, rng):
    """The formula itself, by NumPy, at all widths; the engine is held to it below (every width in the slow test)."""
    pairs = [(a, b) for a in range(1, 9) for b in range(1, 9)]
    for a, b in pairs:
        k = (33, 31, 7, 65)[(a + b) % 4]
        x, w = _draw(rng, (2, k), a, x_signed), _draw(rng, (k, 3), b, w_signed)
        planes_x, planes_w = _planes(x, a), _planes(w, b)
        slow = sum(
            cx * cw * (planes_x[i][:, :, None] & planes_w[j][None]).sum(axis=1)
            for i, cx in enumerate(sot_mram.plane_weights(a, x_signed))
            for j, cw in enumerate(sot_mram.plane_weights(b, w_signed))
        )
        np.testing.assert_array_equal(slow, x @ w)


@pytest.mark.parametrize(("x_signed", "w_signed"), [(False, True), (True, True), (False, False), (True, False)])
@pytest.mark.parametrize(("a", "b", "k"), [(1, 1, 1), (1, 8, 33), (8, 1, 31), (5, 3, 65), (8, 8, 40)])
def test_engine(a, b, k, x_signed, w_signed, rng):
    x, w = _draw(rng, (2, k), a, x_signed), _draw(rng, (k, 3), b, w_signed)
    run = jax.jit(sot_mram.and_popcount_matmul, static_argnums=(2, 3, 4, 5))
    got = run(jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), a, b, x_signed, w_signed)
    np.testing.assert_array_equal(np.asarray(got), x @ w)


def test_a_broken_input_makes_its_row_nan(rng):
    x, w = _draw(rng, (3, 5), 4, True).astype(np.float32), _draw(rng, (5, 2), 4, True)
    planes = sot_mram.Planes(jnp.asarray(w, jnp.int32), sot_mram.Operands(4, 4, True, True))
    x[1, 2], x[2, 0] = np.nan, np.inf
    got = np.asarray(planes.matmul(jnp.asarray(x)))
    np.testing.assert_array_equal(got[0], x[0] @ w)
    assert np.isnan(got[1:]).all()


@pytest.mark.slow
@pytest.mark.parametrize("a", range(1, 9))
@pytest.mark.parametrize("b", range(1, 9))
@pytest.mark.parametrize(("x_signed", "w_signed"), [(False, True), (True, True), (False, False), (True, False)])
def test_engine_at_every_width(a, b, x_signed, w_signed, rng):
    x, w = _draw(rng, (3, 37), a, x_signed), _draw(rng, (37, 5), b, w_signed)
    got = sot_mram.and_popcount_matmul(jnp.asarray(x, jnp.int32), jnp.asarray(w, jnp.int32), a, b, x_signed, w_signed)
    np.testing.assert_array_equal(np.asarray(got), x @ w)


def _planes(x, bits):
    return [(x >> i) & 1 for i in range(bits)]


def _pruned(rng, rows, cols, keep_rows, keep_cols):
    w = np.zeros((rows, cols))
    w[np.ix_(rng.permutation(rows)[:keep_rows], rng.permutation(cols)[:keep_cols])] = 1
    return mapping.dense_layer("fc", w, uses=3)


def test_work_counted_row_by_row(rng):
    engine = Engine(rows=16, cols=8, width=16, parallel=1)
    layer = _pruned(rng, 50, 20, 37, 11)
    found = sot_mram.layer_work(layer, engine, x_bits=4, w_bits=3)
    ands = 0
    for _ in range(3):
        for _ in range(11):
            for _ in range(0, 37, 16):
                ands += 4 * 3
    stacks = 3 * ceil(11 * 3 / (16 - 4))
    assert (found.ands, found.writes, found.programmed) == (ands, 3 * 4 * stacks, 3 * 11 * 3)
    assert found.subarrays == 2 * stacks and found.weights == 37 * 11
    assert found.ns == pytest.approx(ands * 2.85 + found.writes * 2.59)
    assert found.dynamic_nj == pytest.approx(ands * 0.64 + found.writes * 0.66)
    assert found.leakage_nj == pytest.approx(550e-3 * found.ns)


def test_energy_falls_with_weights_and_bits(rng):
    """AND energy goes with kept weights x input bits x weight bits, where whole rows are filled."""
    dense = sot_mram.network([mapping.dense_layer("fc", np.ones((1024, 64)))], x_bits=8, w_bits=8)
    pruned = sot_mram.network([_pruned(rng, 1024, 64, 512, 16)], x_bits=8, w_bits=8)
    small = sot_mram.network([_pruned(rng, 1024, 64, 512, 16)], x_bits=8, w_bits=4)
    assert pruned.ands * 8 == dense.ands * 3  # three uses of an eighth of the weights
    assert small.ands * 2 == pruned.ands
    assert small.uj < pruned.uj < dense.uj and dense.fps < pruned.fps


def test_parallel_stacks_and_slow_writes(rng):
    layer = _pruned(rng, 600, 64, 600, 64)
    one, four = (sot_mram.network([layer], Engine(parallel=p)) for p in (1, 4))
    assert four.ms == pytest.approx(one.ms / 4) and four.dynamic_uj == pytest.approx(one.dynamic_uj)
    rows = sot_mram.write_sensitivity([layer], Engine(), [1, 2, 10])
    assert rows[0]["ms"] == pytest.approx(one.ms)
    slope = one.layers[0].writes * 2.59 / 1e6
    assert rows[2]["ms"] - rows[0]["ms"] == pytest.approx(9 * slope)
    assert one.programming_uj == pytest.approx(2 * 64 * 8 * 0.66 / 1e3)


def test_bits_by_layer_and_assumptions(rng):
    layers = [mapping.dense_layer(n, np.ones((10, 4))) for n in ("a", "b")]
    found = sot_mram.network(layers, x_bits={"a": 8, "b": 2}, w_bits=4)
    assert found.layers[0].ands == 4 * found.layers[1].ands
    assert any("no source" in line for line in found.assumptions)
    assert found.layers[0].row()["layer"] == "a" and found.subarrays == 4


def test_refuses():
    one = jnp.ones((1, 1), jnp.int32)
    with pytest.raises(ValueError, match="w_bits must be in 1..8"):
        sot_mram.and_popcount_matmul(one, one, 8, 9)
    with pytest.raises(ValueError, match=r"expected \[n, k\]"):
        sot_mram.and_popcount_matmul(one, jnp.ones((2, 1), jnp.int32), 8, 8)
    with pytest.raises(ValueError, match="width=100"):
        Engine(width=100)
    with pytest.raises(ValueError, match="no room"):
        sot_mram.layer_work(mapping.dense_layer("fc", np.ones((2, 2))), Engine(rows=8), 8, 8)


def test_short_filters_side_by_side_take_fewer_operations(rng):
    layer = mapping.dense_layer("fc", np.ones((25, 20)), uses=7)
    plain, packed = (sot_mram.layer_work(layer, Engine(pack=p), 8, 4) for p in (False, True))
    assert plain.ands == 7 * 20 * 32 and packed.ands == 7 * 1 * 32  # 20 filters of 25 in 512 columns
    assert plain.utilisation == pytest.approx(25 / 512) and packed.utilisation == pytest.approx(500 / 512)
    assert packed.dynamic_nj < plain.dynamic_nj and packed.ns < plain.ns and packed.programmed == 4
    long = mapping.dense_layer("fc", np.ones((600, 20)))
    both = [sot_mram.layer_work(long, Engine(pack=p), 8, 4) for p in (False, True)]
    assert both[0] == both[1] and both[0].utilisation == pytest.approx(600 / 1024)
    report = sot_mram.network([layer, long], Engine(pack=True))
    assert 0 < report.utilisation < 1 and any("side by side" in line for line in report.assumptions)
