"""What it takes to multiply with a packed matrix: a product straight from the arrays, and the decoder's work counted.

Decoding efficiency has no agreed definition; here it is counted per non-zero weight, so that formats can be compared:

    reads      indices and pointers fetched
    additions  steps in which one position is computed from the one before it, which cannot run side by side
    products   multiplications, those with stored zeros included

    block-max                one offset a block, no pointer, no addition: position = block * B + offset
    bank-balanced            one offset an entry, no pointer, no addition: position = bank * B + offset; every bank has
                             as many entries as the fullest, the missing ones stored zeros
    relative-index columns   one 4-bit gap a weight and one addition each; a gap above 15 stores a zero in between
    compressed sparse rows   one column a weight, two row pointers a row
    blocks                   one position a kept tile, all of whose weights are multiplied

Source: A. Ren et al., "DARB", 2020 (decoding, our reading); S. Han et al., "EIE", 2016 (relative indices); S. Cao et
al., "Efficient and Effective Sparse LSTM on FPGA with Bank-Balanced Sparsity", 2019.
"""

from typing import NamedTuple

import numpy as np

from compressx.formats.base import Packed, fail
from compressx.formats.block_max import unpacked_places
from compressx.formats.on_levels import in_floats


class Work(NamedTuple):
    """A decoder's work for one product with a matrix, in all."""

    nonzeros: int
    reads: int
    additions: int
    products: int


def multiply(packed: Packed, x: np.ndarray) -> np.ndarray:
    """x @ w for a matrix `[in, out]` in the block-max format, without unpacking it.

    Args:
      packed: in the format "block-max", or "block-max-coded".
      x: `[..., in]`.

    Returns:
      `[..., out]` in x's dtype.
    """
    packed = in_floats(packed)
    if packed.format != "block-max":
        fail(packed.format, "this product reads the block-max format alone")
    values, row, column, axis = unpacked_places(packed)
    at_in, at_out = (row, column) if axis == "outputs" else (column, row)
    flat = x.reshape(-1, x.shape[-1])
    out = np.zeros((flat.shape[0], packed.shape[-1]), x.dtype)
    for lane, y in zip(flat, out, strict=True):
        np.add.at(y, at_out, lane[at_in] * values)
    return out.reshape(*x.shape[:-1], packed.shape[-1])


def work(
    w: np.ndarray,
    sizes: np.ndarray | None = None,
    tile: tuple[int, int] = (8, 8),
    bank: int = 64,
    axis: str = "outputs",
) -> dict[str, Work]:
    """The decoder's work for one matrix `[in, out]` in each of the formats that hold it.

    Args:
      w: the matrix.
      sizes: block size of every row for block-max, or None to leave that format out.
      tile: of the block format.
      bank: length of a bank.
      axis: "outputs" or "inputs", along which block-max's blocks and banks run, as in `constraints.darb`.
    """
    mask = np.asarray(w) != 0
    rows, length = mask.shape
    number = int(mask.sum())
    out = {}
    if sizes is not None:
        lines, long = mask.shape if axis == "outputs" else mask.T.shape
        blocks = int((-(-long // np.asarray(sizes, np.int64))).sum())
        out["block-max"] = Work(number, blocks + lines, 0, blocks)
    entries = bank_entries(w, bank, axis)
    out["bank-balanced"] = Work(number, entries, 0, entries)
    stored = sum(_stored(np.flatnonzero(mask[:, j])) for j in range(length))
    out["relative-index columns"] = Work(number, stored + 2 * length, stored, stored)
    out["compressed sparse rows"] = Work(number, number + 2 * rows, 0, number)
    down, across = -(-rows // tile[0]), -(-length // tile[1])
    padded = np.zeros((down * tile[0], across * tile[1]), bool)
    padded[:rows, :length] = mask
    tiles = int(padded.reshape(down, tile[0], across, tile[1]).any(axis=(1, 3)).sum())
    out["blocks"] = Work(number, tiles, 0, tiles * tile[0] * tile[1])
    return out


def bank_entries(w: np.ndarray, bank: int, axis: str = "outputs") -> int:
    """Entries of a matrix `[in, out]` stored by banks: each has as many as the fullest; so do ragged last ones."""
    m = np.asarray(w) != 0
    lines = m if axis == "outputs" else m.T
    whole = lines.shape[1] // bank * bank
    full = lines[:, :whole].reshape(len(lines), -1, bank).sum(axis=2)
    tail = lines[:, whole:].sum(axis=1)
    return int(full.size * full.max(initial=0) + tail.size * tail.max(initial=0))


def _stored(places: np.ndarray, reach: int = 16) -> int:
    """Entries of a column with 4-bit gaps: its weights, and a zero for every 16 positions skipped."""
    gaps = np.diff(places, prepend=-1) - 1
    return int(len(places) + (gaps // reach).sum())
