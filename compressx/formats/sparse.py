"""Formats for weights with zeros anywhere: a bit a weight, compressed rows, or delta indices; and the values that stay.

None of them needs a constraint. Their values are the weights' own bits (float32, bfloat16, float16, ...), and a
negative zero is a value. Bytes of a weight of n entries, nnz of them non-zero, v bytes each, F filters:

    bitmask    ceil(n / 8) + nnz v
    csr        4 nnz + 4 (F + 1) + nnz v        (csr16: 2 nnz + 4 (F + 1) + nnz v)
    coo-delta  ceil(codes b / 8) + nnz v        (b bits a code, chosen for the fewest bytes)
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

from compressx.formats.base import (
    Format,
    Packed,
    check_increasing,
    check_offsets,
    check_range,
    dtype_of,
    fail,
    filters_first,
    index_dtype,
    integer,
    only,
    pieces,
    rank,
    take,
)
from compressx.formats.parts import clean, count_flags, entries, pack_codes, read_codes, read_flags
from compressx.formats.weight import Bytes, Support, Weight

MAX_WIDTH = 16  # bits of a delta code
_STRIDE = 1 << 20  # weights whose gaps are counted together


def _size(packed: Packed) -> int:
    return int(np.prod(packed.shape, dtype=np.int64))


# --- bitmask: one bit a weight in stored order (first weight in the highest bit), then the values in the same order.


def _size_bitmask(weight: Weight) -> Bytes:
    return Bytes(-(-weight.w.size // 8), weight.support.count)


def _values(weight: Weight) -> np.ndarray:
    """The weights that are not zero, in stored order; taken by their positions, which is faster than by a mask."""
    flat, values, end = weight.w.reshape(-1), np.empty(weight.support.count, weight.w.dtype), 0
    for found in _positions(weight.support.mask.reshape(-1)):
        np.take(flat, found, out=values[end : (end := end + found.size)], mode="clip")
    return values


def _pack_bitmask(weight: Weight) -> Packed:
    w, mask = weight.w, weight.support.mask
    arrays = {"mask": np.packbits(mask.reshape(-1)), "values": _values(weight)}
    return Packed("bitmask", w.shape, w.dtype.name, arrays, {})


def _unpack_bitmask(packed: Packed) -> np.ndarray:
    only(packed, "mask", "values")
    n = _size(packed)
    stored = take(packed, "mask", "uint8", (-(-n // 8),))
    if not clean(stored, n):
        fail("bitmask/mask", "bits after the last weight are set")
    values = take(packed, "values", dtype_of(packed).name, (count_flags(stored),))
    w, read = np.zeros(n, dtype_of(packed)), 0
    for part in pieces(n):
        found = np.flatnonzero(read_flags(stored, part))
        w[part][found] = values[read : (read := read + found.size)]
    return w.reshape(packed.shape)


BITMASK = Format("bitmask", rank(0), _size_bitmask, _pack_bitmask, _unpack_bitmask)


# --- csr: compressed sparse rows of the filters-first GEMM view [F, P], a filter a row, as the papers count it.


def csr(bits: int) -> Format:
    """Compressed sparse rows with column ids of 32 bits (`csr`, the papers' yardstick) or 16 (`csr16`).

    Arrays: `indptr` uint32 `[F + 1]`, `indices` (positions, increasing in a row) `[nnz]`, `values` `[nnz]`.
    """
    name, ids = {32: ("csr", "uint32"), 16: ("csr16", "uint16")}[bits]
    fits = rank(2)

    def supports(w: np.ndarray, constraint: Any) -> bool | str:
        reason = fits(w, constraint)
        if reason is not True:
            return reason
        positions = w.size // max(w.shape[-1], 1)
        return positions <= 1 << bits or f"{positions} positions need more than {bits} bits"

    def size(weight: Weight) -> Bytes:
        count = weight.support.count
        return Bytes(bits // 8 * count + 4 * (weight.w.shape[-1] + 1), count)

    def pack(weight: Weight) -> Packed:
        w = weight.w
        m, mask = filters_first(w), filters_first(weight.support.mask)
        indptr = np.zeros(m.shape[0] + 1, np.uint32)
        np.cumsum(mask.sum(axis=1, dtype=np.uint32), dtype=np.uint32, out=indptr[1:])
        indices = np.nonzero(mask)[1].astype(ids)
        return Packed(name, w.shape, w.dtype.name, {"indptr": indptr, "indices": indices, "values": m[mask]}, {})

    def unpack(packed: Packed) -> np.ndarray:
        only(packed, "indptr", "indices", "values")
        if len(packed.shape) < 2:
            fail(name, f"shape {list(packed.shape)} has no rows and columns")
        filters = packed.shape[-1]
        positions = int(np.prod(packed.shape[:-1], dtype=np.int64))
        indices = take(packed, "indices", ids, (None,))
        values = take(packed, "values", dtype_of(packed).name, indices.shape)
        indptr = take(packed, "indptr", "uint32", (filters + 1,))
        check_offsets(f"{name}/indptr", indptr, indices.size)
        m = np.zeros((positions, filters), dtype_of(packed))
        start, last = 0, -1
        for row, _ in entries(lambda r: np.diff(indptr[r.start : r.stop + 1].astype(np.int64)), filters):
            piece = slice(start, start := start + row.size)
            column = indices[piece].astype(np.int64)
            check_range(f"{name}/indices", column, positions)
            last = check_increasing(f"{name}/indices", row * positions + column, filters * positions, last)
            m[column, row] = values[piece]
        return m.reshape(packed.shape)

    return Format(name, supports, size, pack, unpack)


# --- coo-delta: the number of zeros before each value, in stored order, in codes of b bits.


def _positions(mask: np.ndarray) -> Iterator[np.ndarray]:
    """Where a flat mask is set, int64, in pieces that follow one another; none of them is empty."""
    for part in pieces(mask.size, _STRIDE):
        found = np.flatnonzero(mask[part])
        if found.size:
            yield found + part.start


def _gaps(mask: np.ndarray) -> Iterator[np.ndarray]:
    """How many zeros stand before each value, in the pieces of `_positions`."""
    last = -1
    for found in _positions(mask):
        gaps = np.empty_like(found)
        gaps[0] = found[0] - last - 1
        np.subtract(found[1:], found[:-1], out=gaps[1:])
        gaps[1:] -= 1
        last = int(found[-1])
        yield gaps


def _codes(support: Support) -> tuple[int, int]:
    """The width of least bytes (the smaller on a tie) and the number of codes it takes.

    The gaps are counted by their length, so that each width asks about lengths, of which there are few, not about gaps.
    """
    counts = np.zeros(1, np.int64)
    for gaps in _gaps(support.mask.reshape(-1)):
        more = np.bincount(gaps)
        if more.size > counts.size:
            counts, more = more, counts
        counts[: more.size] += more
    length = np.flatnonzero(counts)
    number = counts[length]
    best = (0, 0, 0)
    for width in range(1, MAX_WIDTH + 1):
        codes = support.count + int((length // ((1 << width) - 1) * number).sum())
        size = -(-codes * width // 8)
        if width == 1 or size < best[0]:
            best = (size, width, codes)
    return best[1], best[2]


def _least_delta(weight: Weight) -> Bytes:
    """A bit for every value, which only a weight without zeros reaches."""
    return Bytes(-(-weight.support.count // 8), weight.support.count)


def _size_delta(weight: Weight) -> Bytes:
    width, count = weight.support.once(_codes)
    return Bytes(-(-count * width // 8), weight.support.count)


def _pack_delta(weight: Weight) -> Packed:
    w, support = weight.w, weight.support
    width, count = support.once(_codes)
    escape = (1 << width) - 1
    codes = np.full(count, escape, index_dtype(escape + 1))
    written = 0
    for gaps in _gaps(support.mask.reshape(-1)):
        escapes = gaps // escape
        # The code of a value comes after its escapes.
        ends = written + np.cumsum(escapes + 1)
        codes[ends - 1] = gaps - escapes * escape
        written = int(ends[-1])
    arrays = {"codes": pack_codes(codes, width), "values": _values(weight)}
    return Packed("coo-delta", w.shape, w.dtype.name, arrays, {"width": width, "codes": count})


def _unpack_delta(packed: Packed) -> np.ndarray:
    only(packed, "codes", "values")
    n = _size(packed)
    width = integer(packed, "width", 1, MAX_WIDTH)
    count = integer(packed, "codes", 0, n)
    stored = take(packed, "codes", "uint8", (-(-count * width // 8),))
    if not clean(stored, count * width):
        fail("coo-delta/codes", "bits after the last code are set")
    values = take(packed, "values", dtype_of(packed).name, (None,))
    w = np.zeros(n, dtype_of(packed))
    reached, used = 0, 0  # weights and values behind the codes that are read
    for part in pieces(count):
        codes = read_codes(stored, part, width)
        is_value = codes < (1 << width) - 1
        ends = reached + np.cumsum(codes + is_value)
        places = ends[is_value] - 1
        check_range("coo-delta/codes", places, n)
        if used + places.size > values.size:
            fail("coo-delta/values", f"shape {list(values.shape)}, too few for the codes")
        w[places] = values[used : used + places.size]
        reached, used = int(ends[-1]), used + places.size
    take(packed, "values", dtype_of(packed).name, (used,))
    return w.reshape(packed.shape)


# A code below 2^b - 1 skips so many zeros and then writes the next value; the code 2^b - 1 is an escape, which skips
# 2^b - 1 zeros and writes nothing (cheaper than the filler zeros of Deep Compression, which cost a value each). Zeros
# after the last value have no code.
# Source of the scheme: S. Han, H. Mao, W. Dally, "Deep Compression", 2016, section 2.
COO_DELTA = Format("coo-delta", rank(0), _size_delta, _pack_delta, _unpack_delta, least=_least_delta)
