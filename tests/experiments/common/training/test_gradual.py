"""Gradual pruning: the cubic, its ends, and that pruned weights stay pruned."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from compressx._retrain import find_state
from compressx.constraints import from_spec, unstructured
from experiments.common.training import gradual, optimizers
from experiments.common.training.config import ConfigError, Fit
from tests.thinning import some

SPECS = [
    {"kind": "unstructured", "density": 0.1, "keep": None, "scope": "leaf"},
    {"kind": "unstructured", "density": None, "keep": 7, "scope": "leaf"},
    {"kind": "filters", "density": None, "keep": 3},
    {"kind": "columns", "density": 0.25, "keep": None},
    {"kind": "channels", "density": None, "keep": 1},
    {"kind": "block", "block": [2, 4], "density": None, "keep": 2},
    {
        "kind": "filters_and_columns",
        "filter_density": None,
        "column_density": 0.5,
        "keep_filters": 2,
        "keep_columns": None,
    },
]
SHAPE = (6, 10)


def _nonzeros(spec) -> int:
    w = jnp.asarray(np.random.default_rng(0).normal(size=SHAPE).astype(np.float32))
    c = from_spec(spec)
    return int(jnp.count_nonzero(c.project(w, c.init(w))))


@pytest.mark.parametrize("spec", some(SPECS[::3], SPECS), ids=lambda s: s["kind"])
def test_everything_stays_at_the_start_and_the_spec_holds_at_the_end(spec) -> None:
    assert _nonzeros(gradual.loosen(spec, SHAPE, 0.0)) == math.prod(SHAPE)
    assert gradual.loosen(spec, SHAPE, 1.0) == spec
    counts = [_nonzeros(gradual.loosen(spec, SHAPE, t)) for t in np.linspace(0, 1, 8)]
    assert counts == sorted(counts, reverse=True)


def test_the_density_is_zhu_and_guptas() -> None:
    for t in (0.0, 0.25, 0.5, 1.0):
        sparsity = 0.9 + (0.0 - 0.9) * (1 - t) ** 3  # their eq. 1 with s_i = 0
        assert gradual.loosen(SPECS[0], SHAPE, t)["density"] == pytest.approx(1 - sparsity)


def test_a_constraint_without_a_density_is_refused() -> None:
    with pytest.raises(ConfigError, match="gradual pruning lowers densities, and 'n_of_m' has none"):
        gradual.check_scalable((("w", {"kind": "n_of_m", "n": 2, "m": 4}),))
    with pytest.raises(ConfigError, match="needs a density, not keep"):
        gradual.check_scalable((("w", {"kind": "unstructured", "keep": 4, "scope": "rule"}),))
    gradual.check_scalable((("w", None), ("v", SPECS[0])))


def test_pruned_weights_stay_pruned_while_training_goes_on(rng) -> None:
    rules = (("w", unstructured(keep=5)),)
    params = {"w": jnp.asarray(rng.normal(size=40).astype(np.float32))}
    tx = optimizers.retraining("adam", Fit(lr=0.05, schedule="constant"), 12, rules)
    state = jax.jit(tx.init)(params)  # dense weights: they come into the set step by step
    gone = np.zeros(40, bool)
    for step in range(1, 13):
        gradient = {"w": jnp.asarray(rng.normal(size=40).astype(np.float32))}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        assert not np.any(np.asarray(params["w"])[gone])
        if step % 3 == 0:
            params, active = gradual.prune(params, rules, step / 12)
            state = gradual.with_active(state, active)
            gone = np.asarray(params["w"]) == 0
            np.testing.assert_array_equal(np.asarray(find_state(state).active["w"]), ~gone)
            assert (~gone).sum() == 5 + math.ceil(35 * gradual.remaining(step / 12))
    assert (~gone).sum() == 5


def test_several_leaves_under_one_threshold(rng) -> None:
    rules = (("[ab]", unstructured(density=0.25, scope="rule")),)
    params = {k: jnp.asarray(rng.normal(size=8).astype(np.float32)) for k in "ab"}
    pruned, active = gradual.prune(params, rules, 1.0)
    assert sum(int(jnp.count_nonzero(w)) for w in pruned.values()) == 4
    assert set(active) == {"[ab]"}
