"""Non-maximum suppression with fixed shapes: of boxes that overlap, the one with the highest score stays."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.pneumonia.detection.boxes import iou
from experiments.pneumonia.detection.heads import Decoded


class Detections(NamedTuple):
    """Boxes found in images, by falling score; rows that are not `valid` are filled up and mean nothing.

    Attributes:
      boxes: corners in pixels, inside the image, `[n, k, 4]`.
      scores: objectness times class probability, float32 `[n, k]`, 0 where not valid.
      classes: int32 `[n, k]`.
      valid: bool `[n, k]`.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    valid: jax.Array


def suppress(boxes: jax.Array, classes: jax.Array, valid: jax.Array, threshold: float) -> jax.Array:
    """Which of the boxes stay: greedily, each that no better one which stays overlaps by more than the threshold.

    Args:
      boxes: corners `[k, 4]`, by falling score.
      classes: int32 `[k]`; only boxes of one class suppress each other.
      valid: bool `[k]`.
      threshold: IoU above which the worse box goes.

    Returns:
      bool `[k]`.
    """
    k = boxes.shape[0]
    clash = (iou(boxes, boxes) > threshold) & (classes[:, None] == classes[None, :])

    def step(i: jax.Array, stays: jax.Array) -> jax.Array:
        beaten = jnp.any(stays & clash[i] & (jnp.arange(k) < i))
        return stays.at[i].set(valid[i] & ~beaten)

    return jax.lax.fori_loop(0, k, step, jnp.zeros(k, bool))


def non_maximum_suppression(
    decoded: Decoded, size: tuple[int, int], threshold: float = 0.45, least: float = 0.005, most: int = 64
) -> Detections:
    """The boxes that a detector finds, after suppression; jits, all shapes fixed.

    A box's score is sigmoid(objectness) times the largest sigmoid of its classes. The `most` best boxes of an image
    are clipped to it and suppressed class by class.

    Args:
      decoded: from `decode`.
      size: (height, width) of the image.
      threshold: IoU above which the worse of two boxes goes.
      least: boxes of lower scores are left out.
      most: candidates of an image, and rows of the result.
    """
    likely = jax.nn.sigmoid(decoded.classes)
    score = jax.nn.sigmoid(decoded.objectness) * likely.max(-1)
    kind = jnp.argmax(likely, -1).astype(jnp.int32)
    most = min(most, score.shape[1])
    top, place = jax.lax.top_k(score, most)
    limit = jnp.array([size[1], size[0], size[1], size[0]], jnp.float32)[None, None]
    boxes = jnp.clip(jnp.take_along_axis(decoded.boxes, place[..., None], 1), 0.0, limit)
    kind = jnp.take_along_axis(kind, place, 1)
    valid = (top >= least) & (boxes[..., 2] > boxes[..., 0]) & (boxes[..., 3] > boxes[..., 1])
    stays = jax.vmap(lambda b, c, v: suppress(b, c, v, threshold))(boxes, kind, valid)
    order = jnp.argsort(~stays, axis=1, stable=True)  # those that stay first, still by falling score
    boxes = jnp.take_along_axis(boxes, order[..., None], 1)
    top, kind, stays = (jnp.take_along_axis(x, order, 1) for x in (top, kind, stays))
    return Detections(boxes, jnp.where(stays, top, 0.0), kind, stays)
