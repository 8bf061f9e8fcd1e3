"""Boxes: (x, y, width, height) and corners (x1, y1, x2, y2), and how much two of them overlap."""

import jax
import jax.numpy as jnp


def corners(boxes: jax.Array) -> jax.Array:
    """`[..., (x, y, w, h)]` with (x, y) the upper left corner, to `[..., (x1, y1, x2, y2)]`."""
    return jnp.concatenate([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], -1)


def sides(boxes: jax.Array) -> jax.Array:
    """The inverse of `corners`."""
    return jnp.concatenate([boxes[..., :2], boxes[..., 2:] - boxes[..., :2]], -1)


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of every pair: |A and B| / |A or B|, 0 where the union is empty.

    Args:
      a: corners `[..., n, 4]`.
      b: corners `[..., m, 4]`.

    Returns:
      float32 `[..., n, m]`.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    overlap = jnp.maximum(jnp.minimum(a[..., 2:], b[..., 2:]) - jnp.maximum(a[..., :2], b[..., :2]), 0)
    shared = overlap[..., 0] * overlap[..., 1]
    union = _area(a) + _area(b) - shared
    return jnp.where(union > 0, shared / jnp.where(union > 0, union, 1), 0)


def _area(boxes: jax.Array) -> jax.Array:
    size = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0)
    return size[..., 0] * size[..., 1]
