"""A whole run: its records, its phases, stopping and going on, and training that diverges."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.report.metrics import read_metrics
from experiments.common.training import ConfigError, Diverged, Fit, Interrupted, phases, total_steps
from experiments.common.training.config import Admm, Stage
from experiments.common.training.job import like


def _weights(tiny, outcome, name):
    todo = phases.plan(tiny.PLAN)
    phase = next(p for p in todo if p.name == name)
    return outcome.checkpoints.load_weights(name, like(tiny.job().first, phase, tiny.job().placement))


def test_records_and_results(tiny, finished) -> None:
    folder, outcome = finished
    records = read_metrics(folder / "metrics.jsonl")
    epochs = {p.name: p.fit.epochs for p in phases.plan(tiny.PLAN)}
    assert epochs == {"dense": 2, "admm": 3, "retrain": 1, "gradual": 3, "gradual_retrain": 1}
    for name, count in epochs.items():
        mine = [r for r in records if r["phase"] == name]
        assert [r["epoch"] for r in mine] == list(range(count + 1))  # 0 is what it starts from
        assert mine[-1]["accuracy"] == outcome.results[name]["end"]["accuracy"]
    assert records[-1]["step"] == total_steps(tiny.job(), phases.plan(tiny.PLAN)) == 60
    assert [sorted(r["primal"]) for r in records if "primal" in r] == [["params/a/kernel", "params/b/kernel"]] * 3
    assert all(r["accuracy"] == round(r["accuracy"] * 50) / 50 for r in records)  # whole examples of 50


def test_the_rules_hold_exactly_after_retraining(tiny, finished) -> None:
    for name in ("retrain", "gradual_retrain"):
        params = _weights(tiny, finished[1], name).params["params"]
        assert [int(jnp.count_nonzero(params[k]["kernel"])) for k in "ab"] == [100, 20]
    dense = _weights(tiny, finished[1], "dense").params["params"]
    assert all(jnp.count_nonzero(dense[k]["kernel"]) == dense[k]["kernel"].size for k in "ab")


def test_hardening_is_what_retraining_starts_from(tiny, finished) -> None:
    admm = _weights(tiny, finished[1], "admm")
    rules = phases.build_rules(tiny.PLAN.stages[0].rules)
    hard = phases.harden(admm, rules)
    figures = _evaluate(tiny, hard)
    assert finished[1].results["retrain"]["start"]["accuracy"] == figures["accuracy"]
    end = _weights(tiny, finished[1], "retrain").params["params"]
    for k in "ab":  # retraining moved inside the support that hardening chose
        np.testing.assert_array_equal(end[k]["kernel"] != 0, hard.params["params"][k]["kernel"] != 0)


def _evaluate(tiny, weights):
    from experiments.common.training.state import make_evaluate

    job = tiny.job()
    data = {k: jnp.asarray(v) for k, v in job.test.items()}
    return make_evaluate(job.task, 7)(weights.params, weights.batch_stats, data)


def _crc(folder: Path) -> dict[str, int]:
    """Checksums of the weights that every phase left."""
    found = sorted((folder / "checkpoints" / "weights").iterdir())
    return {p.name: json.loads((p / "meta" / "metadata").read_text())["crc32"] for p in found}


def _child(tiny, folder: Path, when: str) -> int:
    """A process of its own, compiled as this one: its run is bit for bit what a run in here would be."""
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[4])}
    command = [sys.executable, tiny.__file__, str(folder), when]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


# in every kind of phase, inside the first save of a session and inside a later one
@pytest.mark.parametrize(
    "moments",
    [("22", "save:2"), pytest.param(("7", "22", "save:2", "34", "save:1", "47"), marks=pytest.mark.slow)],
)
def test_killed_at_any_step_it_ends_with_the_same_bits(tiny, finished, tmp_path, moments) -> None:
    whole, pieces = finished[0], tmp_path / "pieces"
    for when in moments:
        assert _child(tiny, pieces, when) == -signal.SIGKILL
    assert _child(tiny, pieces, "never") == 0
    assert (whole / "metrics.jsonl").read_bytes() == (pieces / "metrics.jsonl").read_bytes()
    assert _crc(whole) == _crc(pieces)
    assert set(_crc(whole)) == {p.name for p in phases.plan(tiny.PLAN)}


def test_ctrl_c_saves_and_the_next_run_says_where_it_resumes(tiny, finished, tmp_path) -> None:
    class Hand(tiny.training.Display):
        """Presses Ctrl-C at a step, and keeps what is said."""

        at, said = 14, []

        def move(self, phase, step):
            if step >= self.at:
                self.at = 10**9
                signal.raise_signal(signal.SIGINT)

        def say(self, line):
            self.said.append(line)

    with pytest.raises(Interrupted, match="stopped in admm, epoch .*, and saved"):
        tiny.run(tmp_path, Hand(1, quiet=True))
    Hand.at, Hand.said = 10**9, []
    again = tiny.run(tmp_path, Hand(1, quiet=True))
    assert Hand.said[0].startswith("resuming at admm, epoch ") and "of 60" in Hand.said[0]
    assert again.resumed is not None and again.resumed >= 14
    assert _crc(tmp_path) == _crc(finished[0])


class _Stop(Exception):
    pass


def test_a_finished_run_is_not_run_again(tiny, finished) -> None:
    folder, outcome = finished
    before = (folder / "metrics.jsonl").read_bytes()

    class Watch(tiny.training.Display):
        def move(self, phase, step):
            raise _Stop

    again = tiny.run(folder, Watch(1, quiet=True))
    assert again.results == outcome.results
    assert again.resumed == 60
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_phases_without_epochs_and_a_validation_set(tiny, tmp_path) -> None:
    job = tiny.job()
    held = {k: v[:10] for k, v in job.train.items()}
    out = tiny.run(tmp_path, plan=tiny.SHORT, validation=held)
    assert out.results["admm"]["end"] == out.results["admm"]["start"]
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["phase"], r["epoch"]) for r in records] == [
        ("dense", 0),
        ("dense", 1),
        ("dense", 2),
        ("admm", 0),
        ("retrain", 0),
    ]
    assert all({"validation_accuracy", "validation_loss"} <= set(r) for r in records)
    assert tiny.run(tmp_path, plan=tiny.SHORT, validation=held).results == out.results


def test_leaves_in_several_sets_are_logged_set_by_set(tiny, tmp_path) -> None:
    both = {"kind": "all", "parts": [{"kind": "unstructured", "density": 0.3}, {"kind": "quantize", "bits": 4}]}
    rules = (("params/a/kernel", both), ("params/b/kernel", {"kind": "unstructured", "keep": 20}))
    plan = phases.Plan(Fit(epochs=0), (Stage(rules, Admm(epochs=2, lr=1e-2, rho=1e-1, every=4), Fit(epochs=0)),))
    out = tiny.run(tmp_path, plan=plan)
    (record,) = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["phase"] == "admm" and r["epoch"] == 2]
    for kind in ("primal", "dual"):
        each = record[f"{kind}_by_set"]
        assert list(each) == ["params/a/kernel unstructured", "params/a/kernel quantize"]
        assert max(each.values()) == record[kind]["params/a/kernel"]
    assert out.results["admm"].keys() == {"start", "end", "primal", "dual"}


def test_divergence_names_the_phase_the_epoch_and_the_leaf(tiny, tmp_path) -> None:
    job = tiny.job()

    def loss(params, *rest):  # its gradient is NaN for one leaf, and through it for all in the next step
        value, aux = job.task.loss(params, *rest)
        return value + 0 * jnp.sqrt(jnp.sum(params["params"]["b"]["bias"] * 0)), aux

    with pytest.raises(Diverged, match=r"^phase dense, epoch 1: params/\S+ \(.*\): \d+ weight values are NaN"):
        tiny.run(tmp_path, plan=tiny.SHORT, task=job.task._replace(loss=loss))


def test_a_loss_that_is_not_finite_is_divergence_too(tiny, tmp_path) -> None:
    job = tiny.job()

    def loss(*args):
        value, (stats, sums) = job.task.loss(*args)
        return value, (stats, sums._replace(loss=jnp.float32(jnp.inf)))

    with pytest.raises(Diverged, match="phase dense, epoch 1: the loss is inf though all weights are finite"):
        tiny.run(tmp_path, plan=tiny.SHORT, task=job.task._replace(loss=loss))


@pytest.mark.parametrize(
    ("admm", "rules", "words"),
    [
        (Admm(2, every=13), (("params/a/kernel", {"kind": "filters", "keep": 4}),), "phase admm: every=13 steps"),
        (Admm(2), (("params/z/kernel", {"kind": "filters", "keep": 4}),), "phase admm: rule 0: .* matches nothing"),
        (Admm(2), (("params/a/kernel", {"kind": "filters", "keep": 99}),), "phase admm: params/a/kernel .*keep=99"),
        (
            Admm(2, rho=(("x", 1.0),)),
            (("params/a/kernel", {"kind": "filters", "keep": 4}),),
            "phase admm: no rho given",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is_trained(tiny, tmp_path, admm, rules, words) -> None:
    plan = dataclasses.replace(tiny.SHORT, stages=(Stage(rules, admm, Fit(0)),))
    with pytest.raises(ConfigError, match=words):
        tiny.run(tmp_path, plan=plan)
    assert not list(tmp_path.iterdir())
