"""Scores, packs and measures the networks of a run of `experiments.gru_speech`, and writes all its files."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from compressx.rules import Rules
from experiments.common import artifacts, driver, runner, training
from experiments.common.driver import Options
from experiments.common.training import Phase, Weights, phases
from experiments.gru_speech import measures as speech_results
from experiments.gru_speech.config import NAME, Config, shapes
from experiments.gru_speech.measures import Heard
from experiments.gru_speech.speech import rates, streaming


def conclude(
    config: Config,
    options: Options,
    arms: dict[str, tuple[Phase, ...]],
    left: dict[str, Weights],
    outcome: training.Outcome,
    heard: tuple[Heard, Heard, Heard],
    model: Any,
    others: list[dict[str, Any]],
) -> dict[str, Any]:
    """Scores, packs and measures every arm and writes all files; the summary last: it says that the run is finished."""
    workdir, (train, dev, test) = options.workdir, heard
    known = speech_results.language(train, config.loss == "ctc")
    scorer = speech_results.Scorer(model, config.loss, config.decoding, known, config.eval_batch)
    unit, info = test.corpus.unit, test.corpus.info
    dense = left[phases.DENSE]
    table: dict[str, dict[str, Any]] = {"dense": scorer.figures(dense.params, dev, test)}
    steps = {"dense": (speech_results.dense_leaves(dense.params), "dense")}
    head, stored = config.arms[0], {}
    described = {"name": "gru", "options": dataclasses.asdict(config.model)}
    for arm in config.arms:
        made = arms[arm.name]
        mine = left[made[-1].name]
        row: dict[str, Any] = {"structure": arm.structure, "method": arm.method}
        row |= scorer.figures(mine.params, dev, test)
        if (rules := made[-1].rules) is not None:
            file = workdir / (artifacts.MODEL if arm is head else f"arms/{arm.name}.safetensors")
            file.parent.mkdir(parents=True, exist_ok=True)
            facts, way = _facts(config, train, known, row), phases.schedule(made, made[-1].name)
            stored[arm.name] = kept = artifacts.save(file, mine, rules, described, facts, way)
            row |= _stored(kept, mine, rules)
            # before any retraining: what ADMM (or, one-shot, the dense network) leaves
            hard = phases.harden(left[made[-1].start], rules)
            row["hardened"] = scorer.score(hard.params, test, row["lm_weight"], row["reward"])[0].rate
            if arm.structure == "bsp" and arm.method == "admm":
                row["way"] = streaming.ways()[-1]
                steps[arm.name] = (speech_results.stored_as(mine, rules, "bspc"), row["way"])
        table[arm.name] = row
    for name, took in speech_results.times(config, steps, config.features.size).items():
        work = streaming.work(steps[name][0])
        energy = {f"energy_uj_{m}": streaming.energy_uj(work, m) for m in ("dram", "sram")}
        table[name] |= {"step_ms": took, "multiply_adds": work.multiply_adds, "step_bytes": work.weight_bytes, **energy}
    heads = {"dense": steps["dense"], head.name: steps[head.name]} if head.name in steps else {"dense": steps["dense"]}
    live = {name: _stream(config, packed, way, test) for name, (packed, way) in heads.items()}
    figures, rows = table.pop("dense"), table
    summary = runner.summary(
        NAME,
        config,
        options,
        dataset=driver.dataset(info, len(train.features), len(test.features)),
        metric=runner.metric(
            f"{unit} error rate",
            rows[head.name]["error_rate"],
            higher_is_better=False,
            dense=figures["error_rate"],
            dense_same_budget=_beside(config, rows, "dense"),
            one_shot=_beside(config, rows, "one_shot"),
            hardened=rows[head.name].get("hardened"),
        ),
        stored=stored[head.name],
        residual=runner.residual(outcome.results[p.name] for p in arms[head.name]),
        latency_ms=_latency(figures, rows[head.name]),
        seconds=outcome.seconds,
        block={
            "dense": figures,
            "reference": speech_results.plain(train, dev, test),
            "arms": rows,
            "streaming": live,
            "counted_weights": sum(a * b for a, b in shapes(config).values()),
            "test_speakers": list(test.corpus.speakers),
            "train_seconds": train.corpus.seconds,
            "test_seconds": test.corpus.seconds,
            "selection": config.select or "the last epoch",
            "released": {str(k): {"rate": r, "error_rate": per} for k, (r, per) in rates.RELEASED.items()},
            "phases": outcome.results,
        },
    )
    mine, rules = left[arms[head.name][-1].name], arms[head.name][-1].rules
    _, found = scorer.score(mine.params, test, rows[head.name]["lm_weight"], rows[head.name]["reward"])
    name = f"{unit} error rate"
    nets = {"dense": dense.params, head.name.replace("_", " "): mine.params}
    return runner.conclude(
        summary,
        options,
        layers=stored[head.name].layers,
        pictures=[
            *speech_results.rate_pictures(workdir, name, figures["error_rate"], rows, others),
            *speech_results.sound_pictures(workdir, scorer, test, config.features.hop, nets, found),
            *artifacts.pictures(workdir, dense.params, mine.params, rules),
        ],
        sections=[("Arms", speech_results.arm_table(rows, figures))],
    )


def _stored(kept: artifacts.Stored, weights: Weights, rules: Rules) -> dict[str, Any]:
    """Of a compressed network: rates, bytes and its matrices, one by one, as other formats would store them too."""
    matrices = speech_results.matrices(weights.params, rules)
    ways = {name: speech_results.stored_as(weights, rules, name) for name in ("bspc", "csr", "dense")}
    return {
        "rate": kept.rate["constrained_weights"],
        "rate_all": kept.rate["all_weights"],
        "rate_bytes": kept.rate["bytes"],
        "bytes": kept.size["packed"],
        "violations": kept.violations,
        "matrices": matrices,
        "bytes_of_matrices": {n: speech_results.matrix_bytes(p, list(matrices)) for n, p in ways.items()},
    }


def _latency(dense: dict[str, Any], head: dict[str, Any]) -> dict[str, float] | None:
    """Milliseconds of a step of both; None where the kernel does not run and a compressed step says nothing."""
    if head.get("way") != "bspc_native":
        return None
    return {"dense": dense["step_ms"]["median"], "compressed": head["step_ms"]["median"]}


def _beside(config: Config, rows: dict[str, dict[str, Any]], method: str) -> float | None:
    """The headline's baseline by another method: the same structure and rate, or for "dense" any."""
    head = config.arms[0]
    for arm in config.arms[1:]:
        if arm.method == method and (method == "dense" or (arm.structure, arm.rate) == (head.structure, head.rate)):
            return float(rows[arm.name]["error_rate"])
    return None


def _stream(config: Config, packed: Any, way: str, test: Heard) -> dict[str, float]:
    """Streaming the test utterance of median length, sound to outputs."""
    network = streaming.prepare(packed, way, config.model.layers)
    step = streaming.make_step(way, config.model.reset)
    u = test.corpus.utterances[len(test.features) // 2]
    state = jnp.zeros((config.model.layers, 1, config.model.hidden))
    return streaming.real_time(network, step, u.samples, test.corpus.rate, config.features, state)


def _facts(config: Config, train: Heard, known: speech_results.Language, row: dict[str, Any]) -> dict[str, Any]:
    """What evaluation needs beside the weights, as JSON."""
    return {
        "driver": NAME,
        "corpus": config.data.name,
        "units": list(train.corpus.inventory.names),
        "loss": config.loss,
        "features": dataclasses.asdict(config.features),
        "decoding": dataclasses.asdict(config.decoding) | {k: row[k] for k in ("lm_weight", "reward")},
        "language": {k: np.asarray(v).tolist() for k, v in {**known.lm._asdict(), **known.frames._asdict()}.items()},
        "seed": config.seed,
    }
