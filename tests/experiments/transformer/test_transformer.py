"""The transformer driver from its config to its files, for images and for a text."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import formats
from compressx.rules import resolve
from configs import transformer as configs
from experiments.common.driver import Options
from experiments.common.report.summary import check_summary, read_summary
from experiments.common.training import ConfigError, phases
from experiments.transformer import config as transformer_config
from experiments.transformer import measures, sets, subjects, task
from experiments.transformer.config import Config, Data, Model

FILES = ("config.json", "metrics.jsonl", "compressed.safetensors", "compacted.safetensors", "rules.json", "report.html")


def made(variant: str, **changes: Any) -> Config:
    config = transformer_config.read(configs.get_config(variant))
    return dataclasses.replace(config, **changes)


def without_baselines(config: Config) -> Config:
    return dataclasses.replace(config, plan=dataclasses.replace(config.plan, baselines=()))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a vision transformer's run. Tests do not change it."""
    folder = tmp_path_factory.mktemp("transformer") / "run"
    task.train_and_evaluate(without_baselines(made("vit_digits_tiny")), Options(folder))
    return folder


def test_a_run_removes_heads_and_units_and_says_what_that_brought(done: Path) -> None:
    assert all((done / name).exists() for name in FILES)
    s = check_summary(read_summary(done / "summary.json"))
    assert (s["driver"], s["variant"], s["violations"]) == ("transformer", "vit_digits_tiny", 0)
    block = s["transformer"]
    assert block["kept"] == {"heads": [2], "units": [16]}
    cut, beside = block["compacted"], block["beside"]
    assert cut["bytes"]["compacted"] < s["bytes"]["packed"] < cut["bytes"]["dense"]
    assert cut["largest_difference"] < 1e-4 and cut["same_from_file"]
    small = formats.load_model(done / "compacted.safetensors").params["params"]["stack"]["layer0"]
    shapes = {k: small["attention"][k]["kernel"].shape for k in ("query", "key", "value", "out")}
    assert shapes == {"query": (16, 8), "key": (16, 8), "value": (16, 8), "out": (8, 16)}
    assert small["mlp"]["down"]["kernel"].shape == (16, 16)
    assert 0 < cut["bytes"]["compacted"] - beside["narrower"]["bytes"] < 2 * 4 * 16  # a hidden unit more would not fit
    assert beside["narrower"]["epochs"] == 3 and 0 <= beside["narrower"]["value"] <= 1
    assert s["latency_ms"]["dense"] > 0 < s["latency_ms"]["compressed"]
    assert "Heads and units removed" in (done / "report.html").read_text()


def test_a_finished_run_is_evaluated_from_its_file(done: Path) -> None:
    told = task.evaluate(made("vit_digits_tiny"), Options(done))
    assert told["metric"]["compressed"] == read_summary(done / "summary.json")["metric"]["compressed"]
    assert json.loads((done / "eval" / "digits-test" / "summary.json").read_text())["transformer"]["mode"] == "eval"
    with pytest.raises(ConfigError, match="is a network of images"):
        task.evaluate(made("decoder_generated_tiny"), Options(done))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "_unstructured_8x", "_2of4", "_blocks_4x", "_4bit"])
def test_a_decoder_goes_the_whole_way_under_every_set(name: str, tmp_path: Path) -> None:
    config = without_baselines(made(f"decoder_generated{name}_tiny"))
    s = check_summary(task.train_and_evaluate(config, Options(tmp_path)))
    assert s["violations"] == 0 and s["metric"]["name"] == "perplexity"
    assert s["rate"]["bytes"] > 1 and (s["transformer"]["compacted"] is None) == bool(name)
    told = task.evaluate(config, Options(tmp_path))
    assert told["metric"]["compressed"] == pytest.approx(s["metric"]["compressed"], rel=1e-6)


