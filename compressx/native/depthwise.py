"""Depthwise convolution on the CPU by our own compiled kernel, where a C++ compiler is found.

Written in XLA's operations, `layers.depthwise` passes over the images once for each tap and direction; the kernel of
`depthwise.cc` passes once. Compiled and switched off as `native` is.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from compressx.native import build as compiled
from compressx.native.conv import Pads

_TARGETS = {
    "compressx_depthwise": "CompressxDepthwise",
    "compressx_depthwise_input_grad": "CompressxDepthwiseInputGrad",
    "compressx_depthwise_kernel_grad": "CompressxDepthwiseKernelGrad",
}
LIBRARY = compiled.Library(Path(__file__).with_name("depthwise.cc"), _TARGETS, compiled.FAST)


@functools.cache
def available() -> bool:
    """True if the kernel runs here; compiles it at the first call."""
    return compiled.load(LIBRARY) is not None


def enabled() -> bool:
    """True if a layer traced now may use the kernel."""
    return compiled.enabled() and available()


def _call(target: str, a: jax.Array, b: jax.Array, shape: tuple[int, ...], stride: int, pads: Pads) -> jax.Array:
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    attributes = {"stride": np.int64(stride), "top": np.int64(pads[0][0]), "left": np.int64(pads[1][0])}
    return jax.ffi.ffi_call(target, out, vmap_method="sequential")(a, b, **attributes)


# As in `native`, image, kernel and cotangent enter bilinearly, and each function's gradients are the other two.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Convolves each channel of `x` `[n, h, w, c]` with its own filter of `kernel` `[kh, kw, 1, c]`, float32.

    Args:
      x: images.
      kernel: filters.
      stride: of both axes.
      pads: zeros before and after, per axis.

    Returns:
      `[n, oh, ow, c]`, `oh = (h + sum(pads[0]) - kh) // stride + 1`.
    """
    (n, h, w, c), (kh, kw, _, _) = x.shape, kernel.shape
    oh, ow = (h + sum(pads[0]) - kh) // stride + 1, (w + sum(pads[1]) - kw) // stride + 1
    return _call("compressx_depthwise", x, kernel, (n, oh, ow, c), stride, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def input_grad(g: jax.Array, kernel: jax.Array, stride: int, pads: Pads, size: tuple[int, int]) -> jax.Array:
    """The gradient of `conv` for its images of `size` (h, w), given the cotangent `g` `[n, oh, ow, c]`."""
    return _call("compressx_depthwise_input_grad", g, kernel, (g.shape[0], *size, g.shape[3]), stride, pads)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def kernel_grad(x: jax.Array, g: jax.Array, stride: int, pads: Pads, size: tuple[int, int]) -> jax.Array:
    """The gradient of `conv` for its filters of `size` (kh, kw), given the cotangent `g` `[n, oh, ow, c]`."""
    return _call("compressx_depthwise_kernel_grad", x, g, (*size, 1, x.shape[3]), stride, pads)


def _conv_bwd(stride, pads, saved, g):  # type: ignore[no-untyped-def]
    x, kernel = saved
    return input_grad(g, kernel, stride, pads, x.shape[1:3]), kernel_grad(x, g, stride, pads, kernel.shape[:2])


def _input_grad_bwd(stride, pads, size, saved, dx):  # type: ignore[no-untyped-def]
    g, kernel = saved
    return conv(dx, kernel, stride, pads), kernel_grad(dx, g, stride, pads, kernel.shape[:2])


def _kernel_grad_bwd(stride, pads, size, saved, dk):  # type: ignore[no-untyped-def]
    x, g = saved
    return input_grad(g, dk, stride, pads, x.shape[1:3]), conv(x, dk, stride, pads)


conv.defvjp(lambda x, kernel, *static: (conv(x, kernel, *static), (x, kernel)), _conv_bwd)
input_grad.defvjp(lambda g, kernel, *static: (input_grad(g, kernel, *static), (g, kernel)), _input_grad_bwd)
kernel_grad.defvjp(lambda x, g, *static: (kernel_grad(x, g, *static), (x, g)), _kernel_grad_bwd)
