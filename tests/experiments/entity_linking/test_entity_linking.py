"""The entity-linking driver from its config to its files, on the world that needs no data."""

import json

import jax
import numpy as np
import pytest

from compressx import cli, formats
from configs import entity_linking as configs
from experiments.common.driver import Options
from experiments.common.report.summary import check_summary, read_summary
from experiments.common.training import ConfigError
from experiments.entity_linking import config as linking_config
from experiments.entity_linking import task as entity_linking

FILES = (
    *("config.json", "metrics.jsonl", "compressed.safetensors", "rules.json", "report.html", "summary.json"),
    "arms/dense",
)


def _config(variant: str = "generated_tiny", **changes):
    settings = configs.get_config(variant).unlock()
    for key, value in changes.items():
        *path, last = key.split("__")
        target = settings
        for part in path:
            target = target[int(part)] if part.isdecimal() else target[part]
        target[last] = value
    return linking_config.read(settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished tiny run: its folder and its summary. Tests do not change it."""
    folder = tmp_path_factory.mktemp("linking") / "run"
    config = _config(arms=[configs.arm("local", ("prior",))], plan__baselines=())
    return config, folder, entity_linking.train_and_evaluate(config, Options(folder, command="python -m x"))


def test_it_leaves_everything_behind(done) -> None:
    _, folder, summary = done
    assert all((folder / name).exists() for name in FILES)
    assert check_summary(summary) == read_summary(folder / "summary.json")
    page = (folder / "report.html").read_text()
    assert "<script" not in page
    for words in ("Linked documents", "Errors on test", "wrong, gold is", "context "):
        assert words in page


def test_the_summary_says_what_happened(done) -> None:
    config, _, s = done
    own = s["entity_linking"]
    assert (s["dataset"]["train"], s["dataset"]["test"], s["dataset"]["stand_in"]) == (12, 5, True)
    assert set(own["arms"]) == {"most_inlinked", "prior", "dense", "local"}
    assert s["metric"]["dense"] == own["arms"]["dense"]["test"]["f1"]
    assert s["metric"]["compressed"] == own["compression"]["retrain"]["test"]["f1"]
    assert s["violations"] == 0
    assert s["rate"]["bytes"] > 7
    assert s["latency_ms"]["compressed"] is None and "gathers rows" in own["latency"]["reason"]
    row = own["arms"]["dense"]["test"]
    wrong = sum(own["errors"]["dense"].values())
    assert round(row["accuracy"] * row["mentions"]) == row["mentions"] - wrong
    assert own["coverage"]["test"]["mentions"] == row["mentions"]


def test_the_epoch_is_chosen_on_dev(done) -> None:
    _, folder, s = done
    lines = [json.loads(x) for x in (folder / "arms/dense/metrics.jsonl").read_text().splitlines()]
    by_epoch = {x["epoch"]: x["validation_accuracy"] for x in lines}
    row = s["entity_linking"]["arms"]["dense"]
    assert by_epoch[row["epoch"]] == max(by_epoch.values()) == pytest.approx(row["dev"]["accuracy"])


def test_the_stored_linker_is_the_one_that_was_measured(done, capsys) -> None:
    config, folder, summary = done
    saved = formats.load_model(folder / "compressed.safetensors")
    for table in saved.params["params"]["vectors"].values():
        assert all(len(np.unique(np.asarray(table)[:, d])) <= 7 for d in range(table.shape[1]))
    assert cli.main(["verify", str(folder / "compressed.safetensors")]) == 0
    for split in ("test", "dev"):
        found = entity_linking.evaluate(config, Options(folder, split=split))
        assert found["metric"]["compressed"] == summary["entity_linking"]["compression"]["retrain"][split]["f1"]
    with pytest.raises(ConfigError, match="split='msnbc' is impossible"):
        entity_linking.evaluate(config, Options(folder, split="msnbc"))


def test_a_finished_run_is_left_as_it_is(done, capsys) -> None:
    config, folder, summary = done
    assert entity_linking.train_and_evaluate(config, Options(folder)) == summary
    assert "is finished and left as it is" in capsys.readouterr().out


def test_another_knowledge_base_is_refused(done) -> None:
    config, folder, _ = done
    other = _config(data__world=1)
    with pytest.raises(ConfigError, match="another knowledge base"):
        entity_linking.evaluate(other, Options(folder))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"linker__attention": "hard"}, "attention='hard'"),
        ({"order": "learned"}, "order='learned'"),
        ({"learning__method": "sl"}, "method='sl'"),
        ({"data__name": "conll"}, "name='conll' .* generated, aida_ppr, deep_ed"),
        ({"data__slots": 0}, "slots=0"),
        ({"arms": [configs.arm("dense")]}, "different plain names"),
        ({"arms": [configs.arm("x", ("belief",), learning={"method": "reinforce"})]}, "cannot learn by 'reinforce'"),
        ({"arms": [configs.arm("x", warmth=1)]}, "arm 'x'.*warmth is not a setting"),
        ({"plan__dense__distill": 0.5}, "distill"),
    ],
)
def test_impossible_configs_are_refused(changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        _config(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data__train": 1000}, "data.train=1000 .* 240 documents"),
        ({"batch": 500}, "batch=500 is impossible; it must be 1 to"),
        ({"plan__stages__0__rules": (("params/nothing", {"kind": "unstructured", "density": 0.5}),)}, "params/nothing"),
    ],
)
def test_what_the_data_show_to_be_impossible_is_refused_before_anything_is_written(tmp_path, changes, words) -> None:
    with pytest.raises(ConfigError, match=words):
        entity_linking.train_and_evaluate(_config(arms=[], **changes), Options(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_every_variant_can_be_read() -> None:
    for name in configs.VARIANTS:
        for variant in (name, f"{name}_tiny"):
            assert linking_config.read(configs.get_config(variant)).variant == variant
    with pytest.raises(ValueError, match="no variant 'x'"):
        configs.get_config("x")


def test_an_arm_decides_in_the_main_linkers_order_unless_it_names_one() -> None:
    arms = linking_config.all_arms(_config("aida_table"))
    assert {a.name: a.order for a in arms if a.name in ("dense", "one_hop", "offset", "random")} == {
        "dense": "size",
        "one_hop": "size",
        "offset": "offset",
        "random": "random",
    }


@pytest.mark.slow
def test_an_interrupted_run_ends_with_the_same_bits(done, tmp_path, monkeypatch) -> None:
    config, folder, summary = done
    trained, calls = entity_linking.training.train, []

    def stop(*args):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return trained(*args)

    monkeypatch.setattr(entity_linking.training, "train", stop)
    with pytest.raises(KeyboardInterrupt):
        entity_linking.train_and_evaluate(config, Options(tmp_path / "run"))
    monkeypatch.undo()
    again = entity_linking.train_and_evaluate(config, Options(tmp_path / "run"))
    assert again["entity_linking"]["arms"] == summary["entity_linking"]["arms"]
    a, b = (formats.load_model(f / "compressed.safetensors").params for f in (folder, tmp_path / "run"))
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@pytest.mark.slow
@pytest.mark.data
def test_the_stand_in_runs_through_all_phases(data_dir, tmp_path) -> None:
    summary = entity_linking.train_and_evaluate(_config("aida_3bit_tiny"), Options(tmp_path / "run", str(data_dir)))
    assert summary["rate"]["bytes"] >= 8
    assert summary["violations"] == 0
    assert set(summary["entity_linking"]["coverage"]) == {"train", "dev", "test", "kore50"}
