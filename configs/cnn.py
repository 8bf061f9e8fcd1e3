"""The experiments of `experiments.cnn`. A variant is the part after the colon of `--config=configs/cnn.py:VARIANT`.

    python -m experiments.cnn --config=configs/cnn.py:VARIANT --workdir=DIR [--data_dir=DIR]

Any setting can be changed on the command line: `--config.plan.dense.epochs=5`, `--config.plan.stages[0].admm.lr=3e-4`.
Every variant has a form `VARIANT_tiny` that runs through all its phases in seconds and learns nothing. Networks of one
data set can share a dense network: `--config.init_from=DIR` of a run that has trained one.

What a setting means is said where it is declared: `experiments.cnn.config`,
`experiments.common.training.config`.
Costs are for two CPU cores with nothing else running; an epoch of MNIST with LeNet-5 takes about 10 s there.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from experiments.cnn.config import Config
from experiments.common.settings import defaults, named, plain
from experiments.common.training import Admm, Fit, Plan

Settings = dict[str, Any]
Rules = tuple[tuple[str, Settings], ...]


def fit(epochs: int, lr: float, **more: Any) -> Settings:
    """A `training.Fit`."""
    return plain(Fit(epochs, lr, **more))


def admm(epochs: int, lr: float, rho: float, **more: Any) -> Settings:
    """A `training.Admm`."""
    return plain(Admm(epochs, lr, rho=rho, **more))


def stage(rules: Rules, admm: Settings, retrain: Settings) -> Settings:
    """A `training.Stage`."""
    return {"rules": rules, "admm": admm, "retrain": retrain}


def base(variant: str) -> Settings:
    """What all variants share."""
    return defaults(Config, variant=variant, plan=Plan())


def unstructured(**keep: int) -> Rules:
    """Rules that keep so many single weights of each layer's kernel."""
    return tuple((f"params/{name}/kernel", {"kind": "unstructured", "keep": k}) for name, k in keep.items())


def structured(**keep: tuple[int, int]) -> Rules:
    """Rules that keep so many (positions, filters) of each layer's kernel: what is left is a dense matrix."""
    return tuple(
        (f"params/{name}/kernel", {"kind": "filters_and_columns", "keep_columns": p, "keep_filters": f})
        for name, (p, f) in keep.items()
    )


def digits(variant: str) -> Settings:
    """8x8 digits, a network of 38,160 weights, 40x fewer of them; one-shot and dense at the same budget beside it.

    Expected, over four seeds, on 355 images: dense 98.9 to 99.4 %, compressed 98.0 to 99.2 %, one-shot 93.8 to 96.1 %.
    Needs no data. Cost: half a minute. Launch: `make demo`.
    """
    c = base(variant)
    c["data"]["shift"] = 1
    c["batch"] = 32
    rules = unstructured(c1=54, c2=300, f1=480, f2=120)
    c["plan"] |= {
        "dense": fit(25, 2e-3),
        "stages": (stage(rules, admm(30, 3e-3, 1e-2, schedule="constant", every=45), fit(25, 2e-3)),),
        "baselines": ("one_shot", "dense_same_budget"),
    }
    return c


# LeNet-5 20-50-500 has 500 (c1), 25,000 (c2), 400,000 (f1) and 5,000 (f2) weights, 430,500 in all; biases stay free.
UNSTRUCTURED = {
    85: unstructured(c1=170, c2=2000, f1=2400, f2=480),  # 5,050 weights
    246: unstructured(c1=110, c2=620, f1=760, f2=255),  # 1,745
}
# (positions, filters) of c1 [25, 20], c2 [500, 50], f1 [800, 500], f2 [500, 10]; the rate counts what is not zero, and
# takes no credit for weights that only feed a pruned filter.
STRUCTURED = {
    39: structured(c1=(16, 10), c2=(110, 25), f1=(130, 55), f2=(55, 10)),  # 10,610
    88: structured(c1=(16, 10), c2=(96, 22), f1=(68, 32), f2=(32, 10)),  # 4,768
    232: structured(c1=(12, 5), c2=(35, 12), f1=(44, 25), f2=(25, 10)),  # 1,830
}


