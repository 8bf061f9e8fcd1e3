"""Average precision: the area under precision against recall, over all confidences."""

from collections.abc import Sequence

import numpy as np

from experiments.pneumonia.detection.score import Array, Found, match, overlaps

RANGE = tuple(round(0.40 + 0.05 * i, 2) for i in range(8))


def average_precision(images: Sequence[Found], threshold: float = 0.5) -> float:
    """The area under the precision-recall curve at one IoU threshold, precision made non-increasing in recall.

        AP = sum over hits i of  (1 / boxes) * max over j >= i of precision(j)

    Predictions of all images are ranked together by falling confidence (ties in image order), and match as in
    `score.match` within their image.

    Args:
      images: of one class, negative ones included: what is found there is a false positive.
      threshold: an IoU of at least this is a hit.

    Returns:
      In 0..1; NaN where there is no true box.

    Source: Everingham et al., "The PASCAL Visual Object Classes Challenge", 2010 form, all points.
    """
    total = sum(len(image.truth) for image in images)
    if not total:
        return float("nan")
    scores, hits = [np.zeros(0)], [np.zeros(0, bool)]
    for image in images:
        order = np.argsort(-image.scores, kind="stable")
        scores.append(image.scores[order])
        hits.append(match(overlaps(image.boxes[order].reshape(-1, 4), image.truth.reshape(-1, 4)), threshold))
    order = np.argsort(-np.concatenate(scores), kind="stable")
    return _area(np.concatenate(hits)[order].astype(np.float64), total)


def _area(hits: Array, total: int) -> float:
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float((envelope * hits).sum() / total)


def mean_average_precision(images: Sequence[Found], thresholds: Sequence[float] = RANGE) -> float:
    """Mean of `average_precision` over IoU thresholds, 0.40, 0.45, ..., 0.75 by default."""
    return float(np.mean([average_precision(images, t) for t in thresholds]))
