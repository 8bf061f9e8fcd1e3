"""What the golden figures are made of: plain data, so that no call of the library stands between a case and its input.

A case that stays keeps its figures; a new one gets figures of its own by `make.py --only NAME`.
"""

from typing import Any, NamedTuple

Shape = tuple[int, ...]
Spec = dict[str, Any]


class Set(NamedTuple):
    """A constraint by its spec, and the leaves that it is tried on.

    Attributes:
      spec: as `constraints.from_spec` takes it.
      shapes: of the leaves; a joint set takes all of them together, any other the only one.
      dtype: of the leaves.
    """

    spec: Spec
    shapes: tuple[Shape, ...]
    dtype: str = "float32"

    @property
    def arrays(self) -> tuple[str, ...]:
        """The kinds of numbers that it is tried on: "even", multiples of 1/8 with ties and zeros, and "any".

        Many scales put multiples of 1/8 on levels equally well, so that rounding decides which one is chosen: sets with
        levels are tried on "any" alone.
        """
        single = self.spec.get("parts", [self.spec])
        return ("any",) if any(p["kind"] == "quantize" for p in single) else ("even", "any")


def _one(kind: str, shape: Shape, dtype: str = "float32", **arguments: Any) -> Set:
    return Set({"kind": kind, **arguments}, (shape,), dtype)


def _joint(kind: str, *shapes: Shape, **arguments: Any) -> Set:
    return Set({"kind": kind, **arguments}, shapes)


def _all(*shapes: Shape, parts: tuple[Spec, ...]) -> Set:
    return Set({"kind": "all", "parts": [*parts]}, shapes)


def _part(kind: str, **arguments: Any) -> Spec:
    return {"kind": kind, **arguments}


CONV, WIDE, DENSE, GATES = (3, 3, 4, 6), (3, 3, 4, 5), (7, 8), (11, 7)
PAIR = ((3, 3, 4, 6), (6, 5))
NETWORK = ((3, 3, 4, 6), (3, 3, 6, 4))
_MEMBERS = [
    {"makes": 3, "makes_units": [[0, 6]], "reads": None, "reads_units": None, "columns": 20},
    {"makes": None, "makes_units": None, "reads": 0, "reads_units": [[0, 6]], "columns": None},
]
_CUBES = [[0, 6, 12, 18], [2, 12, 20, 24], [10, 11, 12, 13], [0, 12, 24, 1]]

