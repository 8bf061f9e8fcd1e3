"""The dense format: the weight as it is. The fallback of every leaf, and what all rates are measured against."""

import numpy as np

from compressx.formats.base import DTYPES, Format, Packed, dtype_of, only, rank, take
from compressx.formats.weight import Bytes, Weight


def _size(weight: Weight) -> Bytes:
    return Bytes(0, weight.w.size)


def _pack(weight: Weight) -> Packed:
    w = weight.w
    return Packed("dense", w.shape, w.dtype.name, {"values": np.ascontiguousarray(w).reshape(w.shape)}, {})


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "values")
    return take(packed, "values", dtype_of(packed).name, packed.shape)


DENSE = Format("dense", rank(0, tuple(DTYPES)), _size, _pack, _unpack)
