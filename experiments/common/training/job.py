"""The run specification: the job, and what follows from it before anything is trained: steps, order, keys, layouts."""

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from compressx._harden import structures
from compressx.rules import Rules
from experiments.common.data import batches
from experiments.common.training import optimizers
from experiments.common.training.config import ConfigError
from experiments.common.training.mesh import Placement
from experiments.common.training.phases import Phase, Weights
from experiments.common.training.state import Task


@dataclass(frozen=True)
class Job:
    """What is trained, on what, and how it is run; the phases come beside it.

    Attributes:
      task: the loss and the score.
      first: the weights before any training (structure `{}`).
      train: training set, host arrays with a leading axis n.
      test: reported after every epoch; never chooses anything.
      validation: part of the training set held out, or None.
      seed: of the order of examples and of all keys, 0 to 2**32 - 1.
      batch: examples a step. The n mod batch examples an epoch leaves over are others in every epoch.
      eval_batch: examples a step of evaluation.
      optimizer: "adam", "sgd" (Nesterov momentum 0.9), "plain_sgd" or "rmsprop" (decay 0.95).
      clip: largest norm that the gradient of the loss may have, over all weights together; 0 is any.
      placement: where arrays lie.
      chunk: steps between looks at the clock.
      save_steps: steps between checkpoints; 0 is only by time.
      save_seconds: seconds between checkpoints; 0 is only by steps. The ends of phases are always saved.
      reconstruct: `reconstruct(weights, rules, examples)`: the weights in their sets, with their structure, reached on
        so many training examples without training; None: the driver has no such method.
      order: `order(seed, epoch) -> int32 [n // batch, batch]`, the examples of every batch of an epoch, where not every
        shuffle will do (buckets of like lengths); None shuffles all.
      select: figure of the validation set, such as `validation_accuracy`, whose best epoch (its start among them, the
        earliest of equals) a dense or retraining phase leaves; "" is the last epoch.
    """

    task: Task
    first: Weights
    train: Mapping[str, Any]
    test: Mapping[str, Any]
    validation: Mapping[str, Any] | None = None
    seed: int = 0
    batch: int = 64
    eval_batch: int = 1000
    optimizer: str = "adam"
    clip: float = 0.0
    placement: Placement = Placement()
    chunk: int = 50
    save_steps: int = 0
    save_seconds: float = 60.0
    select: str = ""
    reconstruct: Callable[[Weights, Rules, int], Weights] | None = None
    order: Callable[[int, int], np.ndarray] | None = None


def check_phases(job: Job, phases: tuple[Phase, ...]) -> None:
    """Raises ConfigError where a phase's rules, rho or lengths cannot be run, before anything is trained or written."""
    params = job.first.params
    per_epoch = batches.steps_per_epoch(size(job.train), job.batch)
    for phase in phases:
        steps = phase.fit.epochs * per_epoch
        if phase.calibration and job.reconstruct is None:
            raise ConfigError(f"phase {phase.name}: this driver has no plan.method='reconstruct'; use another method")
        if phase.calibration > size(job.train):
            there = f"there are {size(job.train)} training examples"
            raise ConfigError(f"plan.calibration={phase.calibration} is impossible: {there}")
        try:
            jax.eval_shape(optimizers.of_phase(job.optimizer, phase, steps, per_epoch, None, job.clip).init, params)
        except ValueError as error:
            raise ConfigError(f"phase {phase.name}: {error}") from None


def total_steps(job: Job, phases: tuple[Phase, ...]) -> int:
    """Steps of the whole run."""
    each = batches.steps_per_epoch(size(job.train), job.batch)
    return sum(p.fit.epochs for p in phases) * each


def like(weights: Weights, phase: Phase, placement: Placement) -> Weights:
    """Shapes and layouts of what a phase leaves, for loading it."""

    def abstract(x: Any) -> Any:
        if placement.mesh is None:
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        sharding = jax.sharding.NamedSharding(placement.mesh, placement.spec(x.shape))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    structure: Any = {}
    if phase.rules is not None:
        rules = phase.rules
        structure = jax.eval_shape(lambda p: structures(p, rules), weights.params)
    return jax.tree.map(abstract, Weights(weights.params, weights.batch_stats, structure))


def size(data: Mapping[str, Any]) -> int:
    """Examples of a data set."""
    return int(jax.tree.leaves(dict(data))[0].shape[0])


def epoch_order(phase: Phase, epoch: int, job: Job) -> np.ndarray:
    """The batches of an epoch, int32 `[steps, batch]`: a function of seed, phase and epoch alone.

    Examples that follow one another come in their order, in every epoch.
    """
    if job.task.begin is not None:
        return batches.in_order(size(job.train), job.batch)
    seed = (_number(phase.name) << 32) | job.seed
    if job.order is not None:
        return job.order(seed, epoch)
    return batches.epoch_batches(seed, epoch, size(job.train), job.batch)


def phase_key(phase: Phase, seed: int) -> jax.Array:
    """The key from which a phase's steps fold theirs."""
    return jax.random.fold_in(jax.random.key(seed), np.uint32(_number(phase.name)))


def _number(name: str) -> int:
    """32 bits of a phase's name: data order and keys of a phase do not depend on which others are run."""
    return zlib.crc32(name.encode())
