"""What an experiment of `experiments.crossbar` is, and the phases of its training."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from compressx.rules import Rules
from experiments.cnn.config import Data, Model
from experiments.common import settings, training
from experiments.common.settings import Paper, Save
from experiments.common.training import Admm, ConfigError, Fit, Phase, phases
from experiments.common.training.config import Rule

DENSE, AWARE, TAKEN = phases.DENSE, "noise_aware", "taken"


@dataclass(frozen=True)
class Branch:
    """A compression that starts from the dense network, or from another branch inside whose support it stays.

    Attributes:
      name: of the model it gives; start: another branch, or "" for the dense network.
      rules, admm, retrain: as in `training.Stage`.
    """

    name: str
    rules: tuple[Rule, ...]
    start: str = ""
    admm: Admm = Admm()
    retrain: Fit = Fit()


@dataclass(frozen=True)
class Hardware:
    """The engine, and on how much it is measured.

    Attributes:
      engine: "forms" (ReRAM crossbars) or "sot" (SOT-MRAM bit planes).
      fragment: rows that are active together where no polarized set says so; it divides the 128 rows of an array.
      weight_bits: of weights not trained on levels, even for "forms", whose cells hold two; input_bits: of all
        inputs (2..16; SOT-MRAM 2..8).
      images: test images that run through the simulated engine; 0 is all.
      slow_images: those for which every conversion is simulated (saturating ADC).
      skip_images: those whose activations are measured for zero skipping and saturation.
      calibration: training images that choose the input scales.
      batch: images in a batch.
      frames: inferences in flight, for frames per second.
      pooled: layers followed by pooling.
    """

    engine: str = "forms"
    fragment: int = 8
    weight_bits: int = 8
    input_bits: int = 16
    images: int = 0
    slow_images: int = 100
    skip_images: int = 20
    calibration: int = 100
    batch: int = 50
    frames: int = 64
    pooled: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.engine not in ("forms", "sot"):
            raise ConfigError(f"hardware.engine={self.engine!r} is impossible; it must be forms or sot")
        if not 1 <= self.fragment <= 128 or 128 % self.fragment:
            raise ConfigError(f"hardware.fragment={self.fragment} is impossible; it must divide an array's 128 rows")
        if self.engine == "forms" and self.weight_bits % 2:
            raise ConfigError(f"hardware.weight_bits={self.weight_bits} is impossible; it must be even: cells hold two")
        top = 16 if self.engine == "forms" else 8
        for name in ("weight_bits", "input_bits"):
            if not 2 <= getattr(self, name) <= top:
                raise ConfigError(f"hardware.{name}={getattr(self, name)} is impossible; it must be 2 to {top}")
        for name in ("slow_images", "skip_images", "calibration", "batch", "frames"):
            if getattr(self, name) < 1:
                raise ConfigError(f"hardware.{name}={getattr(self, name)} is impossible; it must be at least 1")
        if self.images < 0:
            raise ConfigError(f"hardware.images={self.images} is impossible; it must be 0 (all) or more")


@dataclass(frozen=True)
class MonteCarlo:
    """Device variation.

    Attributes:
      models: which models are drawn; () is none.
      sigma: of the log-normal variation; seeds: devices; images: test images for each.
      sweep: further sigmas, with `sweep_seeds` devices each.
    """

    models: tuple[str, ...] = ()
    sigma: float = 0.1
    seeds: int = 50
    images: int = 200
    sweep: tuple[float, ...] = ()
    sweep_seeds: int = 10

    def __post_init__(self) -> None:
        if self.sigma <= 0 or any(s <= 0 for s in self.sweep):
            raise ConfigError(f"variation.sigma={self.sigma}, sweep={self.sweep}: sigmas must be positive")
        if self.seeds < 2 or self.sweep_seeds < 2 or self.images < 1:
            raise ConfigError(
                f"variation.seeds={self.seeds}, sweep_seeds={self.sweep_seeds}, images={self.images}: "
                "an interval needs at least 2 devices, and an image"
            )


@dataclass(frozen=True)
class NoiseAware:
    """Retraining through freshly drawn devices, from a polarized branch; the model is called "noise_aware".

    Attributes:
      start: the branch; "" for none of this.
      fit: how long; sigma: of the variation that is trained with; batch: examples a step, 0 for the run's.
    """

    start: str = ""
    fit: Fit = Fit()
    sigma: float = 0.1
    batch: int = 0


@dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment, complete.

    Attributes:
      variant: its name; seed: of everything random.
      data, model, batch, eval_batch, optimizer, init_from, save, paper: as in `experiments.cnn.config.Config`.
      rules: file of rules that replace those of the only branch, with its schedule; "" for none.
      take: work directory of a finished run whose compressed network is put on the engine as it is.
      dense: the uncompressed training.
      branches: what is compressed, each after the one it starts from.
      main: the branch whose model is the result.
      one_shot: whether the main branch's sets are also reached in one projection, at the same number of epochs.
      hardware, variation, noise_aware: what is measured.
    """

    variant: str = ""
    seed: int = 0
    data: Data = Data()
    model: Model = Model()
    batch: int = 64
    eval_batch: int = 1000
    optimizer: str = "adam"
    init_from: str = ""
    rules: str = ""
    take: str = ""
    save: Save = Save()
    paper: Paper = Paper()
    dense: Fit = Fit()
    branches: tuple[Branch, ...] = ()
    main: str = ""
    one_shot: bool = False
    hardware: Hardware = Hardware()
    variation: MonteCarlo = MonteCarlo()
    noise_aware: NoiseAware = NoiseAware()

    def __post_init__(self) -> None:
        names = [b.name for b in self.branches]
        if self.take and self.init_from:
            raise ConfigError("take and init_from both name a run; use one")
        if self.take:
            return
        if not names or len(set(names)) != len(names) or not set(names).isdisjoint((DENSE, AWARE, TAKEN)):
            raise ConfigError(f"branches are called {names}; at least one is needed, with names of their own")
        for number, branch in enumerate(self.branches):
            if branch.start and branch.start not in names[:number]:
                raise ConfigError(f"branch {branch.name!r} starts from {branch.start!r}, which is none before it")
        if self.main not in names:
            raise ConfigError(f"main={self.main!r} is no branch; they are {', '.join(names)}")
        if self.noise_aware.start and self.noise_aware.start not in names:
            raise ConfigError(f"noise_aware.start={self.noise_aware.start!r} is no branch: {', '.join(names)}")
        unknown = sorted(set(self.variation.models) - {DENSE, AWARE, *names})
        if unknown:
            raise ConfigError(f"variation.models names {unknown[0]!r}; there are {', '.join([DENSE, *names])}")


