"""The pneumonia driver: every variant's plan, a whole run of the classifier, and (slow) of the detector."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

import compressx
from configs import pneumonia as configs
from experiments.common import data
from experiments.common.driver import Options
from experiments.common.report.summary import check_summary, read_summary
from experiments.common.training import ConfigError
from experiments.pneumonia import (
    config as pneumonia_config,
)
from experiments.pneumonia import (
    data as pneumonia_data,
)
from experiments.pneumonia import (
    measures as pneumonia_score,
)
from experiments.pneumonia import (
    page as pneumonia_page,
)
from experiments.pneumonia import (
    task as pneumonia,
)

WAYS = {"plain", "native", "native_1_thread", "gathered", "mixed"}
FILES = (
    *("config.json", "metrics.jsonl", "compressed.safetensors", "rules.json", "report.html", "summary.json"),
    "reliability.png",
)


def _config(variant: str, **changes):
    settings = configs.get_config(variant).unlock()
    for key, value in changes.items():
        settings[key] = value
    return pneumonia_config.read(settings)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """PneumoniaMNIST's layout with generated images, a bright patch in the positive ones."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    arrays = {}
    for split, n in (("train", 4708), ("val", 524), ("test", 624)):
        labels = rng.integers(0, 2, n).astype(np.uint8)
        x = rng.integers(0, 90, (n, 28, 28)).astype(np.uint8)
        x[labels == 1, 8:18, 8:18] += 90
        arrays |= {f"{split}_images": x, f"{split}_labels": labels[:, None]}
    (folder / "pneumoniamnist").mkdir()
    np.savez(folder / "pneumoniamnist" / "pneumoniamnist.npz", **arrays)
    return folder


@pytest.fixture(scope="module")
def done(images, tmp_path_factory):
    """A finished tiny run of the classifier, with times."""
    folder = tmp_path_factory.mktemp("pneumonia") / "run"
    options = Options(folder, str(images), command="python -m experiments.pneumonia")
    return folder, pneumonia.train_and_evaluate(_config("pneumoniamnist_tiny", latency=2), options)


@pytest.mark.parametrize("variant", [v for name in configs.VARIANTS for v in (name, f"{name}_tiny")])
def test_every_variant_is_read(variant) -> None:
    config = pneumonia_config.read(configs.get_config(variant))
    assert config.variant == variant and config.points[0].method == "admm"
    if not variant.endswith("tiny"):
        assert any(p.rate >= 8 for p in config.points)


@pytest.mark.parametrize("variant", ["opacities", "rsna"])
def test_the_plan_reaches_the_rate_over_all_convolutions(variant) -> None:
    config = _config(variant)
    geometry = pneumonia_data.detection.Geometry((64, 64))
    task = pneumonia_data.Task(*[None] * 12)._replace(classes=1, shape=(64, 64, 1), geometry=geometry)
    if variant == "rsna":  # shapes alone: the network at full width
        model = pneumonia.models.build("yolov3", classes=1)
        x = jax.ShapeDtypeStruct((1, 64, 64, 1), np.float32)
        variables = jax.eval_shape(model.init, jax.random.key(0), x)
        compaction = pneumonia.compaction
        found = compaction.groups(compaction.channels(model, variables, x))
        kept = compaction.amounts(found, compaction.kernels(found, variables), "combined", 36.0)
        assert kept.total == 61_471_072 - 2 * 9 * 32 and 36 <= kept.total / kept.weights < 36.01
        return
    plan = pneumonia.make_plan(config, task, None)
    names = [p.name for p in plan.phases]
    arms = ["admm_combined_36x", "retrain_combined_36x", "retrain_one_shot_combined_36x"]
    assert names == ["dense", *arms, "dense_same_budget"]
    kept = plan.amounts["combined_36x"]
    kernels = [leaf.size for leaf in jax.tree.leaves(plan.first.params) if leaf.ndim == 4]
    assert kept.total == sum(kernels) and 36 <= kept.total / kept.weights < 36 * 1.01
    assert np.asarray(plan.first.params["params"]["conv_81"]["bias"]).reshape(3, 6)[:, 4].tolist() == [-4.0] * 3
    assert plan.phases[3].fit.epochs == plan.phases[1].fit.epochs + plan.phases[2].fit.epochs


def test_a_run_leaves_everything_behind(done) -> None:
    folder, summary = done
    assert all((folder / name).exists() for name in FILES)
    assert check_summary(summary) == read_summary(folder / "summary.json")
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "An estimate, not a measurement" in page and "Reliability" in page


