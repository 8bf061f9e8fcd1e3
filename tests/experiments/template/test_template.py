"""The template driver from its command to its files: what a copy of it starts from."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs import template as configs
from experiments.common.driver import Options
from experiments.common.report.summary import check_summary, read_summary
from experiments.common.training import ConfigError
from experiments.template import config as template_config
from experiments.template import task as template

ROOT = Path(__file__).parents[3]
FILES = ("config.json", "metrics.jsonl", "compressed.safetensors", "rules.json", "report.html", "summary.json")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that the command made. Tests do not change it."""
    folder = tmp_path_factory.mktemp("template") / "run"
    command = [sys.executable, "-m", "experiments.template", "--config=configs/template.py:digits_tiny"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    run = subprocess.run(
        [*command, f"--workdir={folder}"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    return folder


def _config(**changes: Any) -> template_config.Config:
    return template_config.read({**configs.get_config("digits_tiny").to_dict(), **changes})


def test_the_command_leaves_everything_behind(done: Path) -> None:
    assert all((done / name).exists() for name in FILES)
    s = check_summary(read_summary(done / "summary.json"))
    assert (s["driver"], s["variant"], s["violations"], s["dataset"]["train"]) == ("template", "digits_tiny", 0, 96)
    assert s["rate"]["constrained_weights"] == pytest.approx(10, rel=0.01)
    by_class = s["template"]["by_class"]
    assert set(by_class) == {"dense", "compressed"} and all(len(each) == 10 for each in by_class.values())
    assert "By class" in (done / "report.html").read_text()


def test_the_classes_together_have_the_accuracy_of_the_summary(done: Path) -> None:
    s = read_summary(done / "summary.json")
    config = _config()
    job, info = template.make_job(config, Options(done))
    sizes = [int((job.test["labels"] == c).sum()) for c in range(info.classes)]
    for name, each in s["template"]["by_class"].items():
        right = sum(n * share for n, share in zip(sizes, each, strict=True))
        assert right / sum(sizes) == pytest.approx(s["metric"][name], abs=1e-6)


def test_a_finished_run_is_evaluated_from_its_file(done: Path) -> None:
    told = template.evaluate(_config(), Options(done))
    assert told["metric"]["compressed"] == read_summary(done / "summary.json")["metric"]["compressed"]
    assert json.loads((done / "eval" / "digits-test" / "summary.json").read_text())["template"]["mode"] == "eval"


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="config.wings is not a setting"):
        _config(wings=2)
    with pytest.raises(ConfigError, match="batch=97 is impossible"):
        template.make_job(_config(batch=97), Options(Path()))
    with pytest.raises(ConfigError, match="data: no data set 'letters'"):
        template.make_job(_config(data={"name": "letters"}), Options(Path()))
    with pytest.raises(ConfigError, match="model: no model 'no'"):
        template.make_job(_config(model="no"), Options(Path()))
