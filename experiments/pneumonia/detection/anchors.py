"""Anchors: the box sizes that a detector starts from, by k-means on the boxes of the training set."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Anchors(NamedTuple):
    """Anchors of a data set.

    Attributes:
      sizes: float64 `[k, (w, h)]`, by falling area: the order of heads at strides 32, 16, 8.
      mean_iou: mean over the boxes of the IoU with their best anchor, centres aligned.
      iterations: that k-means took, all starts together.
    """

    sizes: Array
    mean_iou: float
    iterations: int


def size_iou(a: Array, b: Array) -> Array:
    """IoU of boxes `[n, (w, h)]` and `[m, (w, h)]` whose centres coincide, `[n, m]`."""
    shared = np.minimum(a[:, None, 0], b[None, :, 0]) * np.minimum(a[:, None, 1], b[None, :, 1])
    return shared / (a.prod(1)[:, None] + b.prod(1)[None, :] - shared)


def kmeans_anchors(sizes: npt.ArrayLike, k: int = 9, seed: int = 0, starts: int = 8, iterations: int = 300) -> Anchors:
    """Groups box sizes into k anchors by the distance 1 - IoU of boxes with one centre.

        argmin over k sizes a_j of  sum_i min_j (1 - IoU(b_i, a_j)),   approached by Lloyd's steps:
        each box to its nearest anchor, each anchor to the median of its boxes.

    Starts are k-means++ under the same distance. The best of all steps of all starts is returned. With fewer than k
    distinct sizes, those that exist are repeated, scaled by 1 +- 1 %.

    Args:
      sizes: `[n, (w, h)]`, positive.
      k: number of anchors.
      seed: of the starts.
      starts: how many; Lloyd's steps from one may end in a poor place.
      iterations: at most so many steps from each.

    Raises:
      ValueError: no boxes, a size that is not positive and finite, or k < 1.

    Source: Redmon, Farhadi, "YOLO9000: Better, Faster, Stronger", 2017, section 2 (dimension clusters).
    """
    boxes = np.asarray(sizes, np.float64)
    if k < 1 or boxes.ndim != 2 or boxes.shape[0] < 1 or boxes.shape[1] != 2:
        raise ValueError(f"anchors need k >= 1 and boxes [n, 2] with n >= 1, got k={k} and {list(boxes.shape)}")
    bad = ~(np.isfinite(boxes) & (boxes > 0)).all(1)
    if bad.any():
        first = int(np.argmax(bad))
        raise ValueError(f"box {first} has the size {boxes[first].tolist()}; it must be positive")
    rng = np.random.default_rng(seed)
    best, best_value, steps = boxes[:0], -1.0, 0
    for _ in range(starts):
        anchors = _start(boxes, k, rng)
        for _ in range(iterations):
            overlap = size_iou(boxes, anchors)
            nearest, value = overlap.argmax(1), float(overlap.max(1).mean())
            steps += 1
            if value > best_value:
                best, best_value = anchors, value
            groups = [boxes[nearest == j] for j in range(k)]
            moved = np.array([np.median(g, 0) if len(g) else a for g, a in zip(groups, anchors, strict=True)])
            if np.array_equal(moved, anchors):
                break
            anchors = moved
    return Anchors(best[np.argsort(-best.prod(1), kind="stable")], best_value, steps)


def _start(boxes: Array, k: int, rng: np.random.Generator) -> Array:
    chosen = [boxes[rng.integers(len(boxes))]]
    while len(chosen) < k:
        gap = np.maximum(1.0 - size_iou(boxes, np.array(chosen)).max(1), 0.0)
        if gap.sum() > 1e-12:
            chosen.append(boxes[rng.choice(len(boxes), p=gap / gap.sum())])
        else:
            scale = 1.0 + 0.01 * (len(chosen) // 2 + 1) * (-1) ** len(chosen)
            chosen.append(chosen[len(chosen) % max(1, len(np.unique(boxes, axis=0)))] * scale)
    return np.array(chosen)
