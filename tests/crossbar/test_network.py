"""Whole networks: layers as the mapping has them, weights on levels, scores, activations, noise-aware training."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.constraints.levels import Levels
from compressx.crossbar import layers, mapping, network, zero_skip
from compressx.crossbar.aware import Target, training_hardware
from compressx.crossbar.design import Adc, Design
from compressx.crossbar.noise import Variation, monte_carlo
from compressx.crossbar.sot_mram import Operands

DESIGN = Design(
    rows=16, cols=32, active_rows=4, input_bits=6, weight_bits=4, adc=Adc(3, encoding="flip"),
    signs="differential_digital",
)  # fmt: skip
SHAPE = (6, 6, 2)


class Net(nn.Module):
    """A convolution, a grouped one, a dense layer that is called twice, and one for the logits."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(4, (3, 3), (2, 2), name="a")(x))
        x = nn.relu(nn.Conv(6, (2, 2), feature_group_count=2, padding="VALID", name="b")(x))
        again = nn.Dense(24, name="c")
        x = nn.relu(again(nn.relu(again(x.reshape(x.shape[0], -1)))))
        return nn.Dense(3, name="d")(x)


GROUPS = {"b": 2}


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    images = rng.uniform(0, 1, (10, *SHAPE)).astype(np.float32)
    variables = jax.jit(Net().init)(jax.random.key(1), jnp.asarray(images[:1]))
    grid = network.on_grid(variables, dict.fromkeys("abcd", network.levels_of(DESIGN)))
    scales, _ = layers.calibrate(Net().apply, DESIGN, grid.variables, jnp.asarray(images))
    labels = np.asarray(jnp.argmax(Net().apply(grid.variables, jnp.asarray(images)), -1), np.int32)
    return variables, grid, scales, images, labels


def _deploy(case, design, prove=True):
    _, grid, scales, *_ = case
    return network.deploy_network(grid, dict.fromkeys("abcd", design), scales, groups=GROUPS, prove=prove)


def test_found_layers_are_those_of_the_mapping(case):
    variables = case[0]
    found = {layer.name: layer for layer in network.find_layers(Net().apply, variables, jnp.zeros((1, *SHAPE)))}
    kernels = {path: np.asarray(network.kernel(variables, path)) for path in "abcd"}
    a = mapping.conv_layer("a", kernels["a"], (6, 6), (2, 2))
    b = mapping.conv_layer("b", kernels["b"], (3, 3), padding="VALID", groups=2)
    want = {"a": a, "b": b, "c": mapping.dense_layer("c", kernels["c"], 2), "d": mapping.dense_layer("d", kernels["d"])}
    assert list(found) == list("abcd")
    for path, layer in want.items():
        assert found[path].uses == layer.uses, path
        np.testing.assert_array_equal(found[path].kept, layer.kept)
    with pytest.raises(ValueError, match="leading axis of 1"):
        network.find_layers(Net().apply, variables, jnp.zeros((2, *SHAPE)))


def test_weights_on_levels_are_exact_multiples_and_stay(case):
    variables, grid, *_ = case
    for path in "abcd":
        w, step = np.asarray(network.kernel(grid.variables, path), np.float64), grid.scales[path]
        whole = np.rint(w / step)
        np.testing.assert_array_equal(whole * step, w)
        assert np.abs(whole).max() <= 15
        before = np.asarray(network.kernel(variables, path), np.float64)
        inside = np.abs(before) <= 15.5 * step  # the few largest may be cut
        assert np.abs(w - before)[inside].max() <= step * 0.501 and inside.mean() > 0.9
    again = network.on_grid(grid.variables, dict.fromkeys("abcd", network.levels_of(DESIGN)), grid.scales)
    jax.tree.map(np.testing.assert_array_equal, again.variables, grid.variables)
    assert network.levels_of(DESIGN.but(signs="offset")) == Levels(4, "uniform", zero_level=True)


def test_scores_count_correct_predictions_and_no_filling(case):
    _, grid, _, images, labels = case
    score = network.make_scorer(Net().apply)
    batched = network.batches(images, labels, 4)
    assert [len(y) for _, y in batched] == [4, 4, 4] and int((np.asarray(batched[-1][1]) == -1).sum()) == 2
    assert network.accuracy(score, {}, grid.variables, batched) == 1.0
    flip = _deploy(case, DESIGN)
    assert network.proven_share(flip) == 1.0
    with layers.hardware(flip):
        logits = np.asarray(Net().apply(grid.variables, jnp.asarray(images)))
    want = float((logits.argmax(-1) == labels).mean())
    assert network.accuracy(score, flip, grid.variables, batched) == want >= 0.8
    with pytest.raises(ValueError, match="nothing to score"):
        network.batches(images[:0], labels[:0], 4)


