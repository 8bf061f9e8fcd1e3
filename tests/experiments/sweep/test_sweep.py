"""Sweeps: which runs there are, what is shared, and what is made of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.rules import resolve
from configs import families
from configs import sweep as configs
from experiments.cnn import task as cnn
from experiments.common import models
from experiments.common.driver import Options
from experiments.common.report.summary import read_summary
from experiments.common.training import ConfigError, phases
from experiments.sweep import task as sweep


def _config(**changes) -> sweep.Config:
    return dataclasses.replace(sweep.read(configs.get_config("digits_tiny")), **changes)


@pytest.mark.parametrize("variant", [*configs.VARIANTS, *(f"{v}_tiny" for v in configs.VARIANTS)])
def test_every_variant_can_be_read(variant) -> None:
    config = sweep.read(configs.get_config(variant))
    assert config.variant == variant
    assert all(p.rules for p in config.points)


_WHOLE = [pytest.param(v, marks=pytest.mark.slow) for v in families.VARIANTS]


@pytest.mark.parametrize("variant", [*_WHOLE, *(f"{v}_tiny" for v in families.VARIANTS)])
def test_every_family_fits_its_network(variant) -> None:
    config = sweep.read(families.get_config(variant))
    assert config.variant == variant
    shape = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10_subset": (32, 32, 3)}[config.base.data.name]
    model = models.build(config.base.model.name, classes=10, **config.base.model.options)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *shape))))["params"]
    for point in config.points:
        assert resolve(phases.build_rules(point.rules), {"params": params})  # raises where a rule matches nothing


def test_every_seed_trains_one_dense_network(tmp_path) -> None:
    todo = sweep.runs(_config(), tmp_path)
    names = [r.name for r in todo if r.seed == 1]
    assert names == ["dense-s1", "admm-20x-s1", "one_shot-20x-s1", "admm-40x-s1", "one_shot-40x-s1"]
    assert len(todo) == 10
    for r in todo:
        assert r.config.seed == r.seed
        assert r.config.init_from == ("" if r.method == "dense" else str(tmp_path / "runs" / f"dense-s{r.seed}"))
        assert r.config.plan.method == r.method
    without = sweep.runs(_config(methods=("gradual",)), tmp_path)
    assert [r.config.init_from for r in without[:2]] == ["", str(tmp_path / "runs" / "gradual-20x-s0")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"methods": ("magic",)}, "methods=.* is impossible"),
        ({"seeds": (1, 1)}, "seeds=.* give different ones"),
        ({"points": ()}, "points must have names"),
        ({"against": "joules"}, "against='joules' is impossible; it must be weights, bytes, multiplications"),
        ({"budgets": (0.5,)}, "budgets=.* is impossible"),
    ],
)
def test_impossible_sweeps_are_refused(change, words) -> None:
    with pytest.raises(ConfigError, match=words):
        _config(**change)


def test_rules_of_a_file_do_not_go_with_points() -> None:
    with pytest.raises(ConfigError, match="base.rules='r.json': the points of a sweep give the rules"):
        _config(base=dataclasses.replace(_config().base, rules="r.json"))


def test_a_given_dense_network_serves_every_run(tmp_path) -> None:
    base = dataclasses.replace(_config().base, init_from="elsewhere")
    assert {r.config.init_from for r in sweep.runs(_config(base=base), tmp_path)} == {"elsewhere"}


def test_published_weights_are_read_once_a_seed(tmp_path) -> None:
    config = sweep.read(families.get_config("cifar_resnet32_patterns"))
    first, *others = sweep.runs(config, tmp_path)
    assert (first.config.model, first.config.init_from) == (config.base.model, "") and config.base.model.checkpoint
    dense = str(tmp_path / "runs" / "dense-s0")
    assert {(r.config.model.checkpoint, r.config.init_from) for r in others} == {("", dense)}


def _staged() -> sweep.Config:
    return sweep.read(families.get_config("digits_families_tiny"))


def test_forms_prunes_then_polarizes_then_quantizes_in_the_epochs_of_the_others(tmp_path) -> None:
    config = sweep.read(families.get_config("digits_families"))
    (point,) = [p for p in config.points if p.name == "forms-4x"]
    kinds = [phases.build_rules(s.rules)[0][1].sets for s in point.stages]
    assert [[part.spec["kind"] for part in sets] for sets in kinds] == [
        ["filters_and_columns"],
        ["filters_and_columns", "polarize"],
        ["filters_and_columns", "polarize", "quantize"],
    ]
    assert [s.admm.refresh_every for s in point.stages] == [0, 1, 0]
    todo = [r for r in sweep.runs(config, tmp_path) if r.method == "admm" and r.seed == 0]
    lengths = {r.point: sum(s.admm.epochs + s.retrain.epochs for s in r.config.plan.stages) for r in todo}
    assert set(lengths.values()) == {35}
    assert [len(r.config.plan.stages) for r in todo if r.point == "forms-4x"] == [3]


def test_stages_belong_to_admm_alone_and_have_its_epochs_and_rules(tmp_path) -> None:
    config = _staged()
    assert [bool(p.stages) for p in config.points].count(True) == 1
    todo = sweep.runs(dataclasses.replace(config, methods=("admm", "one_shot")), tmp_path)
    assert sorted(len(r.config.plan.stages) for r in todo) == [1, 1, 1, 3]
    one, other = sorted(config.points, key=lambda p: len(p.stages))
    with pytest.raises(ConfigError, match="its stages have .* epochs of ADMM"):
        dataclasses.replace(config, points=(dataclasses.replace(other, stages=other.stages[-1:]),))
    with pytest.raises(ConfigError, match="the rules of its last stage are not its rules"):
        dataclasses.replace(config, points=(dataclasses.replace(other, rules=one.rules),))


def test_random_libraries_are_distinct_draws() -> None:
    a, b = families.random_masks(8, 0), families.random_masks(8, 1)
    assert set(a) != set(b)
    for masks in (a, b):
        assert len({frozenset(m) for m in masks}) == 8 and all(len(set(m)) == 4 for m in masks)


def test_balanced_and_layer_connectivity_keep_as_many_kernels() -> None:
    rules = {p["name"]: p["rules"][0][1] for p in families.patterns_8x("x")["points"]}
    for cin, cout in ((16, 16), (16, 32), (32, 64), (64, 64)):
        w = jax.random.normal(jax.random.key(cin), (3, 3, cin, cout))
        kept = []
        for name in ("kernels-4x", "balanced-4x"):
            constraint = phases.build_rules((("x", rules[name]),))[0][1]
            kept.append(int(jnp.any(constraint.project(w, constraint.init(w)) != 0, axis=(0, 1)).sum()))
        assert kept == [cin * cout // 4] * 2


def test_accuracy_at_equal_bytes_is_interpolated_and_never_extrapolated() -> None:
    def row(family, rate, mean):
        return {"family": family, "method": "admm", "bytes_rate": rate, "mean": mean}

    rows = [row("a", 16.0, 0.6), row("a", 4.0, 0.9), row("b", 8.0, 0.7), row("b", 8.0, 0.8)]
    rows.append(row(None, None, 0.99) | {"method": "dense"})
    got = {(r["family"], r["bytes_rate"]): r["accuracy"] for r in sweep.at_bytes(rows, (4.0, 8.0, 32.0))}
    assert got == {
        ("a", 4.0): pytest.approx(0.9),
        ("a", 8.0): pytest.approx(0.75),  # half way in log(bytes)
        ("a", 32.0): None,
        ("b", 4.0): None,
        ("b", 8.0): pytest.approx(0.8),
        ("b", 32.0): None,
    }


def _fake(values, calls):
    """A driver that answers from a table: (method, point, seed) -> accuracy."""

    def run(config, options):
        name = options.workdir.name
        calls.append(name)
        value = values(name)
        dense = config.plan.method == "dense"
        metric = {"name": "accuracy", "higher_is_better": True, "dense": 0.99, "dense_same_budget": None}
        metric |= {"one_shot": None, "hardened": 0.5, "compressed": None if dense else value}
        metric |= {"dense_same_budget": value if dense else None}
        rate = 20.0 if "20x" in name else 40.0
        return {
            "dataset": {"name": "digits", "source": "here", "train": 1, "test": 1, "stand_in": False},
            "metric": metric,
            "rate": {"constrained_weights": None if dense else rate, "all_weights": None, "bytes": 5.0},
            "violations": 0,
            "seconds": 2.0,
        }

    return run


def test_the_table_is_mean_and_spread_over_seeds(tmp_path, monkeypatch, capsys) -> None:
    accuracies = {f"admm-40x-s{s}": a for s, a in ((0, 0.9), (1, 0.94))}
    calls: list[str] = []
    monkeypatch.setattr(cnn, "train_and_evaluate", _fake(lambda name: accuracies.get(name, 0.8), calls))
    summary = sweep.run(_config(), Options(tmp_path))
    assert read_summary(tmp_path / "summary.json") == summary
    (row,) = [r for r in summary["sweep"]["rows"] if (r["method"], r["point"]) == ("admm", "40x")]
    assert row["accuracy"] == [0.9, 0.94]
    assert row["mean"] == pytest.approx(0.92)
    assert row["spread"] == pytest.approx(np.std([0.9, 0.94], ddof=1))
    assert summary["metric"] | {"name": "", "higher_is_better": True} == {
        "name": "",
        "higher_is_better": True,
        "dense": 0.99,
        "dense_same_budget": 0.8,
        "one_shot": 0.8,
        "hardened": None,
        "compressed": pytest.approx(0.92),
    }
    assert summary["rate"]["constrained_weights"] == 40.0
    assert summary["seconds"] == 20.0
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "runs/admm-40x-s1/report.html" in (tmp_path / "report.html").read_text()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == len(calls) == 10
    assert sweep.run(_config(), Options(tmp_path)) == summary  # finished: nothing is run again
    assert len(calls) == 10
    with pytest.raises(ConfigError, match="another config"):
        sweep.run(_config(seeds=(5,)), Options(tmp_path))


def test_a_sweep_against_multiplications_needs_runs_that_counted_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(cnn, "train_and_evaluate", _fake(lambda name: 0.8, []))
    with pytest.raises(ConfigError, match="against='multiplications': a run below .* does not say"):
        sweep.run(_config(against="multiplications"), Options(tmp_path))


def test_a_bad_point_is_refused_before_anything_is_trained(tmp_path) -> None:
    point = sweep.Point("x", (("params/c9/kernel", {"kind": "unstructured", "keep": 3}),))
    with pytest.raises(ConfigError, match="matches nothing"):
        sweep.run(_config(points=(*_config().points, point)), Options(tmp_path / "x"))
    assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_sweep_runs_and_goes_on(tmp_path, monkeypatch) -> None:
    config = _config(seeds=(0,), methods=("admm", "dense"), points=_config().points[:1])
    real, count = cnn.train_and_evaluate, [0]

    def stopping(*args):
        count[0] += 1
        if count[0] == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(cnn, "train_and_evaluate", stopping)
    with pytest.raises(KeyboardInterrupt):
        sweep.run(config, Options(tmp_path))
    monkeypatch.setattr(cnn, "train_and_evaluate", real)
    summary = sweep.run(config, Options(tmp_path))
    one = json.loads((tmp_path / "runs" / "admm-20x-s0" / "summary.json").read_text())
    assert summary["metric"]["compressed"] == one["metric"]["compressed"]
    assert one["cnn"]["init_from"] == str(tmp_path / "runs" / "dense-s0")
