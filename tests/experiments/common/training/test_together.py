"""Seeds trained as one program end where each ends alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.report.metrics import read_metrics
from experiments.common.training import ConfigError, Display, Diverged, mesh, phases, train_together
from experiments.common.training.job import like

TOLERANCE = 2e-4  # sums are taken in another order; 60 steps of Adam amplify it


def _together(tiny, folder, jobs, plan):
    todo = phases.plan(plan)
    return train_together(jobs, todo, [folder / str(i) for i in range(len(jobs))], Display(1, quiet=True))


def _determined(params):
    """All leaves but the bias that the normalisation after it cancels: its gradient is rounding, which Adam follows."""
    return [w for path, w in jax.tree.leaves_with_path(params) if jax.tree_util.keystr(path[-2:]) != "['a']['bias']"]


def test_every_seed_ends_as_it_does_alone(tiny, finished, tmp_path) -> None:
    first = tiny.job()
    other = dataclasses.replace(
        tiny.job(seed=8), first=first.first._replace(params=jax.tree.map(lambda w: w * 0.9, first.first.params))
    )
    outcomes = _together(tiny, tmp_path, [other, first], tiny.PLAN)
    want, got = finished[1].results, outcomes[1].results
    assert set(want) == set(got)
    for name in want:
        assert got[name].keys() == want[name].keys()
        assert got[name]["end"]["test_loss"] == pytest.approx(want[name]["end"]["test_loss"], rel=TOLERANCE)
    assert outcomes[0].results["dense"] != got["dense"]
    alone, together = (read_metrics(f / "metrics.jsonl") for f in (finished[0], tmp_path / "1"))
    assert [(r["step"], r["phase"], r["epoch"], sorted(r)) for r in together] == [
        (r["step"], r["phase"], r["epoch"], sorted(r)) for r in alone
    ]
    for todo in phases.plan(tiny.PLAN):
        a, b = (
            o.checkpoints.load_weights(todo.name, like(first.first, todo, first.placement))
            for o in (finished[1], outcomes[1])
        )
        for x, y in zip(_determined(a.params), _determined(b.params), strict=True):
            np.testing.assert_allclose(x, y, atol=5e-3)
        if todo.kind == "retrain":
            assert [int(jnp.count_nonzero(b.params["params"][k]["kernel"])) for k in "ab"] == [100, 20]


def test_divergence_names_the_seed(tiny, tmp_path) -> None:
    good = tiny.job()
    bad = dataclasses.replace(good, seed=9, first=jax.tree.map(lambda w: w * jnp.nan, good.first))
    with pytest.raises(Diverged, match=r"phase dense, epoch 1, seeds \[9\]: weights are NaN"):
        _together(tiny, tmp_path, [good, bad], tiny.SHORT)


def test_a_mesh_is_refused(tiny, tmp_path) -> None:
    with pytest.raises(ConfigError, match="leave --mesh out"):
        _together(tiny, tmp_path, [tiny.job(placement=mesh.make("data=2"))], tiny.SHORT)
