"""Seeds trained as one program end where each ends alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.report.metrics import read_metrics
from compressx.training import Admm, ConfigError, Display, Diverged, Fit, Plan, Stage, mesh, phases, train_together
from compressx.training.job import like

# Sums are taken in another order. Over instruction sets from SSE4.2 to AVX2, both levels of optimization and two
# releases of XLA, figures and weights differed by up to 2e-7.
TOLERANCE = 2e-5


def _few(tiny):
    """Every kind of phase, two steps an epoch."""
    admm = Admm(epochs=3, lr=1e-2, rho=1e-1, every=2)
    stage = Stage(tiny.rules(100, 20), admm, Fit(epochs=1, lr=3e-3, distill=0.5))
    return Plan(dense=Fit(epochs=2, lr=1e-2), stages=(stage,), baselines=("gradual",))


def _together(folder, jobs, plan):
    todo = phases.plan(plan)
    return train_together(jobs, todo, [folder / str(i) for i in range(len(jobs))], Display(1, quiet=True))


def _two(first):
    """The job, and before it one of another seed that starts from other weights."""
    smaller = jax.tree.map(lambda w: w * 0.9, first.first.params)
    return [dataclasses.replace(first, seed=8, first=first.first._replace(params=smaller)), first]


def _compare(alone, together, figures=frozenset({"loss", "test_loss", "primal", "dual"})) -> None:
    """The records of two folders, epoch by epoch."""
    records = [read_metrics(folder / "metrics.jsonl") for folder in (alone, together)]
    first, second = ([(r["step"], r["phase"], r["epoch"], sorted(r)) for r in each] for each in records)
    assert first == second
    for a, b in zip(*records, strict=True):
        for name in figures & a.keys():
            got, want = (jax.tree.leaves(record[name]) for record in (b, a))
            np.testing.assert_allclose(got, want, rtol=TOLERANCE, err_msg=f"{name} of {a}")


def test_every_seed_ends_as_it_does_alone(tiny, tmp_path) -> None:
    first, plan = tiny.few_steps(), _few(tiny)
    alone = tiny.run(tmp_path / "alone", plan=plan, make=tiny.few_steps)
    outcomes = _together(tmp_path, _two(first), plan)
    assert {k: v.keys() for k, v in alone.results.items()} == {k: v.keys() for k, v in outcomes[1].results.items()}
    assert outcomes[0].results["dense"] != outcomes[1].results["dense"]
    _compare(tmp_path / "alone", tmp_path / "1")
    for todo in phases.plan(plan):
        a, b = (
            o.checkpoints.load_weights(todo.name, like(first.first, todo, first.placement))
            for o in (alone, outcomes[1])
        )
        for x, y in zip(jax.tree.leaves(a[:2]), jax.tree.leaves(b[:2]), strict=True):
            np.testing.assert_allclose(x, y, atol=TOLERANCE, rtol=0)
        if todo.kind == "retrain":
            assert [int(jnp.count_nonzero(b.params["params"][k]["kernel"])) for k in "ab"] == [100, 20]


def test_adam_starts_as_it_does_alone(tiny, tmp_path) -> None:
    """The losses of three steps, of which the last two see what Adam made of its moments and its count.

    After training, `a`'s bias has gone up or down as rounding had it: normalisation cancels it, so its gradient is
    rounding alone, and Adam makes a whole step of that. Training does not see it; running means, and test losses, do.
    """
    plan = Plan(Fit(epochs=1, lr=1e-2), ())
    told = {"optimizer": "adam", "train": {k: v[:48] for k, v in tiny.job().train.items()}}
    tiny.run(tmp_path / "alone", plan=plan, make=tiny.few_steps, **told)
    _together(tmp_path, _two(tiny.few_steps(**told)), plan)
    _compare(tmp_path / "alone", tmp_path / "1", {"loss"})


def test_divergence_names_the_seed(tiny, tmp_path) -> None:
    good = tiny.job()
    bad = dataclasses.replace(good, seed=9, first=jax.tree.map(lambda w: w * jnp.nan, good.first))
    with pytest.raises(Diverged, match=r"phase dense, epoch 1, seeds \[9\]: weights are NaN"):
        _together(tmp_path, [good, bad], tiny.SHORT)


def test_a_mesh_is_refused(tiny, tmp_path) -> None:
    with pytest.raises(ConfigError, match="leave --mesh out"):
        _together(tmp_path, [tiny.job(placement=mesh.make("data=2"))], tiny.SHORT)
