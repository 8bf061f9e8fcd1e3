"""Augmentation that moves the boxes with the image: one crop, zoom and mirror for each image, by gathers of pixels."""

import jax
import jax.numpy as jnp


def random_view(
    key: jax.Array,
    images: jax.Array,
    boxes: jax.Array,
    count: jax.Array,
    *,
    shift: float = 0.1,
    zoom: float = 0.15,
    flip: bool = True,
    contrast: float = 0.2,
    least: float = 0.3,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Shows each image a little moved, zoomed, mirrored and of another contrast, and its boxes where they then are.

    Boxes are clipped to the image. A box of which less than the share `least` stays inside is dropped, and the boxes
    after it close up.

    Args:
      key: of the draws.
      images: uint8 `[n, h, w, c]`.
      boxes: `[n, m, (x, y, w, h)]` in pixels, rows from `count` on ignored.
      count: int32 `[n]`.
      shift: largest shift, as a share of the side.
      zoom: largest change of scale, up or down, in (0, 1).
      flip: whether half of the images are mirrored left to right.
      contrast: largest change of the distance to the image's mean grey.
      least: share of a box's area that must stay inside.

    Returns:
      Images uint8 of the same shape (black where there is nothing), boxes, count.
    """
    n, h, w, _ = images.shape
    keys = jax.random.split(key, 4)
    scale = 1.0 + jax.random.uniform(keys[0], (n,), minval=-zoom, maxval=zoom)
    moved = jax.random.uniform(keys[1], (n, 2), minval=-shift, maxval=shift) * jnp.array([w, h], jnp.float32)[None]
    mirror = (jax.random.bernoulli(keys[2], 0.5, (n,)) & flip).astype(jnp.float32)
    gain = 1.0 + jax.random.uniform(keys[3], (n,), minval=-contrast, maxval=contrast)
    # pixel coordinates: new = middle + scale * sign * (old - middle) + moved
    sign = 1.0 - 2.0 * mirror
    middle = jnp.array([w, h], jnp.float32)[None] / 2
    slope = scale[:, None] * jnp.stack([sign, jnp.ones_like(sign)], -1)

    def sample(image: jax.Array, slope: jax.Array, moved: jax.Array, gain: jax.Array) -> jax.Array:
        x = (jnp.arange(w, dtype=jnp.float32) + 0.5 - middle[0, 0] - moved[0]) / slope[0] + middle[0, 0]
        y = (jnp.arange(h, dtype=jnp.float32) + 0.5 - middle[0, 1] - moved[1]) / slope[1] + middle[0, 1]
        column, row = jnp.floor(x).astype(jnp.int32), jnp.floor(y).astype(jnp.int32)
        inside = ((row >= 0) & (row < h))[:, None] & ((column >= 0) & (column < w))[None]
        seen = image[jnp.clip(row, 0, h - 1)][:, jnp.clip(column, 0, w - 1)].astype(jnp.float32)
        level = seen.mean()
        seen = jnp.clip(level + gain * (seen - level), 0.0, 255.0)
        return jnp.where(inside[..., None], seen, 0.0).astype(jnp.uint8)

    views = jax.vmap(sample)(images, slope, moved, gain)
    corner = jnp.stack([boxes[..., :2], boxes[..., :2] + boxes[..., 2:]], 2)  # [n, m, 2 corners, (x, y)]
    new = (corner - middle[:, None, None]) * slope[:, None, None] + (middle + moved)[:, None, None]
    low, high = new.min(2), new.max(2)
    limit = jnp.array([w, h], jnp.float32)[None, None]
    low_in, high_in = jnp.clip(low, 0.0, limit), jnp.clip(high, 0.0, limit)
    area, left = (high - low).prod(-1), jnp.maximum(high_in - low_in, 0.0).prod(-1)
    real = jnp.arange(boxes.shape[1])[None] < count[:, None]
    stays = real & (area > 0) & (left >= least * area)
    order = jnp.argsort(~stays, axis=1, stable=True)
    seen_boxes = jnp.where(stays[..., None], jnp.concatenate([low_in, high_in - low_in], -1), 0.0)
    return views, jnp.take_along_axis(seen_boxes, order[..., None], 1), stays.sum(1, dtype=jnp.int32)
