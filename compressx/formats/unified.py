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
from typing import Any

import numpy as np

from compressx.formats.base import Format, Packed, choice, dtype_of, fail, only, take
from compressx.formats.parts import check_shape, fits, part
from compressx.formats.quantized import (
    Coded,
    coded,
    pack_codes,
    read_levels,
    to_signed,
    to_unsigned,
    unpack_codes,
    weights,
    width,
    write_levels,
)

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
    """Flat places of all weights, block after block, and the number of weights in each block.

    Args:
      shape: of the stored weight.
      block: two extents (positions, filters), or three (input channels, taps, output channels).
    """
    extents: tuple[int, ...]
    if len(block) == 2:
        extents, step = (math.prod(shape[:-1]), shape[-1]), block
    else:
        extents, step = (math.prod(shape[:-2]), shape[-2], shape[-1]), [block[1], block[0], block[2]]
    ids = np.zeros(extents, np.int64)
    for a, (n, b) in enumerate(zip(extents, step, strict=True)):
        along = [1] * len(extents)
        along[a] = n
        ids = ids * -(-n // b) + (np.arange(n) // b).reshape(along)
    flat = ids.reshape(-1)
    return np.argsort(flat, kind="stable"), np.bincount(flat)


def _bits_of(x: np.ndarray) -> np.ndarray:
    unsigned = {2: np.uint16, 4: np.uint32, 8: np.uint64}[x.dtype.itemsize]
    bits: np.ndarray = np.ascontiguousarray(x).view(unsigned)
    return bits


def _pack(w: np.ndarray, constraint: Any, structure: Any) -> Packed:
    found = part(constraint, structure, _KINDS)
    assert found is not None  # `supports` said so
    block = [int(b) for b in found[0]["block"]]
    order, sizes = block_order(w.shape, block)
    c = coded(w, constraint, structure) if part(constraint, None, ("quantize",)) is not None else None
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
    unified = (high == low) & ~pruned
    rest = unified[~pruned]
    in_unified, in_free = np.repeat(unified, sizes), np.repeat(~pruned & ~unified, sizes)
    arrays: dict[str, np.ndarray] = {}
    meta: dict[str, Any] = {"block": block, "coded": c is not None}
    if pruned.any():
        arrays["pruned"] = np.packbits(pruned)
    if unified.any():
        arrays["unified"] = np.packbits(rest)
        arrays["signs"] = np.packbits(negative[in_unified])
    if c is None:
        arrays["magnitudes"] = high[unified].view(w.dtype)
        arrays["free"] = x[in_free]
    else:
        b = width(c.levels)
        arrays["magnitudes"] = pack_codes(high[unified], b - 1)
        arrays["free"] = pack_codes(to_unsigned(x[in_free], b), b)
        levels, about = write_levels(c)
        arrays |= levels
        meta |= about
    return Packed("unified", w.shape, w.dtype.name, arrays, meta)


def _mask(packed: Packed, name: str, n: int) -> np.ndarray:
    if name not in packed.arrays:
        return np.zeros(n, bool)
    bits = np.unpackbits(take(packed, name, "uint8", (-(-n // 8),)))
    if bits[n:].any():
        fail(f"unified/{name}", "bits after the last one are set")
    return bits[:n].astype(bool)


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "pruned", "unified", "signs", "magnitudes", "free", "levels")
    check_shape(packed, 2)
    dtype = dtype_of(packed)
    if dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        fail("unified", f"dtype {packed.dtype!r} has no signs and magnitudes")
    block = packed.meta.get("block")
    if (
        not isinstance(block, list)
        or len(block) not in (2, 3)
        or not all(type(b) is int and 1 <= b <= MAX_EXTENT for b in block)
    ):
        fail("unified/block", f"{block!r} is not a list of two or three extents")
    order, sizes = block_order(packed.shape, block)
    pruned = _mask(packed, "pruned", sizes.size)
    unified = np.zeros(sizes.size, bool)
    unified[~pruned] = _mask(packed, "unified", int((~pruned).sum()))
    free = ~pruned & ~unified
    tied, loose = int(sizes[unified].sum()), int(sizes[free].sum())
    negative = _mask(packed, "signs", tied)
    number = int(unified.sum())
    in_unified, in_free = np.repeat(unified, sizes), np.repeat(free, sizes)
    flat = np.empty(order.size, np.int64)
    flat[order] = np.arange(order.size)
    if not choice(packed, "coded", (True, False)):
        if "levels" in packed.arrays:
            fail("unified/levels", "present, though the weights are raw")
        high = _bits_of(take(packed, "magnitudes", dtype.name, (number,)))
        top = high.dtype.type(1 << (8 * dtype.itemsize - 1))
        if (high & top).any():
            fail("unified/magnitudes", "a magnitude is negative")
        bits = np.zeros(order.size, high.dtype)
        bits[in_unified] = np.repeat(high, sizes[unified]) | np.where(negative, top, high.dtype.type(0))
        bits[in_free] = _bits_of(take(packed, "free", dtype.name, (loose,)))
        return bits[flat].view(dtype).reshape(packed.shape)
    levels, structure = read_levels(packed)
    b = width(levels)
    stored = take(packed, "magnitudes", "uint8", (-(-number * (b - 1) // 8),))
    k = unpack_codes("unified/magnitudes", stored, number, b - 1)
    if k.size and not 1 <= int(k.min()) <= int(k.max()) <= levels.top:
        fail("unified/magnitudes", f"indices {int(k.min())}..{int(k.max())} of 1..{levels.top}")
    each = np.repeat(k, sizes[unified])
    codes = np.zeros(order.size, np.int32)
    codes[in_unified] = np.where(negative, -each, each)
    stored = unpack_codes("unified/free", take(packed, "free", "uint8", (-(-loose * b // 8),)), loose, b)
    codes[in_free] = to_signed("unified/free", stored, b, levels.top)
    return weights(Coded(codes[flat].reshape(packed.shape), structure, levels), dtype)


UNIFIED = Format("unified", supports, _pack, _unpack)