def ramp(epochs: int, rho: float = 1e-3) -> Settings:
    """ADMM for LeNet-5: two updates an epoch, rho growing smoothly up to 0.3 (jumps by 10 cost a point of accuracy)."""
    updates = 2 * epochs
    factor = (0.3 / rho) ** (1 / (updates - 1))
    return admm(epochs, 1e-3, rho, final=0.1, rho_factor=round(factor, 4), rho_stages=updates, every=468)


def mnist(variant: str, stages: tuple[Settings, ...], quantity: str, value: float) -> Settings:
    """LeNet-5 (20-50-500, ReLU after the convolutions) on MNIST with random shifts; one-shot beside it."""
    c = base(variant)
    c["data"] |= {"name": "mnist", "shift": 2}
    c["model"] |= {"name": "lenet5_caffe", "options": {"conv_relu": True}}
    c["plan"] |= {"dense": fit(14, 1e-3), "stages": stages, "baselines": ("one_shot",)}
    c["paper"] = {"quantity": quantity, "value": value}
    return c


def unstructured_85x(variant: str) -> Settings:
    """85x fewer weights, single ones, in one stage. Paper's row: 85x.

    Expected: dense 99.4 %, compressed 99.2 %. Cost: 62 epochs.
    """
    stages = (stage(UNSTRUCTURED[85], ramp(10), fit(14, 2e-3)),)
    return mnist(variant, stages, "rate.constrained_weights", 85.0)


def unstructured_246x(variant: str) -> Settings:
    """246x fewer weights, single ones, in two stages (85x first). Paper's row: 246x.

    Expected: compressed 99.0 %. Cost: 106 epochs.
    """
    first = stage(UNSTRUCTURED[85], ramp(10), fit(14, 2e-3))
    stages = (first, stage(UNSTRUCTURED[246], ramp(8, 3e-3), fit(14, 3e-3)))
    return mnist(variant, stages, "rate.constrained_weights", 246.0)


def structured_39x(variant: str) -> Settings:
    """39x fewer weights, filters and positions, in one stage. Paper's row: 99.16 %.

    Cost: 66 epochs.
    """
    return mnist(variant, (stage(STRUCTURED[39], ramp(8), fit(18, 2e-3)),), "metric.compressed", 0.9916)


def structured_88x(variant: str) -> Settings:
    """88x fewer weights, filters and positions, distilled from the dense network. Paper's row: 99.04 %.

    The last epochs of retraining see the images as they are, for so few weights have little room for shifted ones.
    Cost: 36 epochs and the dense network, one-shot 36 more.
    """
    shifted = stage(STRUCTURED[88], ramp(10), fit(14, 2e-3, distill=0.5))
    plain = stage(STRUCTURED[88], admm(0, 1e-3, 1e-3), fit(12, 1e-3, distill=0.5, augment=False))
    return mnist(variant, (shifted, plain), "metric.compressed", 0.9904)


def structured_232x(variant: str) -> Settings:
    """232x fewer weights, filters and positions, in one stage. Paper's row: 98.05 %.

    Retrained on the images as they are: so few weights have no room left for shifted ones. Cost: 70 epochs.
    """
    retrain = fit(16, 2e-3, augment=False)
    return mnist(variant, (stage(STRUCTURED[232], ramp(12), retrain),), "metric.compressed", 0.9805)


def both(*parts: Settings) -> Settings:
    """The intersection of constraints."""
    return {"kind": "all", "parts": parts}