SETS: dict[str, Set] = {
    "unstructured": _one("unstructured", (6, 8), density=0.3),
    "unstructured conv": _one("unstructured", WIDE, keep=11),
    "unstructured bfloat16": _one("unstructured", WIDE, "bfloat16", density=0.3),
    "unstructured global": _joint("unstructured", (6, 8), (3, 3, 2, 4), density=0.2, scope="global"),
    "n_of_m": _one("n_of_m", (8, 6), n=2, m=4),
    "n_of_m conv": _one("n_of_m", WIDE, n=1, m=2),
    "n_of_m outputs": _one("n_of_m", (5, 8), n=3, m=4, axis=-1),
    "block": _one("block", DENSE, block=[2, 3], density=0.4),
    "block conv": _one("block", (3, 3, 2, 5), block=[4, 2], keep=5),
    "filters": _one("filters", CONV, density=0.5),
    "filters float16": _one("filters", CONV, "float16", keep=2),
    "columns": _one("columns", CONV, density=0.5),
    "channels": _one("channels", CONV, density=0.5),
    "filters_and_columns": _one("filters_and_columns", CONV, filter_density=0.5, column_density=0.25),
    "coupled_filters": _joint("coupled_filters", *PAIR, members=[[3, [[0, 6]]], [1, [[1, 4], [-1, 1]]]], density=0.5),
    "coupled_filters columns": _joint(
        "coupled_filters", *PAIR, members=[[3, [[0, 6]]], [0, [[0, 6]]]], keep=3, column_density=0.5
    ),
    "network_structure": _joint("network_structure", *PAIR, members=_MEMBERS, groups=[[0, 6, 3]]),
    "pattern natural": _one("pattern", (3, 3, 6, 8), k=8),
    "pattern bfloat16": _one("pattern", (3, 3, 6, 8), "bfloat16", k=6),
    "pattern aligned": _one("pattern", (3, 3, 5, 10), library="elog", aligned=4),
    "pattern aligned channel": _one("pattern", (3, 3, 5, 6), library="group", k=8, aligned="channel"),
    "pattern network": _joint("pattern", *NETWORK, library="all", k=8, scope="network", shrink=0.5),
    "pattern free": _one("pattern", CONV, library="free", entries=3),
    "pattern list 5x5": _one("pattern", (5, 5, 3, 4), library=_CUBES, kernel=[5, 5]),
    "connectivity": _one("connectivity", (1, 1, 8, 9), density=0.3),
    "connectivity balanced": _one("connectivity", (3, 3, 6, 7), keep=2, balance="filter"),
    "connectivity aligned": _one("connectivity", (3, 3, 6, 7), density=0.4, aligned=2),
    "pattern_connectivity": _one("pattern_connectivity", (3, 3, 8, 8), density=0.3, k=8),
    "pattern_connectivity balanced": _one(
        "pattern_connectivity", (3, 3, 6, 5), keep=2, balance="filter", library="scp", aligned=2
    ),
    "bsp_columns": _one("bsp_columns", GATES, density=0.4, strips=3),
    "bsp_columns blocks": _one("bsp_columns", GATES, density=0.4, strips=2, blocks=2),
    "bsp_columns gates": _joint("bsp_columns", (10, 6), (10, 6), keep=3, strips=3, gates="together"),
    "bsp_rows": _one("bsp_rows", GATES, keep=3, strips=2),
    "bsp_rows chained": _one("bsp_rows", GATES, density=0.5, chained=True),
    "bsp": _one("bsp", GATES, column_density=0.5, row_density=0.5, column_strips=3, row_strips=2),
    "block_max": _one("block_max", GATES, size=3),
    "block_max inputs": _one("block_max", GATES, size=4, axis="inputs"),
    "darb": _one("darb", GATES, density=0.3, allowed=[1, 2, 4, 8]),
    "darb inputs": _one("darb", (16, 9), density=0.25, axis="inputs"),
    "darb inverse": _one("darb", (9, 16), density=0.25, assignment="inverse"),
    "darb uniform": _joint("darb", (9, 8), (9, 8), density=0.25, assignment="uniform", gates="together"),
    "balanced_block_max": _one("balanced_block_max", GATES, density=0.5, size=2),
    "bank_balanced": _one("bank_balanced", GATES, density=0.5, bank=4, axis="inputs"),
    "bank_balanced outputs": _one("bank_balanced", (5, 11), density=0.25, bank=4),
    "crossbar_aware": _one(
        "crossbar_aware", (3, 3, 2, 7), filter_density=0.5, column_density=0.4, rows=4, cols=4, cells_per_weight=2
    ),
    "polarize": _one("polarize", CONV, fragment=4),
    "polarize H": _one("polarize", CONV, fragment=8, order="H"),
    "polarize energy": _one("polarize", (8, 6), fragment=3, order="C", rule="energy"),
    "polarize bfloat16": _one("polarize", CONV, "bfloat16", fragment=4, rule="energy"),
    "quantize": _one("quantize", (6, 8), bits=3),
    "quantize bfloat16": _one("quantize", (6, 8), "bfloat16", bits=4),
    "quantize 8 bits channel": _one("quantize", CONV, bits=8, per="channel"),
    "quantize frozen": _one("quantize", (6, 8), bits=4, zero_level=True, tune=False),
    "quantize cells channel": _one("quantize", CONV, bits=4, grid="cells", per="channel"),
    "quantize powers": _one("quantize", (6, 8), bits=3, grid="power_of_two", zero_level=True),
    "quantize powers channel": _one("quantize", CONV, bits=4, grid="power_of_two", per="channel"),
    "quantize codebook": _one("quantize", CONV, bits=3, grid="codebook"),
    "quantize codebook channel": _one("quantize", CONV, bits=3, grid="codebook", per="channel"),
    "unify": _one("unify", DENSE, block=[2, 3], fraction=0.5),
    "unify bfloat16": _one("unify", DENSE, "bfloat16", block=[2, 2], fraction=0.5),
    "unify cubes": _one("unify", WIDE, block=[2, 9, 2], fraction=0.5),
    "unify keep": _one("unify", DENSE, block=[2, 2], fraction=0.75, zeros="keep"),
    "prune_blocks": _one("prune_blocks", DENSE, block=[2, 3], fraction=0.5),
    "prune_blocks cubes": _one("prune_blocks", WIDE, block=[2, 3, 2], fraction=0.5),
    "unify_and_prune": _one("unify_and_prune", DENSE, block=[2, 2], unify_fraction=0.4, prune_fraction=0.3),
    "unify_and_prune exact": _one(
        "unify_and_prune", DENSE, block=[2, 2], unify_fraction=0.4, prune_fraction=0.3, selection="exact"
    ),
    "filters & polarize & quantize": _all(
        CONV,
        parts=(
            _part("filters", density=0.5),
            _part("polarize", fragment=4),
            _part("quantize", bits=4, grid="cells"),
        ),
    ),
    "unify & quantize": _all(
        DENSE, parts=(_part("unify", block=[2, 3], fraction=0.5), _part("quantize", bits=4))
    ),
    "filters & unstructured": _all(
        CONV, parts=(_part("filters", density=0.5), _part("unstructured", density=0.1))
    ),
    "unstructured global & quantize": _all(
        (12, 4),
        (3, 3, 4, 3),
        parts=(
            _part("unstructured", density=0.6, scope="global"),
            _part("quantize", bits=3, per="channel"),
        ),
    ),
    "pattern network & polarize & quantize": _all(
        *NETWORK,
        parts=(
            _part("pattern", library="scp", scope="network"),
            _part("polarize", fragment=4),
            _part("quantize", bits=4),
        ),
    ),
    "bsp gates & quantize": _all(
        (10, 6),
        (10, 6),
        parts=(
            _part("bsp_columns", keep=3, strips=3, gates="together"),
            _part("quantize", bits=4),
        ),
    ),
    "unstructured global & filters": _all(
        (6, 8),
        (3, 3, 2, 4),
        parts=(_part("unstructured", density=0.3, scope="global"), _part("filters", density=0.5)),
    ),
    "n_of_m & columns": _all((8, 6), parts=(_part("n_of_m", n=2, m=4), _part("columns", density=0.5))),
    "pattern & connectivity": _all(
        (3, 3, 6, 8), parts=(_part("pattern", k=6), _part("connectivity", density=0.4))
    ),
    "unstructured & unify keep & polarize": _all(
        (8, 6),
        parts=(
            _part("unstructured", density=0.5),
            _part("polarize", fragment=2),
            _part("unify", block=[2, 2], fraction=0.5, zeros="keep"),
        ),
    ),
}


