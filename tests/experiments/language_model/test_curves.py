"""Comparison of structures: which runs there are, what they share, how curves are read."""

import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import kernels
from compressx.constraints import from_spec
from configs import language_model as configs
from experiments.common import runner
from experiments.common.driver import Options
from experiments.common.training import ConfigError
from experiments.language_model import config as language_model_config
from experiments.language_model import curves as language_curves
from experiments.language_model import task as language_model


def _config(variant="curves_generated_tiny", **changes):
    settings = configs.get_config(variant).unlock()
    for key, value in changes.items():
        settings[key] = value
    return language_curves.read(settings)


def test_every_point_starts_from_its_seeds_dense_network_with_the_same_budget(tmp_path) -> None:
    config = _config("curves_war_and_peace")
    todo = language_curves.runs(config, tmp_path)
    assert len({r.name for r in todo}) == len(todo)
    budget = config.base.plan.stages[0]
    for r in todo:
        source = "" if r.point is None else str(tmp_path / "runs" / f"dense-s{r.seed}")
        assert r.config.init_from == source and r.config.seed == r.seed
        stage = r.config.plan.stages[0]
        if r.point is not None:
            assert (stage.admm, stage.retrain) == (budget.admm, budget.retrain)
            if r.point.curve != "darb permuted":
                assert stage.rules == r.point.rules
    first = {seed: next(r for r in todo if r.seed == seed) for seed in (0, 1, 2)}
    assert all(r.point is None for r in first.values())
    seeds = {(r.point.curve, r.point.name): set() for r in todo if r.point}
    for r in todo:
        if r.point:
            seeds[r.point.curve, r.point.name].add(r.seed)
    for curve in ("darb", "bmwm", "irregular", "bank-balanced", "block", "row", "darb permuted"):
        assert seeds[curve, "8x"] == {0, 1, 2}
    for curve in ("irregular", "darb", "bmwm", "bank-balanced", "block", "row"):
        assert {f"{rate}x" for rate in (4, 8, 16, 32)} == {n for c, n in seeds if c == curve}
    controls = {"darb inverse", "darb uniform", "darb fan-in", "darb one-shot", "dense"}
    assert {c for c, n in seeds if n == "8x"} >= controls


def test_every_seed_deals_the_block_sizes_anew(tmp_path) -> None:
    todo = [r for r in language_curves.runs(_config("curves_generated"), tmp_path) if r.point]
    specs = {r.seed: r.config.plan.stages[0].rules[0][1] for r in todo if r.point.curve == "darb permuted"}
    assert {seed: spec.get("seed", 0) for seed, spec in specs.items()} == {0: 0, 1: 1, 2: 2}
    w = jax.random.normal(jax.random.key(0), (64, 256), jnp.float32) * jnp.linspace(0.1, 3, 64)[:, None]
    places = [np.asarray(from_spec(spec).init(w)) for spec in specs.values()]
    assert not any((a == b).all() for a, b in itertools.combinations(places, 2))
    assert len({tuple(np.sort(p)) for p in places}) == 1  # the same sizes, for other rows


def test_a_rule_that_names_its_seed_keeps_it() -> None:
    settings = configs.get_config("generated_tiny").unlock()
    spec = {"kind": "darb", "density": 0.1, "assignment": "permuted"}
    settings.seed = 3
    for given, seed in (({}, 3), ({"seed": 7}, 7)):
        both = {"kind": "all", "parts": ({**spec, **given}, {"kind": "quantize", "bits": 4})}
        settings.plan.stages[0]["rules"] = (("softmax", both), ("lstm", {**spec, **given}), ("bias", None))
        (_, a), (_, b), (_, c) = language_model_config.read(settings).plan.stages[0].rules
        assert a["parts"][0]["seed"] == b["seed"] == seed and a["parts"][1] == both["parts"][1] and c is None


@pytest.mark.slow
def test_the_structures_keep_the_same_number_of_weights() -> None:
    """On the shape of a matrix of the War and Peace network, before any training."""
    w = jax.random.normal(jax.random.key(0), (128, 512), jnp.float32)
    exact = w.size // 16
    for name, ((_, spec),) in {**configs.structures(16), **configs.controls(16)}.items():
        constraint = from_spec({k: list(v) if isinstance(v, tuple) else v for k, v in spec.items()})
        kept = int(jax.jit(lambda w, c=constraint: jnp.count_nonzero(c.project(w, c.init(w))))(w))
        assert kept == exact or ("darb" in name and abs(kept / exact - 1) < 0.02), (name, kept, exact)


