"""BSPC: dense blocks cut out of a matrix, each with one list of inputs for all of its outputs.

The papers' row is an output, a column of our GEMM view `[P, F]`; their column is an input position. Outputs that keep
the same inputs share one list of them. Blocks are the tiles of the constraint's strips where it is block-based
structured pruning, and otherwise the groups of outputs with identical inputs; they are ordered by falling length,
then by their inputs, so that like blocks are neighbours. With T blocks of r outputs and c inputs, v bytes a weight,
b(N) = 1, 2 or 4 bytes for an id below N:

    stride   uint32 [T + 1]   first input of each block            4 (T + 1)
    column   [sum c]          its input positions, ascending       b(P) sum c
    offset   uint32 [T + 1]   first output of each block           4 (T + 1)
    reorder  [sum r]          its original outputs, ascending      b(F) sum r
    weight   [sum r c]        its weights, an output after another v sum r c

Source: P. Dong et al., "RTMobile: Beyond Real-Time Mobile Acceleration of RNNs for Speech Recognition", 2020, BSP
compact format. Its register-load array is what a block's inputs say here: every output of a block loads the same ones.
"""

import math
from typing import Any

import numpy as np

from compressx.constraints.bsp import strip_sizes
from compressx.formats.base import (
    Format,
    Packed,
    check_offsets,
    check_range,
    dtype_of,
    fail,
    filters_first,
    filters_last,
    index_dtype,
    nonzero,
    only,
    take,
)
from compressx.formats.parts import check_shape, fits, part

Block = tuple[np.ndarray, np.ndarray]  # outputs and inputs, ascending


def _cuts(n: int, strips: int) -> list[np.ndarray]:
    return np.split(np.arange(n), np.cumsum(strip_sizes(n, strips))[:-1])


def tiles(mask: np.ndarray, output_strips: int, input_strips: int) -> list[Block]:
    """The outputs and inputs that are alive in every tile of a grid.

    Args:
      mask: bool `[F, P]`, outputs first.
      output_strips, input_strips: strips (the last takes the remainder) of each axis.
    """
    blocks = []
    for outputs in _cuts(mask.shape[0], output_strips):
        for inputs in _cuts(mask.shape[1], input_strips):
            tile = mask[np.ix_(outputs, inputs)]
            blocks.append((outputs[tile.any(axis=1)], inputs[tile.any(axis=0)]))
    return [b for b in blocks if b[0].size]


def groups(mask: np.ndarray) -> list[Block]:
    """Outputs with identical inputs, together; outputs with none are in no block."""
    packed = np.packbits(mask, axis=1)
    _, first, member = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    member = member.reshape(-1)
    order = np.argsort(member, kind="stable")
    split = np.split(order, np.flatnonzero(np.diff(member[order])) + 1)
    blocks = [(outputs, np.flatnonzero(mask[f])) for outputs, f in zip(split, first, strict=True)]
    return [b for b in blocks if b[1].size]


def _blocks(mask: np.ndarray, constraint: Any, structure: Any) -> list[Block]:
    if not mask.any():
        return []
    strips = [1, 1]
    for kind, axis in (("bsp_columns", 0), ("bsp_rows", 1)):
        found = part(constraint, structure, (kind,))
        if found is not None:
            strips[axis] = found[0]["strips"]
    whole = part(constraint, structure, ("bsp",))
    if whole is not None:
        strips = [whole[0]["column_strips"], whole[0]["row_strips"]]
    bsp = part(constraint, structure, ("bsp", "bsp_columns", "bsp_rows"))
    blocks = groups(mask) if bsp is None else tiles(mask, *strips)
    return sorted(blocks, key=lambda b: (-b[1].size, b[1].tobytes(), b[0].tobytes()))


def _pack(w: np.ndarray, constraint: Any, structure: Any) -> Packed:
    m = filters_first(w)
    blocks = _blocks(nonzero(m), constraint, structure)
    none = np.zeros(0, np.int64)
    ends = [np.cumsum([0, *(ids[k].size for ids in blocks)]).astype(np.uint32) for k in (0, 1)]
    arrays = {
        "stride": ends[1],
        "column": np.concatenate([none, *(b[1] for b in blocks)]).astype(index_dtype(m.shape[1])),
        "offset": ends[0],
        "reorder": np.concatenate([none, *(b[0] for b in blocks)]).astype(index_dtype(m.shape[0])),
        "weight": np.concatenate([np.zeros(0, m.dtype), *(m[np.ix_(*b)].reshape(-1) for b in blocks)]),
    }
    return Packed("bspc", w.shape, w.dtype.name, arrays, {})


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "stride", "column", "offset", "reorder", "weight")
    check_shape(packed, 2)
    filters, positions = packed.shape[-1], math.prod(packed.shape[:-1])
    stride = take(packed, "stride", "uint32", (None,)).astype(np.int64)
    offset = take(packed, "offset", "uint32", stride.shape).astype(np.int64)
    column = take(packed, "column", index_dtype(positions).name, (None,)).astype(np.int64)
    reorder = take(packed, "reorder", index_dtype(filters).name, (None,)).astype(np.int64)
    for name, ends, ids, extent in (("column", stride, column, positions), ("reorder", offset, reorder, filters)):
        check_offsets("bspc/stride" if name == "column" else "bspc/offset", ends, ids.size)
        check_range(f"bspc/{name}", ids, extent)
        inner = np.ones(max(ids.size - 1, 0), bool)
        inner[ends[1:-1][(ends[1:-1] > 0) & (ends[1:-1] < ids.size)] - 1] = False
        if (np.diff(ids)[inner] <= 0).any():
            fail(f"bspc/{name}", "the ids of a block do not increase strictly")
    weight = take(packed, "weight", dtype_of(packed).name, (None,))
    widths = np.diff(stride)
    areas = widths * np.diff(offset)
    if int(areas.astype(object).sum()) != weight.size:
        fail("bspc/weight", f"{weight.size} weights do not fill the blocks")
    # the weights of an output in its block are a row: one run of `column`, which starts where the block's inputs do
    width = np.repeat(widths, np.diff(offset))
    start = np.repeat(stride[:-1], np.diff(offset)) - (np.cumsum(width) - width)
    place = np.repeat(reorder * positions, width) + column[np.repeat(start, width) + np.arange(weight.size)]
    m = np.zeros(filters * positions, dtype_of(packed))
    m[place] = weight
    seen = np.zeros(m.size, bool)
    seen[place] = True
    if np.count_nonzero(seen) != place.size:
        fail("bspc", "blocks overlap")
    return filters_last(m.reshape(filters, positions), packed.shape)


BSPC = Format("bspc", lambda w, constraint: fits(w, 2), _pack, _unpack)
