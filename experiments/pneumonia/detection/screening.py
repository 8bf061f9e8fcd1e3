"""The decision per image, "is there an opacity": how well probabilities rank, decide and match frequencies."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Interval(NamedTuple):
    """A figure with its confidence interval; `resamples` is how many bootstrap samples gave one."""

    value: float
    low: float
    high: float
    resamples: int


class Operating(NamedTuple):
    """A point of the ROC curve: images with a probability of at least `threshold` are called positive."""

    sensitivity: float
    specificity: float
    threshold: float


class Reliability(NamedTuple):
    """Predicted probabilities beside frequencies.

    Attributes:
      predicted: mean probability of each bin that has images, float64 `[b]`.
      observed: share of positives in it.
      count: images in it, int64 `[b]`.
      error: expected calibration error, the mean of |predicted - observed| over images.
    """

    predicted: Array
    observed: Array
    count: npt.NDArray[np.int64]  # type: ignore[assignment]  # a tuple has a method of that name
    error: float


def _check(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[npt.NDArray[np.bool_], Array]:
    y, s = np.asarray(labels), np.asarray(scores, np.float64)
    if y.ndim != 1 or y.shape != s.shape or not np.isfinite(s).all() or not np.isin(y, (0, 1)).all():
        raise ValueError(f"labels must be 0 or 1 and scores finite, both [n]; got {y.dtype} {y.shape} and {s.shape}")
    return y.astype(bool), s


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """P(score of a positive > score of a negative) + P(equal) / 2: the area under the ROC curve.

    Args:
      labels: 0 or 1 `[n]`.
      scores: higher is more positive `[n]`.

    Returns:
      In 0..1; NaN where one class is missing.

    Source: Mann, Whitney, "On a Test of Whether one of Two Random Variables is Stochastically Larger", 1947.
    """
    y, s = _check(labels, scores)
    return _auc(y, s)


def _auc(y: npt.NDArray[np.bool_], s: Array) -> float:
    positive, negative = int(y.sum()), int((~y).sum())
    if not positive or not negative:
        return float("nan")
    _, group, size = np.unique(s, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2.0)[group]  # the mean rank of equal scores
    return float((rank[y].sum() - positive * (positive + 1) / 2.0) / (positive * negative))


def auc_interval(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """`auc` with its percentile bootstrap interval; whole groups (patients) are drawn, for their images are alike.

    Args:
      labels: 0 or 1 `[n]`.
      scores: `[n]`.
      groups: `[n]`, which images belong to one patient; None: each is its own.
      resamples: bootstrap samples; those in which one class is missing are left out.
      level: of the interval.
      seed: of the draws.
    """
    y, s = _check(labels, scores)
    owner = np.arange(len(y)) if groups is None else groups
    return bootstrap(lambda rows: _auc(y[rows], s[rows]), owner, resamples=resamples, level=level, seed=seed)


def bootstrap(
    figure: Callable[[npt.NDArray[np.intp]], float],
    groups: npt.ArrayLike,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """A figure of images with its percentile bootstrap interval; whole groups (patients) are drawn.

    The difference of two networks on the same images is such a figure: both are then judged on the same draws.

    Args:
      figure: `figure(rows) -> value` of the images `rows`, which may repeat; NaN where there is none.
      groups: `[n]`, which images belong together.
      resamples: bootstrap samples; those without a value are left out.
      level: of the interval.
      seed: of the draws.

    Source: Efron, Tibshirani, "An Introduction to the Bootstrap", 1993, section 13.3.
    """
    owner: npt.NDArray[Any] = np.unique(np.asarray(groups), return_inverse=True)[1]
    rows = [np.flatnonzero(owner == g) for g in range(int(owner.max(initial=-1)) + 1)]
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(resamples if rows else 0):
        values.append(figure(np.concatenate([rows[g] for g in rng.integers(len(rows), size=len(rows))])))
    kept = np.array([v for v in values if not np.isnan(v)])
    ends = np.quantile(kept, [(1 - level) / 2, (1 + level) / 2]) if kept.size else np.full(2, np.nan)
    return Interval(figure(np.arange(owner.size)), float(ends[0]), float(ends[1]), int(kept.size))


def sensitivity_at(labels: npt.ArrayLike, scores: npt.ArrayLike, specificity: float = 0.9) -> Operating:
    """The highest sensitivity among all thresholds with at least that specificity.

    Args:
      labels: 0 or 1 `[n]`.
      scores: `[n]`.
      specificity: share of negatives that must be called negative, in [0, 1].

    Returns:
      The operating point; its threshold is the lowest such score, infinity where nothing may be called positive.

    Raises:
      ValueError: a class is missing.
    """
    y, s = _check(labels, scores)
    if y.all() or not y.any():
        raise ValueError("sensitivity and specificity need positives and negatives")
    tried = np.append(np.unique(s), np.inf)
    called = np.array([(s[~y] < t).mean() for t in tried])
    place = int(np.argmax(called >= specificity))  # specificity rises with the threshold, sensitivity falls
    return Operating(float((s[y] >= tried[place]).mean()), float(called[place]), float(tried[place]))


def reliability(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 10) -> Reliability:
    """Frequencies beside probabilities, in `bins` equal bins of 0..1 (the last holds 1).

    Source: Guo et al., "On Calibration of Modern Neural Networks", 2017, section 2.
    """
    y, p = _check(labels, probabilities)
    if p.size and (p.min() < 0 or p.max() > 1):
        raise ValueError(f"probabilities must lie in 0..1, got {p.min()} to {p.max()}")
    place = np.minimum((p * bins).astype(np.int64), bins - 1)
    used, count = np.unique(place, return_counts=True)
    predicted = np.array([p[place == b].mean() for b in used])
    observed = np.array([y[place == b].mean() for b in used])
    error = float((np.abs(predicted - observed) * count).sum() / max(len(p), 1))
    return Reliability(predicted, observed, count.astype(np.int64), error)
