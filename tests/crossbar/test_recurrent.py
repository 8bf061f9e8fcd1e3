"""Recurrent networks on engines: every matrix found and used once a step, products as NumPy loops have them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar import aware, chips, cost, layers, mapping, network
from compressx.crossbar.design import Adc, Design
from compressx.crossbar.noise import Variation
from compressx.crossbar.sot_mram import Operands
from experiments.common import models
from experiments.common.models.lstm import LanguageModel
from tests.thinning import some

DESIGN = Design(
    rows=16, cols=64, active_rows=4, input_bits=5, inputs="sign_planes", weight_bits=4, adc=Adc(3, encoding="flip"),
    signs="differential_digital",
)  # fmt: skip
T, N, IN, H = 5, 2, 4, 6
MATRICES = ("wz", "wr", "wh", "uz", "ur", "uh")


def _gru(reset):
    model = models.build("gru", classes=3, hidden=H, layers=2, reset=reset)
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(N, T, IN)), jnp.float32)
    variables = jax.tree.map(
        lambda w: jnp.asarray(rng.normal(size=w.shape) * 0.4, jnp.float32), jax.jit(model.init)(jax.random.key(0), x)
    )
    return model, variables, x


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))


def _loop(params, x, reset, scales):
    """The GRU's formulas in float64, the inputs of every product rounded to multiples of their scale, -31..31."""

    def times(path, v, w):
        s = scales.get(path)
        return (v if s is None else np.clip(np.rint(v / s), -31, 31) * s) @ np.asarray(w, np.float64)

    out = np.asarray(x, np.float64)
    for name in ("gru_0", "gru_1"):
        p = {k: np.asarray(v, np.float64) for k, v in params[name].items()}
        h, states = np.zeros((N, H)), []
        for t in range(T):
            m = lambda k, v, name=name, p=p: times(f"{name}/{k}", v, p[k])
            z = _sigmoid(m("wz", out[:, t]) + m("uz", h) + p["bz"])
            r = _sigmoid(m("wr", out[:, t]) + m("ur", h) + p["br"])
            inner = m("uh", r * h) if reset == "before" else r * (m("uh", h) + p["bu"])
            h = z * h + (1 - z) * np.tanh(m("wh", out[:, t]) + inner + p["bh"])
            states.append(h)
        out = np.stack(states, 1)
    return times("output", out, params["output"]["kernel"]) + np.asarray(params["output"]["bias"], np.float64)


@pytest.mark.parametrize("reset", ["before", "after"])
def test_every_matrix_of_a_gru_is_mapped_and_used_once_a_step(reset):
    model, variables, x = _gru(reset)
    variables["params"]["gru_1"]["uh"] = variables["params"]["gru_1"]["uh"].at[2].set(0)
    found = network.find_layers(model.apply, variables, x[:1])
    p = variables["params"]
    cells = {g: {k: p[g][k] for k in MATRICES} for g in ("gru_0", "gru_1")}
    want = [layer for g, kernels in cells.items() for layer in mapping.recurrent_layers(g, kernels, T)]
    want.append(mapping.dense_layer("output", p["output"]["kernel"], T))
    assert [(layer.name, layer.uses) for layer in found] == [(layer.name, layer.uses) for layer in want]
    for ours, theirs in zip(found, want, strict=True):
        np.testing.assert_array_equal(ours.kept, theirs.kept)
    mapped = mapping.map_network(found, DESIGN)
    assert {m.name: m.kept_rows for m in mapped}["gru_1/uh"] == (H - 1,)
    plan = cost.plan(mapped, DESIGN, chips.isaac_chip())
    assert plan.operations == 2 * T * (3 * IN * H + 3 * H * H + 6 * H * H + 3 * H)


def test_a_language_model_is_mapped_without_its_table():
    model = LanguageModel(classes=7, hidden=4, embedding=3)
    words = jnp.zeros((1, 6), jnp.int32)
    variables = model.init(jax.random.key(0), words)
    found = network.find_layers(model.apply, variables, words)
    assert [(layer.name, layer.kept.shape, layer.uses) for layer in found] == [
        ("lstm_0/input", (1, 3, 16), 6),
        ("lstm_0/recurrent", (1, 4, 16), 6),
        ("lstm_1/input", (1, 4, 16), 6),
        ("lstm_1/recurrent", (1, 4, 16), 6),
        ("softmax", (1, 4, 7), 6),
    ]


