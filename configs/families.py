"""Sweeps over constraint families for `experiments.sweep`: what a structure costs in accuracy at the bytes it needs.

    python -m experiments.sweep --config=configs/families.py:VARIANT --workdir=DIR [--data_dir=DIR]

All points of a sweep start from one dense network of its seed and have the same epochs; `dense` has them too. FORMS'
points spend them in three stages, prune -> polarize -> quantize, as the paper does and `configs/crossbar.py`: a stage
chooses the order of its rows and its signs for what the one before has pruned. Every variant has a form `VARIANT_tiny`
for tests. Costs are for one CPU core.
"""

import itertools
import random
from collections.abc import Callable, Iterable
from typing import Any

from ml_collections import ConfigDict

from configs import cnn
from experiments.common.settings import defaults, named
from experiments.sweep.task import Config

Settings = dict[str, Any]
Points = list[Settings]
Pull = Callable[..., Settings]  # epochs -> ADMM of a stage
Scheme = tuple[tuple[Settings, Settings], ...]  # (ADMM, retraining) of each of several stages


def point(family: str, name: str, *rules: cnn.Rules, scheme: Scheme = ()) -> Settings:
    """A `sweep.Point`: rules reached in one stage, or the rules of several stages and how long each takes."""
    steps = zip(rules, scheme, strict=True) if scheme else ()
    stages = tuple(cnn.stage(r, dict(pull), dict(retrain)) for r, (pull, retrain) in steps)
    return {"name": name, "family": family, "rules": rules[-1], "stages": stages}


def sweep(
    variant: str,
    base: Settings,
    points: Points,
    seeds: tuple[int, ...],
    against: str = "bytes",
    budgets: tuple[float, ...] = (),
) -> Settings:
    """One experiment under many constraints."""
    base["plan"]["baselines"] = ()
    base["plan"]["stages"][0]["rules"] = points[0]["rules"]
    base["paper"] = {"quantity": "", "value": 0.0}
    more = {"methods": ("admm", "dense"), "seeds": seeds, "against": against, "budgets": budgets}
    return defaults(Config, variant=variant, base=base, points=tuple(points), **more)


def layers(spec: Settings, ends: cnn.Rules) -> cnn.Rules:
    """The two large layers of a LeNet under one constraint; the first and the last are the same in every family."""
    return (("params/(c2|f1)/kernel", spec), *ends)


def split(conv: Settings, dense: Settings, ends: cnn.Rules) -> cnn.Rules:
    """Likewise, for what only a convolution has: its dense neighbour takes another constraint."""
    return (("params/c2/kernel", conv), ("params/f1/kernel", dense), *ends)


CELLS = {"kind": "quantize", "bits": 8, "grid": "cells"}


def matrix(density: float) -> Settings:
    """A dense matrix of what is left: the same share of filters and of positions."""
    side = round(density**0.5, 4)
    return {"kind": "filters_and_columns", "filter_density": side, "column_density": side}


def on_levels(ends: cnn.Rules, density: float, scheme: Scheme) -> Points:
    """What is pruned and quantized: FORMS in its three stages, a matrix and single weights on 4 bits."""
    name, pruned, signs = f"{1 / density:g}x", matrix(density), {"kind": "polarize", "fragment": 8}
    bits = {"kind": "quantize", "bits": 4}
    steps = [layers(s, ends) for s in (pruned, cnn.both(pruned, signs), cnn.both(pruned, signs, CELLS))]
    single = cnn.both({"kind": "unstructured", "density": density}, bits)
    return [
        point("forms", f"forms-{name}", *steps, scheme=scheme),
        point("matrix4bit", f"matrix4bit-{name}", layers(cnn.both(pruned, bits), ends)),
        point("single4bit", f"single4bit-{name}", layers(single, ends)),
    ]


