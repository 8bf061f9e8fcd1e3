"""The paper's counting: 9,556,992 weights, rates as released; the sets of both BSP steps hold what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import constraints
from compressx.constraints.bsp import strip_sizes
from experiments.common import models
from experiments.gru_speech.speech import rates

PAPER = {
    f"params/gru_{i}/{kind}{g}": (39 if (i, kind) == (0, "w") else 1024, 1024)
    for i in range(2)
    for kind in "wu"
    for g in "zrh"
}


def test_the_papers_matrices_are_the_networks() -> None:
    model = models.build("gru", classes=48)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1, 39))))["params"]
    mine = {f"params/{k}/{n}": w.shape for k in ("gru_0", "gru_1") for n, w in shapes[k].items() if n[0] in "wu"}
    assert mine == PAPER
    assert sum(a * b for a, b in PAPER.values()) == 9_556_992


@pytest.mark.parametrize("rate", sorted(rates.ROW_RATES))
def test_budgets_keep_the_rate_and_use_it_up(rate) -> None:
    exact, _ = rates.RELEASED[rate]
    keep = rates.budgets(PAPER, rate, rates.ROW_RATES[rate])
    kept = sum(k.weights for k in keep.values())
    assert rate <= 9_556_992 / kept < 1.002 * rate
    assert abs(exact / rate - 1) < 0.02  # the released models' names are their rates to 2 %
    assert all(1 <= k.columns <= PAPER[n][0] and 1 <= k.rows <= PAPER[n][1] for n, k in keep.items())
    assert (rates.columns_first(PAPER, keep)) == (rate != 10)  # the 10x model fits the rows step alone


def test_impossible_rates_are_refused() -> None:
    for rate, rows in ((0.5, 1.0), (10.0, 20.0), (10.0, 0.5), (1e7, 10.0)):
        with pytest.raises(ValueError, match="is impossible for 9556992 weights in 12 matrices"):
            rates.budgets(PAPER, rate, rows)


SMALL = {"a": (6, 8), "b": (8, 8)}


@pytest.mark.parametrize("structure", rates.STRUCTURES)
def test_every_structure_keeps_about_the_same_number(structure, rng) -> None:
    shapes = {"a": (24, 32)}
    keep = rates.budgets(shapes, 8.0, 2.0)
    last = rates.rules(structure, shapes, keep, block=4)[-1]
    for name, spec in last:
        c = constraints.from_spec(spec)
        w = jnp.asarray(rng.normal(size=shapes[name]), jnp.float32)
        kept = np.count_nonzero(jax.jit(lambda w, c=c: c.project(w, c.init(w)))(w))
        if structure in ("bsp", "unstructured", "coarse"):
            assert kept <= keep[name].weights
        if structure == "unstructured":
            assert kept == keep[name].weights
        assert 0.4 * keep[name].weights <= kept <= 1.7 * keep[name].weights
    with pytest.raises(ValueError, match="structure='bps'"):
        rates.rules("bps", shapes, keep)


def test_both_steps_hold_structure_and_step_2_revives_nothing(rng) -> None:
    keep = rates.budgets(SMALL, 4.0, 2.0)
    first, second = rates.rules("bsp", SMALL, keep, strips=4)
    for (name, one), (_, two) in zip(first, second, strict=True):
        step_1, step_2 = constraints.from_spec(one), constraints.from_spec(two)
        w = jnp.asarray(rng.normal(size=SMALL[name]), jnp.float32)
        z1 = np.asarray(step_1.project(w, step_1.init(w)))
        at = 0
        for size in strip_sizes(SMALL[name][1], 4):  # the papers' rows are our second axis
            alive = (z1[:, at : at + size] != 0).sum(axis=1)
            assert set(alive.tolist()) <= {0, size}  # a column lives or dies in a strip as a whole
            assert np.count_nonzero(alive) == keep[name].columns
            at += size
        trained = jnp.asarray(np.where(z1 != 0, z1 + rng.normal(size=z1.shape), 0), jnp.float32)  # inside step 1
        z2 = np.asarray(step_2.project(trained, step_2.init(trained)))
        assert np.all(z2[z1 == 0] == 0)
        assert np.count_nonzero(z2.any(axis=0)) == keep[name].rows
        assert np.count_nonzero(z2) == keep[name].weights
        chained = constraints.from_spec({"kind": "bsp_rows", "keep": keep[name].rows, "chained": True})
        np.testing.assert_array_equal(z2, chained.project(trained, chained.init(jnp.asarray(z1))))
        np.testing.assert_array_equal(z2, step_2.project(jnp.asarray(z2), step_2.init(jnp.asarray(z2))))
