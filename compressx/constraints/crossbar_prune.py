"""Crossbar-aware pruning: filters and positions are pruned only where that frees whole crossbar arrays.

A matrix of p positions and f filters takes `ceil(p / rows) * ceil(f * cells / cols)` arrays of rows x cols cells, so
pruning to anything but a multiple of an array's rows or filters costs accuracy for nothing.

Source: G. Yuan et al., "FORMS: Fine-grained Polarized ReRAM-based In-situ Computation for Mixed-signal DNN
Accelerator", 2021, section III (structured pruning with the crossbar's size).
"""

import math

from jax import Array

from compressx.constraints.base import Constraint, check_density, count, factory, support
from compressx.constraints.sparsity import filters_and_columns


@factory
def crossbar_aware(
    filter_density: float | None = None,
    column_density: float | None = None,
    *,
    rows: int = 128,
    cols: int = 128,
    cells_per_weight: int = 4,
) -> Constraint:
    """At most f filters and p positions are non-zero, both rounded up until they fill their crossbar arrays.

        f = min(F, ceil(f' / w) * w),  w = cols / cells_per_weight filters in an array, f' = the count of filter_density
        p = min(P, ceil(p' / rows) * rows),                                           p' = the count of column_density

    So what the densities would prune beyond the last array that is freed is put back: the strongest of the pruned ones,
    as the f filters of largest energy stay, then the p positions of largest energy within them (`filters_and_columns`).
    A layer that fits one array is not pruned at all. `kept` tells the counts, `arrays` the arrays they take.

    Args:
      filter_density: share of filters (output channels) aimed at, in (0, 1] (alpha); None prunes none.
      column_density: share of positions (filter shapes, rows of the GEMM view) aimed at (beta); None prunes none.
      rows: rows of an array (one position each).
      cols: columns of an array (cells).
      cells_per_weight: columns that one weight takes: 8 bits in cells of 2 are 4; twice that where positive and
        negative weights have arrays of their own. It must divide `cols`.

    Raises:
      ValueError: a size is below 1, `cells_per_weight` does not divide `cols`, or both densities are None.

    Source: G. Yuan et al., "FORMS", 2021, section III (structured pruning that frees whole crossbars).

    Example:
      >>> w = jnp.arange(1.0, 41.0).reshape(10, 4)
      >>> z = compressx.crossbar_aware(column_density=0.3, rows=4, cols=16).project(w, ())
      >>> int(jnp.sum(jnp.any(z != 0, axis=1)))  # 3 positions fill no array of 4 rows: 4 stay
      4
    """
    if filter_density is None and column_density is None:
        raise ValueError("give filter_density, column_density or both; with neither nothing would be pruned")
    for name, density in (("filter_density", filter_density), ("column_density", column_density)):
        if density is not None:
            check_density(density, name)
    _check_array(rows, cols, cells_per_weight)

    def pruned(w: Array) -> Constraint:
        p, f = kept(w.shape, filter_density, column_density, rows, cols, cells_per_weight)
        return filters_and_columns(keep_filters=f, keep_columns=p)

    def alive(w: Array) -> Array:
        mask: Array = pruned(w).freeze(w, ())
        return mask

    return support(lambda w: alive(pruned(w).project(w, ())), alive)


def kept(
    shape: tuple[int, ...],
    filter_density: float | None,
    column_density: float | None,
    rows: int = 128,
    cols: int = 128,
    cells_per_weight: int = 4,
) -> tuple[int, int]:
    """How many positions and filters of a weight of this shape `crossbar_aware` keeps: (p, f)."""
    _check_array(rows, cols, cells_per_weight)
    if len(shape) < 2:
        raise ValueError(f"a crossbar holds a matrix: the weight needs at least 2 axes, got shape {tuple(shape)}")
    positions, filters = math.prod(shape[:-1]), shape[-1]
    p = positions if column_density is None else count(column_density, positions, what="positions", quiet=True)
    f = filters if filter_density is None else count(filter_density, filters, what="filters", quiet=True)
    wide = cols // cells_per_weight
    return min(positions, -(-p // rows) * rows), min(filters, -(-f // wide) * wide)


def arrays(positions: int, filters: int, rows: int = 128, cols: int = 128, cells_per_weight: int = 4) -> int:
    """Crossbar arrays that a matrix takes: ceil(positions / rows) * ceil(filters * cells_per_weight / cols)."""
    return -(-positions // rows) * -(-filters * cells_per_weight // cols)


def _check_array(rows: int, cols: int, cells_per_weight: int) -> None:
    for name, value in (("rows", rows), ("cols", cols), ("cells_per_weight", cells_per_weight)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if cols % cells_per_weight:
        raise ValueError(f"cells_per_weight={cells_per_weight} does not divide cols={cols}: a weight lies in one array")
