"""Dense convolution in the formulation that is fastest where it runs, as `lax.conv_general_dilated` is called."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from compressx.native import conv
from compressx.native import depthwise as native_depthwise

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


def is_lax_only() -> bool:
    """True within `lax_only`, for operations outside this file that have a formulation of their own."""
    return _only_lax


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
    if ours and short_pads and conv.enabled():
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
        return conv.conv(lhs, rhs, strides[0], pads)
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
