"""Image classifiers compressed by ADMM: dense -> ADMM -> harden -> retrain -> pack -> report.

    python -m experiments.cnn --config=configs/cnn.py:digits --workdir=runs/demo

The accuracy reported is that of the last epoch on the whole test set; the test set chooses nothing.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cnn import measures, reconstruction
from experiments.cnn.config import Config, Data
from experiments.common import artifacts, data, driver, init_from, latency, models, runner, training
from experiments.common.driver import Options
from experiments.common.models import convert, plain_file
from experiments.common.report import html
from experiments.common.settings import check_batch
from experiments.common.training import ConfigError, Phase, Weights, mesh, phases, state

DEMO = "digits"  # the variant of `make demo`: a network so small that it shows no gain in time; a layer beside it does

# -- what is trained ---------------------------------------------------------------------------------------------------


def load_data(given: Data, split: str, data_dir: str | None) -> data.Dataset:
    """A split, cut to the number of examples `given` asks for."""
    try:
        whole = data.load(given.name, split, data_dir)
    except (data.DataNotFoundError, data.DataFileError):
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    wanted = {"train": given.train, "test": given.test}.get(split, 0)
    if not 0 <= wanted <= len(whole):
        raise ConfigError(f"data.{split}={wanted} is impossible; {given.name} has {len(whole)} examples")
    return whole.take(slice(0, wanted)) if wanted else whole


def arrays(dataset: data.Dataset) -> dict[str, np.ndarray]:
    """Inputs and labels of a data set as the training takes them."""
    return {"inputs": np.asarray(dataset.inputs), "labels": np.asarray(dataset.labels)}


def make_task(model: Any, mean: tuple[float, ...], std: tuple[float, ...], config: Data | None = None) -> training.Task:
    """Loss and score of a network on images; with augmentation if a config asks for it."""
    steps = []
    if config is not None and config.flip:
        steps.append(data.augment.random_flip())
    if config is not None and config.shift:
        steps.append(data.augment.random_shift(config.shift))
    augment = data.augment.compose(*steps) if steps else None
    return training.classification(model.apply, lambda x: data.augment.normalise(x, mean, std), augment)


def build_model(name: str, options: Any, classes: int) -> Any:
    """The network, or a ConfigError."""
    try:
        return models.build(name, classes=classes, **options)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"model: {error}") from None


def first_weights(config: Config, model: Any, shape: tuple[int, ...], data_dir: str | None) -> Weights:
    """The weights before any training: from a checkpoint file, or drawn from the seed."""
    make = jax.jit(lambda k: model.init(k, jnp.zeros((1, *shape), jnp.float32)))
    if config.model.checkpoint.endswith(".safetensors"):
        like = jax.eval_shape(make, jax.random.key(0))
        variables = plain_file.load(data.find_file(config.model.checkpoint, data_dir), like)
    elif config.model.checkpoint:
        loaded, variables = convert.load_cifar_resnet(data.find_file(config.model.checkpoint, data_dir))
        if loaded != model:
            raise ConfigError(
                f"model.checkpoint={config.model.checkpoint!r} holds {loaded}, and the config asks for {model}"
            )
    else:
        variables = make(jax.random.key(config.seed))
    others = {name: tree for name, tree in variables.items() if name != "params"}
    return Weights({"params": variables["params"]}, others, {})


def make_job(config: Config, options: Options) -> tuple[training.Job, data.Info]:
    """Everything the training needs.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or damaged.
    """
    train, test = (load_data(config.data, split, options.data_dir) for split in ("train", "test"))
    held, info = config.data.validation, train.info
    if not 0 <= held < len(train):
        raise ConfigError(f"data.validation={held} is impossible; it must be 0 to {len(train) - 1}")
    used = len(train) - held
    check_batch(config.batch, used, "training examples")
    model = build_model(config.model.name, config.model.options, info.classes)
    mean, std = config.data.mean or info.mean, config.data.std or info.std
    if len(mean) != info.shape[-1] or len(std) != info.shape[-1] or min(std) <= 0:
        raise ConfigError(f"data.mean={mean} and data.std={std} need {info.shape[-1]} values each, std above 0")
    job = training.Job(
        task=make_task(model, mean, std, config.data),
        first=first_weights(config, model, info.shape, options.data_dir),
        train=arrays(train.take(slice(0, used))),
        test=arrays(test),
        validation=arrays(train.take(slice(used, len(train)))) if held else None,
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_batch,
        optimizer=config.optimizer,
        placement=mesh.for_batch(options.mesh, config.batch),
        reconstruct=reconstruction.of_images(
            model, arrays(train.take(slice(0, used)))["inputs"], mean, std, config.seed
        ),
        save_steps=config.save.steps,
        save_seconds=config.save.seconds,
    )
    if config.init_from:
        settings, free = dataclasses.asdict(config), ("shift", "flip", "test", "checkpoint")
        job = init_from.take_dense(job, options.workdir, config.init_from, settings, free=free)
    return job, info


def plan_phases(config: Config) -> tuple[Phase, ...]:
    """The phases; with `init_from` nothing is left to train in the dense one."""
    return init_from.plan_phases(config.plan, config.init_from)


# -- the run -----------------------------------------------------------------------------------------------------------


@runner.once
def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Trains and compresses an image classifier: what is left of it."""
    todo = plan_phases(config)
    job, info = make_job(config, options)
    outcome = runner.train(config, options, job, todo)
    last = next(p for p in todo if p.name == phases.final(config.plan))
    dense, result = (outcome.weights(job, p) for p in (todo[0], last))
    if jax.process_index() != 0:
        return {}
    facts = {
        "driver": "cnn",
        "dataset": info.name,
        "classes": info.classes,
        "mean": list(config.data.mean or info.mean),
        "std": list(config.data.std or info.std),
        "seed": config.seed,
    }
    workdir, results = options.workdir, outcome.results
    model = {"name": config.model.name, "options": dict(config.model.options)}
    way = phases.schedule(todo, last.name)
    stored = artifacts.save(workdir / artifacts.MODEL, result, last.rules, model, facts, way)
    times: dict[str, float] | None = None
    latencies: dict[str, Any] = {"reason": "nothing is compressed"}
    measured: dict[str, Any] = {}
    sections: list[tuple[str, Any]] = []
    if last.rules:
        network = build_model(config.model.name, config.model.options, info.classes)
        dense_variables = {**dense.params, **dense.batch_stats}
        times, latencies = latency.of_images(stored.saved, dense_variables, info.shape, info.classes)
        if config.variant == DEMO and times and times["compressed"] > times["dense"] / 1.2:
            latencies["layer"] = latency.of_layer()
        measured, sections = measures.measure(workdir, network, dense.params, result, last.rules, info.shape)

    def accuracy(name: str, when: str = "end") -> float | None:
        return results[name][when]["accuracy"] if name in results else None

    summary = runner.summary(
        "cnn",
        config,
        options,
        dataset=driver.dataset(info, len(job.train["labels"]), len(job.test["labels"])),
        metric=runner.metric(
            "accuracy",
            accuracy(last.name) if last.rules else None,
            dense=accuracy(phases.DENSE),
            dense_same_budget=accuracy(phases.SAME_BUDGET),
            one_shot=accuracy(phases.ONE_SHOT),
            hardened=accuracy(last.name, "start") if last.rules else None,
        ),
        stored=stored,
        residual=runner.residual(results.values()),
        latency_ms=times,
        seconds=outcome.seconds,
        block={
            "method": config.plan.method,
            "selection": "the last epoch; the test set chooses nothing",
            "gradual": accuracy(f"{phases.GRADUAL}_retrain"),
            "init_from": config.init_from or None,
            "mesh": options.mesh or None,
            "processes": jax.process_count(),
            "phases": results,
            "latency": latencies,
            "file_bytes": (workdir / artifacts.MODEL).stat().st_size,
            **measured,
        },
    )
    return runner.conclude(
        summary,
        options,
        layers=stored.layers,
        pictures=artifacts.pictures(workdir, dense.params, result.params, last.rules),
        sections=[("Phases", _phase_table(todo, results)), *sections],
    )


