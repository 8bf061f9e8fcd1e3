"""The experiments of `experiments.template`. A variant is the part after the colon of `--config`.

    python -m experiments.template --config=configs/template.py:VARIANT --workdir=DIR

What a setting means, and its default, is said where it is declared: `experiments.template.config`. Every variant has a
form `VARIANT_tiny` that runs through all its phases in seconds and learns nothing.
"""

import dataclasses

from ml_collections import ConfigDict

from experiments.common.settings import named
from experiments.common.training import Admm, Fit, Plan, Stage
from experiments.template.config import Config, Data


def digits(variant: str) -> Config:
    """8x8 digits; a tenth of the weights of every layer stays. Needs no data. Cost: ten seconds."""
    rules = ((r"params/.*/kernel", {"kind": "unstructured", "density": 0.1}),)
    stage = Stage(rules, Admm(epochs=8, lr=3e-3, rho=1e-2, every=45), Fit(epochs=8, lr=2e-3))
    return Config(plan=Plan(Fit(epochs=10, lr=2e-3), (stage,)), variant=variant)


VARIANTS = {"digits": digits}


def tiny(config: Config) -> Config:
    """The same phases on a handful of examples: for tests."""
    stages = tuple(Stage(s.rules, Admm(epochs=1, every=2), Fit()) for s in config.plan.stages)
    return dataclasses.replace(config, data=Data(train=96), plan=Plan(Fit(), stages))


def get_config(variant: str = "digits") -> ConfigDict:
    """The experiment of that name."""
    return named(variant, VARIANTS, tiny)