def families(ends: cnn.Rules, densities: Iterable[float], groups: Iterable[int], kernel: int, scheme: Scheme) -> Points:
    """Every family of the library on the two large layers, at the same densities; and levels alone, at several widths.

    Patterns (4 taps, one of the 8 that c2's kernels use most) and connectivity are constraints of convolutions: f1
    keeps single weights beside them. Groups of n:m must divide both layers' inputs, so their densities are 1 / group.
    What is quantized too keeps four times as many weights, so that its bytes are in the range of the others': compare
    at equal bytes, as `budgets` do, not point by point.

    Args:
      ends: rules of the first and the last layer.
      densities: shares of weights kept.
      groups: the m of 1:m.
      kernel: side of c2's kernels.
      scheme: of FORMS' three stages.
    """
    points: Points = []
    for d in densities:
        single = {"kind": "unstructured", "density": d}
        side, name = round(d**0.5, 4), f"{1 / d:g}x"
        unify = {"kind": "unify_and_prune", "block": (4, 4), "unify_fraction": d, "prune_fraction": 1 - 1.5 * d}
        specs = {
            "single": single,
            "bank": {"kind": "bank_balanced", "density": d, "bank": 32},
            "blockmax": {"kind": "block_max", "size": round(1 / d)},
            "balanced blockmax": {"kind": "balanced_block_max", "density": d, "size": 4, "axis": "inputs"},
            "darb": {"kind": "darb", "density": d},
            "block": {"kind": "block", "block": (4, 4), "density": d},
            "bsp": {"kind": "bsp", "column_density": side, "row_density": side, "column_strips": 4, "row_strips": 4},
            "matrix": matrix(d),
            "unified": unify,
        }
        points += [point(f, f"{f.replace(' ', '_')}-{name}", layers(spec, ends)) for f, spec in specs.items()]
        share = kernel * kernel * d / 4  # of the kernels, which keep 4 taps
        joint = {"kind": "pattern_connectivity", "density": share, "k": 8, "kernel": (kernel, kernel)}
        points.append(point("patterns on c2", f"patterns-{name}", split(joint, single, ends)))
        kernels = {"kind": "connectivity", "density": d}
        points.append(point("kernels of c2", f"kernels-{name}", split(kernels, single, ends)))
        points += on_levels(ends, min(1.0, 4 * d), scheme)
    points += [point("n:m", f"1of{m}", layers({"kind": "n_of_m", "n": 1, "m": m}, ends)) for m in groups]
    widths = {"uniform": (8, 4, 2), "power_of_two": (4, 3, 2), "codebook": (4, 3, 2)}
    for grid, bits in widths.items():
        levels = [(b, layers({"kind": "quantize", "bits": b, "grid": grid}, ends)) for b in bits]
        points += [point(f"{grid} levels", f"{grid}-{b}bit", rules) for b, rules in levels]
    return points


Shape = tuple[int, int]


def unified(shapes: Iterable[Shape], shares: Iterable[float]) -> list[tuple[str, str, Settings]]:
    """Block shapes by what is done to the blocks: shares of them unified, pruned, or pruned with most others unified.

    Returns:
      (family, name, spec) of each point.
    """
    out: list[tuple[str, str, Settings]] = []
    for shape, share in itertools.product(shapes, shares):
        text = f"{shape[0]}x{shape[1]}"
        both = {"unify_fraction": round((1 - share) * 0.9, 4), "prune_fraction": share}
        specs = {
            "unify": {"kind": "unify", "block": shape, "fraction": share},
            "prune": {"kind": "prune_blocks", "block": shape, "fraction": share},
            "both": {"kind": "unify_and_prune", "block": shape, **both},
        }
        out += [(f"{what} {text}", f"{what}-{text}-{share:g}", spec) for what, spec in specs.items()]
    return out


def baselines(shares: Iterable[float], bits: Iterable[int]) -> list[tuple[str, str, Settings]]:
    """What unification is compared with, in the same epochs: single weights, filters, and low-bit levels."""
    out: list[tuple[str, str, Settings]] = []
    for share in shares:
        left = round(1 - share, 4)
        out.append(("single weights", f"single-{share:g}", {"kind": "unstructured", "density": left}))
        out.append(("filters", f"filters-{share:g}", {"kind": "filters", "density": left}))
    return out + [("low-bit", f"{b}bit", {"kind": "quantize", "bits": b}) for b in bits]


DIGIT_ENDS = cnn.unstructured(c1=72, f2=180)
LENET_ENDS = cnn.unstructured(c1=250, f2=1000)
SHAPES = ((1, 4), (4, 1), (4, 4), (1, 16), (16, 1), (8, 8))


def digits_pull(epochs: int) -> Settings:
    """ADMM for the digits."""
    return cnn.admm(epochs, 3e-3, 1e-2, schedule="constant", every=45)


def three(pull: Pull, admm: tuple[int, int, int], retrain: tuple[int, int, int], lr: float) -> Scheme:
    """FORMS' stages in so many epochs each, the learning rate halved from one to the next.

    Signs are chosen anew at every update of the second stage, and then stay.
    """
    pulls = [pull(n) | {"refresh_every": int(i == 1)} for i, n in enumerate(admm)]
    return tuple((p, cnn.fit(n, lr / 2**i)) for i, (p, n) in enumerate(zip(pulls, retrain, strict=True)))


def digits(variant: str, points: Points, seeds: tuple[int, ...], **more: Any) -> Settings:
    """The digits; a point takes about 15 seconds, half of them compiling and drawing."""
    base = cnn.digits(variant)
    base["plan"]["stages"] = (cnn.stage((), digits_pull(20), cnn.fit(15, 2e-3)),)
    return sweep(variant, base, points, seeds, **more)


