"""The compact format: whole rows and columns of the GEMM view removed, and a smaller dense matrix left.

Arrays: `matrix` `[p, f]` of the weight's dtype, `positions` `[p]` and `filters` `[f]` the kept ids, increasing, in the
smallest of uint8, uint16 and uint32 that holds the full extent; a list is left out where all are kept. Bytes of a
weight of P positions and F filters, v bytes each, of which p and f stay (id width b(N) = 1, 2 or 4):

    p f v + [p < P] p b(P) + [f < F] f b(F)
"""

from typing import Any

import numpy as np

from compressx.formats.base import (
    Format,
    Packed,
    check_increasing,
    dtype_of,
    fail,
    index_dtype,
    nonzero,
    only,
    rank,
    take,
)


def _extents(shape: tuple[int, ...]) -> tuple[int, int]:
    return int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]


def _pack(w: np.ndarray, constraint: Any, structure: Any) -> Packed:
    del constraint, structure
    m = w.reshape(_extents(w.shape))
    mask = nonzero(m)
    keep = {"positions": np.flatnonzero(mask.any(axis=1)), "filters": np.flatnonzero(mask.any(axis=0))}
    arrays = {"matrix": np.ascontiguousarray(m[np.ix_(keep["positions"], keep["filters"])])}
    for (name, ids), extent in zip(keep.items(), m.shape, strict=True):
        if ids.size < extent:
            arrays[name] = ids.astype(index_dtype(extent))
    return Packed("compact", w.shape, w.dtype.name, arrays, {})


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "matrix", "positions", "filters")
    if len(packed.shape) < 2:
        fail("compact", f"shape {list(packed.shape)} has no rows and columns")
    extents = _extents(packed.shape)
    ids = []
    for name, extent in zip(("positions", "filters"), extents, strict=True):
        if name in packed.arrays:
            kept = take(packed, name, index_dtype(extent).name, (None,)).astype(np.int64)
            check_increasing(f"compact/{name}", kept, extent)
        else:
            kept = np.arange(extent)
        ids.append(kept)
    matrix = take(packed, "matrix", dtype_of(packed).name, (ids[0].size, ids[1].size))
    m = np.zeros(extents, dtype_of(packed))
    m[np.ix_(*ids)] = matrix
    return m.reshape(packed.shape)


COMPACT = Format("compact", rank(2), _pack, _unpack)
