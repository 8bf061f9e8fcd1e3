"""The experiments of `experiments.crossbar`: FORMS tables and SOT-MRAM tables.

    python -m experiments.crossbar --config=configs/crossbar.py:VARIANT --workdir=DIR [--data_dir=DIR]
        [--config.init_from=DIR of a run of experiments.cnn with the same network and data]

`taken` needs `--config.take=DIR`, the work directory of any finished run of image classifiers on the data of
`--config.data.name`, and puts its compressed network on the engine without training. Every variant has a form
`VARIANT_tiny` that runs through everything in seconds and learns nothing. What a setting means is said where it is
declared: `experiments.crossbar.config`. Costs are CPU minutes of two cores, the dense network not counted.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from configs import cnn
from configs.cnn import Rules, Settings, admm, fit
from experiments.common.settings import defaults, named
from experiments.crossbar.config import Config

KERNELS = r"params/(.*/)?({})/kernel"


def branch(name: str, start: str, rules: Rules, pull: Settings, retrain: Settings) -> Settings:
    """A `Branch`, with settings of its own."""
    return {"name": name, "start": start, "rules": rules, "admm": dict(pull), "retrain": dict(retrain)}


def both(*parts: Settings) -> Settings:
    """The spec of an intersection."""
    return {"kind": "all", "parts": list(parts)} if len(parts) > 1 else parts[0]


def pruned(filters: float | None, positions: float | None, cells: int = 4) -> Settings:
    """Shares of filters and positions to keep, rounded up to whole arrays."""
    return {
        "kind": "crossbar_aware",
        "filter_density": filters,
        "column_density": positions,
        "cells_per_weight": cells,
    }


def polarized(fragment: int, order: str = "W", rule: str = "sum") -> Settings:
    """Single-signed fragments."""
    return {"kind": "polarize", "fragment": fragment, "order": order, "rule": rule}


def cells(bits: int = 8) -> Settings:
    """Magnitudes on the levels of 2-bit cells, the sign elsewhere."""
    return {"kind": "quantize", "bits": bits, "grid": "cells", "cell_bits": 2}


def levels(bits: int) -> Settings:
    """A sign bit and evenly spaced levels without zero: what SOT-MRAM stores in bit planes."""
    return {"kind": "quantize", "bits": bits, "grid": "uniform"}


def base(variant: str) -> Settings:
    """What all variants share."""
    c = defaults(Config, variant=variant)
    c["noise_aware"] |= {"fit": fit(0, 1e-4)}
    return c


Pruning = dict[str, Settings]  # layer -> its crossbar_aware spec; "" is all others, which are not pruned


def rules(pruning: Pruning, others: str, *more: Settings) -> Rules:
    """A rule for each pruned layer, and one for all others, every one with the further sets."""
    out = [(KERNELS.format(name), both(spec, *more)) for name, spec in pruning.items()]
    return (*out, (KERNELS.format(others), both(*more))) if more and others else tuple(out)


class Recipe:
    """How a network is taken through prune, polarize, quantize: which layers, and how long each step trains."""

    def __init__(self, pruning: Pruning, layers: str, others: str, steps: dict[str, tuple[Settings, Settings]]) -> None:
        self.pruning, self.layers, self.others, self.steps = pruning, layers, others, steps

    def pruned(self) -> Settings:
        """To whole arrays."""
        return branch("pruned", "", rules(self.pruning, ""), *self.steps["prune"])

    def polarized_only(self, fragment: int) -> Settings:
        """The dense network, polarized."""
        spec = ((KERNELS.format(self.layers), polarized(fragment)),)
        return branch("polarized", "", spec, *self.steps["polarize"])

    def full(
        self, name: str, fragment: int, order: str = "W", rule: str = "sum", refresh: int = 2
    ) -> tuple[Settings, ...]:
        """From the pruned network: polarized by ADMM, then quantized by ADMM."""
        signs = polarized(fragment, order, rule)
        pull, retrain = self.steps["polarize"]
        first = rules(self.pruning, self.others, signs)
        last = rules(self.pruning, self.others, signs, cells())
        return (
            branch(f"signs_{name}", "pruned", first, pull | {"refresh_every": refresh}, retrain),
            branch(f"full_{name}", f"signs_{name}", last, *self.steps["quantize"]),
        )


    def at_once(self, name: str, fragment: int, order: str = "W") -> Settings:
        """From the pruned network: polarized and quantized by one ADMM, in the time of the polarization."""
        last = rules(self.pruning, self.others, polarized(fragment, order), cells())
        pull, retrain = self.steps["polarize"]
        return branch(name, "pruned", last, pull | {"refresh_every": 2}, retrain)


def forms(c: Settings, recipe: Recipe, main: str, *full: tuple[Settings, ...]) -> Settings:
    """The four models of the variation table (dense, polarized, pruned, full), and further full ones."""
    first = (recipe.pruned(), recipe.polarized_only(8))
    c |= {"branches": (*first, *(b for pair in full for b in pair)), "main": main, "one_shot": True}
    c["variation"] |= {"models": ("dense", "polarized", "pruned", main), "sweep": (0.05, 0.2, 0.3)}
    return c


# -- digits ------------------------------------------------------------------------------------------------------------

DIGITS = Recipe(
    # [9, 16], [144, 32], [512, 64], [64, 10]: one array holds 128 positions and 32 filters of 8 bits
    {"c2": pruned(None, 0.85), "f1": pruned(0.5, 0.25)},
    "[cf][12]",
    "c1|f2",
    {
        "prune": (admm(15, 3e-3, 1e-2, schedule="constant", every=45), fit(15, 2e-3)),
        "polarize": (admm(10, 3e-3, 1e-2, schedule="constant", every=45), fit(10, 1e-3)),
        "quantize": (admm(5, 1e-3, 1e-2, schedule="constant", every=45), fit(5, 1e-3)),
    },
)


def digits_base(variant: str) -> Settings:
    """8x8 digits, as in configs/cnn.py."""
    c = base(variant)
    c["data"]["shift"] = 1
    c["batch"], c["dense"] = 32, fit(25, 2e-3)
    c["hardware"] |= {"pooled": ("c2",), "frames": 1024}  # with fewer, a chip has an array for every product
    return c


def digits(variant: str) -> Settings:
    """8x8 digits pruned to whole arrays, polarized and quantized; needs no data. Cost: about 3 minutes."""
    c = forms(digits_base(variant), DIGITS, "full_8", DIGITS.full("8", 8))
    c["noise_aware"] |= {"start": "signs_8", "fit": fit(2, 5e-4)}
    c["variation"]["models"] = (*c["variation"]["models"], "noise_aware")
    return c


def digits_fragments(variant: str) -> Settings:
    """FORMS' figure 6 on 8x8 digits: accuracy against fragments of 1, 2, 4, .. 128 rows, W-major, 8 bits.

    Paper, on CIFAR-100: small fragments lose nothing, large ones a little. Area and power are known for 4, 8 and 16
    alone. Cost: 190 epochs of a third of a second, a minute; 4 for the measurements.
    """
    c = digits_base(variant)
    sizes = [DIGITS.at_once(f"full_{m}", m) for m in (1, 2, 4, 8, 16, 32, 64, 128)]
    return c | {"branches": (DIGITS.pruned(), *sizes), "main": "full_8"}


def digits_sot(variant: str) -> Settings:
    """8x8 digits on the SOT-MRAM engine: dense, pruned, pruned and quantized. Cost: about a minute."""
    return sot(digits_base(variant), cnn.structured(c2=(100, 24), f1=(160, 32)), "c1|f2", DIGITS.steps, (8, 4))


# -- LeNet-5 on MNIST --------------------------------------------------------------------------------------------------

LENET = Recipe(
    # [25, 20], [500, 50], [800, 500], [500, 10]: what is left takes 1 + 1 + 3 + 1 arrays
    {"c2": pruned(0.5, 0.25), "f1": pruned(0.18, 0.16), "f2": pruned(None, 0.25)},
    "[cf][12]",
    "c1",
    {
        "prune": (cnn.ramp(8), fit(10, 2e-3)),
        "polarize": (cnn.ramp(8), fit(6, 1e-3)),
        "quantize": (cnn.ramp(3), fit(4, 3e-4)),
    },
)


def lenet_base(variant: str) -> Settings:
    """LeNet-5 (20-50-500) on MNIST, as in configs/cnn.py; its dense network can be shared with `init_from`."""
    c = base(variant)
    c["data"] |= {"name": "mnist", "shift": 2}
    c["model"] |= {"name": "lenet5_caffe", "options": {"conv_relu": True}}
    c["dense"] = fit(14, 1e-3)
    c["hardware"] |= {"batch": 100, "calibration": 500, "slow_images": 500, "skip_images": 50, "pooled": ("c1", "c2")}
    c["variation"]["images"] = 500
    return c


def mnist_forms(variant: str) -> Settings:
    """FORMS' table on LeNet-5: fragments of 4, 8 and 16.

    Paper: 23.18x pruned, 185.44x fewer arrays, -0.02, -0.01 and 0.14 points lost. Cost: 66 epochs and 31 of one-shot.
    """
    sizes = [LENET.full(str(m), m) for m in (8, 4, 16)]
    c = forms(lenet_base(variant), LENET, "full_8", *sizes)
    c["paper"] = {"quantity": "crossbar.reduction.product", "value": 185.44}
    return c


def mnist_forms_orders(variant: str) -> Settings:
    """W-, H- and C-major fragments of 8, the energy rule, and signs that are never chosen anew. Cost: 83 epochs."""
    kinds = (LENET.full("W", 8), LENET.full("H", 8, "H"), LENET.full("C", 8, "C"))
    more = (LENET.full("energy", 8, "W", "energy"), LENET.full("fixed_signs", 8, refresh=0))
    c = forms(lenet_base(variant), LENET, "full_W", *kinds, *more)
    c["variation"] |= {"models": ()}
    c["one_shot"] = False
    return c


def mnist_sot(variant: str) -> Settings:
    """SOT-MRAM engine, LeNet-5: dense, pruned 40x, and from there quantized to 8, 7, 6, 5 and 4 bits.

    Sister paper's rows: 8 bits 99.16 % at 39x; 7, 6 and 5 bits 98.85, 98.82 and 98.77 % at 37x. Cost: 88 epochs and 32
    of one-shot, 24 minutes of one core; 5 for the measurements (4 ms an image and model).
    """
    return sot(lenet_base(variant), cnn.STRUCTURED[39], "", LENET.steps, (8, 7, 6, 5, 4))


# -- ResNet-20 on the CIFAR-10 stand-in --------------------------------------------------------------------------------

RESNET = Recipe(
    # positions 144, 288, 576 and filters 16, 32, 64: what is kept fills whole arrays of 128 positions and 32 filters
    {
        r"layer1_\d/conv\d": pruned(None, 0.85),
        r"layer2_\d/conv\d": pruned(None, 0.44),
        r"layer3_\d/conv\d": pruned(None, 0.44),
    },
    r"conv\d|linear",
    "conv1|linear",
    {
        "prune": (cnn.pull(6), fit(5, 1e-3)),
        "polarize": (cnn.pull(3), fit(2, 3e-4)),
        "quantize": (cnn.pull(1), fit(1, 1e-4)),
    },
)


def resnet_base(variant: str) -> Settings:
    """ResNet-20 from its published weights on the stand-in, as in configs/cnn.py."""
    shared = cnn.cifar(variant, 2.0)
    c = base(variant)
    c |= {k: shared[k] for k in ("data", "model", "batch", "eval_batch")}
    c["dense"] = shared["plan"]["dense"]
    c["hardware"] |= {"batch": 50, "calibration": 100, "slow_images": 100, "skip_images": 20}
    return c


def resnet_forms(variant: str) -> Settings:
    """FORMS' table on ResNet-20: fragments of 4, 8 and 16, and of 8 in all three orders. Stand-in data.

    C-major is the main one: the paper found it best on CIFAR. Cost, on one core: 47 epochs and 18 of one-shot, 33 s
    each, 36 minutes; 35 for the variation (four models, 50 devices, 200 images, 50 ms an image), 20 for the rest.
    """
    sizes = [RESNET.full(str(m), m, "C") for m in (8, 4, 16)]
    orders = [RESNET.full(f"8_{order}", 8, order) for order in ("W", "H")]
    c = forms(resnet_base(variant), RESNET, "full_8", *sizes, *orders)
    c["variation"] |= {"images": 200, "sweep": ()}  # of 100 images one is a whole point
    return c


def resnet_sot(variant: str) -> Settings:
    """SOT-MRAM engine, ResNet-20: dense, pruned, and quantized to 8 and 4 bits.

    Cost, on one core: 37 epochs, 20 minutes; 10 for the measurements (70 ms an image and model).
    """
    spec = ((r"params/layer\d_\d/conv\d/kernel", {"kind": "columns", "density": 0.5}),)
    return sot(resnet_base(variant), spec, "conv1|linear", RESNET.steps, (8, 4))


# -- SOT-MRAM, and finished runs ---------------------------------------------------------------------------------------


def sot(
    c: Settings, pruning: Rules, others: str, steps: dict[str, tuple[Settings, Settings]], widths: tuple[int, ...]
) -> Settings:
    """Pruned by ADMM, then pruned and quantized by joint ADMM to each width; the last width is the result."""
    quantized = [
        tuple((pattern, both(spec, levels(bits))) for pattern, spec in pruning)
        + (((KERNELS.format(others), levels(bits)),) if others else ())
        for bits in widths
    ]
    parts = [branch(f"bits_{b}", "pruned", q, *steps["polarize"]) for b, q in zip(widths, quantized, strict=True)]
    c |= {"branches": (branch("pruned", "", pruning, *steps["prune"]), *parts), "main": f"bits_{widths[-1]}"}
    c["one_shot"] = True
    c["hardware"] |= {"engine": "sot", "input_bits": 8}
    return c


def taken(variant: str) -> Settings:
    """The compressed network of a finished run on FORMS' engine as it is: `--config.take=DIR`. Cost: a minute."""
    c = base(variant)
    c["variation"] |= {"models": ("taken",)}
    return c


