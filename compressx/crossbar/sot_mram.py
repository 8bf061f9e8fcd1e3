"""SOT-MRAM engine: digital products from bit planes, AND, a count of ones and shifts; operations, latency and energy.

    dot(x, w) = sum_i sum_j c_i d_j 2^(i+j) popcount(AND(x_i, w_j)),   c, d = 1, except -1 for the sign plane

for two's complement operands of B_a and B_w bits. Weights lie in sub-array rows, one bit plane of one filter a row;
inputs are written beside them; one operation senses two rows. Cost per product grows with kept weights x B_a x B_w.

The body of "A SOT-MRAM-based Processing-In-Memory Engine for Highly Compressed DNN Implementation" (arXiv 1912.05416)
was not available: nothing here is a result of it. Circuit numbers are those of S. Angizi et al., ISVLSI 2019, table of
45 nm memories (32 Mb, one bank, 512 bits wide, 256 x 256 sub-arrays).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.crossbar.bits import pack
from compressx.crossbar.mapping import Layer

_CHUNK_VALUES = 2**24  # intermediate values a product may hold at any time
_TABLE = "S. Angizi et al., ISVLSI 2019, table of 45 nm memories, SOT-MRAM"


def and_popcount_matmul(
    x: Array, w: Array, x_bits: int, w_bits: int, x_signed: bool = False, w_signed: bool = True
) -> Array:
    """The integer product by bit planes, AND and population count, exactly: `[n, k] @ [k, F] -> [n, F]`, int32.

    Args:
      x, w: integers; those outside the range of their bits lose upper bits, as in the memory.
      x_bits, w_bits: 1..8 each; with a sign the top plane counts negative (one signed bit: 0 and -1).
      x_signed, w_signed: two's complement or unsigned.

    Returns:
      int32 `[n, F]`.

    Raises:
      ValueError: widths are out of range, shapes do not fit, or k is so long that int32 could overflow.

    Source: products by AND and count of bit planes as in S. Zhou et al., "DoReFa-Net", 2016, section 2.1; that SOT-MRAM
    senses the AND of two rows: S. Angizi et al., ISVLSI 2019.

    Example:
      >>> x, w = jnp.array([[5, 3]], jnp.int32), jnp.array([[2], [-1]], jnp.int32)
      >>> compressx.crossbar.and_popcount_matmul(x, w, x_bits=4, w_bits=3).tolist()
      [[7]]
    """
    for name, bits in (("x_bits", x_bits), ("w_bits", w_bits)):
        if not 1 <= bits <= 8:
            raise ValueError(f"{name} must be in 1..8, got {bits}")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[0]:
        raise ValueError(f"expected [n, k] and [k, F], got {x.shape} and {w.shape}")
    if x.shape[1] * 2 ** (x_bits + w_bits) >= 2**31:
        raise ValueError(f"k={x.shape[1]} at {x_bits} x {w_bits} bits may pass int32; split the rows")
    planes_x = pack(x.astype(jnp.int32).T, x_bits)  # [B_a, words, n]
    planes_w = pack(w.astype(jnp.int32), w_bits)  # [B_w, words, F]
    coefficient = np.outer(plane_weights(x_bits, x_signed), plane_weights(w_bits, w_signed))
    weights = jnp.asarray(coefficient, jnp.int32)[:, :, None, None]

    def word(total: Array, step: tuple[Array, Array]) -> tuple[Array, None]:
        a, b = step  # [B_a, n], [B_w, F]
        ones = lax.population_count(a[:, None, :, None] & b[None, :, None, :]).astype(jnp.int32)
        return total + jnp.sum(ones * weights, axis=(0, 1), dtype=jnp.int32), None

    start = jnp.zeros((x.shape[0], w.shape[1]), jnp.int32)
    return lax.scan(word, start, (planes_x.swapaxes(0, 1), planes_w.swapaxes(0, 1)))[0]


def plane_weights(bits: int, signed: bool) -> list[int]:
    """What each plane counts, lowest first; the top one is negative in two's complement."""
    powers = [2**i for i in range(bits)]
    return [*powers[:-1], -powers[-1]] if signed else powers


