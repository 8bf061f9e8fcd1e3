"""Collective entity linking with dynamic context (DCA), its ablations beside it, and its compression.

    python -m experiments.entity_linking --config=configs/entity_linking.py:generated --workdir=runs/linking

One run trains the main linker of a seed and beside it every *arm*: another choice of features, attention, order or
learning on the same documents. Each is left at its best epoch on the dev documents; the test documents choose nothing.
Then, where the plan has stages, the main linker with its tables of vectors is compressed.

Source: X. Yang et al., "Learning Dynamic Context Augmentation for Global Entity Linking", 2019.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax

from experiments.common import artifacts, driver, runner, training
from experiments.common.driver import Options
from experiments.common.report import html
from experiments.common.settings import check_batch
from experiments.common.training import ConfigError, Outcome, Phase, Weights, mesh, phases
from experiments.entity_linking import linking
from experiments.entity_linking import measures as linking_results
from experiments.entity_linking.config import Arm, Config, all_arms, encoded, linker_of, load
from experiments.entity_linking.linking import learning, metrics
from experiments.entity_linking.linking.files import Corpora

NAME = "entity_linking"
SELECT = "validation_accuracy"
# Why `latency_ms` is null: what is compressed are tables, of which a mention gathers rows.
NO_LATENCY = (
    "the kernels multiply with stored matrices, and a linker gathers rows of its stored tables of vectors: it is "
    "unpacked before it links, and takes the dense one's time"
)


class _Arm(NamedTuple):
    """An arm ready to be trained: what it computes, its splits as rows, its facts, the jobs of its dense training."""

    arm: Arm
    linker: linking.Linker
    learning: linking.Learning
    rows: dict[str, linking.Encoded]
    job: training.Job
    phase: Phase


def _prepare(
    config: Config, options: Options, corpora: Corpora, arm: Arm, rows: dict[tuple[str, str], Any]
) -> _Arm:
    """An arm's job; `rows` keeps what was encoded, by split and order, for the next arm."""
    linker, learns = linker_of(config, arm)
    for split in corpora.documents:
        if (split, arm.order) not in rows:
            rows[split, arm.order] = encoded(config, corpora, split, arm.order)
    mine = {split: rows[split, arm.order] for split in corpora.documents}
    arrays = {split: linking.encode.batch_of(mine[split]) for split in ("train", "dev", "test")}
    n = len(arrays["train"]["document"])
    check_batch(config.batch, n, "rows of training documents")
    params = linking.init(linker, corpora.knowledge, jax.random.key(config.seed), vectors=False)
    facts = learning.carried(linking.facts_of(corpora.knowledge, vectors=True))
    job = training.Job(
        task=linking.make_task(linker, learns),
        first=Weights(params, facts, {}),
        train=arrays["train"],
        test=arrays["test"],
        validation=arrays["dev"],
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_batch,
        select=SELECT,
        placement=mesh.for_batch(options.mesh, config.batch),
        save_steps=config.save.steps,
        save_seconds=config.save.seconds,
    )
    base = config.plan.dense
    fit = dataclasses.replace(base, epochs=arm.epochs or base.epochs, lr=arm.lr or base.lr)
    return _Arm(arm, linker, learns, mine, job, Phase(phases.DENSE, "dense", "", fit))


def _train(made: _Arm, job: training.Job, todo: tuple[Phase, ...], folder: Path) -> tuple[Outcome, dict[str, Weights]]:
    """Trains, or goes on; what every phase left."""
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{made.arm.name}: {', '.join(made.linker.features)}; {made.learning.method}, order {made.arm.order}")
    with training.Display(training.total_steps(job, todo), quiet=jax.process_index() != 0) as display:
        outcome = training.train(job, todo, folder, display)
    return outcome, {p.name: outcome.weights(job, p) for p in todo}


def _compression(
    config: Config, corpora: Corpora, main: _Arm, dense: Weights
) -> tuple[training.Job, tuple[Phase, ...]]:
    """The job and phases that compress the main linker: its tables of vectors are weights now, the first ones."""
    tables = linking.model.vectors_of(corpora.knowledge)
    params = {"params": {**dense.params["params"], "vectors": tables}}
    facts = learning.carried(linking.facts_of(corpora.knowledge, vectors=False))
    job = dataclasses.replace(main.job, first=Weights(params, facts, {}))
    plan = dataclasses.replace(config.plan, dense=dataclasses.replace(config.plan.dense, epochs=0))
    todo = phases.plan(plan)
    training.check_phases(job, todo)
    return job, todo


# -- the run -----------------------------------------------------------------------------------------------------------


