"""Bit planes packed into words, for products by AND and population count: 32 entries of a column a word."""

from math import ceil

import jax.numpy as jnp
from jax import Array

WORD = 32


def pack(x: Array, bits: int) -> Array:
    """The lowest bits of integers as words, lowest plane first: int32 `[k, m] -> uint32 [bits, ceil(k/32), m]`.

    Entry r of a column is bit r % 32 of word r // 32; the last word is filled with zeros. Entries that share a word lie
    along the first axis, so that the sum over them runs down vectors: along the last it took most of a product's time.
    """
    k, m = x.shape
    words = ceil(k / WORD)
    padded = jnp.pad(x, ((0, words * WORD - k), (0, 0))).astype(jnp.uint32).reshape(words, WORD, m)
    planes = jnp.arange(bits, dtype=jnp.uint32).reshape(-1, 1, 1, 1)
    places = jnp.arange(WORD, dtype=jnp.uint32).reshape(1, 1, -1, 1)
    return jnp.sum(((padded[None] >> planes) & 1) << places, axis=2, dtype=jnp.uint32)
