"""The comparisons of `experiments.language_model.curves`: perplexity against compression, structure by structure.

    python -m experiments.language_model.curves --config=configs/language_curves.py:VARIANT --workdir=DIR

All points of a seed share a dense network and get the same epochs after it; rates are those measured in the stored
weights. Every variant has a form `VARIANT_tiny` for tests.
"""

from collections.abc import Callable, Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import language_model

Settings = dict[str, Any]


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
        for curve, rules in language_model.structures(rate).items():
            own = tuple(seeds) if rate == at and curve in often else (0,)
            points.append(_point(curve, rate, rules, seeds=own))
    for curve, rules in language_model.controls(at).items():
        points.append(_point(curve, at, rules, seeds=tuple(seeds) if curve in often else (0,)))
    points.append(_point("darb one-shot", at, language_model.structures(at)["darb"], "one_shot"))
    points.append(_point("dense", at, language_model.structures(at)["darb"], "dense"))
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


def generated(variant: str) -> Settings:
    """The drawn text at 4x to 32x."""
    return curves(variant, language_model.generated(variant), (4, 8, 16, 32), 16, (0, 1, 2))


def war_and_peace(variant: str) -> Settings:
    """War and Peace at 4x to 32x."""
    return curves(variant, language_model.war_and_peace(variant), (4, 8, 16, 32), 8, (0, 1, 2))


def war_and_peace_short(variant: str) -> Settings:
    """War and Peace at 8x and 32x, three seeds for DARB, its permuted control and BMWM at 8x."""
    base = language_model.war_and_peace(variant)
    return curves(variant, base, (8, 32), 8, (0, 1, 2), ("darb", "darb permuted", "bmwm"))


def wikitext2_partial(variant: str) -> Settings:
    """The stand-in of WikiText-2 at 4x to 32x."""
    return curves(variant, language_model.wikitext2_partial(variant), (4, 8, 16, 32), 8, (0, 1, 2))


def ptb(variant: str) -> Settings:
    """Penn Treebank, the large network, at 8x to 32x. For a GPU."""
    return curves(variant, language_model.ptb(variant), (8, 16, 32), 16, (0, 1, 2))


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "generated": generated,
    "war_and_peace": war_and_peace,
    "war_and_peace_short": war_and_peace_short,
    "wikitext2_partial": wikitext2_partial,
    "ptb": ptb,
}


def tiny(c: Settings) -> Settings:
    """A few points on a handful of words: for tests."""
    language_model.tiny(c["base"])
    keep = {("row", "8x"), *((curve, c["at"]) for curve in ("darb", "row", "dense", "darb one-shot"))}
    c["points"] = tuple({**p, "seeds": (0,)} for p in c["points"] if (p["curve"], p["name"]) in keep)
    return c


def get_config(variant: str = "generated") -> ConfigDict:
    """The comparison of that name."""
    name = variant.removesuffix("_tiny")
    if name not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}, each also with _tiny at its end")
    settings = VARIANTS[name](variant)
    config = ConfigDict(tiny(settings) if name != variant else settings)
    config.lock()
    return config
