"""The layer-wise problem: the leaf as matrices, the damped Gram matrix, and coordinates in which it is well scaled.

    minimise over W in S   1/2 tr (W - A)' H (W - A)

for every leaf, A being the target (its own dense weights, unless another is given). H is damped by a share of its mean
diagonal before anything is divided by it, so that dead inputs and a singular H do no harm.

In *row coordinates* every row of W is multiplied by s = sqrt(diag H), so that H has a unit diagonal. Supports and signs
are sets that such a scaling maps onto themselves. Magnitudes that are tied to each other are not, so sets with ties are
solved in *uniform coordinates*, s = sqrt(mean diag H). Levels are unscaled, projected and scaled again.
"""

from functools import cached_property
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from compressx.axes import DEFAULTS, Axes
from compressx.capture.matrix import Gram, MatrixView, matrix_view

Matrices = NDArray[np.float64]  # [G, P, F], or [G, P, P] of a Gram matrix


class Layout(NamedTuple):
    """How one leaf is stored, and how it is read as matrices; hashable.

    Attributes:
      shape: of the leaf as it is stored.
      axes: what its axes are; Flax's where nobody has said.
      groups: feature groups of a convolution.
      dtype: of the leaf, by name.
      said: whether a rule has said the axes, so that a constraint sees the leaf in its own layout.
    """

    shape: tuple[int, ...]
    axes: Axes
    groups: int
    dtype: str
    said: bool

    @property
    def view(self) -> MatrixView:
        return matrix_view(self.shape, self.axes, self.groups)

    def matrices(self, x: Any) -> Array:
        """A leaf, as a constraint sees it, as `[G, P, F]`."""
        return self.view.to(self.axes.back(x, self.shape) if self.said else x)

    def leaf(self, m: Any) -> Array:
        """Inverse of `matrices`."""
        w = self.view.back(m)
        return self.axes.to(w) if self.said else w


def layout_of(w: Any, axes: Axes | None, matrices: int | None, name: str) -> Layout:
    """The layout of a leaf of which a Gram statistic holds so many matrices.

    Raises:
      ValueError: the matrices are no multiple of the leaf's stack, or nobody has said what its axes are.
    """
    shape = tuple(w.shape)
    words = axes or (Axes(DEFAULTS[len(shape)]) if len(shape) in DEFAULTS else None)
    if words is None and len(shape) == 1:
        words = Axes(("out",))
    if words is None:
        raise ValueError(f'{name}: a leaf {shape} of {len(shape)} axes; say what they are, axes="stack in out"')
    words.fits(shape)
    stack = int(np.prod([n for n, word in zip(shape, words.words, strict=True) if word == "stack"], dtype=int))
    held = stack if matrices is None else matrices
    if held % stack:
        raise ValueError(f"{name}: H holds {held} matrices, which is no multiple of the {stack} layers of the leaf")
    return Layout(shape, words, held // stack, str(w.dtype), axes is not None)


class Scaled(NamedTuple):
    """The arrays of one leaf's problem in scaled coordinates, float32.

    Attributes:
      h: damped H, `[G, P, P]`, its diagonal 1 (in row coordinates) or 1 in the mean.
      vectors: eigenvectors of h in columns, `[G, P, P]`.
      values: its eigenvalues, `[G, P, 1]`.
      s: the scale of each row, `[G, P, 1]`.
    """

    h: Array
    vectors: Array
    values: Array
    s: Array


class Factored:
    """A Gram matrix, damped and factored once for all sets that are solved on it.

    Args:
      gram: statistics of the inputs of a leaf.
      damp: share of the mean diagonal of H that is added to it.
      name: of the leaf, for the text of an error.

    Raises:
      ValueError: H holds NaN or infinity, is not square or symmetric, has a negative diagonal, or is all zero.
    """

    def __init__(self, gram: Gram, damp: float = 0.01, name: str = "the leaf") -> None:
        h = np.asarray(gram.h, np.float64)
        if h.ndim != 3 or h.shape[1] != h.shape[2]:
            raise ValueError(f"{name}: H must be [groups, inputs, inputs], got shape {h.shape}")
        if not np.isfinite(h).all():
            raise ValueError(f"{name}: H holds NaN or infinity; the inputs of this layer were not finite")
        diagonal = np.einsum("gpp->gp", h)
        if (diagonal < 0).any() or not np.allclose(h, h.transpose(0, 2, 1), rtol=1e-6, atol=1e-9 * np.abs(h).max()):
            raise ValueError(f"{name}: H is no Gram matrix: it must be symmetric with a diagonal of at least 0")
        if not diagonal.any():
            raise ValueError(f"{name}: H is 0: no example gave this layer any input but zeros")
        self.h, self.rows, self.damp, self.name = h, gram.rows, damp, name
        mean = diagonal.mean(1)
        # a group of dead inputs alone takes the damping of the others
        self.damping = damp * np.where(mean > 0, mean, mean.mean())

    @cached_property
    def damped(self) -> Matrices:
        return self.h + self.damping[:, None, None] * np.eye(self.h.shape[1])

    @cached_property
    def row_scaled(self) -> Scaled:
        """Row coordinates: s = sqrt(diag H)."""
        return self._scaled(np.sqrt(np.einsum("gpp->gp", self.damped)))

    @cached_property
    def uniform(self) -> Scaled:
        """Uniform coordinates: one s for the leaf."""
        mean = np.sqrt(np.einsum("gpp->gp", self.damped).mean())
        return self._scaled(np.full(self.h.shape[:2], mean))

    def _scaled(self, s: Matrices) -> Scaled:
        h = self.damped / (s[:, :, None] * s[:, None, :])
        values, vectors = np.linalg.eigh(h)
        parts = (h, vectors, np.maximum(values, 0.0)[..., None], s[..., None])
        return Scaled(*(jnp.asarray(x, jnp.float32) for x in parts))

    def cost(self, w: Any, target: Matrices) -> float:
        """tr (W - A)' H (W - A), H undamped."""
        return quadratic(self.h, np.asarray(w, np.float64) - target)

    def error(self, w: Any, target: Matrices) -> float:
        """The cost as a share of tr A' H A; 0 where both are 0."""
        whole, cost = quadratic(self.h, target), self.cost(w, target)
        return cost / whole if whole > 0 else float(cost > 0)


def quadratic(h: Matrices, d: Matrices) -> float:
    """tr D' H D, summed over the groups."""
    return float(np.einsum("gpf,gpf->", d, h @ d))


def without_statistics(layout: Layout, weight: float) -> Factored:
    """A leaf that is in no product (a bias, a normalisation), in a joint rule: a multiple of the Euclidean distance."""
    view = layout.view
    h = np.broadcast_to(weight * np.eye(view.rows), (view.groups, view.rows, view.rows))
    return Factored(Gram(h, view.rows, np.zeros((view.groups, view.rows))), 0.0)
