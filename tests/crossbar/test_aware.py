"""Noise-aware training: the gradient is that of the drawn devices, cell by cell."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar import Adc, Design, aware
from compressx.crossbar.arrays import with_cells
from compressx.crossbar.cells import decode, encode
from compressx.crossbar.noise import Variation, perturb
from compressx.crossbar.program import program

WIDE = Design(rows=8, active_rows=8, input_bits=4, weight_bits=5, adc=Adc(12))
DESIGNS = {
    "offset": WIDE,
    "flip": WIDE.but(encoding="flip"),
    "differential_digital": WIDE.but(signs="differential_digital"),
    "differential_analog": WIDE.but(signs="differential_analog"),
    "polarized": WIDE.but(signs="polarized"),
}
SCALE, STEP = 0.125, 0.25


def _case(name):
    rng, design = np.random.default_rng(5), DESIGNS[name]
    whole = rng.integers(-15, 16, (11, 3))
    if name == "polarized":
        whole = np.abs(whole) * np.where(np.arange(11)[:, None] < 8, 1, -1)
    x = rng.integers(1, 15, (4, 11)) * STEP  # not at the ends of the range, where the slope is one-sided
    return design, whole, jnp.asarray(whole * SCALE, jnp.float32), jnp.asarray(x, jnp.float32)


@pytest.mark.parametrize("name", DESIGNS)
def test_cells_stand_for_their_weights(name):
    design, whole, *_ = _case(name)
    for matrix in (whole, jnp.asarray(whole)):
        np.testing.assert_array_equal(decode(encode(matrix, design), design, len(whole)), whole)


@pytest.mark.parametrize("name", DESIGNS)
def test_the_gradient_is_that_of_the_drawn_cells(name):
    design, whole, w, x = _case(name)
    key, spread = jax.random.key(7), Variation(sigma=0.1, drift_time=10.0, drift_mean=0.05)
    loss = lambda w, x: jnp.sum(aware.train_matmul(x, w, SCALE, STEP, design, key, spread) ** 2)
    y = np.asarray(aware.train_matmul(x, w, SCALE, STEP, design, key, spread), np.float64)
    by_w, by_x = (np.asarray(g) for g in jax.jit(jax.grad(loss, argnums=(0, 1)))(w, x))

    # Cell by cell in float64: what the slices of a weight conduct, and how that grows with what is stored of it.
    arrays = program(whole, design, rows=np.arange(11), prove=False)
    conducts = lambda cells: np.asarray(perturb(key, with_cells(arrays, cells), spread).cells.cells, np.float64)
    ones = jnp.ones(arrays.cells.cells.shape, jnp.float32)
    ideal, seen = np.asarray(arrays.cells.cells), conducts(arrays.cells.cells.astype(jnp.float32))
    slope = np.where(ideal < 0, -conducts(-ones), conducts(ones))
    top, columns = design.device.top, np.asarray(design.column_weights, float)[:, None]
    flip = np.zeros((1, 1, 1, 1), bool) if arrays.cells.flip is None else np.asarray(arrays.cells.flip)[:, None]
    level, shown = (np.where(flip, top - v, v) for v in (ideal, seen))
    sign = 1 if arrays.cells.negative is None else np.where(arrays.cells.negative, -1, 1)[:, None]
    by_weight = lambda v: (sign * (v * columns).sum(2)).reshape(-1, 3)[:11]
    offset = 16 if design.signs == "offset" else 0
    stored = whole + offset if offset else whole
    grows = by_weight(level * slope) / np.where(stored == 0, 1, stored) + (stored == 0)
    np.testing.assert_allclose(by_w, np.asarray(x).T @ (2 * y) * grows, rtol=2e-3, atol=1e-2)
    np.testing.assert_allclose(by_x, 2 * y @ (by_weight(shown) - offset).T * SCALE, rtol=2e-3, atol=1e-2)


def test_noise_that_grows_with_weights_is_a_penalty_on_them():
    """Without rounding, the loss of log-normal devices is homogeneous in the weights: <w, dL/dw> = <y, dL/dy>."""
    design, _, w, x = _case("differential_digital")
    fine = design.but(adc=Adc(16, Fraction(1, 64), encoding="ideal"))
    key = jax.random.key(0)
    call = lambda w: aware.train_matmul(x, w, SCALE, STEP, fine, key, Variation(sigma=0.5))
    slope = jax.grad(lambda w: jnp.sum(call(w) ** 2))(w)
    np.testing.assert_allclose(float(jnp.vdot(w, slope)), 2 * float(jnp.sum(call(w) ** 2)), rtol=2e-3)
