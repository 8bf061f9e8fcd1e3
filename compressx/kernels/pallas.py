"""Pallas convolution and matrix product for GPU and TPU that visit only the live blocks of the weights.

Matrix units want dense blocks, so sparsity is exploited block by block: a block of weights `[bk, bf]` that is all zero
is neither stored nor multiplied. A convolution is a product with one more index, its tap: the pattern of a kernel
decides at which taps a block of (input channels, filters) is alive. Zeros that lie together (structured pruning) make
blocks empty; scattered 4-of-9 patterns leave none empty, and are for the CPU.

    y[b, oy, ox, f] = sum over live (tap, k) of x[b, phase(tap), oy + dy(tap), ox + dx(tap), k] w[tap, k, f]

One kernel for both backends, a program a tile of pixels and a block of filters. Triton (GPU) wants powers of two and
reads anywhere; Mosaic (TPU) wants multiples of 8 x 128 and aligned columns, so there every column offset is a plane of
its own. Both are lowered in tests, which no device has compiled or run. Neither has a gradient.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from compressx.kernels import exact
from compressx.kernels.schedule import Geometry

try:  # jax 0.12 deprecates it; the rest of the package does without
    from jax.experimental.pallas import triton
except ImportError:
    triton = None  # type: ignore[assignment]

BACKENDS = ("gpu", "tpu")  # as `jax.default_backend` names them
_SIZES = {"gpu": (64, 32, 16), "tpu": (128,)}  # of blocks: powers of two that a dot takes; whole vectors
_PIXELS = {"gpu": 64, "tpu": 256}  # of a tile, about
_FAST = 12 << 20  # bytes of a TPU core's 16 MiB that a program may fill, both buffers of each operand counted


class Blocks(NamedTuple):
    """Live blocks of `[taps, K, F]`, by block of filters.

    Attributes:
      live: int32 `[F / bf, 1]`, live blocks.
      positions: int32 `[F / bf, most]`, tap * (K / bk) + block of inputs.
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


