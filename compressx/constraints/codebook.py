"""Codebooks: which entry is nearest to a magnitude, and the entries that k-means finds."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from compressx.constraints.floats import bits as bits_of
from compressx.constraints.floats import exponent, lift, scale

_LLOYD = 40  # of k-means, on the sorted sample
_SAMPLE = 2**18  # weights of a leaf that k-means sorts


def spread(scale: Array, ndim: int) -> Array:
    """A scale of shape [] or [cout], ready to broadcast against a weight."""
    return scale if scale.ndim == 0 else scale.reshape((1,) * (ndim - 1) + scale.shape)


def nearest_entry(x: Array, codebook: Array, zero_level: bool) -> Array:
    """1 + how many midpoints of the ascending codebook lie below |x|: the nearest entry, ties to the smaller."""

    def half_way(low: Array, high: Array) -> Array:
        top = exponent(high, ())
        low, high = lift(low, -top), lift(high, -top)
        return bits_of(scale(low + (high - low) / 2, top))

    magnitude = bits_of(x)
    # between neighbouring floats the midpoint may round up to the higher entry
    middle = jnp.minimum(half_way(codebook[:-1], codebook[1:]), jnp.maximum(bits_of(codebook[1:]), 1) - 1)
    k = jnp.ones(x.shape, jnp.int32)
    for m in middle:
        k = k + (magnitude > spread(m, x.ndim)).astype(jnp.int32)
    first = half_way(jnp.zeros_like(codebook[0]), codebook[0])
    return jnp.where(magnitude > spread(first, x.ndim), k, 0) if zero_level else k


def means(x: Array, at: Array, centres: Array) -> Array:
    """The mean of x over each cluster `at` (below 0: none), exact where all are equal; empty ones keep their centre."""
    size = centres.shape[0]
    at = jnp.where(at < 0, size, at)
    number = jax.ops.segment_sum(jnp.ones_like(x), at, size + 1)[:size]
    top = jax.ops.segment_max(exponent(x, ()), at, size + 1)
    top = jnp.where(number > 0, top[:size], 0)
    x = lift(x, -top[jnp.minimum(at, size - 1)])  # to about 1 in each cluster
    peak = jnp.where(number > 0, jax.ops.segment_max(x, at, size + 1)[:size], 0.0)
    below = jax.ops.segment_sum(x - peak[jnp.minimum(at, size - 1)], at, size + 1)[:size]
    return jnp.where(number > 0, scale(peak + below / jnp.maximum(number, 1.0), top), centres)


def k_means(x: Array, count: int) -> Array:
    """`count` ascending centres of the magnitudes x `[n]`, zeros left out; all that occur, where they are that few."""

    whole = bits_of(x)
    none = jnp.asarray(jnp.iinfo(whole.dtype).max, whole.dtype)

    def next_distinct(last: Array, _: None) -> tuple[Array, Array]:
        last = jnp.min(jnp.where(whole > last, whole, none), initial=none)
        return last, last

    last, distinct = lax.scan(next_distinct, jnp.zeros((), whole.dtype), None, length=count)
    distinct = jnp.where(distinct == none, jnp.max(whole, initial=0), distinct)
    distinct = jnp.where(distinct > 0, lax.bitcast_convert_type(distinct, x.dtype), 1.0)

    def cluster() -> Array:
        power = exponent(x)
        return scale(around(lift(x, -power), lift(distinct[0], -power)), power)

    def around(x: Array, lowest: Array) -> Array:
        stride = max(1, x.size // _SAMPLE) | 1
        y = jnp.sort(x[::stride] if x.size > _SAMPLE else x)
        number = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum((y > 0).astype(jnp.int32))])
        total = jnp.concatenate([jnp.zeros(1, y.dtype), jnp.cumsum(y)])
        ends = jnp.asarray([0, y.size], jnp.int32)

        def lloyd(_: int, c: Array) -> Array:
            cut = jnp.searchsorted(y, (c[:-1] + c[1:]) / 2, side="right").astype(jnp.int32)
            cut = jnp.concatenate([ends[:1], cut, ends[1:]])
            members = jnp.diff(number[cut])
            mean = jnp.diff(total[cut]) / jnp.maximum(members, 1).astype(y.dtype)
            return jnp.sort(jnp.where(members > 0, mean, c))

        c = lowest + (jnp.max(x) - lowest) * (jnp.arange(count, dtype=x.dtype) + 0.5) / count
        c = lax.fori_loop(0, _LLOYD, lloyd, c)
        for _ in range(2):
            at = jnp.where(x > 0, nearest_entry(x, c, False) - 1, -1)
            c = jnp.sort(means(x, at, c))
        # the last bits of a mean depend on the order of summation; nothing else should
        return lax.reduce_precision(c, jnp.finfo(c.dtype).nexp, jnp.finfo(c.dtype).nmant - 7)

    return lax.cond(jnp.any(whole > last), cluster, lambda: distinct)


__all__ = ["k_means", "means", "nearest_entry", "spread"]
