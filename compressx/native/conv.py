"""Convolution on the CPU by our own compiled kernel, where a C++ compiler is found.

XLA's convolution on the CPU is naive inside `scan` and `while`, and its weight gradient transposes both operands. The
kernel of `conv.cc` does neither. It is compiled once per machine, into the user's cache folder, and reached through
`jax.ffi`. Without a compiler, or with `COMPRESSX_NATIVE=off` in the environment, `available()` is False and
callers use XLA.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from compressx.native import build as compiled

Pads = tuple[tuple[int, int], tuple[int, int]]

_TARGETS = {
    "compressx_conv": "CompressxConv",
    "compressx_conv_grad": "CompressxConvGrad",
    "compressx_conv_spread": "CompressxConvSpread",
}
LIBRARY = compiled.Library(Path(__file__).with_name("conv.cc"), _TARGETS, compiled.FAST)


@functools.cache
def available() -> bool:
    """True if the kernel runs here; compiles it at the first call, which takes some seconds once per machine."""
    return compiled.load(LIBRARY) is not None


def enabled() -> bool:
    """True if a layer traced now may use the kernel."""
    return compiled.enabled() and available()


def _call(
    target: str, a: jax.Array, b: jax.Array, shape: tuple[int, ...], geometry: tuple[int, int, int, int]
) -> jax.Array:
    if not available():
        raise RuntimeError("the convolution kernel is not available here: see native.available()")
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    names = ("stride", "top", "left", "dilation")
    attributes = {name: np.int64(value) for name, value in zip(names, geometry, strict=True)}
    return jax.ffi.ffi_call(target, out, vmap_method="sequential")(a, b, **attributes)


def _spread(ow: int, w: int, kw: int, cin: int, cout: int, stride: int, lanes: int = 16) -> bool:
    """True if spreading each cotangent's window costs fewer vector operations a row than gathering for each pixel.

    Spreading reads and writes each sum in memory, about three operations, where gathering keeps it in a register;
    gathering multiplies with the zeros around `g` and leaves lanes idle where `cin` is no multiple of the vector's.
    """
    gather = w * -(-kw // stride) * cout * -(-cin // lanes)
    return ow * -(-kw * cin // lanes) * (cout + 3) < gather


# The convolution is bilinear in image and kernel, and so are its two gradients; each one's gradients are the other two.
# That closes the system under differentiation of any order.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def conv(x: jax.Array, kernel: jax.Array, stride: int, pads: Pads) -> jax.Array:
    """Convolves `x` `[n, h, w, cin]` with `kernel` `[kh, kw, cin, cout]`, float32, as `lax.conv_general_dilated` does.

    Args:
      x: images.
      kernel: filters.
      stride: of both axes.
      pads: zeros before and after, per axis, fewer than the kernel is long.

    Returns:
      `[n, oh, ow, cout]`, `oh = (h + sum(pads[0]) - kh) // stride + 1`.
    """
    (n, h, w, _), (kh, kw, _, cout) = x.shape, kernel.shape
    oh, ow = (h + sum(pads[0]) - kh) // stride + 1, (w + sum(pads[1]) - kw) // stride + 1
    return _call("compressx_conv", x, kernel, (n, oh, ow, cout), (stride, pads[0][0], pads[1][0], 1))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def input_grad(g: jax.Array, kernel: jax.Array, stride: int, pads: Pads, size: tuple[int, int]) -> jax.Array:
    """The gradient of `conv` for its images of `size` (h, w), given the cotangent `g` `[n, oh, ow, cout]`."""
    kh, kw, cin, cout = kernel.shape
    if _spread(g.shape[2], size[1], kw, cin, cout, stride):
        return _call("compressx_conv_spread", g, kernel, (g.shape[0], *size, cin), (stride, pads[0][0], pads[1][0], 1))
    flipped = kernel[::-1, ::-1].swapaxes(2, 3)
    geometry = (1, kh - 1 - pads[0][0], kw - 1 - pads[1][0], stride)
    return _call("compressx_conv", g, flipped, (g.shape[0], *size, cin), geometry)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def kernel_grad(x: jax.Array, g: jax.Array, stride: int, pads: Pads, size: tuple[int, int]) -> jax.Array:
    """The gradient of `conv` for its kernel of `size` (kh, kw), given the cotangent `g` `[n, oh, ow, cout]`."""
    shape = (*size, x.shape[-1], g.shape[-1])
    return _call("compressx_conv_grad", x, g, shape, (stride, pads[0][0], pads[1][0], 1))


def _conv_bwd(stride, pads, saved, g):  # type: ignore[no-untyped-def]
    x, kernel = saved
    dx = input_grad(g, kernel, stride, pads, (x.shape[1], x.shape[2]))
    return dx, kernel_grad(x, g, stride, pads, kernel.shape[:2])


def _input_grad_bwd(stride, pads, size, saved, dx):  # type: ignore[no-untyped-def]
    g, kernel = saved
    return conv(dx, kernel, stride, pads), kernel_grad(dx, g, stride, pads, kernel.shape[:2])


def _kernel_grad_bwd(stride, pads, size, saved, dk):  # type: ignore[no-untyped-def]
    x, g = saved
    return input_grad(g, dk, stride, pads, (x.shape[1], x.shape[2])), conv(x, dk, stride, pads)


conv.defvjp(lambda x, kernel, *static: (conv(x, kernel, *static), (x, kernel)), _conv_bwd)
input_grad.defvjp(lambda g, kernel, *static: (input_grad(g, kernel, *static), (g, kernel)), _input_grad_bwd)
kernel_grad.defvjp(lambda x, g, *static: (kernel_grad(x, g, *static), (x, g)), _kernel_grad_bwd)
