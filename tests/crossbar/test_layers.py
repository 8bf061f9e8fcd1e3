"""Layers and whole models on crossbars: an ideal engine is the quantized network; noise-aware training learns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar import aware, layers, zero_skip
from compressx.crossbar.design import Adc, Design
from compressx.crossbar.noise import Variation

IDEAL = Design(rows=32, active_rows=32, input_bits=6, weight_bits=5, adc=Adc(6), signs="differential_digital")
COARSE = IDEAL.but(adc=Adc(2))


class Net(nn.Module):
    """A convolution with stride and padding, a grouped one, and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 2), (2, 1), padding=((1, 0), (1, 1)))(x))
        x = nn.relu(nn.Conv(6, (2, 2), feature_group_count=2, use_bias=False, kernel_dilation=(1, 2))(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(0, 1, (3, 5, 4, 2)), jnp.float32)
    variables = Net().init(jax.random.key(0), x)
    scale = 1 / 64
    grid = jax.tree.map(lambda w: jnp.clip(jnp.round(w / scale), -31, 31) * scale, variables)
    scales, inputs = layers.calibrate(Net().apply, IDEAL, grid, x)
    return grid, x, scale, scales, inputs


def _deployed(case, design):
    grid, _, scale, scales, _ = case
    groups = {"Conv_1": 2}
    return {
        path: layers.deploy(
            grid["params"][path]["kernel"], scale, design, scales[path], groups=groups.get(path, 1), name=path
        )
        for path in ("Conv_0", "Conv_1", "Dense_0")
    }


def _quantized(case):
    """The same network by flax's own layers, with rounded inputs."""
    grid, x, _, scales, _ = case

    def intercept(next_fun, args, kwargs, context):
        if isinstance(context.module, (nn.Dense, nn.Conv)) and context.method_name == "__call__":
            s = scales["/".join(context.module.path)]
            args = (jnp.clip(jnp.round(args[0] / s), 0, 63) * s,)
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(intercept):
        return Net().apply(grid, x)


def test_a_broken_input_is_seen(case):
    """As in the quantized network; NaN in one pixel, and infinities at the end of the converter's range."""
    grid, x, scale, scales, _ = case
    run = jax.jit(layers.simulate(Net().apply, _deployed(case, IDEAL)))
    assert np.isnan(run(grid, x.at[1, 2, 3, 0].set(jnp.nan))).all(axis=1).tolist() == [False, True, False]
    top = 63 * scales["Conv_0"]
    np.testing.assert_array_equal(run(grid, x.at[1, 2, 3, 0].set(jnp.inf)), run(grid, x.at[1, 2, 3, 0].set(top)))
    layer, kernel = _deployed(case, IDEAL)["Conv_0"], grid["params"]["Conv_0"]["kernel"]
    plain = nn.Conv(4, (3, 2), (2, 1), padding=((1, 0), (1, 1)), use_bias=False)
    conv = jax.jit(lambda x: layers.conv(x, layer, (3, 2), (2, 1), ((1, 0), (1, 1))))
    dense = jax.jit(lambda x: plain.apply({"params": {"kernel": kernel}}, x))
    for at in np.ndindex(1, *x.shape[1:3], 1):
        broken = x.at[at].set(jnp.nan)
        np.testing.assert_array_equal(jnp.isnan(conv(broken)), jnp.isnan(dense(broken)))


def test_an_ideal_engine_is_the_quantized_network(case):
    grid, x, *_ = case
    got = layers.simulate(Net().apply, _deployed(case, IDEAL))(grid, x)
    np.testing.assert_allclose(np.asarray(got), np.asarray(_quantized(case)), atol=2e-5)
    coarse = layers.simulate(Net().apply, _deployed(case, COARSE))(grid, x)
    assert np.abs(np.asarray(coarse - got)).max() > 1e-2


def test_deployed_layers_pass_through_jit(case):
    grid, x, *_ = case

    @jax.jit
    def run(deployed, variables, inputs):
        with layers.hardware(deployed):
            return Net().apply(variables, inputs)

    deployed = _deployed(case, COARSE)
    eager = layers.simulate(Net().apply, deployed)(grid, x)
    np.testing.assert_allclose(np.asarray(run(deployed, grid, x)), np.asarray(eager), atol=1e-5)


def test_inputs_for_skipping_are_those_the_layer_saw(case):
    _, _, _, _, inputs = case
    deployed = _deployed(case, IDEAL)
    seen = layers.layer_inputs(inputs["Dense_0"], deployed["Dense_0"], nn.Dense(3))
    assert seen.shape == inputs["Dense_0"].shape and int(seen.max()) == 63
    conv = nn.Conv(4, (3, 2), (2, 1), padding=((1, 0), (1, 1)))
    patches = layers.layer_inputs(inputs["Conv_0"], deployed["Conv_0"], conv)
    assert patches.shape[1] == 3 * 2 * 2
    assert zero_skip.measure(patches, IDEAL).mean <= 6


def test_noise_aware_training_follows_the_plain_gradient(case):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.uniform(0, 1, (8, 12)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(12, 2)) * 0.2, jnp.float32)
    target = jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
    s, t = jnp.asarray(1 / 64, jnp.float32), jnp.asarray(1 / 63, jnp.float32)
    design = IDEAL.but(adc_bits=4)

    @jax.jit
    def step(w, key):
        def loss(w):
            y = aware.train_matmul(x, w, s, t, design, key, Variation(sigma=0.1))
            return jnp.mean((y - target) ** 2), y

        (value, y), g = jax.value_and_grad(loss, has_aux=True)(w)
        return w - 0.1 * g, value, y, g

    _, first, y, g = step(w, jax.random.key(0))
    rounded = np.round(np.asarray(x) * 63) / 63
    np.testing.assert_allclose(np.asarray(g), rounded.T @ np.asarray(y - target) * 2 / 16, atol=1e-5)
    for i in range(40):
        w, value, *_ = step(w, jax.random.key(i))
    assert float(value) < 0.8 * float(first)


def test_refuses(case):
    grid, x, scale, *_ = case
    with pytest.raises(ValueError, match="Dense_0: weights are not multiples"):
        layers.deploy(np.full((2, 2), 0.3), 0.2, IDEAL, 1.0, name="Dense_0")
    with pytest.raises(ValueError, match="input_scale must be positive"):
        layers.deploy(np.ones((2, 2)), 1.0, IDEAL, 0.0)
    deployed = {"Dense_9": _deployed(case, IDEAL)["Dense_0"]}
    with pytest.raises(ValueError, match="called at Dense_9"):
        layers.simulate(Net().apply, deployed)(grid, x)
    with pytest.raises(ValueError, match="Conv_0: inputs are negative"):
        layers.calibrate(Net().apply, IDEAL, grid, -x)
