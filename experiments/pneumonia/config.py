"""What an experiment of `experiments.pneumonia` is."""

from dataclasses import dataclass
from typing import Any

from compressx.compaction import structure
from experiments.cnn.config import Model
from experiments.common import training
from experiments.common.settings import Paper, Save, check_seed
from experiments.common.training import Admm, ConfigError, Fit
from experiments.pneumonia.data import Data

METHODS = ("admm", "one_shot", "random")


@dataclass(frozen=True)
class Point:
    """A compressed network.

    Attributes:
      kind: "filters", "columns" or "combined".
      rate: all convolution weights over those that stay.
      method: "admm"; "one_shot", pruned one-shot and retrained for as many epochs as ADMM and retraining take together;
        "random", as one-shot with channels and positions drawn at random: the negative control.
    """

    kind: str = "combined"
    rate: float = 36.0
    method: str = "admm"

    def __post_init__(self) -> None:
        if self.kind not in structure.KINDS or self.method not in METHODS or not self.rate >= 1:
            raise ConfigError(f"point {self}: kind is one of {structure.KINDS}, method of {METHODS}, rate 1 or more")

    @property
    def name(self) -> str:
        """Unique in a run, part of the names of its phases."""
        return f"{'' if self.method == 'admm' else self.method + '_'}{self.kind}_{self.rate:g}x"


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    Attributes:
      dense: training of the whole network.
      admm: how each point's weights get into their set.
      retrain: how they are trained inside it.
      points: what is compressed; the first is the one whose figures head the summary and whose network is saved.
      same_budget: whether the dense network is also trained on for as many epochs as a point takes.
      power: how rates are shared out over layers, see `compaction.amounts`.
      share: how "combined" splits its rate, likewise.
      positive: weight of the objectness of true boxes in the loss.
      latency: whether times are measured, of the dense network and of every point by ADMM: rounds, 0 for not at all.
      variant, seed, data, model, batch, eval_batch, optimizer, save, paper: as in `experiments.cnn.config`.
    """

    dense: Fit
    admm: Admm
    retrain: Fit
    points: tuple[Point, ...] = (Point(),)
    same_budget: bool = False
    power: float = 0.5
    share: float = 0.5
    positive: float = 1.0
    latency: int = 9
    variant: str = ""
    seed: int = 0
    data: Data = Data()
    model: Model = Model("yolov3")
    batch: int = 16
    eval_batch: int = 64
    optimizer: str = "adam"
    save: Save = Save()
    paper: Paper = Paper()

    def __post_init__(self) -> None:
        names = [p.name for p in self.points]
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"points must be different ones, at least one; got {names}")
        check_seed(self.seed)
        if self.dense.distill:
            raise ConfigError("dense.distill must be 0: there is no teacher yet")
        wanted = "darknet53" if self.data.name == "pneumoniamnist" else "yolov3"
        if self.model.name != wanted:
            raise ConfigError(f"model.name={self.model.name!r} does not fit data.name={self.data.name!r}: {wanted}")
        if self.model.checkpoint and (wanted != "yolov3" or self.data.channels != 3):
            raise ConfigError("model.checkpoint is a Darknet file of yolov3 for data.channels=3")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict."""
    return training.parse(Config, config)
