"""A federated experiment: its config, its data divided, its plan. Shared by the simulation and the processes."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from compressx.federated import algorithm, splits
from compressx.federated.algorithm import Algorithm
from compressx.federated.timing import Network
from compressx.federated.trusted import rounds
from compressx.federated.trusted.rounds import Plan
from experiments.cnn import task as cnn
from experiments.cnn.config import Data, Model
from experiments.common import data, training
from experiments.common.driver import Options
from experiments.common.settings import check_seed
from experiments.common.training import ConfigError
from experiments.common.training.state import plain_loss

NpArray = npt.NDArray[Any]
BASELINES = ("dense", "fedprox", "secagg")


@dataclass(frozen=True)
class Split:
    """How the examples are divided.

    Attributes:
      kind: a key of `splits.SPLITS`.
      clients: how many.
      alpha: of "dirichlet" and "quantity".
      each: shards or classes a client.
      least: examples of the smallest client, for "dirichlet" and "quantity".
    """

    kind: str = "iid"
    clients: int = 10
    alpha: float = 0.5
    each: int = 2
    least: int = 2


@dataclass(frozen=True)
class Paper:
    """The paper's values (0: none) and of what."""

    accuracy: float = 0.0
    saving: float = 0.0
    speedup: float = 0.0
    what: str = ""


@dataclass(frozen=True)
class Config:
    """One experiment.

    Attributes:
      variant: its name.
      seed: of weights, split, orders, participants and devices.
      data: see `experiments.cnn.config.Data`.
      model: see `experiments.cnn.config.Model`.
      split: how examples are divided.
      algorithm: see `compressx.federated.algorithm.Algorithm`.
      baselines: what else is run: "dense" (plain and encrypted FedAvg have one model), "fedprox", "secagg".
      fedprox_mu: FedProx's mu.
      network: links and devices of the elapsed-time model.
      padded: messages are padded to a size that tells nothing.
      oblivious: the aggregator adds sparse layers without data-dependent accesses.
      quorum: clients without which a round does not close.
      release: the host gets the model in the clear (it evaluates it).
      width: simulated clients trained side by side.
      eval_batch: examples a step of evaluation.
      eval_every: rounds between evaluations; also between checkpoints.
      paper: what to compare with.
    """

    variant: str = ""
    seed: int = 0
    data: Data = Data()
    model: Model = Model()
    split: Split = Split()
    algorithm: Algorithm = Algorithm()
    baselines: tuple[str, ...] = ("dense",)
    fedprox_mu: float = 0.01
    network: Network = Network()
    padded: bool = False
    oblivious: bool = False
    quorum: int = 1
    release: bool = True
    width: int = 1
    eval_batch: int = 1000
    eval_every: int = 1
    paper: Paper = Paper()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.split.kind not in splits.SPLITS:
            raise ConfigError(
                f"split.kind={self.split.kind!r} is impossible; it must be one of {', '.join(splits.SPLITS)}"
            )
        for name in self.baselines:
            if name not in BASELINES:
                raise ConfigError(f"baselines={name!r} is impossible; they are {', '.join(BASELINES)}")
        if self.eval_every < 1 or self.width < 1 or self.eval_batch < 1:
            raise ConfigError("eval_every, width and eval_batch must be 1 or more")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict.

    Raises:
      ConfigError: a key or a value that is not allowed.
    """
    return training.parse(Config, config)


class Setting(NamedTuple):
    """What follows from a config."""

    info: data.Info
    train: dict[str, NpArray]
    test: dict[str, NpArray]
    split: list[NpArray]
    model: Any
    task: training.Task
    loss: Callable[..., Any]


def make(config: Config, options: Options) -> Setting:
    """Loads the data, divides them, and draws the first weights.

    Raises:
      ConfigError, DataNotFoundError, DataFileError: what is impossible, missing or damaged.
    """
    train = cnn.load_data(config.data, "train", options.data_dir)
    test = cnn.load_data(config.data, "test", options.data_dir)
    info, s = train.info, config.split
    more: dict[str, Any] = {"iid": {}, "shards": {"each": s.each}, "classes": {"each": s.each}}.get(
        s.kind, {"alpha": s.alpha, "least": s.least}
    )
    try:
        parts = splits.SPLITS[s.kind](config.seed, np.asarray(train.labels), s.clients, **more)
    except ValueError as error:
        raise ConfigError(f"split: {error}") from None
    network = cnn.build_model(config.model.name, config.model.options, info.classes)
    mean, std = config.data.mean or info.mean, config.data.std or info.std
    task = cnn.make_task(network, mean, std, config.data)
    shape = (1, *info.shape)
    model = jax.jit(lambda k: network.init(k, jnp.zeros(shape, jnp.float32)))(jax.random.key(config.seed))
    loss = plain_loss(task, training.Fit())
    return Setting(info, cnn.arrays(train), cnn.arrays(test), parts, dict(model), task, loss)


def check(config: Config, alg: Algorithm, setting: Setting) -> None:
    """Raises ConfigError where an algorithm does not fit the model or the clients."""
    try:
        algorithm.layout(alg, setting.model)
        algorithm.participants(config.seed, alg, len(setting.split), 0)
    except ValueError as error:
        raise ConfigError(f"algorithm: {error}") from None


def first_layers(model: Any) -> list[NpArray]:
    """The model's leaves as the plan names them: flat, float32."""
    return [np.asarray(x, np.float32).reshape(-1) for x in jax.tree.leaves(model)]


def make_plan(config: Config, alg: Algorithm, setting: Setting, keys: Sequence[str] | None = None) -> Plan:
    """The plan of an algorithm; keys are the clients' Ed25519 public keys in hex (placeholders for a simulation)."""
    names = keys or [hashlib.sha256(bytes([k % 256])).hexdigest() for k in range(len(setting.split))]
    return Plan(
        layers=algorithm.layout(alg, setting.model),
        roster={k: (names[k], len(part)) for k, part in enumerate(setting.split)},
        rounds=alg.rounds,
        sparsify=alg.sparsify,
        prune_round=alg.prune_round,
        value_type=alg.value_type,
        padded=config.padded,
        oblivious=config.oblivious,
        quorum=config.quorum,
        release=config.release,
        initial=rounds.model_hash(first_layers(setting.model)).hex(),
    )
