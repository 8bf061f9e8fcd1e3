"""Layers that are flax's own in name and in value, in the formulation that is fastest where they run."""

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Padding = str | Sequence[tuple[int, int]]


def widen(channels: int, width: float) -> int:
    """Scales a number of channels by `width`, to the nearest whole number, at least 1."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    return max(1, round(channels * width))


def _im2col(x, kernel, strides, padding):
    kh, kw, cin, cout = kernel.shape
    pads = lax.padtype_to_pads(x.shape[1:3], (kh, kw), strides, padding) if isinstance(padding, str) else padding
    x = jnp.pad(x, ((0, 0), tuple(pads[0]), tuple(pads[1]), (0, 0)))
    n, h, w, _ = x.shape
    sh, sw = strides
    oh, ow = (h - kh) // sh + 1, (w - kw) // sw + 1
    patches = jnp.concatenate(
        [x[:, i : i + sh * (oh - 1) + 1 : sh, j : j + sw * (ow - 1) + 1 : sw] for i in range(kh) for j in range(kw)], axis=-1
    )
    return (patches.reshape(-1, kh * kw * cin) @ kernel.reshape(-1, cout)).reshape(n, oh, ow, cout)


def convolve(
    lhs, rhs, window_strides, padding, lhs_dilation=None, rhs_dilation=None, dimension_numbers=None,
    feature_group_count=1, precision=None,
):
    kh, kw, _, _ = rhs.shape
    plain = feature_group_count == 1 and set(lhs_dilation or (1,)) == {1} and set(rhs_dilation or (1,)) == {1}
    if jax.default_backend() == "cpu" and plain and (kh * kw not in (9,) or lhs.shape[1] <= 8):
        return _im2col(lhs, rhs, tuple(window_strides), padding)
    return lax.conv_general_dilated(
        lhs, rhs, window_strides, padding, lhs_dilation=lhs_dilation, rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers, feature_group_count=feature_group_count, precision=precision,
    )


Conv = partial(nn.Conv, conv_general_dilated=convolve)


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
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, channels, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, channels, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, channels, jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            var = jnp.maximum(jnp.square(x).mean(axes) - jnp.square(mean), 0.0)
            if not self.is_initializing():
                running_mean.value = self.momentum * running_mean.value + (1 - self.momentum) * mean
                running_var.value = self.momentum * running_var.value + (1 - self.momentum) * var
        else:
            mean, var = running_mean.value, running_var.value
        gain = scale * lax.rsqrt(var + self.epsilon)
        return x * jnp.expand_dims(gain, tuple(range(x.ndim - 1))) + jnp.expand_dims(
            bias - mean * gain, tuple(range(x.ndim - 1))
        )


def max_pool(x, window, strides=None, padding="VALID"):
    strides = strides or window
    (h, w), (kh, kw) = x.shape[1:3], window
    if tuple(strides) == tuple(window) and padding == "VALID":
        x = x[:, : h // kh * kh, : w // kw * kw]
        x = x.reshape(x.shape[0], h // kh, kh, w // kw, kw, -1)
        return x.max(axis=(2, 4))
    return nn.max_pool(x, window, strides, padding)
