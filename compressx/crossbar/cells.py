"""Weights as cells: sign scheme, bit slices and flipped columns, for NumPy arrays and traced jax arrays alike.

Shapes: k rows in use, B = ceil(k/R) groups of R = active_rows rows, K columns of a weight, F filters.
"""

from math import ceil
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compressx.crossbar.design import Design


class Cells(NamedTuple):
    """What lies in the arrays.

    Attributes:
      cells: int8 `[B, R, K, F]`, levels 0..top, after flipping; with analog subtraction -top..top (positive cell minus
        negative cell); 0 on the rows that fill up the last group.
      flip: bool `[B, K, F]`, columns stored as (top - level); None without flip encoding.
      negative: bool `[B, F]`, signs of polarized groups; None with other schemes.
    """

    cells: Any
    flip: Any
    negative: Any


def encode(w: Any, design: Design) -> Cells:
    """Integer weights `[k, F]` as cells; rows are taken `active_rows` at a time, in order.

    A magnitude (or w + offset) is cut into slices of `cell_bits`, lowest first. With flip encoding a column whose
    levels sum to more than half of top x rows is stored as top - level. Weights must be in `design.weight_range`, and
    every group single-signed where signs are "polarized"; `program` checks that.
    """
    xp: Any = np if isinstance(w, np.ndarray) else jnp
    k, filters = w.shape
    rows, top = design.active_rows, design.device.top
    groups = ceil(k / rows)

    def grouped(v: Any) -> Any:
        return xp.pad(v, ((0, groups * rows - k), (0, 0))).reshape(groups, rows, filters)

    def sliced(v: Any) -> Any:
        parts = [(v >> (design.device.cell_bits * s)) & top for s in range(design.slices)]
        return xp.stack(parts, axis=2)

    negative = None
    if design.signs == "offset":
        cells = sliced(grouped(w + 2 ** (design.weight_bits - 1)))
    elif design.signs == "polarized":
        negative = xp.any(grouped(w) < 0, axis=1)
        cells = sliced(grouped(xp.abs(w)))
    else:
        positive, minus = sliced(grouped(xp.maximum(w, 0))), sliced(grouped(xp.maximum(-w, 0)))
        cells = positive - minus if design.signed_sums else xp.concatenate([positive, minus], axis=2)
    cells = cells.astype(xp.int8)
    if design.adc.encoding != "flip":
        return Cells(cells, None, negative)
    filled = xp.asarray(np.minimum(rows, k - rows * np.arange(groups)), xp.int32)  # rows in use of each group
    flip = 2 * xp.sum(cells, axis=1, dtype=xp.int32) > top * filled[:, None, None]
    used = xp.asarray(np.arange(groups * rows).reshape(groups, rows) < k)
    cells = xp.where(flip[:, None] & used[:, :, None, None], top - cells, cells).astype(xp.int8)
    return Cells(cells, flip, negative)


def decode(cells: Cells, design: Design, rows: int) -> Any:
    """The weights that cells stand for, `[rows, F]`: `encode`'s inverse for levels, and linear in conductances."""
    stored = jnp.asarray(cells.cells)
    dtype = jnp.float32 if jnp.issubdtype(stored.dtype, jnp.floating) else jnp.int32
    stored = stored.astype(dtype)
    if cells.flip is not None:
        stored = jnp.where(jnp.asarray(cells.flip)[:, None], design.device.top - stored, stored)
    weights = jnp.asarray(design.column_weights, dtype).reshape(1, 1, -1, 1)
    w = jnp.sum(stored * weights, axis=2, dtype=dtype)
    if cells.negative is not None:
        w = jnp.where(jnp.asarray(cells.negative)[:, None], -w, w)
    w = w.reshape(-1, w.shape[-1])[:rows]
    return w - 2 ** (design.weight_bits - 1) if design.signs == "offset" else w


def mixed_groups(w: np.ndarray, design: Design) -> np.ndarray:
    """Indices (group, filter) of groups of rows that hold both signs: int `[n, 2]`."""
    k, filters = w.shape
    groups = ceil(k / design.active_rows)
    padded = np.pad(w, ((0, groups * design.active_rows - k), (0, 0))).reshape(groups, design.active_rows, filters)
    return np.argwhere((padded > 0).any(1) & (padded < 0).any(1))
