"""Sweeps over constraint families for `experiments.sweep`: what a structure costs in accuracy at the bytes it needs.

    python -m experiments.sweep --config=configs/families.py:VARIANT --workdir=DIR [--data_dir=DIR]

All points of a sweep start from one dense network of its seed and have the same epochs; `dense` has them too. Every
variant has a form `VARIANT_tiny` for tests. Costs are for two CPU cores.
"""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from configs import cnn

Settings = dict[str, Any]
Points = list[tuple[str, str, cnn.Rules]]


def sweep(variant: str, base: Settings, points: Points, seeds: tuple[int, ...], against: str = "bytes") -> Settings:
    """One experiment under many constraints."""
    base["plan"]["baselines"] = ()
    base["plan"]["stages"][0]["rules"] = points[0][2]
    base["paper"] = {"quantity": "", "value": 0.0}
    return {
        "variant": variant,
        "base": base,
        "points": tuple({"name": name, "family": family, "rules": rules} for family, name, rules in points),
        "methods": ("admm", "dense"),
        "seeds": seeds,
        "against": against,
        "together": "no",
    }


def layers(spec: Settings, ends: cnn.Rules) -> cnn.Rules:
    """The two large layers of a LeNet under one constraint; the first and the last are the same in every family."""
    return (("params/(c2|f1)/kernel", spec), *ends)


def families(ends: cnn.Rules, densities: Iterable[float]) -> Points:
    """Every family of the library on the large layers, at the same densities."""
    points: Points = []
    for d in densities:
        single = {"kind": "unstructured", "density": d}
        side, name = round(d**0.5, 4), f"{1 / d:g}x"
        pruned = {"kind": "filters_and_columns", "filter_density": side, "column_density": side}
        unify = {"kind": "unify_and_prune", "block": (4, 4), "unify_fraction": d, "prune_fraction": 1 - 1.5 * d}
        specs = {
            "single": single,
            "bank": {"kind": "bank_balanced", "density": d, "bank": 32},
            "blockmax": {"kind": "block_max", "size": round(1 / d)},
            "darb": {"kind": "darb", "density": d},
            "block": {"kind": "block", "block": (4, 4), "density": d},
            "bsp": {"kind": "bsp", "column_density": side, "row_density": side, "column_strips": 4, "row_strips": 4},
            "matrix": pruned,
            "unified": unify,
            "forms": cnn.both(
                pruned, {"kind": "polarize", "fragment": 8}, {"kind": "quantize", "bits": 8, "grid": "cells"}
            ),
            "matrix4bit": cnn.both(pruned, {"kind": "quantize", "bits": 4}),
            "single4bit": cnn.both(single, {"kind": "quantize", "bits": 4}),
        }
        points += [(family, f"{family}-{name}", layers(spec, ends)) for family, spec in specs.items()]
    return points


def unifications(ends: cnn.Rules) -> Points:
    """Block shapes by what is done to the blocks by three shares: unified, pruned, or as many of each."""
    points: Points = []
    for shape, share in itertools.product(((1, 4), (4, 1), (4, 4), (1, 16), (16, 1), (8, 8)), (0.5, 0.75, 0.9)):
        text = f"{shape[0]}x{shape[1]}"
        specs = {
            "unify": {"kind": "unify", "block": shape, "fraction": share},
            "prune": {"kind": "prune_blocks", "block": shape, "fraction": share},
            "both": {
                "kind": "unify_and_prune",
                "block": shape,
                "unify_fraction": (1 - share) * 0.9,
                "prune_fraction": share,
            },
        }
        points += [(f"{what} {text}", f"{what}-{text}-{share:g}", layers(spec, ends)) for what, spec in specs.items()]
    return points


DIGIT_ENDS = cnn.unstructured(c1=72, f2=180)
LENET_ENDS = cnn.unstructured(c1=250, f2=1000)


def digits(variant: str, points: Points, seeds: tuple[int, ...]) -> Settings:
    """The digits; a point takes about five seconds."""
    base = cnn.digits(variant)
    base["plan"]["stages"] = (
        cnn.stage((), cnn.admm(20, 3e-3, 1e-2, schedule="constant", every=45), cnn.fit(15, 2e-3)),
    )
    return sweep(variant, base, points, seeds)


def lenet(variant: str, points: Points) -> Settings:
    """LeNet-5 on MNIST; a point takes eight epochs of about 10 s."""
    base = cnn.mnist(variant, (cnn.stage((), cnn.ramp(4), cnn.fit(4, 2e-3)),), "", 0.0)
    return sweep(variant, base, points, (0,))


