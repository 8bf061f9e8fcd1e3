"""What density-adaptive pruning presumes of a trained matrix, measured before it is used.

    densities    magnitude pruning leaves the rows of a matrix very different shares of their weights
    sensitivity  rows differ in what pruning them costs (`constraints.darb.row_sensitivity`)
    retained     the largest weight of every block of a row recovers most of what magnitude pruning would keep

Source: A. Ren et al., "DARB: A Density-Adaptive Regular-Block Pruning for Deep Neural Networks", 2020, its three
observations.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import stats

from compressx.constraints.darb import block_max, row_density
from compressx.constraints.select import top_k_mask
from compressx.constraints.sparsity import block, columns


class Densities(NamedTuple):
    """Shares of the rows that magnitude pruning leaves.

    Attributes:
      rows: float64 `[R]`.
      low, middle, high: deciles 1, 5 and 9.
      dispersion: variance of the rows' counts over that of as many weights placed at random (hypergeometric); 1 is
        chance, above 1 the rows differ.
    """

    rows: np.ndarray
    low: float
    middle: float
    high: float
    dispersion: float


def densities(w: Any, density: float, axis: str = "outputs") -> Densities:
    """Row densities after one-shot magnitude pruning of a matrix `[in, out]` to a density."""
    rows = np.asarray(row_density(jnp.asarray(w), density, axis), np.float64)
    length, size = w.size // len(rows), w.size
    share = float(rows.mean())
    chance = length * share * (1 - share) * (size - length) / max(size - 1, 1)
    low, middle, high = np.quantile(rows, [0.1, 0.5, 0.9]).tolist()
    return Densities(rows, low, middle, high, float(np.var(rows * length) / chance) if chance else 1.0)


class Retained(NamedTuple):
    """What a structure keeps of a matrix.

    Attributes:
      kept: weights.
      energy: sum of their squares over that of the same number of largest weights, which no structure beats.
      overlap: share of them that are among those.
    """

    kept: float
    energy: float
    overlap: float


def retained(w: Any, size: int, tile: tuple[int, int] = (8, 8)) -> dict[str, Retained]:
    """Structures at (nearly) equal numbers of weights, by what they retain of a matrix `[in, out]`, without training.

    `block_max` keeps the largest weight of every `size`; `random_place` any one of them, in expectation, exactly;
    `block` whole tiles and `row` whole rows (what one input sends out) of largest energy, as many as come nearest.

    Args:
      w: concrete matrix.
      size: of a block along a row.
      tile: of `block`.
    """
    m = jnp.asarray(w)
    square = np.asarray(m, np.float64) ** 2
    rows, length = m.shape
    blocks = math.ceil(length / size)
    number = rows * blocks
    masks = {"block_max": np.asarray(block_max(size).project(m, ())) != 0}
    tiles = math.ceil(rows / tile[0]) * math.ceil(length / tile[1])
    masks["block"] = np.asarray(block(tile, keep=max(1, round(number / m.size * tiles))).project(m, ())) != 0
    masks["row"] = np.asarray(columns(keep=max(1, round(number / length))).project(m, ())) != 0
    out = {name: _against_best(square, mask, m) for name, mask in masks.items()}
    best = np.asarray(top_k_mask(jnp.abs(m), number))
    share = np.full((rows, length), 1.0 / size)
    share[:, (blocks - 1) * size :] = 1.0 / (length - (blocks - 1) * size)  # the ragged last block
    energy = float((share * square).sum() / square[best].sum())
    out["random_place"] = Retained(float(share.sum()), energy, float(share[best].sum() / number))
    return out


def _against_best(square: np.ndarray, mask: np.ndarray, m: Any) -> Retained:
    kept = int(mask.sum())
    best = np.asarray(top_k_mask(jnp.abs(m), kept))
    energy = float(square[mask].sum() / square[best].sum()) if kept else 0.0
    return Retained(float(kept), energy, float((mask & best).sum() / max(kept, 1)))


def spearman(a: Any, b: Any) -> float:
    """Rank correlation, ties at their mean rank; 0 where one side is constant."""
    x, y = (stats.rankdata(np.asarray(v, np.float64)) for v in (a, b))
    return float(np.corrcoef(x, y)[0, 1]) if np.ptp(x) and np.ptp(y) else 0.0
