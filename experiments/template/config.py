"""What an experiment of `experiments.template` is. Defaults stand here and nowhere else."""

from dataclasses import dataclass
from typing import Any

from experiments.common import settings, training
from experiments.common.settings import Save, check_seed
from experiments.common.training import Plan

NAME = "template"  # of the driver, in its summaries and files


@dataclass(frozen=True)
class Data:
    """The images.

    Attributes:
      name: a key of `data.DATASETS`.
      train: how many training examples to use, from the front; 0 is all.
    """

    name: str = "digits"
    train: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    Attributes:
      plan: all that is trained.
      variant: its name.
      seed: of the weights and the order of examples.
      data: the images.
      model: a key of `models.MODELS`.
      batch: examples a step.
      eval_batch: examples a step of evaluation.
      rules: file of rules that replace those of the only stage, with its schedule; "" for none.
      save: when checkpoints are written.
    """

    plan: Plan
    variant: str = ""
    seed: int = 0
    data: Data = Data()
    model: str = "digits_cnn"
    batch: int = 32
    eval_batch: int = 500
    rules: str = ""
    save: Save = Save()

    def __post_init__(self) -> None:
        check_seed(self.seed)


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict.

    Raises:
      ConfigError: a key or a value that is not allowed.
    """
    return settings.with_rules(training.parse(Config, config))
