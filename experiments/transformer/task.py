"""Transformers compressed by ADMM: dense -> ADMM -> harden -> retrain -> pack, heads and units removed -> report.

    python -m experiments.transformer --config=configs/transformer.py:vit_digits --workdir=runs/vit

Accuracies and perplexities are those of the last epoch on the whole test data, which choose nothing. A perplexity is
over windows that are each read from their own beginning.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import artifacts, data, driver, init_from, runner, training
from experiments.common.driver import Options
from experiments.common.models.functional import Functional
from experiments.common.settings import check_batch
from experiments.common.training import ConfigError, Phase, Plan, Weights, mesh, phases, state
from experiments.transformer import measures, page, sets, subjects
from experiments.transformer.config import NAME, Config, Data, Model
from experiments.transformer.subjects import Subject

NARROWER = "narrower"

# -- what is trained ---------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """A config made ready: the data, the network, the training, its phases, and the one that leaves the result."""

    subject: Subject
    net: Functional
    job: training.Job
    todo: tuple[Phase, ...]
    last: Phase


def make_work(config: Config, options: Options) -> Work:
    """Everything the training needs.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or damaged.
    """
    subject = subjects.load(config.data, options.data_dir)
    net = subjects.network(config.model, config.data, subject)
    job = make_job(config, options, subject, net)
    if config.init_from:
        settings, sections = dataclasses.asdict(config), ("data", "model")
        job = init_from.take_dense(job, options.workdir, config.init_from, settings, sections, ("test", "shift"))
    plan = sets.resolved(config.plan, net, subject.example(config.data))
    todo = init_from.plan_phases(plan, config.init_from)
    return Work(subject, net, job, todo, next(p for p in todo if p.name == phases.final(plan)))


def make_job(config: Config, options: Options, subject: Subject, net: Functional) -> training.Job:
    """The training of one network."""
    check_batch(config.batch, len(subject.train["inputs"]), "training examples")
    return training.Job(
        task=subjects.task(net, config.data, subject),
        first=Weights(net.init(jax.random.key(config.seed)), {}, {}),
        train=subject.train,
        test=subject.test,
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_batch,
        optimizer=config.optimizer,
        placement=mesh.for_batch(options.mesh, config.batch),
        save_steps=config.save.steps,
        save_seconds=config.save.seconds,
    )


def train_narrower(config: Config, options: Options, subject: Subject, limit: int) -> dict[str, Any]:
    """Trains a dense network of at most so many bytes for all epochs of the plan, in a folder of its own.

    Returns:
      Its model, its bytes and its metric.

    Raises:
      ConfigError: no network is so small.
    """

    def build(model: Model) -> Functional:
        return subjects.network(model, config.data, subject)

    try:
        model = measures.narrower(config.model, build, limit)
    except ValueError as error:
        raise ConfigError(f"narrower: {error}") from None
    net = build(model)
    dense, stages = config.plan.dense, config.plan.stages
    epochs = dense.epochs + sum(s.admm.epochs + s.retrain.epochs for s in stages)
    todo = phases.plan(Plan(dataclasses.replace(dense, epochs=epochs)))
    folder = dataclasses.replace(options, workdir=options.workdir / NARROWER)
    job = make_job(config, options, subject, net)
    outcome = runner.train(dataclasses.replace(config, model=model), folder, job, todo)
    size = sum(s.size * s.dtype.itemsize for s in jax.tree.leaves(net.like()))
    value = subject.value(outcome.results[phases.DENSE]["end"])
    return {"model": dataclasses.asdict(model), "epochs": epochs, "bytes": size, "value": value}


# -- the run -----------------------------------------------------------------------------------------------------------


@runner.once
def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Trains and compresses a transformer: what is left of it."""
    subject, net, job, todo, last = make_work(config, options)
    outcome = runner.train(config, options, job, todo)
    dense, result = (outcome.weights(job, p) for p in (todo[0], last))
    told = {"driver": NAME, "data": dataclasses.asdict(config.data), "classes": subject.classes}
    described = {"name": config.data.subject, "options": dataclasses.asdict(config.model)}
    single, limit, cut = jax.process_index() == 0, 0, None
    stored = None
    if single:
        path, way = options.workdir / artifacts.MODEL, phases.schedule(todo, last.name)
        facts = {**told, "words": list(subject.words)}
        stored = artifacts.save(path, result, last.rules, described, facts, way)
        limit = stored.size["packed"]
        if sets.is_coupled(config.plan):
            cut = measures.compacted(options.workdir, net, dense, result, _read(subject))
            limit = cut.facts["bytes"]["compacted"]
    results = outcome.results
    beside = _beside(subject, results, last, limit, stored)
    if config.narrower and last.rules and single:
        beside[NARROWER] = train_narrower(config, options, subject, limit)
    if stored is None:
        return {}
    floor = dict(zip(("name", "value"), subject.floor(), strict=True)) if config.floor else None

    def value(name: str, when: str = "end") -> float | None:
        return subject.value(results[name][when]) if name in results else None

    block = {
        "method": config.plan.method,
        "selection": "the last epoch; the test data choose nothing",
        "floor": floor,
        "beside": beside,
        "kept": sets.kept(result.params, config.model.heads),
        "compacted": cut.facts if cut else None,
        "init_from": config.init_from or None,
        "phases": results,
    }
    summary = runner.summary(
        NAME,
        config,
        options,
        dataset=driver.dataset(subject.info, *subject.seen),
        metric=runner.metric(
            subject.metric,
            value(last.name) if last.rules else None,
            higher_is_better=subject.higher_is_better,
            dense=value(phases.DENSE),
            dense_same_budget=value(phases.SAME_BUDGET),
            one_shot=value(phases.ONE_SHOT),
            hardened=value(last.name, "start") if last.rules else None,
        ),
        stored=stored,
        residual=runner.residual(results.values()),
        latency_ms=cut.latency if cut else None,
        seconds=outcome.seconds,
        block=block,
    )
    pictures = artifacts.pictures(options.workdir, dense.params, result.params, last.rules)
    return runner.conclude(
        summary, options, layers=stored.layers, pictures=pictures, sections=page.sections(subject.metric, block)
    )