def test_the_summary_says_what_happened(done) -> None:
    _, s = done
    own = s["pneumonia"]
    assert (s["driver"], s["metric"]["name"], s["dataset"]["stand_in"]) == ("pneumonia", "auc", True)
    assert all(s["metric"][k] is not None for k in ("dense", "dense_same_budget", "one_shot", "hardened", "compressed"))
    assert s["violations"] == 0 and s["residual"]["primal"] > 0
    for name in ("combined_8x", "one_shot_combined_8x"):
        point = own["points"][name]
        assert point["rate_kept"] >= 8 and point["size"]["weights"] <= point["weights_kept"]
        assert point["size"]["masked_minus_compacted"] < 1e-4
        assert point["size"]["macs"] < own["dense"]["size"]["macs"]
    assert s["latency_ms"]["dense"] > 0 and own["points"]["combined_8x"]["latency_ms"] == s["latency_ms"]["compressed"]
    assert own["points"]["one_shot_combined_8x"]["latency_ms"] is None
    for name in ("dense", "combined_8x"):
        at = own["latency"]["networks"][name]
        assert at["milliseconds"][at["best"]] == min(at["milliseconds"].values())
        assert {"plain"} <= at["milliseconds"].keys() <= WAYS
    scores = own["dense"]["scores"]
    assert scores["auc_low"] <= scores["auc"] <= scores["auc_high"]
    assert s["pneumonia"]["data"]["patients"]["train"] == 16


def test_the_rows_are_the_networks(done) -> None:
    _, s = done
    own = s["pneumonia"]
    points = [own["points"][f"{m}combined_8x"] for m in ("", "one_shot_")]
    rows = own["rows"]
    wanted = [("dense", "before compression"), ("dense", "same budget"), ("combined", "admm"), ("combined", "one_shot")]
    assert [(r["kind"], r["method"]) for r in rows] == wanted
    for row, point in zip(rows[-2:], points, strict=True):
        assert row["score"] == point["scores"]["auc"] and row["seed"] == s["seed"] and row["rate"] == 8
        assert row["minus_dense"] == pytest.approx(row["score"] - s["metric"]["dense"])
        assert point["minus_dense"]["low"] <= row["minus_dense"] <= point["minus_dense"]["high"]
        assert row["weights"] == point["size"]["weights"] and row["latency_ms"] == point["latency_ms"]
    trained_on = pneumonia_score.rows({**own, "same_budget": {"auc": 0.75}}, "auc", 3)
    assert len(trained_on) == 4 and trained_on[1]["method"] == "same budget"
    assert (trained_on[1]["score"], trained_on[1]["seed"], trained_on[1]["macs"]) == (0.75, 3, rows[0]["macs"])
    assert rows[0]["index_bytes"] == 0 and rows[0]["bytes"] == s["bytes"]["dense"]
    assert 0 < rows[-1]["index_bytes"] < rows[-1]["bytes"] < rows[0]["bytes"]


def test_the_saved_network_compiles(done) -> None:
    folder, _ = done
    saved = compressx.load_model(folder / "compressed.safetensors")
    x = np.random.default_rng(0).standard_normal((2, 32, 32, 1), dtype=np.float32)
    model = pneumonia.models.build(saved.model["name"], classes=2, **saved.model["options"])
    np.testing.assert_allclose(compressx.compile(model, saved)(x), model.apply(saved.params, x), atol=1e-5)


def _judge(values: dict[str, list[float]], patient: list[int]):
    """A judge of a detector, and networks with these challenge scores of the test images."""
    judged = pneumonia_data.Judged(np.ones(4, np.int32), np.array(patient), np.ones(4, bool))
    task = pneumonia_data.Task(*[None] * 12)._replace(geometry=pneumonia_data.detection.Geometry((32, 32)))
    judge = object.__new__(pneumonia_score.Judge)
    judge.task = task._replace(judged={"test": judged})
    return judge, {k: pneumonia_score.Scored({}, np.array(v)) for k, v in values.items()}


