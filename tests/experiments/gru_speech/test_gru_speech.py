"""The speech driver from its config to its files, on the corpus that needs no file."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from compressx import cli, formats
from configs import gru_speech as configs
from experiments.common.driver import Options
from experiments.common.report.summary import check_summary, read_summary
from experiments.common.training import ConfigError
from experiments.gru_speech import config as speech_config
from experiments.gru_speech import measures as speech_results
from experiments.gru_speech import task as gru_speech

FILES = (
    *("config.json", "metrics.jsonl", "compressed.safetensors", "rules.json", "report.html", "summary.json"),
    "checkpoints",
)
PLOTS = ("rates.png", "degradation.png", "confusion.png", "posterior.png", "training.png", "residuals.png", "masks.png")


def _config(variant: str = "tones_tiny", **changes):
    settings = configs.get_config(variant).unlock()
    for key, value in changes.items():
        *path, last = key.split("__")
        target = settings
        for part in path:
            target = target[int(part)] if part.isdecimal() else target[part]
        target[last] = value
    return speech_config.read(settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished tiny run: its folder and its summary. Tests do not change it."""
    folder = tmp_path_factory.mktemp("speech") / "run"
    options = Options(folder, command="python -m experiments.gru_speech")
    return folder, gru_speech.train_and_evaluate(_config(), options)


def test_it_leaves_everything_behind(done) -> None:
    folder, summary = done
    assert all((folder / name).exists() for name in (*FILES, *PLOTS))
    assert check_summary(summary) == read_summary(folder / "summary.json")


def test_the_summary_says_what_happened(done) -> None:
    _, s = done
    arms = s["gru_speech"]["arms"]
    assert (s["driver"], s["metric"]["name"]) == ("gru_speech", "phone error rate")
    assert s["metric"]["higher_is_better"] is False
    assert (s["dataset"]["train"], s["dataset"]["test"], s["dataset"]["stand_in"]) == (8, 3, True)
    assert all(s["metric"][k] is not None for k in ("dense", "one_shot", "hardened", "compressed"))
    assert s["metric"]["compressed"] == arms["bsp_10x"]["error_rate"]
    assert s["metric"]["one_shot"] == arms["bsp_10x_one_shot"]["error_rate"]
    kinds = ("substitutions", "deletions", "insertions")
    for row in (s["gru_speech"]["dense"], *arms.values()):
        assert row["error_rate"] == pytest.approx(sum(row[k] for k in kinds))
        assert row["tokens"] == s["gru_speech"]["dense"]["tokens"] > 10
    assert s["violations"] == 0
    assert s["residual"]["primal"] > 0
    assert s["latency_ms"]["dense"] > 0
    assert s["latency_ms"]["compressed"] > 0
    assert s["gru_speech"]["streaming"]["bsp_10x"]["factor"] > 0
    assert set(s["gru_speech"]["phases"]) == {
        "dense",
        *("bsp_10x_admm", "bsp_10x_retrain", "bsp_10x_one_shot_one_shot"),
    }


def test_rates_count_the_gate_matrices(done) -> None:
    folder, s = done
    saved = formats.load_model(folder / "compressed.safetensors")
    p = saved.params["params"]
    gates = {f"params/{k}/{n}": w for k in p if "gru" in k for n, w in p[k].items() if n[0] in "wu"}
    weights, kept = sum(w.size for w in gates.values()), sum(int(np.count_nonzero(w)) for w in gates.values())
    assert len(gates) == 6
    assert weights == s["gru_speech"]["counted_weights"] == 3 * 16 * (15 + 16)
    assert s["rate"]["constrained_weights"] == weights / kept
    others = sum(w.size for w in jax.tree.leaves(p)) - weights
    assert s["rate"]["all_weights"] == pytest.approx((weights + others) / (kept + others))
    per_matrix = s["gru_speech"]["arms"]["bsp_10x"]["matrices"]
    assert {n: m["kept"] for n, m in per_matrix.items()} == {n: int(np.count_nonzero(w)) for n, w in gates.items()}
    sizes = s["gru_speech"]["arms"]["bsp_10x"]["bytes_of_matrices"]
    assert sizes["dense"] == 4 * weights
    assert sizes["bspc"] < sizes["csr"] < sizes["dense"]
    assert cli.main(["verify", str(folder / "compressed.safetensors")]) == 0


def test_step_2_is_trained_inside_step_1() -> None:
    first, kept, second, last = gru_speech.plan_phases(_config("tones"))["bsp_29x"]
    assert second.within == kept.rules == first.rules
    assert second.start == kept.name == "bsp_29x_retrain_1"
    assert {c.spec["kind"] for _, c in first.rules} == {"bsp_columns"}
    assert {c.spec["kind"] for _, c in last.rules} == {"bsp"}


def test_evaluation_reads_the_stored_network(done, capsys) -> None:
    folder, summary = done
    gru_speech.evaluate(_config(), Options(folder))
    again = read_summary(folder / "eval" / "tones-test" / "summary.json")
    assert again["metric"]["compressed"] == summary["metric"]["compressed"]
    assert again["gru_speech"]["tokens"] == summary["gru_speech"]["dense"]["tokens"]
    with pytest.raises(ConfigError, match="split='valid' is impossible"):
        gru_speech.evaluate(_config(), Options(folder, split="valid"))
    with pytest.raises(ConfigError, match="finish the run first"):
        gru_speech.evaluate(_config(), Options(folder / "nowhere"))


def test_a_finished_run_is_left_as_it_is(done, capsys) -> None:
    folder, summary = done
    before = (folder / "summary.json").stat().st_mtime_ns
    assert gru_speech.train_and_evaluate(_config(), Options(folder)) == summary
    assert "is finished and left as it is" in capsys.readouterr().out
    assert before == (folder / "summary.json").stat().st_mtime_ns