def polarized(variant: str, fragment: int) -> Settings:
    """FORMS: 24.3x fewer weights, whole crossbars; then fragments of one sign; then 8 bits in 2-bit cells.

    What is left takes 6 arrays of 128x128 where all of it takes 125 (1, 8, 112, 4). The paper's row: 23.18x,
    accuracy lost with fragments of 4, 8, 16: -0.02, -0.01, 0.14 points. Cost: 22 epochs and the dense network.
    """
    cells = {"kind": "quantize", "bits": 8, "grid": "cells"}
    signs = {"kind": "polarize", "fragment": fragment, "order": "W"}
    keep = {"c1": (25, 16), "c2": (128, 32), "f1": (128, 96), "f2": (96, 10)}
    matrices = dict(structured(**keep))

    def rules(*more: Settings) -> Rules:
        return tuple((path, both(matrix, *more) if more else matrix) for path, matrix in matrices.items())

    stages = (
        stage(rules(), ramp(6), fit(6, 2e-3)),
        stage(rules(signs), ramp(3, 1e-2) | {"refresh_every": 2}, fit(3, 1e-3)),
        stage(rules(signs, cells), ramp(2, 1e-2), fit(2, 5e-4)),
    )
    c = mnist(variant, stages, "rate.constrained_weights", 23.18)
    c["plan"]["baselines"] = ()
    return c


# Accuracies of the nearest rows of the papers' sister works, memristors: 8 bits at 39.2x, 87.9x and 231.8x; the others
# at 37.1x.
QUANTIZED = {(39, 8): 0.9916, (88, 8): 0.9904, (232, 8): 0.9805, (39, 7): 0.9885, (39, 6): 0.9882, (39, 5): 0.9877}


def quantized(variant: str, rate: int, bits: int) -> Settings:
    """The structured network of that rate, then what is left on so many bits, no level at zero; one-shot beside it.

    Paper's rows: 8 bits 99.16 % at 39x, 99.04 % at 88x, 98.05 % at 232x; 7, 6 and 5 bits 98.85 %, 98.82 % and 98.77 %
    at 37x. Cost: that of the structured variant and 7 epochs more, one-shot the same again; the dense network of a run
    of it serves by `--config.init_from`.
    """
    pruned: dict[int, Callable[[str], Settings]] = {39: structured_39x, 88: structured_88x, 232: structured_232x}
    c = pruned[rate](variant)
    stages = c["plan"]["stages"]
    levels = {"kind": "quantize", "bits": bits}
    rules = tuple((path, both(spec, levels)) for path, spec in STRUCTURED[rate])
    last = stage(rules, ramp(3, 1e-2), stages[-1]["retrain"] | {"epochs": 4, "lr": 5e-4})
    c["plan"]["stages"] = (*stages, last)
    value = QUANTIZED.get((rate, bits))
    c["paper"] = {"quantity": "metric.compressed" if value else "", "value": value or 0.0}
    return c


def pull(epochs: int, **more: Any) -> Settings:
    """ADMM for published weights, two updates in an epoch of 78 steps, rho growing smoothly from 1 to 100.

    The penalty is decoupled from Adam: the weights are large beside the steps that Adam takes in few epochs, and with a
    plain penalty up to 0.1 they stayed half way (ResNet-20 at 4x: residual 0.5 to 0.9 after 6 epochs).
    """
    updates = 2 * epochs
    factor = round(100 ** (1 / (updates - 1)), 4)
    return admm(epochs, 1e-3, 1.0, final=0.3, rho_factor=factor, rho_stages=updates, every=39, decoupled=True, **more)


# The kernels that are pruned for a rate, and those of 3x3 but the first layer's.
KERNELS = {
    "resnet20": r"params/(.*/)?(conv\d+|linear)/kernel",
    "resnet32": r"params/(.*/)?(conv\d+|linear)/kernel",
    "vgg16": r"params/(conv\d+|f1)/kernel",
}
INNER = {
    "resnet20": r"params/layer\d+_\d+/conv\d+/kernel",
    "resnet32": r"params/layer\d+_\d+/conv\d+/kernel",
    "vgg16": r"params/conv[1-9]\d?/kernel",
}


