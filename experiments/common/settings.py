"""Settings that the configs of several drivers have."""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from compressx import formats
from experiments.common.training import ConfigError


@dataclass(frozen=True)
class Save:
    """Checkpoints: every so many steps, every so many seconds (0: not by that), and at the ends of phases."""

    steps: int = 0
    seconds: float = 60.0


@dataclass(frozen=True)
class Paper:
    """The published figure to compare with: a dotted key of the summary ("" for none), and its value."""

    quantity: str = ""
    value: float = 0.0


def check_seed(seed: int) -> None:
    """Raises ConfigError where jax cannot make a key of the seed."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"seed={seed} is impossible; it must be 0 to 2**32 - 1")


C = TypeVar("C")  # a config
S = TypeVar("S")  # a `training.Stage`, or what else has rules and the ADMM that reaches them


def with_rules(config: C) -> C:
    """A config that has a `plan` and names a file of `rules`, with these in its stage; see `replaced`."""
    given: Any = config
    stages = replaced(given.plan.stages, given.rules)
    return dataclasses.replace(given, plan=dataclasses.replace(given.plan, stages=stages))


def replaced(stages: tuple[S, ...], path: str) -> tuple[S, ...]:
    """The stages as they are, or the only one with the rules of a file and, where that has one, its schedule.

    Args:
      stages: of the config.
      path: a file that `compressx.write_rules` wrote, or "".

    Raises:
      ConfigError: there is not exactly one stage.
      CompressedFileError, OSError: the file is not understood or cannot be read.
    """
    if not path:
        return stages
    if len(stages) != 1:
        raise ConfigError(f"rules={path!r} replaces the sets of a config's only stage, and this one has {len(stages)}")
    stage: Any = stages[0]
    found = formats.read_rules(path)
    rules = tuple((pattern, None if c is None else dict(c.spec)) for pattern, c in found.rules)
    changes = dict(found.schedule or {})
    if "refresh_every" in changes:
        changes["refresh_every"] = changes["refresh_every"] or 0
    if "rho" in changes:
        changes["rho"] = tuple(changes["rho"]) if isinstance(changes["rho"], list) else changes["rho"]
        changes["rho_schedule"] = "constant"
    return (dataclasses.replace(stage, rules=rules, admm=dataclasses.replace(stage.admm, **changes)),)
