"""What the formats for structures share: the set of a constraint that cuts the weight, and strings of bits."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from compressx.formats.base import COMPUTED, Packed, fail, pieces


def fits(w: np.ndarray, least: int) -> bool | str:
    """True for a weight of a known dtype with weights in it and so many axes, or the reason why not."""
    if w.dtype.name not in COMPUTED:
        return f"dtype {w.dtype.name} cannot be stored"
    if w.ndim < least:
        return f"needs at least {least} axes, got shape {w.shape}"
    return w.size > 0 or f"shape {w.shape} has no weights"


def check_shape(packed: Packed, least: int) -> None:
    """Refuses shapes that `fits` would not have let through."""
    if len(packed.shape) < least or 0 in packed.shape:
        fail(packed.format, f"shape {list(packed.shape)} is empty or has fewer than {least} axes")


def part(constraint: Any, structure: Any, kinds: tuple[str, ...]) -> tuple[Mapping[str, Any], Any] | None:
    """The spec and the structure of the first set of one of these kinds, in a constraint over a single leaf.

    Args:
      constraint: a `Constraint` (an intersection too) or None.
      structure: that of the set, as `Constraint.each` takes it.
      kinds: `spec["kind"]`s that are looked for.

    Returns:
      (spec, structure of that set or None), or None where there is no such set.
    """
    if constraint is None or constraint.joint:
        return None
    for single, open_part in constraint.each(structure):
        if single.spec["kind"] in kinds:
            return single.spec, open_part
    return None


def pack_bits(values: np.ndarray, widths: np.ndarray | int) -> np.ndarray:
    """Unsigned integers as one string of bits, the highest bit of each first: uint8, zeros after the last.

    Args:
      values: `[n]`, each below 2**width.
      widths: bits of all of them, or of each `[n]`.
    """
    widths = np.broadcast_to(np.asarray(widths, np.int64), values.shape)
    if not values.size or int(widths.min()) == int(widths.max()) <= 16:
        return pack_codes(values, int(widths[0]) if values.size else 0)
    digits, end = np.empty(int(widths.sum()), np.uint8), 0
    for part in pieces(values.size):
        wide = widths[part]
        ends = np.cumsum(wide)
        back = np.repeat(ends, wide) - 1 - np.arange(int(ends[-1]))  # how many bits of its integer follow a bit
        digits[end : (end := end + int(ends[-1]))] = np.repeat(values[part].astype(np.int64), wide) >> back & 1
    return np.packbits(digits)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Integers in 0 .. 2**bits - 1 as one string of bits, each highest bit first: uint8."""
    flat = codes.reshape(-1)
    stored = np.empty(-(-flat.size * bits // 8), np.uint8)
    for here in pieces(flat.size):
        stored[here.start * bits // 8 : -(-here.stop * bits // 8)] = _bits_of(flat[here], bits)
    return stored


def _bits_of(codes: np.ndarray, bits: int) -> np.ndarray:
    if bits in (8, 16):
        return codes.astype(f">u{bits // 8}").view(np.uint8)
    if not 0 < bits < 8:
        digits = np.empty((codes.size, bits), np.uint8)
        for i in range(bits):
            digits[:, i] = codes >> (bits - 1 - i) & 1
        return np.packbits(digits.reshape(-1))
    # 8 codes of so many bits are that many bytes: the high ones of an integer of 64 bits
    eight = np.zeros((-(-codes.size // 8), 8), np.uint8)
    eight.reshape(-1)[: codes.size] = codes
    word = np.zeros(len(eight), np.uint64)
    for i in range(8):
        word <<= np.uint64(bits)
        word |= eight[:, i]
    word <<= np.uint64(64 - 8 * bits)
    stored = word.astype(">u8").view(np.uint8).reshape(-1, 8)[:, :bits].reshape(-1)
    return stored[: -(-codes.size * bits // 8)]


def read_codes(stored: np.ndarray, here: slice, bits: int) -> np.ndarray:
    """A piece of the codes, int32; inverse of `pack_codes`."""
    number = here.stop - here.start
    if bits in (8, 16):
        return stored[here.start * bits // 8 : here.stop * bits // 8].view(f">u{bits // 8}").astype(np.int32)
    if not 0 < bits < 8:
        digits = read_flags(stored, slice(bits * here.start, bits * here.stop)).view(np.uint8).reshape(number, bits)
        codes = np.zeros(number, np.int32)
        for digit in digits.T:
            codes += codes
            codes += digit
        return codes
    if bits == 4 and not here.start % 2:
        two = stored[here.start // 2 : -(-here.stop // 2)]
        nibbles = np.empty((two.size, 2), np.int32)
        np.right_shift(two, 4, out=nibbles[:, 0])
        np.bitwise_and(two, 15, out=nibbles[:, 1])
        return nibbles.reshape(-1)[:number]
    skipped = here.start % 8
    first, last = (here.start - skipped) // 8 * bits, -(-here.stop * bits // 8)
    held = np.zeros(-(-(skipped + number) // 8) * bits, np.uint8)
    held[: last - first] = stored[first:last]
    words = np.zeros((held.size // bits, 8), np.uint8)
    words[:, :bits] = held.reshape(-1, bits)
    word = words.view(">u8").astype(np.uint64).reshape(-1)
    out = np.empty((word.size, 8), np.int32)
    for i in range(8):
        out[:, i] = word >> np.uint64(64 - bits * (i + 1)) & np.uint64((1 << bits) - 1)
    return out.reshape(-1)[skipped : skipped + number]


def read_bits(stored: np.ndarray, at: np.ndarray, widths: np.ndarray | int) -> np.ndarray:
    """Unsigned integers out of a string of bits: int64 `[n]`; inverse of `pack_bits`.

    Args:
      stored: uint8, the string.
      at: int64 `[n]`, where each begins, in bits, not descending.
      widths: bits of all of them, or of each `[n]`; at most 32. The caller has checked that the string is that long.
    """
    if not at.size:
        return np.zeros(0, np.int64)
    widths = np.broadcast_to(np.asarray(widths, np.int64), at.shape)
    first, end = int(at[0]) >> 3, int(at[-1] + widths[-1] + 7) >> 3
    window = np.concatenate([stored[first:end], np.zeros(5, np.uint8)])  # 32 bits begin in any bit of the first byte
    byte = (at >> 3) - first
    value = window[byte].astype(np.int64)
    for i in range(1, 5):
        value = value << 8 | window[byte + i]
    bits: np.ndarray = value >> (40 - (at & 7) - widths) & ((np.int64(1) << widths) - 1)
    return bits


def clean(stored: np.ndarray, bits: int) -> bool:
    """Whether all bits after the first `bits` are zero, in a string of as many bytes as these take."""
    return not stored.size or not int(stored[-1]) & ((1 << (-bits % 8)) - 1)


def read_flags(stored: np.ndarray, part: slice) -> np.ndarray:
    """A piece of a string of bits, bool: bits `part.start` to `part.stop`."""
    bits = np.unpackbits(stored[part.start >> 3 : (part.stop + 7) >> 3])
    return bits[part.start & 7 :][: part.stop - part.start].view(bool)


def count_flags(stored: np.ndarray) -> int:
    """How many bits of a string are set."""
    return sum(int(np.bitwise_count(stored[part]).sum(dtype=np.int64)) for part in pieces(stored.size))


def entries(lengths: Callable[[slice], np.ndarray], rows: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The row of each entry and its index in the row, for rows of any lengths one after the other, in pieces.

    Args:
      lengths: from a slice of rows to their lengths, int64.
      rows: how many.
    """
    for part in pieces(rows):
        length = lengths(part)
        ends = np.cumsum(length)
        for some in pieces(int(ends[-1])):
            index = np.arange(some.start, some.stop)
            row = np.searchsorted(ends, index, side="right")
            yield row + part.start, index - (ends - length)[row]
