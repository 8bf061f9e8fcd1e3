"""All storage formats by name; packing a weight into the smallest one, or into one that is asked for."""

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from compressx.formats.bank_balanced import BANK_BALANCED
from compressx.formats.base import (
    MAX_BYTES,
    Format,
    Packed,
    dtype_of,
    extent,
    fail,
    native,
    nbytes,
    same,
)
from compressx.formats.bit_planes import BIT_PLANES, BIT_PLANES_COMPLEMENT
from compressx.formats.block_max import BLOCK_MAX
from compressx.formats.bspc import BSPC
from compressx.formats.cells import CELLS
from compressx.formats.compact import COMPACT
from compressx.formats.dense import DENSE
from compressx.formats.fkw import FKW
from compressx.formats.on_levels import ON_LEVELS
from compressx.formats.quantized import QUANTIZED, coded, codes_of
from compressx.formats.sparse import BITMASK, COO_DELTA, csr
from compressx.formats.unified import UNIFIED
from compressx.formats.weight import Bytes, Weight

# name -> format; where two take the same bytes, the first one here is chosen
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(DENSE, COMPACT, BITMASK, csr(32), csr(16), COO_DELTA, FKW, BSPC, BLOCK_MAX, BANK_BALANCED),
        *(QUANTIZED, UNIFIED, CELLS, BIT_PLANES, BIT_PLANES_COMPLEMENT, *ON_LEVELS),
    )
}


def pack(w: Any, constraint: Any = None, structure: Any = None, format: str | None = None) -> Packed:
    """The weight in a storage format, from which `unpack` gives back every bit.

    Args:
      w: a concrete array, `[kh, kw, cin, cout]`, `[in, out]` or any other shape; one in a foreign byte order is packed
        in this machine's.
      constraint: the constraint it satisfies (formats for a structure need it), or None.
      structure: that of the constraint: as its `init` returns it, or as it stands in a `Hardened`.
      format: a key of `FORMATS`; None takes the one with the fewest bytes among those that hold w exactly.

    Raises:
      ValueError: unknown format, or w (or its constraint) does not fit the format asked for.

    Returns:
      The weight, packed.

    Example:
      >>> w = np.zeros((64, 64), np.float32)
      >>> w[3, 5] = 2.0
      >>> compressx.formats.nbytes(compressx.formats.pack(w)) < w.nbytes / 100
      True
    """
    weight = Weight(native(w), constraint, structure)
    if format is None:
        return _smallest(weight)
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    reason = FORMATS[format].supports(weight.w, constraint)
    if reason is not True:
        raise ValueError(f"format {format!r} does not hold a weight of shape {weight.w.shape}: {reason}")
    return _proved(weight, FORMATS[format].pack(weight))


def sizes(weight: Weight, without: Collection[str] = ()) -> dict[str, int]:
    """Bytes that each format would take, by name, of those that may be the smallest; nothing is packed for it.

    A format that can only be larger than another, by what it takes at least, is left out without being counted.
    """
    counted: dict[str, int] = {}
    mine = [f for f in FORMATS.values() if f.name not in without and f.supports(weight.w, weight.constraint) is True]
    for f in sorted(mine, key=lambda f: f.least is not None):
        try:
            if f.least is not None and _total(weight, f.least(weight)) > min(counted.values(), default=math.inf):
                continue
            counted[f.name] = _total(weight, f.size(weight))
        except ValueError:  # the values do not lie where the format can write them
            continue
    return {name: counted[name] for name in FORMATS if name in counted}


def _total(weight: Weight, size: Bytes) -> int:
    return size.indices + size.values * weight.w.dtype.itemsize


def _smallest(weight: Weight) -> Packed:
    """Packed in the smallest format; where its values turn out not to fit it, in the smallest of the others."""
    failed: set[str] = set()
    # Counted anew after a failure, for the format that failed may have been why another one was left out.
    while counted := sizes(weight, failed):
        name = min(counted, key=counted.__getitem__)  # of two alike the first in `FORMATS`
        try:
            packed = FORMATS[name].pack(weight)
            if nbytes(packed) != counted[name]:
                raise RuntimeError(
                    f"format {name!r} takes {nbytes(packed)} bytes for a weight of shape {weight.w.shape}, not the "
                    f"{counted[name]} that were counted: a bug of the format"
                )
            return _proved(weight, packed)
        except ValueError:
            failed.add(name)
    raise ValueError(f"no format holds a weight of dtype {weight.w.dtype.name}, shape {weight.w.shape}")


def _proved(weight: Weight, packed: Packed) -> Packed:
    """The packed weight, after what its bits unpack to was compared with the weight, bit by bit.

    Raises:
      ValueError: the weight does not lie on the levels of its constraint, so that its codes are not it.
    """
    weight.forget()  # what was counted takes memory that unpacking needs
    if same(FORMATS[packed.format].unpack(packed), weight.w):
        return packed
    if "levels" in packed.arrays:
        try:
            coded(weight.w, weight.constraint, weight.structure)
        except ValueError as error:
            weight.refuse(codes_of, error)
            raise
    shape = weight.w.shape
    raise RuntimeError(f"format {packed.format!r} lost bits of a weight of shape {shape}: a bug of the format")


def unpack(packed: Packed, max_bytes: int = MAX_BYTES, workspace: int | None = None) -> np.ndarray:
    """The weight that was packed, bit for bit.

    Args:
      packed: as `pack` made it, or anything else.
      max_bytes: what the weight may take.
      workspace: what unpacking may take on the way, beside the weight, the arrays and a few MiB; None: twice
        `max_bytes`.

    Returns:
      The weight, of the shape and dtype that was packed.

    Raises:
      CompressedFileError: the packed data is inconsistent, or takes more; nothing of that size has been made then.

    Example:
      >>> w = np.eye(8, dtype=np.float32)
      >>> bool((compressx.formats.unpack(compressx.formats.pack(w)) == w).all())
      True
    """
    if packed.format not in FORMATS:
        fail(str(packed.format)[:80], f"unknown format; known: {', '.join(FORMATS)}")
    size = extent(packed) * dtype_of(packed).itemsize
    if size > max_bytes:
        fail(packed.format, f"shape {list(packed.shape)} needs {size} bytes, more than max_bytes={max_bytes}")
    most = 2 * max_bytes if workspace is None else workspace
    needed = FORMATS[packed.format].workspace(packed)
    if needed > most:
        fail(packed.format, f"takes {needed} bytes on the way, more than {most}, which max_bytes allows; raise it")
    w = FORMATS[packed.format].unpack(packed)
    if w.shape != tuple(packed.shape) or w.dtype != dtype_of(packed):
        raise RuntimeError(f"format {packed.format!r} unpacked to {w.dtype} {w.shape}; this is a bug of the format")
    return w
