"""Chunks against the whole, stored matrices against the network, and the arithmetic of the estimates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressx import constraints, formats
from compressx.tree import paths
from experiments.common import models
from experiments.gru_speech.speech import features, rates, streaming
from experiments.gru_speech.speech.features import FrontEnd

RATE = 8_000


@settings(max_examples=6)
@given(st.lists(st.integers(1, 700), min_size=1, max_size=4), st.sampled_from([0, 2]))
def test_chunks_give_the_features_of_the_whole(sizes, derivatives) -> None:
    front = FrontEnd(derivatives=derivatives)
    x = (np.random.default_rng(1).normal(size=1700) * 1000).astype(np.int16)
    state, parts, at = streaming.start(front), [], 0
    for size in [*sizes, len(x)]:
        out, state = streaming.push(state, x[at : at + size], RATE, front, end=at + size >= len(x))
        parts.append(out)
        at += size
        if at >= len(x):
            break
    np.testing.assert_allclose(np.concatenate(parts), features.features(x, RATE, front), atol=2e-3)


def test_frames_come_when_their_look_ahead_is_there() -> None:
    front = FrontEnd()
    out, state = streaming.push(streaming.start(front), np.ones(200 + 3 * 80, np.int16), RATE, front)
    assert len(out) == 0  # four frames are whole, and the first still waits for the fifth
    out, state = streaming.push(state, np.ones(80, np.int16), RATE, front)
    assert len(out) == 1
    assert len(state.static) == 5


@pytest.fixture(scope="module")
def stored():
    """A GRU whose matrices lie in BSP's set, packed; and its parameters."""
    model = models.build("gru", classes=4, hidden=16, layers=2)
    params = model.init(jax.random.key(2), jnp.zeros((1, 1, 6)))
    names = paths(params)
    shapes = {n: w.shape for n, w in zip(names, jax.tree.leaves(params), strict=True) if n[-2] in "wu" and "gru" in n}
    keep = rates.budgets(shapes, 4.0, 2.0)
    final = {name: constraints.from_spec(spec) for name, spec in rates.rules("bsp", shapes, keep)[-1]}
    leaves, packed = [], {}
    for name, w in zip(names, jax.tree.leaves(params), strict=True):
        c = final.get(name)
        w = w if c is None else c.project(w, c.init(w))
        leaves.append(w)
        packed[name] = formats.pack(w, c, () if c is None else c.init(w), "dense" if c is None else "bspc")
    return model, jax.tree.unflatten(jax.tree.structure(params), leaves), packed, keep


def test_steps_from_stored_matrices_are_the_network(stored, rng) -> None:
    model, params, packed, _ = stored
    x = jnp.asarray(rng.normal(size=(2, 5, 6)), jnp.float32)
    want, last = model.apply(params, x, model.start(2), method="stream")
    for way in streaming.ways():
        network = streaming.prepare(packed, way, 2)
        step = streaming.make_step(way)
        have, state = jax.jit(lambda n, s, x, step=step: streaming.run_steps(step, n, s, x))(network, model.start(2), x)
        np.testing.assert_allclose(have, want, atol=1e-5)
        np.testing.assert_allclose(state, last, atol=1e-5)


def test_steps_with_the_reset_after_the_product_are_the_network(rng) -> None:
    model = models.build("gru", classes=4, hidden=8, layers=2, reset="after")
    x = jnp.asarray(rng.normal(size=(3, 5, 6)), jnp.float32)
    params = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape), w.dtype), model.init(jax.random.key(0), x))
    leaves = zip(paths(params), jax.tree.leaves(params), strict=True)
    packed = {name: formats.pack(w, format="dense") for name, w in leaves}
    want, last = model.apply(params, x, model.start(3), method="stream")
    for way in streaming.ways():
        network, step = streaming.prepare(packed, way, 2), streaming.make_step(way, "after")
        have, state = streaming.run_steps(step, network, model.start(3), x)
        np.testing.assert_allclose(have, want, atol=1e-5)
        np.testing.assert_allclose(state, last, atol=1e-5)
    if way == "bspc_native":
        with pytest.raises(ValueError, match="reset='before' is impossible"):
            streaming.run_steps(streaming.make_step(way), network, model.start(3), x)


def test_blocks_are_the_matrix(stored) -> None:
    _, params, packed, keep = stored
    name = "params/gru_1/uh"
    rebuilt = np.zeros((16, 16), np.float32)
    for inputs, outputs, weight in streaming.bspc_blocks(packed[name]):
        rebuilt[np.ix_(inputs, outputs)] += weight
    np.testing.assert_array_equal(rebuilt, params["params"]["gru_1"]["uh"])
    assert sum(w.size for _, _, w in streaming.bspc_blocks(packed[name])) == keep[name].weights
    with pytest.raises(ValueError, match="bspc is needed"):
        streaming.bspc_blocks(packed["params/output/kernel"])


def test_work_counts_what_is_stored(stored) -> None:
    _, params, packed, keep = stored
    done = streaming.work(packed)
    assert done.multiply_adds == sum(k.weights for k in keep.values()) + 16 * 4
    assert done.weight_bytes == sum(formats.nbytes(p) for p in packed.values())
    assert streaming.energy_uj(done) == pytest.approx(
        (4.6 * done.multiply_adds + 160 * done.weight_bytes) * 1e-6
    )
    assert streaming.energy_uj(done, "sram") < streaming.energy_uj(done)
    with pytest.raises(ValueError, match="memory='hbm'"):
        streaming.energy_uj(done, "hbm")


def test_real_time_measures_something(stored) -> None:
    model, _, packed, _ = stored
    front = FrontEnd(coefficients=2, derivatives=2)  # 6 features
    network, step = streaming.prepare(packed, "bspc_xla", 2), streaming.make_step("bspc_xla")
    found = streaming.real_time(network, step, np.ones(1600, np.int16), RATE, front, model.start(1), rounds=2)
    assert found["seconds"] == 0.2
    assert found["factor"] > 0
    assert found["network_factor"] >= found["factor"]
    assert found["delay_ms"] == pytest.approx(25 + 40 + 100)
    assert streaming.quartiles([0.001, 0.002, 0.003]) == (2.0, 1.0, 3.0)
