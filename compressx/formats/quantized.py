"""The quantized format: a few bits a weight, with the scale or codebook they stand for; zeros by code or by a bitmask.

A code of b bits is a sign and an index of b - 1 bits, 0 for a pruned weight (grid "cells": a sign and b bits of
magnitude). Of a weight of n entries, nnz of them non-zero, the smaller of two layouts is taken:

    codes    ceil(n b / 8)                        every weight, in stored order, highest bit first
    codes    ceil(nnz b / 8)  + mask ceil(n / 8)  the non-zero ones, and a bit a weight that tells which

and `levels`: the scale, 4 bytes (8 for float64 weights), or the codebook in the weight's dtype; one, or one a channel.
Asymmetric levels have the smallest integer beside each scale, and a code is the integer modulo 2**b.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compressx.constraints.levels import FLOAT8, Levels, encode, levels_of, magnitudes, unwrapped
from compressx.constraints.quantization import fit
from compressx.formats.base import (
    Format,
    Packed,
    check_finite,
    choice,
    dtype_of,
    fail,
    index_dtype,
    integer,
    only,
    pieces,
    same,
    take,
)
from compressx.formats.parts import check_shape, clean, count_flags, fits, pack_codes, part, read_codes, read_flags
from compressx.formats.weight import Bytes, Support, Weight

_ROWS = 1 << 22  # weights that are encoded together
_NO_CODE = np.iinfo(np.int32).min
_TABLE = 256  # levels of each sign up to which codes are looked up in a table of all
_GRIDS = ("uniform", "power_of_two", "cells", "codebook", *FLOAT8)


class Coded(NamedTuple):
    """A weight on levels.

    Attributes:
      codes: signed indices, in the smallest signed dtype, of the weight's shape.
      structure: scale `[]` or `[cout]`, scale and smallest code `[2]` or `[2, cout]`, or codebook `[top]` or
        `[top, cout]`.
      levels: which levels.
    """

    codes: np.ndarray
    structure: np.ndarray
    levels: Levels


def supports(w: np.ndarray, constraint: Any) -> bool | str:
    """True where a constraint says which levels the weight lies on."""
    if part(constraint, None, ("quantize",)) is None:
        return "needs a constraint with quantize(...), which says what the levels are"
    return fits(w, 1)


def coded(w: np.ndarray, constraint: Any, structure: Any) -> Coded:
    """The codes of a weight; ValueError where a weight does not lie exactly on its level."""
    out = _coded(w, constraint, structure)
    back = weights(out, w.dtype)
    if not same(back, np.ascontiguousarray(w)):
        off = int(np.sum(back != w))
        raise ValueError(f"{off} of {w.size} weights are not on the levels of quantize(bits={out.levels.bits}, ...)")
    return out


def _coded(w: np.ndarray, constraint: Any, structure: Any) -> Coded:
    """The codes of the nearest levels."""
    found = part(constraint, structure, ("quantize",))
    if found is None:
        raise ValueError("no quantize(...) in the constraint")
    spec, scale = found
    levels = levels_of(spec)
    scale = fit(jnp.asarray(w), levels) if scale is None else jnp.asarray(scale)
    return Coded(_encoded(w, scale, levels), np.asarray(scale), levels)


def _encoded(w: np.ndarray, scale: Any, levels: Levels) -> np.ndarray:
    """`encode`, some rows of a large weight after the other, so that XLA's integers of 32 bits take little memory."""
    codes, outputs = np.empty(w.shape, code_dtype(levels)), w.shape[-1]
    rows = max(1, _ROWS // outputs)
    if levels.viewed or w.size <= 2 * _ROWS or w.size // outputs <= rows:
        codes[...] = np.asarray(encode(jnp.asarray(w), scale, levels))
        return codes
    into, m = codes.reshape(-1, outputs), w.reshape(-1, outputs)
    for here in pieces(len(m), rows):
        into[here] = np.asarray(encode(jnp.asarray(m[here]), scale, levels))
    return codes


def codes_of(weight: Weight) -> Coded:
    """The codes of a `Weight`, for which the formats for levels ask together.

    Whether it lies on these levels is not looked at here: what was packed is compared with the weight in any case.
    """
    return _coded(weight.w, weight.constraint, weight.structure)


def code_support(weight: Weight) -> Support:
    """Where the codes of a weight on levels are not zero: as a rule where it is not zero itself."""
    mask = weight.once(codes_of).codes != 0
    return weight.support if np.array_equal(mask, weight.support.mask) else Support(mask)


def weights(c: Coded, dtype: np.dtype[Any]) -> np.ndarray:
    """The weights that codes stand for, by NumPy alone; the products are exact, so no library rounds otherwise."""
    codes, outputs = c.codes.reshape(-1), c.codes.shape[-1] if c.codes.ndim else 1
    out = np.empty(codes.size, dtype)
    for here in pieces(codes.size):
        out[here] = decoded(codes[here], here.start, c.structure, c.levels, dtype, outputs)
    return out.reshape(c.codes.shape)


def units(start: int, number: int, per: str | int, outputs: int) -> np.ndarray:
    """Which scale each of some weights in stored order has, beginning at weight `start` of a leaf `[..., outputs]`."""
    if per == "channel":
        first = start % outputs
        return np.arange(first, first + number, dtype=index_dtype(first + number + outputs)) % outputs
    at = np.arange(start, start + number)
    row = at // outputs
    return row if per == "row" else row // int(per) * outputs + at % outputs


def decoded(
    codes: np.ndarray, start: int, structure: np.ndarray, levels: Levels, dtype: np.dtype[Any], outputs: int
) -> np.ndarray:
    """`weights` of a piece of the codes in stored order, which begins at weight `start` of a leaf `[..., outputs]`."""
    if levels.symmetric and levels.top <= _TABLE and codes.size > 2 * _TABLE:
        signed = np.arange(-levels.top, levels.top + 1)
        if levels.per == "tensor":
            table = decoded(signed, 0, structure, levels, dtype, outputs)
            return table[codes.astype(np.intp) + levels.top]
        whole = levels.per == "channel" and not start % outputs and not codes.size % outputs
        if whole and levels.grid != "codebook" and not np.signbit(structure).any():
            one = np.ones((), structure.dtype)
            table = decoded(signed, 0, one, dataclasses.replace(levels, per="tensor"), structure.dtype, 1)
            rows = table[codes.astype(np.intp) + levels.top].reshape(-1, outputs)
            with np.errstate(over="ignore"):
                rows *= structure
                return rows.astype(dtype).reshape(-1)
    signed = codes.astype(np.int32)
    if levels.per != "tensor":
        channel = units(start, signed.size, levels.per, outputs)
    if not levels.symmetric:
        structure, low = structure
        signed = unwrapped(signed, low if levels.per == "tensor" else low[channel], levels)
    k = np.abs(signed)
    with np.errstate(over="ignore"):
        if levels.grid == "codebook":
            at = np.maximum(k - 1, 0)
            magnitude = structure[at] if levels.per == "tensor" else structure[at, channel]
        else:
            step = structure.dtype.type(1)
            if levels.grid in FLOAT8:
                level = np.concatenate([[0], magnitudes(levels.grid)]).astype(structure.dtype)[k]
            else:
                level = np.ldexp(step, k - 1) if levels.grid == "power_of_two" else k.astype(structure.dtype)
            magnitude = level * (structure if levels.per == "tensor" else structure[channel])
        out = np.where(signed < 0, -magnitude, magnitude).astype(dtype)
    return np.where(signed == 0, np.zeros((), dtype), out)


def code_dtype(levels: Levels) -> np.dtype[Any]:
    """The smallest dtype that holds every signed index."""
    if not levels.symmetric:  # the smallest may lie anywhere
        return np.dtype(np.int32)
    return next(np.dtype(d) for d in (np.int8, np.int16, np.int32) if levels.top <= np.iinfo(d).max)


def width(levels: Levels) -> int:
    """Bits of a code, its sign among them."""
    return levels.bits + 1 if levels.grid == "cells" else levels.bits


def write_levels(c: Coded) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays and the meta that `read_levels` understands."""
    meta: dict[str, Any] = {"bits": c.levels.bits, "grid": c.levels.grid, "per": c.levels.per}
    if not c.levels.symmetric:
        meta["symmetric"] = False
    return {"levels": c.structure.reshape(-1)}, meta


def read_levels(packed: Packed) -> tuple[Levels, np.ndarray]:
    """The levels and the scale or codebook of a packed weight, checked."""
    name = packed.format
    grid = choice(packed, "grid", _GRIDS)
    per, count = _sharing(packed)
    bits = integer(packed, "bits", 1, 16)
    dtype = dtype_of(packed)
    if dtype.name not in ("float64", "float32", "float16", "bfloat16"):
        fail(name, f"dtype {packed.dtype!r} has no levels")
    symmetric = "symmetric" not in packed.meta or choice(packed, "symmetric", (True, False))
    try:
        levels = Levels(bits, grid, per, cell_bits=1, symmetric=symmetric)
    except ValueError as error:
        fail(f"{name}/bits", str(error))
    each = (levels.top,) if grid == "codebook" else () if symmetric else (2,)
    entries = count * math.prod(each)
    held = dtype.name if grid == "codebook" else "float64" if dtype.name == "float64" else "float32"
    structure = take(packed, "levels", held, (entries,))
    check_finite(f"{name}/levels", structure)
    structure = structure.reshape(each + (() if per == "tensor" else (count,)))
    if not symmetric and not np.isin(structure[1], np.arange(-levels.top, 0)).all():
        fail(f"{name}/levels", f"the smallest codes must be integers in {-levels.top}..-1")
    return levels, structure


def outputs_of(packed: Packed) -> int:
    """The extent of a weight's last axis."""
    return packed.shape[-1] if packed.shape else 1


def _sharing(packed: Packed) -> tuple[str | int, int]:
    """What shares a scale, and how many scales there are."""
    if isinstance(packed.meta.get("per"), int):
        per: str | int = integer(packed, "per", 1, 2**31 - 1)
    else:
        per = choice(packed, "per", ("tensor", "channel", "row"))
    if per == "tensor":
        return per, 1
    rows, outputs = math.prod(packed.shape[:-1]), outputs_of(packed)
    if per != "channel" and len(packed.shape) < 2:
        fail(packed.format, f"shape {list(packed.shape)} has no rows that could share levels")
    return per, outputs if per == "channel" else rows if per == "row" else -(-rows // int(per)) * outputs


def check_codes(entry: str, stored: np.ndarray, bits: int) -> None:
    """Refuses a string of codes with bits set after the last one."""
    if not clean(stored, bits):
        fail(entry, "bits after the last code are set")


def to_unsigned(codes: np.ndarray, levels: Levels) -> np.ndarray:
    """Signed indices as a sign bit above the magnitude; of asymmetric levels modulo 2**bits: uint32."""
    if not levels.symmetric:
        wrapped: np.ndarray = codes.astype(np.int32).view(np.uint32) & np.uint32(2**levels.bits - 1)
        return wrapped
    sign = (codes < 0).astype(np.uint32) << np.uint32(width(levels) - 1)
    unsigned: np.ndarray = np.abs(codes).astype(np.uint32) | sign
    return unsigned


def pack_signed(codes: np.ndarray, levels: Levels) -> np.ndarray:
    """Signed indices as one string of bits, each as `to_unsigned` writes it: uint8."""
    flat, bits = codes.reshape(-1), width(levels)
    stored = np.empty(-(-flat.size * bits // 8), np.uint8)
    for here in pieces(flat.size):
        stored[here.start * bits // 8 : -(-here.stop * bits // 8)] = pack_codes(to_unsigned(flat[here], levels), bits)
    return stored


def to_signed(entry: str, stored: np.ndarray, bits: int, top: int) -> np.ndarray:
    """Inverse of `to_unsigned`, but for asymmetric levels, whose sign `decoded` knows; a negative zero is no code."""
    if top >> (bits - 1):  # magnitudes that leave no bit for a sign: asymmetric levels
        return stored.astype(np.int32)
    if bits <= 8 and stored.size > 1 << bits:
        table = np.arange(1 << bits, dtype=np.int32)
        magnitude = table & ((1 << (bits - 1)) - 1)
        table = np.where(table >> (bits - 1) > 0, -magnitude, magnitude)
        table[(magnitude > top) | ((table == 0) & (np.arange(1 << bits) > 0))] = _NO_CODE
        signed = table[stored]
        if int(signed.min()) != _NO_CODE:
            return signed
    k = stored & ((1 << (bits - 1)) - 1)
    negative = stored >> (bits - 1) > 0
    if (negative & (k == 0)).any():
        fail(entry, "a zero has a sign")
    if k.size and int(k.max()) > top:
        fail(entry, f"index {int(k.max())} of {top} levels")
    return np.where(negative, -k, k).astype(np.int32)


def levels_bytes(weight: Weight) -> int:
    """What the scales or the codebook of a weight on levels take."""
    return int(weight.once(codes_of).structure.nbytes)


def _layout(weight: Weight) -> tuple[bool, int]:
    """Whether a mask says where the zeros are, and the bytes of the codes and the mask."""
    n, b = weight.w.size, width(weight.once(codes_of).levels)
    kept = weight.once(code_support).count
    masked, plain = -(-kept * b // 8) + -(-n // 8), -(-n * b // 8)
    return masked < plain, min(masked, plain)


def _size(weight: Weight) -> Bytes:
    return Bytes(levels_bytes(weight) + _layout(weight)[1], 0)


def _pack(weight: Weight) -> Packed:
    w, c = weight.w, weight.once(codes_of)
    flat, mask = c.codes.reshape(-1), weight.once(code_support).mask.reshape(-1)
    arrays, meta = write_levels(c)
    masked = _layout(weight)[0]
    arrays["codes"] = pack_signed(flat[mask] if masked else flat, c.levels)
    if masked:
        arrays["mask"] = np.packbits(mask)
    return Packed("quantized", w.shape, w.dtype.name, arrays, meta | {"masked": masked})


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "levels", "codes", "mask")
    check_shape(packed, 1)
    levels, structure = read_levels(packed)
    b, n = width(levels), int(np.prod(packed.shape, dtype=np.int64))
    masked, kept = choice(packed, "masked", (True, False)), n
    if masked:
        mask = take(packed, "mask", "uint8", (-(-n // 8),))
        if not clean(mask, n):
            fail("quantized/mask", "bits after the last weight are set")
        kept = count_flags(mask)
    elif "mask" in packed.arrays:
        fail("quantized/mask", "present, though all weights have codes")
    stored = take(packed, "codes", "uint8", (-(-kept * b // 8),))
    check_codes("quantized/codes", stored, kept * b)
    w, read = np.empty(n, dtype_of(packed)), 0
    for here in pieces(n):
        held = read_flags(mask, here) if masked else np.ones(here.stop - here.start, bool)
        piece = slice(read, read := read + int(np.count_nonzero(held)))
        codes = np.zeros(held.size, np.int32)
        codes[held] = to_signed("quantized/codes", read_codes(stored, piece, b), b, levels.top)
        w[here] = decoded(codes, here.start, structure, levels, w.dtype, outputs_of(packed))
    return w.reshape(packed.shape)


QUANTIZED = Format("quantized", supports, _size, _pack, _unpack)
