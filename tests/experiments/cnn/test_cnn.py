"""The CNN driver from its config to its files, on the data set that needs no download."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

import compressx as cx
from compressx import cli, formats
from compressx.kernels import native
from configs import cnn as configs
from experiments.cnn import config as cnn_config
from experiments.cnn import task as cnn
from experiments.common.driver import Options
from experiments.common.report.summary import check_summary, read_summary
from experiments.common.training import ConfigError

ROOT = Path(__file__).parents[3]
FILES = (
    *("config.json", "metrics.jsonl", "compressed.safetensors", "rules.json", "report.html", "summary.json"),
    "checkpoints",
)
PLOTS = ("training.png", "residuals.png", "rho.png", "histograms.png", "kept.png", "masks.png")


def _config(variant: str = "digits_tiny", **changes):
    settings = configs.get_config(variant).unlock()
    for key, value in changes.items():
        *path, last = key.split("__")
        target = settings
        for part in path:
            target = target[int(part)] if part.isdecimal() else target[part]
        target[last] = value
    return cnn_config.read(settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished tiny run: its folder and its summary. Tests do not change it."""
    folder = tmp_path_factory.mktemp("cnn") / "run"
    options = Options(folder, command="python -m experiments.cnn")
    return folder, cnn.train_and_evaluate(_config(), options)


def test_it_leaves_everything_behind(done) -> None:
    folder, summary = done
    assert all((folder / name).exists() for name in (*FILES, *PLOTS))
    assert check_summary(summary) == read_summary(folder / "summary.json")
    assert "<script" not in (folder / "report.html").read_text()


def test_the_summary_says_what_happened(done) -> None:
    _, s = done
    assert (s["driver"], s["variant"], s["seed"]) == ("cnn", "digits_tiny", 0)
    assert (s["dataset"]["train"], s["dataset"]["test"]) == (96, 50)
    assert all(s["metric"][k] is not None for k in ("dense", "dense_same_budget", "one_shot", "hardened", "compressed"))
    assert s["rate"]["constrained_weights"] == (144 + 4608 + 32768 + 640) / (54 + 300 + 480 + 120)
    assert s["rate"]["all_weights"] == 38282 / (54 + 300 + 480 + 120 + 16 + 32 + 64 + 10)
    assert s["rate"]["bytes"] == s["bytes"]["dense"] / s["bytes"]["packed"]
    assert s["violations"] == 0
    assert s["residual"]["primal"] > 0
    assert s["seconds"] > 0
    if native.available():
        assert all(s["latency_ms"][k] == s["cnn"]["latency"][f"{k}_ms"]["median"] > 0 for k in ("dense", "compressed"))
    else:
        assert s["latency_ms"] == {"dense": None, "compressed": None} and s["cnn"]["latency"]["reason"]
    assert set(s["cnn"]["phases"]) == {"dense", "admm", "retrain", "one_shot", "dense_same_budget"}
    assert s["cnn"]["run"]["command"] == "python -m experiments.cnn"
    assert {"date", "machine", "versions"} <= set(s["cnn"]["run"])


def test_the_stored_model_is_the_one_that_was_measured(done, capsys) -> None:
    folder, summary = done
    saved = formats.load_model(folder / "compressed.safetensors")
    kept = {k: int(np.count_nonzero(v["kernel"])) for k, v in saved.params["params"].items()}
    assert kept == {"c1": 54, "c2": 300, "f1": 480, "f2": 120}
    assert cli.main(["verify", str(folder / "compressed.safetensors")]) == 0
    cnn.evaluate(_config(), Options(folder))
    evaluated = read_summary(folder / "eval" / "digits-test" / "summary.json")
    assert evaluated["metric"]["compressed"] == summary["metric"]["compressed"]
    assert evaluated["rate"] == summary["rate"]


def test_the_rules_and_the_dense_weights_of_a_run_give_another_run_the_same_network(done, tmp_path, capsys) -> None:
    folder, summary = done
    found = cx.read_rules(folder / "rules.json")
    assert dict(found.rules)["params/c1/kernel"].spec["keep"] == 54
    assert found.schedule == {"every": 2, "refresh_every": None}  # rho moves
    assert cli.main(["verify", str(folder / "compressed.safetensors"), "--rules", str(folder / "rules.json")]) == 0
    other = (("params/f1/kernel", {"kind": "filters", "density": 0.5}),)
    files = {"rules": str(folder / "rules.json"), "init_from": str(folder)}
    config = _config(**files, plan__stages__0__rules=other, plan__baselines=())
    out = cnn.train_and_evaluate(config, Options(tmp_path / "run"))
    assert out["metric"]["dense"] == summary["metric"]["dense"] and out["cnn"]["init_from"] == str(folder)
    assert out["cnn"]["phases"]["dense"]["start"] == out["cnn"]["phases"]["dense"]["end"]
    assert out["metric"]["compressed"] == summary["metric"]["compressed"]
    assert (tmp_path / "run" / "rules.json").read_bytes() == (folder / "rules.json").read_bytes()
    assert "rules.json" in (folder / "report.html").read_text()


