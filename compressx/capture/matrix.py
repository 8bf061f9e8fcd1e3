"""The matrix that a leaf is in its layer's product, and the Gram matrix of the inputs it is multiplied with.

A layer computes X W for every group of its leaf: X `[rows, P]` are its inputs (of a convolution the patches that its
stride visits), W `[P, F]` is the leaf as a matrix. G counts the matrices of one leaf: slices of a stack (layers or
experts) times the feature groups of a grouped or depthwise convolution, the stack outermost.

Rows of W are the axes "taps", then "in", each in the order in which they are stored: (kh, kw, cin) of Flax's
convolution. Columns are the axes "out". These are the rows and columns of `compressx.views.gemm`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jax import Array
from numpy.typing import NDArray

from compressx.axes import DEFAULTS, Axes, parse


class MatrixView(NamedTuple):
    """A pair of inverse functions between a stored leaf and its matrices; both jit.

    Attributes:
      to: `to(w)`, the leaf as `[G, P, F]`.
      back: `back(m)`, the leaf as it is stored; `back(to(w))` equals `w` exactly.
      groups: G, how many matrices the leaf is.
      rows: P, inputs of each.
      columns: F, outputs of each.

    Example:
      >>> view = matrix_view((3, 3, 2, 8), groups=4)  # a grouped convolution of 8 inputs
      >>> view.to(jnp.ones((3, 3, 2, 8))).shape
      (4, 18, 2)
    """

    to: Callable[[Any], Array]
    back: Callable[[Any], Array]
    groups: int
    rows: int
    columns: int


class Gram(NamedTuple):
    """Second moments of the inputs of one leaf, over all examples and positions.

    Attributes:
      h: X'X / rows, float64 `[G, P, P]`, as it is: nothing is added to its diagonal.
      rows: rows of X, which is examples times the positions of each.
      mean: of X, float64 `[G, P]`.

    Example:
      >>> x = np.asarray([[1.0, 2.0], [3.0, 4.0]])
      >>> Gram((x.T @ x / 2)[None], 2, x.mean(0)[None]).h.shape
      (1, 2, 2)
    """

    h: NDArray[np.float64]
    rows: int
    mean: NDArray[np.float64]


def matrix_view(shape: tuple[int, ...], axes: str | Axes | None = None, groups: int = 1) -> MatrixView:
    """The matrices of a leaf of this shape.

    Args:
      shape: of the leaf as it is stored.
      axes: what its axes are, as a rule says it (`"in out out"`); None: Flax's dense kernel or convolution.
      groups: feature groups of the convolution; group g multiplies outputs `g F .. (g + 1) F - 1` of the leaf.

    Returns:
      The pair of functions and the extents G, P and F.

    Raises:
      ValueError: nobody has said what the axes are, there are no outputs among them, or the outputs do not divide into
        the groups.

    Example:
      >>> view = matrix_view((64, 4, 16), "in out out")
      >>> view.groups, view.rows, view.columns
      (1, 64, 64)
    """
    shape = tuple(shape)
    words = parse(axes)
    if words is None:
        if len(shape) not in DEFAULTS:
            raise ValueError(f'a leaf {shape} of {len(shape)} axes: say what they are, for example axes="stack in out"')
        words = Axes(DEFAULTS[len(shape)])
    words.fits(shape)
    if "out" not in words.words:
        raise ValueError(f"axes {str(words)!r} name no outputs, so the leaf {shape} is no matrix of a product")
    sizes = {
        name: math.prod(n for n, w in zip(shape, words.words, strict=True) if w == name) for name in set(words.words)
    }
    stack, out = sizes.get("stack", 1), sizes["out"]
    rows = sizes.get("taps", 1) * sizes.get("in", 1)
    if groups < 1 or out % groups:
        raise ValueError(f"{out} outputs of a leaf {shape} do not divide into groups={groups}")
    columns = out // groups

    def to(w: Any) -> Array:
        m = words.to(w).reshape(stack, rows, groups, columns)
        return m.transpose(0, 2, 1, 3).reshape(stack * groups, rows, columns)

    def back(m: Any) -> Array:
        x = m.reshape(stack, groups, rows, columns).transpose(0, 2, 1, 3)
        return words.back(x, shape)

    return MatrixView(to, back, stack * groups, rows, columns)
