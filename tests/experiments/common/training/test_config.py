"""Configs: strict reading, and values that make no sense."""

import dataclasses

import pytest
from ml_collections import ConfigDict

from experiments.common.training.config import Admm, ConfigError, Fit, Plan, Stage, parse

RULES = ((".*/kernel", {"kind": "unstructured", "density": 0.5}),)
GOOD = {
    "dense": {"epochs": 3, "lr": 1},
    "stages": [{"rules": RULES, "admm": {"rho": [["a", 1], ["b", 0.5]]}, "retrain": {}}],
}


def test_reads_nested_mappings_and_config_dicts_alike() -> None:
    plan = parse(Plan, GOOD)
    assert plan == parse(Plan, ConfigDict(GOOD)) == parse(Plan, plan)
    assert plan.dense == Fit(epochs=3, lr=1.0)
    assert isinstance(plan.dense.lr, float)
    assert plan.stages[0].admm.rho == (("a", 1.0), ("b", 0.5))
    assert plan.stages[0].rules == RULES


def test_an_empty_flag_is_an_empty_list() -> None:
    assert parse(Plan, GOOD | {"baselines": ("",)}).baselines == ()


def test_what_is_read_is_what_was_written() -> None:
    plan = parse(Plan, GOOD)
    assert parse(Plan, dataclasses.asdict(plan)) == plan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dnse": {}}, r"config\.dnse is not a setting; the settings there are dense, stages"),
        ({"dense": {"epochs": 1.5}}, r"config\.dense\.epochs=1\.5 must be int, not float"),
        ({"dense": {"epochs": True}}, r"config\.dense\.epochs=True must be int"),
        ({"dense": 3}, r"config\.dense=3 must be a mapping"),
        ({"method": "magic"}, r"method='magic' is impossible; it must be one of admm, one_shot"),
        ({"baselines": "one_shot"}, r"config\.baselines='one_shot' must be a list"),
        ({"stages": [], "method": "one_shot"}, r"stages=\(\) is impossible; it must be given for another method"),
        ({"stages": [{"rules": []}]}, r"config\.stages\[0\]: rules=\(\) is impossible"),
        ({"stages": [{"rules": [["a"]]}]}, r"config\.stages\[0\]\.rules\[0\]=.* must have 2 entries"),
        ({"dense": {"distill": 0.5}}, "there is no teacher yet"),
    ],
)
def test_faults_name_the_key(change: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse(Plan, GOOD | change)


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": -1},
        {"lr": 0.0},
        {"schedule": "linear"},
        {"schedule": "piecewise"},
        {"schedule": "piecewise", "boundaries": (0.5, 0.5)},
        {"boundaries": (0.5,)},
        {"cycles": 0},
        {"warmup": 1.0},
        {"label_smoothing": 1.0},
        {"distill": 1.1},
        {"temperature": 0.0},
        {"weight_decay": -1.0},
    ],
)
def test_impossible_fits_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="is impossible; it must be"):
        Fit(**bad)


@pytest.mark.parametrize("bad", [{"rho": 0.0}, {"rho": (("a", -1.0),)}, {"rho_schedule": "x"}, {"every": -1}])
def test_impossible_admms_are_refused(bad: dict) -> None:
    with pytest.raises(ConfigError, match="is impossible; it must be"):
        Admm(**bad)


def test_a_missing_setting_without_a_default_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Needs:
        a: int
        b: int = 1

    with pytest.raises(ConfigError, match=r"config\.a is missing"):
        parse(Needs, {"b": 2})
    assert parse(Needs, {"a": 2}) == Needs(2)


def test_a_stage_needs_rules() -> None:
    with pytest.raises(ConfigError, match="at least one pair"):
        Stage()