# ResNet-20: all kernels but the first one's are 3x3; it and the last layer stay free.
INNER = r"params/layer\d+_\d+/conv\d+/kernel"


def resnet(variant: str, points: list[tuple[str, str, Settings]], refresh: int = 0) -> Settings:
    """ResNet-20 from its published weights; a point takes seven epochs of about 25 s."""
    base = cnn.cifar(variant, 1.0)
    base["plan"]["dense"] = cnn.fit(4, 3e-4)
    base["plan"]["stages"] = (cnn.stage((), cnn.pull(4, refresh_every=refresh), cnn.fit(3, 1e-3)),)
    whole: Points = [(family, name, ((INNER, spec),)) for family, name, spec in points]
    return sweep(variant, base, whole, (0,))


def random_masks(k: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """So many of the 126 masks with 4 of 9 entries, by chance: the control of a chosen library."""
    return tuple(random.Random(seed).sample(list(itertools.combinations(range(9), 4)), k))


def patterns(variant: str) -> Settings:
    """Kernel patterns: chosen, natural, random and free, alone (2.25x) and with connectivity (8.1x)."""
    points: list[tuple[str, str, Settings]] = [("free", "free-126", {"kind": "pattern", "library": "all"})]
    for k in (4, 8, 12):
        extracted = {"kind": "pattern", "library": "all", "k": k, "scope": "network", "shrink": 0.5}
        points.append(("chosen", f"chosen-{k}", extracted))
        joint = {"kind": "pattern_connectivity", "density": 1 / 3.6, "library": "natural", "k": k}
        points.append(("natural and connectivity", f"joint-{k}", joint | {"scope": "network"}))
    points.append(("natural", "natural-8", {"kind": "pattern", "library": "natural", "k": 8, "scope": "network"}))
    points.append(("random", "random-8", {"kind": "pattern", "library": random_masks(8)}))
    points.append(("ELoG", "elog-4", {"kind": "pattern", "library": "elog"}))
    return resnet(variant, points, refresh=1) | {"against": "weights"}


def darb(variant: str) -> Settings:
    """DARB beside irregular, block-max, bank-balanced, block and row pruning, at 4x and 8x."""
    points: list[tuple[str, str, Settings]] = []
    for rate in (4, 8):
        specs: dict[str, Settings] = {
            "irregular": {"kind": "unstructured", "density": 1 / rate},
            "block-max": {"kind": "block_max", "size": rate},
            "DARB": {"kind": "darb", "density": 1 / rate},
            "bank-balanced": {"kind": "bank_balanced", "density": 1 / rate, "bank": 16},
            "block": {"kind": "block", "block": (4, 4), "density": 1 / rate},
            "row": {"kind": "columns", "density": 1 / rate},
        }
        points += [(family, f"{family}-{rate}x", spec) for family, spec in specs.items()]
    return resnet(variant, points) | {"against": "weights"}


def forms(variant: str) -> Settings:
    """Polarized 8-bit weights: fragments of 4, 8 and 16 in the three orders, by the sum and the energy rule."""
    cells = {"kind": "quantize", "bits": 8, "grid": "cells"}
    points: list[tuple[str, str, Settings]] = []
    for order, fragment in (("W", 4), ("W", 8), ("W", 16), ("H", 8), ("C", 8)):
        polarized = {"kind": "polarize", "fragment": fragment, "order": order}
        points.append((f"order {order}", f"{order}-{fragment}", cnn.both(polarized, cells)))
    energy = {"kind": "polarize", "fragment": 8, "order": "W", "rule": "energy"}
    points.append(("energy rule", "energy-W-8", cnn.both(energy, cells)))
    return resnet(variant, points, refresh=1)


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "digits": lambda v: digits(v, families(DIGIT_ENDS, (1 / 4, 1 / 8, 1 / 16)), (0, 1, 2)),
    "digits_unification": lambda v: digits(v, unifications(DIGIT_ENDS), (0,)),
    "mnist_lenet5": lambda v: lenet(v, families(LENET_ENDS, (1 / 8, 1 / 32))),
    "cifar_patterns": patterns,
    "cifar_darb": darb,
    "cifar_forms": forms,
}


def get_config(variant: str = "digits") -> ConfigDict:
    """The sweep of that name."""
    name = variant.removesuffix("_tiny")
    if name not in VARIANTS:
        raise ValueError(f"no variant {variant!r}; there are {', '.join(VARIANTS)}, each also with _tiny at its end")
    settings = VARIANTS[name](variant)
    if name != variant:
        cnn.tiny(settings["base"])
        settings |= {"points": settings["points"][:2], "seeds": settings["seeds"][:1]}
    config = ConfigDict(settings)
    config.lock()
    return config
