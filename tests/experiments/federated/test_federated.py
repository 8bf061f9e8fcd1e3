"""The driver: a run leaves everything behind, resumes to the same bits, and its variants can be read."""

import json

import jax
import numpy as np
import pytest

from compressx.federated.simulate import Simulation
from configs import federated as configs
from experiments.common import artifacts
from experiments.common.driver import Options
from experiments.common.report.summary import read_summary
from experiments.common.training import ConfigError
from experiments.federated import arms as federated_arms
from experiments.federated import config as setup
from experiments.federated import measures as federated_costs
from experiments.federated import task as federated


def frozen(variant: str, **changes) -> setup.Config:
    config = configs.get_config(variant)
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        (config[section] if section else config)[name] = value
    return setup.read(config)


@pytest.mark.parametrize("variant", [*configs.VARIANTS, *(f"{v}_tiny" for v in configs.VARIANTS)])
def test_every_variant_can_be_read(variant: str) -> None:
    config = setup.read(configs.get_config(variant))
    assert config.variant == variant
    kinds = {config.algorithm.kind(r) for r in range(config.algorithm.rounds)}
    assert kinds == ({"dense", "admm", "masked"} if config.algorithm.pruning else {"dense"})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm__sparsify": "some"}, "sparsify='some' is impossible"),
        ({"algorithm__prune_round": 99}, "prune_round=99 is impossible"),
        ({"algorithm__density": ()}, "density=.* is impossible"),
        ({"split__kind": "fair"}, "split.kind='fair' is impossible"),
        ({"baselines": ("best",)}, "baselines='best' is impossible"),
        ({"network__up_mbit": 0.0}, "up_mbit=0.0 is impossible"),
    ],
)
def test_impossible_settings_are_named(changes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        frozen("digits", **changes)


def test_a_density_that_matches_nothing_is_named(tmp_path) -> None:
    config = frozen("digits_tiny", algorithm__density=(("params/nothing", 0.1),))
    setting = setup.make(config, Options(tmp_path))
    with pytest.raises(ConfigError, match="'params/nothing' matches nothing"):
        setup.check(config, config.algorithm, setting)


def test_a_run_and_its_resumption(tmp_path, monkeypatch) -> None:
    changes = {"model__name": "lenet_300_100", "model__options": {"width": 0.1}, "baselines": ("dense", "secagg")}
    config = frozen("digits_tiny", **changes, algorithm__density=((r"params/.*/kernel", 0.15),))
    whole = Options(tmp_path / "whole")
    summary = federated.train_and_evaluate(config, whole)
    block = summary["federated"]
    assert block["enclave"] == "SIMULATED" and read_summary(whole.workdir / "summary.json") == summary
    page = (whole.workdir / "report.html").read_text()
    assert "SIMULATED: no SGX hardware was used" in page and page.count("data:image/png") == 5
    assert "<h1>federated / digits_tiny, seed 0 <span class=\"badge\">SIMULATED enclave</span></h1>" in page
    counts = block["bytes"]
    assert counts["encrypted sparse"]["total"] < counts["plain dense"]["total"] < counts["encrypted dense"]["total"]
    assert counts["secagg dense"]["total"] > counts["plain dense"]["total"]
    assert block["saving"] == pytest.approx(
        1 - counts["encrypted sparse"]["total"] / counts["encrypted dense"]["total"]
    )
    assert 0 < block["saving_same_values"] < block["saving"]
    assert block["secagg_audit"]["dropped"] == 1 and block["secagg_audit"]["largest_error"] < 1e-6
    assert summary["violations"] == 0 and summary["rate"]["constrained_weights"] > 6
    assert set(block["pruning"]) == {"before", "after"}
    gains = list(block["links"].values())
    assert gains == sorted(gains, reverse=True) and gains[0] > 1  # the slower the link, the more sparsity gains

    # killed after the second round of the first arm, and started again
    saved, calls = federated_arms.save, []

    def save(*args) -> None:
        saved(*args)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(federated_arms, "save", save)
    parts = Options(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        federated.train_and_evaluate(config, parts)
    monkeypatch.setattr(federated_arms, "save", saved)
    again = federated.train_and_evaluate(config, parts)
    assert again["federated"]["accuracy"] == block["accuracy"] and again["federated"]["bytes"] == counts
    assert (whole.workdir / "metrics.jsonl").read_bytes() == (parts.workdir / "metrics.jsonl").read_bytes()
    stored = [artifacts.read(o.workdir / artifacts.MODEL).saved.params for o in (whole, parts)]
    for a, b in zip(*map(jax.tree.leaves, stored), strict=True):  # the file's own header has no fixed order
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    evaluated = federated.evaluate(config, whole)
    assert evaluated["metric"]["compressed"] == pytest.approx(summary["metric"]["compressed"])


def test_dense_messages_are_counted_as_training_counts_them(tmp_path) -> None:
    config = frozen("digits_tiny", model__name="lenet_300_100", model__options={"width": 0.1}, padded=True)
    setting = setup.make(config, Options(tmp_path))
    for value_type in ("float32", "int8"):
        alg = federated_arms.dense(config.algorithm, value_type)
        trained = Simulation(setting.loss, alg, setting.model, setting.train, setting.split, 0, padded=True)
        ledger = trained.run(trained.start(), 0, 1)[1]
        like = federated_costs.Sent(config.algorithm, ledger.down, ledger.up, (), ())
        counted = federated_costs.dense_messages(config, setting, like, value_type)
        np.testing.assert_array_equal(counted.down, ledger.down)
        np.testing.assert_array_equal(counted.up, ledger.up)


def test_setup_of_real_processes_leaves_secrets_to_their_owners(tmp_path) -> None:
    from experiments.federated import nodes

    config = frozen("digits_tiny")
    for number in range(config.split.clients):
        nodes.enroll(tmp_path, number)
    nodes.make_plan(config, Options(tmp_path), "localhost", simulated=True)
    plan = nodes.read_plan(tmp_path)
    assert sorted(plan.roster) == [0, 1, 2, 3]
    secrets = [*tmp_path.glob("clients/*/identity.key"), tmp_path / "server" / "server.key"]
    assert len(secrets) == 5 and all(p.stat().st_mode & 0o077 == 0 for p in secrets)
    public = b"".join(p.read_bytes() for p in (tmp_path / "public").rglob("*") if p.is_file())
    assert b"PRIVATE" not in public and not any(p.read_bytes() in public for p in secrets)
    before = (tmp_path / "public" / "plan.json").read_bytes()
    nodes.make_plan(config, Options(tmp_path), "localhost", simulated=True)
    assert (tmp_path / "public" / "plan.json").read_bytes() == before
    assert json.loads(before)["initial"] and np.all([len(k) == 64 for k, _ in plan.roster.values()])
