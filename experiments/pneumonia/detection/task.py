"""Detection as the training takes it: the loss and score of a batch, and the detections of a data set."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common.data import batches
from experiments.common.training.state import Sums, Task
from experiments.pneumonia.detection.augment import random_view
from experiments.pneumonia.detection.heads import Geometry, decode
from experiments.pneumonia.detection.loss import yolo_loss
from experiments.pneumonia.detection.nms import Detections, non_maximum_suppression
from experiments.pneumonia.detection.score import Found


def detection(
    apply: Callable[..., Any],
    prepare: Callable[[Array], Array],
    geometry: Geometry,
    *,
    augment: Mapping[str, Any] | None = None,
    positive: float = 1.0,
) -> Task:
    """Training of a YOLO detector on batches `inputs` uint8 `[n, h, w, c]`, `boxes` (x, y, w, h) `[n, m, 4]`, `count`.

    The loss is the mean of `yolo_loss` over the images (with a teacher, mixed with the mean squared distance of the
    raw heads to the teacher's). What the records call accuracy is that of the decision per image, whether any box has
    an objectness of a half or more: cheap, and no detection score.

    Args:
      apply: of a Linen module with three heads.
      prepare: stored inputs to what the network reads.
      geometry: cells and anchors.
      augment: options of `random_view`, or None.
      positive: see `yolo_loss`.
    """

    def count_right(heads: Any, count: Array) -> Array:
        return (decode(heads, geometry).objectness.max(-1) >= 0) == (count > 0)

    def kinds(batch: Any) -> Array:
        return batch["kinds"] if "kinds" in batch else jnp.zeros(batch["boxes"].shape[:2], jnp.int32)

    def loss(params: Any, stats: Any, batch: Any, key: Array, fit: Any, teacher: Any) -> tuple[Array, tuple[Any, Sums]]:
        inputs, boxes, count = batch["inputs"], batch["boxes"], batch["count"]
        if augment is not None and fit.augment:
            inputs, boxes, count = random_view(key, inputs, boxes, count, **augment)
        x = prepare(inputs)
        if stats:
            heads, stats = apply({**params, **stats}, x, train=True, mutable=list(stats))
        else:
            heads = apply(params, x, train=True)
        each = yolo_loss(heads, boxes, kinds(batch), count, geometry, positive=positive)
        value = each.mean()
        if teacher is not None:
            wanted = jax.lax.stop_gradient(apply({**teacher[0], **teacher[1]}, x, train=False))
            gap = sum(jnp.square(a - b).mean() for a, b in zip(heads, wanted, strict=True))
            value = (1 - fit.distill) * value + fit.distill * gap
        right = jnp.sum(count_right(heads, count), dtype=jnp.int32)
        n = inputs.shape[0]
        return value, (stats, Sums(value * n, right, jnp.int32(n)))

    def score(params: Any, stats: Any, batch: Any, valid: Array) -> Sums:
        heads = apply({**params, **stats}, prepare(batch["inputs"]), train=False)
        each = yolo_loss(heads, batch["boxes"], kinds(batch), batch["count"], geometry, positive=positive)
        right = count_right(heads, batch["count"]) & valid
        total = jnp.sum(jnp.where(valid, each, 0.0))
        return Sums(total, jnp.sum(right, dtype=jnp.int32), jnp.sum(valid, dtype=jnp.int32))

    return Task(loss, score)


def predictor(
    apply: Callable[[Any, Array], Any],
    prepare: Callable[[Array], Array],
    geometry: Geometry,
    *,
    threshold: float = 0.45,
    least: float = 0.005,
    most: int = 64,
) -> Callable[[Any, Array], Detections]:
    """`find(variables, inputs uint8 [n, h, w, c]) -> Detections`, jitted; see `non_maximum_suppression`.

    Args:
      apply: `apply(variables, x) -> heads`: a module's in evaluation mode, or that of a compact network.
      prepare: stored inputs to what the network reads.
      geometry: cells and anchors.
      threshold: IoU of the suppression.
      least: lowest score that is reported.
      most: boxes an image.
    """

    @jax.jit
    def find(variables: Any, inputs: Array) -> Detections:
        found = decode(apply(variables, prepare(inputs)), geometry)
        return non_maximum_suppression(found, geometry.size, threshold, least, most)

    return find


def find_all(
    find: Callable[[Any, Array], Detections], variables: Any, data: Mapping[str, Any], batch: int
) -> list[Found]:
    """Detections beside true boxes for every image of a data set, on the host.

    Args:
      find: from `predictor`.
      variables: of the network.
      data: arrays `inputs`, `boxes`, `count` as the task takes them.
      batch: images a step; a last, shorter batch is filled up.
    """
    images: list[Found] = []
    rows, valid = batches.cover(len(data["count"]), min(batch, len(data["count"])))
    for r, v in zip(rows, valid, strict=True):
        got = jax.device_get(find(variables, jnp.asarray(data["inputs"][r])))
        for i in np.flatnonzero(v):
            kept = np.flatnonzero(got.valid[i])
            xywh = np.asarray(data["boxes"][r[i]][: int(data["count"][r[i]])], np.float64)
            truth = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], -1)
            images.append(Found(got.boxes[i][kept].astype(np.float64), got.scores[i][kept].astype(np.float64), truth))
    return images
