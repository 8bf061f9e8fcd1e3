"""FKW: kernels that each keep the weights of one pattern, in filters reordered for execution.

Filters are reordered by length (their number of surviving kernels, longest first), and inside a length so that
neighbours carry the same pattern at as many input channels as a greedy chain finds. The kernels of a filter are sorted
by pattern, then input channel. Arrays, for Co filters, P patterns of e taps, K surviving kernels, v bytes a weight:

    offset   uint32 [Co + 1]      first kernel of each reordered filter                             4 (Co + 1)
    reorder  uint16 [Co]          original filter of each reordered one                             2 Co
    index    uint16 [K]           input channel of each kernel                                      2 K
    stride   uint16 [Co, P + 1]   kernels of the filter before each pattern; the last is its length 2 Co (P + 1)
    weight   [K, e]               the weights of each kernel, taps ascending                        v e K

The patterns, which a network shares, are `meta["patterns"]`, P lists of taps. A pattern of all taps stores kernels that
are kept whole, so connectivity alone (1x1 too) is stored as well.

Source: W. Niu et al., "PatDNN: Achieving Real-Time DNN Execution on Mobile Devices with Pattern-based Weight Pruning",
2020, filter kernel reorder and FKW; the widths of the integers are ours.
"""

import math
from typing import Any

import numpy as np

from compressx.formats.base import Format, Packed, check_offsets, check_range, dtype_of, fail, only, take
from compressx.formats.parts import check_shape, entries, fits, part
from compressx.formats.weight import Bytes, Weight

MAX_PATTERNS = 255
_TAPS = 62  # of a kernel, so that a support is an integer
_MOST = 65_535  # input channels, filters: what uint16 counts


def kernel_array(w: np.ndarray) -> np.ndarray:
    """`[kh, kw, cin, cout] -> [cout, cin, kh*kw]`, filters first."""
    return np.ascontiguousarray(w.reshape(-1, *w.shape[2:]).transpose(2, 1, 0))


def reorder_filters(ids: np.ndarray) -> np.ndarray:
    """The order of filters: by falling length, then a greedy chain in which each is the most similar of those left.

    Args:
      ids: int `[cout, cin]`, the pattern of every kernel, below 0 where it is zero.

    Returns:
      int64 `[cout]`: the original filter at each place. A chain starts at its first filter; ties go to the lower one.
    """
    length = (ids >= 0).sum(axis=1)
    order: list[int] = []
    for size in np.unique(length)[::-1]:
        left = np.flatnonzero(length == size)
        order.append(int(left[0]))
        left = left[1:]
        while left.size:
            last = ids[order[-1]]
            alive = np.flatnonzero(last >= 0)
            same = (ids[left[:, None], alive] == last[alive]).sum(axis=1)
            best = int(np.argmax(same))
            order.append(int(left[best]))
            left = np.delete(left, best)
    return np.array(order, np.int64)