def _beside(
    subject: Subject, results: dict[str, Any], last: Phase, limit: int, stored: artifacts.Stored | None
) -> dict[str, Any]:
    """The networks of the run with their bytes."""
    if stored is None:
        return {}
    whole = stored.size["dense"]
    rows = {phases.DENSE: whole, phases.SAME_BUDGET: whole, phases.ONE_SHOT: limit, last.name: limit}
    found = {n: {"value": subject.value(results[n]["end"]), "bytes": b} for n, b in rows.items() if n in results}
    if last.rules:
        found["compressed"] = found.pop(last.name)
    return found


def _read(subject: Subject) -> np.ndarray:
    """Some inputs of the test data as the network reads them."""
    inputs = subject.test["inputs"][: max(measures.BATCHES)]
    if subject.metric == "perplexity":
        return inputs
    return np.asarray(data.augment.normalise(jnp.asarray(inputs), subject.info.mean, subject.info.std))


# -- evaluation of a finished run --------------------------------------------------------------------------------------


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's compressed model on a split of the config's data.

    The network and, for a text, its vocabulary come from the file.

    Raises:
      ConfigError: the run is not finished, the file is not of this driver, or the data do not fit the network.
    """
    stored = runner.model_of(options.workdir)
    told, facts = stored.saved.model, stored.saved.extra
    path = options.workdir / artifacts.MODEL
    if told is None or not isinstance(facts, dict) or facts.get("driver") != NAME:
        raise ConfigError(f"{path} was not written by this driver")
    model = training.parse(Model, told.get("options"), f"{path}: model")
    given = training.parse(Data, facts.get("data"), f"{path}: data")
    if given.subject != config.data.subject:
        raise ConfigError(f"{path} is a network of {given.subject}, and data.subject={config.data.subject!r}")
    given = dataclasses.replace(config.data, window=given.window)
    words = facts.get("words")
    if not isinstance(words, list) or not all(isinstance(w, str) for w in words):
        raise ConfigError(f"{path}: its vocabulary is damaged")
    subject = subjects.load(given, options.data_dir, options.split, tuple(words) or None)
    if subject.classes != facts.get("classes"):
        raise ConfigError(f"{path} has {facts.get('classes')} classes, data.name={given.name!r} has {subject.classes}")
    net = subjects.network(model, given, subject)
    variables = runner.fitting(stored, net.like(), f"a network of {dataclasses.asdict(model)}")
    score = state.make_evaluate(subjects.task(net, given, subject), config.eval_batch)
    figures = score(variables, {}, jax.tree.map(jnp.asarray, subject.test))
    return runner.evaluated(
        NAME,
        config,
        options,
        dataset=driver.dataset(subject.info, None, subject.seen[1]),
        metric=runner.metric(subject.metric, subject.value(figures), higher_is_better=subject.higher_is_better),
        stored=stored,
        block={"loss": figures["loss"]},
    )