@runner.once
def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Trains the linkers, and compresses the main one: what is left of it."""
    workdir = options.workdir
    phases.plan(config.plan)  # a rule that cannot be read is reported before the data are
    corpora = load(config, options.data_dir)
    rows: dict[tuple[str, str], Any] = {}
    made = [_prepare(config, options, corpora, arm, rows) for arm in all_arms(config)]
    main = made[0]
    if config.plan.stages:
        _compression(config, corpora, main, main.job.first)  # checks the rules before anything is trained
    if jax.process_index() == 0:
        driver.claim(workdir, dataclasses.asdict(config))
    table: dict[str, dict[str, Any]] = dict(linking_results.most_likely(corpora))
    seconds, found, dense = 0.0, {}, main.job.first
    for each in made:
        outcome, left = _train(each, each.job, (each.phase,), workdir / "arms" / each.arm.name)
        seconds += outcome.seconds
        mine = left[phases.DENSE]
        row, linked = _figures(config, corpora, each, mine)
        row |= {"epoch": outcome.results[phases.DENSE].get("best", {}).get("epoch")}
        row["gold_context"] = linking_results.gold_context(
            each.linker, mine.params, mine.batch_stats, corpora.documents["test"], linked["test"]
        )
        table[each.arm.name], found[each.arm.name] = row, linked["test"]
        if each is main:
            dense, page = mine, linking_results.pages(
                each.linker, mine.params, mine.batch_stats, corpora.documents["test"], linked["test"], config.pages
            )
    squeezed = _compress(config, options, corpora, main, dense) if config.plan.stages else None
    if jax.process_index() != 0:
        return {}
    return _conclude(config, options, corpora, main, table, found, page, squeezed, seconds)


def _figures(
    config: Config, corpora: Corpora, each: _Arm, weights: Weights
) -> tuple[dict[str, Any], dict[str, linking_results.Linked]]:
    """Figures on every set but train, and how the sets were linked."""
    row: dict[str, Any] = {}
    linked = {}
    for split, documents in corpora.documents.items():
        if split != "train":
            linked[split] = linking_results.link(
                each.linker, weights.params, weights.batch_stats, documents, each.rows[split], config.eval_batch
            )
            row[split] = linking_results.figures(metrics.score(documents, linked[split].predictions))
    return row, linked


class _Squeezed(NamedTuple):
    """The compressed linker and its baselines: figures by phase, the stored file, what training recorded."""

    table: dict[str, dict[str, Any]]
    stored: artifacts.Stored
    outcome: Outcome
    before: Any
    after: Weights
    last: Phase
    errors: dict[str, int]


def _compress(config: Config, options: Options, corpora: Corpora, main: _Arm, dense: Weights) -> _Squeezed:
    job, todo = _compression(config, corpora, main, dense)
    outcome, left = _train(main, job, todo, options.workdir)
    last = next(p for p in todo if p.name == phases.final(config.plan))
    assert last.rules is not None
    table: dict[str, dict[str, Any]] = {}
    for phase in todo:
        if phase.kind != "admm" and phase.name != phases.DENSE:
            table[phase.name], linked = _figures(config, corpora, main, left[phase.name])
            if phase is last:
                errors = metrics.errors(corpora.documents["test"], main.rows["test"], linked["test"].predictions)
        if phase is last:
            hard = phases.harden(left[phase.start], last.rules)
            table["hardened"], _ = _figures(config, corpora, main, hard)
    facts = {
        "driver": NAME,
        "knowledge": corpora.knowledge.digest,
        "data": dataclasses.asdict(config.data),
        "order": config.order,
        "seed": config.seed,
    }
    after = left[last.name]
    model = {"name": "linker", "options": json.loads(json.dumps(dataclasses.asdict(main.linker)))}
    path, mine = options.workdir / artifacts.MODEL, after._replace(batch_stats={})
    stored = artifacts.save(path, mine, last.rules, model, facts, phases.schedule(todo, last.name))
    return _Squeezed(table, stored, outcome, left[phases.DENSE].params, after, last, errors)


def _conclude(
    config: Config,
    options: Options,
    corpora: Corpora,
    main: _Arm,
    table: dict[str, dict[str, Any]],
    found: dict[str, linking_results.Linked],
    page: html.Html,
    squeezed: _Squeezed | None,
    seconds: float,
) -> dict[str, Any]:
    """Writes the report and the summary; the summary last, for it says that the run is finished."""
    workdir, documents = options.workdir, corpora.documents["test"]
    errors = {
        name: metrics.errors(documents, linked.encoded, linked.predictions) for name, linked in found.items()
    }
    small: dict[str, dict[str, Any]] = {}
    if squeezed is not None:
        small, errors["compressed"] = squeezed.table, squeezed.errors
        seconds += squeezed.outcome.seconds
    sets = [s for s in corpora.documents if s != "train"]
    dataset = {
        "name": config.data.name,
        "source": corpora.source,
        "train": len(corpora.documents["train"]),
        "test": len(documents),
        "stand_in": corpora.stand_in,
    }
    summary = runner.summary(
        NAME,
        config,
        options,
        dataset=dataset,
        metric=runner.metric(
            "micro F1",
            None if squeezed is None else _f1(small, squeezed.last.name),
            dense=table["dense"]["test"]["f1"],
            dense_same_budget=_f1(small, phases.SAME_BUDGET),
            one_shot=_f1(small, phases.ONE_SHOT),
            hardened=_f1(small, "hardened"),
        ),
        stored=squeezed and squeezed.stored,
        residual=squeezed and runner.residual(squeezed.outcome.results.values()),
        seconds=seconds,
        block={
            "selection": "the best epoch on the dev documents, for every linker; the test documents choose nothing",
            "coverage": linking_results.coverage(corpora),
            "arms": table,
            "compression": small or None,
            "errors": errors,
            "knowledge": {"entities": len(corpora.knowledge.titles), "words": len(corpora.knowledge.words)},
            "phases": None if squeezed is None else squeezed.outcome.results,
            "latency": None if squeezed is None else {"reason": NO_LATENCY},
        },
    )
    pictures = []
    if squeezed is not None:
        pictures = artifacts.pictures(workdir, squeezed.before, squeezed.after.params, squeezed.last.rules)
    best = max((r["dev"]["f1"], name) for name, r in table.items())
    sections: list[tuple[str, html.Content]] = [
        ("Linkers", [linking_results.table(table, sets), f"Micro F1. Best on dev: {linking_results.called(best[1])}."]),
        ("Errors on test", linking_results.error_table(errors)),
        ("Where the errors are", linking_results.by_size(documents, found["dense"].predictions)),
        ("Linked documents", page),
    ]
    if small:
        sections.insert(1, ("Compressed", [linking_results.table(small, sets), f"No latency: {NO_LATENCY}."]))
    told = runner.conclude(
        summary,
        options,
        layers=[] if squeezed is None else squeezed.stored.layers,
        pictures=pictures,
        sections=sections,
    )
    for name, row in (table | small).items():
        print(f"{name:<24}" + "  ".join(f"{s} {100 * row[s]['f1']:.2f}" for s in sets if s in row))
    return told


def _f1(table: dict[str, dict[str, Any]], name: str) -> float | None:
    return table[name]["test"]["f1"] if name in table else None


# -- evaluation of a finished run --------------------------------------------------------------------------------------


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's compressed linker on a set of its corpora (`--split`, or one of `data.also`).

    The linker and its order come from the file, the knowledge base from the data. The figures go to
    `<workdir>/eval/<data>-<split>/`.

    Raises:
      ConfigError: the run is not finished, or the data do not fit the linker.
    """
    path, stored = options.workdir / artifacts.MODEL, runner.model_of(options.workdir)
    linker, facts = _described(path, stored)
    corpora = load(config, options.data_dir)
    if corpora.knowledge.digest != facts["knowledge"]:
        raise ConfigError(f"{path} was made for another knowledge base than that of data.name={config.data.name!r}")
    if options.split not in corpora.documents:
        raise ConfigError(f"split={options.split!r} is impossible; it must be one of {', '.join(corpora.documents)}")
    wanted = jax.eval_shape(lambda: linking.init(linker, corpora.knowledge, jax.random.key(0)))
    params = runner.fitting(stored, wanted, "the file's own description of the linker")
    documents = corpora.documents[options.split]
    rows = encoded(dataclasses.replace(config, seed=facts["seed"]), corpora, options.split, facts["order"])
    carried = learning.carried(linking.facts_of(corpora.knowledge))
    linked = linking_results.link(linker, params, carried, documents, rows, config.eval_batch)
    found = linking_results.figures(metrics.score(documents, linked.predictions))
    dataset = {
        "name": config.data.name,
        "source": corpora.source,
        "train": None,
        "test": len(documents),
        "stand_in": corpora.stand_in,
    }
    return runner.evaluated(
        NAME,
        config,
        options,
        dataset=dataset,
        metric=runner.metric("micro F1", found["f1"]),
        stored=stored,
        block={"figures": found, "errors": metrics.errors(documents, linked.encoded, linked.predictions)},
    )


def _described(path: Path, stored: artifacts.Stored) -> tuple[linking.Linker, dict[str, Any]]:
    """The linker and its facts from a file that may be anyone's."""
    model, facts = stored.saved.model, stored.saved.extra
    try:
        ours = isinstance(facts, dict) and facts["driver"] == NAME and isinstance(facts["knowledge"], str)
        if model is None or not ours or type(facts["seed"]) is not int:
            raise ValueError("the linker or its facts are missing")
        if facts["order"] not in linking.corpus.ORDERS:
            raise ValueError(f"order {facts['order']!r} is unknown")
        return training.parse(linking.Linker, model["options"]), facts
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} was not written by this driver: {error}") from None
