"""What a training run is, as frozen dataclasses; and the strict reading of them from nested dictionaries.

Fit      epochs at a learning-rate schedule, with the loss's options
Admm     a Fit with a rho schedule and the steps between Z and U updates
Stage    rules, the ADMM that moves weights into them, the retraining inside them
Plan     dense Fit, stages, method, baselines: all that `phases.plan` needs
"""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

SCHEDULES = ("constant", "cosine", "piecewise")
RHO_SCHEDULES = ("constant", "staged", "residual_balancing", "rtmobile")
METHODS = ("admm", "one_shot", "gradual", "dense", "reconstruct")
BASELINES = ("one_shot", "gradual", "dense_same_budget")


class ConfigError(ValueError):
    """A configuration that cannot be run; the message names the key, its value and what is allowed."""


def _need(ok: bool, key: str, value: Any, allowed: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r} is impossible; it must be {allowed}")


def _one_of(key: str, value: Any, choices: Sequence[str]) -> None:
    _need(value in choices, key, value, f"one of {', '.join(choices)}")


@dataclasses.dataclass(frozen=True)
class Fit:
    """Training for some epochs.

    Attributes:
      epochs: passes over the training set; 0 skips the training, not the phase.
      lr: peak learning rate.
      schedule: "constant"; "cosine", from lr to `lr * final`; "piecewise", times `drop` at each of `boundaries`.
      final: the last learning rate over the first, for "cosine".
      boundaries: fractions of the phase in (0, 1), increasing, for "piecewise".
      drop: factor at each boundary.
      cycles: how often the schedule runs in the phase, one after the other (warm restarts).
      warmup: part of the phase in [0, 1) over which the learning rate first rises linearly from 0.
      weight_decay: decoupled from the gradient (AdamW), on leaves of two or more axes.
      label_smoothing: in [0, 1).
      distill: share of the loss in [0, 1] that compares with the dense network's outputs; not for the dense phase.
      temperature: of those outputs.
      augment: whether the training images are augmented.
    """

    epochs: int = 1
    lr: float = 1e-3
    schedule: str = "cosine"
    final: float = 0.0
    boundaries: tuple[float, ...] = ()
    drop: float = 0.1
    cycles: int = 1
    warmup: float = 0.0
    weight_decay: float = 0.0
    label_smoothing: float = 0.0
    distill: float = 0.0
    temperature: float = 4.0
    augment: bool = True

    def __post_init__(self) -> None:
        _need(self.epochs >= 0, "epochs", self.epochs, "0 or more")
        _need(self.lr > 0, "lr", self.lr, "positive")
        _one_of("schedule", self.schedule, SCHEDULES)
        _need(0 <= self.final <= 1, "final", self.final, "in [0, 1]")
        inside = all(0 < b < 1 for b in self.boundaries) and list(self.boundaries) == sorted(set(self.boundaries))
        _need(inside, "boundaries", self.boundaries, "increasing fractions of the phase in (0, 1)")
        piecewise = self.schedule == "piecewise"
        _need(bool(self.boundaries) == piecewise, "boundaries", self.boundaries, 'given for "piecewise" and only there')
        _need(self.drop > 0, "drop", self.drop, "positive")
        _need(self.cycles >= 1, "cycles", self.cycles, "1 or more")
        _need(0 <= self.warmup < 1, "warmup", self.warmup, "in [0, 1)")
        _need(self.weight_decay >= 0, "weight_decay", self.weight_decay, "0 or more")
        _need(0 <= self.label_smoothing < 1, "label_smoothing", self.label_smoothing, "in [0, 1)")
        _need(0 <= self.distill <= 1, "distill", self.distill, "in [0, 1]")
        _need(self.temperature > 0, "temperature", self.temperature, "positive")


@dataclasses.dataclass(frozen=True)
class Admm(Fit):
    """ADMM for some epochs.

    Attributes:
      rho: first penalty weight; one number, or pairs (path pattern, number).
      rho_schedule: "constant"; "staged", multiplied by `rho_factor` at the start of each further one of `rho_stages`
        equal fractions of the phase; "residual_balancing"; "rtmobile".
      rho_factor: see "staged".
      rho_stages: see "staged".
      every: steps between Z and U updates; 0 is once an epoch.
      refresh_every: updates between refreshes of the sets' structure; 0 is never.
      decoupled: the penalty is added after Adam's normalisation, and only the learning rate scales it.
    """

    rho: float | tuple[tuple[str, float], ...] = 1e-3
    rho_schedule: str = "staged"
    rho_factor: float = 10.0
    rho_stages: int = 3
    every: int = 0
    refresh_every: int = 0
    decoupled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        values = [r for _, r in self.rho] if isinstance(self.rho, tuple) else [self.rho]
        _need(all(r > 0 for r in values), "rho", self.rho, "positive")
        _one_of("rho_schedule", self.rho_schedule, RHO_SCHEDULES)
        _need(self.rho_factor > 0, "rho_factor", self.rho_factor, "positive")
        _need(self.rho_stages >= 1, "rho_stages", self.rho_stages, "1 or more")
        _need(self.every >= 0, "every", self.every, "0 or more steps")
        _need(self.refresh_every >= 0, "refresh_every", self.refresh_every, "0 or more updates")