def _phase_table(todo: tuple[Phase, ...], results: dict[str, Any]) -> html.Table:
    rows = []
    for phase in todo:
        accuracies = [f"{100 * results[phase.name][when]['accuracy']:.2f} %" for when in ("start", "end")]
        rows.append((phase.name, phase.start or "-", str(phase.fit.epochs), f"{phase.fit.lr:g}", *accuracies))
    header = ("phase", "starts from", "epochs", "learning rate", "accuracy at its start", "at its end")
    return html.Table(header, rows, (False, False, True, True, True, True))


# -- evaluation of a finished run --------------------------------------------------------------------------------------


def evaluate(config: Any, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's compressed model on a split, of the config's data set or of another one.

    The network and the normalisation come from the file. The figures go to `<workdir>/eval/<data set>-<split>/`.

    Raises:
      ConfigError: the run is not finished, or the data do not fit the network.
    """
    stored = runner.model_of(options.workdir)
    path = options.workdir / artifacts.MODEL
    name, options_, facts = described(path, stored)
    dataset = load_data(config.data, options.split, options.data_dir)
    if dataset.info.classes != facts["classes"] or dataset.info.shape[-1] != len(facts["mean"]):
        raise ConfigError(
            f"data.name={config.data.name!r} has {dataset.info.classes} classes and images {dataset.info.shape}; "
            f"{path} is a network of {facts['classes']} classes and {len(facts['mean'])} channels"
        )
    model = build_model(name, options_, facts["classes"])
    task = make_task(model, tuple(facts["mean"]), tuple(facts["std"]))
    wanted = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, *dataset.info.shape), jnp.float32)))
    variables = runner.fitting(stored, wanted, f"{name} on images {dataset.info.shape}")
    others = {k: v for k, v in variables.items() if k != "params"}
    score = state.make_evaluate(task, config.eval_batch)
    figures = score({"params": variables["params"]}, others, jax.tree.map(jnp.asarray, arrays(dataset)))
    return runner.evaluated(
        "cnn",
        config,
        options,
        dataset=driver.dataset(dataset.info, None, len(dataset)),
        metric=runner.metric("accuracy", figures["accuracy"]),
        stored=stored,
        block={"loss": figures["loss"]},
    )


def described(path: Path, stored: artifacts.Stored) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The network's name, its options and the facts of its data, from a file that may be anyone's."""
    model, facts = stored.saved.model, stored.saved.extra
    numbers = isinstance(facts, dict) and all(
        isinstance(facts.get(k), list) and facts[k] and all(isinstance(x, float | int) for x in facts[k])
        for k in ("mean", "std")
    )
    if model is None or not numbers or not isinstance(facts["classes"], int) or min(facts["std"]) <= 0:
        raise ConfigError(f"{path} was not written by this driver: the network or its normalisation is missing")
    return model["name"], dict(model.get("options", {})), facts
