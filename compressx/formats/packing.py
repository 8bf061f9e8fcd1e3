"""All storage formats by name; packing a weight into the smallest one, or into one that is asked for."""

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
from compressx.formats.quantized import QUANTIZED
from compressx.formats.sparse import BITMASK, COO_DELTA, csr
from compressx.formats.unified import UNIFIED

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
    w = native(w)
    if format is None:
        packed = [p for f in FORMATS.values() if (p := _try(f, w, constraint, structure)) is not None]
        if not packed:
            raise ValueError(f"no format holds a weight of dtype {w.dtype.name}, shape {w.shape}")
        return min(packed, key=nbytes)
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}; known: {', '.join(FORMATS)}")
    reason = FORMATS[format].supports(w, constraint)
    if reason is not True:
        raise ValueError(f"format {format!r} does not hold a weight of shape {w.shape}: {reason}")
    return _proved(w, FORMATS[format].pack(w, constraint, structure))


def _try(f: Format, w: np.ndarray, constraint: Any, structure: Any) -> Packed | None:
    if f.supports(w, constraint) is not True:
        return None
    try:
        packed = f.pack(w, constraint, structure)
    except ValueError:  # the values do not lie where the format can write them
        return None
    return _proved(w, packed)


def _proved(w: np.ndarray, packed: Packed) -> Packed:
    if not same(FORMATS[packed.format].unpack(packed), w):
        raise RuntimeError(f"format {packed.format!r} lost bits of a weight of shape {w.shape}: a bug of the format")
    return packed


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
