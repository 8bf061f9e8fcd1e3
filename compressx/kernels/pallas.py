"""Pallas kernels for GPU and TPU: a block-sparse matrix product, and a convolution that visits only live blocks.

Matrix units want dense blocks, so sparsity is exploited block by block: a block of weights `[bk, bf]` that is all zero
is neither stored nor multiplied. A convolution is the same with one more index, its tap: the pattern of a kernel
decides at which taps a block of (input channels, filters) is alive. Reordering channels and filters so that zeros
come together (structured pruning does) is what makes blocks empty; scattered 4-of-9 patterns leave none empty, and
are for the CPU.
Neither has a gradient. `interpret=True` runs them anywhere, for tests.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl


class Blocks(NamedTuple):
    """Live blocks of `[taps, K, F]`, by block of filters.

    Attributes:
      live: int32 `[F / bf, 1]`, live blocks.
      places: int32 `[F / bf, most]`, tap * (K / bk) + block of inputs.
      weight: float32 `[F / bf, most, bk, bf]`.
    """

    live: Array
    places: Array
    weight: Array


def blocks(w: np.ndarray, block: tuple[int, int]) -> Blocks:
    """Cuts `[K, F]` or `[kh, kw, K, F]` into blocks and keeps those that are not zero.

    Raises:
      ValueError: the block does not divide the matrix.
    """
    bk, bf = block
    w = np.asarray(w, np.float32).reshape(-1, *w.shape[-2:])
    taps, k, f = w.shape
    if min(bk, bf) < 1 or k % bk or f % bf:
        raise ValueError(f"blocks of {bk}x{bf} do not divide {k} inputs and {f} outputs")
    cut = w.reshape(taps, k // bk, bk, f // bf, bf).transpose(3, 0, 1, 2, 4).reshape(f // bf, -1, bk, bf)
    live = cut.any(axis=(2, 3))
    most = max(1, int(live.sum(axis=1).max()))
    order = np.argsort(~live, axis=1, kind="stable")[:, :most]
    weight = np.take_along_axis(cut, order[:, :, None, None], axis=1)
    count = live.sum(axis=1, keepdims=True)
    return Blocks(*map(jnp.asarray, (count.astype(np.int32), order.astype(np.int32), weight)))


def _product_kernel(live, places, weight, x, y, *, bk):  # type: ignore[no-untyped-def]
    group = pl.program_id(1)

    def step(k, total):  # type: ignore[no-untyped-def]
        start = pl.multiple_of(places[group, k] * bk, bk)
        return total + jnp.dot(x[:, pl.ds(start, bk)], weight[0, k], preferred_element_type=jnp.float32)

    y[:, :] = lax.fori_loop(0, live[group, 0], step, jnp.zeros(y.shape, jnp.float32))


@functools.partial(jax.jit, static_argnames=("rows", "interpret"))
def block_sparse_matmul(x: Array, w: Blocks, *, rows: int = 128, interpret: bool = False) -> Array:
    """`x [n, K] @ w [K, F]`, live blocks only.

    Args:
      x: float32, n a multiple of `rows`.
      w: of `blocks`.
      rows: of x that a program takes.
      interpret: run without a device.

    Raises:
      ValueError: n is not a multiple of `rows`.
    """
    n, k = x.shape
    groups, most, bk, bf = w.weight.shape
    if n % rows:
        raise ValueError(f"{n} rows are not a multiple of {rows}")
    return pl.pallas_call(
        functools.partial(_product_kernel, bk=bk),
        out_shape=jax.ShapeDtypeStruct((n, groups * bf), jnp.float32),
        grid=(n // rows, groups),
        in_specs=[
            pl.BlockSpec(w.live.shape, lambda i, j: (0, 0)),
            pl.BlockSpec(w.places.shape, lambda i, j: (0, 0)),
            pl.BlockSpec((1, most, bk, bf), lambda i, j: (j, 0, 0, 0)),
            pl.BlockSpec((rows, k), lambda i, j: (i, 0)),
        ],
        out_specs=pl.BlockSpec((rows, bf), lambda i, j: (i, j)),
        interpret=interpret,
    )(w.live, w.places, w.weight, x)


def _conv_kernel(live, places, weight, x, y, *, bk, size, stride, parts):  # type: ignore[no-untyped-def]
    _, oh, ow, bf = y.shape
    group = pl.program_id(1)

    def step(k, total):  # type: ignore[no-untyped-def]
        tap, part = places[group, k] // parts, places[group, k] % parts
        i, j = tap // size[1], tap % size[1]
        rows, columns = (oh - 1) * stride + 1, (ow - 1) * stride + 1
        window = x[0, pl.ds(i, rows), pl.ds(j, columns), pl.ds(pl.multiple_of(part * bk, bk), bk)]
        window = window[::stride, ::stride].reshape(oh * ow, bk)
        return total + jnp.dot(window, weight[0, k], preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, live[group, 0], step, jnp.zeros((oh * ow, bf), jnp.float32))
    y[0] = total.reshape(oh, ow, bf)


@functools.partial(jax.jit, static_argnames=("size", "stride", "pads", "interpret"))
def block_sparse_conv(
    x: Array,
    w: Blocks,
    *,
    size: tuple[int, int],
    stride: int = 1,
    pads: tuple[tuple[int, int], tuple[int, int]] = ((1, 1), (1, 1)),
    interpret: bool = False,
) -> Array:
    """Convolves `x [n, h, w, cin]` with live blocks of `[kh, kw, cin, cout]`; a program holds one padded image.

    Args:
      x: float32; a padded image must fit the fast memory of the device (a few MiB on a TPU).
      w: of `blocks`, from the kernel.
      size: kh, kw.
      stride: of both axes.
      pads: zeros before and after, per axis.
      interpret: run without a device.
    """
    n, h, wide, cin = x.shape
    groups, most, bk, bf = w.weight.shape
    oh = (h + sum(pads[0]) - size[0]) // stride + 1
    ow = (wide + sum(pads[1]) - size[1]) // stride + 1
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    return pl.pallas_call(
        functools.partial(_conv_kernel, bk=bk, size=size, stride=stride, parts=cin // bk),
        out_shape=jax.ShapeDtypeStruct((n, oh, ow, groups * bf), jnp.float32),
        grid=(n, groups),
        in_specs=[
            pl.BlockSpec(w.live.shape, lambda i, j: (0, 0)),
            pl.BlockSpec(w.places.shape, lambda i, j: (0, 0)),
            pl.BlockSpec((1, most, bk, bf), lambda i, j: (j, 0, 0, 0)),
            pl.BlockSpec((1, *x.shape[1:]), lambda i, j: (i, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, oh, ow, bf), lambda i, j: (i, 0, 0, j)),
        interpret=interpret,
    )(w.live, w.places, w.weight, x)
