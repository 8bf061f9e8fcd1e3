"""Image classifiers compressed by ADMM: dense -> ADMM -> harden -> retrain -> pack -> report.

    python -m experiments.cnn --config=configs/cnn.py:digits --workdir=runs/demo

The accuracy reported is that of the last epoch on the whole test set; the test set chooses nothing.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx import data, models, training
from compressx.harden import count_violations, kept
from compressx.models import convert
from compressx.report.environment import run_record
from compressx.report.summary import make_summary, read_summary, write_summary
from compressx.rules import paths
from compressx.training import ConfigError, Outcome, Phase, Plan, Weights, mesh, phases
from experiments import driver
from experiments.driver import Options


@dataclass(frozen=True)
class Data:
    """The images.

    Attributes:
      name: a key of `data.DATASETS`.
      train: how many training examples to use, from the front; 0 is all.
      test: likewise.
      validation: how many of the last training examples to hold out; they are reported, never trained on.
      shift: augmentation, random shifts of up to so many pixels.
      flip: augmentation, random left-right mirrors.
      mean: per channel, overrides the data set's own.
      std: likewise.
    """

    name: str = "digits"
    train: int = 0
    test: int = 0
    validation: int = 0
    shift: int = 0
    flip: bool = False
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True)
class Model:
    """The network.

    Attributes:
      name: a key of `models.MODELS`.
      options: its fields, such as `width`.
      checkpoint: file below the data folder with weights to start from (PyTorch names), or "".
    """

    name: str = "digits_cnn"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: str = ""


@dataclass(frozen=True)
class Save:
    """Checkpoints: every so many steps, every so many seconds (0: not by that), and at the ends of phases."""

    steps: int = 0
    seconds: float = 60.0


@dataclass(frozen=True)
class Paper:
    """The published figure to compare with: a dotted key of the summary ("" for none), and its value."""

    quantity: str = ""
    value: float = 0.0


@dataclass(frozen=True)
class Config:
    """One experiment, complete.

    Attributes:
      variant: its name.
      seed: of the weights, the order of examples and the augmentation.
      data: the images.
      model: the network.
      batch: examples a step.
      eval_batch: examples a step of evaluation.
      optimizer: "adam" or "sgd".
      plan: all that is trained.
      init_from: work directory of another run whose dense weights are taken, "" to train them here.
      save: when checkpoints are written.
      paper: what to compare with.
    """

    variant: str = ""
    seed: int = 0
    data: Data = Data()
    model: Model = Model()
    batch: int = 64
    eval_batch: int = 1000
    optimizer: str = "adam"
    plan: Plan = dataclasses.field(default_factory=lambda: Plan(stages=(training.Stage(rules=((".*", None),)),)))
    init_from: str = ""
    save: Save = Save()
    paper: Paper = Paper()

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed={self.seed} is impossible; it must be 0 to 2**32 - 1")
        if self.optimizer not in ("adam", "sgd"):
            raise ConfigError(f"optimizer={self.optimizer!r} is impossible; it must be adam or sgd")
        if self.init_from and self.model.checkpoint:
            raise ConfigError("init_from and model.checkpoint both give the dense weights; use one")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict.

    Raises:
      ConfigError: a key or a value that is not allowed.
    """
    return training.parse(Config, config)


# -- what is trained ------------------------------------------------------------------------------------------------------


def load_data(config: Config, split: str, data_dir: str | None) -> data.Dataset:
    """A split, cut to the number of examples the config asks for."""
    try:
        whole = data.load(config.data.name, split, data_dir)
    except (data.DataNotFoundError, data.DataFileError):
        raise
    except ValueError as error:
        raise ConfigError(f"data: {error}") from None
    wanted = config.data.train if split == "train" else config.data.test if split == "test" else 0
    if wanted > len(whole):
        raise ConfigError(f"data.{split}={wanted} is impossible; {config.data.name} has {len(whole)} examples")
    return whole.take(slice(0, wanted)) if wanted else whole


def arrays(dataset: data.Dataset) -> dict[str, np.ndarray]:
    """Inputs and labels of a data set as the training takes them."""
    return {"inputs": np.asarray(dataset.inputs), "labels": np.asarray(dataset.labels)}


