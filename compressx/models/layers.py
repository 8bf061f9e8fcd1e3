"""Layers with the names and values of flax's own, in the formulation that is fastest where they run."""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from compressx.models import native, native_depthwise

Pads = tuple[tuple[int, int], tuple[int, int]]

_only_lax = False


@contextlib.contextmanager
def lax_only() -> Iterator[None]:
    """Within it, convolutions and poolings are traced as one operation of lax each: for those who read the program."""
    global _only_lax
    before, _only_lax = _only_lax, True
    try:
        yield
    finally:
        _only_lax = before


def widen(channels: int, width: float) -> int:
    """Scales a number of channels by `width`, to the nearest whole number, at least 1."""
    if not width > 0:
        raise ValueError(f"width must be positive, got {width}")
    return max(1, round(channels * width))


def im2col(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, precision: Any = None) -> jax.Array:
    """Convolution as one matrix product of all patches with the kernel.

    Args:
      x: `[n, h, w, cin]`.
      kernel: `[kh, kw, cin, cout]`.
      strides: rows, columns.
      pads: zeros before and after, per axis.
      precision: of the product.

    Returns:
      `[n, oh, ow, cout]`.
    """
    kh, kw, cin, cout = kernel.shape
    sh, sw = strides
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    oh, ow = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    ends = sh * (oh - 1) + 1, sw * (ow - 1) + 1
    shifted = [x[:, i : i + ends[0] : sh, j : j + ends[1] : sw] for i in range(kh) for j in range(kw)]
    return jnp.tensordot(jnp.concatenate(shifted, -1), kernel.reshape(-1, cout), 1, precision=precision)


def depthwise(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads) -> jax.Array:
    """Convolution of each channel with its own filter, as a sum of shifted products.

    Args:
      x: `[n, h, w, c]`.
      kernel: `[kh, kw, 1, c]`.
      strides: rows, columns.
      pads: zeros before and after, per axis.

    Returns:
      `[n, oh, ow, c]`.
    """
    kh, kw, _, _ = kernel.shape
    sh, sw = strides
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    oh, ow = (x.shape[1] - kh) // sh + 1, (x.shape[2] - kw) // sw + 1
    ends = sh * (oh - 1) + 1, sw * (ow - 1) + 1
    taps = [(i, j) for i in range(kh) for j in range(kw)]
    terms = [x[:, i : i + ends[0] : sh, j : j + ends[1] : sw] * kernel[i, j, 0][None, None, None] for i, j in taps]
    return sum(terms[1:], start=terms[0])


def formulation(x: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads, groups: int, plain: bool) -> str:
    """Names the fastest way to convolve: `native`, `native_depthwise`, `im2col`, `depthwise` or `lax`.

    On GPU and TPU, and wherever dilation or grouping is general, it is XLA's convolution. On the CPU
    `benchmarks/training.py --layers` measures the choices.
    """
    kh, kw, cin, cout = kernel.shape
    if _only_lax or jax.default_backend() != "cpu" or not plain:
        return "lax"
    ours = x.dtype == kernel.dtype == jnp.float32 and strides[0] == strides[1]
    if groups == cout == x.shape[-1] and cin == 1:
        return "native_depthwise" if ours and native_depthwise.enabled() else "depthwise"
    if groups != 1:
        return "lax"
    if kernel.size > 1 << 18:  # it does not stay in the cache: a matrix product's blocks win, on small images by far
        return "im2col"
    short_pads = max(pads[0]) < kh and max(pads[1]) < kw
    if ours and short_pads and native.enabled():
        return "native"
    return "lax" if (kh, kw) == (3, 3) and cin >= 16 else "im2col"


def convolve(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    precision: Any = None,
) -> jax.Array:
    """Is `lax.conv_general_dilated` for NHWC images and HWIO kernels, in the fastest `formulation`.

    Results agree with `lax` to float tolerance, gradients of any order included.

    Args:
      lhs: `[n, h, w, cin]`.
      rhs: `[kh, kw, cin / groups, cout]`.
      window_strides: rows, columns.
      padding: `SAME`, `VALID` or zeros before and after per axis.
      lhs_dilation: as in lax.
      rhs_dilation: as in lax.
      dimension_numbers: passed on; anything but NHWC, HWIO, NHWC is left to lax.
      feature_group_count: groups.
      precision: as in lax.

    Returns:
      `[n, oh, ow, cout]`.
    """
    plain = lhs.ndim == 4 and set(lhs_dilation or (1,)) == {1} and set(rhs_dilation or (1,)) == {1}
    if plain:
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        plain = numbers == lax.conv_dimension_numbers(lhs.shape, rhs.shape, ("NHWC", "HWIO", "NHWC"))
    how = "lax"
    if plain:
        strides = (window_strides[0], window_strides[1])
        if isinstance(padding, str):
            pairs: Sequence[tuple[int, int]] = lax.padtype_to_pads(lhs.shape[1:3], rhs.shape[:2], strides, padding)
        else:
            pairs = padding
        pads = ((pairs[0][0], pairs[0][1]), (pairs[1][0], pairs[1][1]))
        fits = min(*pads[0], *pads[1]) >= 0 and all(
            size + sum(pad) >= k for size, pad, k in zip(lhs.shape[1:3], pads, rhs.shape[:2], strict=True)
        )
        how = formulation(lhs, rhs, strides, pads, feature_group_count, fits)
    if how == "native":
        return native.conv(lhs, rhs, strides[0], pads)
    if how == "native_depthwise":
        return native_depthwise.conv(lhs, rhs, strides[0], pads)
    if how == "im2col":
        return im2col(lhs, rhs, strides, pads, precision)
    if how == "depthwise":
        return depthwise(lhs, rhs, strides, pads)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        precision=precision,
    )


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
    if strides != window or padding != "VALID" or _only_lax:
        return nn.max_pool(x, window, strides, padding)
    (n, h, w, c), (kh, kw) = x.shape, window
    x = x[:, : h // kh * kh, : w // kw * kw]
    x = x.reshape(n, h // kh, kh, w // kw, kw, c)
    # selections, for `maximum` has a slower gradient that shares between equals
    return functools.reduce(
        lambda a, b: jnp.where((a >= b) | (a != a), a, b), [x[:, :, i, :, j] for i in range(kh) for j in range(kw)]
    )
