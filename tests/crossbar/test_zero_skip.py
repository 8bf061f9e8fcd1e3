"""Zero skipping: effective cycles against Python's bit_length, unchanged products, and the paper's example."""

import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar import presets
from compressx.crossbar.design import Design
from compressx.crossbar.reference import reference
from compressx.crossbar.zero_skip import bit_length, effective_cycles, measure

POLAR = Design(rows=16, active_rows=4, input_bits=8, weight_bits=2, signs="polarized")


def test_bit_length_is_python_s():
    x = np.r_[0, 1, 2, 3, 255, 256, 2**31 - 1, np.random.default_rng(0).integers(0, 2**31, 200)]
    expected = [int(v).bit_length() for v in x]
    np.testing.assert_array_equal(np.asarray(bit_length(jnp.asarray(x, jnp.int32))), expected)


def test_the_paper_s_example():
    """FORMS: inputs 00101011 and 01001011 among them give seven effective cycles."""
    x = jnp.asarray([[0b00101011, 0b01001011, 0b00000001, 0]], jnp.int32)
    assert effective_cycles(x, POLAR).tolist() == [[7]]


@pytest.mark.parametrize("dac_bits", [1, 3])
@pytest.mark.parametrize("all_zero", [0, 1])
def test_brute_force(dac_bits, all_zero, rng):
    design = POLAR.but(dac_bits=dac_bits)
    x = rng.integers(0, 256, (20, 10)) * (rng.random((20, 10)) < 0.3)
    expected = np.zeros((20, 3), int)
    for n in range(20):
        for g in range(3):
            cycles = 0
            for value in x[n, 4 * g : 4 * g + 4]:
                while value >> (dac_bits * cycles):
                    cycles += 1
            expected[n, g] = max(cycles, all_zero)
    np.testing.assert_array_equal(np.asarray(effective_cycles(jnp.asarray(x, jnp.int32), design, all_zero)), expected)


def test_products_do_not_change(rng):
    """Feeding each fragment only its effective cycles gives what all cycles give."""
    design = presets.forms(4).but(input_bits=8)
    w = np.abs(rng.integers(-9, 9, (10, 3)))
    x = rng.integers(0, 2 ** rng.integers(0, 9, (5, 10)))
    cycles = np.asarray(effective_cycles(jnp.asarray(x, jnp.int32), design))
    skipped = np.zeros((5, 3), np.int64)
    for n in range(5):
        for g in range(3):
            rows = slice(4 * g, 4 * g + 4)
            if cycles[n, g]:
                skipped[n] += reference(x[n : n + 1, rows], w[rows], design.but(input_bits=int(cycles[n, g]))).y[0]
    np.testing.assert_array_equal(skipped, reference(x, w, design).y)


def test_mean_does_not_fall_with_the_size_of_fragments(rng):
    x = jnp.asarray(rng.integers(0, 2 ** rng.integers(0, 17, (50, 128))), jnp.int32)
    means = [measure(x, presets.forms(8).but(active_rows=m)).mean for m in (1, 4, 8, 16, 128)]
    assert means == sorted(means) and means[0] < means[-1]


def test_measure_counts_sweeps(rng):
    x = rng.integers(0, 2 ** rng.integers(0, 9, (6, 40)))  # 10 fragments: arrays of 4, 4 and 2
    found = measure(jnp.asarray(x, jnp.int32), POLAR)
    cycles = np.asarray(effective_cycles(jnp.asarray(x, jnp.int32), POLAR))
    slowest = [max(row[:4].sum(), row[4:8].sum(), row[8:].sum()) for row in cycles]
    assert found.mean_slowest == pytest.approx(np.mean(slowest)) and found.full_sweep == 4 * 8
    assert found.mean == pytest.approx(cycles.mean()) and found.histogram.sum() == 60
    assert found.saved == pytest.approx(1 - cycles.mean() / 8)
    assert found.all_zero_share == pytest.approx((cycles == 0).mean())


def test_sign_planes_are_both_fed():
    design = POLAR.but(inputs="sign_planes")
    found = measure(jnp.asarray([[3, -8, 0, 0]], jnp.int32), design)
    assert found.mean_slowest == 2 + 4 and found.full_sweep == 2 * 8


def test_refuses():
    with pytest.raises(ValueError, match="no leading zeros"):
        effective_cycles(jnp.ones((1, 4), jnp.int32), POLAR.but(inputs="twos_complement"))
    with pytest.raises(ValueError, match="conv1: negative inputs"):
        measure(jnp.asarray([[-1, 0]], jnp.int32), POLAR, "conv1")
    with pytest.raises(ValueError, match="0 or 1"):
        effective_cycles(jnp.ones((1, 4), jnp.int32), POLAR, 2)
