"""The experiments of `experiments.pneumonia`; a variant stands after the colon of the config file.

    python -m experiments.pneumonia --config=configs/pneumonia.py:VARIANT --workdir=DIR [--data_dir=DIR]

Any setting can be changed on the command line: `--config.dense.epochs=5`, `--config.points[0].rate=16`. Every variant
has a form `VARIANT_tiny` that runs through all its phases in a minute and learns nothing. What a setting means is said
where it is declared: `experiments.pneumonia.Config`, `experiments.common.training.config`.
"""

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from configs.cnn import admm, fit
from experiments.common.settings import defaults, named
from experiments.pneumonia.config import Config

Settings = dict[str, Any]


def point(kind: str, rate: float, method: str = "admm") -> Settings:
    """A `pneumonia_config.Point`."""
    return {"kind": kind, "rate": float(rate), "method": method}


def base(variant: str) -> Settings:
    """What all variants share: YOLOv3 with all its 106 layers, an eighth as wide, on images of 96 pixels."""
    c = defaults(
        Config,
        variant=variant,
        dense=fit(30, 3e-3, warmup=0.05, final=0.02),
        admm=ramp(12),
        retrain=fit(36, 5e-3, warmup=0.1, final=0.02),
        points=(point("combined", 36),),
        positive=2.0,
        batch=8,
        eval_batch=77,
    )
    c["data"] |= {"shift": 0.08, "zoom": 0.12}
    c["model"] |= {"options": {"width": 0.125}}
    c["save"] |= {"seconds": 120.0}
    c["paper"] |= {"quantity": "rate.constrained_weights", "value": 36.0}
    return c


def ramp(epochs: int) -> Settings:
    """ADMM with one update an epoch, rho growing smoothly from 0.3 to 100.

    Decoupled: the detection loss is a sum over hundreds of boxes, and a plain rho would have to grow with it.
    """
    factor = (100 / 0.3) ** (1 / max(epochs - 1, 1))
    return admm(epochs, 1e-3, 0.3, final=0.3, rho_factor=round(factor, 4), rho_stages=epochs, decoupled=True)


def opacities(variant: str) -> Settings:
    """Generated opacities on real X-rays: 36x fewer convolution weights, filters and columns; one-shot beside it.

    The default stand-in for the RSNA challenge: the backgrounds are real, the opacities are not pneumonia. Dense with
    the same further epochs stands beside both. Cost: 174 epochs of about 5.5 s of one core.
    """
    c = base(variant)
    c["points"] = (point("combined", 36), point("combined", 36, "one_shot"))
    c["same_budget"] = True
    return c


def opacities_sweep(variant: str) -> Settings:
    """All three kinds of structure at 2x, 8x and 36x and the combined one at 4x and 16x too, from one dense network.

    One-shot at 8x and 36x, the random control at 36x and dense with the same further epochs stand beside them. Cost:
    750 epochs of about 5 s of one core.
    """
    c = base(variant)
    kinds = ("combined", "filters", "columns")
    c["points"] = (
        *(point(kind, rate) for rate in (36, 8, 2) for kind in kinds),
        *(point("combined", rate) for rate in (4, 16)),
        *(point("combined", rate, method) for rate, method in ((36, "one_shot"), (36, "random"), (8, "one_shot"))),
    )
    c["same_budget"] = True
    c["latency"] = 15
    return c


def opacities_seeds(variant: str) -> Settings:
    """The three kinds at 36x and 8x, one-shot and the random control at 36x: for further seeds. Cost: 462 epochs."""
    c = base(variant)
    kinds = ("combined", "filters", "columns")
    c["points"] = (
        *(point(kind, rate) for rate in (36, 8) for kind in kinds),
        *(point("combined", 36, method) for method in ("one_shot", "random")),
    )
    c["same_budget"] = True
    return c


def opacities_wide(variant: str) -> Settings:
    """36x, filters and positions, of a network twice as wide: does what four times the weights leave suffice?

    Cost: 126 epochs of about 20 s of one core.
    """
    c = base(variant)
    c["model"] |= {"options": {"width": 0.25}}
    c["same_budget"] = True
    return c


def nih(variant: str) -> Settings:
    """Real boxes, on 27 X-rays to train on: shows that the path from files to score works, and ranks nothing."""
    c = base(variant)
    c["data"] |= {"name": "chest_xray_nih"}
    c["dense"] |= {"epochs": 20}
    c["positive"] = 8.0
    c["points"] = (point("combined", 8),)
    return c


def rsna(variant: str) -> Settings:
    """The challenge's data (26,684 DICOM images, by --data_dir) and the network at full width: for a GPU.

    The public default recipe of YOLOv3 (SGD with momentum, weight decay 5e-4, warm-up, two drops by ten) and 36x.
    """
    c = base(variant)
    c["data"] |= {"name": "rsna", "size": 416}
    c["model"] |= {"options": {"width": 1.0}}
    recipe = {"schedule": "piecewise", "boundaries": (0.8, 0.9), "weight_decay": 5e-4}
    c["dense"] = fit(40, 1e-3, warmup=0.02, **recipe)
    c["admm"] = ramp(12) | {"lr": 3e-4}
    c["retrain"] = fit(24, 1e-3, **recipe)
    c["points"] = (point("combined", 36), point("combined", 36, "one_shot"))
    c |= {"optimizer": "sgd", "batch": 64, "eval_batch": 64}
    return c


def pneumoniamnist(variant: str) -> Settings:
    """The trunk (Darknet-53, an eighth as wide) as a classifier of 28x28 X-rays, 36x and 8x; figure: ROC AUC.

    Cost: 52 epochs of about 5 s of one core.
    """
    c = base(variant)
    c["data"] |= {"name": "pneumoniamnist", "size": 32, "shift": 0.06, "flip": False}
    c["model"] |= {"name": "darknet53"}
    c["dense"], c["admm"], c["retrain"] = fit(8, 1e-3, final=0.02), ramp(5), fit(6, 1e-3, final=0.02)
    c["points"] = (point("combined", 36), point("combined", 8), point("combined", 36, "one_shot"))
    c |= {"batch": 64, "eval_batch": 104, "same_budget": True}
    return c


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "opacities": opacities,
    "opacities_sweep": opacities_sweep,
    "opacities_seeds": opacities_seeds,
    "opacities_wide": opacities_wide,
    "nih": nih,
    "rsna": rsna,
    "pneumoniamnist": pneumoniamnist,
}


def tiny(c: Settings) -> Settings:
    """The same phases on a handful of images and a short, thin network: for tests."""
    c["data"] |= {"train": 48 if c["data"]["name"] == "chest_xray_nih" else 16, "test": 12}
    c["data"] |= {"size": 32} if c["data"]["name"] != "chest_xray_nih" else {"size": 32, "train": 0}
    c["model"] |= {"options": {"width": 1 / 16, "repeats": (1, 0, 0, 0, 0)}}
    c["batch"], c["eval_batch"], c["latency"] = 8, 6, 0
    if c["data"]["name"] == "chest_xray_nih":
        c["batch"], c["eval_batch"] = 64, 84
    for name in ("dense", "admm", "retrain"):
        c[name] |= {"epochs": 1, "warmup": 0.0}
    unlike: dict[tuple[str, str], Settings] = {}
    for p in c["points"]:
        unlike.setdefault((p["kind"], p["method"]), p | {"rate": min(p["rate"], 8.0)})
    c["points"] = tuple(unlike.values())[:2]
    return c


def get_config(variant: str = "opacities") -> ConfigDict:
    """The experiment of that name."""
    return named(variant, VARIANTS, tiny)