def test_a_file_of_rules_replaces_sets_and_schedule_of_the_only_stage(tmp_path) -> None:
    path = tmp_path / "r.json"
    cx.write_rules(path, [("params/f2/.*", None), ("params/f1/kernel", cx.filters(0.5))], {"rho": [(".*", 0.5)]})
    (stage,) = _config(rules=str(path)).plan.stages
    assert stage.rules[0] == ("params/f2/.*", None) and stage.rules[1][1]["kind"] == "filters"
    assert (stage.admm.rho, stage.admm.rho_schedule, stage.admm.every) == (((".*", 0.5),), "constant", 2)
    for variant, stages in (("mnist_lenet5_unstructured_246x", 2), ("mnist_lenet5_forms_8", 3)):
        with pytest.raises(ConfigError, match=f"r.json' replaces the sets of a config's only stage.* has {stages}"):
            _config(variant, rules=str(path))
    with pytest.raises(FileNotFoundError):
        _config(rules=str(tmp_path / "absent.json"))
    path.write_text("[]")
    with pytest.raises(formats.CompressedFileError, match="r.json: file: "):
        _config(rules=str(path))


def test_a_finished_run_is_left_as_it_is(done, capsys) -> None:
    folder, summary = done
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "eval" not in p.parts}
    assert cnn.train_and_evaluate(_config(), Options(folder)) == summary
    assert "is finished and left as it is" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file() and "eval" not in p.parts}


def test_another_config_in_the_same_folder_is_refused_by_key(done) -> None:
    changed = _config(seed=3, plan__stages__0__admm__lr=5e-4)
    words = r"another config; .*plan\.stages\[0\]\.admm\.lr \(0\.003 there, 0\.0005 now\); seed \(0 there, 3 now\)"
    with pytest.raises(ConfigError, match=words):
        cnn.train_and_evaluate(changed, Options(done[0]))


def test_evaluation_on_another_split_and_another_data_set(done) -> None:
    folder, _ = done
    out = cnn.evaluate(_config(), Options(folder, split="train"))
    assert out["dataset"]["test"] == 96
    assert out["cnn"]["split"] == "train"
    with pytest.raises(ConfigError, match="has 4 classes .* is a network of 10 classes"):
        cnn.evaluate(_config(data__name="synthetic"), Options(folder))
    with pytest.raises(ConfigError, match="no split 'dev'; it has train, test"):
        cnn.evaluate(_config(), Options(folder, split="dev"))
    with pytest.raises(ConfigError, match="finish the run first"):
        cnn.evaluate(_config(), Options(folder / "nowhere"))


