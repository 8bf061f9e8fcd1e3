"""Word language models compressed by ADMM: dense -> ADMM -> harden -> retrain -> pack -> report.

    python -m experiments.language_model --config=configs/language_model.py:generated --workdir=runs/language

The perplexities reported are those of the last epoch on the whole test text, read from its first word to its last with
the state carried on; the test text chooses nothing. `curves` compares structures over rates.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import artifacts, driver, init_from, latency, runner, training
from experiments.common.data import ngrams, text
from experiments.common.data.text import Corpus
from experiments.common.driver import Options
from experiments.common.models import lstm
from experiments.common.report import html
from experiments.common.training import ConfigError, Phase, Weights, mesh, phases
from experiments.common.training.language import language, make_perplexity, sample
from experiments.language_model import page as language_page
from experiments.language_model.config import Config, Data, Model

# -- what is trained ---------------------------------------------------------------------------------------------------


def load_corpus(data: Data, data_dir: str | None, words: tuple[str, ...] | None = None) -> Corpus:
    """The text, its parts cut to the numbers of words that the config asks for."""
    try:
        corpus = text.load(data.name, data_dir, data.vocabulary, words)
    except (text.DataNotFoundError, text.DataFileError):
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    cut = {}
    for part in text.PARTS:
        wanted, have = getattr(data, part), len(corpus.part(part))
        if not (wanted == 0 or 2 <= wanted <= have):
            raise ConfigError(f"data.{part}={wanted} is impossible; it must be 0 or 2 to {have}, the words there are")
        cut[part] = corpus.part(part)[: wanted or have]
    parts: dict[str, Any] = cut
    return dataclasses.replace(corpus, **parts, best=corpus.best if not data.test else None)


def build_model(model: Model, classes: int) -> lstm.LanguageModel:
    """The network, or a ConfigError."""
    try:
        return lstm.LanguageModel(classes=classes, **dataclasses.asdict(model))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None


def make_job(config: Config, options: Options) -> tuple[training.Job, Corpus]:
    """Everything the training needs.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or damaged.
    """
    corpus = load_corpus(config.data, options.data_dir)
    model = build_model(config.model, len(corpus.words))
    steps = config.data.steps
    try:
        train = text.windows(corpus.train, config.batch, steps)
        held = {p: text.windows(corpus.part(p), config.eval_lanes, steps, whole=True) for p in text.PARTS[1:]}
    except ValueError as error:
        raise ConfigError(str(error)) from None
    task = language(model, config.loss)
    assert task.begin is not None
    variables = jax.jit(lambda k: model.init(k, jnp.zeros((1, 1), jnp.int32)))(jax.random.key(config.seed))
    job = training.Job(
        task=task,
        first=Weights({"params": variables["params"]}, task.begin(config.batch), {}),
        train=train,
        test=held["test"],
        validation=held["validation"],
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_lanes,
        optimizer=config.optimizer,
        clip=config.clip,
        placement=mesh.for_batch(options.mesh, config.batch),
        save_steps=config.save.steps,
        save_seconds=config.save.seconds,
    )
    if config.init_from:
        settings, sections = dataclasses.asdict(config), ("data", "model", "batch")
        job = init_from.take_dense(job, options.workdir, config.init_from, settings, sections, ("test", "dropout"))
    return job, corpus


def plan_phases(config: Config) -> tuple[Phase, ...]:
    """The phases; with `init_from` nothing is left to train in the dense one."""
    return init_from.plan_phases(config.plan, config.init_from)


# -- the run -----------------------------------------------------------------------------------------------------------


@runner.once
def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Trains and compresses a language model: what is left of it."""
    todo = plan_phases(config)
    job, corpus = make_job(config, options)
    outcome = runner.train(config, options, job, todo)
    workdir, last = options.workdir, next(p for p in todo if p.name == phases.final(config.plan))
    model = build_model(config.model, len(corpus.words))

    def load(phase: Phase) -> Weights:
        return outcome.weights(job, phase)._replace(batch_stats={})  # what was carried is no part of the network

    dense, result = load(todo[0]), load(last)
    if jax.process_index() != 0:
        return {}
    perplexity = make_perplexity(model)
    exact = {p.name: perplexity(load(p).params, corpus.test)._asdict() for p in todo if p.kind != "admm"}
    if last.rules is not None and last.kind == "retrain":
        before = next(p for p in todo if p.name == last.start)
        hard = phases.harden(load(before), last.rules)
        exact["hardened"] = perplexity(hard.params, corpus.test)._asdict()
    facts = {"driver": "language_model", "dataset": corpus.info.name, "seed": config.seed, "words": list(corpus.words)}
    network = {"name": "lstm_lm", "options": dataclasses.asdict(config.model)}
    way = phases.schedule(todo, last.name)
    stored = artifacts.save(workdir / artifacts.MODEL, result, last.rules, network, facts, way)
    scene = language_page.Scene(model, corpus, dense.params, result, last.rules, stored, workdir)
    found = language_page.examine(scene, config.probe)
    times, found["latency"] = None, {"reason": "nothing is compressed"}
    if last.rules is not None:
        times, found["latency"] = latency.of_words(model, dense.params, {"compressed": stored.saved.packed})

    def value(name: str) -> float | None:
        return exact[name]["value"] if name in exact else None

    words = len(corpus.words)
    summary = runner.summary(
        "language_model",
        config,
        options,
        dataset=driver.dataset(corpus.info, len(corpus.train), len(corpus.test)),
        metric=runner.metric(
            "perplexity",
            value(last.name) if last.rules else None,
            higher_is_better=False,
            dense=value(phases.DENSE),
            dense_same_budget=value(phases.SAME_BUDGET),
            one_shot=value(phases.ONE_SHOT),
            hardened=value("hardened"),
        ),
        stored=stored,
        residual=runner.residual(outcome.results.values()),
        latency_ms=times,
        seconds=outcome.seconds,
        block={
            "method": config.plan.method,
            "selection": "the last epoch; the test text chooses nothing",
            "words": words,
            "unknown": dict(corpus.unknown),
            "places": exact[phases.DENSE]["places"],
            "gradual": value(f"{phases.GRADUAL}_retrain"),
            "references": {
                "unigram": ngrams.unigram_perplexity(corpus.train, corpus.test, words),
                "bigram": ngrams.bigram_perplexity(corpus.train, corpus.test, words),
                "source": corpus.best,
            },
            "init_from": config.init_from or None,
            "mesh": options.mesh or None,
            "processes": jax.process_count(),
            "exact": exact,
            "phases": outcome.results,
            **found,
        },
    )
    texts = _texts(config, model, corpus, {"dense": dense.params, "compressed": result.params})
    return runner.conclude(
        summary,
        options,
        layers=stored.layers,
        pictures=language_page.pictures(scene),
        sections=[
            ("Phases", language_page.phase_table(todo, outcome.results, exact)),
            *language_page.sections(scene, found),
            ("Sample text", texts),
        ],
    )


