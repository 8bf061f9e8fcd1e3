"""The language-model driver from its config to its files, on the text that needs no data."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import cli, formats, kernels
from configs import language_model as configs
from experiments.common.data import text
from experiments.common.driver import Options
from experiments.common.report.summary import check_summary, read_summary
from experiments.common.training import ConfigError
from experiments.common.training.language import make_perplexity
from experiments.language_model import config as language_model_config
from experiments.language_model import curves
from experiments.language_model import task as language_model

FILES = (
    *("config.json", "metrics.jsonl", "compressed.safetensors", "rules.json", "report.html", "summary.json"),
    "checkpoints",
)
PLOTS = ("training", "residuals", "rho", "histograms", "kept", "masks", "blocks", "row_density", "row_sensitivity")


def _config(variant="generated_tiny", **changes):
    settings = configs.get_config(variant).unlock()
    for key, value in changes.items():
        *path, last = key.split("__")
        target = settings
        for part in path:
            target = target[int(part)] if part.isdecimal() else target[part]
        target[last] = value
    return language_model_config.read(settings)


def _small(**changes):
    """One layer and no baselines: fewer programs to compile."""
    return _config(**{"plan__baselines": (), "model__layers": 1, **changes})


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished tiny run: its folder and its summary. Tests do not change it."""
    folder = tmp_path_factory.mktemp("language") / "run"
    return folder, language_model.train_and_evaluate(_small(), Options(folder, command="python"))


def test_it_leaves_everything_behind_and_says_what_happened(done) -> None:
    folder, s = done
    assert all((folder / name).exists() for name in (*FILES, *(f"{p}.png" for p in PLOTS)))
    assert check_summary(s) == read_summary(folder / "summary.json")
    page = (folder / "report.html").read_text()
    assert "<script" not in page and "&lt;unk&gt; left out" in page
    assert s["metric"]["name"] == "perplexity" and s["metric"]["higher_is_better"] is False
    assert all(s["metric"][k] > 1 for k in ("dense", "hardened", "compressed"))
    assert s["metric"]["one_shot"] is None and s["violations"] == 0
    own = s["language_model"]
    assert own["references"]["source"] is None  # the text was cut, and the source's perplexity is that of the whole
    assert own["places"] == 299 and own["words"] == 128
    assert set(own["exact"]) == {"dense", "retrain", "hardened"}
    # the total rate counts non-zeros in the stored weights, and is within a per cent of what was asked for
    kept = sum(b["nonzeros"] for b in own["blocks"].values())
    assert s["rate"]["constrained_weights"] == 3 * 32 * 128 / kept == pytest.approx(16, rel=0.01)
    assert set(own["observations"]) == {"density", "loss", "words", *own["blocks"]}
    for b in own["blocks"].values():
        assert b["places"] >= b["nonzeros"] and set(map(int, b["sizes"])) <= {1, 2, 4, 8, 16, 32, 64, 128}
        assert b["spearman"] > 0.8


def test_a_words_time_is_measured_or_says_why_not(done) -> None:
    folder, s = done
    facts, times = s["language_model"]["latency"], s["latency_ms"]
    page = (folder / "report.html").read_text()
    if kernels.recurrent.available():
        assert times["compressed"] == facts["compressed_ms"]["median"] > 0 and times["dense"] > 0
        assert facts["path"] in page
    else:
        assert times == {"dense": None, "compressed": None} and facts["reason"] in page


def test_storage_is_counted_in_real_arrays(done) -> None:
    folder, s = done
    saved = formats.load_model(folder / "compressed.safetensors")
    held = list(s["language_model"]["blocks"])
    packed = {p: saved.packed[p] for p in held}
    assert {p.format for p in packed.values()} == {"block-max"}
    storage = s["language_model"]["storage"]
    assert storage["block-max"]["bytes"] == sum(formats.nbytes(p) for p in packed.values())
    assert storage["block-max"]["bytes"] == min(v["bytes"] for v in storage.values())
    assert storage["dense"]["bytes"] == 4 * 3 * 32 * 128
    assert {"block-max", "bitmask", "csr16", "csr", "coo-delta", "dense", "bank-balanced"} <= set(storage)
    work = s["language_model"]["decoding"]["bank-balanced"]
    assert work["reads"] == work["products"] >= 1 and work["additions"] == 0
    entries = round(work["products"] * sum(b["nonzeros"] for b in s["language_model"]["blocks"].values()))
    assert storage["bank-balanced"]["bytes"] == pytest.approx(entries * (4 + 6 / 8), abs=3)  # 6 bits in banks of 64
    assert cli.main(["verify", str(folder / "compressed.safetensors")]) == 0