def test_the_rate_at_equal_perplexity() -> None:
    rows = [{"rate": r, "mean": p} for r, p in ((4.0, 100.0), (16.0, 400.0), (8.0, 200.0))]
    assert language_curves.rate_at(rows, 200.0) == ("at", pytest.approx(8.0))
    assert language_curves.rate_at(rows, 100 * math.sqrt(2)) == ("at", pytest.approx(4 * math.sqrt(2)))
    assert language_curves.rate_at(rows, 90.0) == ("below", 4.0)
    assert language_curves.rate_at(rows, 500.0) == ("above", 16.0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"at": "5x"}, "main='darb' at='5x' is no point"),
        ({"seeds": ()}, "seeds=.. is impossible"),
        ({"points": ()}, "points need names"),
    ],
)
def test_what_is_wrong_is_said(changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        _config(**changes)


def test_a_folder_of_another_experiment_or_of_another_run_is_left_alone(tmp_path) -> None:
    config = _config()
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(_config("curves_war_and_peace_tiny"))))
    with pytest.raises(ConfigError, match="holds a run with another config"):
        language_curves.run(config, Options(tmp_path))
    folder = tmp_path / "c" / "runs" / "row-16x-s0"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    fewer = dataclasses.replace(config, points=config.points[:-1])
    (tmp_path / "c" / "config.json").write_text(before := json.dumps(dataclasses.asdict(fewer)))
    with pytest.raises(ConfigError, match="row-16x-s0 holds a run with another config"):  # before anything is written
        language_curves.run(config, Options(tmp_path / "c"))
    assert (tmp_path / "c" / "config.json").read_text() == before and len(list(folder.parent.iterdir())) == 1


@pytest.mark.slow
def test_a_tiny_comparison_from_end_to_end(tmp_path, monkeypatch) -> None:
    config = _config()
    s = language_curves.run(config, Options(tmp_path / "c"))
    own = s["language_curves"]
    assert (tmp_path / "c" / "curves.png").exists() and (tmp_path / "c" / "report.html").exists()
    rows = {(r["curve"], r["point"]): r for r in own["rows"]}
    assert rows["darb", "16x"]["mean"] == s["metric"]["compressed"]
    assert rows["dense", "16x"]["mean"] == s["metric"]["dense_same_budget"] and rows["dense", "16x"]["rate"] is None
    assert rows["row", "16x"]["rate"] == pytest.approx(16, rel=0.01)
    assert own["observations"] and set(own["equal_perplexity"]) == {"darb", "row", "darb_one_shot"}
    assert s["violations"] == 0
    if kernels.recurrent.available():
        assert s["latency_ms"]["compressed"] == rows["darb", "16x"]["word_ms"] > 0
        assert rows["dense", "16x"]["word_ms"] == s["latency_ms"]["dense"] > 0 and rows["row", "8x"]["word_ms"] is None
    assert language_curves.run(config, Options(tmp_path / "c")) == s
    with pytest.raises(ConfigError, match="a comparison has no model"):
        language_curves.evaluate(config, Options(tmp_path / "c"))
    one = tmp_path / "c" / "runs" / "darb-16x-s0"
    base = language_model_config.read(configs.get_config("curves_generated_tiny").base)
    assert language_model.evaluate(base, Options(one))["metric"]["compressed"] == s["metric"]["compressed"]

    # another seed of one point: what was run is reused, the table has both
    made = []
    conclude = runner.conclude
    monkeypatch.setattr(runner, "conclude", lambda *a, **k: made.append(a[1].workdir.name) or conclude(*a, **k))
    points = tuple(
        dataclasses.replace(p, seeds=(0, 1)) if (p.curve, p.name) == ("row", "16x") else p for p in config.points
    )
    more = language_curves.run(dataclasses.replace(config, points=points), Options(tmp_path / "c"))
    assert made == ["dense-s1", "row-16x-s1", "c"]
    row = next(r for r in more["language_curves"]["rows"] if (r["curve"], r["point"]) == ("row", "16x"))
    assert row["perplexity"][0] == rows["row", "16x"]["mean"] and row["spread"] == np.std(row["perplexity"], ddof=1)
    assert more["metric"]["compressed"] == s["metric"]["compressed"]
