"""The dense format: the weight as it is. The fallback of every leaf, and what all rates are measured against."""

from typing import Any

import numpy as np

from compressx.formats.base import DTYPES, Format, Packed, dtype_of, only, rank, take


def _pack(w: np.ndarray, constraint: Any, structure: Any) -> Packed:
    del constraint, structure
    return Packed("dense", w.shape, w.dtype.name, {"values": np.ascontiguousarray(w).reshape(w.shape)}, {})


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "values")
    return take(packed, "values", dtype_of(packed).name, packed.shape)


DENSE = Format("dense", rank(0, tuple(DTYPES)), _pack, _unpack)
