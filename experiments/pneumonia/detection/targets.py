"""Which cell and anchor answers for which true box, and which predictions are not held against the network."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.common.models.yolov3 import ANCHORS_PER_HEAD
from experiments.pneumonia.detection.boxes import iou
from experiments.pneumonia.detection.heads import Decoded, Geometry


class Targets(NamedTuple):
    """What an image's predictions, in the order of `Geometry.cells`, should be.

    Attributes:
      owner: int32 `[number]`, the true box that a prediction answers for, -1 for none.
      offset: (x, y) in 0..1 inside the cell `[number, 2]`, where there is an owner.
      size: log(box / anchor) `[number, 2]`, likewise.
      weight: 2 - (box area / image area) `[number]`, likewise: small boxes count more.
      kind: class int32 `[number]`, likewise.
    """

    owner: jax.Array
    offset: jax.Array
    size: jax.Array
    weight: jax.Array
    kind: jax.Array


def assign(boxes: jax.Array, kinds: jax.Array, count: jax.Array, geometry: Geometry) -> Targets:
    """Gives every true box to one prediction: the cell of its centre, and the anchor whose size fits best.

    The fit is the IoU of box and anchor with one centre, over the anchors of all heads; ties go to the first. Of two
    boxes with one cell and anchor the later has it. Pure, jits, for one image (vmap for a batch).

    Args:
      boxes: `[m, (x, y, w, h)]` in pixels, rows from `count` on ignored, all inside the image.
      kinds: int32 `[m]`, classes.
      count: int32 [].
      geometry: cells and anchors.
    """
    m = boxes.shape[0]
    anchors = jnp.array(geometry.anchors, jnp.float32)
    size, centre = boxes[:, 2:], boxes[:, :2] + 0.5 * boxes[:, 2:]
    shared = jnp.minimum(size[:, None], anchors[None]).prod(-1)
    fit = shared / jnp.maximum(size.prod(-1)[:, None] + anchors.prod(-1)[None] - shared, 1e-9)
    best = jnp.argmax(fit, -1)
    head = best // ANCHORS_PER_HEAD
    grids = jnp.array(geometry.grids, jnp.int32)
    per_head = ANCHORS_PER_HEAD * grids.prod(-1)
    start = jnp.cumsum(per_head) - per_head
    stride = jnp.array(geometry.strides, jnp.float32)[head]
    position = centre / stride[:, None]
    cell = jnp.clip(position.astype(jnp.int32), 0, grids[head][:, ::-1] - 1)
    place = start[head] + (cell[:, 1] * grids[head, 1] + cell[:, 0]) * ANCHORS_PER_HEAD + best % ANCHORS_PER_HEAD
    real = jnp.arange(m) < count
    place = jnp.where(real & (size > 0).all(-1), place, geometry.number)
    later = (place[:, None] == place[None, :]) & (jnp.arange(m)[:, None] < jnp.arange(m)[None, :])
    place = jnp.where(later.any(-1), geometry.number, place)  # scattering two to one place has no order

    def spread(values: jax.Array, empty: float) -> jax.Array:
        start = jnp.full((geometry.number, *values.shape[1:]), empty, values.dtype)
        return start.at[place].set(values, mode="drop")

    area = size.prod(-1) / (geometry.size[0] * geometry.size[1])
    return Targets(
        owner=spread(jnp.arange(m, dtype=jnp.int32), -1),
        offset=spread(position - cell.astype(jnp.float32), 0),
        size=spread(jnp.log(jnp.maximum(size, 1e-3) / anchors[best]), 0),
        weight=spread(2.0 - area, 0),
        kind=spread(kinds, 0),
    )


def ignored(decoded: Decoded, boxes: jax.Array, count: jax.Array, threshold: float = 0.7) -> jax.Array:
    """Predictions that overlap some true box by more than the threshold: not punished for finding it as well.

    Args:
      decoded: of a batch.
      boxes: true boxes, corners `[n, m, 4]`.
      count: int32 `[n]`, how many of them are real.
      threshold: IoU.

    Returns:
      bool `[n, number]`.

    Source: the public configuration of YOLOv3 (`ignore_thresh = .7`).
    """
    real = jnp.arange(boxes.shape[1])[None] < count[:, None]
    overlap = jnp.where(real[:, None], iou(decoded.boxes, boxes), 0.0)
    return overlap.max(-1, initial=0.0) > threshold