def test_the_figure_is_the_perplexity_of_the_stored_network(done) -> None:
    folder, s = done
    saved = formats.load_model(folder / "compressed.safetensors")
    corpus = text.load("generated")
    model = language_model.build_model(_small().model, 128)
    logits, _ = jax.jit(model.apply)(saved.params, jnp.asarray(corpus.test[None, :299]))
    p = np.asarray(jax.nn.log_softmax(logits[0], -1), np.float64)
    nats = -p[np.arange(299), corpus.test[1:300]].sum()
    assert s["metric"]["compressed"] == pytest.approx(math.exp(nats / 299), rel=1e-5)


def test_evaluation_of_the_file_on_other_parts(done, capsys) -> None:
    folder, s = done
    config = _small()
    again = language_model.evaluate(config, Options(folder))
    assert again["metric"]["compressed"] == s["metric"]["compressed"]
    assert again["rate"] == s["rate"]
    other = language_model.evaluate(config, Options(folder, split="validation"))
    assert read_summary(folder / "eval" / "generated-validation" / "summary.json") == other
    assert other["dataset"]["test"] == 300
    with pytest.raises(ConfigError, match="--split=dev is impossible; a text has train, validation, test"):
        language_model.evaluate(config, Options(folder, split="dev"))
    with pytest.raises(ConfigError, match="finish the run first"):
        language_model.evaluate(config, Options(folder / "nowhere"))


@pytest.mark.slow
def test_another_text_is_read_with_the_networks_own_words(done, tmp_path) -> None:
    folder, _ = done
    (tmp_path / "ptb").mkdir()
    for part in ("train", "valid", "test"):
        (tmp_path / "ptb" / f"ptb.{part}.txt").write_text("the ship sails near zebras\n" * 4)
    out = language_model.evaluate(
        _small(data__name="ptb", data__test=0, data__train=0, data__validation=0), Options(folder, str(tmp_path))
    )
    assert out["language_model"]["unknown"] == pytest.approx(1 / 6)


def test_a_finished_run_is_left_as_it_is(done, capsys) -> None:
    folder, summary = done
    assert language_model.train_and_evaluate(_small(), Options(folder)) == summary
    assert "is finished and left as it is" in capsys.readouterr().out


