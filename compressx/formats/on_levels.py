"""Codes for the values of a format for zeros: pruned and quantized weights in b bits a value and that format's index.

`on_levels(inner, name)` is the format `<inner>-coded`. Its arrays are those that `inner` makes of the weight's signed
codes, so that index, order and blocks are the inner format's own; only the value array `name`, N values of v bytes, is
replaced. With b bits a code (a sign and an index, see `quantized`) and s bytes of scales or codebook:

    <name>    N codes of b bits, as `inner` lists the values                     ceil(N b / 8)  in place of N v
    levels    the scale, 4 bytes (8 for float64 weights), or the codebook        s

A value that `inner` stores though it is 0 (a kept weight on no level, a block without a weight) has code 0. The extents
of the value array are `meta["values"]`. A scale a channel needs no more: codes find their channel where they unfold.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from compressx.formats.bank_balanced import BANK_BALANCED
from compressx.formats.base import Format, Packed, dtype_of, extent, fail, index_dtype, nbytes, pieces, take
from compressx.formats.block_max import BLOCK_MAX
from compressx.formats.bspc import BSPC
from compressx.formats.compact import COMPACT
from compressx.formats.fkw import FKW
from compressx.formats.parts import check_shape, read_codes
from compressx.formats.quantized import (
    Coded,
    check_codes,
    code_dtype,
    code_support,
    codes_of,
    levels_bytes,
    pack_signed,
    read_levels,
    supports,
    to_signed,
    weights,
    width,
    write_levels,
)
from compressx.formats.sparse import COO_DELTA, csr
from compressx.formats.weight import Bytes, Weight

SUFFIX = "-coded"


def on_levels(inner: Format, name: str) -> Format:
    """`inner` for weights on the levels of a `quantize(...)` in their constraint: the values are codes.

    Args:
      inner: a format that keeps the values of a weight, of any dtype, in one array.
      name: of that array.
    """

    def fits(w: np.ndarray, constraint: Any) -> bool | str:
        reason = supports(w, constraint)
        return inner.supports(w, constraint) if reason is True else reason

    def size(weight: Weight) -> Bytes:
        return coded_bytes(weight, inner.size)

    def least(weight: Weight) -> Bytes:
        return coded_bytes(weight, inner.least or inner.size)

    def coded_bytes(weight: Weight, count: Callable[[Weight], Bytes]) -> Bytes:
        index, values = count(weight.once(_as_codes))
        b = width(weight.once(codes_of).levels)
        return Bytes(index + -(-values * b // 8) + levels_bytes(weight), 0)

    def pack(weight: Weight) -> Packed:
        w, c = weight.w, weight.once(codes_of)
        packed = inner.pack(weight.once(_as_codes))
        values = packed.arrays[name]
        levels, about = write_levels(c)
        arrays = packed.arrays | {name: pack_signed(values, c.levels)} | levels
        meta = packed.meta | about | {"values": list(values.shape)}
        return Packed(inner.name + SUFFIX, w.shape, w.dtype.name, arrays, meta)

    def workspace(packed: Packed) -> int:
        """Every value's code and every weight's, beside what `inner` takes."""
        check_shape(packed, 1)
        return extent(packed) * (2 * code_dtype(read_levels(packed)[0]).itemsize + 1) + nbytes(packed)

    def unpack(packed: Packed) -> np.ndarray:
        return _unpack(packed, inner, name)

    return Format(inner.name + SUFFIX, fits, size, pack, unpack, workspace, least if inner.least else None)


def _as_codes(weight: Weight) -> Weight:
    """The codes of a weight as a weight of their own, which is zero in the same positions."""
    codes = Weight(weight.once(codes_of).codes, weight.constraint, weight.structure)
    codes.support = weight.once(code_support)
    return codes


def in_floats(packed: Packed) -> Packed:
    """A packed weight with floats in place of codes, for readers of `fkw`, `bspc`, ...; other formats as they are.

    Args:
      packed: a weight in any format.

    Returns:
      `Packed` in the format without codes (`fkw` of `fkw-coded`), or `packed` itself.

    Raises:
      CompressedFileError: the arrays are inconsistent.

    Example:
      >>> packed = compressx.formats.pack(np.eye(4, dtype=np.float32), format="csr")
      >>> compressx.formats.in_floats(packed) is packed  # no codes in it
      True
    """
    if packed.format not in _INNER:
        return packed
    inner, name = _INNER[packed.format]
    w, coded = _unpack(packed, inner, name), _plain(packed, inner, name)
    held = coded.arrays[name]
    numbers = np.arange(1, held.size + 1, dtype=index_dtype(held.size + 1)).reshape(held.shape)
    place = inner.unpack(coded._replace(dtype=numbers.dtype.name, arrays=coded.arrays | {name: numbers}))
    values = np.zeros(held.size, w.dtype)
    values[place[place > 0] - 1] = w[place > 0]
    return coded._replace(dtype=packed.dtype, arrays=coded.arrays | {name: values.reshape(held.shape)})


def _unpack(packed: Packed, inner: Format, name: str) -> np.ndarray:
    levels, structure = read_levels(packed)
    codes = inner.unpack(_plain(packed, inner, name))
    return weights(Coded(codes, structure, levels), dtype_of(packed))


def _plain(packed: Packed, inner: Format, name: str) -> Packed:
    """The same in the format `inner`, of a weight whose values are the signed codes."""
    check_shape(packed, 1)
    levels, _ = read_levels(packed)
    extents, most = packed.meta.get("values"), math.prod(packed.shape)
    if (
        not isinstance(extents, list)
        or not 1 <= len(extents) <= 2
        or not all(type(v) is int and 0 <= v <= most for v in extents)
        or math.prod(extents) > most
    ):
        fail(f"{packed.format}/values", f"{str(extents)[:80]} are not the extents of at most {most} values")
    entry, b, number = f"{packed.format}/{name}", width(levels), math.prod(extents)
    stored = take(packed, name, "uint8", (-(-number * b // 8),))
    check_codes(entry, stored, number * b)
    codes = np.empty(number, code_dtype(levels))
    for part in pieces(number):
        codes[part] = to_signed(entry, read_codes(stored, part, b), b, levels.top)
    arrays = {key: a for key, a in packed.arrays.items() if key != "levels"} | {name: codes.reshape(extents)}
    return Packed(inner.name, packed.shape, codes.dtype.name, arrays, packed.meta)


_INNER = {
    inner.name + SUFFIX: (inner, name)
    for inner, name in (
        *((COMPACT, "matrix"), (csr(32), "values"), (csr(16), "values"), (COO_DELTA, "values")),
        *((FKW, "weight"), (BSPC, "weight"), (BLOCK_MAX, "values"), (BANK_BALANCED, "values")),
    )
}
ON_LEVELS = tuple(on_levels(inner, name) for inner, name in _INNER.values())
