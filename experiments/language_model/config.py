"""What an experiment of `experiments.language_model` is."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from experiments.common import settings, training
from experiments.common.settings import Paper, Save, check_seed
from experiments.common.training import ConfigError, Plan
from experiments.common.training.language import LOSSES


@dataclass(frozen=True)
class Data:
    """The text.

    Attributes:
      name: a key of `data.text.TEXTS`.
      vocabulary: words, `<unk>` and `<eos>` among them; 0 is all of the training part.
      train: how many words to train on, from the front; 0 is all.
      validation: likewise.
      test: likewise.
      steps: words of a window, through which the gradient runs.
    """

    name: str = "generated"
    vocabulary: int = 0
    train: int = 0
    validation: int = 0
    test: int = 0
    steps: int = 35


@dataclass(frozen=True)
class Model:
    """The network, `models.lstm.LanguageModel`: see there."""

    hidden: int = 200
    embedding: int = 0
    layers: int = 2
    dropout: float = 0.0
    scale: float = 0.1


@dataclass(frozen=True)
class Probe:
    """The three observations, tested on the dense network before they are used.

    Attributes:
      run: whether to.
      size: block length for what block maxima retain; the density is 1 / size.
      groups: of rows, one of which is pruned at a time.
      words: of the validation text that a sensitivity is measured on, from the front.
    """

    run: bool = True
    size: int = 8
    groups: int = 10
    words: int = 2000


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    Attributes:
      plan: all that is trained. `augment` of a phase says whether it drops out.
      variant: its name.
      seed: of the weights and of dropout.
      data: the text.
      model: the network.
      batch: lanes of the text read side by side in training.
      eval_lanes: likewise for the figures after every epoch; the reported ones are read in one lane.
      optimizer: see `training.Job`.
      clip: largest norm of the gradient of the loss; 0 is any.
      loss: "word" or "window", see `training.language`.
      init_from: work directory of another run whose dense weights are taken, "" to train them here.
      rules: file of rules that replace those of the only stage, with its schedule; "" for none.
      probe: of the observations.
      sample: words of sample text.
      save: when checkpoints are written.
      paper: what to compare with.
    """

    plan: Plan
    variant: str = ""
    seed: int = 0
    data: Data = Data()
    model: Model = Model()
    batch: int = 20
    eval_lanes: int = 20
    optimizer: str = "adam"
    clip: float = 5.0
    loss: str = "word"
    init_from: str = ""
    rules: str = ""
    probe: Probe = Probe()
    sample: int = 60
    save: Save = Save()
    paper: Paper = Paper()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        if self.loss not in LOSSES:
            raise ConfigError(f"loss={self.loss!r} is impossible; it must be {' or '.join(LOSSES)}")
        for name, low in (("batch", 1), ("eval_lanes", 1), ("sample", 0), ("clip", 0)):
            if getattr(self, name) < low:
                raise ConfigError(f"{name}={getattr(self, name)} is impossible; it must be at least {low}")
        fits = [self.plan.dense, *(f for s in self.plan.stages for f in (s.admm, s.retrain))]
        if any(f.distill or f.label_smoothing for f in fits):
            raise ConfigError("distill and label_smoothing are not for language models; leave them 0")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict.

    Raises:
      ConfigError: a key or a value that is not allowed.
    """
    return settings.with_rules(with_own_seed(training.parse(Config, config)))


def with_own_seed(config: Config) -> Config:
    """The config with its seed in every rule that permutes block sizes at random and names no seed.

    Otherwise all seeds of such a control would share one permutation, and their spread hold none of its variance.
    Seed 0 is the constraint's own: there is nothing to name.
    """

    def deal(spec: Any) -> Any:
        if isinstance(spec, dict) and "parts" in spec:
            return {**spec, "parts": tuple(deal(p) for p in spec["parts"])}
        chance = isinstance(spec, dict) and spec.get("assignment") == "permuted" and "seed" not in spec
        return {**spec, "seed": config.seed} if chance and config.seed else spec

    stages = tuple(
        dataclasses.replace(s, rules=tuple((pattern, deal(spec)) for pattern, spec in s.rules))
        for s in config.plan.stages
    )
    return dataclasses.replace(config, plan=dataclasses.replace(config.plan, stages=stages))
