"""Federated learning with sparse, encrypted updates: simulation, baselines, exact bytes, modelled time, a report.

    python -m experiments.federated --config=configs/federated.py:digits --workdir=runs/federated

The aggregation enclave is SIMULATED here; accuracy and bytes do not depend on that, confidentiality does. Real
processes: `experiments.federated.nodes`.
"""

import dataclasses
import re
from typing import Any

import jax

from compressx._harden import structures
from compressx.constraints import unstructured
from compressx.federated import algorithm, splits, timing
from experiments.cnn import task as cnn
from experiments.common import artifacts, driver, runner
from experiments.common.driver import Options
from experiments.common.report.metrics import MetricsWriter
from experiments.common.training import Weights
from experiments.federated import arms as training
from experiments.federated import config as setup
from experiments.federated import measures as costs
from experiments.federated import page
from experiments.federated.arms import Arm
from experiments.federated.config import Config, Setting


@runner.once
def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Simulates the rounds of every arm: what is left of it."""
    workdir = options.workdir
    setting = setup.make(config, options)
    todo = training.arms(config)
    for alg in todo.values():
        setup.check(config, alg, setting)
    driver.claim(workdir, dataclasses.asdict(config))
    folder = workdir / "checkpoints"
    resumed = training.resumed_step(folder, todo)
    finished = {}
    with MetricsWriter(workdir / "metrics.jsonl", resumed) as writer:
        for k, (name, alg) in enumerate(todo.items()):
            finished[name] = training.run_arm(config, name, alg, setting, folder, writer, k * alg.rounds)
    return conclude(config, options, setting, finished)


def conclude(config: Config, options: Options, setting: Setting, finished: dict[str, Arm]) -> dict[str, Any]:
    """Counts, measures, and writes model, plots, report and, last, the summary."""
    workdir, sparse = options.workdir, finished["sparse"]
    alg = sparse.alg
    compared = costs.compare(config, setting, sparse)
    audit = None
    if "secagg" in config.baselines:
        audit = costs.secagg_audit(config, setting, finished["dense"].state.leaves)
    treedef = jax.tree.structure(setting.model)
    model = jax.tree.unflatten(treedef, list(sparse.state.leaves))
    weights = Weights({"params": model["params"]}, {k: v for k, v in model.items() if k != "params"}, {})
    rules = None
    if alg.pruning:
        layers = algorithm.layout(alg, model)
        rules = [(re.escape(x.name), unstructured(keep=x.budget)) for x in layers if x.budget < x.size]
        weights = weights._replace(structure=structures(weights.params, rules))
    facts = {
        "driver": "federated",
        "dataset": setting.info.name,
        "classes": setting.info.classes,
        "mean": list(config.data.mean or setting.info.mean),
        "std": list(config.data.std or setting.info.std),
        "seed": config.seed,
    }
    described = {"name": config.model.name, "options": dict(config.model.options)}
    stored = artifacts.save(workdir / artifacts.MODEL, weights, rules, described, facts)

    table = splits.table(setting.split, setting.train["labels"])
    accuracy = {name: arm.scores[arm.alg.rounds - 1]["accuracy"] for name, arm in finished.items()}
    residual = float(sparse.ledger.residual[alg.prune_round - 1]) if alg.pruning and alg.prune_round else None
    block = {
        "enclave": "SIMULATED",
        "heterogeneity": splits.heterogeneity(table),
        "client_sizes": table.sum(1).tolist(),
        "accuracy": accuracy,
        "loss": {name: float(arm.ledger.loss[-1]) for name, arm in finished.items()},
        "pruning": sparse.pruning or None,
        "bytes": compared.bytes,
        "bytes_counted": "payload, frame header, tag, hash, hello, offer with quote; not gRPC's and TLS's framing",
        "saving": compared.saving,
        "saving_same_values": compared.saving_same_values,
        "encryption_overhead": compared.bytes["encrypted dense"]["total"] / compared.bytes["plain dense"]["total"] - 1,
        "speedup": compared.speedup,
        "links": compared.links,
        "seconds": {
            k: dict(zip(timing.STAGES, v.sum(0).tolist(), strict=True)) | {"total": float(v.sum())}
            for k, v in compared.seconds.items()
        },
        "network": dataclasses.asdict(config.network),
        "secagg_audit": audit,
        "density": {
            "before_pruning": float(sparse.ledger.density[-1, 0]),
            "after": float(sparse.ledger.density[-1, 1]),
        },
        "paper": dataclasses.asdict(config.paper) if config.paper.what else None,
        "simulation_seconds": {k: v.seconds for k, v in finished.items()},
    }
    told = runner.summary(
        "federated",
        config,
        options,
        dataset=driver.dataset(setting.info, len(setting.train["labels"]), len(setting.test["labels"])),
        metric=runner.metric(
            "accuracy", accuracy["sparse"], dense=accuracy.get("dense"), hardened=sparse.pruning.get("after")
        ),
        stored=stored,
        residual={"primal": residual, "dual": None},
        seconds=sum(a.seconds for a in finished.values()),
        block=block,
    )
    if config.paper.accuracy > 0:
        told["paper"] = {"quantity": "metric.compressed", "value": config.paper.accuracy}
    summary = runner.conclude(
        told,
        options,
        layers=stored.layers,
        pictures=page.pictures(workdir, table, finished, compared.seconds),
        first=page.first(told),
        sections=page.sections(config, told),
        badge="SIMULATED enclave",
        notice=page.SIMULATED,
    )
    print(f"bytes saved {compared.saving:.2%}, elapsed-time gain {compared.speedup:.2f}x (modelled). {page.SIMULATED}")
    return summary


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's model on a split, as `experiments.cnn` does."""
    return cnn.evaluate(config, options)