def digits_families(variant: str) -> Settings:
    """All families on the digits, three seeds. Cost: 54 points a seed, 40 minutes in all."""
    scheme = three(digits_pull, (8, 7, 5), (5, 5, 5), 2e-3)
    points = families(DIGIT_ENDS, (1 / 4, 1 / 8, 1 / 16), (4, 8, 16), 3, scheme)
    return digits(variant, points, (0, 1, 2), budgets=(6.0, 12.0))


def digits_unification(variant: str) -> Settings:
    """Six block shapes, unified, pruned and both, by three shares, and the baselines. Cost: 63 points, 25 minutes."""
    shares = (0.5, 0.75, 0.9)
    specs = unified(SHAPES, shares) + baselines(shares, (8, 4, 2))
    points = [point(family, name, layers(spec, DIGIT_ENDS)) for family, name, spec in specs]
    return digits(variant, points, (0,), against="multiplications")


def lenet_pull(epochs: int) -> Settings:
    """ADMM for LeNet-5 on half of the images: two updates an epoch there too."""
    return cnn.ramp(epochs) | {"every": 234}


def lenet(variant: str, points: Points, **more: Any) -> Settings:
    """LeNet-5 on half of MNIST's training images; a point takes six epochs of about 6 s on one core."""
    base = cnn.mnist(variant, (cnn.stage((), lenet_pull(3), cnn.fit(3, 2e-3)),), "", 0.0)
    base["data"]["train"] = 30_000
    return sweep(variant, base, points, (0,), **more)


def lenet_families(variant: str) -> Settings:
    """All families on LeNet-5, in few epochs. Cost: 39 points, about 40 minutes."""
    scheme = three(lenet_pull, (1, 1, 1), (1, 1, 1), 2e-3)
    points = families(LENET_ENDS, (1 / 8, 1 / 32), (10, 20), 5, scheme)
    return lenet(variant, points, budgets=(12.0, 20.0))


def lenet_unification(variant: str) -> Settings:
    """Three quarters of the blocks of LeNet-5, in 4x4 and 1x16, and the baselines. Cost: 10 points, 8 minutes."""
    shares = (0.75,)
    specs = unified(((4, 4), (1, 16)), shares) + baselines(shares, (4, 2))
    points = [point(family, name, layers(spec, LENET_ENDS)) for family, name, spec in specs]
    return lenet(variant, points, against="multiplications")


def cifar(
    variant: str,
    points: Points,
    model: str = "resnet20",
    refresh: int = 0,
    seeds: tuple[int, ...] = (0,),
    **more: Any,
) -> Settings:
    """A network on the CIFAR-10 stand-in; a point of ResNet-20 takes five epochs, about 4 minutes of one core."""
    base = cnn.cifar(variant, 1.0, model)
    if base["model"]["checkpoint"]:
        base["plan"]["dense"] = cnn.fit(4, 3e-4)
    base["plan"]["stages"] = (cnn.stage((), cnn.pull(3, refresh_every=refresh), cnn.fit(2, 1e-3)),)
    return sweep(variant, base, points, seeds, **more)


def inner(specs: Iterable[tuple[str, str, Settings]], model: str = "resnet20") -> Points:
    """Points that constrain every 3x3 kernel but the first layer's; it and the last layer stay free."""
    return [point(family, name, ((cnn.INNER[model], spec),)) for family, name, spec in specs]


