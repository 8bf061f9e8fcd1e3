"""Views: bijections between a stored weight and the array in which a structure is plain.

A view never changes a value: `back(to(w), w.shape)` is `w`, bit for bit. Stored weights are Flax's: convolution
`[kh, kw, cin, cout]`, dense `[in, out]`. Papers write filters as rows; here filters are always the **last** axis.

Shapes: P = kh * kw * cin positions (the rows of the GEMM, its reduction axis), F = cout filters (its columns).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Shape = tuple[int, ...]


class View(NamedTuple):
    """A pair of inverse functions between a stored weight and a working array.

    Attributes:
      to: `to(w)` is the working array.
      back: `back(x, shape)` is the stored weight of shape `shape`; `back(to(w), w.shape)` equals `w` exactly.

    Example:
      >>> view = compressx.views.gemm()
      >>> w = jnp.arange(36.0).reshape(3, 3, 2, 2)
      >>> view.to(w).shape, bool((view.back(view.to(w), w.shape) == w).all())
      ((18, 2), True)
    """

    to: Callable[[Array], Array]
    back: Callable[[Array, Shape], Array]


def _need(w: Array, ndim: int, what: str) -> None:
    if w.ndim < ndim:
        raise ValueError(f"{what} needs a weight of at least {ndim} axes, got shape {w.shape}")


def identity() -> View:
    """The weight as it is stored.

    Example:
      >>> compressx.views.identity().to(jnp.ones((2, 3))).shape
      (2, 3)
    """
    return View(lambda w: w, lambda x, shape: x)


def gemm() -> View:
    """The matrix a layer multiplies with: `[kh, kw, cin, cout] -> [P, F]`, `[in, out] -> [in, out]`.

    Position p = (i * kw + j) * cin + c for tap (i, j) and input channel c; rows are reduced over, columns are filters.

    Example:
      >>> compressx.views.gemm().to(jnp.ones((3, 3, 4, 5))).shape
      (36, 5)
    """

    def to(w: Array) -> Array:
        _need(w, 2, "the GEMM view")
        return w.reshape(-1, w.shape[-1])

    return View(to, lambda x, shape: x.reshape(shape))


def channels() -> View:
    """Input channels first: `[kh, kw, cin, cout] -> [cin, kh*kw*cout]`, `[in, out] -> [in, out]`.

    Example:
      >>> compressx.views.channels().to(jnp.ones((3, 3, 4, 5))).shape
      (4, 45)
    """

    def to(w: Array) -> Array:
        _need(w, 2, "the channel view")
        x = jnp.moveaxis(w, -2, 0)
        return x.reshape(x.shape[0], -1)

    def back(x: Array, shape: Shape) -> Array:
        moved = (shape[-2], *shape[:-2], shape[-1])
        return jnp.moveaxis(x.reshape(moved), 0, -2)

    return View(to, back)


def kernels() -> View:
    """Convolution kernels with their taps last: `[kh, kw, cin, cout] -> [cin, cout, kh*kw]`.

    Tap t = i * kw + j, so a 3x3 kernel's centre is tap 4.

    Example:
      >>> compressx.views.kernels().to(jnp.ones((3, 3, 4, 5))).shape
      (4, 5, 9)
    """

    def to(w: Array) -> Array:
        if w.ndim != 4:
            raise ValueError(f"the kernel view needs a convolution weight [kh, kw, cin, cout], got shape {w.shape}")
        kh, kw, cin, cout = w.shape
        return w.reshape(kh * kw, cin, cout).transpose(1, 2, 0)

    def back(x: Array, shape: Shape) -> Array:
        return x.transpose(2, 0, 1).reshape(shape)

    return View(to, back)


def block_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Number of blocks down and across a matrix, the ragged ones at the edge counted.

    Args:
      shape: of the matrix, (rows, columns).
      block: of a block, (rows, columns).

    Returns:
      (blocks down, blocks across).

    Example:
      >>> compressx.views.block_grid((10, 8), (4, 4))  # the last row of blocks is ragged
      (3, 2)
    """
    return math.ceil(shape[0] / block[0]), math.ceil(shape[1] / block[1])


def blocks(block: tuple[int, int], base: View | None = None) -> View:
    """The matrix cut into a grid of blocks: `[R, C] -> [ceil(R/bh), ceil(C/bw), bh, bw]`.

    Blocks at the ragged edges are padded with zeros, which `back` cuts off again; a selection that counts members must
    leave the padding out.

    Args:
      block: `(bh, bw)`, rows (positions) and columns (filters) of a block.
      base: view that makes the matrix; the GEMM view by default.

    Example:
      >>> compressx.views.blocks((4, 4)).to(jnp.ones((10, 8))).shape
      (3, 2, 4, 4)
    """
    bh, bw = block
    if bh < 1 or bw < 1:
        raise ValueError(f"block must be at least 1x1, got {block}")
    base = base or gemm()

    def to(w: Array) -> Array:
        m = base.to(w)
        rows, cols = block_grid((m.shape[0], m.shape[1]), block)
        m = jnp.pad(m, ((0, rows * bh - m.shape[0]), (0, cols * bw - m.shape[1])))
        return m.reshape(rows, bh, cols, bw).transpose(0, 2, 1, 3)

    def back(x: Array, shape: Shape) -> Array:
        rows, cols = x.shape[0] * bh, x.shape[1] * bw
        m = x.transpose(0, 2, 1, 3).reshape(rows, cols)
        height, width = _matrix_shape(base, shape)
        return base.back(m[:height, :width], shape)

    return View(to, back)


