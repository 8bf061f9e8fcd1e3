"""Layers with the names and values of flax's own, in the formulation that is fastest where they run."""

import functools
from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from compressx.native.convolve import convolve, is_lax_only


def widen(channels: int, width: float) -> int:
    """Scales a number of channels by `width`, to the nearest whole number, at least 1."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    return max(1, round(channels * width))


Conv = functools.partial(nn.Conv, conv_general_dilated=convolve)
"""`flax.linen.Conv`, parameters `kernel` `[kh, kw, cin / groups, cout]` and `bias` `[cout]`, computed by `convolve`."""


class BatchNorm(nn.Module):
    """Batch normalisation with the names of flax: params `scale`, `bias`, batch_stats `mean`, `var`; all `[c]`.

    Training uses the batch's mean and biased variance over every axis but the last, and moves the running ones by
    `running = momentum * running + (1 - momentum) * batch`.

    Source: Ioffe, Szegedy, "Batch Normalization", 2015, algorithm 1.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Normalises `[..., c]`; with `train`, by the batch, and `batch_stats` must be mutable."""
        channels, axes = x.shape[-1:], tuple(range(x.ndim - 1))
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if train:
            mean = x.mean(axes)
            var = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(mean), 0.0)
            if not self.is_initializing():
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        else:
            mean, var = running_mean.value, running_var.value
        gain = scale * lax.rsqrt(var + self.epsilon)
        return x * jnp.expand_dims(gain, axes) + jnp.expand_dims(bias - mean * gain, axes)


def max_pool(
    x: jax.Array,
    window: tuple[int, int],
    strides: tuple[int, int] | None = None,
    padding: str | Sequence[tuple[int, int]] = "VALID",
) -> jax.Array:
    """The largest value of each window.

    Windows that do not overlap and need no padding are compared element by element: XLA's gradient of `reduce_window`
    is slow on the CPU. The first of equal values has the gradient, as there; a NaN wins.

    Args:
      x: `[n, h, w, c]`.
      window: rows, columns.
      strides: rows, columns; the window where None.
      padding: `SAME`, `VALID` or pairs per axis; padding never wins.

    Returns:
      `[n, oh, ow, c]`.
    """
    strides = strides or window
    if strides != window or padding != "VALID" or is_lax_only():
        return nn.max_pool(x, window, strides, padding)
    (n, h, w, c), (kh, kw) = x.shape, window
    x = x[:, : h // kh * kh, : w // kw * kw]
    x = x.reshape(n, h // kh, kh, w // kw, kw, c)
    # selections, for `maximum` has a slower gradient that shares between equals
    return functools.reduce(
        lambda a, b: jnp.where((a >= b) | (a != a), a, b), [x[:, :, i, :, j] for i in range(kh) for j in range(kw)]
    )
