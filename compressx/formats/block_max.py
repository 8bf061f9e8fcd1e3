"""The block-max format: one value for every block of a row, and its place inside the block.

The matrix is the GEMM view `[in, out]`; rows and blocks run as in `constraints.darb` (meta `axis`). Row r of length L
has ceil(L / B_r) blocks, so no pointers are needed. Arrays, with S block sizes in use (meta `sizes`), v bytes a weight:

    values   one a block, rows after rows                n v bytes, n = sum_r ceil(L / B_r)
    offsets  ceil(log2 B_r) bits a block                 ceil(sum_r ceil(L / B_r) ceil(log2 B_r) / 8) bytes
    codes    ceil(log2 S) bits a row; left out if S = 1  ceil(R ceil(log2 S) / 8) bytes

A block without a non-zero stores a zero at place 0. With a `block_max` or `darb` constraint and its structure the sizes
are the constraint's; otherwise each row takes the largest power of two that its non-zeros allow.

Source: A. Ren et al., "DARB: A Density-Adaptive Regular-Block Pruning for Deep Neural Networks", 2020, storage.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from compressx.constraints.darb import MAX_SIZES, POWERS
from compressx.formats.base import PIECE, Format, Packed, choice, dtype_of, fail, index_dtype, only, pieces, take
from compressx.formats.parts import check_shape, clean, entries, fits, pack_bits, part, read_bits
from compressx.formats.weight import Bytes, Support, Weight

_AXES = ("outputs", "inputs")


def _bits(n: Any) -> Any:
    """ceil(log2 n) for positive integers."""
    return np.ceil(np.log2(np.asarray(n, np.float64))).astype(np.int64)


def _rows(w: np.ndarray, axis: str) -> np.ndarray:
    m = w.reshape(-1, w.shape[-1])
    return np.ascontiguousarray(m if axis == "outputs" else m.T)


def row_sizes(mask: np.ndarray, sizes: tuple[int, ...] = POWERS) -> np.ndarray:
    """The largest of the sizes with at most one non-zero in every block of a row (1 if no other): int64 `[R]`.

    Args:
      mask: bool `[R, L]`.
      sizes: candidates, each a multiple of the one before.
    """
    best = np.ones(mask.shape[0], np.int64)
    left, held, last = np.arange(mask.shape[0]), mask, 1
    for size in (s for s in sizes if s > 1):
        # `held` says which blocks of the size before hold a weight: a block of this size joins some of them
        if size == 2 * last:
            odd = held[:, 1::2]
            joined = held[:, ::2].copy()
            stay = ~(joined[:, : odd.shape[1]] & odd).any(axis=1)
            joined[:, : odd.shape[1]] |= odd
        else:
            number = np.add.reduceat(held, np.arange(0, held.shape[1], size // last), axis=1, dtype=np.int32)
            stay, joined = (number <= 1).all(axis=1), number > 0
        left, held, last = left[stay], joined[stay], size
        best[left] = size
    return best


def _powers(support: Support) -> np.ndarray:
    return row_sizes(support.matrix)


def _cut(weight: Weight) -> tuple[str, np.ndarray]:
    """The axis and the block size of every row."""
    positions, filters = weight.support.matrix.shape
    found = part(weight.constraint, weight.structure, ("block_max", "darb"))
    if found is None:
        return "outputs", weight.support.once(_powers)
    spec, chosen = found
    axis: str = spec["axis"]
    if spec["kind"] == "block_max":
        return axis, np.full(positions if axis == "outputs" else filters, spec["size"], np.int64)
    if chosen is not None:
        return axis, np.array(spec["allowed"], np.int64)[np.asarray(chosen)]
    return axis, weight.support.once(_powers) if axis == "outputs" else row_sizes(_rows(weight.support.mask, axis))


def _size(weight: Weight) -> Bytes:
    axis, size = _cut(weight)
    length = weight.support.matrix.shape[1 if axis == "outputs" else 0]
    used, rows = np.unique(size, return_counts=True)
    blocks = -(-length // used) * rows
    index = -(-int((blocks * _bits(used)).sum()) // 8)
    return Bytes(index + -(-size.size * int(_bits(used.size)) // 8), int(blocks.sum()))


def _pack(weight: Weight) -> Packed:
    w = weight.w
    axis, size = _cut(weight)
    m, mask = _rows(w, axis), _rows(weight.support.mask, axis)
    rows, length = m.shape
    blocks = -(-length // size)
    first = np.cumsum(blocks) - blocks
    values = np.zeros(int(blocks.sum()), m.dtype)
    offsets = np.zeros(values.size, index_dtype(int(size.max())))
    # all entries of some rows together, so that their indices take little beside the weight
    for here in pieces(rows, max(1, (PIECE << 4) // length)):
        row, column = np.nonzero(mask[here])
        row += here.start
        block = column // size[row]
        slot = first[row] + block
        again = np.flatnonzero(slot[1:] == slot[:-1])
        if again.size:
            at = int(row[again[0]])
            raise ValueError(f"row {at} has a block of {size[at]} with more than one non-zero")
        values[slot] = m[row, column]
        offsets[slot] = column - block * size[row]
    used, code = np.unique(size, return_inverse=True)
    bits = _bits(used)
    wide = int(bits[0]) if used.size == 1 else np.repeat(bits[code.reshape(-1)], blocks)
    arrays = {"values": values, "offsets": pack_bits(offsets, wide)}
    if used.size > 1:
        arrays["codes"] = pack_bits(code.reshape(-1), int(_bits(used.size)))
    return Packed("block-max", w.shape, w.dtype.name, arrays, {"axis": axis, "sizes": used.tolist()})


def unpacked_places(packed: Packed) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Values, rows and columns of every block's weight, rows after rows, and the axis along which rows run.

    Raises:
      CompressedFileError: the arrays are inconsistent.
    """
    values, axis, places = _places(packed)
    found = list(places)
    none = np.zeros(0, np.int64)
    row, column = (np.concatenate([none, *(p[k] for p in found)]) for k in (0, 1))
    return values, row, column, axis