Rule = tuple[str, Any]  # path pattern, and a constraint's spec as `constraints.from_spec` reads it (None: free)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One compression: rules, ADMM into them, retraining inside them.

    Attributes:
      rules: pairs (path pattern, constraint spec); see `compressx.rules` and `constraints.from_spec`.
      admm: how the weights get there.
      retrain: how they are trained inside, after hardening.
    """

    rules: tuple[Rule, ...] = ()
    admm: Admm = Admm()
    retrain: Fit = Fit()

    def __post_init__(self) -> None:
        _need(bool(self.rules), "rules", self.rules, "at least one pair (path pattern, constraint)")


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that is trained in one run.

    Attributes:
      dense: the uncompressed training all the rest starts from.
      stages: compressions one after the other; each moves inside the support of the one before. None: only the dense
        network is trained.
      method: how the stages' rules are reached: "admm", or at the same number of epochs "one_shot", "gradual", "dense";
        or "reconstruct", after training and layer by layer, followed by the last stage's retraining alone.
      baselines: what else is trained from the same dense weights, for the same number of epochs.
      calibration: training examples that "reconstruct" calibrates on.
    """

    dense: Fit = Fit()
    stages: tuple[Stage, ...] = ()
    method: str = "admm"
    baselines: tuple[str, ...] = ()
    calibration: int = 512

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _need(self.calibration >= 1, "calibration", self.calibration, "1 or more examples")
        for name in self.baselines:
            _one_of("baselines", name, BASELINES)
        _need(self.dense.distill == 0, "dense.distill", self.dense.distill, "0: there is no teacher yet")
        alone = self.method == "admm" and not self.baselines
        _need(bool(self.stages) or alone, "stages", self.stages, "given for another method than admm and for baselines")


C = TypeVar("C")


def parse(cls: type[C], value: Any, where: str = "config") -> C:
    """Builds a dataclass from nested mappings, refusing keys and types it does not declare.

    Lists become tuples, ints become floats where a float is declared; nothing else is converted.

    Raises:
      ConfigError: names the dotted key.
    """
    return typing.cast(C, _read(cls, _thaw(value), where))


def _thaw(value: Any) -> Any:
    """ConfigDicts, lists and tuples as plain dicts and tuples."""
    if hasattr(value, "items"):
        return {str(k): _thaw(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return tuple(_thaw(v) for v in value)
    return value


def _read(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        return value
    if dataclasses.is_dataclass(kind):
        return _read_dataclass(typing.cast(type, kind), value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        faults = []
        for option in arguments:
            try:
                return _read(option, value, where)
            except ConfigError as error:
                faults.append(str(error))
        raise ConfigError(faults[0])
    if kind is types.NoneType and value is None:
        return None
    if origin is tuple:
        if not isinstance(value, tuple):
            raise ConfigError(f"{where}={value!r} must be a list")
        if value == ("",):  # what an empty flag value is read as
            value = ()
        if arguments[-1] is Ellipsis:
            return tuple(_read(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value))
        if len(value) != len(arguments):
            raise ConfigError(f"{where}={value!r} must have {len(arguments)} entries")
        return tuple(_read(a, v, f"{where}[{i}]") for i, (a, v) in enumerate(zip(arguments, value, strict=True)))
    if origin is dict or kind is dict or origin is Mapping:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r} must be a mapping")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise ConfigError(f"{where}={value!r} must be {getattr(kind, '__name__', kind)}, not {type(value).__name__}")


def _read_dataclass(cls: type, value: Any, where: str) -> Any:
    if isinstance(value, cls):
        return value
    if not isinstance(value, dict):
        raise ConfigError(f"{where}={value!r} must be a mapping")
    hints = typing.get_type_hints(cls)
    fields = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(value) - set(fields))
    if unknown:
        raise ConfigError(f"{where}.{unknown[0]} is not a setting; the settings there are {', '.join(fields)}")
    required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in value]
    if missing:
        raise ConfigError(f"{where}.{missing[0]} is missing")
    read = {name: _read(hints[name], v, f"{where}.{name}") for name, v in value.items()}
    try:
        return cls(**read)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None
