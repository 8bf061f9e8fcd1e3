"""The unified format: a unified block is a magnitude and a sign a weight, a pruned block nothing, a free one itself.

Blocks are those of the constraint (`unify`, `unify_and_prune`, `prune_blocks`); what each of them is, is read off the
weights. With n_b weights in block b, q + 1 bits a weight (raw: those of its dtype):

    pruned      a bit a block, left out where none is                B
    unified     a bit a block that is left, left out where none is   B - pruned
    signs       a bit a weight of a unified block                    sum n_b
    magnitudes  one value a unified block                            q  (raw: q + 1, as dtypes have their sign bit)
    free        the weights of the other blocks                      sum n_b (q + 1)

in bits, each array rounded up to a byte. On levels (`unify(...) & quantize(...)`) q + 1 is the width of a code and
`levels` holds the scale or codebook.

Source: S. Lin et al., "Efficient Micro-Structured Weight Unification and Pruning for Neural Network Compression", 2021;
the layout is ours.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from compressx.formats.base import PIECE, Format, Packed, choice, dtype_of, fail, nbytes, only, pieces, take
from compressx.formats.parts import check_shape, clean, count_flags, fits, pack_codes, part, read_codes, read_flags
from compressx.formats.quantized import (
    Coded,
    check_codes,
    codes_of,
    decoded,
    levels_bytes,
    outputs_of,
    pack_signed,
    read_levels,
    to_signed,
    width,
    write_levels,
)
from compressx.formats.weight import Bytes, Weight

_KINDS = ("unify_and_prune", "unify", "prune_blocks")
MAX_EXTENT = 1 << 30


def supports(w: np.ndarray, constraint: Any) -> bool | str:
    """True for floating-point weights under a constraint that cuts blocks."""
    if part(constraint, None, _KINDS) is None:
        return "needs a constraint with unify(...), unify_and_prune(...) or prune_blocks(...), which cuts the blocks"
    if w.dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        return f"dtype {w.dtype.name} has no signs and magnitudes"
    return fits(w, 2)


def block_order(shape: tuple[int, ...], block: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Flat positions of all weights, block after block, and the number of weights in each block.

    Args:
      shape: of the stored weight.
      block: two extents (positions, filters), or three (input channels, taps, output channels).
    """
    return _ordered(*_grid(shape, block))


def _grid(shape: tuple[int, ...], block: list[int]) -> tuple[tuple[int, ...], list[int]]:
    """The axes that blocks cut, of the weight and of a block."""
    if len(block) == 2:
        return (math.prod(shape[:-1]), shape[-1]), block
    return (math.prod(shape[:-2]), shape[-2], shape[-1]), [block[1], block[0], block[2]]


