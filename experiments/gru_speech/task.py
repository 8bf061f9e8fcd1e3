"""A recurrent network that hears phones or digits, compressed by block-based structured pruning (RTMobile).

    python -m experiments.gru_speech --config=configs/gru_speech.py:tones --workdir=runs/tones

One run trains the dense network of a seed and from it every *arm*: a structure at a rate by a method. Every arm gets
the same number of epochs. The error rate is that of the last epoch on the whole test set; the dev set chooses the
decoder's two weights, and the epoch only where `select` says so.

Source: P. Dong et al., "RTMobile: Beyond Real-Time Mobile Acceleration of RNNs for Speech Recognition", 2020.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import artifacts, driver, models, runner, training
from experiments.common.data import DataFileError, DataNotFoundError
from experiments.common.driver import Options
from experiments.common.settings import check_batch
from experiments.common.training import ConfigError, Phase, Plan, Stage, Weights, mesh, phases
from experiments.gru_speech import measures as speech_results
from experiments.gru_speech import page as speech_report
from experiments.gru_speech import speech
from experiments.gru_speech.config import NAME, Config, Decoding, Model, shapes
from experiments.gru_speech.measures import Heard
from experiments.gru_speech.speech import corpora, decode, rates

# -- what is trained ---------------------------------------------------------------------------------------------------


def load(config: Config, split: str, data_dir: str | None) -> Heard:
    """A split with its features, cut to the utterances the config asks for.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or damaged.
    """
    d = config.data
    try:
        whole = corpora.load(
            d.name,
            split,
            data_dir,
            phones=d.phones,
            sa=d.sa,
            by=d.by,
            test_speakers=d.test_speakers,
            dev_speakers=d.dev_speakers,
        )
        wanted = {"train": d.train, "dev": d.dev, "test": d.test}[split]
        if not 0 <= wanted <= len(whole.utterances):
            raise ConfigError(f"data.{split}={wanted} is impossible; {d.name} has {len(whole.utterances)} utterances")
        if wanted:  # spread over speakers, which the names begin with
            picks = np.linspace(0, len(whole.utterances) - 1, wanted).round().astype(int)
            whole = dataclasses.replace(whole, utterances=tuple(whole.utterances[i] for i in picks))
        if split == "train":
            whole = speech.augment.speeds(whole, d.speeds)
        return speech_results.hear(whole, config.features)
    except (DataNotFoundError, DataFileError, ConfigError):
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None


def build_model(model: Model, outputs: int) -> Any:
    """The network, or a ConfigError."""
    try:
        made = models.build("gru", classes=outputs, **dataclasses.asdict(model))
        jax.eval_shape(lambda: made.init(jax.random.key(0), jnp.zeros((1, 1, 1))))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None
    return made


def outputs(config: Config, heard: Heard) -> int:
    """A unit each, and CTC's blank."""
    return len(heard.corpus.inventory.names) + (config.loss == "ctc")


def make_job(config: Config, options: Options, train: Heard, dev: Heard, test: Heard) -> tuple[training.Job, Any]:
    """Everything the training needs, and the network."""
    used = len(train.features)
    check_batch(config.batch, used, "training utterances")
    model = build_model(config.model, outputs(config, train))
    longest = max(h.arrays["inputs"].shape[1] for h in (train, dev, test))
    sizes = speech.batches.lengths(train.arrays["frames"], config.buckets)
    order = speech.batches.order(train.arrays["frames"], config.batch, sizes)
    task = {"frames": speech.tasks.frames, "ctc": speech.tasks.ctc}[config.loss](model.apply, sizes)
    key = jax.random.key(config.seed)
    variables = jax.jit(lambda k: model.init(k, jnp.zeros((1, 1, config.features.size))))(key)
    job = training.Job(
        task=task,
        first=Weights({"params": variables["params"]}, {}, {}),
        train=_widened(train, longest),
        test=_widened(test, longest),
        validation=_widened(dev, longest),
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_batch,
        optimizer=config.optimizer,
        clip=config.clip,
        select=config.select,
        placement=mesh.for_batch(options.mesh, config.batch),
        save_steps=config.save.steps,
        save_seconds=config.save.seconds,
        order=order,
    )
    return job, model


def _widened(heard: Heard, longest: int) -> dict[str, np.ndarray]:
    """The arrays of a split, padded to the longest utterance of all splits: one program for all."""
    a = heard.arrays
    more = longest - a["inputs"].shape[1]
    return a | {
        "inputs": np.pad(a["inputs"], ((0, 0), (0, more), (0, 0))),
        "labels": np.pad(a["labels"], ((0, 0), (0, more)), constant_values=-1),
    }