class File(NamedTuple):
    """A saved model of a few leaves.

    Attributes:
      leaves: path -> (shape, dtype, share of non-zeros).
      rules: pairs (pattern, spec) that the leaves are hardened onto.
      layout: pairs (pattern, format).
      coding: of the arrays.
      model: name and options, where the file names a network; its leaves are then the network's.
      image: shape of one input of that network, without the batch.
    """

    leaves: dict[str, tuple[Shape, str, float]]
    rules: tuple[tuple[str, Spec], ...] = ()
    layout: tuple[tuple[str, str], ...] = ()
    coding: str = "none"
    model: Spec | None = None
    image: Shape = ()


_LEVELS = _part("quantize", bits=4)
_CHANNEL = _part("quantize", bits=3, per="channel")
_BOOK = _part("quantize", bits=3, grid="codebook")
_PATTERN = _part("pattern_connectivity", density=0.4, k=4)


def _two(format: str, spec: Spec | None, a: Shape, b: Shape, share: float = 0.3) -> File:
    """A float32 and a bfloat16 leaf in one format, and a bias."""
    leaves = {"a/kernel": (a, "float32", share), "b/kernel": (b, "bfloat16", share), "bias": ((5,), "float32", 1.0)}
    rules = () if spec is None else ((".*kernel", spec),)
    return File(leaves, rules, ((".*kernel", format),))


def _and(*parts: Spec) -> Spec:
    return {"kind": "all", "parts": [*parts]}


_BSP = _part("bsp_columns", density=0.4, strips=3)
_BANKS = _part("bank_balanced", density=0.5, bank=4)
_THIRDS = _part("block_max", size=3)
_UNIFIED = _part("unify_and_prune", block=[2, 2], unify_fraction=0.4, prune_fraction=0.3)