def make_task(config: Config, info: data.Info) -> tuple[Any, training.Task]:
    """The network and its loss and score."""
    try:
        model = models.build(config.model.name, classes=info.classes, **config.model.options)
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None
    mean, std = config.data.mean or info.mean, config.data.std or info.std
    steps = []
    if config.data.flip:
        steps.append(data.augment.random_flip())
    if config.data.shift:
        steps.append(data.augment.random_shift(config.data.shift))
    augment = data.augment.compose(*steps) if steps else None
    return model, training.classification(model.apply, lambda x: data.augment.normalise(x, mean, std), augment)


def first_weights(config: Config, model: Any, shape: tuple[int, ...], data_dir: str | None) -> Weights:
    """The weights before any training: from a checkpoint file, or drawn from the seed."""
    if config.model.checkpoint:
        path = data.find_file(config.model.checkpoint, data_dir)
        loaded, variables = convert.load_cifar_resnet(path)
        if loaded != model:
            raise ConfigError(f"model.checkpoint={config.model.checkpoint!r} holds {loaded}, and the config asks for {model}")
    else:
        key = jax.random.key(config.seed)
        variables = jax.jit(lambda k: model.init(k, jnp.zeros((1, *shape), jnp.float32)))(key)
    return Weights(variables["params"], variables.get("batch_stats", {}), {})


def make_job(config: Config, options: Options) -> tuple[training.Job, data.Info]:
    """Everything the training needs."""
    train, test = load_data(config, "train", options.data_dir), load_data(config, "test", options.data_dir)
    held = config.data.validation
    if not 0 <= held < len(train):
        raise ConfigError(f"data.validation={held} is impossible; it must be 0 to {len(train) - 1}")
    if not 1 <= config.batch <= len(train) - held:
        raise ConfigError(f"batch={config.batch} is impossible; it must be 1 to {len(train) - held}, the training examples")
    model, task = make_task(config, train.info)
    try:
        placement = mesh.make(options.mesh)
        placement.check_batch(config.batch)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    used = len(train) - held
    job = training.Job(
        task=task,
        init=lambda: first_weights(config, model, train.info.shape, options.data_dir),
        train=arrays(train.take(slice(0, used))),
        test=arrays(test),
        validation=arrays(train.take(slice(used, len(train)))) if held else None,
        seed=config.seed,
        batch=config.batch,
        eval_batch=config.eval_batch,
        optimizer=config.optimizer,
        placement=placement,
        save_steps=config.save.steps,
        save_seconds=config.save.seconds,
    )
    return job, train.info


def take_dense(config: Config, job: training.Job) -> training.Job:
    """The job with the dense weights of another run in place of the first ones.

    Raises:
      ConfigError: that run is of another network, data set or dense training, or has not finished its dense phase.
    """
    folder = Path(config.init_from)
    try:
        other = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"init_from={config.init_from!r} is not a run: {error}") from None
    mine = dataclasses.asdict(config)
    for key in ("data", "model"):
        a, b = driver.flatten(other.get(key)), driver.flatten(json.loads(json.dumps(mine[key])))
        differ = [k for k in sorted(a | b) if a.get(k) != b.get(k) and k not in ("shift", "flip", "test")]
        if differ:
            raise ConfigError(f"init_from={config.init_from!r} is a run with another {key}: {', '.join(differ)} differ")
    shapes = jax.eval_shape(job.init)
    from compressx.training.checkpoint import Checkpoints
    from compressx.training.loop import like

    template = like(shapes, Phase(phases.DENSE, "dense", "", config.plan.dense), job.placement)

    def load() -> Weights:
        return Checkpoints(folder / "checkpoints").load_weights(phases.DENSE, template)

    return dataclasses.replace(job, init=load)


