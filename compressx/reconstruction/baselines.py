"""Baselines: published one-shot methods on the same matrices and the same H, in NumPy, one matrix at a time.

They are our own reading of their descriptions with their published constants; their public code was not run. Each
takes W `[P, F]` and H `[P, P]` (undamped) in float64 and gives weights `[P, F]`. A support is said by `Amount`: a share
of the matrix, or n of m consecutive rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Amount(NamedTuple):
    """How much a support keeps: a density of the whole matrix, or n of every m consecutive rows of a column."""

    density: float | None = None
    n: int = 0
    m: int = 0

    def kept(self, scores: Matrix, by_column: bool = False) -> Mask:
        """The mask of the largest scores; ties go to the lower index."""
        if self.density is None:
            grouped = scores.reshape(-1, self.m, scores.shape[1])
            place = np.argsort(np.argsort(-grouped, axis=1, kind="stable"), axis=1, kind="stable")
            return (place < self.n).reshape(scores.shape)
        if by_column:
            number = int(np.floor(self.density * scores.shape[0] + 0.5))
            place = np.argsort(np.argsort(-scores, axis=0, kind="stable"), axis=0, kind="stable")
            return place < number
        number = int(np.floor(self.density * scores.size + 0.5))
        mask = np.zeros(scores.size, bool)
        mask[np.argsort(-scores.ravel(), kind="stable")[:number]] = True
        return mask.reshape(scores.shape)


def damped(h: Matrix, share: float) -> Matrix:
    """H with a share of its mean diagonal added to it."""
    return h + share * np.diag(h).mean() * np.eye(len(h))


def wanda(w: Matrix, h: Matrix, amount: Amount) -> Matrix:
    """Weights of the largest |w| sqrt(H_ii), compared within each output; none is changed.

    Source: M. Sun, Z. Liu, A. Bair, J. Z. Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
    2023.
    """
    return np.where(amount.kept(np.abs(w) * np.sqrt(np.diag(h))[:, None], by_column=True), w, 0.0)


def inverse_factor(h: Matrix) -> Matrix:
    """The upper Cholesky factor of the inverse of H: row i holds the inverse of what is left when i rows are done."""
    factor: Matrix = np.linalg.cholesky(np.linalg.inv(h)).T
    return factor


def sparsegpt(w: Matrix, h: Matrix, amount: Amount, *, damp: float = 0.01, block: int = 128) -> Matrix:
    """Rows are pruned in turn, and the error of each is made up for by the rows after it.

    The mask is chosen for each block of rows (each group of m) before it is worked through, by w^2 / (H^-1)_ii.

    Source: E. Frantar, D. Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", 2023.
    """
    w, u = w.copy(), inverse_factor(damped(h, damp))
    for start in range(0, len(w), block):
        stop = min(start + block, len(w))
        diagonal = np.diag(u)[start:stop, None]
        mask = np.ones((stop - start, w.shape[1]), bool)
        if amount.density is not None:
            mask = amount.kept(np.square(w[start:stop] / diagonal))
        errors = np.zeros((stop - start, w.shape[1]))
        for i in range(start, stop):
            if amount.density is None and i % amount.m == 0:
                group = slice(i, i + amount.m)
                mask[i - start : i - start + amount.m] = amount.kept(np.square(w[group] / np.diag(u)[group, None]))
            kept = np.where(mask[i - start], w[i], 0.0)
            errors[i - start] = (w[i] - kept) / u[i, i]
            w[i] = kept
            w[i + 1 : stop] -= np.outer(u[i, i + 1 : stop], errors[i - start])
        w[stop:] -= u[start:stop, stop:].T @ errors
    return w


Rounding = Callable[[Matrix, int], Matrix]  # values of a row, and its number -> the levels nearest to them


def gptq(w: Matrix, h: Matrix, nearest: Rounding, *, damp: float = 0.01, sort: bool = True) -> Matrix:
    """Rows are rounded in turn, and the error of each is made up for by the rows after it.

    Args:
      w: weights.
      h: Gram matrix.
      nearest: rounds the values of a row; the scale is fixed.
      damp: share of the mean diagonal.
      sort: rows of the largest H_ii first.

    Source: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ", 2022.
    """
    order = np.argsort(-np.diag(h), kind="stable") if sort else np.arange(len(w))
    moved, u = w[order], inverse_factor(damped(h, damp)[np.ix_(order, order)])
    for i, row in enumerate(order):
        rounded = nearest(moved[i], int(row))
        error = (moved[i] - rounded) / u[i, i]
        moved[i] = rounded
        moved[i + 1 :] -= np.outer(u[i, i + 1 :], error)
    out = np.empty_like(moved)
    out[order] = moved
    return out


def awq(w: Matrix, h: Matrix, quantize: Callable[[Matrix], Matrix], *, grid: int = 20) -> Matrix:
    """Inputs are scaled by a power of their magnitude before rounding and scaled back after it, the best of a grid.

    Its weights lie on levels of another scale for every input, which the layer before has to undo: they are no point of
    a set with one scale. The magnitude of an input is sqrt(H_ii); the original takes the mean of |x|.

    Source: J. Lin et al., "AWQ: Activation-aware Weight Quantization", 2023.
    """
    magnitude = np.sqrt(np.diag(h))
    magnitude = np.maximum(magnitude, 1e-4 * magnitude.max())
    best, least = w, np.inf
    for power in range(grid):
        s = magnitude ** (power / grid)
        s = (s / np.sqrt(s.max() * s.min()))[:, None]
        made = quantize(w * s) / s
        d = made - w
        cost = float(np.einsum("pf,pf->", d, h @ d))
        if cost < least:
            best, least = made, cost
    return best


def l_admm(w: Matrix, h: Matrix, amount: Amount, *, damp: float = 0.1, steps: int = 20, gradual: int = 15) -> Matrix:
    """ADMM with rho = 1 in coordinates of unit diagonal; at first the mask is chosen anew, at a density that falls.

    Source: V. Boza, "Fast and Effective Weight Update for Pruned Large Language Models", 2024.
    """
    s = np.sqrt(np.maximum(np.diag(h), 1e-12 * np.diag(h).max()))[:, None]
    ht = damped(h / (s * s.T), damp)
    target = s * w
    inverse = np.linalg.inv(ht + np.eye(len(h)))
    pull = ht @ target
    x, u = target.copy(), np.zeros_like(target)
    mask = np.ones(w.shape, bool)
    for step in range(steps):
        if step < gradual and amount.density is not None:
            sparsity = (1 - amount.density) * (1 - (1 - (step + 1) / gradual) ** 3)
            mask = Amount(1 - sparsity).kept(np.abs(x + u))
        elif step < gradual:
            mask = amount.kept(np.abs(x + u))
        z = np.where(mask, x + u, 0.0)
        u = u + x - z
        x = inverse @ (pull + z - u)
    return np.where(mask, x + u, 0.0) / s


def alps(w: Matrix, h: Matrix, amount: Amount, *, damp: float = 0.01, steps: int = 300, refit: int = 10) -> Matrix:
    """ADMM whose rho grows by the share of the support that has changed, until none does; then conjugate gradients.

    Source: X. Meng, K. Behdin, H. Wang, R. Mazumder, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning
    for Large Language Models", 2024: rho 0.1, looked at every 3 iterations, times 1.3, 1.2 or 1.1.
    """
    hd = damped(h, damp)
    s = np.sqrt(np.diag(hd))[:, None]
    ht = hd / (s * s.T)
    values, vectors = np.linalg.eigh(ht)
    target = s * w
    pull = ht @ target
    mask = amount.kept(np.abs(target))
    number, seen, rho = int(mask.sum()), mask, 0.1
    d, v = np.where(mask, target, 0.0), np.zeros_like(target)
    for step in range(1, steps + 1):
        x = vectors @ ((vectors.T @ (pull - v + rho * d)) / (values + rho)[:, None])
        mask = amount.kept(np.abs(x + v / rho))
        d = np.where(mask, x + v / rho, 0.0)
        v = v + rho * (x - d)
        if step % 3 == 0:
            changed = int((mask & ~seen).sum())
            if changed == 0:
                break
            rho *= 1.3 if changed >= 0.1 * number else 1.2 if changed >= 0.005 * number else 1.1
            seen = mask
    return conjugate(ht, target, d, mask, refit) / s


def conjugate(h: Matrix, target: Matrix, x: Matrix, mask: Mask, steps: int) -> Matrix:
    """Conjugate gradients on a fixed support, every column by itself, preconditioned by the diagonal of H."""
    diagonal = np.diag(h)[:, None]
    r = np.where(mask, h @ (target - x), 0.0)
    z = r / diagonal
    p, rz = z, (r * z).sum(0)
    for _ in range(steps):
        hp = np.where(mask, h @ p, 0.0)
        curvature = (p * hp).sum(0)
        alpha = np.divide(rz, curvature, out=np.zeros_like(rz), where=curvature > 0)
        x, r = x + alpha * p, r - alpha * hp
        z = r / diagonal
        after = (r * z).sum(0)
        p = z + np.divide(after, rz, out=np.zeros_like(rz), where=rz > 0) * p
        rz = after
    return x