def test_the_perplexity_is_that_of_every_next_symbol() -> None:
    given, model = Data("text", "generated", train=700, test=100, window=16), Model(8, 2, 8, 1)
    subject = subjects.load(given, None)
    assert [w.shape[1] for w in (subject.train["inputs"], subject.test["labels"])] == [16, 16]
    net = subjects.network(model, given, subject)
    variables = net.init(jax.random.key(1))
    logits = np.asarray(jax.jit(net.apply)(variables, jnp.asarray(subject.test["inputs"])), np.float64)
    labels = subject.test["labels"]
    chosen = np.take_along_axis(logits, np.maximum(labels, 0)[..., None], -1)[..., 0]
    nats = (np.log(np.exp(logits).sum(-1)) - chosen)[labels >= 0]
    assert nats.size == 99
    valid = jnp.ones(len(labels), bool)
    sums = subjects.next_symbol(net).score(variables, {}, jax.tree.map(jnp.asarray, subject.test), valid)
    assert int(sums.seen) == 99
    assert subject.value({"loss": float(sums.loss) / 99}) == pytest.approx(math.exp(nats.mean()), rel=1e-5)


def test_a_symbol_knows_nothing_of_those_behind_it() -> None:
    given = Data("text", "generated", train=700, test=100, window=16)
    subject = subjects.load(given, None)
    net = subjects.network(Model(8, 2, 8, 2), given, subject)
    variables, apply = net.init(jax.random.key(1)), jax.jit(net.apply)
    one = jnp.asarray(subject.test["inputs"][:1])
    other = one.at[0, 9].set((one[0, 9] + 1) % subject.classes)
    a, b = np.asarray(apply(variables, one)), np.asarray(apply(variables, other))
    np.testing.assert_array_equal(a[0, :9], b[0, :9])
    assert (a[0, 9:] != b[0, 9:]).any(-1).all()


@pytest.mark.parametrize(
    "variant", ["vit_digits_unstructured_16x", "vit_digits_4bit", "decoder_generated_coupled_1of4"]
)
def test_variants_fit_their_networks(variant: str) -> None:
    config = made(variant)
    subject = subjects.load(config.data, None)
    net = subjects.network(config.model, config.data, subject)
    plan = sets.resolved(config.plan, net, subject.example(config.data))
    last = next(p for p in phases.plan(plan) if p.name == phases.final(plan))
    bound = resolve(last.rules or (), net.like())
    assert len(bound) == (2 if sets.is_coupled(config.plan) else 6) * config.model.layers


def test_impossible_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="data.subject='sound' is impossible"):
        Data(subject="sound")
    smoothed = configs.get_config("decoder_generated_tiny").to_dict()
    smoothed["plan"]["dense"]["label_smoothing"] = 0.1
    with pytest.raises(ConfigError, match="distill and label_smoothing are not for text"):
        transformer_config.read(smoothed)
    subject = subjects.load(Data(), None)
    with pytest.raises(ConfigError, match="width=10 is not a multiple of heads=4"):
        subjects.network(Model(width=10, heads=4), Data(), subject)
    with pytest.raises(ConfigError, match="do not divide into patches of 3x3"):
        subjects.network(Model(patch=3), Data(), subject)
    net = subjects.network(Model(8, 2, 8, 1, patch=4), Data(), subject)
    wrong = (({"heads": 0}, "heads=0.0 is impossible"), ({}, "both kept whole"), ({"legs": 1}, "no setting 'legs'"))
    config = made("vit_digits")
    for spec, text in wrong:
        rules = (("", {"kind": sets.COUPLED, **spec}),)
        stage = dataclasses.replace(config.plan.stages[0], rules=rules)
        with pytest.raises(ConfigError, match=text):
            sets.resolved(dataclasses.replace(config.plan, stages=(stage,)), net, subject.example(Data()))
    with pytest.raises(ValueError, match="no network of 1 layers and 2 heads has at most 100 bytes"):
        measures.narrower(Model(8, 2, 8, 1, patch=4), lambda m: subjects.network(m, Data(), subject), 100)
