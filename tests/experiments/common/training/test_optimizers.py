"""Learning rates against plain formulas; where ADMM and retraining stand in the chain."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compressx._admm_state import find_state
from compressx.constraints import unstructured
from experiments.common.training import optimizers
from experiments.common.training.config import Admm, ConfigError, Fit

RULES = (("w", unstructured(keep=2)),)
PARAMS = {"w": jnp.array([[3.0, -2.0], [1.0, 0.5]]), "b": jnp.array([1.0, 2.0])}
GRADIENT = {"w": jnp.array([[0.1, -0.2], [0.3, 0.4]]), "b": jnp.array([0.5, -0.5])}


def _rates(fit: Fit, steps: int) -> np.ndarray:
    schedule = optimizers.learning_rate(fit, steps)
    return np.array([float(schedule(i)) for i in range(steps)])


def test_constant() -> None:
    np.testing.assert_allclose(_rates(Fit(lr=0.3, schedule="constant"), 5), np.full(5, 0.3), rtol=1e-6)


def test_cosine_restarts_in_every_cycle() -> None:
    rates = _rates(Fit(lr=0.2, final=0.1, cycles=2), 20)
    want = [0.2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * i / 10))) for i in range(10)]
    np.testing.assert_allclose(rates, want * 2, rtol=1e-5)
    assert rates.min() > 0


def test_piecewise_drops_at_its_boundaries() -> None:
    rates = _rates(Fit(lr=1.0, schedule="piecewise", boundaries=(0.5, 0.8), drop=0.1), 10)
    np.testing.assert_allclose(rates, [1.0] * 5 + [0.1] * 3 + [0.01] * 2, rtol=1e-5)


def test_warm_up_rises_linearly_before_the_schedule() -> None:
    rates = _rates(Fit(lr=1.0, schedule="constant", warmup=0.4), 10)
    np.testing.assert_allclose(rates, [0.25, 0.5, 0.75, 1.0] + [1.0] * 6, rtol=1e-6)


def test_weight_decay_spares_vectors() -> None:
    tx = optimizers.dense("sgd", Fit(lr=0.1, schedule="constant", weight_decay=0.5), 10)
    zero = jax.tree.map(jnp.zeros_like, PARAMS)
    updates, _ = tx.update(zero, tx.init(PARAMS), PARAMS)
    np.testing.assert_allclose(updates["w"], -0.1 * 0.5 * PARAMS["w"], rtol=1e-6)
    np.testing.assert_array_equal(updates["b"], 0.0)


def _adam_direction(gradient: np.ndarray) -> np.ndarray:
    return gradient / (np.abs(gradient) + 1e-8)  # the first step of Adam, whatever its decays


@pytest.mark.parametrize("decoupled", [False, True])
def test_the_penalty_is_normalised_unless_decoupled(decoupled: bool) -> None:
    fit = Admm(lr=0.01, schedule="constant", rho=0.7, rho_schedule="constant", every=5, decoupled=decoupled)
    tx = optimizers.constrained("adam", fit, 10, 10, RULES, None)
    updates, _ = tx.update(GRADIENT, tx.init(PARAMS), PARAMS)
    w, g = np.asarray(PARAMS["w"]), np.asarray(GRADIENT["w"])
    z = np.array([[3.0, -2.0], [0.0, 0.0]])
    pull = 0.7 * (w - z)
    want = _adam_direction(g) + pull if decoupled else _adam_direction(g + pull)
    np.testing.assert_allclose(updates["w"], -0.01 * want, rtol=1e-4)


def test_a_later_stage_stays_inside_the_one_before() -> None:
    start = {"w": jnp.array([[3.0, 0.0], [1.0, 0.5]]), "b": PARAMS["b"]}
    within = (("w", unstructured(keep=3)),)
    tx = optimizers.constrained("adam", Admm(lr=0.1, every=2), 10, 10, RULES, within)
    state, params = tx.init(start), start
    for _ in range(5):
        updates, state = tx.update(GRADIENT, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(np.asarray(params["w"]) != 0, np.asarray(start["w"]) != 0)


def test_staged_rho_takes_its_stages_in_equal_parts() -> None:
    fit = Admm(lr=1e-3, rho=0.01, rho_factor=10.0, rho_stages=3, every=2)
    tx = optimizers.constrained("adam", fit, 24, 24, RULES, None)
    state, seen = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for _ in range(24):
        seen.append(float(find_state(state).rho["w"]))
        _, state = update(GRADIENT, state, PARAMS)
    np.testing.assert_allclose(seen, np.repeat([0.01, 0.1, 1.0], 8), rtol=1e-5)


def test_rho_by_leaf() -> None:
    fit = Admm(rho=(("w", 0.5),), rho_schedule="constant", every=1)
    tx = optimizers.constrained("adam", fit, 4, 4, RULES, None)
    assert float(find_state(tx.init(PARAMS)).rho["w"]) == 0.5


def test_a_phase_too_short_for_an_update_is_refused() -> None:
    with pytest.raises(ConfigError, match="every=9 steps between updates is more than the 8 steps"):
        optimizers.check_due(Admm(every=9), 8, 4)
    optimizers.check_due(Admm(every=8), 8, 4)
    optimizers.check_due(Admm(), 0, 4)
    assert optimizers.every(Admm(), 4) == 4


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer='lion'"):
        optimizers.dense("lion", Fit(), 1)
