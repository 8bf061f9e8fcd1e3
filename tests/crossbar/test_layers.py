"""Layers and whole models on crossbars: an ideal engine is the quantized network; noise-aware training learns."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar import aware, layers, network, zero_skip
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


def test_training_through_drawn_devices_lowers_the_loss():
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.uniform(0, 1, (8, 12)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(12, 2)) * 0.2, jnp.float32)
    target = jnp.asarray(rng.normal(size=(8, 2)), jnp.float32)
    s, t = jnp.asarray(1 / 64, jnp.float32), jnp.asarray(1 / 63, jnp.float32)

    @jax.jit
    def step(w, key):
        loss = lambda w: jnp.mean((aware.train_matmul(x, w, s, t, COARSE, key, Variation(sigma=0.1)) - target) ** 2)
        value, g = jax.value_and_grad(loss)(w)
        return w - 0.1 * g, value

    first = step(w, jax.random.key(0))[1]
    for i in range(40):
        w, value = step(w, jax.random.key(i))
    assert float(value) < 0.8 * float(first)


class Shared(nn.Module):
    """One dense layer called twice, on the same and on other numbers of rows, and a grouped convolution."""

    rows: int = 3

    @nn.compact
    def __call__(self, x, train=False):
        layer = nn.Dense(4, name="d", use_bias=False)
        return layer(x) + layer(2 * x), layer(x[:, : self.rows])


def test_a_layer_that_is_called_again_is_calibrated_on_all_of_its_calls():
    x = jnp.asarray(np.random.default_rng(2).uniform(0, 1, (2, 3, 4)), jnp.float32)
    variables = {"params": {"d": {"kernel": jnp.ones((4, 4), jnp.float32)}}}
    scales, seen = layers.calibrate(Shared().apply, IDEAL, variables, x)
    assert scales["d"] == pytest.approx(2 * float(x.max()) / 63)
    np.testing.assert_array_equal(seen["d"], np.concatenate([x, 2 * x, x]))
    _, seen = layers.calibrate(Shared(rows=1).apply, IDEAL, variables, x)
    assert seen["d"].shape == (2 * 3 * 2 + 2, 4)
    with pytest.raises(ValueError, match="d: inputs are negative"):  # in the first call, not in the last
        layers.calibrate(Shared(rows=1).apply, IDEAL, variables, jnp.concatenate([x[:, :1], x[:, 1:] - 2], 1))
    fed = {}
    deployed = {"d": layers.deploy(np.ones((4, 4), np.float32), 1.0, IDEAL, scales["d"])}
    with layers.hardware(deployed, seen=fed):
        Shared().apply(variables, x)
    assert fed["d"][0].shape == (3 * 6, 4)


def test_read_noise_differs_between_calls_groups_and_batches():
    x = jnp.ones((1, 3, 4), jnp.float32)
    design = IDEAL.but(adc=Adc(12))
    weight = np.ones((4, 4), np.float32)
    noisy = network.perturb_network(
        jax.random.key(0),
        {"d": layers.deploy(weight, 1.0, design, 1 / 63, prove=False)},
        Variation(read_noise=3.0),
    )
    variables = {"params": {"d": {"kernel": jnp.asarray(weight)}}}

    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            layer = nn.Dense(4, name="d", use_bias=False)
            return layer(x), layer(x)

    with layers.hardware(noisy):
        first, second = Twice().apply(variables, x)
        again, _ = Twice().apply(variables, x)
    with layers.hardware(noisy):
        anew, _ = Twice().apply(variables, x)
    with layers.hardware(network.read_again(noisy, 1)):
        other, _ = Twice().apply(variables, x)
    assert (first != second).any() and (first != again).any() and (first != other).any()
    np.testing.assert_array_equal(first, anew)  # a context begins anew: the same key gives the same reads
    kernel = np.ones((1, 1, 2, 4), np.float32)
    grouped = layers.deploy(kernel, 1.0, design, 1 / 63, groups=2, prove=False)
    drawn = network.perturb_network(jax.random.key(1), {"c": grouped}, Variation(read_noise=3.0))["c"]
    y = layers.conv(jnp.ones((1, 4, 4, 4), jnp.float32), drawn, (1, 1))
    assert (np.asarray(y[..., :2]) != np.asarray(y[..., 2:])).any()


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
