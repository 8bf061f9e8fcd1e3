"""Exact selection: the k largest of many scores, by search on the bits of the scores instead of a sort.

The bits of a non-negative IEEE number, read as an unsigned integer, are ordered as the number is. So the k-th largest
score is found one or two bits at a time, each by counting how many scores reach a candidate: passes that only count.
Counting shards (all-reduces of single integers; no score leaves its device), needs no second copy, and is exact.
Ties go to the lower index.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from compressx.constraints import floats

_UNROLL = 2**20  # elements from which the passes are unrolled
PEAK = 40  # energies are those of weights whose largest lies below 2**PEAK: 2**47 squares of them can be added
_WIDE = 16  # counts are compared in two limbs of this many bits, so that their total may pass 2**31


def _reaches(counts: Sequence[Array], k: int) -> Array:
    """Whether the counts (int32) sum to at least k, exactly, also where the sum passes 2**31."""
    if len(counts) == 1:
        return counts[0] >= k
    low = sum((c & (2**_WIDE - 1) for c in counts[1:]), counts[0] & (2**_WIDE - 1))
    high = sum((c >> _WIDE for c in counts[1:]), counts[0] >> _WIDE)
    high, low = high + (low >> _WIDE), low & (2**_WIDE - 1)
    want_high, want_low = k >> _WIDE, k & (2**_WIDE - 1)
    return (high > want_high) | ((high == want_high) & (low >= want_low))


def _counts(bits: Array, candidates: Sequence[Array], axis: int | None) -> tuple[Array, ...]:
    """How many entries reach each candidate (int32), of the whole array or of every line along `axis`, dims kept.

    XLA's CPU backend computes a reduction of several operands along the last axis in vectors, and one of a single
    operand element by element: three counts take a quarter of the time of one. Over several devices it would gather
    the partial counts of every line, so it is for programs that are lowered for a CPU that is alone: a program may be
    compiled here for other machines.
    """
    at = bits.ndim - 1

    def apart(bits: Array, *candidates: Array) -> tuple[Array, ...]:
        return tuple(jnp.sum(bits >= c, axis=axis, keepdims=axis is not None, dtype=jnp.int32) for c in candidates)

    def together(bits: Array, *candidates: Array) -> tuple[Array, ...]:
        flags, zeros = [(bits >= c).astype(jnp.int32) for c in candidates], [jnp.zeros((), jnp.int32)] * len(candidates)
        lines = lax.reduce(flags, zeros, lambda a, b: [x + y for x, y in zip(a, b, strict=True)], (at,))
        return tuple(jnp.sum(n) if axis is None else jnp.expand_dims(n, at) for n in lines)

    if _alone() and bits.ndim and axis in (None, at):
        found: tuple[Array, ...] = lax.platform_dependent(bits, *candidates, cpu=together, default=apart)
        return found
    return apart(bits, *candidates)


def _alone() -> bool:
    """True on one CPU device."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1


def _threshold(bits: Sequence[Array], k: int | Array, axis: int | None) -> Array:
    """The k-th largest of the ordered bits (over all arrays, or along `axis` of the only one), dims kept."""
    dtype = bits[0].dtype
    axis = None if axis is None else axis % bits[0].ndim
    each = 2 if axis in (None, bits[0].ndim - 1) else 1  # bits found in a pass
    passes = jnp.iinfo(dtype).bits // each

    def body(i: Array, t: Array) -> Array:
        shift = jnp.asarray(each * (passes - 1 - i), dtype)
        candidates = [t | (jnp.asarray(n, dtype) << shift) for n in range(1, 2**each)]
        counts = zip(*(_counts(b, candidates, axis) for b in bits), strict=True)
        # more bits reach fewer scores, so the candidates that are reached come first: how many they are is the digit
        digit = [(_reaches(n, int(k)) if axis is None else n[0] >= k).astype(dtype) for n in counts]
        return t | (sum(digit[1:], digit[0]) << shift)

    shape = () if axis is None else tuple(1 if a == axis else n for a, n in enumerate(bits[0].shape))

    def looped() -> Array:
        return lax.fori_loop(0, passes, body, jnp.zeros(shape, dtype))

    def unrolled() -> Array:
        found = jnp.zeros(shape, dtype)
        for i in range(passes):
            found = body(jnp.asarray(i, jnp.int32), found)
        return found

    # Inside a loop XLA's CPU backend counts on one thread: large leaves are worth the longer program, there alone.
    if sum(b.size for b in bits) < _UNROLL:
        return looped()
    found: Array = lax.platform_dependent(cpu=unrolled, default=looped)
    return found


def _flat_index(shape: tuple[int, ...], axis: int | None) -> Array:
    """Position of every element, flat or along one axis, without reshaping (a reshape would gather a sharded leaf)."""
    if axis is not None:
        return lax.broadcasted_iota(jnp.uint32, shape, axis % len(shape))
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for a in reversed(range(len(shape))):
        index = index + lax.broadcasted_iota(jnp.uint32, shape, a) * jnp.uint32(stride)
        stride *= shape[a]
    return index


def _first(flags: Array, need: Array, axis: int | None) -> Array:
    """The first `need` true flags by index, by search on the index."""
    index = _flat_index(flags.shape, axis)
    size = flags.size if axis is None else flags.shape[axis]

    def body(i: Array, last: Array) -> Array:
        candidate = last | (jnp.ones((), jnp.uint32) << jnp.asarray(steps - 1 - i, jnp.uint32))
        before = jnp.sum(flags & (index < candidate), axis=axis, keepdims=axis is not None, dtype=jnp.int32)
        return jnp.where(before <= need, candidate, last)

    # the largest `last` such that at most `need` flags lie before it
    steps = max(1, int(size).bit_length())
    last = lax.fori_loop(0, steps, body, jnp.zeros(need.shape, jnp.uint32))
    return flags & (index < last)


