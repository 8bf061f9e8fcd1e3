"""Comparison of structures: which runs there are, what they share, how curves are read."""

import math

import jax
import jax.numpy as jnp
import pytest

from compressx.constraints import from_spec
from compressx.training import ConfigError
from configs import language_curves as configs
from configs import language_model as models
from experiments import language_curves, language_model
from experiments.driver import Options


def _config(variant="generated_tiny", **changes):
    settings = configs.get_config(variant).unlock()
    for key, value in changes.items():
        settings[key] = value
    return language_curves.read(settings)


def test_every_point_starts_from_its_seeds_dense_network_with_the_same_budget(tmp_path) -> None:
    config = _config("war_and_peace")
    todo = language_curves.runs(config, tmp_path)
    assert len({r.name for r in todo}) == len(todo)
    budget = config.base.plan.stages[0]
    for r in todo:
        source = "" if r.point is None else str(tmp_path / "runs" / f"dense-s{r.seed}")
        assert r.config.init_from == source and r.config.seed == r.seed
        stage = r.config.plan.stages[0]
        if r.point is not None:
            assert (stage.admm, stage.retrain) == (budget.admm, budget.retrain)
            assert stage.rules == r.point.rules
    first = {seed: next(r for r in todo if r.seed == seed) for seed in (0, 1, 2)}
    assert all(r.point is None for r in first.values())
    seeds = {(r.point.curve, r.point.name): set() for r in todo if r.point}
    for r in todo:
        if r.point:
            seeds[r.point.curve, r.point.name].add(r.seed)
    for curve in ("darb", "bmwm", "irregular", "block", "darb permuted"):
        assert seeds[curve, "8x"] == {0, 1, 2}
    for curve in ("irregular", "darb", "bmwm", "bank-balanced", "block", "row"):
        assert {f"{rate}x" for rate in (4, 8, 16, 32)} == {n for c, n in seeds if c == curve}
    controls = {"darb inverse", "darb uniform", "darb fan-in", "darb one-shot", "dense"}
    assert {c for c, n in seeds if n == "8x"} >= controls


@pytest.mark.slow
def test_the_structures_keep_the_same_number_of_weights() -> None:
    """On the shape of a matrix of the War and Peace network, before any training."""
    w = jax.random.normal(jax.random.key(0), (128, 512), jnp.float32)
    exact = w.size // 16
    for name, ((_, spec),) in {**models.structures(16), **models.controls(16)}.items():
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


@pytest.mark.slow
def test_a_tiny_comparison_from_end_to_end(tmp_path) -> None:
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
    assert language_curves.run(config, Options(tmp_path / "c")) == s
    with pytest.raises(ConfigError, match="a comparison has no model"):
        language_curves.evaluate(config, Options(tmp_path / "c"))
    one = tmp_path / "c" / "runs" / "darb-16x-s0"
    base = language_model.read(configs.get_config("generated_tiny").base)
    assert language_model.evaluate(base, Options(one))["metric"]["compressed"] == s["metric"]["compressed"]
