"""Non-idealities: their moments, that none of them is none, and intervals that cover."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from compressx.crossbar.design import Adc, Design, Device
from compressx.crossbar.ir_drop import with_wires
from compressx.crossbar.mvm import crossbar_matmul
from compressx.crossbar.noise import Variation, conductance, monte_carlo, perturb
from compressx.crossbar.program import program
from compressx.crossbar.reference import reference

FLIP = Design(rows=16, active_rows=16, input_bits=4, weight_bits=4, adc=Adc(4, encoding="flip"))
POLAR = FLIP.but(signs="polarized", active_rows=8)
PAIRS = FLIP.but(adc=Adc(4), signs="differential_analog")
KEY = jax.random.key(3)


def _case(rng, design):
    low, high = design.weight_range
    w = rng.integers(low, high + 1, (20, 3))
    w = np.abs(w) if design.signs == "polarized" else w
    return w, jnp.asarray(rng.integers(0, 16, (5, 20)), jnp.int32)


@pytest.mark.parametrize("design", [FLIP, POLAR, PAIRS], ids=["flip", "polarized", "pairs"])
def test_no_variation_is_the_ideal_engine(design, rng):
    w, x = _case(rng, design)
    programmed = program(w, design, rows=np.arange(20), prove=False)
    got = crossbar_matmul(x, perturb(KEY, programmed, Variation()))
    np.testing.assert_array_equal(np.asarray(got), reference(np.asarray(x), w, design).y)


def test_adc_errors_of_zero_size_and_tiny_noise_change_nothing(rng):
    w, x = _case(rng, POLAR)
    programmed = program(w, POLAR, rows=np.arange(20), prove=False)
    tiny = Variation(sigma=1e-5, adc_gain=1e-6, adc_offset=1e-5, read_noise=1e-4, on_off=1e7)
    got = crossbar_matmul(x, perturb(KEY, programmed, tiny), key=KEY)
    np.testing.assert_array_equal(np.asarray(got), reference(np.asarray(x), w, POLAR).y)


def test_moments_of_conductances():
    levels = jnp.full((200, 200), 2, jnp.int8)
    log = np.log(np.asarray(conductance(KEY, levels, Variation(sigma=0.1), 3)) / 2)
    assert log.mean() == pytest.approx(0, abs=2e-3) and log.std() == pytest.approx(0.1, rel=0.02)
    gauss = np.asarray(conductance(KEY, levels, Variation("gaussian", 0.1), 3))
    assert gauss.mean() == pytest.approx(2, abs=6e-3) and gauss.std() == pytest.approx(0.3, rel=0.02)
    drift = np.asarray(conductance(KEY, levels, Variation(drift_time=100.0, drift_mean=0.05), 3))
    np.testing.assert_allclose(drift, 2 * 100**-0.05, rtol=1e-5)
    faulty = np.asarray(conductance(KEY, levels, Variation(stuck_on=0.1, stuck_off=0.2), 3))
    assert (faulty == 3).mean() == pytest.approx(0.1, abs=0.01)
    assert (faulty == 0).mean() == pytest.approx(0.2, abs=0.01)
    np.testing.assert_allclose(np.asarray(conductance(KEY, levels, Variation(on_off=10.0), 3)), 2 * 0.9, rtol=1e-6)


def test_gain_and_offset_of_the_adc(rng):
    """An offset of one step on every conversion shows up as the sum of all column and cycle weights."""
    from dataclasses import replace

    design = POLAR.but(adc=Adc(6))
    w, x = _case(rng, design)
    programmed = perturb(KEY, program(w, design, rows=np.arange(20), prove=False), Variation(adc_offset=0.1))
    one = replace(programmed, gain=jnp.ones_like(programmed.gain), shift=jnp.ones_like(programmed.shift))
    extra = np.asarray(crossbar_matmul(x, one)) - reference(np.asarray(x), w, design).y
    groups = -(-20 // 8)
    assert (extra == groups * sum(design.column_weights) * sum(design.cycle_weights)).all()
    twice = replace(programmed, gain=2 * jnp.ones_like(programmed.gain), shift=jnp.zeros_like(programmed.shift))
    np.testing.assert_array_equal(np.asarray(crossbar_matmul(x, twice)), 2 * reference(np.asarray(x), w, design).y)


def test_monte_carlo_is_a_vmap_over_devices(rng):
    w, x = _case(rng, FLIP)
    programmed = program(w, FLIP, prove=False)
    variation = Variation(sigma=0.2)
    metric = lambda k: jnp.mean(crossbar_matmul(x, perturb(k, programmed, variation)).astype(jnp.float32))
    found = monte_carlo(metric, KEY, 6, batch=4)
    alone = [float(metric(k)) for k in jax.random.split(KEY, 6)[:2]]
    np.testing.assert_allclose(found.values[:2], alone, rtol=1e-6)
    assert found.std > 0 and found.low < found.mean < found.high


def test_interval_is_scipy_s():
    found = monte_carlo(lambda k: jax.random.normal(k), KEY, 7, level=0.9)
    low, high = stats.t.interval(0.9, 6, loc=np.mean(found.values), scale=stats.sem(found.values))
    assert (found.low, found.high) == pytest.approx((low, high))


def test_read_noise_needs_a_key_and_differs_between_reads(rng):
    w, x = _case(rng, FLIP)
    noisy = perturb(KEY, program(w, FLIP, prove=False), Variation(read_noise=2.0))
    with pytest.raises(ValueError, match="give a key"):
        crossbar_matmul(x, noisy)
    a, b = (np.asarray(crossbar_matmul(x, noisy, key=jax.random.key(s))) for s in (0, 1))
    assert (a != b).any()


def test_wires_only_weaken(rng):
    design = POLAR.but(adc=Adc(8, encoding="ideal"))
    w, x = _case(rng, design)
    programmed = program(w, design, rows=np.arange(20), prove=False)
    same = with_wires(programmed, 1e4, 1e-6, 1e-6, 2)
    ideal = reference(np.asarray(x), w, design).y
    np.testing.assert_array_equal(np.asarray(crossbar_matmul(x, same)), ideal)
    weak = np.asarray(crossbar_matmul(x, with_wires(programmed, 1e4, 100.0, 100.0, 2)))
    assert (weak <= ideal).all() and (weak < ideal).any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Variation("uniform"), "kind"),
        (lambda: Variation(sigma=-1), "sigma must be at least 0"),
        (lambda: Variation(stuck_on=0.6, stuck_off=0.6), "share of all cells"),
        (lambda: Variation(drift_time=0.5), "drift_time"),
        (lambda: Variation(on_off=1.0), "on_off"),
        (lambda: monte_carlo(lambda k: k, KEY, 1), "count=1"),
        (lambda: perturb(KEY, program(np.ones((2, 2), int), FLIP.but(adc_bits=8)), Variation()), "prove=False"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_no_cell_conducts_less_than_nothing():
    levels = jnp.zeros((50, 50), jnp.int8)
    for ratio, leak in ((None, 0.0), (10.0, 0.3)):
        g = np.asarray(conductance(KEY, levels, Variation("gaussian", 0.5, on_off=ratio), 3)) + leak
        assert g.min() == 0 and (g > 0).any()


def test_a_device_s_resistances_are_its_on_off_ratio(rng):
    design = POLAR.but(device=Device(2, r_on=1e4, r_off=1e5))
    w, _ = _case(rng, design)
    programmed = program(w, design, rows=np.arange(20), prove=False)
    stated = perturb(KEY, programmed, Variation()).cells.cells
    asked = perturb(KEY, program(w, POLAR, rows=np.arange(20), prove=False), Variation(on_off=10.0)).cells.cells
    np.testing.assert_array_equal(stated, asked)
    np.testing.assert_allclose(perturb(KEY, programmed, Variation(on_off=100.0)).leak, 0.03)
    wired = with_wires(programmed, None, 5.0, 5.0, 2)
    np.testing.assert_array_equal(wired.cells.cells, with_wires(programmed, 1e4, 5.0, 5.0, 2).cells.cells)
    with pytest.raises(ValueError, match="r_on=None"):
        with_wires(program(w, POLAR, prove=False), None, 5.0, 5.0, 2)


def test_wires_see_the_leak_and_the_reference_comes_last(rng):
    """The column currents are those of the circuit with leaking cells, less what cells without wires leak."""
    from tests.crossbar.test_ir_drop import _nodal

    w, _ = _case(rng, POLAR)
    programmed = program(w, POLAR, rows=np.arange(20), prove=False)
    leaky = perturb(KEY, programmed, Variation(on_off=5.0))
    seen = np.asarray(with_wires(leaky, 1e4, 30.0, 50.0, 1).cells.cells, np.float64)
    levels, unit, leak = np.asarray(programmed.cells.cells, np.float64), 1 / (1e4 * 3), 3 / 5
    for group in range(len(levels)):
        driven = (np.arange(8) + 8 * group < 20).astype(float)
        for f in range(levels.shape[3]):
            g = (levels[group, :, :, f] * (1 - 1 / 5) + leak * driven[:, None]) * unit
            wanted = _nodal(np.maximum(g, 1e-15), 30.0, 50.0, driven) / unit - leak * driven.sum()
            np.testing.assert_allclose(driven @ seen[group, :, :, f], wanted, rtol=1e-4)