@pytest.mark.slow
def test_one_shot_from_the_dense_weights_of_another_run(done, tmp_path) -> None:
    folder, summary = done
    config = _config(init_from=str(folder), plan__method="one_shot", plan__baselines=())
    out = cnn.train_and_evaluate(config, Options(tmp_path / "run"))
    assert out["metric"]["compressed"] == summary["metric"]["one_shot"]  # the same seed, weights and order of examples


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"init_from": "nowhere"}, "init_from='nowhere' is not a run"),
        ({"data__name": "mnits"}, "data: no data set 'mnits'; there are digits"),
        ({"data__train": 5000}, "data.train=5000 is impossible; digits has 1442"),
        ({"data__validation": 96}, "data.validation=96 is impossible; it must be 0 to 95"),
        ({"data__mean": (0.1, 0.2)}, "need 1 values each"),
        ({"batch": 97}, "batch=97 is impossible; it must be 1 to 96"),
        ({"optimizer": "lbfgs"}, "optimizer='lbfgs' is impossible"),
        ({"model__name": "lenet6"}, "model: no model 'lenet6'; the models are"),
        ({"model__options": {"depth": 3}}, "model: .*no option depth; its options are width"),
        ({"plan__stages__0__rules": (("params/c9/kernel", {"kind": "filters", "keep": 2}),)}, "matches nothing"),
        ({"plan__stages__0__rules": (("params/c1/kernel", {"kind": "filters", "keep": 99}),)}, "keep=99 is impossible"),
        ({"plan__stages__0__rules": (("params/c1/kernel", {"kind": "filterz"}),)}, "unknown constraint 'filterz'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        cnn.train_and_evaluate(_config(**changes), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dense_run_of_another_network_is_refused(done, tmp_path) -> None:
    config = _config(init_from=str(done[0]), model__options={"width": 0.5})
    with pytest.raises(ConfigError, match="is a run with another model.options"):
        cnn.train_and_evaluate(config, Options(tmp_path / "run"))


def _command(*args: str, **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "experiments.cnn", *args],
        cwd=ROOT,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


FAULTS = [
    (("--config=configs/cnn.py:digits_tiny", "--wrkdir=x"), "Unknown command line flag 'wrkdir'"),
    (("--config=configs/cnn.py:digitz", "--workdir=x"), "no variant 'digitz'; there are digits, mnist_lenet5"),
    (("--config=configs/cnn.py:digits_tiny", "--workdir=x", "--config.sed=2"), "no such setting"),
    (("--config=configs/cnn.py:digits_tiny", "--workdir=x", "--mesh=rows=2"), "is not an axis"),
]
# The command line in a fork of a process that has imported the driver, which takes longer than all of them.
_FORKS = """
import json, os, runpy, sys, tempfile, traceback, warnings
import experiments.cnn.task
warnings.filterwarnings("ignore", message=".*fork")
answers = []
for args in json.loads(sys.argv[1]):
    with tempfile.TemporaryFile("w+") as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 2)
            sys.argv[1:] = args
            try:
                runpy.run_module("experiments.cnn", run_name="__main__", alter_sys=True)
                code = 0
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 99
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        answers.append((code, said.read()))
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """What each faulty command line ended with and wrote, and the work directory that all of them were given."""
    workdir = tmp_path_factory.mktemp("faults") / "x"
    lines = [[a.replace("=x", f"={workdir}") for a in args] for args, _ in FAULTS]
    command = [sys.executable, "-c", _FORKS, json.dumps(lines)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=300, check=True)
    return json.loads(done.stdout), workdir


def _is_one_line(code, err, words) -> None:
    assert code == 1
    lines = [line for line in err.splitlines() if line]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert words in lines[0]


@pytest.mark.parametrize("number", range(len(FAULTS)))
def test_from_the_command_line_a_fault_is_one_line(faults, number) -> None:
    answers, workdir = faults
    _is_one_line(*answers[number], FAULTS[number][1])
    assert not workdir.exists()


def test_of_a_process_of_its_own_a_fault_is_one_line(tmp_path) -> None:
    args = ("--config=configs/cnn.py:mnist_lenet5_structured_tiny", f"--workdir={tmp_path / 'x'}")
    code, err = _command(*args, COMPRESSX_DATA=str(tmp_path), HOME=str(tmp_path), no_proxy="*")
    _is_one_line(code, err, "mnist/train-images")
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_the_command_runs_to_its_end_and_quietly(tmp_path) -> None:
    args = ("--config=configs/cnn.py:digits_tiny", f"--workdir={tmp_path / 'x'}", "--mesh=data=2")
    code, err = _command(*args)
    assert code == 0
    assert len(err.splitlines()) == 1 + 2 + 1 + 3 + 3  # a line an epoch
    run = json.loads((tmp_path / "x" / "summary.json").read_text())["cnn"]
    assert run["mesh"] == "data=2"
    assert run["run"]["command"].endswith("--mesh=data=2")


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mnist_lenet5_unstructured_tiny", "mnist_lenet5_structured_88x_tiny"])
def test_mnist(variant, tmp_path, data_dir) -> None:
    summary = cnn.train_and_evaluate(_config(variant), Options(tmp_path, str(data_dir)))
    want = {"mnist_lenet5_unstructured_tiny": 430_500 / 5_050, "mnist_lenet5_structured_88x_tiny": 430_500 / 4_868}
    assert summary["rate"]["constrained_weights"] >= want[variant]
    assert summary["violations"] == 0


@pytest.mark.data
@pytest.mark.slow
def test_cifar(tmp_path, data_dir) -> None:
    summary = cnn.train_and_evaluate(_config("cifar_resnet20_4x_tiny"), Options(tmp_path, str(data_dir)))
    assert summary["rate"]["constrained_weights"] == pytest.approx(4.0, rel=1e-3)
    assert summary["dataset"]["stand_in"]


@pytest.mark.data
def test_the_published_weights_are_where_cifar_starts(data_dir) -> None:
    config = _config("cifar_resnet20_2x", data__train=128)
    job, _ = cnn.make_job(config, Options(Path("unused"), str(data_dir)))
    weights = job.first
    assert sum(w.size for w in jax.tree.leaves(weights.params)) == 269_722
    assert set(weights.batch_stats) == {"batch_stats"}
