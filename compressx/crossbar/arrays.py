"""Programmed arrays: integer weights as cells, laid out once on the host; what cannot clip is proven, not simulated."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx.crossbar import kernels
from compressx.crossbar.cells import Cells, encode, mixed_groups
from compressx.crossbar.design import Design
from compressx.crossbar.mapping import word_lines

PATHS = ("popcount", "table", "folded", "integer")
TABLE_BYTES = 2**28  # larger look-up tables are built group by group, in every call
TABLE_ROWS = 8


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("rows", "limbs", "cells", "planes", "tables", "proven", "simulated", "place", "gain", "shift"),
    meta_fields=("design", "inputs", "filters", "path", "exact_rows", "limb_cycles", "in_order", "read_noise", "leak"),
)
@dataclass(frozen=True)
class Programmed:
    """A weight matrix on crossbars. A pytree: it passes through jit, vmap and scan.

    Attributes:
      rows: int32 `[k]`, input that drives each row in use.
      limbs: float32 `[L, k, C]`, the weights of the kept filters in base 256.
      cells: of the filters that are simulated.
      planes, tables: what the paths "popcount" and "table" prepare; None otherwise.
      proven, simulated: int32, which kept filters go which way.
      place: int32 `[F]`, where each filter is among proven, simulated and one zero.
      gain, shift: float32 `[B, K, S]`, errors of each column's ADC (gain factor; offset in cell units), or None.
      design: the engine.
      inputs, filters: P and F of the matrix.
      path: one of `PATHS`, for the simulated filters.
      exact_rows: rows that `kernels.exact` may sum.
      limb_cycles: input cycles whose result fits in int32, whatever the inputs; lower than `design.cycles` means that
        a product is made in several parts.
      in_order: all inputs are in use, in their order.
      read_noise: standard deviation of a column's sum at every conversion, in cell units.
      leak: what each driven cell conducts at the lowest level, in cell units; `cells` are without it.

    Example:
      >>> from compressx.crossbar.program import program
      >>> arrays = program([[1, 0], [-2, 0]], compressx.crossbar.isaac())
      >>> arrays.inputs, arrays.filters, arrays.proven_share  # nothing can clip: no column is simulated
      (2, 2, 1.0)
    """

    rows: Array
    limbs: Array
    cells: Cells
    planes: Array | None
    tables: Array | None
    proven: Array
    simulated: Array
    place: Array
    gain: Array | None
    shift: Array | None
    design: Design
    inputs: int
    filters: int
    path: str
    exact_rows: int
    limb_cycles: int
    in_order: bool = False
    read_noise: float = 0.0
    leak: float = 0.0

    @property
    def driven(self) -> Array:
        """The rows of each group of active rows that are in use: bool `[B, R]`."""
        groups, rows = self.cells.cells.shape[:2]
        return jnp.arange(groups * rows).reshape(groups, rows) < self.rows.shape[0]

    def drive(self, x: Array) -> Array:
        """Inputs `[..., P]` as they meet the word lines: `[..., k]`."""
        return x if self.in_order else x[..., self.rows]

    @property
    def proven_share(self) -> float:
        """Share of the kept filters whose columns are all proven not to clip."""
        kept = self.proven.shape[0] + self.simulated.shape[0]
        return self.proven.shape[0] / kept if kept else 1.0


def lay_out(
    w: Any, design: Design, rows: Sequence[int] | np.ndarray | None, path: str, prove: bool, name: str
) -> Programmed:
    """`program.program` for a formulation that is given."""
    w = np.asarray(w)
    if w.ndim != 2 or not np.issubdtype(w.dtype, np.integer):
        raise ValueError(f"{name}: expected an integer matrix [P, F], got {w.dtype} {w.shape}")
    if max(design.weight_bits, design.input_bits) > 16:
        raise ValueError(
            f"{name}: design {design.name} has {design.weight_bits}-bit weights and {design.input_bits}-bit inputs; "
            "the simulation takes up to 16 (mapping and cost take 32)"
        )
    w = w.astype(np.int32)
    low, high = design.weight_range
    if w.size and (w.min() < low or w.max() > high):
        raise ValueError(f"{name}: weights {w.min()}..{w.max()} leave the range {low}..{high} of design {design.name}")
    order = word_lines(w, rows, name)
    if order.size == 0:
        order = np.zeros(min(1, len(w)), np.int64)  # one row keeps every shape non-empty
    kept = np.flatnonzero(w.any(axis=0))
    small = w[order][:, kept]
    if design.signs == "polarized":
        mixed = mixed_groups(small, design)
        if len(mixed):
            raise ValueError(
                f"{name}: {len(mixed)} groups of {design.active_rows} rows hold both signs, first group {mixed[0][0]} "
                f"of filter {kept[mixed[0][1]]}; polarize(fragment={design.active_rows}) makes them single-signed "
                "(and rows=rows_of(...) hands its order on)"
            )
    cells = encode(small, design)
    safe = lossless_columns(cells, design).all(axis=(0, 1)) if prove else np.zeros(len(kept), bool)
    proven, simulated = np.flatnonzero(safe), np.flatnonzero(~safe)
    place = np.full(w.shape[1], len(kept))
    place[kept[proven]] = np.arange(len(proven))
    place[kept[simulated]] = len(proven) + np.arange(len(simulated))

    rest = Cells(*(None if v is None else v[..., simulated] for v in cells))
    if path not in PATHS:
        raise ValueError(f"path must be one of {', '.join(PATHS)}, got {path!r}")
    if path not in paths_for(design):
        raise ValueError(
            f"{name}: path 'table' needs at most {TABLE_ROWS} active rows and a 1-bit DAC, path 'integer' a DAC of at "
            f"most 7 bits; design {design.name} has {design.active_rows} rows and {design.dac_bits} bits"
        )
    limbs = _limbs(small)
    as_device = lambda tree: jax.tree.map(jnp.asarray, tree)
    made = as_device(rest)
    return Programmed(
        rows=jnp.asarray(order, jnp.int32),
        limbs=jnp.asarray(limbs, jnp.float32),
        cells=made,
        planes=jnp.asarray(kernels.pack_planes(rest.cells, design)) if path == "popcount" else None,
        tables=_tables(made, design) if path == "table" else None,
        proven=jnp.asarray(proven, jnp.int32),
        simulated=jnp.asarray(simulated, jnp.int32),
        place=jnp.asarray(place, jnp.int32),
        gain=None,
        shift=None,
        design=design,
        inputs=w.shape[0],
        filters=w.shape[1],
        path=path,
        exact_rows=exact_rows(limbs[:, :, proven]),
        limb_cycles=limb_cycles(cells, len(order), design, name),
        in_order=np.array_equal(order, np.arange(len(w))),
    )


def paths_for(design: Design) -> tuple[str, ...]:
    """The formulations that can run a design."""
    small = design.active_rows <= TABLE_ROWS and design.dac_bits == 1
    return tuple(p for p in PATHS if (p != "table" or small) and (p != "integer" or design.dac_bits <= 7))


def rows_of(order: Any, w: Any) -> np.ndarray:
    """Rows in use in the order of a polarized structure (`Polarity.order`): it, up to the last row with a weight.

    A row that became empty later stays where it is, or the groups after it would close the gap and mix signs.

    Args:
      order: int `[P]`, row of the matrix at each index of the fragments' order.
      w: the weight, its last axis the filters: `[P, F]` or `[kh, kw, cin, cout]`.

    Returns:
      int `[k]`, what `program` takes as `rows`.

    Source: row order of G. Yuan et al., "FORMS", 2021, section III (one order of weights and inputs for a layer).

    Example:
      >>> order = np.array([2, 0, 1])  # row 2 lies on the first word line
      >>> compressx.crossbar.rows_of(order, np.array([[0.0], [0.0], [1.0]])).tolist()
      [2]
    """
    order, w = np.asarray(order), np.asarray(w)
    used = np.flatnonzero(w.reshape(-1, w.shape[-1])[order].any(axis=1))
    return order[: used[-1] + 1] if used.size else order[:0]


def lossless_columns(cells: Cells, design: Design) -> np.ndarray:
    """The proof: columns whose every possible sum has a code of its own inside the clip range: bool `[B, K, F]`.

    lsb = 1/den, and low <= den * (smallest sum), den * (largest sum) <= high over all inputs.
    """
    level = np.asarray(cells.cells, np.int64)
    lsb, swing = design.adc.lsb, 2**design.dac_bits - 1
    if lsb.numerator != 1:
        return np.zeros((level.shape[0], *level.shape[2:]), bool)
    if design.adc.encoding == "ideal":
        return np.ones((level.shape[0], *level.shape[2:]), bool)
    low, high = design.adc.limits(design.signed_sums)
    most = np.maximum(level, 0).sum(axis=1) * swing * lsb.denominator
    least = np.minimum(level, 0).sum(axis=1) * swing * lsb.denominator
    return np.asarray((most <= high) & (least >= low))


def exact_rows(limbs: np.ndarray) -> int:
    """The largest number of rows for which no partial sum of byte x limb reaches 2^24, at any place, for any input."""
    _, k, filters = limbs.shape
    if filters == 0 or k == 0:
        return max(k, 1)
    positive, negative = np.maximum(limbs, 0), np.maximum(-limbs, 0)
    count = k
    while count > 1:
        pad = -k % count
        sums = [np.pad(v, ((0, 0), (0, pad), (0, 0))).reshape(len(v), -1, count, filters).sum(axis=2).max()
                for v in (positive, negative)]  # fmt: skip
        # x is a byte, -128..255: a sum lies within +-255 * (positive + negative)
        if 255 * sum(sums) < 2**24:
            break
        count = ceil(count / 2)
    return count


def limb_cycles(cells: Cells, rows: int, design: Design, name: str = "weights") -> int:
    """How many input cycles can be summed in int32 with every result below 2^30, whatever the inputs."""
    lsb, swing = design.adc.lsb, 2**design.dac_bits - 1
    sums = np.abs(np.asarray(cells.cells, np.float64)).sum(axis=1) * swing * lsb.denominator + lsb.numerator
    if design.adc.encoding != "ideal":  # a clip range of the user's own may not hold 0
        sums = np.maximum(sums, min(abs(v) for v in design.adc.limits(design.signed_sums)) * lsb.numerator)
    if cells.flip is not None:
        sums = sums + np.asarray(cells.flip) * float(design.device.top * lsb.denominator * design.active_rows * swing)
    weights = np.abs(np.asarray(design.column_weights, np.float64))[None, :, None]
    bound = float((sums * weights).sum(axis=(0, 1)).max(initial=1.0))
    if design.signs == "offset":
        bound += 2.0 ** (design.weight_bits - 1) * rows * swing * lsb.denominator
    return _cycles_within(bound, design, name)


def worst_limb_cycles(rows: int, design: Design) -> int:
    """`limb_cycles` for weights that are not known yet: every cell at the top."""
    lsb = design.adc.lsb
    group = 2 * design.largest_sum * lsb.denominator + lsb.numerator
    bound = float(ceil(rows / design.active_rows) * group * sum(abs(v) for v in design.column_weights))
    if design.signs == "offset":
        bound += 2.0 ** (design.weight_bits - 1) * rows * (2**design.dac_bits - 1) * lsb.denominator
    return _cycles_within(bound, design, "weights")


def _cycles_within(bound: float, design: Design, name: str) -> int:
    cycles, swing = design.cycles, 2**design.dac_bits - 1
    while cycles and bound * (2.0 ** (design.dac_bits * cycles) - 1) / swing >= 2.0**30:
        cycles -= 1
    if cycles == 0:
        raise ValueError(f"{name}: a single input cycle can reach {bound:.3g}, beyond int32; split the rows")
    return cycles


def with_cells(programmed: Programmed, cells: Array, **changes: Any) -> Programmed:
    """The same matrix with other conductances (float32, cell units), all simulated: for noise and wire resistance.

    Cells are those of all kept filters, so `programmed` has to be made with `prove=False`.
    """
    if programmed.proven.shape[0]:
        raise ValueError("conductances can only be changed where all columns are simulated: program(..., prove=False)")
    if cells.shape != programmed.cells.cells.shape:
        raise ValueError(f"conductances have shape {cells.shape}, the arrays {programmed.cells.cells.shape}")
    path = "table" if programmed.path == "table" else "folded"
    new = programmed.cells._replace(cells=cells)
    return replace(programmed, cells=new, planes=None, tables=None, path=path, **changes)


def _limbs(w: np.ndarray) -> np.ndarray:
    """Weights in base 256, the last limb signed: int32 `[L, k, F]` with one limb where |w| < 256."""
    if w.size == 0 or np.abs(w).max() < 256:
        return w[None]
    return np.stack([w & 255, w >> 8])


def _tables(cells: Cells, design: Design) -> Array | None:
    """Look-up tables of all groups in the smallest dtype, or None where they would be too large to keep."""
    groups, rows, _, filters = cells.cells.shape
    top = design.largest_sum * design.adc.lsb.denominator + design.adc.lsb.numerator
    if design.adc.encoding != "ideal":
        top = max(top, *(abs(v) * design.adc.lsb.numerator for v in design.adc.limits(design.signed_sums)))
    largest = 2 * top * sum(abs(v) for v in design.column_weights)
    dtype = jnp.int16 if largest < 2**15 else jnp.int32
    if groups * 2**rows * filters * jnp.dtype(dtype).itemsize > TABLE_BYTES:
        return None
    return jax.jit(lambda c: jax.lax.map(lambda g: kernels.build_table(g, design).astype(dtype), c))(cells)
