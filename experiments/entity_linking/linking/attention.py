"""Attention of a mention's candidates over a set of vectors: text, chosen entities and in-link words share its form."""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

LOW = -1e30  # score of what is no candidate


def along(v: Array, x: Array) -> Array:
    """A vector `[d]` with leading axes, as many as x has."""
    return jnp.expand_dims(v, tuple(range(x.ndim - 1)))


class Coherence(NamedTuple):
    """Fit of candidates to a set of vectors: score `[B, T, n]`, and which members (`[B, T, K]`) had which weight."""

    score: Array
    member: Array
    weight: Array



def coherence(
    e: Array, mask: Array, pool: Array, pool_mask: Array, weights: Mapping[str, Array], keep: int, uniform: bool = False
) -> Coherence:
    """How well candidates fit a set of vectors, of which attention keeps the best few.

        u(s) = max over candidates e of e . (a * s);   beta = softmax of u over the `keep` largest;
        score(e) = e . (b * sum over s of beta(s) s)

    An empty set scores 0. Which members are kept is chosen without a gradient; ties go to the lower index.

    Args:
      e: candidate vectors float32 `[B, T, n, d]`.
      mask: which are candidates, bool `[B, T, n]`.
      pool: vectors `[B, S, d]`, among which lie the sets.
      pool_mask: who belongs to a mention's set, bool `[B, T, S]`.
      weights: `attend` a and `score` b, both `[d]`.
      keep: K, members kept.
      uniform: beta equal on the members kept ("mean").
    """
    fixed_e, a = lax.stop_gradient(e), lax.stop_gradient(weights["attend"])
    size = pool.shape[1]
    if keep < size:
        u = jnp.einsum("btnd,bsd->btns", fixed_e * along(a, e), lax.stop_gradient(pool))
        u = jnp.max(jnp.where(mask[..., None], u, LOW), axis=2)
        _, member = lax.top_k(jnp.where(pool_mask, u, 2 * LOW), keep)
        kept = jnp.take_along_axis(pool_mask, member, axis=2)
        s = jax.vmap(lambda p, m: p[m])(pool, member)
        near = "btnd,btkd->btnk"
    else:
        member = jnp.broadcast_to(jnp.arange(size, dtype=jnp.int32), pool_mask.shape)
        kept, s, near = pool_mask, pool, "btnd,bkd->btnk"
    if uniform:
        weight = kept.astype(jnp.float32)
    else:
        u = jnp.max(jnp.where(mask[..., None], jnp.einsum(near, e * along(weights["attend"], e), s), LOW), axis=2)
        u = jnp.where(kept, u, LOW)
        weight = jnp.where(kept, jnp.exp(u - lax.stop_gradient(jnp.max(u, axis=-1, keepdims=True))), 0.0)
    total = jnp.sum(weight, axis=-1, keepdims=True)
    weight = weight / jnp.where(total > 0, total, 1.0)
    mixed = jnp.einsum("btk,btkd->btd" if s.ndim == 4 else "btk,bkd->btd", weight, s)
    score = jnp.einsum("btnd,btd->btn", e, along(weights["score"], mixed) * mixed)
    return Coherence(jnp.where(mask, score, 0.0), member, weight)
