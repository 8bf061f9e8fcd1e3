"""Settings that the configs of several drivers have."""

from dataclasses import dataclass

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
