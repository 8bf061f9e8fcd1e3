"""Networks on crossbars: trained into an engine's form by ADMM, run through its simulation, and costed.

    python -m experiments.crossbar --config=configs/crossbar.py:digits --workdir=runs/crossbar

dense -> branches (pruned, polarized, quantized, ... each by ADMM from the one it starts from) -> hardware: accuracy
through the simulated engine, zero skipping on real activations, Monte Carlo over devices, arrays, area, power and
frames per second beside other engines. `--config.init_from=DIR` takes the dense network of a run of `experiments.cnn`;
`--config.take=DIR` puts the compressed network of a finished run on the engine as it is, and trains nothing. Scales are
chosen on training images; the test set chooses nothing.
"""

import dataclasses
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx.crossbar.aware import training_hardware
from compressx.crossbar.noise import Variation
from experiments.cnn import task as cnn
from experiments.cnn.config import Config as CnnConfig
from experiments.cnn.config import Model
from experiments.common import artifacts, data, driver, runner, training
from experiments.common.driver import Options
from experiments.common.training import ConfigError, Outcome, Phase, Plan, Stage, Weights, phases
from experiments.crossbar import forms as crossbar_forms
from experiments.crossbar import page as crossbar_page
from experiments.crossbar import sot as crossbar_sot
from experiments.crossbar.config import AWARE, DENSE, TAKEN, Config, plan_phases
from experiments.crossbar.models import Scene, Subject, check_sets, make_subject


def training_config(config: Config) -> CnnConfig:
    """The part of the config that `experiments.cnn` knows how to load."""
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(CnnConfig) if f.name != "plan"}
    stages = tuple(Stage(b.rules, b.admm, b.retrain) for b in config.branches)
    return CnnConfig(plan=Plan(config.dense, stages), **shared)


# -- the run -----------------------------------------------------------------------------------------------------------


@runner.once
def run(config: Config, options: Options) -> dict[str, Any]:
    """Trains the branches, what is left of them, and measures them on the engine."""
    started = time.monotonic()
    if config.take:
        subjects, scene = _taken(config, options)
        return _conclude(config, options, subjects, scene, None, time.monotonic() - started)
    todo = plan_phases(config)
    for phase in todo:
        check_sets(phase.rules or (), config.hardware.engine)
    job, info = cnn.make_job(training_config(config), options)
    outcome = runner.train(config, options, job, todo)
    names = {p.name: p for p in todo}
    subjects = [make_subject(DENSE, outcome.weights(job, names[DENSE]), (), outcome.results[DENSE])]
    for b in config.branches:
        last = names[f"retrain_{b.name}"]
        subjects.append(make_subject(b.name, outcome.weights(job, last), last.rules or (), outcome.results[last.name]))
    scene = _scene(config, info, job.train, job.test)
    if config.noise_aware.start:
        subjects.append(_noise_aware(config, options, job, scene, subjects))
    trained = (todo, outcome)
    return _conclude(config, options, subjects, scene, trained, outcome.seconds)


def _scene(config: Config, info: data.Info, train: Any, test: Any) -> Scene:
    """The network and the images that everything is measured on."""
    model = cnn.build_model(config.model.name, config.model.options, info.classes)
    mean, std = config.data.mean or info.mean, config.data.std or info.std
    return Scene(
        apply=model.apply,
        prepare=lambda x: data.augment.normalise(x, mean, std),
        calibration=np.asarray(train["inputs"])[: config.hardware.calibration],
        images=np.asarray(test["inputs"]),
        labels=np.asarray(test["labels"]),
        info=info,
    )


def _taken(config: Config, options: Options) -> tuple[list[Subject], Scene]:
    """The compressed network of a finished run, with the data the config names."""
    path = Path(config.take) / artifacts.MODEL
    if not path.is_file():
        raise ConfigError(f"take={config.take!r}: {path} does not exist; name the work directory of a finished run")
    stored = artifacts.read(path)
    check_sets(tuple(stored.saved.rules), config.hardware.engine)
    name, model_options, facts = cnn.described(path, stored)
    train, test = (cnn.load_data(config.data, s, options.data_dir) for s in ("train", "test"))
    if test.info.classes != facts["classes"] or test.info.shape[-1] != len(facts["mean"]):
        raise ConfigError(f"data.name={config.data.name!r} does not fit the network in {path}")
    config_ = dataclasses.replace(
        config,
        model=Model(name, model_options),
        data=dataclasses.replace(config.data, mean=tuple(facts["mean"]), std=tuple(facts["std"])),
    )
    driver.claim(options.workdir, dataclasses.asdict(config))
    others = {k: v for k, v in stored.saved.params.items() if k != "params"}
    weights = Weights({"params": stored.saved.params["params"]}, others, stored.saved.structures)
    scene = _scene(config_, test.info, cnn.arrays(train), cnn.arrays(test))
    return [make_subject(TAKEN, weights, tuple(stored.saved.rules), {})], scene


