"""The sweeps of `experiments.sweep`: accuracy against compression, for every method and several seeds.

    python -m experiments.sweep --config=configs/sweep.py:VARIANT --workdir=DIR [--data_dir=DIR]

Any setting can be changed on the command line: `--config.seeds=0,1,2,3,4`, `--config.base.plan.stages[0].admm.lr=3e-4`.
Every variant has a form `VARIANT_tiny` for tests.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs import cnn
from experiments.common.settings import defaults, named
from experiments.sweep.task import Config

Settings = dict[str, Any]


def sweep(variant: str, base: Settings, points: tuple[tuple[str, cnn.Rules], ...]) -> Settings:
    """An experiment at several rates, with all methods and three seeds."""
    base["plan"]["baselines"] = ()
    base["paper"] = {"quantity": "", "value": 0.0}
    made = tuple({"name": name, "rules": rules, "family": ""} for name, rules in points)
    return defaults(Config, variant=variant, base=base, points=made)


def digits(variant: str) -> Settings:
    """The digits at 20x, 40x and 80x. Cost: 30 runs of about 10 seconds on two cores."""
    points = (
        ("20x", cnn.unstructured(c1=72, c2=580, f1=1070, f2=180)),
        ("40x", cnn.unstructured(c1=54, c2=300, f1=480, f2=120)),
        ("80x", cnn.unstructured(c1=40, c2=160, f1=200, f2=76)),
    )
    return sweep(variant, cnn.digits(variant), points)


def mnist(variant: str) -> Settings:
    """LeNet-5 on MNIST at 40x, 85x and 246x, single weights, one stage. Cost: 30 runs of about 10 minutes."""
    points = (
        ("40x", cnn.unstructured(c1=250, c2=3600, f1=6200, f2=700)),
        ("85x", cnn.UNSTRUCTURED[85]),
        ("246x", cnn.UNSTRUCTURED[246]),
    )
    return sweep(variant, cnn.unstructured_85x(variant), points)


VARIANTS: dict[str, Callable[[str], Settings]] = {"digits": digits, "mnist_lenet5_unstructured": mnist}


def tiny(c: Settings) -> Settings:
    """Two points and seeds, and a handful of examples: for tests."""
    cnn.tiny(c["base"])
    return c | {"points": c["points"][:2], "seeds": (0, 1), "methods": ("admm", "one_shot", "dense")}


def get_config(variant: str = "digits") -> ConfigDict:
    """The sweep of that name."""
    return named(variant, VARIANTS, tiny)