def _matrix_shape(base: View, shape: Shape) -> tuple[int, int]:
    out = jax.eval_shape(base.to, jax.ShapeDtypeStruct(shape, jnp.float32))
    return out.shape[0], out.shape[1]


def tiles(block: Shape) -> View:
    """The weight cut into blocks without moving a value: every axis split in two, `[blocks, size of a block]`.

        block (bh, bw):      [P, F] -> [P/bh, bh, F/bw, bw]
        block (bt, bc, bo):  [kh*kw, cin, cout] -> [T/bt, bt, cin/bc, bc, cout/bo, bo],  T = kh*kw (1 for dense weights)

    with quotients rounded up; reduce over the odd axes to get one value a block. Padding is zero and cut off by `back`.

    Args:
      block: two extents (positions, filters) or three (taps, input channels, output channels).

    Example:
      >>> compressx.views.tiles((4, 4)).to(jnp.ones((10, 8))).shape
      (3, 4, 2, 4)
    """
    if len(block) not in (2, 3) or min(block) < 1:
        raise ValueError(f"block must be two or three extents of at least 1, got {tuple(block)}")

    def base(shape: Shape) -> Shape:
        if len(shape) < 2:
            raise ValueError(f"blocks need a weight of at least 2 axes, got shape {tuple(shape)}")
        if len(block) == 2:
            return math.prod(shape[:-1]), shape[-1]
        return math.prod(shape[:-2]), shape[-2], shape[-1]

    def to(w: Array) -> Array:
        extents = base(w.shape)
        grid = [math.ceil(n / b) for n, b in zip(extents, block, strict=True)]
        pads = [(0, g * b - n) for g, b, n in zip(grid, block, extents, strict=True)]
        x = jnp.pad(w.reshape(extents), pads) if any(p for _, p in pads) else w
        return x.reshape([n for pair in zip(grid, block, strict=True) for n in pair])

    def back(x: Array, shape: Shape) -> Array:
        extents = base(shape)
        padded = x.reshape([g * b for g, b in zip(x.shape[::2], x.shape[1::2], strict=True)])
        return padded[tuple(slice(n) for n in extents)].reshape(shape)

    return View(to, back)


def in_tiles(shape: Shape, block: Shape) -> Array:
    """Which entries of `tiles(block)` are weights and not padding: bool, broadcastable to the tiles.

    Args:
      shape: of the stored weight.
      block: two or three extents, as for `tiles`.

    Returns:
      bool, of the tiles' number of axes; 1 along those that need no padding.

    Example:
      >>> inside = compressx.views.in_tiles((10, 8), (4, 4))
      >>> int(jnp.sum(jnp.broadcast_to(inside, (3, 4, 2, 4))))  # 10 x 8 weights, the rest is padding
      80
    """
    extents = (math.prod(shape[:-1]), shape[-1]) if len(block) == 2 else (math.prod(shape[:-2]), *shape[-2:])
    inside = jnp.ones((1,) * (2 * len(block)), bool)
    for a, (n, b) in enumerate(zip(extents, block, strict=True)):
        if n % b:
            axis = jnp.arange(math.ceil(n / b) * b) < n
            place = [1] * (2 * len(block))
            place[2 * a : 2 * a + 2] = [math.ceil(n / b), b]
            inside = inside & axis.reshape(place)
    return inside


def position_order(shape: Shape, order: str) -> np.ndarray:
    """The rows of the GEMM view in the order in which a filter's weights are laid down: int32 `[P]`, row at each place.

    Args:
      shape: of a weight `[..., cin, cout]` with up to two kernel axes.
      order: the axis that runs fastest. "W": kernel width, weights nested (c, i, j) with j fastest; "H": kernel height,
        (c, j, i); "C": input channel, (i, j, c), the order of the GEMM view itself. Alike for dense weights.

    Returns:
      int32 `[P]`.

    Raises:
      ValueError: the order is none of these, or the weight has fewer than two or more than four axes.

    Example:
      >>> compressx.views.position_order((1, 2, 2, 5), "W").tolist()  # two taps, two channels: taps run fastest
      [0, 2, 1, 3]
    """
    nesting = {"W": (2, 0, 1), "H": (2, 1, 0), "C": (0, 1, 2)}
    if order not in nesting:
        raise ValueError(f'order must be "W", "H" or "C", got {order!r}')
    if not 2 <= len(shape) <= 4:
        raise ValueError(f"an order of positions needs a weight of 2 to 4 axes, got shape {tuple(shape)}")
    grid = (1,) * (4 - len(shape)) + tuple(shape[:-1])
    rows = np.arange(math.prod(grid), dtype=np.int32).reshape(grid)
    return rows.transpose(nesting[order]).reshape(-1)


def fragments(size: int, order: str = "C") -> View:
    """Runs of `size` consecutive weights of every filter: `[kh, kw, cin, cout] -> [ceil(P/size), size, F]`.

    The last fragment is padded with zeros, which `back` cuts off again.

    Args:
      size: weights in a fragment, at least 1.
      order: in which order a filter's weights run, see `position_order`.

    Example:
      >>> compressx.views.fragments(4).to(jnp.ones((10, 3))).shape
      (3, 4, 3)
    """
    if size < 1:
        raise ValueError(f"a fragment holds at least 1 weight, got size={size}")

    def to(w: Array) -> Array:
        m = gemm().to(w)[position_order(w.shape, order)]
        number = math.ceil(m.shape[0] / size)
        return jnp.pad(m, ((0, number * size - m.shape[0]), (0, 0))).reshape(number, size, m.shape[1])

    def back(x: Array, shape: Shape) -> Array:
        places = np.argsort(position_order(shape, order))
        return x.reshape(-1, x.shape[-1])[places].reshape(shape)

    return View(to, back)