def test_combined_is_compared_with_either_alone_on_the_same_draws() -> None:
    points = [pneumonia_config.Point(kind, rate) for rate in (8.0, 2.0) for kind in ("combined", "filters", "columns")]
    values = {p.name: [0.5, np.nan, 0.25, 0.75] for p in points}
    values["filters_8x"] = [0.25, np.nan, 0.0, 0.5]  # always 0.25 less, where it counts
    values["columns_8x"] = [1.0, 1.0, np.nan, 0.0]  # means 2/3 and 1/2
    judge, scored = _judge(values, [0, 1, 2, 3])
    got = pneumonia_score.combined_minus(points, judge, scored)
    assert [(e["rate"], e["than"]) for e in got] == [(2, "columns"), (2, "filters"), (8, "columns"), (8, "filters")]
    assert [e["difference"] for e in got] == pytest.approx([0, 0, 1 / 2 - 2 / 3, 0.25])
    assert [got[3]["low"], got[3]["high"]] == pytest.approx([0.25, 0.25])
    assert got[2]["low"] < 0 < got[2]["high"]
    text = [pneumonia_page._compared(e) for e in got]
    assert text[3].startswith("At 8× combined is better than filters alone (difference +0.2500")
    assert "are not told apart by these test images" in text[2]
    worse = pneumonia_page._compared(got[3] | {"difference": -0.25, "low": -0.3, "high": -0.1})
    assert worse.startswith("At 8× combined is worse than filters alone")
    assert pneumonia_score.combined_minus(points[:1], judge, scored) == []


def test_without_a_counted_image_there_is_no_difference() -> None:
    judge, scored = _judge({"a": [np.nan] * 4, "b": [0.5] * 4}, [0, 0, 1, 1])
    assert judge.minus(scored["a"], scored["b"]) == {"difference": None, "low": None, "high": None}


def test_a_finished_run_is_left_alone_and_another_config_refused(done, images) -> None:
    folder, summary = done
    options = Options(folder, str(images))
    config = _config("pneumoniamnist_tiny", latency=2)
    assert pneumonia.train_and_evaluate(config, options) == summary
    with pytest.raises(ConfigError, match="latency"):
        pneumonia.train_and_evaluate(_config("pneumoniamnist_tiny", latency=3), options)


def test_evaluation_repeats_the_figure(done, images) -> None:
    folder, summary = done
    got = pneumonia.evaluate(_config("pneumoniamnist_tiny"), Options(folder, str(images)))
    assert got["metric"]["compressed"] == summary["metric"]["compressed"]
    written = json.loads((folder / "eval" / "pneumoniamnist-test" / "summary.json").read_text())
    assert written["pneumonia"]["split"] == "test"
    with pytest.raises(ConfigError, match="is of the other kind"):
        pneumonia.evaluate(_config("opacities_tiny"), Options(folder, str(images)))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"data.size": 100}, "multiple of 32"),
        ({"data.name": "xrays"}, "must be one of opacities"),
        ({"data.faults": "hide"}, "one of error, skip"),
        ({"points": ()}, "at least one"),
        ({"points": ({"kind": "rows", "rate": 2.0, "method": "admm"},)}, "kind is one of"),
        ({"model.name": "darknet53"}, "does not fit"),
        ({"model.checkpoint": "yolov3.weights"}, "channels=3"),
    ],
)
def test_bad_settings_are_named(changes, text) -> None:
    settings = configs.get_config("opacities_tiny").unlock()
    for key, value in changes.items():
        *path, last = key.split(".")
        target = settings
        for part in path:
            target = target[part]
        target[last] = value
    with pytest.raises(ConfigError, match=text):
        pneumonia_config.read(settings)


def test_missing_data_are_named(tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("COMPRESSX_DATA", raising=False)
    for variant in ("opacities_tiny", "rsna_tiny"):
        with pytest.raises(data.DataNotFoundError, match="not found"):
            pneumonia.train_and_evaluate(_config(variant), Options(tmp_path / variant, str(tmp_path)))
        assert not (tmp_path / variant).exists()


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("variant", ["opacities_tiny", "nih_tiny"])
def test_a_detector_runs_from_its_config_to_its_files(variant, data_dir, tmp_path) -> None:
    options = Options(tmp_path / "run", str(data_dir), command="python -m experiments.pneumonia")
    summary = pneumonia.train_and_evaluate(_config(variant), options)
    assert summary["metric"]["name"] == "challenge_score"
    assert all((tmp_path / "run" / name).exists() for name in (*FILES, "boxes.png"))
    got = pneumonia.evaluate(_config(variant), options)
    assert got["metric"]["compressed"] == pytest.approx(summary["metric"]["compressed"])
    head = next(iter(summary["pneumonia"]["points"].values()))
    assert head["size"]["masked_minus_compacted"] < 1e-4
    assert pneumonia_score.SPECIFICITY == 0.9 and pneumonia_page.SHOWN == 8