def random_masks(k: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """So many of the 126 masks with 4 of 9 entries, at random: the control of a chosen library."""
    return tuple(random.Random(seed).sample(list(itertools.combinations(range(9), 4)), k))


def chosen(k: int) -> Settings:
    """A library that is extracted while training: all 126 masks, the rarer half dropped at every update."""
    return {"kind": "pattern", "library": "all", "k": k, "scope": "rule", "shrink": 0.5}


NATURAL = {"kind": "pattern", "library": "natural", "k": 8, "scope": "rule"}


def patterns(variant: str) -> Settings:
    """Kernel patterns alone, 2.25x: any 4 of 9, chosen, natural, random (two draws of 8) and published libraries.

    `dense` is the control for whether patterns raise the accuracy. Cost: 10 points and the control, about 45 minutes.
    """
    specs: list[tuple[str, str, Settings]] = [("free", "free-126", {"kind": "pattern", "library": "all"})]
    specs += [("chosen", f"chosen-{k}", chosen(k)) for k in (4, 8, 12)]
    specs.append(("natural", "natural-8", NATURAL))
    draws = (("4", 4, 0), ("8", 8, 0), ("8b", 8, 1), ("12", 12, 0))
    specs += [("random", f"random-{n}", {"kind": "pattern", "library": random_masks(k, s)}) for n, k, s in draws]
    specs.append(("ELoG", "elog-8", {"kind": "pattern", "library": "elog"}))
    return cifar(variant, inner(specs), refresh=1, against="weights")


def patterns_seeds(variant: str) -> Settings:
    """Any 4 of 9, 8 chosen and 8 random patterns with three seeds each. Cost: 12 points and controls, 50 minutes."""
    specs: list[tuple[str, str, Settings]] = [
        ("free", "free-126", {"kind": "pattern", "library": "all"}),
        ("chosen", "chosen-8", chosen(8)),
        ("random", "random-8", {"kind": "pattern", "library": random_masks(8)}),
    ]
    return cifar(variant, inner(specs), refresh=1, seeds=(0, 1, 2), against="weights")


def patterns_8x(variant: str) -> Settings:
    """Connectivity, alone and with patterns (8.1x): by layer and by filter, with chosen and fixed libraries.

    By layer and by filter keep as many kernels at 4x, where a quarter of every filter's is a whole number.
    Cost: 7 points and the control, about 32 minutes.
    """
    few, natural = 1 / 3.6, {"kind": "pattern_connectivity", "library": "natural", "scope": "rule"}
    by_layer, by_filter = ({"kind": "connectivity", "density": 1 / 4, "balance": b} for b in ("layer", "filter"))
    specs: list[tuple[str, str, Settings]] = [
        ("connectivity", "kernels-3.6x", {"kind": "connectivity", "density": few}),
        ("connectivity", "kernels-4x", by_layer),
        ("balanced connectivity", "balanced-4x", by_filter),
    ]
    specs += [("natural", f"natural-{k}", natural | {"density": few, "k": k}) for k in (4, 8, 12)]
    specs.append(("chosen", "chosen-8", chosen(8) | {"kind": "pattern_connectivity", "density": few}))
    return cifar(variant, inner(specs), refresh=1, against="weights")


def patterns_of(variant: str, model: str) -> Settings:
    """Patterns alone (2.25x) and with connectivity (8.1x) on another network, beside the dense control."""
    joint = chosen(8) | {"kind": "pattern_connectivity", "density": 1 / 3.6}
    specs = [("chosen", "chosen-8", chosen(8)), ("chosen and connectivity", "joint-8", joint)]
    return cifar(variant, inner(specs, model), model, refresh=1, against="weights")


def darb(variant: str) -> Settings:
    """DARB beside irregular, block-max, bank-balanced, block and row pruning, at 8x. Cost: about 28 minutes."""
    kinds: dict[str, Settings] = {
        "irregular": {"kind": "unstructured", "density": 1 / 8},
        "block-max": {"kind": "block_max", "size": 8},
        "DARB": {"kind": "darb", "density": 1 / 8},
        "bank-balanced": {"kind": "bank_balanced", "density": 1 / 8, "bank": 16},
        "block": {"kind": "block", "block": (4, 4), "density": 1 / 8},
        "row": {"kind": "columns", "density": 1 / 8},
    }
    specs = [(family, f"{family}-8x", spec) for family, spec in kinds.items()]
    return cifar(variant, inner(specs), against="weights")


def cifar_unification(variant: str) -> Settings:
    """Three quarters of the 4x4 blocks of ResNet-20, and the baselines. Cost: 6 points and the control, 28 minutes."""
    specs = unified(((4, 4),), (0.75,)) + baselines((0.75,), (4,))
    return cifar(variant, inner(specs), against="multiplications")


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "digits_families": digits_families,
    "digits_unification": digits_unification,
    "mnist_lenet5_families": lenet_families,
    "mnist_lenet5_unification": lenet_unification,
    "cifar_patterns": patterns,
    "cifar_patterns_seeds": patterns_seeds,
    "cifar_patterns_8x": patterns_8x,
    "cifar_resnet32_patterns": lambda v: patterns_of(v, "resnet32"),
    "cifar_vgg16_patterns": lambda v: patterns_of(v, "vgg16"),
    "cifar_darb": darb,
    "cifar_unification": cifar_unification,
}


def tiny(c: Settings) -> Settings:
    """A point of one stage, one of several if there is one, and a handful of examples."""
    cnn.tiny(c["base"])
    kinds = {bool(p["stages"]): p for p in reversed(c["points"])}
    c |= {"points": tuple(kinds.values()), "seeds": c["seeds"][:1]}
    stages = kinds[True]["stages"] if True in kinds else ()
    for s in stages:
        s["admm"] |= {"epochs": 1, "cycles": 1, "every": 1}
        s["retrain"] |= {"epochs": 1}
    for part in ("admm", "retrain"):
        c["base"]["plan"]["stages"][0][part] |= {"epochs": max(1, len(stages))}
    return c


def get_config(variant: str = "digits_families") -> ConfigDict:
    """The sweep of that name."""
    return named(variant, VARIANTS, tiny)
