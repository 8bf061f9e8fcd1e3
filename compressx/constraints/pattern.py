"""Pattern and connectivity sparsity: a few weights in each kernel, at positions from a small library, and few kernels.

Shapes: conv `[kh, kw, cin, cout]`, viewed as kernels `[cin, cout, taps]`, taps = kh*kw; the papers' `W[Co, Ci, kh, kw]`
has the first two axes the other way round. A *kernel* is one (input channel, filter) pair.

Other kernel sizes: a 1x1 kernel has no pattern (an error that says so) and takes `connectivity` only; for 5x5, 7x7 and
others give `kernel` and `entries`, and a library from `library.select_library`, or "free".

`pattern(...) & connectivity(...)`, in this order, is hardened to the same point as `pattern_connectivity(...)`: kernels
are ranked by what their pattern keeps. Written the other way round, they would be ranked by their whole energy.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx import views
from compressx.constraints import library as lib
from compressx.constraints.base import (
    SCOPES,
    Constraint,
    check_amount,
    check_choice,
    count,
    factory,
    first_that_holds,
    tree_where,
)
from compressx.constraints.floats import nonzero
from compressx.constraints.select import energy, top_k_mask

Aligned = str | int | None
_VIEW = views.kernels()


class Patterns(NamedTuple):
    """The structure of pattern and connectivity sets.

    Attributes:
      masks: bool `[K, taps]`, the library; `()` where there is none.
      live: bool `[K]`, the patterns that may still be used; `()` likewise.
      rank: per leaf int32 `[cout]`, each filter's place in the order of descending norm; `()` unless they are grouped.
    """

    masks: Any
    live: Any
    rank: tuple[Array, ...]


@factory
def pattern(
    library: str | lib.Taps = "natural",
    *,
    k: int | None = None,
    entries: int = 4,
    kernel: Sequence[int] = (3, 3),
    scope: str = "leaf",
    aligned: Aligned = None,
    shrink: float | Sequence[int] | None = None,
) -> Constraint:
    """Every kernel's non-zeros lie in one pattern of a library.

        argmin_z ||z - w||_2  s.t. each kernel of z has its support in some p of the library:
        kernel by kernel  p* = argmax_p ||W o p||_2,  z = W o p*;  ties go to the earlier pattern.

    The library is the structure. `init` chooses it from the weights it is given (so start from a trained network); with
    `shrink` it starts with all of them, and every `refresh` drops those that the fewest kernels use.

    Args:
      library: "natural" (patterns with the centre: 56 of 4 in 3x3), "all" (126), "scp", "elog", "group" (fixed lists in
        `library.NAMED`), "free" (any `entries` taps: no library), or a list of lists of kept taps.
      k: patterns in the end. Of "natural", "all" and lists the k that the kernels use most; of the named lists the
        first k. None: the whole library.
      entries: taps of a pattern.
      kernel: `(kh, kw)` of the leaves.
      scope: "leaf" chooses a library for every leaf; "rule" one for all leaves of the rule together (a joint set).
      aligned: None, every kernel has its own pattern; "channel", all filters share one for each input channel; an int
        g, the filters in order of norm (at init) are taken g at a time and share them within each group.
      shrink: extraction during training. A factor in (0, 1): each refresh keeps floor(factor * size) patterns, at least
        k. A descending list of sizes that ends in k: each refresh goes to the next. None: `refresh` changes nothing.

    Raises:
      ValueError: unknown library, impossible k, entries, kernel or shrink, or a leaf with other kernels.

    Source: W. Niu et al., "PatDNN", 2020 (natural patterns, projection); X. Ma et al., "PCONV", 2020; X. Ma et al., "An
    Image Enhancing Pattern-based Sparsity for Real-time Inference on Mobile Devices", 2020 (extraction; its thresholds
    and rounds are not published, so `shrink` is a sweep).

    Example:
      >>> w = jnp.arange(1.0, 10.0).reshape(3, 3, 1, 1)
      >>> constraint = compressx.pattern("natural")
      >>> print(constraint.project(w, constraint.init(w))[:, :, 0, 0])  # the centre and the 3 largest others
      [[0. 0. 0.]
       [0. 5. 0.]
       [7. 8. 9.]]
    """
    return _kernel_set(_library_options(library, k, entries, kernel, scope, aligned, shrink), None)


@factory
def connectivity(
    density: float | None = None, *, keep: int | None = None, balance: str = "layer", aligned: int | None = None
) -> Constraint:
    """At most so many non-zero kernels; any kernel size, 1x1 included.

    argmin_z ||z - w||_2  s.t. at most alpha kernels of z (of the layer, or of each filter) are non-zero:
    the alpha kernels of largest energy stay, ties go to the lower input channel, then the lower filter.

    Args:
      density: share of kernels kept, in (0, 1]: 1 / 3.6 for PatDNN's rate.
      keep: number of kernels kept (with balance="filter", in each filter) instead.
      balance: "layer" ranks all kernels of the layer (PatDNN); "filter" those of each filter, so that every filter
        keeps as many (PCONV). Different sets: compare them at equal counts.
      aligned: an int g groups the filters in order of norm (at init), g at a time; a group shares its removed input
        channels, and groups of kernels are what is counted.

    Source: W. Niu et al., "PatDNN", 2020; X. Ma et al., "PCONV", 2020.

    Example:
      >>> w = jnp.ones((3, 3, 2, 2)).at[:, :, 0, 1].set(2.0)  # 4 kernels
      >>> constraint = compressx.connectivity(keep=1)
      >>> z = constraint.project(w, constraint.init(w))
      >>> jnp.any(z != 0, axis=(0, 1)).tolist()  # [cin, cout]
      [[False, True], [False, False]]
    """
    _check_aligned(aligned, ("int",))
    return _kernel_set({"aligned": aligned}, _connections(density, keep, balance))


@factory
def pattern_connectivity(
    density: float | None = None,
    *,
    keep: int | None = None,
    balance: str = "layer",
    library: str | lib.Taps = "natural",
    k: int | None = None,
    entries: int = 4,
    kernel: Sequence[int] = (3, 3),
    scope: str = "leaf",
    aligned: int | None = None,
    shrink: float | Sequence[int] | None = None,
) -> Constraint:
    """At most so many non-zero kernels, each with its support in a pattern: the exact joint projection.

        argmin_z ||z - w||_2  s.t. both:  score = max_p ||W o p||_2;  the alpha kernels of largest score stay,
        each with its argmax pattern.

    One set with one Z in ADMM; `pattern(...) & connectivity(...)` gives each its own (PatDNN's extended ADMM).

    Args:
      density, keep, balance: as in `connectivity`; counted in each leaf, also with scope="rule".
      library, k, entries, kernel, scope, aligned, shrink: as in `pattern`.

    Source: W. Niu et al., "PatDNN", 2020 (both sets); the joint projection in closed form is derived here.

    Example:
      >>> w = jnp.ones((3, 3, 2, 2)).at[:, :, 0, 1].set(2.0)
      >>> constraint = compressx.pattern_connectivity(keep=1)
      >>> z = constraint.project(w, constraint.init(w))
      >>> jnp.sum(z != 0, axis=(0, 1)).tolist()  # one kernel stays, with 4 taps
      [[0, 4], [0, 0]]
    """
    _check_aligned(aligned, ("int",))
    options = _library_options(library, k, entries, kernel, scope, aligned, shrink)
    return _kernel_set(options, _connections(density, keep, balance))


def assign(w: Array, structure: Patterns) -> Array:
    """The pattern of every kernel, int32 `[cin, cout]`: its place in `structure.masks`; -1 for an all-zero kernel."""
    e = energy(_VIEW.to(w))
    return jnp.where(jnp.any(e > 0, axis=-1), lib.nearest(e, structure.masks, structure.live), -1)


def _library_options(
    library: str | lib.Taps,
    k: int | None,
    entries: int,
    kernel: Sequence[int],
    scope: str,
    aligned: Aligned,
    shrink: float | Sequence[int] | None,
) -> dict[str, Any]:
    check_choice("scope", scope, SCOPES)
    if shrink is not None and not isinstance(shrink, float | Sequence):
        raise ValueError(f"shrink must be a factor in (0, 1) or a list of sizes, got {shrink!r}")
    if len(kernel) != 2:
        raise ValueError(f"kernel must be (kh, kw), got {kernel!r}")
    _check_aligned(aligned, ("channel", "int"))
    return {
        "library": library if isinstance(library, str) else [list(map(int, p)) for p in library],
        "k": k,
        "entries": entries,
        "kernel": [int(n) for n in kernel],
        "scope": scope,
        "aligned": aligned,
        "shrink": shrink if shrink is None or isinstance(shrink, float) else list(shrink),
    }


def _check_aligned(aligned: Aligned, allowed: tuple[str, ...]) -> None:
    fits = aligned is None or (aligned == "channel" and "channel" in allowed)
    if not fits and not (isinstance(aligned, int) and not isinstance(aligned, bool) and aligned >= 1):
        names = "None, a positive int" + (' or "channel"' if "channel" in allowed else "")
        raise ValueError(f"aligned must be {names}, got {aligned!r}")


def _candidates(library: str | list[list[int]], entries: int, kernel: tuple[int, int]) -> np.ndarray:
    if not isinstance(library, str):
        return lib.to_masks(library, entries, kernel)
    if library in ("natural", "all"):
        return lib.enumerate_masks(entries, kernel, library == "natural")
    if library not in lib.NAMED:
        raise ValueError(f"unknown library {library!r}; known: natural, all, free, {', '.join(lib.NAMED)}, or a list")
    if (entries, kernel) != (4, (3, 3)):
        raise ValueError(
            f"library {library!r} has 4-entry 3x3 patterns, not {entries} entries of {kernel[0]}x{kernel[1]}"
        )
    return lib.to_masks(lib.NAMED[library], entries, kernel)


def _sizes(shrink: float | list[int], k: int, total: int) -> np.ndarray:
    """next[n]: the size of the library after a refresh of one of size n."""
    if isinstance(shrink, float):
        if not 0 < shrink < 1:
            raise ValueError(f"shrink must be a factor in (0, 1) or a list of sizes, got {shrink}")
        return np.array([max(min(n, k), int(n * shrink)) for n in range(total + 1)], np.int32)
    if not shrink or shrink[-1] != k or any(a <= b for a, b in zip([total + 1, *shrink], shrink, strict=False)):
        raise ValueError(f"shrink sizes must descend from at most {total} and end in k={k}, got {shrink}")
    sizes = np.array(shrink[::-1], np.int32)
    below = np.searchsorted(sizes, np.arange(total + 1))  # how many sizes are smaller
    return np.where(below > 0, sizes[np.maximum(below, 1) - 1], np.arange(total + 1)).astype(np.int32)


Connections = Callable[[Array], Array]  # scores [cin, units] -> mask of the kernels that stay


def _connections(density: float | None, keep: int | None, balance: str) -> Connections:
    check_choice("balance", balance, ("layer", "filter"))
    check_amount(density, keep)
    if balance == "layer":
        return lambda s: top_k_mask(s, count(density, s.size, keep, "kernels of the layer"))
    return lambda s: top_k_mask(s, count(density, s.shape[0], keep, "kernels of a filter"), axis=0)


def _rank(e: Array) -> Array:
    """Place of every filter in the order of descending norm, ties by index: int32 [cout]."""
    order = jnp.argsort(-jnp.sum(e, axis=(0, 2)), stable=True)
    return jnp.argsort(order).astype(jnp.int32)


def _alike(x: Array, size: int) -> Array:
    """Positions that bring filters with the same zeros together: int32 [cout], for kernels `[cin, cout, taps]`.

    A group of hardened filters has its zeros in common. Zeros that more filters have than whole groups come last, as
    the short group does.
    """
    support = nonzero(x).astype(jnp.float32)
    number = x.shape[0] * x.shape[2]
    both = jnp.einsum("iat,ibt->ab", 2 * support - 1, 2 * support - 1, precision=lax.Precision.HIGHEST)
    kind = jnp.argmax(both == number, axis=1)  # the first filter with the same zeros
    count = jnp.sum(kind[:, None] == kind[None], axis=1, dtype=jnp.int32)
    order = jnp.argsort(jnp.where(count % size > 0, x.shape[1], 0) + kind, stable=True)
    return jnp.argsort(order).astype(jnp.int32)


def _gather(e: Array, aligned: Aligned, rank: Array | None) -> Array:
    """Energies `[cin, cout, taps]` summed over the kernels that share their fate: `[cin, units, taps]`."""
    if aligned is None:
        return e
    if rank is None:
        return jnp.sum(e, axis=1, keepdims=True)
    assert isinstance(aligned, int)
    aligned = min(aligned, e.shape[1])
    units = -(-e.shape[1] // aligned)
    e = jnp.take(e, jnp.argsort(rank), axis=1)
    e = jnp.pad(e, ((0, 0), (0, units * aligned - e.shape[1]), (0, 0)))
    return jnp.sum(e.reshape(e.shape[0], units, aligned, e.shape[2]), axis=2)


def _spread(mask: Array, cout: int, aligned: Aligned, rank: Array | None) -> Array:
    """Inverse of `_gather` for masks: `[cin, units, taps] -> [cin, cout, taps]`."""
    if aligned is None:
        return mask
    if rank is None:
        return jnp.broadcast_to(mask, (mask.shape[0], cout, mask.shape[2]))
    assert isinstance(aligned, int)
    return jnp.take(mask, rank // min(aligned, cout), axis=1)


def _kernel_set(options: dict[str, Any], connections: Connections | None) -> Constraint:
    """Kernels (or units of kernels that share their fate) get a pattern, then the units of largest score stay."""
    patterned, aligned = "library" in options, options["aligned"]
    free = options.get("library") == "free"
    joint = options.get("scope") == "rule"
    kernel: tuple[int, int] = tuple(options["kernel"]) if patterned else (0, 0)
    entries, k = options.get("entries", 0), options.get("k")
    candidates, following = np.zeros((0, 0), bool), None
    if free:
        lib.check_kernel(entries, kernel)
        if k is not None or options["shrink"] is not None:
            raise ValueError('library="free" has no library to choose from: leave out k and shrink')
    elif patterned:
        candidates = _candidates(options["library"], entries, kernel)
        if k is not None and not 1 <= k <= len(candidates):
            raise ValueError(f"k={k} is impossible; library {options['library']!r} has {len(candidates)} patterns")
        if options["shrink"] is not None:
            if k is None:
                raise ValueError("shrink needs k, the number of patterns to end with")
            following = _sizes(options["shrink"], k, len(candidates))
        elif isinstance(options["library"], str) and options["library"] in lib.NAMED:
            candidates = candidates[:k]
    chosen = k is not None and following is None and k < len(candidates)

    def leaves(w: Any) -> tuple[Array, ...]:
        return tuple(w) if joint else (w,)

    def like(w: Any, out: list[Array]) -> Any:
        return tuple(out) if joint else out[0]

    def energies(w: Any, rank: tuple[Array, ...]) -> list[Array]:
        for x in leaves(w):
            if patterned:
                lib.check_leaf(x.shape, kernel)
        ranks = rank or (None,) * len(leaves(w))
        return [_gather(energy(_VIEW.to(x)), aligned, r) for x, r in zip(leaves(w), ranks, strict=True)]

    def init(w: Any) -> Patterns:
        grouped = isinstance(aligned, int)
        each = [_VIEW.to(x) for x in leaves(w)]

        def choose(rank: Callable[[Array], Array], first: Callable[..., Array]) -> Patterns:
            ranks = tuple(map(rank, each)) if grouped else ()
            e = energies(w, ranks)
            if not len(candidates):
                return Patterns((), (), ranks)
            masks, live = jnp.asarray(candidates), jnp.ones(len(candidates), bool)
            if chosen:
                order = first(e, masks, live)
                masks, live = masks[order], live[order]
            return Patterns(masks, live, ranks)

        def used(e: list[Array], masks: Array, live: Array) -> Array:
            return jnp.argsort(-lib.use(e, masks, live), stable=True)[:k]

        def covering(e: list[Array], masks: Array, live: Array) -> Array:
            order = jnp.argsort(-lib.use(e, masks, live), stable=True)
            return order[lib.cover(e, masks[order], k or 0)]

        choice = choose(lambda x: _rank(energy(x)), used)
        if not (grouped or chosen):
            return choice
        # may these be hardened weights? dense ones have kernels with more taps than a pattern, and none without
        taps = [jnp.sum(nonzero(x), axis=-1, dtype=jnp.int32) for x in each]
        thin = [jnp.all(n <= entries) if patterned else jnp.any(n == 0) for n in taps]
        hardened = functools.reduce(jnp.logical_and, thin)

        def again() -> Patterns:
            return lax.cond(hardened, lambda: choose(lambda x: _alike(x, aligned), covering), lambda: choice)

        return first_that_holds(project, w, choice, again)

    def refresh(w: Any, s: Patterns) -> Patterns:
        if following is None:
            return s
        used = jnp.where(s.live, lib.use(energies(w, s.rank), s.masks, s.live), -1)
        place = jnp.argsort(jnp.argsort(-used, stable=True))
        size = jnp.asarray(following)[jnp.sum(s.live, dtype=jnp.int32)]
        return s._replace(live=place < size)

    def masks_of(w: Any, s: Patterns, select: Connections | None) -> Any:
        out = []
        ranks = s.rank or (None,) * len(leaves(w))
        for x, e, r in zip(leaves(w), energies(w, s.rank), ranks, strict=True):
            mask = jnp.any(e > 0, axis=-1, keepdims=True)  # an all-zero unit has no pattern
            if free:
                mask = mask & top_k_mask(e, entries, axis=-1)
            elif patterned:
                mask = mask & s.masks[lib.nearest(e, s.masks, s.live)]
            if select is not None:
                mask = mask & select(jnp.sum(jnp.where(mask, e, 0), axis=-1))[..., None]
            mask = jnp.broadcast_to(_spread(mask, x.shape[-1], aligned, r), _VIEW.to(x).shape)
            out.append(_VIEW.back(mask, x.shape))
        return like(w, out)

    def project(w: Any, s: Patterns) -> Any:
        return tree_where(masks_of(w, s, connections), w)

    return Constraint(
        spec={"kind": "kernels"},
        init=init,
        project=project,
        refresh=refresh,
        freeze=lambda w, s: masks_of(w, s, None),
        retract=lambda w, active: tree_where(active, w),
        joint=joint,
    )
