"""What an experiment of `experiments.transformer` is."""

from dataclasses import dataclass
from typing import Any

from experiments.common import settings, training
from experiments.common.settings import Save, check_seed
from experiments.common.training import ConfigError, Plan

NAME = "transformer"  # of the driver, in its summaries and files
SUBJECTS = ("images", "text")


@dataclass(frozen=True)
class Data:
    """Images with classes, or a text.

    Attributes:
      subject: "images" or "text": what the network is, a vision transformer or a decoder.
      name: a key of `data.DATASETS` or of `data.text.TEXTS`.
      train: how many training images, or symbols of the training text, from the front; 0 is all.
      test: likewise.
      shift: images: augmentation, random shifts of up to so many pixels.
      window: text: symbols that are read together.
    """

    subject: str = "images"
    name: str = "digits"
    train: int = 0
    test: int = 0
    shift: int = 0
    window: int = 64

    def __post_init__(self) -> None:
        if self.subject not in SUBJECTS:
            raise ConfigError(f"data.subject={self.subject!r} is impossible; it must be {' or '.join(SUBJECTS)}")
        for name, low in (("train", 0), ("test", 0), ("shift", 0), ("window", 1)):
            if getattr(self, name) < low:
                raise ConfigError(f"data.{name}={getattr(self, name)} is impossible; it must be at least {low}")


@dataclass(frozen=True)
class Model:
    """The network, `models.vit.ViT` or `models.decoder.Decoder`: see there.

    Attributes:
      width: of the residual stream.
      heads: of each layer.
      hidden: width of the MLP.
      layers: number of them.
      patch: images: side of a patch.
    """

    width: int = 64
    heads: int = 8
    hidden: int = 256
    layers: int = 2
    patch: int = 4


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    Attributes:
      plan: all that is trained. A rule's spec may be `sets.COUPLED`, which stands for heads and units of the network.
      variant: its name.
      seed: of the weights, the order of examples and the augmentation.
      data: what is learned.
      model: the network.
      batch: images or windows a step.
      eval_batch: likewise in evaluation.
      optimizer: see `training.Job`.
      narrower: whether a dense network of the compressed one's bytes is trained beside it, for as many epochs in all.
      floor: whether what the network must beat is fitted: a linear classifier of the pixels, a smoothed bigram.
      init_from: work directory of another run whose dense weights are taken, "" to train them here.
      rules: file of rules that replace those of the only stage, with its schedule; "" for none.
      save: when checkpoints are written.
    """

    plan: Plan
    variant: str = ""
    seed: int = 0
    data: Data = Data()
    model: Model = Model()
    batch: int = 64
    eval_batch: int = 500
    optimizer: str = "adam"
    narrower: bool = True
    floor: bool = True
    init_from: str = ""
    rules: str = ""
    save: Save = Save()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        fits = [self.plan.dense, *(f for s in self.plan.stages for f in (s.admm, s.retrain))]
        if self.data.subject == "text" and any(f.distill or f.label_smoothing for f in fits):
            raise ConfigError("distill and label_smoothing are not for text; leave them 0")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict.

    Raises:
      ConfigError: a key or a value that is not allowed.
    """
    return settings.with_rules(training.parse(Config, config))