def read(config: Any) -> Config:
    """The frozen config of a ConfigDict or nested dict."""
    made = training.parse(Config, config)
    return dataclasses.replace(made, branches=settings.replaced(made.branches, made.rules))


def plan_phases(config: Config) -> tuple[Phase, ...]:
    """The phases: dense, then for each branch ADMM and retraining, then one-shot."""
    dense = dataclasses.replace(config.dense, epochs=0) if config.init_from else config.dense
    todo = [Phase(DENSE, "dense", "", dense)]
    rules: dict[str, Rules] = {}
    for b in config.branches:
        mine, within = phases.build_rules(b.rules), rules.get(b.start)
        rules[b.name] = mine
        start = f"retrain_{b.start}" if b.start else DENSE
        todo.append(Phase(f"admm_{b.name}", "admm", start, b.admm, mine, None if within is None else tuple(within)))
        todo.append(Phase(f"retrain_{b.name}", "retrain", f"admm_{b.name}", b.retrain, mine))
    if config.one_shot:
        chain = _lineage(config, config.main)
        epochs = sum(b.admm.epochs + b.retrain.epochs for b in chain)
        fit = dataclasses.replace(chain[0].retrain, epochs=epochs)  # the last step's learning rate is a finish's
        todo.append(Phase(phases.ONE_SHOT, "retrain", DENSE, fit, phases.build_rules(chain[-1].rules)))
    return tuple(todo)


def _lineage(config: Config, name: str) -> list[Branch]:
    """A branch and all it starts from, first one first."""
    by_name = {b.name: b for b in config.branches}
    chain = [by_name[name]]
    while chain[0].start:
        chain.insert(0, by_name[chain[0].start])
    return chain