@pytest.mark.parametrize("reset", some(["after"], ["before", "after"]))
def test_a_simulated_gru_is_the_loop_with_rounded_inputs(reset):
    model, variables, x = _gru(reset)
    names = [layer.name for layer in network.find_layers(model.apply, variables, x[:1])]
    grid = network.on_grid(variables, dict.fromkeys(names, network.levels_of(DESIGN)))
    scales, inputs = layers.calibrate(model.apply, DESIGN, grid.variables, x)
    assert set(scales) == set(names) and inputs["gru_0/uh"].shape == (T, N, H)
    assert all(scales[p] == pytest.approx(float(np.abs(inputs[p]).max()) / 31) for p in names)
    deployed = network.deploy_network(grid, dict.fromkeys(names, DESIGN), scales)
    got = jax.jit(lambda v, x: layers.simulate(model.apply, deployed)(v, x))(grid.variables, x)
    want = _loop(grid.variables["params"], x, reset, scales)
    np.testing.assert_allclose(got, want, atol=2e-4)
    plain = np.asarray(jax.jit(model.apply)(grid.variables, x))
    assert np.abs(np.asarray(got) - plain).max() > 1e-3  # the rounding shows
    some = {p: d for p, d in deployed.items() if p in ("gru_0/uz", "gru_1/wh")}
    got = jax.jit(layers.simulate(model.apply, some))(grid.variables, x)
    np.testing.assert_allclose(got, _loop(grid.variables["params"], x, reset, {p: scales[p] for p in some}), atol=2e-4)
    bits = {p: Operands(8, 5, True) for p in some}  # 5 bits hold -15..15
    planes = network.deploy_network(grid, bits, {p: scales[p] / 4 for p in some})
    np.testing.assert_allclose(jax.jit(layers.simulate(model.apply, planes))(grid.variables, x), plain, atol=0.05)


def test_what_recurrent_word_lines_see_is_every_step():
    model, variables, x = _gru("before")
    path = "gru_0/ur"
    grid = network.on_grid(variables, {path: network.levels_of(DESIGN)})
    scales, inputs = layers.calibrate(model.apply, DESIGN, grid.variables, x)
    deployed = network.deploy_network(grid, {path: DESIGN.but(encoding="saturating", adc_bits=1)}, scales)
    observe = network.make_observer(model.apply)
    seen = observe(deployed, grid.variables, x)
    assert set(seen) == {path} and seen[path][0].shape == (T * N, H)
    np.testing.assert_array_equal(np.asarray(seen[path][0][:N]), 0)  # the state before anything was heard
    clipped, conversions = network.saturated(observe, deployed, grid.variables, x)[path]
    assert 0 < clipped < conversions
    assert network.skipping(observe, deployed, grid.variables, [x], {path: [DESIGN]})[path][0].inputs == T * N


def test_an_lstm_through_an_engine_of_many_bits_is_the_lstm():
    model = LanguageModel(classes=7, hidden=4, embedding=3)
    words = jnp.asarray([[1, 2, 3, 4, 0, 6]], jnp.int32)
    variables = jax.tree.map(lambda w: 8 * w, jax.jit(model.init)(jax.random.key(0), words))
    fine = DESIGN.but(input_bits=12, weight_bits=12, cols=128)
    names = [layer.name for layer in network.find_layers(model.apply, variables, words)]
    grid = network.on_grid(variables, dict.fromkeys(names, network.levels_of(fine)))
    scales, _ = layers.calibrate(model.apply, fine, grid.variables, words)
    deployed = network.deploy_network(grid, dict.fromkeys(names, fine), scales)
    got = jax.jit(layers.simulate(model.apply, deployed))(grid.variables, words)[0]
    want = jax.jit(model.apply)(grid.variables, words)[0]
    np.testing.assert_allclose(got, want, atol=5e-3)
    assert float(jnp.std(want)) > 0.1


class Own(nn.Module):
    """A dense layer, and a product with a weight that no layer holds."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(3, name="d")(x) @ self.param("mix", nn.initializers.ones, (3, 2))


class Tied(nn.Module):
    """An embedding that is also the last layer."""

    @nn.compact
    def __call__(self, x):
        table = nn.Embed(5, 3, name="table")
        return table.attend(table(x))


def test_a_weight_that_no_layer_holds_is_an_error_that_names_it():
    x = jnp.ones((1, 4))
    with pytest.raises(ValueError, match="mix: no Dense, Conv or recurrent layer that was called holds these weights"):
        network.find_layers(Own().apply, Own().init(jax.random.key(0), x), x)
    words = jnp.zeros((1, 2), jnp.int32)
    with pytest.raises(ValueError, match="table/embedding: no Dense"):
        network.find_layers(Tied().apply, Tied().init(jax.random.key(0), words), words)


def test_what_recurrent_layers_cannot_do_is_said():
    model, variables, x = _gru("before")
    grid = network.on_grid(variables, {"gru_0/wz": network.levels_of(DESIGN)})
    deployed = network.deploy_network(grid, {"gru_0/wz": DESIGN}, {"gru_0/wz": 0.1}, prove=False)
    with pytest.raises(ValueError, match="recurrent matrix of the model was called at gru_0/wx"):
        layers.simulate(model.apply, {"gru_0/wx": deployed["gru_0/wz"]})(grid.variables, x)
    noisy = network.perturb_network(jax.random.key(0), deployed, Variation(read_noise=0.1))
    with pytest.raises(ValueError, match="gru_0/wz: read noise is not simulated in recurrent layers"):
        layers.simulate(model.apply, noisy)(grid.variables, x)
    drawn = network.perturb_network(jax.random.key(0), deployed, Variation("lognormal", 0.3))
    got, ideal = (jax.jit(layers.simulate(model.apply, d))(grid.variables, x) for d in (drawn, deployed))
    assert np.abs(np.asarray(got - ideal)).max() > 1e-4
    targets = {"gru_0/wz": aware.Target(DESIGN, 0.1, 0.1)}
    with aware.training_hardware(targets, jax.random.key(0)), pytest.raises(ValueError, match="gru_0/wz: recurrent"):
        model.apply(grid.variables, x)