def test_what_word_lines_see_is_measured_in_batches_as_whole(case):
    _, grid, _, images, _ = case
    deployed, observe = _deploy(case, DESIGN), network.make_observer(Net().apply)
    seen = observe(deployed, grid.variables, jnp.asarray(images))
    assert {p: [v.shape for v in each] for p, each in seen.items()}["b"] == [(40, 8), (40, 8)]
    assert int(seen["a"][0].max()) == 63
    designs = {path: [DESIGN, DESIGN.but(active_rows=8)] for path in "ad"}
    batched = [jnp.asarray(images[:5]), jnp.asarray(images[5:])]
    found = network.skipping(observe, deployed, grid.variables, batched, designs)
    whole = zero_skip.measure(seen["a"][0], DESIGN, "a")
    np.testing.assert_array_equal(found["a"][0].histogram, whole.histogram)
    assert found["a"][0].mean_slowest == pytest.approx(whole.mean_slowest) and found["a"][0].inputs == 90
    assert found["d"][0].mean <= found["d"][1].mean
    clipping = _deploy(case, DESIGN.but(adc=Adc(2)))
    counted = network.saturated(observe, clipping, grid.variables, jnp.asarray(images[:2]))
    assert set(counted) == set("abcd") and any(c for c, _ in counted.values())
    assert all(0 <= c <= n for c, n in counted.values())


def test_devices_are_drawn_layer_by_layer_and_from_the_key_alone(case):
    _, grid, _, images, labels = case
    deployed, score = _deploy(case, DESIGN, prove=False), network.make_scorer(Net().apply)
    batched = network.batches(images, labels, 5)
    ideal = network.accuracy(score, deployed, grid.variables, batched)
    metric = network.noisy_accuracy(score, deployed, grid.variables, batched, Variation(sigma=1.5))
    found = monte_carlo(metric, jax.random.key(0), 4, batch=2)
    first = network.perturb_network(jax.random.split(jax.random.key(0), 4)[0], deployed, Variation(sigma=1.5))
    assert found.values[0] == pytest.approx(network.accuracy(score, first, grid.variables, batched))
    assert found.mean < ideal and len(set(found.values)) > 1


def test_sot_planes_run_the_same_network(case):
    _, grid, _, images, _ = case
    scales, _ = layers.calibrate(Net().apply, DESIGN.but(input_bits=8), grid.variables, jnp.asarray(images))
    operands = dict.fromkeys("abcd", Operands(8, 5))
    deployed = network.deploy_network(grid, operands, scales, groups=GROUPS)
    with layers.hardware(deployed):
        logits = Net().apply(grid.variables, jnp.asarray(images))
    plain = np.asarray(Net().apply(grid.variables, jnp.asarray(images)))
    np.testing.assert_allclose(np.asarray(logits), plain, atol=0.05)
    with pytest.raises(ValueError, match="no devices to draw"):
        network.perturb_network(jax.random.key(0), deployed, Variation(sigma=0.1))


def test_training_through_drawn_devices_lowers_the_loss_on_new_ones(case):
    _, _, _, images, labels = case

    class Small(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Conv(3, (3, 3), (2, 2), name="a")(x))
            return nn.Dense(3, name="d")(x.reshape(x.shape[0], -1))

    params = jax.jit(Small().init)(jax.random.key(0), jnp.asarray(images[:1]))
    targets = {"a": Target(DESIGN, 0.06, 1 / 63), "d": Target(DESIGN, 0.06, 2 / 63)}

    def loss(params, key):
        with training_hardware(targets, key, Variation(sigma=0.2)):
            logits = Small().apply(params, jnp.asarray(images))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(labels)[:, None], 1))

    step = jax.jit(jax.value_and_grad(loss))
    new = [jax.random.key(1000 + i) for i in range(4)]
    before = np.mean([float(step(params, k)[0]) for k in new])
    assert float(step(params, new[0])[0]) != float(step(params, new[1])[0])  # other devices in every step
    for i in range(30):
        _, g = step(params, jax.random.key(i))
        params = jax.tree.map(lambda p, d: p - 0.2 * d, params, g)
    assert np.mean([float(step(params, k)[0]) for k in new]) < 0.8 * before