def _noise_aware(
    config: Config, options: Options, job: training.Job, scene: Scene, subjects: list[Subject]
) -> Subject:
    """Retrains a polarized model through drawn devices, in a folder of its own, and gives it back as a model."""
    aware, start = config.noise_aware, next(s for s in subjects if s.name == config.noise_aware.start)
    targets = crossbar_forms.targets(start, scene, config.hardware)
    spread = Variation("lognormal", aware.sigma)
    model = cnn.build_model(config.model.name, config.model.options, scene.info.classes)
    mean, std = config.data.mean or scene.info.mean, config.data.std or scene.info.std
    clean = cnn.make_task(model, mean, std, config.data)

    def loss(params: Any, stats: Any, batch: Any, key: Any, fit: Any, teacher: Any) -> Any:
        with training_hardware(targets, jax.random.fold_in(key, 1), spread):
            return clean.loss(params, stats, batch, key, fit, teacher)

    branch = next(b for b in config.branches if b.name == aware.start)
    rules = phases.build_rules(branch.rules)
    phase = Phase("retrain_noise_aware", "retrain", "", aware.fit, rules)
    first = jax.tree.map(jnp.asarray, start.weights)
    noisy = dataclasses.replace(
        job, task=clean._replace(loss=loss), first=first, batch=aware.batch or job.batch, chunk=5
    )
    with training.Display(training.total_steps(noisy, (phase,))) as display:
        outcome = training.train(noisy, (phase,), options.workdir / AWARE, display)
    weights = outcome.weights(noisy, phase)
    return make_subject(AWARE, weights, rules, outcome.results[phase.name])


def _conclude(
    config: Config,
    options: Options,
    subjects: list[Subject],
    scene: Scene,
    trained: tuple[tuple[Phase, ...], Outcome] | None,
    seconds: float,
) -> dict[str, Any]:
    """Measures, stores the main model, and writes everything; the summary last, for it says the run is finished."""
    workdir, main = options.workdir, next(s for s in subjects if s.name == (config.main or TAKEN))
    measurer = crossbar_forms if config.hardware.engine == "forms" else crossbar_sot
    started = time.monotonic()
    found = measurer.measure(subjects, main.name, scene, config.hardware, config.variation, config.seed)
    measuring = time.monotonic() - started
    way = phases.schedule(trained[0] if trained else (), f"retrain_{main.name}")
    stored = _store(config, options, main, scene, way)
    results = trained[1].results if trained else {}
    outcome_of = lambda phase, when="end": results.get(phase, {}).get(when, {}).get("accuracy")
    summary = runner.summary(
        "crossbar",
        config,
        options,
        dataset=driver.dataset(scene.info, len(scene.calibration) if config.take else None, len(scene.labels)),
        metric=runner.metric(
            "accuracy",
            found["models"][main.name]["hardware"],
            dense=outcome_of(DENSE),
            one_shot=outcome_of(phases.ONE_SHOT),
            hardened=outcome_of(f"retrain_{main.name}", "start"),
        ),
        stored=stored,
        residual=runner.residual([results.get(f"admm_{main.name}", {})]),
        seconds=seconds + measuring,
        block={
            "engine": config.hardware.engine,
            "main": main.name,
            "selection": "the last epoch; the test set chooses nothing; input scales from training images",
            "init_from": config.init_from or config.take or None,
            **found,
            "training": results,
            "measuring_seconds": measuring,
        },
    )
    before = next((s for s in subjects if s.name == DENSE), main)
    pictures = crossbar_page.pictures(workdir, summary["crossbar"])
    if trained:
        pictures += crossbar_page.sign_changes(workdir)
        pictures += artifacts.pictures(workdir, before.weights.params, main.weights.params, main.rules)
    return runner.conclude(
        summary,
        options,
        layers=stored.layers,
        pictures=pictures,
        sections=crossbar_page.sections(summary["crossbar"]),
    )


def _store(
    config: Config, options: Options, main: Subject, scene: Scene, way: Mapping[str, Any] | None
) -> artifacts.Stored:
    info = scene.info
    facts = {
        "driver": "crossbar",
        "dataset": info.name,
        "classes": info.classes,
        "mean": list(config.data.mean or info.mean),
        "std": list(config.data.std or info.std),
        "seed": config.seed,
    }
    if config.take:
        path = Path(config.take) / artifacts.MODEL
        return artifacts.read(path)
    model = {"name": config.model.name, "options": dict(config.model.options)}
    return artifacts.save(options.workdir / artifacts.MODEL, main.weights, main.rules, model, facts, way)


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Runs a finished run's main model through the engine on a split, of the config's data set or of another one.

    The figures go to `<workdir>/eval/<data set>-<split>/`.
    """
    taken = dataclasses.replace(config, take=config.take or str(options.workdir), init_from="", branches=())
    path = Path(taken.take) / artifacts.MODEL
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; finish the run first (--mode=run)")
    stored = artifacts.read(path)
    folder = options.workdir / "eval" / f"{config.data.name}-{options.split}"
    subjects, scene = _taken(taken, dataclasses.replace(options, workdir=folder))
    dataset = cnn.load_data(config.data, options.split, options.data_dir)
    scene = scene._replace(images=np.asarray(dataset.inputs), labels=np.asarray(dataset.labels))
    measurer = crossbar_forms if config.hardware.engine == "forms" else crossbar_sot
    figures = measurer.scores(subjects[0], scene, config.hardware)
    return runner.evaluated(
        "crossbar",
        config,
        options,
        dataset=driver.dataset(scene.info, None, len(scene.labels)),
        metric=runner.metric("accuracy", figures["hardware"]),
        stored=stored,
        block=figures,
    )
