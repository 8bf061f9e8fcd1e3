"""The score of the RSNA Pneumonia Detection Challenge, and the choice of the confidence above which boxes count."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

THRESHOLDS = tuple(round(0.40 + 0.05 * i, 2) for i in range(8))  # 0.40, 0.45, ..., 0.75


class Found(NamedTuple):
    """What was found in an image and what is there.

    Attributes:
      boxes: predicted corners float64 `[k, 4]`.
      scores: their confidences `[k]`.
      truth: true corners `[m, 4]`.
    """

    boxes: Array
    scores: Array
    truth: Array


class Score(NamedTuple):
    """A challenge score.

    Attributes:
      value: mean over the images that count; NaN where none does.
      images: how many count.
      each: score of every image, NaN where it does not count.
    """

    value: float
    images: int
    each: Array


def overlaps(boxes: Array, truth: Array) -> Array:
    """IoU of corners `[k, 4]` and `[m, 4]`, float64 `[k, m]`."""
    a, b = boxes[:, None].astype(np.float64), truth[None].astype(np.float64)
    side = np.clip(np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2]), 0, None)
    shared = side.prod(-1)
    union = (a[..., 2:] - a[..., :2]).clip(0).prod(-1) + (b[..., 2:] - b[..., :2]).clip(0).prod(-1) - shared
    return np.divide(shared, union, out=np.zeros(np.broadcast_shapes(shared.shape, union.shape)), where=union > 0)


def match(overlap: Array, threshold: float) -> npt.NDArray[np.bool_]:
    """Which predictions hit: in the order of the rows, each takes the free true box that it overlaps most.

    Args:
      overlap: IoU `[k, m]`, predictions by falling confidence.
      threshold: an overlap of at least this is a hit.

    Returns:
      bool `[k]`; a true box is hit once, by the first that takes it.
    """
    free = overlap >= threshold
    hits = np.zeros(len(overlap), bool)
    for i in range(len(overlap)):
        if free[i].any():
            best = int(np.argmax(np.where(free[i], overlap[i], -1.0)))
            hits[i] = True
            free[:, best] = False
    return hits


def image_score(overlap: Array, thresholds: Sequence[float] = THRESHOLDS) -> float | None:
    """Mean over the thresholds of TP / (TP + FP + FN) of one image; None where there is nothing to find or found.

    Args:
      overlap: IoU `[k, m]` of its k predictions, by falling confidence, with its m true boxes.
      thresholds: of the IoU.
    """
    k, m = overlap.shape
    if not k and not m:
        return None
    if not k or not m:
        return 0.0
    hits = [int(match(overlap, t).sum()) for t in thresholds]
    return float(np.mean([tp / (k + m - tp) for tp in hits]))


def challenge_score(
    images: Sequence[Found], confidence: float = 0.0, thresholds: Sequence[float] = THRESHOLDS
) -> Score:
    """The challenge's score over images.

        score = mean over images of  mean over t in {0.40, 0.45, ..., 0.75} of  TP(t) / (TP(t) + FP(t) + FN(t))

    Predictions match greedily by falling confidence, a true box once; an IoU of exactly t is a hit, as in the public
    scoring code. An image without true boxes and without predictions is left out; any prediction on it scores 0.

    Args:
      images: see `Found`.
      confidence: predictions below it are left out.
      thresholds: of the IoU.

    Source: evaluation of the RSNA Pneumonia Detection Challenge, 2018.
    """
    return _score([_ranked(image) for image in images], confidence, thresholds)


class _Ranked(NamedTuple):
    scores: Array
    overlap: Array


def _ranked(image: Found) -> _Ranked:
    order = np.argsort(-image.scores, kind="stable")
    return _Ranked(image.scores[order], overlaps(image.boxes[order].reshape(-1, 4), image.truth.reshape(-1, 4)))


def _score(images: Sequence[_Ranked], confidence: float, thresholds: Sequence[float]) -> Score:
    each = np.full(len(images), np.nan)
    for i, image in enumerate(images):
        value = image_score(image.overlap[: int((image.scores >= confidence).sum())], thresholds)
        each[i] = np.nan if value is None else value
    counted = ~np.isnan(each)
    return Score(float(each[counted].mean()) if counted.any() else float("nan"), int(counted.sum()), each)


def _by_kept(overlap: Array, thresholds: Sequence[float]) -> Array:
    """`image_score` of an image's first 0, 1, ..., k predictions, `[k + 1]`; NaN where it is None.

    A prediction's match depends on those before it alone, so one pass serves every confidence.
    """
    k, m = overlap.shape
    hits = np.array([match(overlap, t) for t in thresholds]).reshape(len(thresholds), k)
    tp = np.concatenate([np.zeros((len(thresholds), 1)), np.cumsum(hits, 1)], 1)
    boxes = np.arange(k + 1) + m - tp
    return np.divide(tp, boxes, out=np.full(tp.shape, np.nan), where=boxes > 0).mean(0)


def choose_threshold(images: Sequence[Found]) -> tuple[float, float]:
    """The confidence with the best challenge score on these images, which must not be those that are reported.

    Every confidence that makes a difference is tried: each score that was given, and one above all of them.

    Args:
      images: of a validation set.

    Returns:
      (confidence, its score); of equal ones the highest confidence.
    """
    ranked = [_ranked(image) for image in images]
    scores = np.unique(np.concatenate([image.scores for image in ranked] or [np.zeros(0)]))
    # stricter than every score seen, and still below certainty: nothing found can be the best answer
    tried = np.append(scores, 0.5 * (scores[-1] + max(1.0, scores[-1])) if scores.size else 1.0)
    total, counted = np.zeros(tried.size), np.zeros(tried.size)
    for image in ranked:
        kept = image.scores.size - np.searchsorted(image.scores[::-1], tried)
        value = _by_kept(image.overlap, THRESHOLDS)[kept]
        total += np.nan_to_num(value)
        counted += ~np.isnan(value)
    means = np.divide(total, counted, out=np.full(tried.size, -1.0), where=counted > 0).round(12)
    best = float(tried[tried.size - 1 - int(np.argmax(means[::-1]))])
    return best, _score(ranked, best, THRESHOLDS).value