FILES: dict[str, File] = {
    "dense": _two("dense", None, (3, 3, 2, 4), (5, 4)),
    "compact": _two("compact", _part("filters_and_columns", filter_density=0.5, column_density=0.5), CONV, (8, 6), 1.0),
    "bitmask": _two("bitmask", _part("unstructured", density=0.2), (3, 3, 2, 4), (9, 4)),
    "csr": _two("csr", _part("unstructured", density=0.2), (3, 3, 2, 4), (9, 4)),
    "csr16": _two("csr16", None, (3, 3, 2, 4), (9, 4)),
    "coo-delta": _two("coo-delta", _part("unstructured", density=0.1), (3, 3, 4, 5), (9, 14)),
    "fkw": _two("fkw", _PATTERN, (3, 3, 6, 8), (3, 3, 4, 4), 1.0),
    "bspc": _two("bspc", _BSP, (11, 7), (3, 3, 2, 6), 1.0),
    "block-max": _two("block-max", _THIRDS, (6, 9), (5, 7), 1.0),
    "bank-balanced": _two("bank-balanced", _BANKS, (6, 8), (5, 11), 1.0),
    "quantized": _two("quantized", _and(_part("unstructured", density=0.3), _LEVELS), (8, 6), CONV, 1.0),
    "unified": _two("unified", _UNIFIED, (7, 8), (4, 6), 1.0),
    "cells": _two(
        "cells",
        _and(_part("filters", density=0.5), _part("polarize", fragment=4), _part("quantize", bits=4, grid="cells")),
        CONV,
        (8, 6),
        1.0,
    ),
    "bit-planes": _two("bit-planes", _LEVELS, (8, 6), (3, 3, 2, 4), 0.5),
    "bit-planes-complement": _two("bit-planes-complement", _CHANNEL, (8, 6), (3, 3, 2, 4), 0.5),
    "compact-coded": _two("compact-coded", _and(_part("filters", density=0.5), _LEVELS), CONV, (8, 6), 1.0),
    "csr-coded": _two("csr-coded", _and(_part("unstructured", density=0.3), _BOOK), (8, 6), (3, 3, 2, 4), 1.0),
    "csr16-coded": _two("csr16-coded", _and(_part("unstructured", density=0.3), _CHANNEL), (8, 6), (5, 4), 1.0),
    "coo-delta-coded": _two("coo-delta-coded", _and(_part("unstructured", density=0.2), _LEVELS), (8, 6), (5, 9), 1.0),
    "fkw-coded": _two("fkw-coded", _and(_PATTERN, _LEVELS), (3, 3, 6, 8), (3, 3, 4, 4), 1.0),
    "bspc-coded": _two("bspc-coded", _and(_BSP, _CHANNEL), (11, 7), (5, 6), 1.0),
    "block-max-coded": _two("block-max-coded", _and(_THIRDS, _LEVELS), (6, 9), (5, 7), 1.0),
    "bank-balanced-coded": _two("bank-balanced-coded", _and(_BANKS, _BOOK), (6, 8), (5, 11), 1.0),
    "every dtype": File(
        {
            f"{name}/{dtype}": (shape, dtype, 0.4)
            for name, shape in (("vector", (5,)), ("matrix", (4, 3)), ("scalar", ()), ("empty", (0, 3)))
            for dtype in ("float64", "float32", "float16", "bfloat16", "int8", "int32", "uint16", "int64", "bool")
        }
    ),
    "joint sets": File(
        {
            "a/kernel": ((6, 8), "float32", 1.0),
            "b/kernel": ((3, 3, 2, 4), "float32", 1.0),
            "c/uh": ((10, 6), "float32", 1.0),
            "c/uz": ((10, 6), "float32", 1.0),
        },
        (
            ("[ab]/kernel", _and(_part("unstructured", density=0.3, scope="global"), _CHANNEL)),
            ("c/u.", _and(_part("bsp_columns", keep=3, strips=3, gates="together"), _LEVELS)),
        ),
    ),
    "zlib": File({"w": ((24, 30), "float32", 0.1)}, (), (("w", "dense"),), "zlib"),
    "lzma": File({"w": ((24, 30), "float32", 0.1)}, (), (("w", "dense"),), "lzma"),
    "digits patterns": File(
        {},
        (
            ("params/c1/kernel", _part("pattern", k=4)),
            ("params/c2/kernel", _PATTERN),
            ("params/f1/kernel", _part("unstructured", keep=480)),
            ("params/f2/kernel", _part("unstructured", density=0.3)),
        ),
        (("params/c./kernel", "fkw"),),
        model={"name": "digits_cnn", "options": {"classes": 10, "width": 0.5}},
        image=(8, 8, 1),
    ),
    "digits quantized": File(
        {},
        (
            ("params/c1/kernel", _part("quantize", bits=8, per="channel")),
            ("params/c2/kernel", _and(_PATTERN, _LEVELS)),
            ("params/f1/kernel", _and(_part("columns", density=0.2), _part("quantize", bits=3))),
            ("params/f2/kernel", _BOOK),
        ),
        (("params/c2/kernel", "fkw-coded"),),
        model={"name": "digits_cnn", "options": {"classes": 10, "width": 0.5}},
        image=(8, 8, 1),
    ),
}