def top_k_masks(scores: Sequence[Array], k: int) -> list[Array]:
    """Masks that keep exactly the k largest scores over several arrays.

    Ties go to the earlier array, then to the lower index.

    Args:
      scores: non-negative arrays of any shapes, one floating dtype (signs are ignored).
      k: how many to keep, between 0 and the total size.

    Returns:
      Boolean masks of the arrays' shapes with k true entries in all.

    Raises:
      ValueError: k is negative or above the total size.

    Example:
      >>> [m.tolist() for m in compressx.top_k_masks([jnp.asarray([3.0, 1.0]), jnp.asarray([2.0])], 2)]
      [[True, False], [True]]
    """
    total = sum(s.size for s in scores)
    if not 0 <= k <= total:
        raise ValueError(f"cannot keep {k} of {total} entries")
    if k == 0 or k == total:
        return [jnp.full(s.shape, k > 0) for s in scores]
    live = [s for s in scores if s.size]
    bits = [floats.bits(s) for s in live]
    t = _threshold(bits, k, None)
    above = [jnp.sum(b > t, dtype=jnp.int32) for b in bits]
    level = [jnp.sum(b == t, dtype=jnp.int32) for b in bits]
    # k - sum(above) >= 1 ties are still to be taken; done limb by limb it would be exact for any k, and the difference
    # fits 32 bits because it is at most the number of ties of one search
    need = jnp.asarray(k % 2**32, jnp.uint32)
    for a in above:
        need = need - a.astype(jnp.uint32)
    masks = []
    for b, n in zip(bits, level, strict=True):
        n_u = n.astype(jnp.uint32)
        take = jnp.minimum(need, n_u)
        need = need - take
        tied = b == t
        chosen = lax.cond(take == n_u, lambda f, _: f, lambda f, m: _first(f, m.astype(jnp.int32), None), tied, take)
        masks.append((b > t) | chosen)
    out = iter(masks)
    return [next(out) if s.size else jnp.zeros(s.shape, bool) for s in scores]


def top_k_mask(scores: Array, k: int | Array, axis: int | None = None) -> Array:
    """The mask of the k largest scores, of the whole array or of every line along one axis; ties go to the lower index.

    Args:
      scores: non-negative array of any shape (signs are ignored), float.
      k: how many to keep. With an axis it may be an int32 array that broadcasts against the scores with that axis 1.
      axis: None for the whole array, else the axis along which lines are ranked apart.

    Returns:
      A boolean mask of the scores' shape.

    Raises:
      ValueError: an integer k is negative or above the number of entries.

    Example:
      >>> compressx.top_k_mask(jnp.asarray([3.0, 1.0, 2.0, 3.0]), 2).tolist()
      [True, False, False, True]
    """
    if axis is None:
        if not isinstance(k, int):
            raise ValueError("the whole-array selection needs an integer k")
        return top_k_masks([scores], k)[0]
    length = scores.shape[axis]
    if isinstance(k, int):
        if not 0 <= k <= length:
            raise ValueError(f"cannot keep {k} of {length} entries along axis {axis}")
        if k in (0, length) or scores.size == 0:
            return jnp.full(scores.shape, k > 0)
    if length <= 8:
        return _rank(scores, axis) < k
    bits = floats.bits(scores)
    t = _threshold([bits], k, axis)
    above, tied = bits > t, bits == t
    need = k - jnp.sum(above, axis=axis, keepdims=True, dtype=jnp.int32)
    exact = jnp.all(jnp.sum(tied, axis=axis, keepdims=True, dtype=jnp.int32) == need)
    chosen = lax.cond(exact, lambda f, _: f, lambda f, m: _first(f, m, axis), tied, need)
    return above | chosen


def _rank(scores: Array, axis: int) -> Array:
    """Rank of every score in its line (0 the largest), ties by index: all pairs compared, for short lines."""
    bits = jnp.moveaxis(floats.bits(scores), axis, -1)
    n = bits.shape[-1]
    rank = []
    for i in range(n):
        beats = [(bits[..., j] >= bits[..., i]) if j < i else (bits[..., j] > bits[..., i]) for j in range(n) if j != i]
        rank.append(sum((b.astype(jnp.int32) for b in beats), jnp.zeros(bits.shape[:-1], jnp.int32)))
    return jnp.moveaxis(jnp.stack(rank, -1), -1, axis)


def energies(leaves: Sequence[Array]) -> list[Array]:
    """Squares of the weights of several leaves, all times one power of two: what groups of weights are ranked by.

    The factor makes the largest weight of all about 2**40, so that no square leaves the range; it changes no order and
    no ratio. A weight other than 0 has at least the smallest normal number for its square, so that a sum of them is 0
    exactly where every weight is, however small they are.

    Returns:
      float32 arrays (float64 for float64 leaves) of the leaves' shapes.
    """
    top = functools.reduce(jnp.maximum, [floats.exponent(w) for w in leaves])

    def of(w: Array) -> Array:
        square = jnp.square(floats.lift(w, PEAK - top))
        return jnp.where(floats.nonzero(w), jnp.maximum(square, float(jnp.finfo(square.dtype).tiny)), 0.0)

    return [of(w) for w in leaves]


def energy(w: Array) -> Array:
    """`energies` of one leaf."""
    return energies([w])[0]


def squares(w: Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """Sums of `energy`: what the groups of one leaf are ranked by."""
    return jnp.sum(energy(w), axis=axis, keepdims=keepdims)


__all__ = ["energies", "energy", "squares", "top_k_mask", "top_k_masks"]
