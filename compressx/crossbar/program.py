"""Programming: integer weights become arrays, and the formulation that runs what is simulated is picked."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from compressx.crossbar import tune
from compressx.crossbar.arrays import Programmed, lay_out
from compressx.crossbar.design import Design


def program(
    w: Any,
    design: Design,
    rows: Sequence[int] | np.ndarray | None = None,
    path: str | None = None,
    prove: bool = True,
    name: str = "weights",
) -> Programmed:
    """Lays integer weights on crossbars: compacted, cut into cells, and proven where that is possible.

    Args:
      w: integers `[P, F]` in `design.weight_range`.
      design: the engine.
      rows: the inputs whose weights are stored, in the order in which they lie on the word lines (`rows_of` takes it
        from a polarized structure); all others must be zero. None: rows with a non-zero weight, in order.
      path: how to run what is not proven; None picks: on a CPU by what was measured there ("table" for groups of up
        to 8 rows and a 1-bit DAC, else "popcount"), elsewhere by measuring once (`tune.fastest_path`).
      prove: False simulates every column, also those that cannot clip.
      name: of the weights, for messages.

    Returns:
      `Programmed`, for `crossbar_matmul`.

    Raises:
      ValueError: a weight is out of range, a group of a polarized design has both signs, or `rows` leaves out weights.

    Source: weights lie as in A. Shafiee et al., "ISAAC", 2016, and G. Yuan et al., "FORMS", 2021, section IV.

    Example:
      >>> from compressx.crossbar import forms
      >>> from compressx.crossbar.program import program
      >>> w = np.array([[0, 0], [3, 0], [1, 0]])  # a row and a column are empty
      >>> arrays = program(w, forms(4))
      >>> arrays.rows.tolist(), arrays.place.tolist(), arrays.proven_share
      ([1, 2], [0, 1], 1.0)
    """
    return lay_out(w, design, rows, path or tune.pick_path(design), prove, name)
