"""What the formats for structures share: the set of a constraint that cuts the weight, and strings of bits."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from compressx.formats.base import DTYPES, Packed, fail


def fits(w: np.ndarray, least: int) -> bool | str:
    """True for a weight of a known dtype with weights in it and so many axes, or the reason why not."""
    if w.dtype.name not in DTYPES:
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
      structure: what it leaves open; None where that is not known.
      kinds: `spec["kind"]`s that are looked for.

    Returns:
      (spec, structure of that set or None), or None where there is no such set.
    """
    if constraint is None or constraint.joint:
        return None
    structures = structure if constraint.parts else (structure,)
    if structures is None:
        structures = (None,) * len(constraint.sets)
    for single, open_part in zip(constraint.sets, structures, strict=True):
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
    place = np.arange(int(widths.sum())) - np.repeat(np.cumsum(widths) - widths, widths)
    shift = np.repeat(widths, widths) - 1 - place
    return np.packbits((np.repeat(values.astype(np.int64), widths) >> shift & 1).astype(np.uint8))


def unpack_bits(packed: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, bool]:
    """Inverse of `pack_bits`: the integers int64 `[n]`, and whether all bits after the last are zero.

    The caller has checked that `packed` has `ceil(sum(widths) / 8)` bytes.
    """
    total = int(widths.sum())
    bits = np.unpackbits(packed)
    ends = np.cumsum(widths)
    place = np.arange(total) - np.repeat(ends - widths, widths)
    shifted = bits[:total].astype(np.int64) << (np.repeat(widths, widths) - 1 - place)
    sums = np.concatenate([np.zeros(1, np.int64), np.cumsum(shifted)])
    return sums[ends] - sums[ends - widths], not bits[total:].any()
