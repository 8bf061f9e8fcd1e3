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

import numpy as np

from compressx.constraints.bsp import strip_sizes
from compressx.formats.base import (
    PIECE,
    Format,
    Packed,
    check_offsets,
    check_range,
    dtype_of,
    fail,
    index_dtype,
    only,
    pieces,
    take,
)
from compressx.formats.parts import check_shape, entries, fits, part
from compressx.formats.weight import Bytes, Support, Weight

_SOME = 512  # inputs by which outputs are told apart before all of them are looked at
_LARGE = 4096  # weights of a block, on average, from which blocks are read one after the other
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
    """Outputs with identical inputs, together; outputs with none are in no block.

    Args:
      mask: bool `[F, P]`, outputs first.
    """
    first, member = _alike(mask.T)
    order = np.argsort(member, kind="stable")
    split = np.split(order, np.flatnonzero(np.diff(member[order])) + 1)
    blocks = [(outputs, np.flatnonzero(mask[f])) for outputs, f in zip(split, first, strict=True)]
    return [b for b in blocks if b[1].size]


def _alike(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of a mask `[P, F]`: the first output of every group with identical inputs, and which group each output is in."""
    inputs = np.ascontiguousarray(np.packbits(matrix, axis=0).T)
    whole = inputs.view(np.dtype((np.void, inputs.shape[1]))).reshape(-1)  # compared as bytes, an output as one
    _, first, member = np.unique(whole, return_index=True, return_inverse=True)
    return first, member.reshape(-1)


def _strips(weight: Weight) -> tuple[int, int] | None:
    """Strips of outputs and of inputs, where the constraint cuts them."""
    strips = [1, 1]
    for kind, axis in (("bsp_columns", 0), ("bsp_rows", 1)):
        found = part(weight.constraint, weight.structure, (kind,))
        if found is not None:
            strips[axis] = found[0]["strips"]
    whole = part(weight.constraint, weight.structure, ("bsp",))
    if whole is not None:
        strips = [whole[0]["column_strips"], whole[0]["row_strips"]]
    some = part(weight.constraint, weight.structure, ("bsp", "bsp_columns", "bsp_rows"))
    return None if some is None else (strips[0], strips[1])


def _of_groups(support: Support) -> tuple[np.ndarray, np.ndarray]:
    """How many outputs and inputs each group has."""
    first, member = _alike(support.matrix)
    outputs = np.bincount(member, minlength=first.size)
    inputs = np.count_nonzero(support.matrix[:, first], axis=0)
    return outputs[inputs > 0], inputs[inputs > 0]


def _of_tiles(support: Support, strips: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """How many outputs and inputs each tile keeps."""
    ends = [np.cumsum(strip_sizes(n, s)) for n, s in zip(support.matrix.shape[::-1], strips, strict=True)]
    across, along = (np.concatenate([[0], e[:-1]]) for e in ends)
    outputs = np.add.reduceat(np.logical_or.reduceat(support.matrix, along, axis=0), across, axis=1, dtype=np.int64)
    inputs = np.add.reduceat(np.logical_or.reduceat(support.matrix, across, axis=1), along, axis=0, dtype=np.int64)
    return outputs[outputs > 0], inputs[outputs > 0]


def _size(weight: Weight) -> Bytes:
    support, strips = weight.support, _strips(weight)
    outputs, inputs = support.once(_of_groups) if strips is None else _of_tiles(support, strips)
    positions, filters = support.matrix.shape
    ids = int(inputs.sum()) * index_dtype(positions).itemsize + int(outputs.sum()) * index_dtype(filters).itemsize
    return Bytes(8 * (outputs.size + 1) + ids, int((outputs * inputs).sum()))


def _least(weight: Weight) -> Bytes:
    """Outputs whose first inputs differ are in different groups: of these there are so many at least."""
    support = weight.support
    if _strips(weight) is not None:
        return _size(weight)
    return support.once(_least_of_groups)


def _least_of_groups(support: Support) -> Bytes:
    positions, filters = support.matrix.shape
    _, member = _alike(support.matrix[:_SOME])
    inputs = np.count_nonzero(support.matrix, axis=0)
    longest = np.zeros(int(member.max(initial=0)) + 1, np.int64)
    np.maximum.at(longest, member, inputs)
    alive = int(np.count_nonzero(inputs))
    groups = int(np.count_nonzero(longest))
    ids = int(longest.sum()) * index_dtype(positions).itemsize + alive * index_dtype(filters).itemsize
    return Bytes(8 * (groups + 1) + ids, support.count)


def _blocks(weight: Weight, mask: np.ndarray) -> list[Block]:
    if not mask.any():
        return []
    strips = _strips(weight)
    blocks = groups(mask) if strips is None else tiles(mask, *strips)
    return sorted(blocks, key=lambda b: (-b[1].size, b[1].tobytes(), b[0].tobytes()))


def _pack(weight: Weight) -> Packed:
    w = weight.w
    m = w.reshape(-1, w.shape[-1]).T
    blocks = _blocks(weight, weight.support.matrix.T)
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
    stride = take(packed, "stride", "uint32", (None,))
    offset = take(packed, "offset", "uint32", stride.shape)
    column = take(packed, "column", index_dtype(positions).name, (None,))
    reorder = take(packed, "reorder", index_dtype(filters).name, (None,))
    check_offsets("bspc/stride", stride, column.size)
    check_offsets("bspc/offset", offset, reorder.size)
    _check_ids("column", column, stride, positions)
    _check_ids("reorder", reorder, offset, filters)
    weight = take(packed, "weight", dtype_of(packed).name, (None,))
    blocks = ((_lengths(stride, p), _lengths(offset, p)) for p in pieces(stride.size - 1))
    if sum(int((inputs.astype(object) * outputs).sum()) for inputs, outputs in blocks) != weight.size:
        fail("bspc/weight", f"{weight.size} weights do not fill the blocks")

    def block_of(row: np.ndarray) -> np.ndarray:
        return np.searchsorted(offset, row.astype(np.uint32), side="right") - 1

    def lengths(rows: slice) -> np.ndarray:
        """The weights of an output in its block are a row: one run of `column`, where the block's inputs are."""
        block = block_of(np.arange(rows.start, rows.stop))
        return stride[block + 1].astype(np.int64) - stride[block]

    m = np.zeros((positions, filters), dtype_of(packed))
    seen = np.zeros(m.shape, bool)
    used, large = 0, weight.size >= _LARGE * (stride.size - 1)
    for number in range(stride.size - 1 if large else 0):
        inputs = column[stride[number] : stride[number + 1]].astype(np.int64)
        outputs = reorder[offset[number] : offset[number + 1]].astype(np.int64)
        for here in pieces(outputs.size, max(1, PIECE // max(inputs.size, 1))):
            some = np.ix_(inputs, outputs[here])
            end = used + inputs.size * (here.stop - here.start)
            m[some] = weight[used:end].reshape(-1, inputs.size).T
            seen[some] = True
            used = end
    for row, index in entries(lengths, 0 if large else reorder.size):
        at = column[stride[block_of(row)] + index], reorder[row]
        m[at] = weight[used : used + row.size]
        seen[at] = True
        used += row.size
    if np.count_nonzero(seen) != weight.size:
        fail("bspc", "blocks overlap")
    return m.reshape(packed.shape)


def _lengths(ends: np.ndarray, here: slice) -> np.ndarray:
    """How many ids a piece of the blocks have, int64."""
    return np.diff(ends[here.start : here.stop + 1].astype(np.int64))


def _check_ids(name: str, ids: np.ndarray, ends: np.ndarray, extent: int) -> None:
    """The ids of every block lie in 0..extent-1 and increase strictly; block b has ids `ends[b]` to `ends[b + 1]`."""
    check_range(f"bspc/{name}", ids, extent)
    for here in pieces(ids.size - 1):
        after = ids[here.start + 1 : here.stop + 1]
        falls = here.start + 1 + np.flatnonzero(after <= ids[here])  # only where another block begins
        block = np.searchsorted(ends, falls.astype(np.uint32))
        if (ends[np.minimum(block, ends.size - 1)] != falls).any():
            fail(f"bspc/{name}", "the ids of a block do not increase strictly")


BSPC = Format("bspc", lambda w, constraint: fits(w, 2), _size, _pack, _unpack, least=_least)
