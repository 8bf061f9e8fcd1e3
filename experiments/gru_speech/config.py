"""The configuration of `experiments.gru_speech`, and its strict reading."""

from dataclasses import dataclass
from typing import Any

from experiments.common import training
from experiments.common.settings import Paper, Save, check_seed
from experiments.common.training import Admm, ConfigError, Fit
from experiments.gru_speech import speech
from experiments.gru_speech.speech import rates

NAME = "gru_speech"  # of the driver, in its summaries and files


@dataclass(frozen=True)
class Data:
    """The corpus; see `speech.corpora.load`. `train`, `dev`, `test`: how many utterances, 0 is all.

    `speeds`: at which each training utterance is learned, see `speech.augment`.
    """

    name: str = "tones"
    phones: int = 48
    sa: bool = True
    by: str = "speaker"
    test_speakers: tuple[str, ...] = ()
    dev_speakers: tuple[str, ...] = ()
    train: int = 0
    dev: int = 0
    test: int = 0
    speeds: tuple[float, ...] = (1.0,)


@dataclass(frozen=True)
class Model:
    """The network; see `models.gru.GRU`."""

    hidden: int = 1024
    layers: int = 2
    dropout: float = 0.2
    reset: str = "before"


@dataclass(frozen=True)
class Arm:
    """One compression of the dense network.

    Attributes:
      name: its name in tables.
      structure: one of `speech.rates.STRUCTURES`.
      rate: all weights of the gate matrices over those kept.
      row_rate: the share of that which BSP's second step takes; 0 is the released one, where there is one.
      method: "admm", "one_shot" or "dense" (no compression, the same epochs).
    """

    name: str = "bsp_10x"
    structure: str = "bsp"
    rate: float = 10.0
    row_rate: float = 0.0
    method: str = "admm"

    def __post_init__(self) -> None:
        if self.method not in ("admm", "one_shot", "dense"):
            raise ConfigError(f"method={self.method!r} is impossible; it must be admm, one_shot or dense")
        if self.structure not in rates.STRUCTURES:
            raise ConfigError(f"structure={self.structure!r} is none of {', '.join(rates.STRUCTURES)}")
        if not self.name.replace("_", "").isalnum():
            raise ConfigError(f"an arm's name is letters, digits and _, not {self.name!r}")


@dataclass(frozen=True)
class Decoding:
    """From outputs to units; see `speech.decode`.

    Attributes:
      lm_weights: of the bigram; the best on dev is taken.
      rewards: a unit; likewise.
      prior: of the units' frequencies, frame training only.
      beam: of Viterbi's states, 0 is endless.
      ctc_beam: prefixes of CTC's search.
    """

    lm_weights: tuple[float, ...] = (1.0, 2.0, 4.0)
    rewards: tuple[float, ...] = (0.0,)
    prior: float = 1.0
    beam: float = 0.0
    ctc_beam: int = 8

    def __post_init__(self) -> None:
        if not self.lm_weights or not self.rewards or self.ctc_beam < 1 or self.beam < 0:
            raise ConfigError("decoding: lm_weights and rewards need a value each, ctc_beam at least 1, beam 0 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    Attributes:
      dense: training of the dense network.
      column: ADMM of BSP's first step; structures of one step have both steps' epochs at its settings.
      column_retrain: training inside it.
      row: ADMM of the second step.
      row_retrain: likewise, and of structures of one step for both steps' epochs.
      arms: what the dense network is compressed to; the first is the run's headline and is saved for `--mode=eval`.
      strips: BSP's horizontal strips.
      block: side of the blocks of "block".
      loss: "frames" (a unit a frame) or "ctc".
      buckets: lengths to which batches are cut.
      select: figure of the dev set whose best epoch a phase leaves; "" is the last epoch.
      with_runs: finished runs of other seeds, drawn into the plots with this one.
      timing_rounds: of the step's measurement.
    """

    dense: Fit
    column: Admm
    column_retrain: Fit
    row: Admm
    row_retrain: Fit
    arms: tuple[Arm, ...]
    variant: str = ""
    seed: int = 0
    data: Data = Data()
    features: speech.FrontEnd = speech.FrontEnd()
    model: Model = Model()
    loss: str = "frames"
    strips: int = 4
    block: int = 4
    batch: int = 8
    eval_batch: int = 32
    buckets: int = 3
    optimizer: str = "adam"
    clip: float = 0.0
    select: str = ""
    decoding: Decoding = Decoding()
    with_runs: tuple[str, ...] = ()
    timing_rounds: int = 15
    save: Save = Save()
    paper: Paper = Paper()

    def __post_init__(self) -> None:
        check_seed(self.seed)
        names = [a.name for a in self.arms]
        if not names or len(set(names)) != len(names) or self.arms[0].method != "admm":
            raise ConfigError(f"arms must have names of their own, the first by admm; got {names}")
        if self.loss not in ("frames", "ctc"):
            raise ConfigError(f"loss={self.loss!r} is impossible; it must be frames or ctc")
        if self.select not in ("", "validation_accuracy"):
            raise ConfigError(f'select={self.select!r} is impossible; it must be "" or validation_accuracy')
        for key, value in (("buckets", self.buckets), ("batch", self.batch), ("eval_batch", self.eval_batch)):
            if value < 1:
                raise ConfigError(f"{key}={value} is impossible; it must be at least 1")
        for name in ("column", "column_retrain", "row", "row_retrain", "dense"):
            fit = getattr(self, name)
            if fit.distill or (fit.label_smoothing and self.loss == "ctc"):
                raise ConfigError(f"{name}: speech is trained without a teacher, and CTC without label smoothing")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict.

    Raises:
      ConfigError: a key or a value that is not allowed.
    """
    try:
        return training.parse(Config, config)
    except ConfigError:
        raise
    except ValueError as error:  # the front end's own check
        raise ConfigError(f"config.{error}") from None


def shapes(config: Config) -> dict[str, tuple[int, int]]:
    """The gate matrices by path; the paper's twelve for 39 features and 2 x 1024 units."""
    hidden = config.model.hidden
    out: dict[str, tuple[int, int]] = {}
    for i in range(config.model.layers):
        for kind in "wu":
            inputs = config.features.size if (i, kind) == (0, "w") else hidden
            out |= {f"params/gru_{i}/{kind}{g}": (inputs, hidden) for g in "zrh"}
    return out