def _dense(w: Blocks, inputs: int, geometry: Geometry) -> Array:
    """The weight `[kh, kw, inputs, F]` again."""
    groups, most, bk, bf = w.weight.shape
    live = jnp.arange(most)[None] < w.live
    # what is not live lies behind the last block, which is cut off
    place = jnp.where(live, w.places, math.prod(geometry.size) * inputs // bk)
    cut = jnp.zeros((groups, math.prod(geometry.size) * inputs // bk + 1, bk, bf), w.weight.dtype)
    cut = cut.at[jnp.arange(groups)[:, None], place].set(w.weight)[:, :-1]
    return cut.reshape(groups, *geometry.size, inputs, bf).transpose(1, 2, 3, 0, 4).reshape(*geometry.size, inputs, -1)


def block_for(shape: tuple[int, ...], backend: str) -> tuple[int, int] | None:
    """The largest blocks of a backend that divide weights `[..., K, F]`, or None."""
    found = [next((size for size in _SIZES[backend] if n % size == 0), 0) for n in shape[-2:]]
    return (found[0], found[1]) if all(found) else None


def supports(
    shape: tuple[int, ...],
    geometry: Geometry,
    image: tuple[int, ...],
    backend: str,
    block: tuple[int, int] | None = None,
) -> bool | str:
    """True where a convolution lowers for a backend, or the reason why not.

    Args:
      shape: of the weight, `[kh, kw, cin, cout]`.
      geometry: of the convolution.
      image: `[n, h, w, cin]`.
      backend: one of `BACKENDS`.
      block: of (input channels, filters); None for that of `block_for`.
    """
    if backend not in BACKENDS:
        return f"Pallas kernels are for a GPU or TPU, not for {backend}"
    if backend == "gpu" and triton is None:
        return f"jax {jax.__version__} has no jax.experimental.pallas.triton any more, which compiles them for a GPU"
    if geometry.groups != 1:
        return f"channels in {geometry.groups} groups"
    sizes = _SIZES[backend]
    block = block or block_for(shape, backend)
    if block is None:
        return f"no blocks of {' or '.join(map(str, sizes))} divide {shape[2]} channels and {shape[3]} filters"
    if not set(block) <= set(sizes):
        return f"blocks of {block[0]}x{block[1]}; on a {backend} the sizes are {', '.join(map(str, sizes))}"
    if backend == "tpu":
        p = _pixels(geometry, image[1], image[2], backend)
        most = geometry.size[0] * geometry.size[1] * shape[2] // block[0]
        held = p.planes * p.rows * p.columns * shape[2] + most * block[0] * block[1] + 2 * p.th * p.tw * block[1]
        if 2 * 4 * held > _FAST:
            return f"a program needs {8 * held >> 20} MiB of fast memory, more than {_FAST >> 20} MiB"
    return True


def target() -> tuple[str, bool]:
    """The backend whose kernels run here, and whether interpreted: without a device the GPU's are, for tests."""
    here = jax.default_backend()
    return (here, False) if here in BACKENDS else ("gpu", True)


def prepared(w: np.ndarray, geometry: Geometry, image: tuple[int, ...], most: float = 0.5) -> Blocks | str:
    """The blocks of a layer that Pallas is to run on `target`, or the reason why not.

    Args:
      w: `[kh, kw, cin, cout]`.
      geometry: of the convolution.
      image: `[n, h, w, cin]`.
      most: share of live blocks above which XLA's dense convolution is left to run. One half is a guess: nothing
        has been timed.
    """
    backend, _ = target()
    reason = supports(w.shape, geometry, image, backend)
    if isinstance(reason, str):
        return reason
    block = block_for(w.shape, backend)
    assert block is not None  # `supports` said so
    found = blocks(w, block)
    share = int(np.asarray(found.live).sum()) * block[0] * block[1] / w.size
    return found if share <= most else f"{share:.0%} of the blocks of {block[0]}x{block[1]} are live"


class _Pixels(NamedTuple):
    """Tiles of an output and the planes that they read.

    Attributes:
      th, tw: rows and columns of a tile.
      oh, ow: of the output in whole tiles.
      rows, columns: of a plane.
      planes: number of them.
      up, left: rows and columns of a plane before the output's first.
    """

    th: int
    tw: int
    oh: int
    ow: int
    rows: int
    columns: int
    planes: int
    up: int
    left: int


def _pixels(g: Geometry, h: int, w: int, backend: str) -> _Pixels:
    (oh, ow), taps, pixels = g.out(h, w), g.taps(), _PIXELS[backend]
    if backend == "tpu":
        tw = -(-ow // 8) * 8
        th = max(1, min(oh, pixels // tw))
    else:
        th = min(8, 1 << (oh - 1).bit_length())
        tw = pixels // th
    oh, ow = -(-oh // th) * th, -(-ow // tw) * tw
    up, left = (max(0, -min(t[axis] for t in taps)) for axis in (1, 2))
    down, right = (max(0, *(t[axis] for t in taps)) for axis in (1, 2))
    rows, columns = up + oh + down, left + ow + right
    if backend == "tpu":
        return _Pixels(th, tw, oh, ow, rows, ow, len({(phase, dx) for phase, _, dx in taps}), up, left)
    return _Pixels(th, tw, oh, ow, rows, columns, len(g.phases()), up, left)


def _planes(x: Array, g: Geometry, p: _Pixels, backend: str) -> tuple[Array, np.ndarray]:
    """The image as planes `[n, planes, rows, columns, cin]`, and (plane, row, column) of each tap's first read."""
    n, h, w, c = x.shape
    (sh, sw), phases = g.strides, g.phases()
    columns = p.left + p.ow + max(0, *(dx for _, _, dx in g.taps()))
    tall, wide = p.rows * sh, columns * sw
    up, left = p.up * sh, p.left * sw
    widths = [(0, 0, 0), (up, tall - up - h, 0), (left, wide - left - w, 0), (0, 0, 0)]  # below zero cuts
    x = lax.pad(x, jnp.zeros((), x.dtype), widths).reshape(n, p.rows, sh, columns, sw, c)
    cut = [x[:, :, a, :, b] for a, b in phases]
    if backend != "tpu":
        return jnp.stack(cut, axis=1), np.array([(k, p.up + dy, p.left + dx) for k, dy, dx in g.taps()], np.int32)
    shifted = sorted({(k, dx) for k, _, dx in g.taps()})
    planes = jnp.stack([cut[k][:, :, p.left + dx : p.left + dx + p.ow] for k, dx in shifted], axis=1)
    return planes, np.array([(shifted.index((k, dx)), p.up + dy, 0) for k, dy, dx in g.taps()], np.int32)


def _kernel(live, plane, row, column, part, weight, x, y, *, shifted):  # type: ignore[no-untyped-def]
    _, th, tw, bf = y.shape
    bk, group = weight.shape[2], pl.program_id(3)
    top, left = pl.program_id(1) * th, pl.program_id(2) * tw

    def step(k, total):  # type: ignore[no-untyped-def]
        rows = pl.ds(top + row[group, k], th)
        columns = slice(None) if shifted else pl.ds(left + column[group, k], tw)
        channels = pl.ds(pl.multiple_of(part[group, k] * bk, bk), bk)
        window = x[0, plane[group, k], rows, columns, channels].reshape(th * tw, bk)
        exact = lax.Precision.HIGHEST
        return total + jnp.dot(window, weight[0, k], precision=exact, preferred_element_type=jnp.float32)

    total = lax.fori_loop(0, live[group, 0], step, jnp.zeros((th * tw, bf), jnp.float32))
    y[0] = total.reshape(th, tw, bf)


def _compiler_params(backend: str) -> Any:
    return pltpu.CompilerParams() if backend == "tpu" else triton.CompilerParams(num_warps=4)


@functools.partial(jax.jit, static_argnames=("geometry", "backend", "interpret"))
def block_sparse_conv(x: Array, w: Blocks, *, geometry: Geometry, backend: str, interpret: bool = False) -> Array:
    """Convolves `x [n, h, w, cin]` with live blocks of `[kh, kw, cin, cout]`.

    Args:
      x: float32.
      w: of `blocks`, from the kernel.
      geometry: size, strides and pads.
      backend: "gpu" or "tpu", whose tiles and planes are used.
      interpret: run without a device, for tests; blocks of any size then.

    Raises:
      ValueError: the reason of `supports`.
    """
    (n, h, wide, cin), (groups, most, bk, bf) = x.shape, w.weight.shape
    reason = supports((*geometry.size, cin, groups * bf), geometry, x.shape, backend, (bk, bf))
    if reason is not True and not interpret:
        raise ValueError(f"the Pallas convolution does not run: {reason}")
    p = _pixels(geometry, h, wide, backend)
    planes, first = _planes(x, geometry, p, backend)
    taps, parts = w.places // (cin // bk), w.places % (cin // bk)
    tables = (w.live, *(jnp.asarray(first[:, k])[taps] for k in range(3)), parts)
    fast: dict[str, Any] = {"memory_space": pltpu.SMEM} if backend == "tpu" else {}
    y = pl.pallas_call(
        functools.partial(_kernel, shifted=backend == "tpu"),
        out_shape=jax.ShapeDtypeStruct((n, p.oh, p.ow, groups * bf), jnp.float32),
        grid=(n, p.oh // p.th, p.ow // p.tw, groups),
        in_specs=[
            *(pl.BlockSpec(t.shape, lambda b, i, j, g: (0, 0), **fast) for t in tables),
            pl.BlockSpec((1, most, bk, bf), lambda b, i, j, g: (g, 0, 0, 0)),
            pl.BlockSpec((1, *planes.shape[1:]), lambda b, i, j, g: (b, 0, 0, 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, p.th, p.tw, bf), lambda b, i, j, g: (b, i, j, g)),
        compiler_params=None if interpret else _compiler_params(backend),
        interpret=interpret,
    )(*tables, w.weight, planes)
    oh, ow = geometry.out(h, wide)
    multiply = exact.dense_conv(geometry, lax.Precision.HIGHEST)
    return exact.checked(y[:, :oh, :ow], multiply, x, lambda: _dense(w, cin, geometry))


def block_sparse_matmul(x: Array, w: Blocks, *, backend: str, rows: int = 128, interpret: bool = False) -> Array:
    """`x [n, K] @ w [K, F]`, live blocks only: the convolution of n / rows images of one row with one tap.

    Args:
      x: float32, n a multiple of `rows`.
      w: of `blocks`.
      backend: as in `block_sparse_conv`.
      rows: of x that lie together in fast memory.
      interpret: run without a device.

    Raises:
      ValueError: n is not a multiple of `rows`, or the reason of `supports`.
    """
    n, k = x.shape
    if rows < 1 or n % rows:
        raise ValueError(f"{n} rows are not a multiple of {rows}")
    image = x.reshape(n // rows, 1, rows, k)
    one = Geometry((1, 1), (1, 1), ((0, 0), (0, 0)))
    return block_sparse_conv(image, w, geometry=one, backend=backend, interpret=interpret).reshape(n, -1)
