"""The bank-balanced format: the same number of values in every bank of every row, and their positions inside the bank.

The matrix is the GEMM view `[in, out]`; rows and banks run as in `constraints.bank_balanced` (meta `axis`, `bank`). A
row of length L has W = floor(L / bank) banks of k values and, where L is no multiple, a last one of k' (meta `keep`,
the most non-zeros that any of them has): no pointers are needed. With R rows and v bytes a weight:

    values   bank after bank, rows after rows        n v bytes, n = R (W k + k')
    offsets  ceil(log2 bank) bits a value            ceil(n ceil(log2 bank) / 8) bytes

A bank with fewer non-zeros also stores zeros of its own, the first ones. Positions in a bank ascend.

Source: S. Cao et al., "Efficient and Effective Sparse LSTM on FPGA with Bank-Balanced Sparsity", 2019; the layout is
ours.
"""

import math
from typing import Any

import numpy as np

from compressx.formats.base import Format, Packed, choice, dtype_of, fail, integer, nonzero, only, pieces, take
from compressx.formats.parts import check_shape, clean, fits, pack_bits, part, read_bits

_AXES = ("outputs", "inputs")
_MOST = 1 << 30


def _supports(w: np.ndarray, constraint: Any) -> bool | str:
    if part(constraint, None, ("bank_balanced",)) is None:
        return "needs a constraint with bank_balanced(...), which cuts the banks"
    return fits(w, 2)


def _rows(w: np.ndarray, axis: str) -> np.ndarray:
    m = w.reshape(-1, w.shape[-1])
    return np.ascontiguousarray(m if axis == "outputs" else m.T)


def _pack(w: np.ndarray, constraint: Any, structure: Any) -> Packed:
    found = part(constraint, structure, ("bank_balanced",))
    assert found is not None  # `supports` said so
    axis, bank = found[0]["axis"], int(found[0]["bank"])
    m = _rows(w, axis)
    rows, length = m.shape
    whole = length // bank * bank
    pieces = m[:, :whole].reshape(rows, -1, bank), m[:, whole:].reshape(rows, -1, max(length - whole, 1))
    keep, values, places = [], [], []
    for piece in pieces:
        mask = nonzero(piece)
        keep.append(int(mask.sum(axis=2).max(initial=0)))
        place = np.sort(np.argsort(~mask, axis=2, kind="stable")[:, :, : keep[-1]], axis=2)
        places.append(place.reshape(rows, -1))
        values.append(np.take_along_axis(piece, place, axis=2).reshape(rows, -1))
    arrays = {
        "values": np.concatenate(values, axis=1).reshape(-1),
        "offsets": pack_bits(np.concatenate(places, axis=1).reshape(-1), _bits(bank)),
    }
    return Packed("bank-balanced", w.shape, w.dtype.name, arrays, {"axis": axis, "bank": bank, "keep": keep})


def _bits(bank: int) -> int:
    """ceil(log2 bank)."""
    return (bank - 1).bit_length()


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "values", "offsets")
    check_shape(packed, 2)
    axis = choice(packed, "axis", _AXES)
    bank = integer(packed, "bank", 1, _MOST)
    extents = math.prod(packed.shape[:-1]), packed.shape[-1]
    rows, length = extents if axis == "outputs" else extents[::-1]
    number, rest = divmod(length, bank)
    keep = packed.meta.get("keep")
    if (
        not isinstance(keep, list)
        or len(keep) != 2
        or not all(type(k) is int and 0 <= k <= n for k, n in zip(keep, (min(bank, length), rest), strict=True))
    ):
        fail("bank-balanced/keep", f"{str(keep)[:80]} values do not fit banks of {bank} and a last one of {rest}")
    each, width = number * keep[0] + keep[1], _bits(bank)
    values = take(packed, "values", dtype_of(packed).name, (rows * each,))
    stored = take(packed, "offsets", "uint8", (-(-rows * each * width // 8),))
    if not clean(stored, rows * each * width):
        fail("bank-balanced/offsets", "bits after the last place are set")
    m = np.zeros((extents[0], extents[1]), dtype_of(packed))
    lines, last = m if axis == "outputs" else m.T, -1
    for here in pieces(rows * each):
        at = np.arange(here.start, here.stop)
        row, index = np.divmod(at, each)
        bank_of = np.minimum(index // max(keep[0], 1), number) if keep[0] else np.full_like(at, number)
        offsets = read_bits(stored, width * at, width)
        if (offsets >= np.where(bank_of == number, rest, bank)).any():
            fail("bank-balanced/offsets", "a place lies outside its bank")
        places = row * length + bank_of * bank + offsets
        if int(places[0]) <= last or (np.diff(places) <= 0).any():
            fail("bank-balanced/offsets", "the positions of a bank do not ascend")
        lines[row, places - row * length] = values[here]
        last = int(places[-1])
    return m.reshape(packed.shape)


BANK_BALANCED = Format("bank-balanced", _supports, _pack, _unpack)
