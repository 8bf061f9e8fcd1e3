"""How a network uses a pattern library: how often each mask, how evenly, in which shapes, and how many kernels change.

What a library extraction has to report, round by round and in the end. All of it runs on the host, on concrete arrays.

Source: X. Ma et al., "An Image Enhancing Pattern-based Sparsity for Real-time Inference on Mobile Devices", 2020.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compressx import views
from compressx.constraints import library as lib
from compressx.constraints.pattern import Patterns, assign
from compressx.constraints.select import energy

TOP = (4, 8, 12)  # prefixes whose coverage is reported


class Use(NamedTuple):
    """Use of a library.

    Attributes:
      masks: kept taps of the patterns that may be used, the most used first; ties in the library's order.
      counts: kernels whose nearest pattern each is.
      entropy: of the counts, in bits.
      coverage: k -> share of the kernels on the k most used, k of `TOP`.
    """

    masks: list[list[int]]
    counts: list[int]
    entropy: float
    coverage: dict[int, float]


def use_of(leaves: Sequence[Any], masks: Any, live: Any = None) -> Use:
    """How often the kernels of some weights have each pattern as their nearest; all-zero kernels count for none.

    Args:
      leaves: convolution weights `[kh, kw, cin, cout]`.
      masks: bool `[K, kh*kw]`.
      live: bool `[K]`, the patterns that may be used; None: all.
    """
    masks = np.asarray(masks)
    alive = np.ones(len(masks), bool) if live is None else np.asarray(live)
    energies = [energy(views.kernels().to(jnp.asarray(w))) for w in leaves]
    counts = np.asarray(lib.use(energies, jnp.asarray(masks), jnp.asarray(alive)))
    order = [i for i in np.argsort(-counts, kind="stable") if alive[i]]
    kept = counts[order]
    coverage = {k: lib.coverage(kept, k) for k in TOP}
    return Use(lib.to_taps(masks[order]), kept.tolist(), lib.entropy(kept), coverage)


def shape_shares(w: Any, structure: Patterns) -> dict[str, float]:
    """Shares of a 3x3 weight's live kernels on 2x2 blocks with the centre, a plus less an arm, and other masks."""
    kinds = {"gaussian": lib.NAMED["elog"][:4], "plus": lib.NAMED["scp"]}
    of = {tuple(taps): kind for kind, group in kinds.items() for taps in group}
    names = [of.get(tuple(taps), "other") for taps in lib.to_taps(structure.masks)]
    ids = np.asarray(assign(jnp.asarray(w), structure)).ravel()
    counts = np.bincount(ids[ids >= 0], minlength=len(names))
    total = max(1, int(counts.sum()))
    return {k: sum(int(c) for c, n in zip(counts, names, strict=True) if n == k) / total for k in (*kinds, "other")}


def changed(before: Sequence[Any], after: Sequence[Any], structure: Patterns) -> float:
    """Share of the kernels, live before and after, whose nearest pattern is another one now (0 where none are)."""
    moved = total = 0
    for a, b in zip(before, after, strict=True):
        ids = [np.asarray(assign(jnp.asarray(w), structure)) for w in (a, b)]
        both = (ids[0] >= 0) & (ids[1] >= 0)
        moved, total = moved + int((ids[0] != ids[1])[both].sum()), total + int(both.sum())
    return moved / max(1, total)


def published(masks: Sequence[Sequence[int]]) -> int:
    """How many of these masks the paper's authors released: `library.NAMED["group"]`, 12 of 4 taps in 3x3."""
    return len({tuple(m) for m in masks} & set(lib.NAMED["group"]))
