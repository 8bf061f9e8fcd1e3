"""`--config.plan.method=reconstruct`: the dense network, then the sets reached on calibration images."""

import jax
import numpy as np
import pytest

import compressx as cx
from compressx import formats
from configs import cnn as configs
from experiments.cnn import config as cnn_config
from experiments.cnn import task as cnn
from experiments.common.driver import Options
from experiments.common.training import ConfigError, phases


def _config(calibration: int, epochs: int):
    settings = configs.get_config("digits_tiny").unlock()
    settings.plan.method, settings.plan.baselines, settings.plan.calibration = "reconstruct", (), calibration
    for stage in settings.plan.stages:
        stage["retrain"]["epochs"] = epochs
    return cnn_config.read(settings)


few = pytest.mark.filterwarnings("ignore::compressx.reconstruction.TooFewRows")  # 64 images, 512 inputs


@few
def test_the_job_reaches_the_sets_of_the_plan(tmp_path) -> None:
    config = _config(64, 1)
    phase = phases.plan(config.plan)[-1]
    assert (phase.name, phase.kind, phase.start, phase.calibration) == ("reconstruct", "retrain", "dense", 64)
    assert phases.final(config.plan) == "reconstruct"
    job, _ = cnn.make_job(config, Options(tmp_path / "run"))
    rules = [("params/f2/kernel", cx.unstructured(0.4))]  # one layer, for the sake of time
    weights = job.reconstruct(job.first, rules, 64)
    cx.check(weights.params, rules, weights.structure)
    assert jax.tree.structure(weights.batch_stats) == jax.tree.structure(job.first.batch_stats)


@few
@pytest.mark.slow
def test_a_run_reconstructs_and_retrains(tmp_path) -> None:
    config = _config(64, 1)
    summary = cnn.train_and_evaluate(config, Options(tmp_path / "run", command="python -m experiments.cnn"))
    assert summary["violations"] == 0
    assert summary["cnn"]["method"] == "reconstruct"
    assert summary["metric"]["hardened"] is not None
    saved = formats.load_model(tmp_path / "run" / "compressed.safetensors")
    assert not any(cx.count_violations(saved.params, saved.rules, saved.structures).values())
    job, _ = cnn.make_job(config, Options(tmp_path / "other"))
    rules = phases.plan(config.plan)[-1].rules
    one, two = (job.reconstruct(job.first, rules, 64) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_more_examples_than_there_are_and_drivers_without_it(tmp_path) -> None:
    with pytest.raises(ConfigError, match="plan.calibration=500 is impossible: there are 96 training examples"):
        cnn.train_and_evaluate(_config(500, 0), Options(tmp_path / "run"))
    with pytest.raises(ConfigError, match="calibration=0 is impossible"):
        _config(0, 0)