def _supports_of(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct supports of kernels `[n, taps]`: as rows, how often each occurs, and which each kernel has."""
    code = np.zeros(len(mask), np.int64)
    for tap in range(mask.shape[1]):
        code |= mask[:, tap].astype(np.int64) << tap
    _, first, which, number = np.unique(code, return_index=True, return_inverse=True, return_counts=True)
    return mask[first], number, which.reshape(-1)


def patterns_of(mask: np.ndarray) -> np.ndarray:
    """The patterns that occur, of as many taps as the fullest kernel keeps: bool `[P, taps]`, commonest first.

    Args:
      mask: bool `[n, taps]`, where kernels are non-zero.
    """
    distinct, number, _ = _supports_of(mask)
    return _commonest(distinct, number)


def _commonest(distinct: np.ndarray, number: np.ndarray) -> np.ndarray:
    taps = distinct.sum(axis=1)
    full = taps == taps.max()
    return distinct[full][np.argsort(-number[full], kind="stable")]


def assign_patterns(mask: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """The first pattern that covers every kernel; ValueError where none does.

    Args:
      mask: bool `[cout, cin, taps]`, where kernels are non-zero.
      patterns: bool `[P, taps]`.

    Returns:
      int16 `[cout, cin]`, -1 for a kernel that is all zero.
    """
    distinct, _, which = _supports_of(mask.reshape(-1, mask.shape[2]))
    covered = _covered(distinct, patterns)
    lost = np.flatnonzero(distinct.any(axis=1) & ~covered.any(axis=1))
    if lost.size:
        o, i = divmod(int(np.flatnonzero(which == lost[0])[0]), mask.shape[1])
        taps = np.flatnonzero(distinct[lost[0]]).tolist()
        raise ValueError(f"kernel (cin={i}, cout={o}) keeps taps {taps}, and no pattern has them all")
    ids = np.where(distinct.any(axis=1), np.argmax(covered, axis=1), -1).astype(np.int16)
    return ids[which].reshape(mask.shape[:2])


def _covered(distinct: np.ndarray, patterns: np.ndarray) -> np.ndarray:
    """Which pattern has all taps of which support: bool `[supports, P]`."""
    covered: np.ndarray = ~(distinct[:, None] & ~patterns[None]).any(axis=2)
    return covered


def _supports(w: np.ndarray, constraint: Any) -> bool | str:
    del constraint
    reason = fits(w, 4)
    if reason is not True:
        return reason
    if w.ndim > 4 or w.shape[0] * w.shape[1] > _TAPS or max(w.shape[2:]) > _MOST:
        return f"needs [kh, kw, cin, cout] of at most {_TAPS} taps and {_MOST} channels and filters, got {w.shape}"
    return True


def _patterns_for(weight: Weight, distinct: np.ndarray, number: np.ndarray) -> np.ndarray:
    """The patterns that a weight is stored with: the constraint's where it has them, or those that occur."""
    found = part(weight.constraint, weight.structure, ("pattern", "pattern_connectivity"))
    if found is not None and found[1] is not None and len(found[1].masks):
        patterns = np.asarray(found[1].masks)[np.asarray(found[1].live)]
    else:
        patterns = _commonest(distinct, number)
        if not patterns.any():
            raise ValueError("no kernel is alive, so there is no pattern")
    if len(patterns) > MAX_PATTERNS:
        raise ValueError(f"{len(patterns)} patterns; the format holds {MAX_PATTERNS}")
    return patterns


def _size(weight: Weight) -> Bytes:
    kernels = weight.support.mask.reshape(-1, math.prod(weight.w.shape[2:])).T
    distinct, number, _ = _supports_of(kernels)
    patterns = _patterns_for(weight, distinct, number)
    live = np.logical_or.reduce(distinct, axis=1)
    if (live & ~np.logical_or.reduce(_covered(distinct, patterns), axis=1)).any():
        raise ValueError("a kernel that no pattern covers")
    filters, alive = weight.w.shape[3], int(number[live].sum())
    index = 4 * (filters + 1) + 2 * filters + 2 * alive + 2 * filters * (len(patterns) + 1)
    return Bytes(index, alive * int(patterns[0].sum()))


def _pack(weight: Weight) -> Packed:
    w = weight.w
    x, mask = kernel_array(w), kernel_array(weight.support.mask)
    distinct, number, _ = _supports_of(mask.reshape(-1, mask.shape[2]))
    patterns = _patterns_for(weight, distinct, number)
    ids = assign_patterns(mask, patterns)
    order = reorder_filters(ids)
    x, ids = x[order], ids[order]
    # (filter, pattern, channel) order: a stable sort of the live kernels by filter and pattern
    filters, channels = np.nonzero(ids >= 0)
    used = ids[filters, channels]
    sort = np.lexsort((channels, used, filters))
    filters, channels, used = filters[sort], channels[sort], used[sort]
    counts = np.zeros((len(order), len(patterns)), np.int64)
    np.add.at(counts, (filters, used), 1)
    stride = np.concatenate([np.zeros((len(order), 1), np.int64), np.cumsum(counts, axis=1)], axis=1)
    taps = [np.flatnonzero(p).tolist() for p in patterns]
    arrays: dict[str, np.ndarray] = {
        "offset": np.concatenate([[0], np.cumsum(counts.sum(axis=1))]).astype(np.uint32),
        "reorder": order.astype(np.uint16),
        "index": channels.astype(np.uint16),
        "stride": stride.astype(np.uint16),
        "weight": np.take_along_axis(x[filters, channels], np.array(taps)[used], axis=1),
    }
    return Packed("fkw", w.shape, w.dtype.name, arrays, {"patterns": taps})


def _patterns(packed: Packed, taps: int) -> np.ndarray:
    """The patterns of the meta, checked: int64 `[P, e]`."""
    listed = packed.meta.get("patterns")
    entry = "fkw/patterns"
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_PATTERNS:
        fail(entry, f"not a list of 1..{MAX_PATTERNS} patterns")
    for pattern in listed:
        if not isinstance(pattern, list) or not pattern or len(pattern) != len(listed[0]):
            fail(entry, f"{str(pattern)[:80]} is not a list of taps as long as the others")
        if not all(type(t) is int for t in pattern) or any(
            a >= b for a, b in zip([-1, *pattern], pattern, strict=False)
        ):
            fail(entry, f"{str(pattern)[:80]} does not ascend from 0")
        if pattern[-1] >= taps:
            fail(entry, f"{str(pattern)[:80]} leaves the {taps} taps of shape {list(packed.shape)}")
    return np.array(listed, np.int64)


def _unpack(packed: Packed) -> np.ndarray:
    only(packed, "offset", "reorder", "index", "stride", "weight")
    check_shape(packed, 4)
    if len(packed.shape) != 4 or packed.shape[0] * packed.shape[1] > _TAPS or max(packed.shape[2:]) > _MOST:
        fail("fkw", f"shape {list(packed.shape)} is not that of a convolution that the format holds")
    kh, kw, cin, cout = packed.shape
    patterns = _patterns(packed, kh * kw)
    index = take(packed, "index", "uint16", (None,))
    weight = take(packed, "weight", dtype_of(packed).name, (index.size, patterns.shape[1]))
    offset = take(packed, "offset", "uint32", (cout + 1,))
    check_offsets("fkw/offset", offset, index.size)
    reorder = take(packed, "reorder", "uint16", (cout,))
    if not np.array_equal(np.sort(reorder), np.arange(cout)):
        fail("fkw/reorder", f"is not a permutation of the {cout} filters")
    stride = take(packed, "stride", "uint16", (cout, len(patterns) + 1))
    full = np.array_equal(stride[:, -1], np.diff(offset.astype(np.int64)))
    if stride[:, 0].any() or (stride[:, 1:] < stride[:, :-1]).any() or not full:
        fail("fkw/stride", "rows do not ascend from 0 to the filter's number of kernels")
    check_range("fkw/index", index, cin)

    def lengths(part: slice) -> np.ndarray:
        """Kernels of each filter with each pattern."""
        filters, used = np.divmod(np.arange(part.start, part.stop), len(patterns))
        return stride[filters, used + 1].astype(np.int64) - stride[filters, used]

    x = np.zeros((kh * kw, cin, cout), dtype_of(packed))
    seen = np.zeros((cin, cout), bool)
    read = 0
    for row, _ in entries(lengths, cout * len(patterns)):
        place, used = np.divmod(row, len(patterns))
        piece = slice(read, read := read + row.size)
        kernel = index[piece, None], reorder[place, None]
        seen[kernel] = True
        x[patterns[used], *kernel] = weight[piece]
    if np.count_nonzero(seen) != index.size:
        fail("fkw/index", "a filter has an input channel twice")
    return x.reshape(packed.shape)


FKW = Format("fkw", _supports, _size, _pack, _unpack)
