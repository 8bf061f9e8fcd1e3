"""summary.json: the keys of every driver, checked both ways."""

import copy
import json
import os

import numpy as np
import pytest

from experiments.common.report import summary as summaries
from experiments.common.report.summary import SummaryError, make_summary, read_summary, write_summary


def fields():
    return {
        "driver": "cnn",
        "variant": "mnist_lenet5_unstructured",
        "seed": 0,
        "dataset": {"name": "mnist", "source": "tfds", "train": 60000, "test": 10000, "stand_in": False},
        "metric": {
            "name": "accuracy",
            "higher_is_better": True,
            "dense": 0.9925,
            "dense_same_budget": 0.993,
            "one_shot": 0.97,
            "hardened": 0.985,
            "compressed": np.float32(0.992),
        },
        "rate": {"constrained_weights": 85.2, "all_weights": 84.1, "bytes": 40.0},
        "bytes": {"dense": np.int64(1722000), "packed": 43000},
        "residual": {"primal": 0.01, "dual": 1e-3},
        "violations": 0,
        "latency_ms": {"dense": 1.5, "compressed": None},
        "seconds": 12.5,
        "paper": {"quantity": "rate.constrained_weights", "value": 85},
    }


# The keys as the design states them, written out here a second time on purpose.
KEYS = (
    "driver variant seed dataset.name dataset.source dataset.train dataset.test dataset.stand_in metric.name "
    "metric.higher_is_better metric.dense metric.dense_same_budget metric.one_shot metric.hardened metric.compressed "
    "rate.constrained_weights rate.all_weights rate.bytes bytes.dense bytes.packed residual.primal residual.dual "
    "violations latency_ms.dense latency_ms.compressed seconds paper.quantity paper.value"
).split()


def _flat(data, prefix=""):
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def test_round_trip_and_keys(tmp_path):
    summary = make_summary(**fields(), cnn={"run": {"command": "python -m x"}, "curve": np.arange(3)})
    assert [key for key in _flat(summary) if not key.startswith("cnn.")] == KEYS
    path = write_summary(tmp_path / "deep" / "summary.json", summary)
    assert read_summary(path) == summary == json.loads(path.read_text())
    assert summary["cnn"]["curve"] == [0, 1, 2]
    assert type(summary["bytes"]["dense"]) is int
    assert os.listdir(path.parent) == ["summary.json"]
    assert summaries.lookup(summary, "metric.compressed") == pytest.approx(0.992)
    assert summaries.lookup(summary, "metric.compressed.x") is None
    assert summaries.run_of(summary) == {"command": "python -m x"}
    assert summaries.run_of(make_summary(**fields())) == {}


def test_a_section_that_does_not_apply_has_null_keys():
    summary = make_summary(**(fields() | {"dataset": None, "metric": None, "paper": None, "violations": None}))
    assert summary["paper"] == {"quantity": None, "value": None}
    assert list(_flat(summary)) == KEYS


@pytest.mark.parametrize("key", KEYS)
def test_every_missing_key_is_named(key):
    data = copy.deepcopy(fields())
    *outer, last = key.split(".")
    holder = data[outer[0]] if outer else data
    del holder[last]
    with pytest.raises(SummaryError, match=f"{key} is missing"):
        make_summary(**data)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("metric.accuracy", 1.0, "metric.accuracy is unknown"),
        ("extra", {}, "extra is unknown"),
        ("speech", {}, "speech is unknown"),  # a block under another driver's name
        ("cnn", 3, "own block"),
        ("driver", "Bad Name", "driver is"),
        ("driver", "metric", "driver is"),
        ("driver", None, "driver is None"),
        ("seed", True, "seed is True"),
        ("seed", 0.0, "seed is 0.0"),
        ("variant", "", "variant is ''"),
        ("metric.dense", float("nan"), "metric.dense is nan"),
        ("metric.dense", np.float32("inf"), "metric.dense is inf"),
        ("metric.dense", "0.99", "metric.dense is '0.99'"),
        ("bytes.packed", 1.5, "bytes.packed is 1.5"),
        ("bytes.packed", -1, "bytes.packed is -1"),
        ("latency_ms.dense", -0.5, "latency_ms.dense is -0.5"),
        ("violations", -1, "violations is -1"),
        ("dataset.stand_in", 1, "dataset.stand_in is 1"),
        ("bytes", [1, 2], r"bytes is \[1, 2\]"),
        ("cnn", {"x": float("nan")}, "cnn.x is nan"),
        ("cnn", {"x": object()}, "cnn.x is object"),
        ("cnn", {1: 2}, "keys must be text"),
    ],
)
def test_bad_fields_are_refused_by_name(tmp_path, key, value, message):
    data = copy.deepcopy(fields())
    *outer, last = key.split(".")
    (data[outer[0]] if outer else data)[last] = value
    with pytest.raises(SummaryError, match=message):
        make_summary(**data)
    with pytest.raises(SummaryError, match=message):
        write_summary(tmp_path / "summary.json", data)
    assert not list(tmp_path.iterdir())


def test_all_faults_come_at_once():
    data = fields()
    del data["seed"]
    data["nonsense"] = 1
    with pytest.raises(SummaryError, match=r"seed is missing; nonsense is unknown"):
        make_summary(**data)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        "null",
        '{"driver": "a", "driver": "b"}',
        '{"seconds": NaN}',
        '{"seconds": 1e999}',
        "[" * 100_000,
        "\x00",
    ],
)
def test_damaged_files_are_named(tmp_path, text):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(SummaryError, match=r"summary\.json"):
        read_summary(path)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(SummaryError, match="does not exist"):
        read_summary(tmp_path / "summary.json")


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = write_summary(tmp_path / "summary.json", make_summary(**fields()))
    old = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_summary(path, make_summary(**(fields() | {"seed": 9})))
    assert path.read_bytes() == old and os.listdir(tmp_path) == ["summary.json"]