def test_other_seeds_join_the_plot(done, tmp_path) -> None:
    folder, summary = done
    others = speech_results.read_others([str(folder)], "tones_tiny", "tones")
    arms = summary["gru_speech"]["arms"]
    rates, values = speech_results.curves(arms, others)["bsp"]
    assert rates == [arms["bsp_10x"]["rate"]]
    assert values == [[arms["bsp_10x"]["error_rate"]] * 2]
    pictures = speech_results.rate_pictures(tmp_path, "phone error rate", summary["metric"]["dense"], arms, others)
    assert [Path(p.source).name for p in pictures] == ["rates.png", "degradation.png"]
    with pytest.raises(ConfigError, match="with_runs"):
        speech_results.read_others([str(tmp_path)], "tones_tiny", "tones")
    with pytest.raises(ConfigError, match="not of gru_speech on fsdd"):
        speech_results.read_others([str(folder)], "tones_tiny", "fsdd")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__name": "tone"}, "data: no corpus 'tone'"),
        ({"data__train": 500}, "data.train=500 is impossible; tones has 60"),
        ({"batch": 9}, "batch=9 is impossible; it must be 1 to 8"),
        ({"seed": -1}, "seed=-1 is impossible"),
        ({"optimizer": "lbfgs"}, "optimizer='lbfgs' is impossible"),
        ({"features__coefficients": 40}, "features: coefficients=40"),
        ({"model__reset": "never"}, "model: reset='never'"),
        ({"arms__0__rate": 4000.0}, "arm 'bsp_10x': rate=4000.0"),
        ({"arms__0__structure": "bps"}, "structure='bps' is none of bsp"),
        ({"arms__0__method": "one_shot"}, "the first by admm"),
        ({"loss": "mse"}, "loss='mse'"),
        ({"column__label_smoothing": 0.1, "loss": "ctc"}, "CTC without label smoothing"),
        ({"with_runs": ("nowhere",)}, "with_runs: .*does not exist"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        gru_speech.train_and_evaluate(_config(**changes), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_papers_network_has_its_rates() -> None:
    config = _config("timit")
    assert sum(a * b for a, b in gru_speech.shapes(config).values()) == 9_556_992
    arms = gru_speech.plan_phases(config)
    assert [p.kind for p in arms["bsp_10x"]] == ["admm", "retrain"]  # the rows step alone, as released
    assert [p.kind for p in arms["bsp_29x"]] == ["admm", "retrain", "admm", "retrain"]
    epochs = {name: sum(p.fit.epochs for p in made) for name, made in arms.items() if name}
    assert len(set(epochs.values())) == 1  # equal budgets
    assert all(p.fit.rho_schedule == "rtmobile" for p in arms["bsp_29x"] if p.kind == "admm")
    assert {f"bsp_{r}x" for r in configs.RATES} <= set(arms)


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_with_the_same_bits(done, tmp_path, monkeypatch) -> None:
    folder, summary = done
    from experiments.common import training

    whole = training.loop._Run._end
    calls = []

    def stop(self, phase, begun, state):
        calls.append(phase.name)
        if phase.name == "bsp_10x_admm":
            raise KeyboardInterrupt
        return whole(self, phase, begun, state)

    monkeypatch.setattr(training.loop._Run, "_end", stop)
    with pytest.raises(KeyboardInterrupt):
        gru_speech.train_and_evaluate(_config(), Options(tmp_path / "run"))
    monkeypatch.setattr(training.loop._Run, "_end", whole)
    gru_speech.train_and_evaluate(_config(), Options(tmp_path / "run"))
    a, b = (formats.load_model(f / "compressed.safetensors").params for f in (folder, tmp_path / "run"))
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_both_steps(tmp_path) -> None:
    config = _config(arms=[configs.arm("bsp", 20)])
    summary = gru_speech.train_and_evaluate(config, Options(tmp_path))
    arm = summary["gru_speech"]["arms"]["bsp_20x"]
    assert summary["violations"] == 0
    assert summary["rate"]["constrained_weights"] >= 20
    first, _, second, _ = gru_speech.plan_phases(config)["bsp_20x"]
    keep = {n: c.spec for n, c in second.rules}
    assert {n: m["kept"] for n, m in arm["matrices"].items()} == {
        n: s["keep_rows"] * s["keep_columns"] for n, s in keep.items()
    }
    assert arm["bytes_of_matrices"]["bspc"] < arm["bytes_of_matrices"]["csr"]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["timit_sample_tiny", "fsdd_tiny", "fsdd_official_tiny"])
def test_the_stand_ins(variant, tmp_path, data_dir) -> None:
    summary = gru_speech.train_and_evaluate(_config(variant), Options(tmp_path, str(data_dir)))
    assert summary["violations"] == 0
    assert summary["rate"]["constrained_weights"] >= 29
    assert summary["dataset"]["stand_in"]
    assert summary["metric"]["name"] == ("word" if "fsdd" in variant else "phone") + " error rate"
    gru_speech.evaluate(_config(variant), Options(tmp_path, str(data_dir)))


@pytest.mark.slow
def test_the_tones_are_learnt(tmp_path) -> None:
    """BSP at 10x keeps what the dense network learnt, and ADMM's residuals fall."""
    config = _config("tones", arms=[configs.arm("bsp", 10)], dense__epochs=12, column__epochs=30, row__epochs=30)
    summary = gru_speech.train_and_evaluate(config, Options(tmp_path))
    assert summary["metric"]["dense"] < 0.25
    assert summary["metric"]["compressed"] < summary["metric"]["dense"] + 0.15
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    primal = [max(r["primal"].values()) for r in records if r.get("primal")]
    assert primal[-1] < 0.5 * primal[0]
