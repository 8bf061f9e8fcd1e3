"""The experiments of `experiments.transformer`. A variant is the part after the colon of `--config`.

    python -m experiments.transformer --config=configs/transformer.py:VARIANT --workdir=DIR [--data_dir=DIR]

A variant is SUBJECT or SUBJECT_SET: the subject says the data and the network, the set what is kept of its layers'
kernels. Without a set half of the heads and units of every layer are removed.

    vit_digits            8x8 digits, patches of 2x2; needs no data
    vit_mnist             the first 5,000 images of MNIST, patches of 7x7
    decoder_generated     a drawn text, by words; needs no data
    decoder_shakespeare   the first 400,000 characters of tiny Shakespeare

Every variant has a form `VARIANT_tiny` that runs through all its phases in seconds and learns nothing. Runs of one
subject can share a dense network: `--config.init_from=DIR`.
"""

import dataclasses
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from experiments.common.settings import named
from experiments.common.training import Admm, Fit, Plan, Stage
from experiments.transformer.config import Config, Data, Model
from experiments.transformer.sets import COUPLED

KERNELS = r"params/stack/layer\d+/.*/kernel"


def coupled(share: float) -> tuple[tuple[str, Any], ...]:
    """This share of the heads and of the MLP's units of every layer stays."""
    return (("", {"kind": COUPLED, "heads": share, "units": share}),)


def each(**spec: Any) -> tuple[tuple[str, Any], ...]:
    """The same set on every kernel of the layers."""
    return ((KERNELS, spec),)


SETS = {
    "": coupled(0.5),
    "coupled_3of4": coupled(0.75),
    "coupled_1of4": coupled(0.25),
    "unstructured_4x": each(kind="unstructured", density=0.25),
    "unstructured_8x": each(kind="unstructured", density=0.125),
    "unstructured_16x": each(kind="unstructured", density=0.0625),
    "2of4": each(kind="n_of_m", n=2, m=4),
    "blocks_4x": each(kind="block", block=(8, 8), density=0.25),
    "4bit": each(kind="quantize", bits=4, per="channel"),
}

SMALL = Model(width=48, heads=6, hidden=192, patch=7)
SUBJECTS = {
    "vit_digits": (Data(name="digits"), Model(width=32, heads=4, hidden=64, patch=2), 32, (20, 15, 15)),
    "vit_mnist": (Data(name="mnist", train=5000, test=2000), SMALL, 50, (10, 4, 4)),
    "decoder_generated": (Data("text", "generated", window=32), Model(width=32, heads=4, hidden=128), 32, (4, 3, 3)),
    "decoder_shakespeare": (Data("text", "tiny_shakespeare", 400_000, 50_000), SMALL, 32, (4, 2, 2)),
}


def make(variant: str, subject: str, rules: tuple[tuple[str, Any], ...]) -> Config:
    """The experiment on a subject with these sets; one-shot and dense at the same number of epochs beside it."""
    data, model, batch, (dense, admm, retrain) = SUBJECTS[subject]
    fit = partial(Fit, lr=2e-3, warmup=0.05, weight_decay=1e-4)
    stage = Stage(
        rules,
        Admm(epochs=admm, lr=3e-3, rho=3e-2, rho_factor=4.0, rho_stages=3, every=100, refresh_every=1),
        fit(epochs=retrain),
    )
    plan = Plan(fit(epochs=dense), (stage,), baselines=("one_shot", "dense_same_budget"))
    return Config(plan=plan, variant=variant, data=data, model=model, batch=batch)


def _maker(subject: str, rules: tuple[tuple[str, Any], ...]) -> Any:
    return lambda variant: make(variant, subject, rules)


VARIANTS = {
    f"{subject}_{name}".rstrip("_"): _maker(subject, rules) for subject in SUBJECTS for name, rules in SETS.items()
}


def tiny(config: Config) -> Config:
    """The same phases of a small network on a handful of examples, without what is fitted beside it: for tests."""
    stages = tuple(Stage(s.rules, Admm(epochs=1, every=2), Fit()) for s in config.plan.stages)
    train, test = (1200, 400) if config.data.subject == "text" else (96, 96)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=train, test=test, window=16),
        model=dataclasses.replace(config.model, width=16, heads=4, hidden=32, layers=1),
        batch=16,
        floor=False,
        plan=dataclasses.replace(config.plan, dense=Fit(), stages=stages),
    )


def get_config(variant: str = "vit_digits") -> ConfigDict:
    """The experiment of that name."""
    return named(variant, VARIANTS, tiny)
