"""The loss of YOLOv3's raw heads against the true boxes of the images."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from experiments.pneumonia.detection.boxes import corners
from experiments.pneumonia.detection.heads import Geometry, decode
from experiments.pneumonia.detection.targets import assign, ignored


def yolo_loss(
    heads: Sequence[jax.Array],
    boxes: jax.Array,
    kinds: jax.Array,
    count: jax.Array,
    geometry: Geometry,
    *,
    ignore: float = 0.7,
    positive: float = 1.0,
) -> jax.Array:
    """Loss of each image, summed over its predictions.

        L =   sum over owners      weight * [BCE(tx, ty; offset) + |(tw, th) - size|^2 / 2]
            + sum over owners      positive * BCE(objectness; 1) + sum_c BCE(class c; is it)
            + sum over the others  BCE(objectness; 0), but for those that overlap a true box by more than `ignore`

    Its gradient is the one that Darknet's detection layer passes back (there the sigmoids' derivatives cancel).

    Args:
      heads: raw heads of a batch of n images.
      boxes: `[n, m, (x, y, w, h)]` in pixels, rows from `count` on ignored.
      kinds: int32 `[n, m]`.
      count: int32 `[n]`.
      geometry: cells and anchors.
      ignore: see `targets.ignored`.
      positive: weight of the owners' objectness, above 1 where true boxes are few.

    Returns:
      float32 `[n]`.

    Source: Redmon, Farhadi, "YOLOv3: An Incremental Improvement", 2018, sections 2.1 and 2.2.
    """
    found = decode(heads, geometry)
    wanted = jax.vmap(lambda b, k, c: assign(b, k, c, geometry))(boxes, kinds, count)
    owned = (wanted.owner >= 0).astype(jnp.float32)
    spared = ignored(jax.lax.stop_gradient(found), corners(boxes), count, ignore)
    place = optax.sigmoid_binary_cross_entropy(found.raw[..., :2], wanted.offset).sum(-1)
    extent = 0.5 * jnp.square(found.raw[..., 2:] - wanted.size).sum(-1)
    there = optax.sigmoid_binary_cross_entropy(found.objectness, jnp.ones_like(owned))
    absent = optax.sigmoid_binary_cross_entropy(found.objectness, jnp.zeros_like(owned))
    label = jax.nn.one_hot(wanted.kind, geometry.classes)
    kind = optax.sigmoid_binary_cross_entropy(found.classes, label).sum(-1)
    total = owned * (wanted.weight * (place + extent) + positive * there + kind)
    total = total + jnp.where(spared, 0.0, 1.0) * (1 - owned) * absent
    return total.sum(-1)