def train_and_evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Runs the experiment, or what is left of it, and writes everything about it into the work directory.

    Returns:
      The summary.

    Raises:
      One of `driver.USER_ERRORS`.
    """
    workdir = options.workdir
    written = json.loads(json.dumps(dataclasses.asdict(config)))
    if (workdir / "summary.json").exists():
        driver.claim(workdir, written)
        print(f"{workdir} is finished; nothing to do. Its report: {workdir / 'report.html'}")
        return read_summary(workdir / "summary.json")
    job, info = make_job(config, options)
    todo = phases.plan(config.plan)
    if config.init_from:
        job = take_dense(config, job)
    phases.check_rules(todo, jax.eval_shape(job.init).params)
    first = jax.process_index() == 0
    if first:
        driver.claim(workdir, written)
    with training.Display(training.total_steps(job, todo), quiet=not first) as display:
        outcome = training.train(job, todo, workdir, display)
    return conclude(config, options, job, info, todo, outcome)


def _load(name: str, job: training.Job, todo: tuple[Phase, ...], outcome: Outcome) -> Weights:
    from compressx.training.loop import like

    phase = next(p for p in todo if p.name == name)
    weights = outcome.checkpoints.load_weights(name, like(jax.eval_shape(job.init), phase, job.placement))
    return mesh.host(weights)


def conclude(
    config: Config, options: Options, job: training.Job, info: data.Info, todo: tuple[Phase, ...], outcome: Outcome
) -> dict[str, Any]:
    """Packs the result and writes the summary and the report."""
    last = phases.final(config.plan)
    phase = next(p for p in todo if p.name == last)
    dense, compressed = _load(phases.DENSE, job, todo, outcome), _load(last, job, todo, outcome)
    results = outcome.results
    summary = make_summary(**summarise(config, options, job, info, phase, outcome, dense, compressed))
    if jax.process_index() == 0:
        write_summary(options.workdir / "summary.json", summary)
    print(json.dumps({k: summary[k] for k in ("metric", "rate", "seconds")}), results.keys())
    return summary


def summarise(
    config: Config,
    options: Options,
    job: training.Job,
    info: data.Info,
    phase: Phase,
    outcome: Outcome,
    dense: Weights,
    compressed: Weights,
) -> dict[str, Any]:
    """The fields of `summary.json`."""
    results = outcome.results

    def accuracy(name: str, when: str = "end") -> float | None:
        return results[name][when]["accuracy"] if name in results else None

    rate: dict[str, float | None] = {"constrained_weights": None, "all_weights": None, "bytes": None}
    violations = None
    if phase.rules is not None:
        stay, held = count_kept(compressed, phase)
        everything = sum(w.size for w in jax.tree.leaves(compressed.params))
        nonzero = sum(int(np.count_nonzero(w)) for w in jax.tree.leaves(compressed.params))
        rate = {"constrained_weights": held / stay, "all_weights": everything / nonzero, "bytes": None}
        counts = count_violations(compressed.params, phase.rules, compressed.structure)
        violations = sum(int(v) for v in counts.values())
    primal = [max(r["primal"].values()) for r in results.values() if r.get("primal")]
    dual = [max(r["dual"].values()) for r in results.values() if r.get("dual")]
    method = config.plan.method
    return {
        "driver": "cnn",
        "variant": config.variant,
        "seed": config.seed,
        "dataset": {
            "name": info.name,
            "source": info.source,
            "train": len(job.train["labels"]),
            "test": len(job.test["labels"]),
            "stand_in": info.stand_in,
        },
        "metric": {
            "name": "accuracy",
            "higher_is_better": True,
            "dense": accuracy(phases.DENSE),
            "dense_same_budget": accuracy(phases.SAME_BUDGET),
            "one_shot": accuracy(phases.ONE_SHOT),
            "hardened": accuracy(phase.name, "start") if phase.rules is not None else None,
            "compressed": accuracy(phase.name) if method != "dense" else None,
        },
        "rate": rate,
        "bytes": None,
        "residual": {"primal": primal[-1] if primal else None, "dual": dual[-1] if dual else None},
        "violations": violations,
        "latency_ms": None,
        "seconds": outcome.seconds,
        "paper": {"quantity": config.paper.quantity, "value": config.paper.value} if config.paper.quantity else None,
        "cnn": {
            "method": method,
            "selection": "last epoch; the test set chooses nothing",
            "init_from": config.init_from or None,
            "kept": {p: list(k) for p, k in kept_by_path(compressed, phase).items()},
            "phases": results,
            "run": run_record(options.command),
        },
    }


def kept_by_path(weights: Weights, phase: Phase) -> dict[str, tuple[int, int]]:
    """Path -> (non-zeros, weights) of the constrained leaves."""
    if phase.rules is None:
        return {}
    bound = phases.resolve(phase.rules, weights.params)
    return kept(weights.params, bound)


def count_kept(weights: Weights, phase: Phase) -> tuple[int, int]:
    """Non-zeros and weights over all constrained leaves."""
    each = kept_by_path(weights, phase).values()
    return sum(k for k, _ in each), sum(n for _, n in each)


def evaluate(config: Config, options: Options) -> dict[str, Any]:
    """Evaluates a finished run's compressed model on another split or data folder."""
    raise ConfigError("not there yet")


if __name__ == "__main__":
    driver.main("experiments.cnn", train_and_evaluate, evaluate, read)