def _texts(config: Config, model: Any, corpus: Corpus, networks: dict[str, Any]) -> html.Content:
    """Text drawn from each network after the first words of the test text; also as `sample.txt`."""
    if not config.sample:
        return "None was asked for."
    prompt = corpus.test[:8].tolist()
    never = [corpus.words.index(text.UNK)]
    rows = []
    for name, params in networks.items():
        ids = sample(model, params, prompt, config.sample, config.seed, never)
        rows.append((name, " ".join(corpus.words[i] for i in ids)))
    given = " ".join(corpus.words[i] for i in prompt)
    note = f"After “{given}”, the first words of the test text; drawn with the same seed, {text.UNK} left out."
    return [note, html.Table(("network", "goes on"), rows)]


# -- evaluation of a finished run --------------------------------------------------------------------------------------


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's compressed model on a part of a text, the config's own or another one.

    Network and vocabulary come from the file. The figures go to `<workdir>/eval/<text>-<part>/`.

    Raises:
      ConfigError: the run is not finished, or the file is not of this driver.
    """
    stored = runner.model_of(options.workdir)
    if options.split not in text.PARTS:
        raise ConfigError(f"--split={options.split} is impossible; a text has {', '.join(text.PARTS)}")
    settings, words = _described(options.workdir / artifacts.MODEL, stored)
    corpus = load_corpus(config.data, options.data_dir, words)
    model = build_model(settings, len(words))
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    variables = runner.fitting(stored, wanted, f"a network of {settings} and {len(words)} words")
    ids = corpus.part(options.split)
    exact = make_perplexity(model)(variables, ids)
    return runner.evaluated(
        "language_model",
        config,
        options,
        dataset=driver.dataset(corpus.info, None, len(ids)),
        metric=runner.metric("perplexity", exact.value, higher_is_better=False),
        stored=stored,
        block={"unknown": corpus.unknown[options.split], "exact": exact._asdict()},
    )


def _described(path: Path, stored: artifacts.Stored) -> tuple[Model, tuple[str, ...]]:
    """The network's settings and its vocabulary, from a file that may be anyone's."""
    model, facts = stored.saved.model, stored.saved.extra
    words = facts.get("words") if isinstance(facts, dict) else None
    if model is None or model.get("name") != "lstm_lm" or not isinstance(words, list):
        raise ConfigError(f"{path} was not written by this driver: the network or its vocabulary is missing")
    sound = all(isinstance(w, str) and w and w.isprintable() for w in words) and len(set(words)) == len(words)
    if not sound or not {text.UNK, text.EOS} <= set(words):
        raise ConfigError(f"{path}: its vocabulary must be different printable words with {text.UNK} and {text.EOS}")
    try:
        return training.parse(Model, model.get("options", {}), "model"), tuple(words)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