def plan_phases(config: Config) -> dict[str, tuple[Phase, ...]]:
    """Arm -> its phases after the dense one; "" -> the dense one.

    Raises:
      ConfigError: a rate that the network cannot have.
    """
    out: dict[str, tuple[Phase, ...]] = {}
    for arm in config.arms:
        try:
            rows = arm.row_rate or rates.ROW_RATES.get(round(arm.rate), arm.rate**0.5)
            keep = rates.budgets(shapes(config), arm.rate, rows)
            rules = rates.rules(arm.structure, shapes(config), keep, config.strips, config.block)
        except ValueError as error:
            raise ConfigError(f"arm {arm.name!r}: {error}") from None
        stages: tuple[Stage, ...]
        if len(rules) == 2:
            stages = (
                Stage(rules[0], config.column, config.column_retrain),
                Stage(rules[1], config.row, config.row_retrain),
            )
        else:
            moving = dataclasses.replace(config.column, epochs=config.column.epochs + config.row.epochs)
            inside = config.column_retrain.epochs + config.row_retrain.epochs
            stages = (Stage(rules[0], moving, dataclasses.replace(config.row_retrain, epochs=inside)),)
        dense, *made = phases.plan(Plan(config.dense, stages, arm.method))
        names = {p.name: f"{arm.name}_{p.name}" for p in made} | {phases.DENSE: phases.DENSE}
        out[""] = (dense,)
        out[arm.name] = tuple(p._replace(name=names[p.name], start=names[p.start]) for p in made)
    return out


# -- the run -----------------------------------------------------------------------------------------------------------


@runner.once
def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Trains the dense network, and every arm from it: what is left of it."""
    arms = plan_phases(config)
    others = speech_results.read_others(config.with_runs, config.variant, config.data.name)
    train, dev, test = (load(config, split, options.data_dir) for split in corpora.SPLITS)
    job, model = make_job(config, options, train, dev, test)
    todo = tuple(p for made in arms.values() for p in made)
    outcome = runner.train(config, options, job, todo)
    last = [made[-1] for made in arms.values()]
    left = {p.name: outcome.weights(job, p) for p in todo if p.kind == "admm" or any(p is x for x in last)}
    if jax.process_index() != 0:
        return {}
    return speech_report.conclude(config, options, arms, left, outcome, (train, dev, test), model, others)


# -- evaluation of a finished run --------------------------------------------------------------------------------------


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's compressed model on a split, of the config's corpus or of another with its units.

    Network, front end, bigram and decoding weights come from the file. The figures go to
    `<workdir>/eval/<corpus>-<split>/`.

    Raises:
      ConfigError: the run is not finished, or the data do not fit the network.
    """
    path, stored = options.workdir / artifacts.MODEL, runner.model_of(options.workdir)
    if options.split not in corpora.SPLITS:
        raise ConfigError(f"split={options.split!r} is impossible; it must be one of {', '.join(corpora.SPLITS)}")
    model_options, features, settings, known, facts = _described(path, stored)
    config = dataclasses.replace(config, features=features, loss=facts["loss"], model=model_options)
    heard = load(config, options.split, options.data_dir)
    if list(heard.corpus.inventory.names) != facts["units"]:
        raise ConfigError(
            f"data.name={config.data.name!r} has other units than {path}, which was trained on {facts['corpus']}"
        )
    model = build_model(model_options, outputs(config, heard))
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1, features.size))))
    params = runner.fitting(stored, wanted, "the file's own description of the network")
    scorer = speech_results.Scorer(model, facts["loss"], settings, known, config.eval_batch)
    counted, _ = scorer.score(params, heard, facts["decoding"]["lm_weight"], facts["decoding"]["reward"])
    return runner.evaluated(
        NAME,
        config,
        options,
        dataset=driver.dataset(heard.corpus.info, None, len(heard.features)),
        metric=runner.metric(f"{heard.corpus.unit} error rate", counted.rate, higher_is_better=False),
        stored=stored,
        block={"tokens": counted.tokens, **counted.parts(), "test_speakers": list(heard.corpus.speakers)},
    )


def _described(path: Path, stored: artifacts.Stored) -> tuple[Model, speech.FrontEnd, Decoding, Any, dict[str, Any]]:
    """Network, front end, decoding and bigram from a file that may be anyone's."""
    model, facts = stored.saved.model, stored.saved.extra
    try:
        ours = isinstance(facts, dict) and facts["driver"] == NAME and facts["loss"] in ("frames", "ctc")
        if model is None or not ours:
            raise ValueError("the network or its facts are missing")
        chosen = {k: float(facts["decoding"][k]) for k in ("lm_weight", "reward")}
        settings = training.parse(Decoding, {k: v for k, v in facts["decoding"].items() if k not in chosen})
        n = len(facts["units"])
        tables = {k: np.asarray(facts["language"][k], np.float32) for k in ("first", "after", "last", "prior", "stay")}
        if any(t.shape != ((n, n) if k == "after" else (n,)) or np.isnan(t).any() for k, t in tables.items()):
            raise ValueError("the bigram has another size than the units")
        known = speech_results.Language(
            decode.Bigram(tables["first"], tables["after"], tables["last"]),
            decode.Frames(tables["prior"], tables["stay"]),
        )
        options = training.parse(Model, model["options"])
        return options, training.parse(speech.FrontEnd, facts["features"]), settings, known, facts
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path} was not written by this driver: {error}") from None
