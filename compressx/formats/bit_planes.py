"""Bit planes: one bit of every weight after the other, as a digital in-memory engine stores them in its rows.

Weights are `scale * integer` (grids "uniform" and "cells" of `quantize`). Two ways to hold a sign:

    bit-planes             magnitude planes, the highest that any weight uses first, and a sign plane
    bit-planes-complement  two's complement: the first plane counts -2**(planes - 1)

A plane has a bit a weight, in stored order: `planes` is uint8 `[planes, ceil(n / 8)]`. The sign plane is left out where
no weight is negative. Bytes: (planes + sign) ceil(n / 8), and the scales.

Source: the dot product is sum_ij c_i d_j 2**(i + j) popcount(x_i AND w_j), d = -1 for a two's complement sign plane, as
in S. Angizi et al., "Accelerating Deep Neural Networks in Processing-in-Memory Platforms: Analog or Digital Approach?",
2019.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from compressx.formats.base import Format, Packed, dtype_of, extent, fail, only, pieces, take
from compressx.formats.parts import check_shape, clean, part, read_flags
from compressx.formats.quantized import (
    codes_of,
    decoded,
    levels_bytes,
    outputs_of,
    read_levels,
    supports,
    write_levels,
)
from compressx.formats.weight import Bytes, Weight


def integer_levels(w: np.ndarray, constraint: Any) -> bool | str:
    """True where a constraint says that weights are integers times a scale."""
    found = part(constraint, None, ("quantize",))
    if found is not None and found[0]["grid"] not in ("uniform", "cells"):
        return f"levels of the grid {found[0]['grid']!r} are not integers times a scale"
    return supports(w, constraint)


def to_planes(codes: np.ndarray, number: int) -> np.ndarray:
    """The `number` low bits of non-negative integers, highest first: uint8 `[number, ceil(n / 8)]`."""
    flat = codes.reshape(-1)
    return (
        np.stack([np.packbits((flat >> i & 1).astype(np.uint8)) for i in reversed(range(number))])
        if number
        else (np.zeros((0, -(-flat.size // 8)), np.uint8))
    )


def _highest(weight: Weight) -> tuple[int, int]:
    """The largest magnitude of a weight's codes, and the largest of their complements where they are below 0."""
    codes = weight.once(codes_of).codes
    low, high = int(codes.min(initial=0)), int(codes.max(initial=0))
    return max(high, -low), max(high, ~low if low < 0 else 0)


def _size(weight: Weight) -> Bytes:
    planes = _highest(weight)[0].bit_length() + int(bool((weight.once(codes_of).codes < 0).any()))
    return Bytes(planes * -(-weight.w.size // 8) + levels_bytes(weight), 0)


def _size_complement(weight: Weight) -> Bytes:
    planes = _highest(weight)[1].bit_length() + 1
    return Bytes(planes * -(-weight.w.size // 8) + levels_bytes(weight), 0)


def _pack(weight: Weight) -> Packed:
    w, c = weight.w, weight.once(codes_of)
    arrays, meta = write_levels(c)
    magnitude = np.abs(c.codes)
    arrays["planes"] = to_planes(magnitude, int(magnitude.max(initial=0)).bit_length())
    if (c.codes < 0).any():
        arrays["sign"] = np.packbits(c.codes.reshape(-1) < 0)
    return Packed("bit-planes", w.shape, w.dtype.name, arrays, meta)


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "levels", "planes", "sign")
    sign = None
    if "sign" in packed.arrays:
        sign = take(packed, "sign", "uint8", (-(-extent(packed) // 8),))
        if not clean(sign, extent(packed)):
            fail("bit-planes/sign", "a zero, or no weight at all, has a sign")

    def signed(codes: np.ndarray, here: slice, number: int) -> np.ndarray:
        if sign is None:
            return codes
        negative = read_flags(sign, here)
        if (negative & (codes == 0)).any():
            fail("bit-planes/sign", "a zero, or no weight at all, has a sign")
        return np.where(negative, -codes, codes)

    return _from_planes(packed, signed)


def _pack_complement(weight: Weight) -> Packed:
    w, c = weight.w, weight.once(codes_of)
    arrays, meta = write_levels(c)
    # -2**(b - 1) <= code < 2**(b - 1) for the least b; a code below 0 asks for the bits of its complement
    number = _highest(weight)[1].bit_length() + 1
    arrays["planes"] = to_planes(c.codes.astype(np.int32) & ((1 << number) - 1), number)
    return Packed("bit-planes-complement", w.shape, w.dtype.name, arrays, meta)


def _unpack_complement(packed: Packed) -> np.ndarray:
    only(packed, "levels", "planes")

    def signed(codes: np.ndarray, here: slice, number: int) -> np.ndarray:
        return np.where(codes >> max(number - 1, 0) > 0, codes - (1 << number), codes)

    return _from_planes(packed, signed)


def _from_planes(packed: Packed, signed: Callable[[np.ndarray, slice, int], np.ndarray]) -> np.ndarray:
    """The weight; `signed` turns a piece of the planes' unsigned integers, of so many planes, into signed ones."""
    check_shape(packed, 1)
    levels, structure = read_levels(packed)
    if levels.grid not in ("uniform", "cells"):
        fail(f"{packed.format}/grid", f"{levels.grid!r} has no bit planes")
    n = int(np.prod(packed.shape, dtype=np.int64))
    planes = take(packed, "planes", "uint8", (None, -(-n // 8)))
    number = planes.shape[0]
    if number > levels.bits + 1:
        fail(f"{packed.format}/planes", f"{number} planes for levels of {levels.bits} bits")
    if not all(clean(plane, n) for plane in planes):
        fail(f"{packed.format}/planes", "bits after the last weight are set")
    w = np.empty(n, dtype_of(packed))
    for here in pieces(n):
        unsigned = np.zeros(here.stop - here.start, np.int32)
        for plane in planes:
            unsigned = 2 * unsigned + read_flags(plane, here)
        codes = signed(unsigned, here, number)
        if int(np.abs(codes).max()) > levels.top:
            fail(f"{packed.format}/planes", f"integer {int(np.abs(codes).max())} above the top level {levels.top}")
        w[here] = decoded(codes, here.start, structure, levels, w.dtype, outputs_of(packed))
    return w.reshape(packed.shape)


BIT_PLANES = Format("bit-planes", integer_levels, _size, _pack, _unpack)
BIT_PLANES_COMPLEMENT = Format(
    "bit-planes-complement", integer_levels, _size_complement, _pack_complement, _unpack_complement
)
