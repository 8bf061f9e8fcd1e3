"""Settings that the configs of several drivers have, and how a file of variants becomes one of them."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ml_collections import ConfigDict

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


def check_batch(batch: int, there: int, what: str) -> None:
    """Raises ConfigError where a step cannot have so many of what is there, such as 96 "training examples"."""
    if not 1 <= batch <= there:
        raise ConfigError(f"batch={batch} is impossible; it must be 1 to {there}, the {what}")


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


# -- files of variants -------------------------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Dataclasses as dictionaries of their fields, inside tuples and dictionaries too."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return tuple(map(plain, value)) if isinstance(value, tuple) else value


def defaults(config: type, **given: Any) -> dict[str, Any]:
    """All settings of a config's dataclass as nested dictionaries: what is given, and else the defaults declared there.

    Every setting is present, so that it can be changed on the command line. Nothing is checked yet.
    """
    fields = {f.name: f for f in dataclasses.fields(config)}
    if unknown := sorted(set(given) - set(fields)):
        raise ValueError(f"{config.__name__} has no setting {unknown[0]!r}; it has {', '.join(fields)}")
    out = {}
    for name, field in fields.items():
        if name in given:
            out[name] = plain(given[name])
        elif field.default is not dataclasses.MISSING:
            out[name] = plain(field.default)
        elif field.default_factory is not dataclasses.MISSING:
            out[name] = plain(field.default_factory())
        else:
            raise ValueError(f"{config.__name__}: {name} has no default and must be given")
    return out


def named(variant: str, variants: Mapping[str, Callable[[str], Any]], tiny: Callable[[Any], Any]) -> ConfigDict:
    """The experiment of that name, locked; `NAME_tiny` is the tiny form of NAME.

    Args:
      variant: its name.
      variants: name -> function that makes its config, of the whole name.
      tiny: a config -> its form for tests.

    Raises:
      ValueError: no such variant; names those there are.
    """
    name = variant.removesuffix("_tiny")
    if name not in variants:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(variants)}, each also with _tiny at its end")
    made = variants[name](variant)
    config = ConfigDict(plain(tiny(made) if name != variant else made))
    config.lock()
    return config