def _ordered(extents: tuple[int, ...], step: list[int]) -> tuple[np.ndarray, np.ndarray]:
    if not any(n % b for n, b in zip(extents, step, strict=True)):
        # whole blocks: an axis for the blocks and one for what is inside, blocks first
        cut = [part for n, b in zip(extents, step, strict=True) for part in (n // b, b)]
        grid = np.arange(math.prod(extents)).reshape(cut)
        order = grid.transpose([*range(0, len(cut), 2), *range(1, len(cut), 2)]).reshape(-1)
        return order, np.full(order.size // math.prod(step), math.prod(step))
    dtype = np.int32 if math.prod(extents) <= np.iinfo(np.int32).max else np.int64
    ids = np.zeros(extents, dtype)
    for a, (n, b) in enumerate(zip(extents, step, strict=True)):
        along = [1] * len(extents)
        along[a] = n
        ids *= -(-n // b)
        ids += (np.arange(n) // b).astype(dtype).reshape(along)
    flat = ids.reshape(-1)
    return np.argsort(flat, kind="stable"), np.bincount(flat)


def _bits_of(x: np.ndarray) -> np.ndarray:
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize]
    bits: np.ndarray = np.ascontiguousarray(x).view(unsigned)
    return bits


class _Blocks(NamedTuple):
    """A weight block after block: its bits or codes, the size of each block, which are pruned, which unified."""

    x: np.ndarray
    negative: np.ndarray
    sizes: np.ndarray
    high: np.ndarray
    pruned: np.ndarray
    unified: np.ndarray
    block: list[int]
    coded: Coded | None


def _classed(weight: Weight) -> _Blocks:
    w = weight.w
    found = part(weight.constraint, weight.structure, _KINDS)
    assert found is not None  # `supports` said so
    block = [int(b) for b in found[0]["block"]]
    order, sizes = block_order(w.shape, block)
    c = weight.once(codes_of) if part(weight.constraint, None, ("quantize",)) is not None else None
    x = (w if c is None else c.codes).reshape(-1)[order]
    if c is None:
        bits = _bits_of(x)
        top = bits.dtype.type(1 << (8 * x.dtype.itemsize - 1))
        magnitude, negative = bits & ~top, bits & top > 0
    else:
        magnitude, negative = np.abs(x), x < 0
    starts = np.cumsum(sizes) - sizes
    high, low = np.maximum.reduceat(magnitude, starts), np.minimum.reduceat(magnitude, starts)
    pruned = (high == 0) & ~np.logical_or.reduceat(negative, starts)
    return _Blocks(x, negative, sizes, high, pruned, (high == low) & ~pruned, block, c)


def _size(weight: Weight) -> Bytes:
    held = weight.once(_classed)
    pruned, unified = int(np.count_nonzero(held.pruned)), int(np.count_nonzero(held.unified))
    tied = int(held.sizes[held.unified].sum())
    free = int(held.sizes[~held.pruned & ~held.unified].sum())
    index = -(-held.sizes.size // 8) if pruned else 0
    if unified:
        index += -(-(held.sizes.size - pruned) // 8) + -(-tied // 8)
    if held.coded is None:
        return Bytes(index, unified + free)
    b = width(held.coded.levels)
    return Bytes(index + -(-unified * (b - 1) // 8) + -(-free * b // 8) + levels_bytes(weight), 0)


def _pack(weight: Weight) -> Packed:
    w = weight.w
    x, negative, sizes, high, pruned, unified, block, c = weight.once(_classed)
    in_unified, in_free = np.repeat(unified, sizes), np.repeat(~pruned & ~unified, sizes)
    arrays: dict[str, np.ndarray] = {}
    meta: dict[str, Any] = {"block": block, "coded": c is not None}
    if pruned.any():
        arrays["pruned"] = np.packbits(pruned)
    if unified.any():
        arrays["unified"] = np.packbits(unified[~pruned])
        arrays["signs"] = np.packbits(negative[in_unified])
    if c is None:
        arrays["magnitudes"] = high[unified].view(w.dtype)
        arrays["free"] = x[in_free]
    else:
        b = width(c.levels)
        arrays["magnitudes"] = pack_codes(high[unified], b - 1)
        arrays["free"] = pack_signed(x[in_free], c.levels)
        levels, about = write_levels(c)
        arrays |= levels
        meta |= about
    return Packed("unified", w.shape, w.dtype.name, arrays, meta)


def _flags(packed: Packed, name: str, n: int) -> np.ndarray:
    """The string of n bits of that name; without the array no bit is set."""
    if name not in packed.arrays:
        return np.zeros(-(-n // 8), np.uint8)
    stored = take(packed, name, "uint8", (-(-n // 8),))
    if not clean(stored, n):
        fail(f"unified/{name}", "bits after the last one are set")
    return stored


def _cut(packed: Packed) -> tuple[tuple[int, ...], list[int]]:
    """The axes that blocks cut, of the weight and of a block, checked."""
    check_shape(packed, 2)
    block = packed.meta.get("block")
    if (
        not isinstance(block, list)
        or len(block) not in (2, 3)
        or not all(type(b) is int and 1 <= b <= MAX_EXTENT for b in block)
    ):
        fail("unified/block", f"{str(block)[:80]} is not a list of two or three extents")
    return _grid(packed.shape, block)


def _workspace(packed: Packed) -> int:
    """Strips of whole blocks are read together: the order, the kind and the code of each of their weights."""
    extents, step = _cut(packed)
    return 48 * min(step[0], extents[0]) * math.prod(extents[1:]) + nbytes(packed)


def _strips(packed: Packed) -> Iterator[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
    """Strip by strip of blocks along the first axis: its indices, the blocks' sizes, which are unified, which free."""
    extents, step = _cut(packed)
    number = math.prod(-(-n // b) for n, b in zip(extents, step, strict=True))
    pruned = _flags(packed, "pruned", number)
    unified = _flags(packed, "unified", number - count_flags(pruned))
    across = np.ones(1, np.int64)
    for n, b in zip(extents[1:], step[1:], strict=True):
        across = (across[:, None] * np.minimum(b, n - np.arange(0, n, b))).reshape(-1)
    blocks, left = 0, 0
    for strip in pieces(extents[0], step[0] * max(1, PIECE // (step[0] * math.prod(extents[1:])))):
        along = np.minimum(step[0], strip.stop - np.arange(strip.start, strip.stop, step[0]))
        sizes = (along[:, None] * across).reshape(-1)
        stay = ~read_flags(pruned, slice(blocks, blocks := blocks + sizes.size))
        tied = np.zeros(sizes.size, bool)
        tied[stay] = read_flags(unified, slice(left, left := left + int(np.count_nonzero(stay))))
        yield strip, sizes, tied, stay & ~tied


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "pruned", "unified", "signs", "magnitudes", "free", "levels")
    dtype = dtype_of(packed)
    if dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        fail("unified", f"dtype {packed.dtype!r} has no signs and magnitudes")
    extents, step = _cut(packed)
    blocks, tied, loose = 0, 0, 0  # unified blocks, weights in them, weights of free blocks
    for _, sizes, unified, free in _strips(packed):
        blocks += int(np.count_nonzero(unified))
        tied, loose = tied + int(sizes[unified].sum()), loose + int(sizes[free].sum())
    signs = _flags(packed, "signs", tied)
    values = (_coded if choice(packed, "coded", (True, False)) else _raw)(packed, blocks, loose)
    across = math.prod(extents[1:])
    w = np.empty(extents[0] * across, dtype)
    blocks, tied, loose = 0, 0, 0
    for strip, sizes, unified, free in _strips(packed):
        order, _ = _ordered((strip.stop - strip.start, *extents[1:]), step)
        in_unified, in_free = order[np.repeat(unified, sizes)], order[np.repeat(free, sizes)]
        magnitude = values.magnitudes(slice(blocks, blocks := blocks + int(np.count_nonzero(unified))))
        each = np.repeat(magnitude, sizes[unified])
        negative = read_flags(signs, slice(tied, tied := tied + each.size))
        x = np.zeros(order.size, each.dtype)
        x[in_unified] = np.where(negative, values.negated(each), each)
        x[in_free] = values.free(slice(loose, loose := loose + in_free.size))
        at = slice(strip.start * across, strip.stop * across)
        w[at] = values.weights(x, at.start)
    return w.reshape(packed.shape)


class _Values(NamedTuple):
    """How the magnitudes of unified blocks and the free weights are stored: as integers, of which weights are made."""

    magnitudes: Callable[[slice], np.ndarray]
    free: Callable[[slice], np.ndarray]
    negated: Callable[[np.ndarray], np.ndarray]
    weights: Callable[[np.ndarray, int], np.ndarray]


def _raw(packed: Packed, blocks: int, loose: int) -> _Values:
    """The bits of weights."""
    if "levels" in packed.arrays:
        fail("unified/levels", "present, though the weights are raw")
    dtype = dtype_of(packed)
    high = _bits_of(take(packed, "magnitudes", dtype.name, (blocks,)))
    held = _bits_of(take(packed, "free", dtype.name, (loose,)))
    top = high.dtype.type(1 << (8 * dtype.itemsize - 1))
    if any((high[part] & top).any() for part in pieces(blocks)):
        fail("unified/magnitudes", "a magnitude is negative")
    return _Values(lambda at: high[at], lambda at: held[at], lambda x: x | top, lambda x, _: x.view(dtype))


def _coded(packed: Packed, blocks: int, loose: int) -> _Values:
    """Indices of levels."""
    levels, structure = read_levels(packed)
    b = width(levels)
    stored = take(packed, "magnitudes", "uint8", (-(-blocks * (b - 1) // 8),))
    held = take(packed, "free", "uint8", (-(-loose * b // 8),))
    check_codes("unified/magnitudes", stored, blocks * (b - 1))
    check_codes("unified/free", held, loose * b)

    def magnitudes(at: slice) -> np.ndarray:
        k = read_codes(stored, at, b - 1)
        if k.size and not 1 <= int(k.min()) <= int(k.max()) <= levels.top:
            fail("unified/magnitudes", f"indices {int(k.min())}..{int(k.max())} of 1..{levels.top}")
        return k

    def weights(codes: np.ndarray, start: int) -> np.ndarray:
        return decoded(codes, start, structure, levels, dtype_of(packed), outputs_of(packed))

    def free(at: slice) -> np.ndarray:
        return to_signed("unified/free", read_codes(held, at, b), b, levels.top)

    return _Values(magnitudes, free, np.negative, weights)


UNIFIED = Format("unified", supports, _size, _pack, _unpack, _workspace)
