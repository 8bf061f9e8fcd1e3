"""What an experiment of `experiments.cnn` is."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from experiments.common import settings, training
from experiments.common.settings import Paper, Save, check_seed
from experiments.common.training import ConfigError, Plan


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
      checkpoint: file below the data folder with weights to start from, or "": .npz with PyTorch's names of a CIFAR
        ResNet, or .safetensors (`models.plain_file`).
    """

    name: str = "digits_cnn"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpoint: str = ""


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    Attributes:
      plan: all that is trained.
      variant: its name.
      seed: of the weights, the order of examples and the augmentation.
      data: the images.
      model: the network.
      batch: examples a step.
      eval_batch: examples a step of evaluation.
      optimizer: see `training.Job`.
      init_from: work directory of another run whose dense weights are taken, "" to train them here.
      rules: file of rules that replace those of the only stage, with its schedule; "" for none.
      save: when checkpoints are written.
      paper: what to compare with.
    """

    plan: Plan
    variant: str = ""
    seed: int = 0
    data: Data = Data()
    model: Model = Model()
    batch: int = 64
    eval_batch: int = 1000
    optimizer: str = "adam"
    init_from: str = ""
    rules: str = ""
    save: Save = Save()
    paper: Paper = Paper()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.init_from and self.model.checkpoint:
            raise ConfigError("init_from and model.checkpoint both give the dense weights; use one")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict.

    Raises:
      ConfigError: a key or a value that is not allowed.
    """
    return settings.with_rules(training.parse(Config, config))