def test_files_of_others_are_refused_by_name(done, tmp_path) -> None:
    saved = formats.load_model(done[0] / "compressed.safetensors")
    words, options = saved.extra["words"], saved.model["options"]
    path = tmp_path / "compressed.safetensors"
    for model, extra, what in (
        ({"name": "lenet5", "options": {}}, {"words": words}, "was not written by this driver"),
        ({"name": "lstm_lm", "options": options}, {"words": "abc"}, "its vocabulary is missing"),
        ({"name": "lstm_lm", "options": options}, {"words": [*words[:-1], words[0]]}, "different printable words"),
        ({"name": "lstm_lm", "options": options}, {"words": ["\x1b[2J", *words[1:]]}, "different printable words"),
        ({"name": "lstm_lm", "options": {**options, "hidden": "x"}}, {"words": words}, "model.hidden='x' must be int"),
        ({"name": "lstm_lm", "options": {**options, "hidden": 10**6}}, {"words": words}, "do not fit a network"),
        ({"name": "lstm_lm", "options": {**options, "depth": 3}}, {"words": words}, "model.depth is not a setting"),
    ):
        formats.save_model(path, saved.params, (), None, model=model, extra=extra)
        with pytest.raises(ConfigError, match=what):
            language_model.evaluate(_small(), Options(tmp_path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__name": "tolstoy"}, "data: no text 'tolstoy'; there are generated"),
        ({"data__vocabulary": 500}, "data: vocabulary=500 is impossible"),
        ({"data__train": 1}, "data.train=1 is impossible; it must be 0 or 2 to 48000"),
        ({"batch": 700}, "a text of 1300 words is too short for 700 lanes of 8 words"),
        ({"batch": 0}, "batch=0 is impossible"),
        ({"clip": -1.0}, "clip=-1.0 is impossible"),
        ({"loss": "char"}, "loss='char' is impossible; it must be word or window"),
        ({"optimizer": "lbfgs"}, "optimizer='lbfgs' is impossible"),
        ({"model__dropout": 1.5}, "model: dropout=1.5 is impossible"),
        ({"plan__stages__0__retrain__distill": 0.5}, "distill and label_smoothing are not for language models"),
        ({"init_from": "nowhere"}, "init_from='nowhere' is not a run"),
        ({"plan__stages__0__rules": (("params/gru/kernel", {"kind": "darb", "density": 0.1}),)}, "matches nothing"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_written(tmp_path, changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        language_model.train_and_evaluate(_config(**changes), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_dense_network_of_other_lanes_is_refused(done, tmp_path) -> None:
    with pytest.raises(ConfigError, match="is a run with another batch$"):
        language_model.train_and_evaluate(_small(init_from=str(done[0]), batch=4), Options(tmp_path / "run"))


def test_every_variant_is_a_config_and_keeps_what_it_says() -> None:
    for name in configs.VARIANTS:
        for variant in (name, f"{name}_tiny"):
            config = curves.read(configs.get_config(variant))
            assert config.variant == variant
            assert isinstance(config, curves.Config) == name.startswith("curves_")
    large = language_model_config.read(configs.get_config("ptb"))
    assert dataclasses.astuple(large.model) == (1500, 0, 2, 0.65, 0.04)
    assert (large.optimizer, large.clip, large.loss) == ("plain_sgd", 10.0, "window")
    assert (large.batch, large.data.steps) == (20, 35)
    assert (large.plan.dense.epochs, large.plan.dense.boundaries[0]) == (55, 14 / 55)
    assert large.paper.value == 78.4
    with pytest.raises(ValueError, match="no variant 'ptbb'; there are generated, war_and_peace"):
        configs.get_config("ptbb")


@pytest.mark.slow
def test_all_baselines_and_sample_text(tmp_path) -> None:
    s = language_model.train_and_evaluate(_config(), Options(tmp_path / "run"))
    assert all(s["metric"][k] is not None for k in ("dense", "dense_same_budget", "one_shot", "hardened", "compressed"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Sample text" in page and "Three observations" in page


@pytest.mark.slow
def test_it_learns_the_drawn_text(tmp_path) -> None:
    """Half of the epochs of the full variant: below the count models, above the source, which nothing beats."""
    config = _config("generated", plan__baselines=(), sample=0, probe__run=False)
    fit = dataclasses.replace
    stage = config.plan.stages[0]
    stage = fit(stage, admm=fit(stage.admm, epochs=3, every=90), retrain=fit(stage.retrain, epochs=3))
    config = fit(config, plan=fit(config.plan, dense=fit(config.plan.dense, epochs=4), stages=(stage,)))
    s = language_model.train_and_evaluate(config, Options(tmp_path / "run"))
    own = s["language_model"]["references"]
    assert own["source"] < s["metric"]["dense"] < own["bigram"] < own["unigram"]
    assert own["source"] < s["metric"]["compressed"] < own["bigram"]


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["war_and_peace_tiny", "wikitext2_partial_tiny"])
def test_the_stand_ins(variant, tmp_path, data_dir) -> None:
    config = _config(variant, plan__baselines=(), model__layers=1, probe__run=False)
    s = language_model.train_and_evaluate(config, Options(tmp_path, str(data_dir)))
    assert s["dataset"]["stand_in"] and s["violations"] == 0
    assert s["language_model"]["words"] == 96


def test_perplexity_of_a_network_that_knows_nothing(done) -> None:
    """All logits alike: every word one in 128."""
    model = language_model.build_model(_small().model, 128)
    zeros = jax.tree.map(jnp.zeros_like, formats.load_model(done[0] / "compressed.safetensors").params)
    assert make_perplexity(model)(zeros, text.load("generated").test[:50]).value == pytest.approx(128, rel=1e-5)