@dataclass(frozen=True)
class Operands:
    """Widths of inputs and weights, 1..8 bits each; with a sign they are two's complement."""

    x_bits: int = 8
    w_bits: int = 8
    x_signed: bool = False
    w_signed: bool = True

    @property
    def input_range(self) -> tuple[int, int]:
        """Smallest and largest input."""
        half = 2 ** (self.x_bits - 1)
        return (-half, half - 1) if self.x_signed else (0, 2**self.x_bits - 1)


@partial(jax.tree_util.register_dataclass, data_fields=("w",), meta_fields=("design",))
@dataclass(frozen=True)
class Planes:
    """A weight matrix in the engine; a pytree.

    Attributes:
      w: int32 `[k, F]`, in the range of its bits.
      design: widths of the operands.
    """

    w: Array
    design: Operands

    def matmul(self, x: Array) -> Array:
        """`[..., k] -> [..., F]` by bit planes; x holds integers, the result is float32 (int32 for int32).

        A NaN or infinity, which has no bits, makes its row of the result NaN.
        """
        d, flat = self.design, jnp.round(x).reshape(-1, x.shape[-1]).astype(jnp.int32)
        run = lambda part: and_popcount_matmul(part, self.w, d.x_bits, d.w_bits, d.x_signed, d.w_signed)
        size = max(1, _CHUNK_VALUES // (d.x_bits * d.w_bits * self.w.shape[1]))
        if len(flat) > size:
            count = ceil(len(flat) / size)
            padded = jnp.pad(flat, ((0, count * size - len(flat)), (0, 0))).reshape(count, size, -1)
            y = lax.map(run, padded).reshape(count * size, -1)[: len(flat)]
        else:
            y = run(flat)
        y = y.reshape(*x.shape[:-1], -1).astype(x.dtype)
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return y
        return jnp.where(jnp.isfinite(x).all(axis=-1, keepdims=True), y, jnp.nan)


@dataclass(frozen=True)
class Engine:
    """A memory that computes: its size, and time and energy of each operation on `width` bits.

    Attributes:
      rows, cols: of a sub-array.
      width: bits of an operation, cols x the sub-arrays that work together.
      read_ns, write_ns: nanoseconds of a row.
      read_nj, write_nj: nanojoules of a row.
      and_nj: of sensing two rows together.
      and_ns: its time; None: that of a read, since both sense once.
      count_ns, count_nj: of counting, shifting and adding one result. The table has no such entry: 0 hides the count
        behind the next AND and leaves its energy out; set them if you know them.
      leakage_mw: milliwatts of the whole memory, as long as an inference takes.
      parallel: groups of sub-arrays (`width` bits each) that work together.
      pack: filters whose planes are short lie side by side in one row, as many as `width` holds, each over a copy of
        the input planes; the counter then counts each filter's columns apart. Without it a dot product of 25 takes an
        AND of the whole width.
      source: of the numbers.

    Raises:
      ValueError: a size is below 1, a time or energy below 0, or the width is no multiple of the columns.

    Source: numbers of S. Angizi et al., ISVLSI 2019, table of 45 nm memories.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import sot_mram
      >>> layer = crossbar.dense_layer("w", np.ones((512, 10)))
      >>> work = sot_mram.layer_work(layer, crossbar.Engine(), x_bits=8, w_bits=8)
      >>> work.ands, work.writes, round(work.ns)  # 10 filters x 8 x 8 planes; 8 planes of inputs; nanoseconds
      (640, 8, 1845)
    """

    rows: int = 256
    cols: int = 256
    width: int = 512
    read_ns: float = 2.85
    write_ns: float = 2.59
    read_nj: float = 0.57
    write_nj: float = 0.66
    and_nj: float = 0.64
    and_ns: float | None = None
    count_ns: float = 0.0
    count_nj: float = 0.0
    leakage_mw: float = 550.0
    parallel: int = 1
    pack: bool = False
    source: str = _TABLE

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "width", "parallel"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.width % self.cols:
            raise ValueError(f"width={self.width} is not a multiple of cols={self.cols}")
        for name in ("read_ns", "write_ns", "read_nj", "write_nj", "and_nj", "count_ns", "count_nj", "leakage_mw"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class Work:
    """What one layer does for one inference.

    Attributes:
      name: of the layer; weights: kept ones, rows and columns that are all zero left out.
      subarrays: whole sub-arrays that hold its planes.
      ands: operations AND + count; writes: rows of inputs written; programmed: rows of weights, written once.
      ns: time; dynamic_nj: energy without leakage; leakage_nj.
      utilisation: share of the bits of all ANDs that belong to a weight.
    """

    name: str
    weights: int
    subarrays: int
    ands: int
    writes: int
    programmed: int
    ns: float
    dynamic_nj: float
    leakage_nj: float
    utilisation: float

    def row(self) -> dict[str, Any]:
        """The layer as a row of a table."""
        return {
            "layer": self.name,
            "weights": self.weights,
            "sub-arrays": self.subarrays,
            "AND + count": self.ands,
            "width used": self.utilisation,
            "rows written": self.writes,
            "us": self.ns / 1e3,
            "uJ": (self.dynamic_nj + self.leakage_nj) / 1e3,
        }


@dataclass(frozen=True)
class Report:
    """A network on the engine; layers run one after another."""

    engine: Engine
    layers: tuple[Work, ...]
    assumptions: tuple[str, ...]

    @property
    def ms(self) -> float:
        """Latency of an inference."""
        return sum(layer.ns for layer in self.layers) / 1e6

    @property
    def fps(self) -> float:
        """Inferences a second, one at a time."""
        return 1e3 / self.ms

    @property
    def dynamic_uj(self) -> float:
        """Energy of an inference without leakage."""
        return sum(layer.dynamic_nj for layer in self.layers) / 1e3

    @property
    def uj(self) -> float:
        """Energy of an inference, leakage included."""
        return self.dynamic_uj + sum(layer.leakage_nj for layer in self.layers) / 1e3

    @property
    def utilisation(self) -> float:
        """Share of the bits of all ANDs that belong to a weight."""
        return sum(w.utilisation * w.ands for w in self.layers) / self.ands if self.ands else 0.0

    @property
    def subarrays(self) -> int:
        """Sub-arrays of all layers."""
        return sum(layer.subarrays for layer in self.layers)

    @property
    def ands(self) -> int:
        """AND operations of an inference."""
        return sum(layer.ands for layer in self.layers)

    @property
    def programming_uj(self) -> float:
        """Energy of writing all weights, once."""
        return sum(layer.programmed for layer in self.layers) * self.engine.write_nj / 1e3


def layer_work(layer: Layer, engine: Engine, x_bits: int, w_bits: int) -> Work:
    """Counts operations, time and energy of a layer.

        AND operations = uses * ceil(F / k) * B_a * B_w * ceil(L / width)    L kept rows, F kept columns of each group
        rows of weights = ceil(F / k) * B_w * ceil(L / width);  a stack of sub-arrays holds rows - B_a of them
        rows written a use = B_a * (stacks);   k = max(1, floor(width / L)) with `engine.pack`, else 1

    Every stack keeps its own copy of the input planes of its slice of L. Operations of `parallel` stacks overlap.

    Args:
      layer: what is stored, and how often it is used.
      engine: the memory.
      x_bits, w_bits: of inputs and weights.

    Returns:
      `Work` of one inference.

    Raises:
      ValueError: a sub-array has no row left for weights.

    Example:
      >>> from compressx.crossbar import Engine, dense_layer, sot_mram
      >>> sot_mram.layer_work(dense_layer("w", np.ones((512, 10))), Engine(), x_bits=4, w_bits=4).ands  # 10 x 4 x 4
      160
    """
    subarrays = ands = writes = programmed = weights = used = 0
    room = engine.rows - x_bits
    if room < 1:
        raise ValueError(f"sub-arrays of {engine.rows} rows have no room for weights beside {x_bits} input planes")
    for kept in layer.kept:
        length, filters = int(kept.any(axis=1).sum()), int(kept.any(axis=0).sum())
        if length == 0:
            continue
        pieces = ceil(length / engine.width)
        lines = ceil(filters / max(1, engine.width // length)) if engine.pack else filters
        stacks = pieces * ceil(lines * w_bits / room)
        weights += length * filters
        subarrays += stacks * (engine.width // engine.cols)
        programmed += pieces * lines * w_bits
        ands += layer.uses * pieces * lines * x_bits * w_bits
        used += layer.uses * length * filters * x_bits * w_bits
        writes += layer.uses * x_bits * stacks
    and_ns = engine.read_ns if engine.and_ns is None else engine.and_ns
    ns = (ands * (and_ns + engine.count_ns) + writes * engine.write_ns) / min(
        engine.parallel, max(1, subarrays // (engine.width // engine.cols))
    )
    return Work(
        name=layer.name,
        weights=weights,
        subarrays=subarrays,
        ands=ands,
        writes=writes,
        programmed=programmed,
        ns=ns,
        dynamic_nj=ands * (engine.and_nj + engine.count_nj) + writes * engine.write_nj,
        leakage_nj=engine.leakage_mw * ns * 1e-3,
        utilisation=used / (ands * engine.width) if ands else 0.0,
    )


def network(
    layers: Iterable[Layer],
    engine: Engine | None = None,
    x_bits: int | Mapping[str, int] = 8,
    w_bits: int | Mapping[str, int] = 8,
) -> Report:
    """Counts the work of all layers; they run one after another.

    Args:
      layers: of the network.
      engine: the memory; None: the default one.
      x_bits, w_bits: of inputs and weights, one number or by layer name.

    Returns:
      `Report`: latency, energy and sub-arrays.

    Example:
      >>> from compressx.crossbar import dense_layer, sot_mram
      >>> report = sot_mram.network([dense_layer("a", np.ones((512, 10))), dense_layer("b", np.ones((10, 10)))])
      >>> report.ands, round(report.uj, 2)  # microjoules, leakage included
      (1280, 2.86)
    """
    engine = engine or Engine()
    of = lambda bits, name: bits if isinstance(bits, int) else bits[name]
    work = tuple(layer_work(layer, engine, of(x_bits, layer.name), of(w_bits, layer.name)) for layer in layers)
    return Report(engine, work, assumptions(engine))


def assumptions(engine: Engine) -> tuple[str, ...]:
    """Everything in a report that was not measured."""
    return (
        f"numbers of an operation on {engine.width} bits: {engine.source}",
        "an AND takes the time of one read, since two rows are sensed together"
        if engine.and_ns is None
        else f"an AND takes {engine.and_ns} ns",
        f"counting, shifting and adding: {engine.count_ns} ns and {engine.count_nj} nJ beyond the AND (no source)",
        "inputs are written for every use, into every stack of sub-arrays that needs them; weights stay",
        f"{engine.parallel} stack(s) of sub-arrays work together; layers run one after another",
        "short filters lie side by side, each counted apart"
        if engine.pack
        else "a filter has rows of its own, however short (pack=True lays them side by side)",
        f"leakage of {engine.leakage_mw} mW, the whole 32 Mb memory, for the whole inference",
        "write time and energy are parameters: sources disagree on whether SOT-MRAM writes are slow",
    )


def write_sensitivity(
    layers: Sequence[Layer], engine: Engine, factors: Sequence[float], x_bits: int = 8, w_bits: int = 8
) -> list[dict[str, float]]:
    """Latency and energy with writes `factor` times as long and as costly: one row a factor."""
    rows = []
    for factor in factors:
        slow = replace(engine, write_ns=engine.write_ns * factor, write_nj=engine.write_nj * factor)
        found = network(layers, slow, x_bits, w_bits)
        rows.append({"factor": factor, "write ns": slow.write_ns, "ms": found.ms, "uJ": found.uj, "fps": found.fps})
    return rows