class Network(NamedTuple):
    """A network and what is removed from it.

    Attributes:
      name: of the model.
      classes: of its outputs.
      options: of the model.
      shape: of its input.
      cut: "kernels" makes half of the kernels of every convolution with more than 3 inputs zero; "compact" half of the
        filters, which are then removed physically.
    """

    name: str
    classes: int
    options: Spec
    shape: Shape
    cut: str = "kernels"


class Cell(NamedTuple):
    """A recurrent cell of so many units on packed matrices, or (cell "product") one product."""

    cell: str
    units: int
    format: str


NETWORKS: dict[str, Network | Cell | str] = {
    "lenet5": Network("lenet5", 10, {}, (2, 28, 28, 1)),
    "vgg16": Network("vgg16", 10, {"width": 0.0625}, (1, 32, 32, 3)),
    "resnet20": Network("resnet20", 10, {"width": 0.25}, (2, 16, 16, 3)),
    "mobilenet_v2": Network("mobilenet_v2", 10, {"width": 0.1}, (1, 32, 32, 3)),
    "yolov3": Network("yolov3", 1, {"width": 0.0625, "repeats": (1, 0, 1, 0, 0)}, (1, 32, 32, 1)),
    "resnet20 compacted": Network("resnet20", 10, {"width": 0.25}, (2, 16, 16, 3), "compact"),
    "gru before bspc": Cell("gru_before", 37, "bspc"),
    "gru after csr": Cell("gru_after", 37, "csr"),
    "lstm block-max": Cell("lstm", 37, "block-max"),
    "product bspc": Cell("product", 37, "bspc"),
    "digits patterns": "digits patterns",
    "digits quantized": "digits quantized",
}


class Run(NamedTuple):
    """A run of a driver.

    Attributes:
      driver: its name.
      variant: of its config.
      changes: settings by dotted key.
      within: dotted key of the summary -> how far the figure may be off; None for what must be equal.
    """

    driver: str
    variant: str
    changes: Spec
    within: dict[str, float | None]


_COUNTS = dict.fromkeys(("dataset.train", "dataset.test", "bytes.dense", "violations"))
_RESIDUALS = {"residual.primal": 2e-4, "residual.dual": 2e-4}


def _losses(driver: str, *phases: str) -> dict[str, float | None]:
    """The losses on the test set at the end of phases of a few steps each."""
    return {f"{driver}.phases.{phase}.end.test_loss": 2e-4 for phase in phases}


DRIVERS: dict[str, Run] = {
    "cnn": Run(
        "cnn",
        "digits_tiny",
        {},
        {
            **_COUNTS,
            **_RESIDUALS,
            # one of 50 images
            **dict.fromkeys([f"metric.{k}" for k in ("dense", "one_shot", "hardened", "compressed")], 0.021),
            "metric.dense_same_budget": 0.021,
            **_losses("cnn", "dense", "admm", "retrain", "one_shot", "dense_same_budget"),
            "rate.constrained_weights": None,
            "rate.all_weights": 0.2,  # biases that training left at 0
            "bytes.packed": 60,  # positions of single weights, coded by their distances
            "rate.bytes": 0.4,
            "cnn.operations.multiplications": None,
            "cnn.operations.dense": None,
        },
    ),
    "gru_speech": Run(
        "gru_speech",
        "tones_tiny",
        {},
        {
            **_COUNTS,
            **_RESIDUALS,
            # one of 30 phones
            **dict.fromkeys([f"metric.{k}" for k in ("dense", "one_shot", "hardened", "compressed")], 0.034),
            **_losses("gru_speech", "dense", "bsp_10x_admm", "bsp_10x_retrain", "bsp_10x_one_shot_one_shot"),
            "rate.constrained_weights": None,
            "rate.all_weights": None,
            "bytes.packed": 40,  # blocks that keep the same inputs share their list
            "rate.bytes": 0.1,
            "gru_speech.counted_weights": None,
        },
    ),
    "language_model": Run(
        "language_model",
        "generated_tiny",
        {"plan.baselines": (), "model.layers": 1},
        {
            **_COUNTS,
            **_RESIDUALS,
            # perplexities, 4e-4 of each
            "metric.dense": 0.02,
            "metric.hardened": 0.04,
            "metric.compressed": 0.03,
            **_losses("language_model", "dense", "admm", "retrain"),
            # rows choose their block sizes by their density, which a weight near the threshold moves
            "rate.constrained_weights": 0.2,
            "rate.all_weights": 0.02,
            "bytes.packed": 120,
            "rate.bytes": 0.02,
            "language_model.places": None,
            "language_model.words": None,
        },
    ),
}
