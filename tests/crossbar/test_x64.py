"""With 64-bit types on, every product, count and gradient is the one without."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar import Adc, Design, aware, ir_drop, layers, mvm, network, sot_mram, zero_skip
from compressx.crossbar.noise import Variation, monte_carlo, perturb
from compressx.crossbar.program import program
from compressx.crossbar.reference import reference

DESIGNS = {
    "offset": Design(adc=Adc(5)),
    "flip": Design(adc=Adc(4, encoding="flip")),
    "differential_digital": Design(adc=Adc(5), signs="differential_digital"),
    "differential_analog": Design(adc=Adc(6), signs="differential_analog", inputs="sign_planes"),
    "twos_complement": Design(adc=Adc(6), inputs="twos_complement", active_rows=8),
    "two_bits": Design(adc=Adc(7), dac_bits=2),
}
PATHS = ("folded", "integer", "popcount", "table")


def _weights(rng, design, rows=12, filters=3):
    low, high = design.weight_range
    return rng.integers(max(low, -127), min(high, 127) + 1, (rows, filters))


CASES = [(name, np.int64) for name in DESIGNS] + [("offset", d) for d in (np.int32, np.float32, np.float64)]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_products_are_the_definition(name, dtype):
    rng, design = np.random.default_rng(0), DESIGNS[name]
    w = _weights(rng, design)
    x = rng.integers(design.input_range[0], design.input_range[1] + 1, (2, 12))
    wanted = reference(x, w, design).y / design.adc.lsb.denominator
    with jax.enable_x64(True):
        for path in PATHS if design.active_rows == 8 else PATHS[:3]:
            arrays = program(w, design, path=path, prove=False)
            y = jax.jit(mvm.crossbar_matmul)(jnp.asarray(x, dtype), arrays)
            assert y.dtype == (jnp.int32 if np.issubdtype(dtype, np.integer) else jnp.float32)
            np.testing.assert_array_equal(y, wanted)


@pytest.mark.parametrize("name", ["offset", "differential_analog", "twos_complement"])
def test_perturbed_arrays_and_counts_are_the_same(name):
    rng, design = np.random.default_rng(1), DESIGNS[name]
    w = _weights(rng, design)
    x = rng.integers(0, design.input_range[1] + 1, (2, 12)).astype(np.int32)
    spread = Variation(sigma=0.1, on_off=50.0, read_noise=0.3, adc_gain=0.01, adc_offset=0.1, stuck_on=0.01)

    def found():
        arrays = program(w, design, prove=False)
        drawn = perturb(jax.random.key(0), arrays, spread)
        y = mvm.crossbar_matmul(jnp.asarray(x), drawn, jax.random.key(1))
        mean = monte_carlo(lambda k: jnp.mean(perturb(k, arrays, spread).cells.cells), jax.random.key(2), 2).mean
        return np.asarray(y), mean, mvm.saturation(jnp.asarray(x), arrays).clipped

    narrow = found()
    with jax.enable_x64(True):
        wide = found()
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_layers_skipping_wires_planes_and_gradients_are_the_same():
    rng = np.random.default_rng(2)
    kernel, images = rng.integers(-7, 8, (3, 3, 2, 4)) * 0.25, rng.uniform(0, 4, (1, 5, 5, 2))
    w, x = rng.normal(size=(12, 3)), rng.uniform(0, 4, (2, 12))
    design, polar = Design(adc=Adc(8)), Design(adc=Adc(8), active_rows=4)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.Dense(3, name="out", use_bias=False)(x)

    def found():
        layer = layers.deploy(kernel.astype(np.float32), 0.25, design, 0.125)
        seen = layers.conv(jnp.asarray(images, jnp.float32), layer, (3, 3))
        key, spread = jax.random.key(3), Variation(sigma=0.1)
        loss = lambda w: jnp.sum(aware.train_matmul(jnp.asarray(x, jnp.float32), w, 0.1, 0.1, design, key, spread) ** 2)
        slope = jax.grad(loss)(jnp.asarray(w, jnp.float32))
        skipped = zero_skip.measure(jnp.asarray(np.floor(x * 8), jnp.int32), polar, "l").histogram
        wires = ir_drop.effective_conductance(jnp.asarray(np.abs(w), jnp.float32), 0.01, 0.01)
        whole = (jnp.asarray(v, jnp.int32) for v in (np.floor(x), np.rint(w)))
        bits = sot_mram.and_popcount_matmul(*whole, 4, 4)
        variables = {"params": {"out": {"kernel": np.float32(0.25) * np.rint(w).astype(np.float32)}}}
        grid = network.on_grid(variables, {"out": network.levels_of(design)})
        deployed = network.deploy_network(grid, {"out": design}, {"out": 0.125})
        score = network.make_scorer(Net().apply)
        labels = np.zeros(2, np.int32)
        right = network.accuracy(score, deployed, grid.variables, network.batches(np.float32(x), labels, 2))
        return [np.asarray(v) for v in (seen, slope, skipped, wires, bits, right)]

    narrow = found()
    with jax.enable_x64(True):
        wide = found()
    for a, b in zip(narrow, wide, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5)
