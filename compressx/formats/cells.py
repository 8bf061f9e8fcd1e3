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
from typing import Any, NamedTuple

import numpy as np

from compressx import views
from compressx.formats.base import Format, Packed, choice, dtype_of, extent, fail, integer, only, pieces, take
from compressx.formats.bit_planes import integer_levels
from compressx.formats.parts import check_shape, clean, pack_codes, part, read_codes, read_flags
from compressx.formats.quantized import (
    Coded,
    check_codes,
    code_dtype,
    code_support,
    codes_of,
    levels_bytes,
    read_levels,
    weights,
    write_levels,
)
from compressx.formats.weight import Bytes, Weight

MAX_FRAGMENT = 1 << 20


def supports(w: np.ndarray, constraint: Any) -> bool | str:
    """True for integers times a scale in a weight of 2 to 4 axes."""
    if not 2 <= w.ndim <= 4:
        return f"a crossbar holds weights of 2 to 4 axes, got shape {w.shape}"
    return integer_levels(w, constraint)


class _Cut(NamedTuple):
    """How codes lie on crossbars: rows in fragment order, those that stay, columns that stay, fragments of rows."""

    lie: np.ndarray
    kept: np.ndarray
    place: np.ndarray
    columns: np.ndarray
    fragment: int
    order: str
    cell: int
    slices: int


def _cut(weight: Weight) -> _Cut:
    w, c = weight.w, weight.once(codes_of)
    fragment, order = 1, "C"
    nested = views.position_order(w.shape, order)
    lie = nested
    found = part(weight.constraint, weight.structure, ("polarize",))
    if found is not None:
        fragment, order = found[0]["fragment"], found[0]["order"]
        nested = lie = views.position_order(w.shape, order)
        if found[1] is not None:
            lie = np.asarray(found[1].order)
    support = weight.once(code_support)
    used = np.flatnonzero(support.positions[lie])
    # a row that polarizing or quantizing emptied keeps its place, so that the fragments stay what they were
    kept = np.arange(used[-1] + 1 if used.size else 0) if found is not None and found[1] is not None else used
    place = np.argsort(nested)[lie[kept]]
    if (np.diff(place) <= 0).any():
        raise ValueError("the rows of the polarity are not in the fragment order")
    cell = c.levels.cell_bits if c.levels.grid == "cells" else 1
    slices = -(-c.levels.top.bit_length() // cell)
    return _Cut(lie, kept, place, np.flatnonzero(support.filters), fragment, order, cell, slices)


def _negative(m: np.ndarray, fragment: int) -> np.ndarray:
    """Which fragments hold weights below 0, bool `[fragments, columns]`; ValueError where one holds both signs."""
    starts = np.arange(0, len(m), fragment)
    if not starts.size:
        return np.zeros((0, m.shape[1]), bool)
    below, above = (np.logical_or.reduceat(x, starts, axis=0) for x in (m < 0, m > 0))
    if (below & above).any():
        raise ValueError(f"{int((below & above).sum())} fragments of {fragment} hold both signs")
    return below


def _size(weight: Weight) -> Bytes:
    cut = _cut(weight)
    p, f = cut.kept.size, cut.columns.size
    total = cut.slices * -(-p * f * cut.cell // 8) + levels_bytes(weight)
    if (weight.once(codes_of).codes < 0).any():
        total += -(-(-(-p // cut.fragment) * f) // 8)
    lines = ((p, cut.lie.size), (f, weight.w.shape[-1]))
    return Bytes(total + sum(-(-n // 8) for kept, n in lines if kept < n), 0)


def _pack(weight: Weight) -> Packed:
    w, c, cut = weight.w, weight.once(codes_of), _cut(weight)
    m = c.codes.reshape(-1, w.shape[-1])[cut.lie[cut.kept]]
    m = m if cut.columns.size == m.shape[1] else m[:, cut.columns]
    negative = _negative(m, cut.fragment)
    magnitude = np.abs(m).reshape(-1)
    arrays, meta = write_levels(c)
    cut_bits = [magnitude >> (cut.cell * i) for i in reversed(range(cut.slices))]
    mask = magnitude.dtype.type((1 << min(cut.cell, 8 * magnitude.itemsize - 1)) - 1)
    arrays["cells"] = np.stack([pack_codes(x & mask, cut.cell) for x in cut_bits])
    if negative.any():
        arrays["signs"] = np.packbits(negative.reshape(-1))
    for name, ids, total in (("rows", cut.place, cut.lie.size), ("cols", cut.columns, w.shape[-1])):
        if ids.size < total:
            kept = np.zeros(total, bool)
            kept[ids] = True
            arrays[name] = np.packbits(kept)
    meta |= {"fragment": cut.fragment, "order": cut.order, "cell": cut.cell}
    return Packed("cells", w.shape, w.dtype.name, arrays, meta)


def _kept(packed: Packed, name: str, total: int) -> np.ndarray | None:
    """Which of the rows or columns are kept, bool `[total]`; None where all are."""
    if name not in packed.arrays:
        return None
    stored = take(packed, name, "uint8", (-(-total // 8),))
    kept = read_flags(stored, slice(0, total))
    if not clean(stored, total) or kept.all():
        fail(f"cells/{name}", f"not a mask that leaves out some of {total}")
    return kept


def _workspace(packed: Packed) -> int:
    """An index of 1, 2 or 4 bytes for every weight, and the order of the rows and columns."""
    lines = math.prod(packed.shape[:-1]) + packed.shape[-1] if packed.shape else 0
    return 4 * extent(packed) + 16 * lines


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
    rows, cols = _kept(packed, "rows", positions), _kept(packed, "cols", filters)
    p, f = (n if kept is None else int(np.count_nonzero(kept)) for kept, n in ((rows, positions), (cols, filters)))
    slices = -(-levels.top.bit_length() // cell)
    stored = take(packed, "cells", "uint8", (slices, -(-p * f * cell // 8)))
    for piece in stored:
        check_codes("cells/cells", piece, p * f * cell)
    signs = None
    if "signs" in packed.arrays:
        number = -(-p // fragment)
        signs = take(packed, "signs", "uint8", (-(-number * f // 8),))
        if not clean(signs, number * f):
            fail("cells/signs", "bits after the last fragment are set")
    place = views.position_order(packed.shape, order)
    place = place if rows is None else place[rows]
    column = None if cols is None else np.flatnonzero(cols)
    whole = np.zeros((positions, filters), code_dtype(levels))
    for here in pieces(p * f):
        at = np.arange(here.start, here.stop)
        row = at // f
        col = at - row * f
        codes = np.zeros(at.size, np.int32)
        for piece in stored:
            codes = codes << cell | read_codes(piece, here, cell)
        if int(codes.max()) > levels.top:
            fail("cells/cells", f"magnitude {int(codes.max())} above the top level {levels.top}")
        if signs is not None:
            bit = row // fragment * f + col
            codes = np.where(signs[bit >> 3] >> (7 - (bit & 7)).astype(np.uint8) & 1, -codes, codes)
        whole[place[row], col if column is None else column[col]] = codes
    return weights(Coded(whole.reshape(packed.shape), structure, levels), dtype_of(packed))


CELLS = Format("cells", supports, _size, _pack, _unpack, _workspace)
