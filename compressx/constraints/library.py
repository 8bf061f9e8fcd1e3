"""Pattern libraries: the masks that a convolution kernel may keep, how often a network uses them, and which to choose.

A pattern is a set of taps of a kernel, tap t = i * kw + j (the centre of a 3x3 kernel is tap 4), written as the list of
kept taps or as a boolean row `[kh*kw]`. A library is a list of patterns. Three kinds are kept apart, because the papers
mix them: *natural* patterns keep the centre (56 of 4 entries in 3x3), *all* patterns need not (126), and the named
libraries are fixed lists.

Sources: W. Niu et al., "PatDNN: Achieving Real-Time DNN Execution on Mobile Devices with Pattern-based Weight Pruning",
2020 (natural patterns, selection by frequency); X. Ma et al., "PCONV: The Missing but Desirable Sparsity in DNN Weight
Pruning for Real-time Execution on Mobile Devices", 2020 (SCP); X. Ma et al., "An Image Enhancing Pattern-based Sparsity
for Real-time Inference on Mobile Devices", 2020 (library extraction).
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx import views
from compressx.constraints.select import energies
from compressx.tree import paths

Taps = Sequence[Sequence[int]]  # a library as lists of kept taps

_GAUSSIAN = ((4, 5, 7, 8), (3, 4, 6, 7), (1, 2, 4, 5), (0, 1, 3, 4))  # the 2x2 blocks that hold the centre
_SCP = ((1, 3, 4, 5), (3, 4, 5, 7), (1, 4, 5, 7), (1, 3, 4, 7))  # the plus sign with one arm removed

# Fixed libraries of 4-entry 3x3 patterns; a prefix of one is a library too.
#   scp    PCONV's four sparse convolution patterns.
#   elog   four Gaussian blocks, then the four patterns of scp.
#   group  the list that the image-enhancing pattern paper's authors released (prefixes of 4, 8 and 12 are used); its
#          patterns 5, 10 and 11 do not hold the centre.
NAMED: dict[str, tuple[tuple[int, ...], ...]] = {
    "scp": _SCP,
    "elog": (*_GAUSSIAN, *_SCP),
    "group": (*_GAUSSIAN, (5, 6, 7, 8), *_SCP[1:], (0, 1, 2, 4), (3, 6, 7, 8), (0, 1, 2, 3), (3, 4, 7, 8)),
}

MAX_TAPS = 1024  # of a kernel
MAX_MASKS = 4096  # patterns that are enumerated; kernels of 5x5 have 2024 natural ones of 4 entries, and 12650 in all
_CHUNK = 2**21  # (kernel, pattern) pairs whose energies are held together


def enumerate_masks(entries: int = 4, kernel: tuple[int, int] = (3, 3), natural: bool = False) -> np.ndarray:
    """All patterns of so many taps, bool `[K, kh*kw]`, in lexicographic order of the kept taps.

    Row r of the 126 patterns of 4 of 9 taps is rank 126 - r of the papers' public code, which orders the pruned taps.

    Args:
      entries: taps a pattern keeps.
      kernel: `(kh, kw)`.
      natural: only those that keep the centre.

    Raises:
      ValueError: entries is impossible, the kernel has no centre, or there are more than `MAX_MASKS` patterns.
    """
    taps = check_kernel(entries, kernel, natural)
    total = math.comb(taps - natural, entries - natural)
    if total > MAX_MASKS:
        raise ValueError(
            f"{kernel[0]}x{kernel[1]} kernels have {total} patterns of {entries} taps, too many to try each; choose a "
            'library with select_library(...) and give it as a list, or use library="free"'
        )
    others = [t for t in range(taps) if not (natural and t == taps // 2)]
    masks = np.zeros((total, taps), bool)
    masks[:, taps // 2] = natural
    masks[np.arange(total)[:, None], np.array(list(itertools.combinations(others, entries - natural)), int)] = True
    return masks


def check_kernel(entries: int, kernel: tuple[int, int], natural: bool = False) -> int:
    """The number of taps; ValueError where patterns of so many entries make no sense."""
    taps = kernel[0] * kernel[1]
    if taps > MAX_TAPS:
        raise ValueError(f"kernels of {kernel[0]}x{kernel[1]} are too large for patterns: at most {MAX_TAPS} taps")
    if min(kernel) < 1 or taps == 1:
        raise ValueError(
            f"a {kernel[0]}x{kernel[1]} kernel has no patterns: there is one weight to keep; prune whole kernels of "
            "such layers with connectivity(...)"
        )
    if not 1 <= entries < taps:
        raise ValueError(
            f"entries={entries} is impossible; a pattern of {kernel[0]}x{kernel[1]} keeps 1..{taps - 1} taps"
        )
    if natural and not (kernel[0] % 2 and kernel[1] % 2):
        raise ValueError(f"natural patterns keep the centre, and a {kernel[0]}x{kernel[1]} kernel has none")
    return taps


def to_masks(patterns: Taps, entries: int, kernel: tuple[int, int]) -> np.ndarray:
    """Lists of kept taps as boolean rows `[K, kh*kw]`; ValueError naming the pattern that does not fit."""
    taps = check_kernel(entries, kernel)
    if len(patterns) > MAX_MASKS:
        raise ValueError(f"a library has at most {MAX_MASKS} patterns, got {len(patterns)}")
    seen: set[tuple[int, ...]] = set()
    masks = np.zeros((len(patterns), taps), bool)
    for row, pattern in zip(masks, patterns, strict=True):
        kept = tuple(sorted(set(pattern)))
        if not len(kept) == len(pattern) == entries or not (0 <= kept[0] and kept[-1] < taps):
            raise ValueError(
                f"pattern {list(pattern)} is not {entries} different taps of 0..{taps - 1} "
                f"({kernel[0]}x{kernel[1]} kernels)"
            )
        if kept in seen:
            raise ValueError(f"pattern {list(pattern)} is in the library twice")
        seen.add(kept)
        row[list(kept)] = True
    if not len(masks):
        raise ValueError("a pattern library cannot be empty")
    return masks


def to_taps(masks: np.ndarray) -> list[list[int]]:
    """Boolean rows as lists of kept taps, the form in which a library goes into a spec or a file."""
    return [np.flatnonzero(row).tolist() for row in np.asarray(masks)]


def nearest(energies: Array, masks: Array, live: Array) -> Array:
    """The pattern of every kernel: the p with the least energy outside it, argmax_p ||W o p||; ties to the lower id.

    What is lost is compared, not what is kept: it is 0 exactly where a pattern covers a kernel, so that a kernel that
    already lies in the set never moves.

    Args:
      energies: squares of the kernels' weights, `[..., taps]`.
      masks: bool `[K, taps]`.
      live: bool `[K]`, the patterns that may be used; at least one.

    Returns:
      int32 `[...]`, in 0..K-1.
    """
    outside = jnp.where(masks, 0.0, 1.0).astype(energies.dtype)

    def one(e: Array) -> Array:
        lost = jnp.matmul(outside, e, precision=lax.Precision.HIGHEST)
        return jnp.argmin(jnp.where(live, lost, jnp.inf)).astype(jnp.int32)

    flat = energies.reshape(-1, energies.shape[-1])
    batch = max(1, _CHUNK // masks.shape[0])
    ids = jax.vmap(one)(flat) if flat.shape[0] <= batch else lax.map(one, flat, batch_size=batch)
    return ids.reshape(energies.shape[:-1])


def use(energies: Sequence[Array], masks: Array, live: Array) -> Array:
    """How many kernels, over several layers, have each pattern as their nearest, int32 `[K]`; all-zero kernels none."""
    counts = jnp.zeros(masks.shape[0], jnp.int32)
    for e in energies:
        counts = counts.at[nearest(e, masks, live)].add(jnp.any(e > 0, axis=-1).astype(jnp.int32))
    return counts


def cover(energies: Sequence[Array], masks: Array, k: int) -> Array:
    """k patterns that cover all kernels, found in turn, where that finds them: int32 `[k]`, positions in the library.

    A kernel with fewer non-zeros than a pattern has taps is covered by several of them, n of all. Each turn takes the
    pattern of largest sum of n**-4 over the kernels that it covers and none before does: those with little choice
    decide. (A least cover is a hard problem: of 360 that exist this found 348, the number of kernels alone 118.)

    Args:
      energies: of the kernels of several layers, `[..., taps]`.
      masks: bool `[K, taps]`; among equals the first is taken.
      k: how many to take.
    """
    outside = jnp.where(masks, 0.0, 1.0).T
    flat = jnp.concatenate([e.reshape(-1, e.shape[-1]) > 0 for e in energies])
    batch = max(1, min(_CHUNK // masks.shape[0], flat.shape[0]))  # kernels together, here a row of `supports`
    rows = -(-flat.shape[0] // batch)
    supports = jnp.pad(flat, ((0, rows * batch - flat.shape[0]), (0, 0))).reshape(rows, batch, -1).astype(jnp.float32)

    def covers(support: Array, hidden: Array) -> Array:
        return jnp.matmul(support, hidden, precision=lax.Precision.HIGHEST) == 0

    number = lax.map(lambda s: jnp.sum(covers(s, outside), axis=1, dtype=jnp.int32), supports)
    weight = jnp.where(number > 0, jnp.maximum(number, 1).astype(jnp.float32) ** -4, 0.0)

    def take(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        places, left = state
        worth, _ = lax.scan(
            lambda sum, x: (sum + x[1] @ covers(x[0], outside).astype(jnp.float32), None),
            jnp.zeros(masks.shape[0], jnp.float32),
            (supports, left),
        )
        best = jnp.argmax(worth.at[places].set(-1.0, mode="drop")).astype(jnp.int32)
        return places.at[i].set(best), jnp.where(covers(supports, outside[:, best]), 0.0, left)

    return lax.fori_loop(0, k, take, (jnp.full(k, masks.shape[0], jnp.int32), weight))[0]


def histogram(w: Any, masks: np.ndarray, kernel: tuple[int, int] = (3, 3)) -> Array:
    """How many kernels have each pattern as their nearest; all-zero kernels count for none.

    Args:
      w: one convolution weight `[kh, kw, cin, cout]` or several in any pytree.
      masks: bool `[K, kh*kw]`, e.g. `enumerate_masks(natural=True)`.
      kernel: `(kh, kw)`, which all of the weights must have.

    Returns:
      int32 `[K]`, summing to the number of kernels that are not all zero.
    """
    view = views.kernels()
    for leaf in jax.tree.leaves(w):
        check_leaf(leaf.shape, kernel)
    each = energies([view.to(leaf) for leaf in jax.tree.leaves(w)])
    return use(each, jnp.asarray(masks), jnp.ones(len(masks), bool))


def check_leaf(shape: tuple[int, ...], kernel: tuple[int, int]) -> None:
    """Raises ValueError unless the shape is that of a convolution with such kernels."""
    if len(shape) != 4:
        raise ValueError(f"patterns need a convolution weight [kh, kw, cin, cout], got shape {shape}")
    if shape[:2] != tuple(kernel):
        hint = (
            "; 1x1 layers take connectivity(...) only"
            if shape[:2] == (1, 1)
            else "; give such layers a rule of their own"
        )
        raise ValueError(f"patterns of {kernel[0]}x{kernel[1]} kernels do not fit shape {shape}{hint}")


def coverage(counts: Any, k: int) -> float:
    """Share of the kernels whose pattern is among the k most frequent: 0..1 (0 where there are no kernels)."""
    counts = np.sort(np.asarray(counts))[::-1]
    return float(counts[:k].sum() / max(1, counts.sum()))


def entropy(counts: Any) -> float:
    """Entropy of the distribution of patterns, in bits: log2(K) where all are used alike, 0 where one is."""
    p = np.asarray(counts, np.float64)
    p = p[p > 0] / max(1.0, p.sum())
    return float(-(p * np.log2(p)).sum()) + 0.0


def select_library(
    params: Any,
    path_pattern: str,
    k: int,
    candidates: str = "natural",
    entries: int = 4,
    kernel: tuple[int, int] = (3, 3),
) -> list[list[int]]:
    """The k patterns that the kernels of a (dense, trained) network favour: one library for all of its layers.

    A kernel's favourite is its nearest pattern: its `entries` largest taps (*all*), or the centre and the `entries` - 1
    largest others (*natural*). Any kernel size; runs on the host. Call it once per layer for one library a layer.

    Args:
      params: any pytree of concrete arrays.
      path_pattern: regular expression that whole paths must match; leaves of other kernel sizes are errors.
      k: patterns to choose.
      candidates: "natural" (PatDNN) or "all".
      entries: taps of a pattern.
      kernel: `(kh, kw)`.

    Returns:
      k lists of kept taps, most frequent first, ties in lexicographic order; what `pattern(library=...)` takes.

    Raises:
      ValueError: no leaf matches, one does not fit, or fewer than k different patterns occur.

    Source: W. Niu et al., "PatDNN", 2020, pattern set selection.

    Example:
      >>> w = jnp.zeros((3, 3, 1, 2)).at[:2, :2].set(1.0)  # both kernels use the upper left corner
      >>> compressx.select_library({"kernel": w}, "kernel", k=1)
      [[0, 1, 3, 4]]
    """
    if candidates not in ("natural", "all"):
        raise ValueError(f'candidates must be "natural" or "all", got {candidates!r}')
    natural = candidates == "natural"
    taps = check_kernel(entries, kernel, natural)
    named = zip(paths(params), jax.tree.leaves(params), strict=True)
    leaves = [(name, leaf) for name, leaf in named if re.fullmatch(path_pattern, name)]
    if not leaves:
        raise ValueError(f"{path_pattern!r} matches no path; the paths are:\n  " + "\n  ".join(paths(params)))
    counts: Counter[tuple[int, ...]] = Counter()
    for name, leaf in leaves:
        try:
            check_leaf(leaf.shape, kernel)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        x = np.abs(np.asarray(leaf, np.float64)).reshape(taps, -1).T
        x = x[x.any(axis=1)]
        if natural:
            x[:, taps // 2] = np.inf
        kept = np.sort(np.argsort(-x, axis=1, kind="stable")[:, :entries], axis=1)
        distinct, number = np.unique(kept, axis=0, return_counts=True)
        counts.update({tuple(row.tolist()): int(n) for row, n in zip(distinct, number, strict=True)})
    if not 1 <= k <= len(counts):
        raise ValueError(
            f"cannot choose k={k} patterns: the kernels of {path_pattern!r} use {len(counts)} different ones"
        )
    ranked = sorted(counts, key=lambda p: (-counts[p], p))
    return [list(p) for p in ranked[:k]]