def _places(packed: Packed) -> tuple[np.ndarray, str, Iterator[tuple[np.ndarray, np.ndarray]]]:
    """The value of every block, the axis, and, in pieces, the rows and columns at which they stand."""
    only(packed, "values", "offsets", "codes")
    check_shape(packed, 2)
    axis = choice(packed, "axis", _AXES)
    sizes = packed.meta.get("sizes")
    if (
        not isinstance(sizes, list)
        or len(sizes) > MAX_SIZES
        or not all(type(s) is int and 1 <= s <= 1 << 32 for s in sizes)
    ):
        fail("block-max/sizes", f"not a list of at most {MAX_SIZES} block sizes")
    if any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        fail("block-max/sizes", f"{sizes} do not ascend")
    extents = math.prod(packed.shape[:-1]), packed.shape[-1]
    rows, length = extents if axis == "outputs" else extents[::-1]
    values = take(packed, "values", dtype_of(packed).name, (None,))
    if values.size < rows:
        fail("block-max/values", f"{values.size} values cannot fill the blocks of {rows} rows")
    width = int(_bits(len(sizes))) if len(sizes) > 1 else 0
    codes = np.zeros(0, np.uint8)
    if width:
        codes = take(packed, "codes", "uint8", (-(-rows * width // 8),))
    elif "codes" in packed.arrays or not sizes:
        fail("block-max/codes", f"do not fit {rows} rows of block sizes {sizes}")
    if not clean(codes, rows * width):
        fail("block-max/codes", "bits after the last row are set")
    table = np.array(sizes, np.int64)
    blocks_of, bits_of = -(-length // table), _bits(table)

    def code_of(row: np.ndarray) -> np.ndarray:
        code = read_bits(codes, width * row, width) if width else np.zeros(row.size, np.int64)
        if code.size and int(code.max()) >= len(sizes):
            fail("block-max/codes", f"name other than the {len(sizes)} block sizes")
        return code

    def blocks(here: slice) -> np.ndarray:
        return blocks_of[code_of(np.arange(here.start, here.stop))]

    used = np.zeros(len(sizes), np.int64)  # rows of each size
    for here in pieces(rows):
        used += np.bincount(code_of(np.arange(here.start, here.stop)), minlength=len(sizes))
    number, bits = int((used * blocks_of).sum()), int((used * blocks_of * bits_of).sum())
    if number != values.size:
        fail("block-max/values", f"{values.size} values, expected {number}, one a block")
    stored = take(packed, "offsets", "uint8", (-(-bits // 8),))
    if not clean(stored, bits):
        fail("block-max/offsets", "bits after the last block are set")

    def places() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        read = 0
        for row, block in entries(blocks, rows):
            code = code_of(row)
            size, wide = table[code], bits_of[code]
            ends = read + np.cumsum(wide)
            offset = read_bits(stored, ends - wide, wide)
            start = block * size
            if (offset >= np.minimum(size, length - start)).any():
                fail("block-max/offsets", "a place lies outside its block")
            yield row, start + offset
            read = int(ends[-1])

    return values, axis, places()


def _unpack(packed: Packed) -> np.ndarray:
    values, axis, places = _places(packed)
    m = np.zeros((math.prod(packed.shape[:-1]), packed.shape[-1]), dtype_of(packed))
    lines, used = m if axis == "outputs" else m.T, 0
    for row, column in places:
        lines[row, column] = values[used : used + row.size]
        used += row.size
    return m.reshape(packed.shape)


BLOCK_MAX = Format("block-max", lambda w, constraint: fits(w, 2), _size, _pack, _unpack)