def cifar(variant: str, rate: float, model: str = "resnet20") -> Settings:
    """A network for CIFAR-10 and so many times fewer weights over all kernels under one threshold.

    The data are the stand-in of 10,000 + 2,000 images that went through JPEG. The residual networks start from
    published weights, of which ResNet-20's score 81.4 % there; so the dense phase first adapts the weights to the
    images, and is what the compressed network is compared with. VGG-16 has no published weights here and is narrow, a
    quarter of every layer's channels: it is trained from scratch. Cost with ResNet-20: 17 epochs of 78 steps of about
    0.25 s, one-shot 12 more. An epoch of ResNet-32 takes about 1.7 times as long and one of the narrow VGG-16 0.6
    times, with 20 dense epochs more.
    """
    c = base(variant)
    c["data"] |= {
        "name": "cifar10_subset",
        "shift": 4,
        "flip": True,
        "mean": (0.485, 0.456, 0.406),  # what the published weights were trained with
        "std": (0.229, 0.224, 0.225),
    }
    c["batch"], c["eval_batch"] = 128, 500
    if model == "vgg16":
        c["model"] |= {"name": model, "options": {"width": 0.25}}
        dense = fit(25, 2e-3)
    else:
        c["model"] |= {"name": model, "checkpoint": f"checkpoints/{model}_cifar10.npz"}
        dense = fit(5, 3e-4)
    rules = ((KERNELS[model], {"kind": "unstructured", "density": 1 / rate, "scope": "rule"}),)
    stages = (stage(rules, pull(6), fit(6, 1e-3)),)
    c["plan"] |= {"dense": dense, "stages": stages, "baselines": ("one_shot",)}
    return c


def patterned(variant: str, model: str = "resnet20") -> Settings:
    """Every 3x3 kernel but the first layer's on one of 8 natural patterns, 10 of 36 kernels kept: 8.1x.

    Cost: as `cifar`; the dense network of another run with the same network serves by `--config.init_from`.
    """
    c = cifar(variant, 8.1, model)
    joint = {"kind": "pattern_connectivity", "density": 1 / 3.6, "library": "natural", "k": 8, "scope": "rule"}
    c["plan"]["stages"] = (stage(((INNER[model], joint),), pull(6, refresh_every=1), fit(6, 1e-3)),)
    return c


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "digits": digits,
    "mnist_lenet5_unstructured": unstructured_85x,
    "mnist_lenet5_unstructured_85x": unstructured_85x,
    "mnist_lenet5_unstructured_246x": unstructured_246x,
    "mnist_lenet5_structured": structured_39x,
    "mnist_lenet5_structured_39x": structured_39x,
    "mnist_lenet5_structured_88x": structured_88x,
    "mnist_lenet5_structured_232x": structured_232x,
    **{f"mnist_lenet5_forms_{m}": partial(polarized, fragment=m) for m in (4, 8, 16)},
    **{
        f"mnist_lenet5_quantized_{r}x_{b}bit": partial(quantized, rate=r, bits=b)
        for r in (39, 88, 232)
        for b in (8, 7, 6, 5, 4)
    },
    "cifar_resnet20_2x": lambda variant: cifar(variant, 2.0),
    "cifar_resnet20_4x": lambda variant: cifar(variant, 4.0),
    "cifar_resnet20_8x": lambda variant: cifar(variant, 8.0),
    "cifar_resnet20_patterns_8x": patterned,
    "cifar_resnet32_patterns_8x": partial(patterned, model="resnet32"),
    "cifar_vgg16_patterns_8x": partial(patterned, model="vgg16"),
}


def tiny(c: Settings) -> Settings:
    """The same phases on a handful of examples: for tests."""
    c["data"] |= {"train": 96, "test": 50}
    c["batch"], c["eval_batch"] = 32, 20
    if c["data"]["name"] == "cifar10_subset":
        c["model"] |= {"options": {"width": 0.25}, "checkpoint": ""}
    plan = c["plan"]
    plan["dense"] |= {"epochs": 1}
    for s in plan["stages"]:
        s["admm"] |= {"epochs": 2, "cycles": 1, "every": 2}
        s["retrain"] |= {"epochs": 1}
    return c


def get_config(variant: str = "digits") -> ConfigDict:
    """The experiment of that name."""
    return named(variant, VARIANTS, tiny)
