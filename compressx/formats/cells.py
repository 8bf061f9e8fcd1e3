"""Crossbar cells: magnitudes cut into cells of a few bits, one sign bit a fragment, pruned rows and columns left out.

What FORMS writes into its arrays. Rows are positions in the fragment order of `polarize` (without it, every weight is a
fragment of its own), columns are filters; fragments are runs of m rows of a column. With p rows and f columns kept of
P and F, b magnitude bits in s = ceil(b / cell bits) slices:

    cells  uint8 [s, ceil(p f cell_bits / 8)]  slices of all weights, highest first       s p f cell_bits / 8 bytes
    signs  a bit a fragment                    left out where no fragment is negative     ceil(p / m) f / 8
    rows   a bit a position, in fragment order left out where all are kept                P / 8
    cols   a bit a filter                      left out where all are kept                F / 8

(each rounded up) and the scales.

Source: G. Yuan et al., "FORMS: Fine-grained Polarized ReRAM-based In-situ Computation for Mixed-signal DNN
Accelerator", 2021.
"""

import math
from typing import Any

import numpy as np

from compressx import views
from compressx.formats.base import Format, Packed, choice, dtype_of, fail, integer, only, take
from compressx.formats.bit_planes import integer_levels
from compressx.formats.parts import check_shape, part
from compressx.formats.quantized import (
    Coded,
    coded,
    pack_codes,
    read_levels,
    unpack_codes,
    weights,
    write_levels,
)

MAX_FRAGMENT = 1 << 20


def supports(w: np.ndarray, constraint: Any) -> bool | str:
    """True for integers times a scale in a weight of 2 to 4 axes."""
    if not 2 <= w.ndim <= 4:
        return f"a crossbar holds weights of 2 to 4 axes, got shape {w.shape}"
    return integer_levels(w, constraint)


def _pack(w: np.ndarray, constraint: Any, structure: Any) -> Packed:
    c = coded(w, constraint, structure)
    fragment, order = 1, "C"
    nested = views.position_order(w.shape, order)
    lie = nested
    found = part(constraint, structure, ("polarize",))
    if found is not None:
        fragment, order = found[0]["fragment"], found[0]["order"]
        nested = lie = views.position_order(w.shape, order)
        if found[1] is not None:
            lie = np.asarray(found[1].order)
    m = c.codes.reshape(-1, w.shape[-1])[lie]
    used = np.flatnonzero(m.any(axis=1))
    # a row that polarizing or quantizing emptied keeps its place, so that the fragments stay what they were
    kept = np.arange(used[-1] + 1 if used.size else 0) if found is not None and found[1] is not None else used
    place = np.argsort(nested)[lie[kept]]
    if (np.diff(place) <= 0).any():
        raise ValueError("the rows of the polarity are not in the fragment order")
    cols = np.flatnonzero(m.any(axis=0))
    m = m[np.ix_(kept, cols)]
    p, f = m.shape
    number = -(-p // fragment)
    pieces = np.pad(m, ((0, number * fragment - p), (0, 0))).reshape(number, fragment, f)
    negative = (pieces < 0).any(axis=1)
    if (negative & (pieces > 0).any(axis=1)).any():
        raise ValueError(f"{int((negative & (pieces > 0).any(axis=1)).sum())} fragments of {fragment} hold both signs")
    cell = c.levels.cell_bits if c.levels.grid == "cells" else 1
    bits = c.levels.top.bit_length()
    slices = -(-bits // cell)
    magnitude = np.abs(m).reshape(-1)
    arrays, meta = write_levels(c)
    cut = [pack_codes(magnitude >> (cell * i) & ((1 << cell) - 1), cell) for i in reversed(range(slices))]
    arrays["cells"] = np.stack(cut)
    if negative.any():
        arrays["signs"] = np.packbits(negative.reshape(-1))
    for name, ids, total in (("rows", place, len(nested)), ("cols", cols, w.shape[-1])):
        if ids.size < total:
            mask = np.zeros(total, bool)
            mask[ids] = True
            arrays[name] = np.packbits(mask)
    return Packed("cells", w.shape, w.dtype.name, arrays, meta | {"fragment": fragment, "order": order, "cell": cell})


def _ids(packed: Packed, name: str, total: int) -> np.ndarray:
    if name not in packed.arrays:
        return np.arange(total)
    bits = np.unpackbits(take(packed, name, "uint8", (-(-total // 8),)))
    if bits[total:].any() or bits[:total].all():
        fail(f"cells/{name}", f"not a mask that leaves out some of {total}")
    return np.flatnonzero(bits[:total])


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "levels", "cells", "signs", "rows", "cols")
    check_shape(packed, 2)
    if len(packed.shape) > 4:
        fail("cells", f"shape {list(packed.shape)} has more than 4 axes")
    levels, structure = read_levels(packed)
    if levels.grid not in ("uniform", "cells"):
        fail("cells/grid", f"{levels.grid!r} has no integers")
    fragment = integer(packed, "fragment", 1, MAX_FRAGMENT)
    order = choice(packed, "order", ("W", "H", "C"))
    cell = integer(packed, "cell", 1, 16)
    positions, filters = math.prod(packed.shape[:-1]), packed.shape[-1]
    place, cols = _ids(packed, "rows", positions), _ids(packed, "cols", filters)
    p, f = place.size, cols.size
    slices = -(-levels.top.bit_length() // cell)
    stored = take(packed, "cells", "uint8", (slices, -(-p * f * cell // 8)))
    codes = np.zeros(p * f, np.int64)
    for piece in stored:
        codes = codes << cell | unpack_codes("cells/cells", piece, p * f, cell)
    if int(codes.max(initial=0)) > levels.top:
        fail("cells/cells", f"magnitude {int(codes.max())} above the top level {levels.top}")
    m = codes.astype(np.int32).reshape(p, f)
    if "signs" in packed.arrays:
        number = -(-p // fragment)
        bits = np.unpackbits(take(packed, "signs", "uint8", (-(-number * f // 8),)))
        if bits[number * f :].any():
            fail("cells/signs", "bits after the last fragment are set")
        negative = np.repeat(bits[: number * f].reshape(number, f), min(fragment, max(p, 1)), axis=0)[:p] > 0
        m = np.where(negative, -m, m)
    whole = np.zeros((positions, filters), np.int32)
    whole[np.ix_(views.position_order(packed.shape, order)[place], cols)] = m
    return weights(Coded(whole.reshape(packed.shape), structure, levels), dtype_of(packed))


CELLS = Format("cells", supports, _pack, _unpack)
