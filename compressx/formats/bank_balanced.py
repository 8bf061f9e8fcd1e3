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

from compressx.formats.base import Format, Packed, choice, dtype_of, fail, index_dtype, integer, only, pieces, take
from compressx.formats.parts import check_shape, clean, fits, pack_bits, part, read_bits
from compressx.formats.weight import Bytes, Weight

_AXES = ("outputs", "inputs")
_MOST = 1 << 30


def _supports(w: np.ndarray, constraint: Any) -> bool | str:
    if part(constraint, None, ("bank_balanced",)) is None:
        return "needs a constraint with bank_balanced(...), which cuts the banks"
    return fits(w, 2)


def _rows(w: np.ndarray, axis: str) -> np.ndarray:
    m = w.reshape(-1, w.shape[-1])
    return np.ascontiguousarray(m if axis == "outputs" else m.T)


def _cut(weight: Weight) -> tuple[str, int, np.ndarray, list[np.ndarray]]:
    """The axis, the bank, the mask by rows, and the values in the banks of each row: of whole ones, and of the last."""
    found = part(weight.constraint, weight.structure, ("bank_balanced",))
    assert found is not None  # `supports` said so
    axis, bank = found[0]["axis"], int(found[0]["bank"])
    mask = _rows(weight.support.mask, axis)
    whole = mask.shape[1] // bank * bank
    counts = [_counted(mask[:, :whole], bank), _counted(mask[:, whole:], max(mask.shape[1] - whole, 1))]
    return axis, bank, mask, counts


def _counted(mask: np.ndarray, bank: int) -> np.ndarray:
    """Values in every bank of every row, int64 `[rows, banks]`."""
    rows = len(mask)
    if bank % 8:
        counted: np.ndarray = mask.reshape(rows, -1, bank).sum(axis=2)
        return counted
    eight = np.bitwise_count(np.packbits(mask, axis=1))
    return eight.reshape(rows, -1, bank // 8).sum(axis=2, dtype=np.int64)


def _size(weight: Weight) -> Bytes:
    _, bank, mask, counts = _cut(weight)
    values = len(mask) * sum(c.shape[1] * int(c.max(initial=0)) for c in counts)
    return Bytes(-(-values * _bits(bank) // 8), values)


def _pack(weight: Weight) -> Packed:
    w = weight.w
    axis, bank, mask, counts = _cut(weight)
    m = _rows(w, axis)
    rows, length = m.shape
    keep = [int(c.max(initial=0)) for c in counts]
    if all(bool((c == k).all()) for c, k in zip(counts, keep, strict=True)):
        # every bank is full: its values are the row's, and a position is the rest after whole banks
        column = np.arange(length, dtype=index_dtype(length)) % bank
        offsets = np.broadcast_to(column.astype(index_dtype(bank)), m.shape)[mask]
        values = m[mask]
    else:
        values, offsets = _padded(m, mask, bank, keep)
    arrays = {"values": values, "offsets": pack_bits(offsets, _bits(bank))}
    return Packed("bank-balanced", w.shape, w.dtype.name, arrays, {"axis": axis, "bank": bank, "keep": keep})


def _padded(m: np.ndarray, mask: np.ndarray, bank: int, keep: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Values and positions where banks with fewer values store their first zeros too."""
    rows, length = m.shape
    whole = length // bank * bank
    values, at = [], []
    for here, size, kept in zip((slice(whole), slice(whole, None)), (bank, max(length - whole, 1)), keep, strict=True):
        held = m[:, here].reshape(rows, -1, size)
        place = np.sort(np.argsort(~mask[:, here].reshape(held.shape), axis=2, kind="stable")[:, :, :kept], axis=2)
        at.append(place.reshape(rows, -1))
        values.append(np.take_along_axis(held, place, axis=2).reshape(rows, -1))
    return np.concatenate(values, axis=1).reshape(-1), np.concatenate(at, axis=1).reshape(-1)


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


BANK_BALANCED = Format("bank-balanced", _supports, _size, _pack, _unpack)
