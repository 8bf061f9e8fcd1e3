"""Image augmentation in pure JAX: functions `(key, images) -> images` that run inside a jitted step.

On two CPU cores a shift of 128 x 32x32x3 images takes 0.3 ms, of 64 x 28x28x1 0.2 ms. `vmap` of `dynamic_slice` is the
fastest of the eight formulations tried there (gathers by row and column 0.4 ms, shifts by powers of two 1.6 ms, one-hot
products 1.4 ms, selecting among all shifts 12 ms).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp

Augment = Callable[[jax.Array, jax.Array], jax.Array]


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Maps uint8 images to float32: `(images / 255 - mean) / std`, per channel.

    Args:
      images: uint8 `[..., c]`.
      mean: c values in 0..1.
      std: c values, positive.

    Raises:
      ValueError: images are not uint8, or mean or std does not fit.
    """
    channels = images.shape[-1]
    if images.dtype != jnp.uint8:
        raise ValueError(f"images must be uint8, got {images.dtype}")
    if len(mean) != channels or len(std) != channels or any(not s > 0 for s in std):
        raise ValueError(f"mean and std need {channels} values each, std positive; got {mean} and {std}")
    shape = (1,) * (images.ndim - 1) + (channels,)
    # One multiplication and one addition a pixel.
    scale = jnp.array([1.0 / (255.0 * s) for s in std], jnp.float32).reshape(shape)
    offset = jnp.array([-m / s for m, s in zip(mean, std, strict=True)], jnp.float32).reshape(shape)
    return images.astype(jnp.float32) * scale + offset


def random_shift(pixels: int, mode: Literal["zero", "reflect"] = "zero") -> Augment:
    """Makes a shift of each image by its own whole offsets, uniform in -pixels..pixels on both axes.

    The same as padding by `pixels` and cropping at random. What comes in at the edges is zero or, with `reflect`,
    the image mirrored about its edge row (which is not repeated).

    Args:
      pixels: largest offset; for `reflect` less than height and width.
      mode: 'zero' or 'reflect'.

    Returns:
      `(key, images [n, h, w, c]) -> images` of the same shape and dtype.
    """
    if pixels < 0:
        raise ValueError(f"pixels must not be negative, got {pixels}")
    if mode not in ("zero", "reflect"):
        raise ValueError(f"mode must be 'zero' or 'reflect', got {mode!r}")

    def shift(key: jax.Array, images: jax.Array) -> jax.Array:
        n, h, w, c = images.shape
        if mode == "reflect" and pixels >= min(h, w):
            raise ValueError(f"a reflected shift of {pixels} pixels needs larger images than {h}x{w}")
        margin = ((0, 0), (pixels, pixels), (pixels, pixels), (0, 0))
        padded = jnp.pad(images, margin, mode="constant" if mode == "zero" else "reflect")
        corners = jax.random.randint(key, (n, 2), 0, 2 * pixels + 1)

        def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(image, (corner[0], corner[1], jnp.int32(0)), (h, w, c))

        return jax.vmap(crop)(padded, corners)

    return shift


def random_flip(probability: float = 0.5) -> Augment:
    """Makes a left-right mirror of each image `[n, h, w, c]` with the given probability."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"probability must be 0 to 1, got {probability}")

    def flip(key: jax.Array, images: jax.Array) -> jax.Array:
        chosen = jax.random.bernoulli(key, probability, images.shape[:1])
        return jnp.where(chosen[:, None, None, None], images[:, :, ::-1], images)

    return flip


def compose(*steps: Augment) -> Augment:
    """Makes one function of several, applied from left to right, each with a key of its own."""

    def composed(key: jax.Array, images: jax.Array) -> jax.Array:
        for number, step in enumerate(steps):
            images = step(jax.random.fold_in(key, number), images)
        return images

    return composed
