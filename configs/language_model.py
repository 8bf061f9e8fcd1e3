"""The experiments of `experiments.language_model`. A variant is the part after the colon of `--config`.

    python -m experiments.language_model --config=configs/language_model.py:VARIANT --workdir=DIR [--data_dir=DIR]

Any setting can be changed on the command line: `--config.plan.dense.epochs=5`, `--config.model.hidden=200`. Every
variant has a form `VARIANT_tiny` that runs through all its phases in seconds and learns nothing.

The rules hold the LSTM's matrices (gates joined, rows are what one input sends out) and the softmax matrix; embedding
and biases are free, and count as kept in the rate of all weights.

`curves_*` compare structures over rates: all points of a seed share a dense network and get the same epochs after it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs.cnn import admm, fit, stage
from experiments.common.settings import defaults, named
from experiments.common.training import Plan
from experiments.language_model.config import Config

Settings = dict[str, Any]
Rules = tuple[tuple[str, Settings], ...]

KERNELS = r"params/(lstm_\d+/(input|recurrent)|softmax)/kernel"


def rules(kind: str, **arguments: Any) -> Rules:
    """One constraint on every matrix of the LSTM and on the softmax matrix."""
    return ((KERNELS, {"kind": kind, **arguments}),)


def structures(rate: int) -> dict[str, Rules]:
    """The structures compared, each keeping 1 / rate of the weights of every matrix."""
    density = 1 / rate
    return {
        "irregular": rules("unstructured", density=density),
        "darb": rules("darb", density=density),
        "bmwm": rules("block_max", size=rate),
        "bank-balanced": rules("bank_balanced", density=density, bank=64),
        "block": rules("block", block=(8, 8), density=density),
        "row": rules("columns", density=density),
    }


def controls(rate: int) -> dict[str, Rules]:
    """DARB with its block sizes permuted over the rows, and cut the other way."""
    density = 1 / rate
    return {
        "darb permuted": rules("darb", density=density, assignment="permuted"),
        "darb inverse": rules("darb", density=density, assignment="inverse"),
        "darb uniform": rules("darb", density=density, assignment="uniform"),
        "darb fan-in": rules("darb", density=density, axis="inputs"),
    }


def ramp(epochs: int, lr: float, steps: int, updates: int = 10, grow: float = 1.5) -> Settings:
    """ADMM whose rho grows by `grow` with each of so many updates; `steps` an epoch.

    Decoupled from the optimizer; between two updates the first rho takes a fifth of a weight's distance to Z
    (lr * rho * every = 0.2). Below that the residual did not fall within few epochs (generated text, DARB at 16x:
    0.33 with a fifth of it over twice the epochs, 0.14 with this).
    """
    every = max(1, epochs * steps // updates)
    rho = float(f"{0.2 / (lr * every):.3g}")
    return admm(epochs, lr, rho, rho_factor=grow, rho_stages=updates, every=every, final=0.1, decoupled=True)


def base(variant: str) -> Settings:
    """What all variants share."""
    plan = defaults(Plan, baselines=("one_shot", "dense_same_budget"))  # for stages that its variants add
    c = defaults(Config, variant=variant, plan=plan)
    c["data"] |= {"steps": 20}
    c["model"] |= {"hidden": 64}
    return c


def generated(variant: str, rate: int = 16) -> Settings:
    """A text drawn from a grammar, whose own perplexity is 4.11; two layers of 64; DARB at 16x.

    One-shot pruning and dense training with the same epochs beside it. Needs no data. Cost: about two minutes.
    """
    c = base(variant)
    c["batch"], c["eval_lanes"] = 8, 8
    c["plan"] |= {
        "dense": fit(8, 1e-2),
        "stages": (stage(structures(rate)["darb"], ramp(3, 5e-3, 299), fit(9, 1e-2)),),
    }
    return c


def war_and_peace(variant: str, rate: int = 8) -> Settings:
    """War and Peace, 2,048 words, two layers of 128; DARB at 8x. Stands in for the Penn Treebank."""
    c = base(variant)
    c["data"] |= {"name": "war_and_peace", "vocabulary": 2048, "steps": 32}
    c["model"] |= {"hidden": 128, "dropout": 0.1}
    c["batch"], c["eval_lanes"] = 32, 32
    c["plan"] |= {
        "dense": fit(6, 3e-3),
        "stages": (stage(structures(rate)["darb"], ramp(2, 2e-3, 533), fit(3, 4e-3)),),
    }
    return c


def wikitext2_partial(variant: str, rate: int = 8) -> Settings:
    """Nine tenths of WikiText-2's validation part, 2,048 words, two layers of 128; DARB at 8x.

    Tested on three quarters of its test part. Not comparable with published figures.
    """
    c = war_and_peace(variant, rate)
    c["data"] |= {"name": "wikitext2_partial"}
    c["model"] |= {"dropout": 0.4}
    c["plan"] |= {
        "dense": fit(8, 3e-3),
        "stages": (stage(structures(rate)["darb"], ramp(3, 2e-3, 191), fit(4, 4e-3)),),
    }
    return c


def ptb(variant: str, size: str = "large", rate: int = 16) -> Settings:
    """Penn Treebank, the large network of Zaremba et al. (2 x 1500, test perplexity 78.4), DARB at 16x. For a GPU.

    Plain SGD at a learning rate of 1 on the loss of a window, divided by 1.15 an epoch after 14 of 55; gradient's norm
    at most 10; `ptb_small` is 2 x 200 without dropout (13 epochs, halved after 4; test perplexity 114.5).
    """
    c = base(variant)
    c["data"] |= {"name": "ptb", "steps": 35 if size == "large" else 20}
    hidden, dropout, scale, clip, epochs, hold, drop = {
        "large": (1500, 0.65, 0.04, 10.0, 55, 14, 1 / 1.15),
        "small": (200, 0.0, 0.1, 5.0, 13, 4, 0.5),
    }[size]
    c["model"] |= {"hidden": hidden, "dropout": dropout, "scale": scale}
    c["optimizer"], c["clip"], c["loss"] = "plain_sgd", clip, "window"
    ends = tuple(e / epochs for e in range(hold, epochs))
    steps = 929_588 // (20 * c["data"]["steps"])
    c["plan"] |= {
        "dense": fit(epochs, 1.0, schedule="piecewise", boundaries=ends, drop=drop),
        "stages": (stage(structures(rate)["darb"], ramp(10, 0.3, steps, 20, 1.25), fit(20, 0.3, final=0.01)),),
    }
    c["paper"] = {"quantity": "metric.dense", "value": {"large": 78.4, "small": 114.5}[size]}
    return c


def wikitext2(variant: str) -> Settings:
    """The whole of WikiText-2, two layers of 650, DARB at 16x. For a GPU."""
    c = base(variant)
    c["data"] |= {"name": "wikitext2", "steps": 35}
    c["model"] |= {"hidden": 650, "dropout": 0.5, "scale": 0.05}
    c["plan"] |= {
        "dense": fit(40, 1e-3),
        "stages": (stage(structures(16)["darb"], ramp(10, 1e-3, 2983, 20, 1.25), fit(15, 1e-3)),),
    }
    return c


def curves(
    variant: str,
    base: Settings,
    rates: Sequence[int],
    at: int,
    seeds: Sequence[int],
    often: Sequence[str] = ("irregular", "darb", "bmwm", "bank-balanced", "block", "row", "darb permuted"),
) -> Settings:
    """Six structures over rates with seed 0; at one rate with all seeds, and DARB's controls, one-shot and dense too.

    Args:
      variant: its name.
      base: the experiment.
      rates: of the curves.
      at: the rate of the headline row.
      seeds: of `often` there.
      often: structures and controls that are run with all seeds there.
    """
    base["plan"]["baselines"] = ()
    points = []
    for rate in rates:
        for curve, rules in structures(rate).items():
            own = tuple(seeds) if rate == at and curve in often else (0,)
            points.append(_point(curve, rate, rules, seeds=own))
    for curve, rules in controls(at).items():
        points.append(_point(curve, at, rules, seeds=tuple(seeds) if curve in often else (0,)))
    points.append(_point("darb one-shot", at, structures(at)["darb"], "one_shot"))
    points.append(_point("dense", at, structures(at)["darb"], "dense"))
    return {
        "variant": variant,
        "base": base,
        "points": tuple(points),
        "seeds": (0,),
        "main": "darb",
        "at": f"{at}x",
    }


def _point(curve: str, rate: int, rules: Any, method: str = "admm", seeds: tuple[int, ...] = (0,)) -> Settings:
    return {"curve": curve, "name": f"{rate}x", "rules": rules, "method": method, "seeds": seeds}


def short(variant: str) -> Settings:
    """War and Peace at 8x and 32x, three seeds for DARB, its permuted control and BMWM at 8x."""
    return curves(variant, war_and_peace(variant), (8, 32), 8, (0, 1, 2), ("darb", "darb permuted", "bmwm"))


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "generated": generated,
    "war_and_peace": war_and_peace,
    "wikitext2_partial": wikitext2_partial,
    "ptb": ptb,
    "ptb_small": lambda variant: ptb(variant, "small", 8),
    "wikitext2": wikitext2,
    "curves_generated": lambda variant: curves(variant, generated(variant), (4, 8, 16, 32), 16, (0, 1, 2)),
    "curves_war_and_peace": lambda variant: curves(variant, war_and_peace(variant), (4, 8, 16, 32), 8, (0, 1, 2)),
    "curves_war_and_peace_short": short,
    "curves_wikitext2_partial": lambda variant: curves(
        variant, wikitext2_partial(variant), (4, 8, 16, 32), 8, (0, 1, 2)
    ),
    "curves_ptb": lambda variant: curves(variant, ptb(variant), (8, 16, 32), 16, (0, 1, 2)),
}


def tiny(c: Settings) -> Settings:
    """The same phases on a handful of words, and a few points of a comparison: for tests."""
    if "points" in c:
        tiny(c["base"])
        keep = {("row", "8x"), *((curve, c["at"]) for curve in ("darb", "row", "dense", "darb one-shot"))}
        c["points"] = tuple({**p, "seeds": (0,)} for p in c["points"] if (p["curve"], p["name"]) in keep)
        return c
    vocabulary = 0 if c["data"]["name"] == "generated" else 96
    c["data"] |= {"train": 1300, "validation": 300, "test": 300, "steps": 8, "vocabulary": vocabulary}
    c["model"] |= {"hidden": 32}
    c["batch"], c["eval_lanes"], c["sample"] = 8, 4, 12
    c["probe"] |= {"words": 200, "groups": 4, "size": 4}
    plan = c["plan"]
    plan["dense"] |= {"epochs": 1, "schedule": "cosine", "boundaries": ()}
    for s in plan["stages"]:
        s["admm"] |= {"epochs": 1, "every": 5}
        s["retrain"] |= {"epochs": 1}
    return c


def get_config(variant: str = "generated") -> ConfigDict:
    """The experiment of that name."""
    return named(variant, VARIANTS, tiny)
