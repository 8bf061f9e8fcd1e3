"""The experiments of `experiments.cnn`. A variant is the part after the colon of `--config=configs/cnn.py:VARIANT`.

Any setting can be changed on the command line: `--config.plan.dense.epochs=5`,
`--config.plan.stages[0].admm.lr=3e-4`.
"""

from typing import Any

from ml_collections import ConfigDict

Spec = dict[str, Any]


def fit(epochs: int, lr: float, **more: Any) -> dict[str, Any]:
    """A `training.Fit` or `training.Admm` with all its settings, so that each can be overridden."""
    base = {
        "epochs": epochs,
        "lr": lr,
        "schedule": "cosine",
        "final": 0.0,
        "boundaries": (),
        "drop": 0.1,
        "cycles": 1,
        "warmup": 0.0,
        "weight_decay": 0.0,
        "label_smoothing": 0.0,
        "distill": 0.0,
        "temperature": 4.0,
        "augment": True,
    }
    return base | more


def admm(epochs: int, lr: float, rho: float = 1e-3, **more: Any) -> dict[str, Any]:
    """A `training.Admm` with all its settings."""
    own = {
        "rho": rho,
        "rho_schedule": "staged",
        "rho_factor": 10.0,
        "rho_stages": 3,
        "every": 0,
        "refresh_every": 0,
        "decoupled": False,
    }
    return fit(epochs, lr, **own) | more


def unstructured(**keep: int) -> tuple[tuple[str, Spec], ...]:
    """Rules that keep so many weights of each layer's kernel."""
    return tuple((f"params/{layer}/kernel", {"kind": "unstructured", "keep": k}) for layer, k in keep.items())


def structured(**keep: tuple[int, int]) -> tuple[tuple[str, Spec], ...]:
    """Rules that keep so many positions and filters of each layer: what is left is a dense matrix."""
    return tuple(
        (f"params/{layer}/kernel", {"kind": "filters_and_columns", "keep_columns": p, "keep_filters": f})
        for layer, (p, f) in keep.items()
    )


def stage(rules: Any, admm: dict[str, Any], retrain: dict[str, Any]) -> dict[str, Any]:
    """One compression."""
    return {"rules": rules, "admm": admm, "retrain": retrain}


def base(variant: str) -> dict[str, Any]:
    """What all variants share."""
    return {
        "variant": variant,
        "seed": 0,
        "data": {
            "name": "digits",
            "train": 0,
            "test": 0,
            "validation": 0,
            "shift": 0,
            "flip": False,
            "mean": (),
            "std": (),
        },
        "model": {"name": "digits_cnn", "options": {}, "checkpoint": ""},
        "batch": 64,
        "eval_batch": 1000,
        "optimizer": "adam",
        "plan": {"dense": fit(1, 1e-3), "stages": (), "method": "admm", "baselines": ()},
        "init_from": "",
        "save": {"steps": 0, "seconds": 60.0},
        "paper": {"quantity": "", "value": 0.0},
    }


def digits() -> dict[str, Any]:
    """8x8 digits, nothing to download: 20x fewer weights. About a minute on two cores.

    make demo
    """
    c = base("digits")
    c["data"] |= {"shift": 1}
    c["batch"] = 32
    rules = unstructured(c1=60, c2=500, f1=1150, f2=190)
    c["plan"] = {
        "dense": fit(30, 2e-3),
        "stages": (stage(rules, admm(30, 1e-3, cycles=3, every=45), fit(30, 1e-3)),),
        "method": "admm",
        "baselines": ("one_shot", "dense_same_budget"),
    }
    return c


# LeNet-5 20-50-500: c1 500, c2 25,000, f1 400,000, f2 5,000 weights
U85 = unstructured(c1=170, c2=2000, f1=2400, f2=480)
U246 = unstructured(c1=110, c2=620, f1=760, f2=255)
S39 = structured(c1=(16, 10), c2=(110, 25), f1=(130, 55), f2=(55, 10))
S88 = structured(c1=(14, 7), c2=(60, 18), f1=(72, 45), f2=(45, 10))
S232 = structured(c1=(12, 5), c2=(35, 12), f1=(44, 25), f2=(25, 10))


def mnist(variant: str, *rules: Any) -> dict[str, Any]:
    """LeNet-5 on MNIST, one stage of compression after the other."""
    c = base(variant)
    c["data"] |= {"name": "mnist", "shift": 2}
    c["model"] |= {"name": "lenet5_caffe"}
    stages = tuple(stage(r, admm(24, 1e-3, cycles=12), fit(20, 1e-3)) for r in rules)
    c["plan"] = {"dense": fit(15, 1e-3), "stages": stages, "method": "admm", "baselines": ()}
    return c


VARIANTS = {
    "digits": digits,
    "mnist_lenet5_unstructured": lambda: mnist("mnist_lenet5_unstructured", U85),
    "mnist_lenet5_unstructured_85x": lambda: mnist("mnist_lenet5_unstructured_85x", U85),
    "mnist_lenet5_unstructured_246x": lambda: mnist("mnist_lenet5_unstructured_246x", U85, U246),
    "mnist_lenet5_structured": lambda: mnist("mnist_lenet5_structured", S39),
    "mnist_lenet5_structured_39x": lambda: mnist("mnist_lenet5_structured_39x", S39),
    "mnist_lenet5_structured_88x": lambda: mnist("mnist_lenet5_structured_88x", S39, S88),
    "mnist_lenet5_structured_232x": lambda: mnist("mnist_lenet5_structured_232x", S39, S88, S232),
}


def get_config(variant: str = "digits") -> ConfigDict:
    """The experiment of that name."""
    if variant not in VARIANTS:
        raise ValueError(f"no variant {variant!r} in configs/cnn.py; the variants are {', '.join(VARIANTS)}")
    config = ConfigDict(VARIANTS[variant]())
    config.lock()
    return config
