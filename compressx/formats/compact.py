"""The compact format: whole rows and columns of the GEMM view removed, and a smaller dense matrix left.

Arrays: `matrix` `[p, f]` of the weight's dtype, `positions` `[p]` and `filters` `[f]` the kept ids, increasing, in the
smallest of uint8, uint16 and uint32 that holds the full extent; a list is left out where all are kept. Bytes of a
weight of P positions and F filters, v bytes each, of which p and f stay (id width b(N) = 1, 2 or 4):

    p f v + [p < P] p b(P) + [f < F] f b(F)
"""

import itertools

import numpy as np

from compressx.formats.base import (
    Format,
    Packed,
    check_increasing,
    dtype_of,
    fail,
    index_dtype,
    only,
    pieces,
    rank,
    take,
)
from compressx.formats.weight import Bytes, Weight


def _extents(shape: tuple[int, ...]) -> tuple[int, int]:
    return int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]


def _size(weight: Weight) -> Bytes:
    alive = weight.support.positions, weight.support.filters
    kept = [int(np.count_nonzero(a)) for a in alive]
    ids = sum(n * index_dtype(a.size).itemsize for n, a in zip(kept, alive, strict=True) if n < a.size)
    return Bytes(ids, kept[0] * kept[1])


def _pack(weight: Weight) -> Packed:
    w, support = weight.w, weight.support
    m = w.reshape(_extents(w.shape))
    keep = {"positions": np.flatnonzero(support.positions), "filters": np.flatnonzero(support.filters)}
    rows = m if keep["positions"].size == m.shape[0] else m[keep["positions"]]
    matrix = rows if keep["filters"].size == m.shape[1] else np.take(rows, keep["filters"], axis=1)
    arrays = {"matrix": np.ascontiguousarray(matrix)}
    for (name, ids), extent in zip(keep.items(), m.shape, strict=True):
        if ids.size < extent:
            arrays[name] = ids.astype(index_dtype(extent))
    return Packed("compact", w.shape, w.dtype.name, arrays, {})


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "matrix", "positions", "filters")
    if len(packed.shape) < 2:
        fail("compact", f"shape {list(packed.shape)} has no rows and columns")
    extents = _extents(packed.shape)
    held: list[np.ndarray | None] = []
    for name, extent in zip(("positions", "filters"), extents, strict=True):
        kept = take(packed, name, index_dtype(extent).name, (None,)) if name in packed.arrays else None
        if kept is not None:
            check_increasing(f"compact/{name}", kept, extent)
        held.append(kept)
    number = [n if ids is None else ids.size for ids, n in zip(held, extents, strict=True)]
    matrix = take(packed, "matrix", dtype_of(packed).name, (number[0], number[1]))
    m = np.zeros(extents, dtype_of(packed))
    for parts in itertools.product(*(pieces(n) for n in number)):
        ids = (np.arange(p.start, p.stop) if a is None else a[p] for a, p in zip(held, parts, strict=True))
        m[np.ix_(*ids)] = matrix[parts]
    return m.reshape(packed.shape)


COMPACT = Format("compact", rank(2), _size, _pack, _unpack)
