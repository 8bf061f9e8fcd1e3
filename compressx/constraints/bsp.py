"""Block-based structured pruning (BSP) of recurrent and dense matrices: columns inside strips, then rows.

The papers' matrix is Co x Ci, an output a row. Ours is stored `[in, out]` (conv: GEMM view `[P, F]`), its transpose:

    the papers' column, one input  ->  our row, axis 0       horizontal strip, a range of outputs  ->  cut of axis 1
    the papers' row, one output    ->  our column, axis 1    vertical strip, a range of inputs     ->  cut of axis 0

Names here are the papers'. n lines in s strips: s - 1 strips of floor(n / s) lines, and the last takes the remainder.

Source: P. Dong et al., "RTMobile: Beyond Real-Time Mobile Acceleration of RNNs for Speech Recognition", 2020.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx.constraints.base import Constraint, check_amount, count, factory
from compressx.constraints.floats import nonzero
from compressx.constraints.gates import matrix_set
from compressx.constraints.select import energy, top_k_mask


@factory
def bsp_columns(
    density: float | None = None, *, keep: int | None = None, strips: int = 4, blocks: int = 1, scope: str = "leaf"
) -> Constraint:
    """BSP, step 1: in every horizontal strip (and column block of it) only so many columns are non-zero.

        argmin_z ||z - w||_2  s.t. each tile (strip, block) has at most k columns with a non-zero:
        in each the k columns of largest energy stay; ties go to the lower input.

    Strips choose apart, so every strip may keep other columns.

    Args:
      density: share of columns kept in every tile.
      keep: number of columns kept in every tile, instead.
      strips: horizontal strips (the papers' Numr); ours cut the outputs, axis 1.
      blocks: column blocks inside a strip (Numc), ranked apart, so that each keeps as many (the balanced variant); 1
        ranks all columns of the strip together.
      scope: "leaf"; or "rule", the matrices of the rule joined along their outputs (see `constraints.gates`).

    Source: P. Dong et al., "RTMobile: Beyond Real-Time Mobile Acceleration of RNNs for Speech Recognition", 2020.

    Example:
      >>> w = jnp.asarray([[9.0, 9.0, 1.0, 1.0], [1.0, 1.0, 9.0, 9.0]])  # [in, out]: two strips of outputs
      >>> print(compressx.bsp_columns(keep=1, strips=2).project(w, ()))
      [[9. 9. 0. 0.]
       [0. 0. 9. 9.]]
    """
    _check(density, keep, strips, blocks)
    return matrix_set(
        scope,
        init=lambda m: (),
        select=lambda m, _: _spread(_lines(m, density, keep, strips, blocks), m),
        alive=lambda m, _: _spread(_energy(m, strips) > 0, m),
    )


@factory
def bsp_rows(
    density: float | None = None,
    *,
    keep: int | None = None,
    strips: int = 1,
    blocks: int = 1,
    scope: str = "leaf",
    chained: bool = False,
) -> Constraint:
    """BSP, step 2: in every vertical strip only so many rows are non-zero.

        argmin_z ||z - w||_2  s.t. each tile (strip, block) has at most k rows with a non-zero:
        in each the k rows of largest energy stay; ties go to the lower output. No zero row is kept for a non-zero one.

    Args:
      density: share of rows kept in every tile.
      keep: number of rows kept in every tile, instead.
      strips: vertical strips; ours cut the inputs, axis 0. 1 ranks whole rows (the paper's text); released code has 4.
      blocks: row blocks inside a strip, ranked apart (the balanced variant).
      scope: "leaf" or "rule", as in `bsp_columns`.
      chained: start from a step-1 model: what is zero at `init` stays zero, and rows are ranked by what is left. The
        set is then rows within that mask, and this is its exact projection.

    Source: P. Dong et al., "RTMobile: Beyond Real-Time Mobile Acceleration of RNNs for Speech Recognition", 2020.

    Example:
      >>> w = jnp.asarray([[9.0, 1.0, 2.0], [9.0, 1.0, 2.0]])  # [in, out]: a row of the papers is an output
      >>> constraint = compressx.bsp_rows(keep=2)
      >>> print(constraint.project(w, constraint.init(w)))
      [[9. 0. 2.]
       [9. 0. 2.]]
    """
    _check(density, keep, strips, blocks)

    def left(m: Array, mask: Any) -> Array:
        return jnp.where(mask, m, jnp.zeros((), m.dtype)) if chained else m

    def select(m: Array, mask: Any) -> Array:
        t = left(m, mask).T
        rows = _spread(_lines(t, density, keep, strips, blocks), t).T
        return rows & mask if chained else rows

    def alive(m: Array, mask: Any) -> Array:
        t = left(m, mask).T
        rows = _spread(_energy(t, strips) > 0, t).T
        return rows & mask if chained else rows

    return matrix_set(scope, lambda m: nonzero(m) if chained else (), select, alive)


@factory
def bsp(
    column_density: float | None = None,
    row_density: float | None = None,
    *,
    keep_columns: int | None = None,
    keep_rows: int | None = None,
    column_strips: int = 4,
    column_blocks: int = 1,
    row_strips: int = 1,
    row_blocks: int = 1,
    scope: str = "leaf",
) -> Constraint:
    """Both steps of BSP as one set: so many columns in every horizontal strip, and so many rows in every vertical one.

    The exact joint projection is a combinatorial problem. This one keeps the columns of largest energy, then the rows
    of largest energy *of what is left*, which is exact for the rows given the columns; the second step never revives
    what the first removed. One Z in ADMM; `bsp_columns(...) & bsp_rows(...)` has two. The papers' chain, step 1 trained
    to the end before step 2 starts, is `bsp_columns`, hardened, then `bsp_rows(chained=True)`.

    Args:
      column_density, keep_columns, column_strips, column_blocks: of `bsp_columns`.
      row_density, keep_rows, row_strips, row_blocks: of `bsp_rows`.
      scope: "leaf" or "rule".

    Source: P. Dong et al., "RTMobile: Beyond Real-Time Mobile Acceleration of RNNs for Speech Recognition", 2020.

    Example:
      >>> w = jnp.asarray([[9.0, 8.0, 1.0, 1.0], [1.0, 1.0, 9.0, 7.0]])  # [in, out]
      >>> constraint = compressx.bsp(keep_columns=1, keep_rows=2, column_strips=2)
      >>> print(constraint.project(w, constraint.init(w)))
      [[9. 0. 0. 0.]
       [0. 0. 9. 0.]]
    """
    _check(column_density, keep_columns, column_strips, column_blocks, "column")
    _check(row_density, keep_rows, row_strips, row_blocks, "row")

    def select(m: Array, _: Any) -> Array:
        columns = _spread(_lines(m, column_density, keep_columns, column_strips, column_blocks), m)
        t = jnp.where(columns, m, jnp.zeros((), m.dtype)).T
        return columns & _spread(_lines(t, row_density, keep_rows, row_strips, row_blocks), t).T

    def alive(m: Array, _: Any) -> Array:
        return _spread(_energy(m, column_strips) > 0, m) & _spread(_energy(m.T, row_strips) > 0, m.T).T

    return matrix_set(scope, lambda m: (), select, alive)


def strip_sizes(n: int, strips: int) -> list[int]:
    """Lengths of the strips: floor(n / strips), and the last takes the remainder; ValueError where one is empty."""
    if strips > n:
        raise ValueError(f"cannot cut {n} lines into {strips} strips")
    size = n // strips
    return [size] * (strips - 1) + [n - size * (strips - 1)]


def _check(density: float | None, keep: int | None, strips: int, blocks: int, of: str = "") -> None:
    check_amount(density, keep, of)
    if strips < 1 or blocks < 1:
        raise ValueError(f"strips and blocks must be at least 1, got {strips} and {blocks}")


def _energy(m: Array, strips: int) -> Array:
    """Energy of every line (row of m) in every strip (cut of m's columns): `[R, C] -> [R, strips]`."""
    e = energy(m)
    head = sum(strip_sizes(m.shape[1], strips)[:-1])
    parts = [jnp.sum(e[:, head:], axis=1, keepdims=True)]
    if strips > 1:
        parts.insert(0, jnp.sum(e[:, :head].reshape(m.shape[0], strips - 1, -1), axis=2))
    return jnp.concatenate(parts, axis=1)


def _lines(m: Array, density: float | None, keep: int | None, strips: int, blocks: int) -> Array:
    """Which lines stay in every strip, chosen in each block of lines apart: bool `[R, strips]`."""
    e = _energy(m, strips)
    sizes = strip_sizes(m.shape[0], blocks)
    head = sum(sizes[:-1])
    parts = [top_k_mask(e[head:], count(density, sizes[-1], keep, "lines of a block"), axis=0)]
    if blocks > 1:
        k = count(density, sizes[0], keep, "lines of a block")
        parts.insert(0, top_k_mask(e[:head].reshape(blocks - 1, sizes[0], strips), k, axis=1).reshape(head, strips))
    return jnp.concatenate(parts, axis=0)


def _spread(lines: Array, m: Array) -> Array:
    """A decision for every (line, strip) as a mask of m's shape."""
    sizes = strip_sizes(m.shape[1], lines.shape[1])
    return lines[:, np.repeat(np.arange(len(sizes)), sizes)]