VARIANTS: dict[str, Callable[[str], Settings]] = {
    "digits": digits,
    "digits_fragments": digits_fragments,
    "digits_sot": digits_sot,
    "mnist_lenet5_forms": mnist_forms,
    "mnist_lenet5_forms_orders": mnist_forms_orders,
    "mnist_lenet5_sot": mnist_sot,
    "cifar_resnet20_forms": resnet_forms,
    "cifar_resnet20_sot": resnet_sot,
    "taken": taken,
}


# Of variants with many branches alike, those that the tiny run trains: a branch takes seconds to compile, whatever its
# length, and one of each kind shows that all of them run.
FEW = {
    "digits_fragments": ("pruned", "full_4", "full_8", "full_32"),
    "mnist_lenet5_forms_orders": ("pruned", "polarized", "signs_W", "full_W", "signs_energy", "full_energy"),
    "mnist_lenet5_sot": ("pruned", "bits_8", "bits_4"),
    "cifar_resnet20_forms": (
        *("pruned", "polarized", "signs_8", "full_8", "signs_4", "full_4", "signs_16", "full_16"),
        *("signs_8_W", "full_8_W"),
    ),
}


def tiny(c: Settings) -> Settings:
    """The same phases and measurements on a handful of examples, of branches alike a few: for tests."""
    few = FEW.get(c["variant"].removesuffix("_tiny"))
    c["branches"] = tuple(b for b in c["branches"] if few is None or b["name"] in few)
    c["data"] |= {"train": 96, "test": 50}
    c["batch"], c["eval_batch"] = 32, 25
    if c["model"]["name"] == "resnet20":
        c["model"] |= {"options": {"width": 0.25}, "checkpoint": ""}
    c["dense"] |= {"epochs": 1}
    for b in c["branches"]:
        b["admm"] |= {"epochs": 1, "cycles": 1, "every": 1}
        b["retrain"] |= {"epochs": 1}
    c["hardware"] |= {"images": 20, "slow_images": 10, "skip_images": 10, "calibration": 10, "batch": 10}
    c["variation"] |= {"seeds": 3, "images": 10, "sweep_seeds": 2}
    if c["variation"]["sweep"]:
        c["variation"]["sweep"] = (0.3,)
    if c["noise_aware"]["start"]:
        c["noise_aware"]["fit"] |= {"epochs": 1}
    return c


def get_config(variant: str = "digits") -> ConfigDict:
    """The experiment of that name."""
    return named(variant, VARIANTS, tiny)
