"""Sparsity: sets of weights with a bounded number of non-zeros, single or in groups, and exact counts.

Every factory here is a view (what a group is) times a selection (which groups stay). Groups are ranked by energy, the
sum of squares, which makes the selection the Euclidean projection; ties go to the lower index.

Shapes: conv `[kh, kw, cin, cout]`, dense `[in, out]`; GEMM view `[P, F]`, P = kh*kw*cin positions, F = filters. What
the papers call a *column* (one position in all filters) is a row of our GEMM view.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array

from compressx import views
from compressx.constraints.base import (
    AXES,
    SCOPES,
    Constraint,
    check_amount,
    check_choice,
    count,
    factory,
    support,
)
from compressx.constraints.select import squares, top_k_mask, top_k_masks


@factory
def unstructured(density: float | None = None, *, keep: int | None = None, scope: str = "leaf") -> Constraint:
    """At most k non-zero weights, anywhere.

        argmin_z ||z - w||_2  s.t.  ||z||_0 <= k:  the k weights of largest magnitude stay.

    Args:
      density: share of weights kept, in (0, 1]; k = floor(density * n + 1/2).
      keep: k itself, instead of a density.
      scope: "leaf" ranks inside every leaf; "rule" ranks all leaves of the rule together under one threshold.

    Source: S. Han, J. Pool, J. Tran, W. Dally, "Learning both Weights and Connections for Efficient Neural Networks",
    2015; as an ADMM set: T. Zhang et al., "A Systematic DNN Weight Pruning Framework using ADMM", 2018.

    Example:
      >>> w = jnp.asarray([[1.0, -5.0, 2.0], [4.0, 0.5, -3.0]])
      >>> print(compressx.unstructured(density=0.5).project(w, ()))
      [[ 0. -5.  0.]
       [ 4.  0. -3.]]
    """
    check_choice("scope", scope, SCOPES)
    check_amount(density, keep)
    if scope == "leaf":
        return support(lambda w: top_k_mask(jnp.abs(w), count(density, w.size, keep)))

    def select(leaves: tuple[Array, ...]) -> tuple[Array, ...]:
        k = count(density, sum(w.size for w in leaves), keep)
        return tuple(top_k_masks([jnp.abs(w) for w in leaves], k))

    return support(select, joint=True)


@factory
def n_of_m(n: int, m: int, *, axis: str | int = "inputs") -> Constraint:
    """At most n non-zeros in every m consecutive weights along an axis (N:M sparsity).

        argmin_z ||z - w||_2  s.t. each group of m has at most n non-zeros: the n largest of each group stay.

    Args:
      n: non-zeros a group may keep, 1..m.
      m: group length; it must divide the axis.
      axis: "inputs", the input channels, over which hardware sums; "outputs"; or the number of another axis of the
        stored weight.

    Source: A. Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021.

    Example:
      >>> w = jnp.asarray([[1.0, -5.0], [2.0, 4.0], [3.0, 0.5], [-4.0, 1.0]])  # [in, out]
      >>> print(compressx.n_of_m(2, 4).project(w, ()))
      [[ 0. -5.]
       [ 0.  4.]
       [ 3.  0.]
       [-4.  0.]]
    """
    if not 1 <= n <= m:
        raise ValueError(f"n_of_m needs 1 <= n <= m, got n={n}, m={m}")
    if isinstance(axis, str):
        check_choice("axis", axis, AXES)

    def select(w: Array) -> Array:
        number = {"inputs": -2, "outputs": -1}.get(axis, axis) if isinstance(axis, str) else axis
        assert isinstance(number, int)
        if not -w.ndim <= number < w.ndim:
            raise ValueError(f"axis={axis} does not exist in shape {w.shape}")
        a = number % w.ndim
        if w.shape[a] % m:
            raise ValueError(f"m={m} does not divide axis {axis} of shape {w.shape}")
        grouped = jnp.abs(w).reshape(*w.shape[:a], w.shape[a] // m, m, *w.shape[a + 1 :])
        return top_k_mask(grouped, n, axis=a + 1).reshape(w.shape)

    return support(select)


def _groups(
    score: Callable[[Array], Array],
    spread: Callable[[Array, Array], Array],
    density: float | None,
    keep: int | None,
    what: str,
) -> Constraint:
    """Whole groups stay or go: `score(w)` one energy a group, `spread(chosen, w)` the mask of the chosen groups."""
    check_amount(density, keep)

    def select(w: Array) -> Array:
        energy = score(w)
        return spread(top_k_mask(energy, count(density, energy.size, keep, what)), w)

    return support(select, lambda w: spread(score(w) > 0, w))


@factory
def block(block: tuple[int, int], density: float | None = None, *, keep: int | None = None) -> Constraint:
    """At most k non-zero blocks of bh x bw in the GEMM view `[P, F]`; works on dense and convolution weights.

        argmin_z ||z - w||_2  s.t. at most k blocks of z are non-zero: the k blocks of largest energy stay.

    Args:
      block: `(bh, bw)`, positions and filters of a block; blocks at a ragged edge are smaller and count as one.
      density: share of blocks kept.
      keep: number of blocks kept, instead of a density.

    Source: blocks of weights as in S. Narang, E. Undersander, G. Diamos, "Block-Sparse Recurrent Neural Networks",
    2017.

    Example:
      >>> w = jnp.arange(1.0, 9.0).reshape(2, 4)
      >>> print(compressx.block((2, 2), keep=1).project(w, ()))
      [[0. 0. 3. 4.]
       [0. 0. 7. 8.]]
    """
    view = views.blocks((block[0], block[1]))

    def spread(chosen: Array, w: Array) -> Array:
        tiles = jnp.broadcast_to(chosen[:, :, None, None], (*chosen.shape, *block))
        return view.back(tiles, w.shape)

    return _groups(lambda w: squares(view.to(w), (2, 3)), spread, density, keep, "blocks")


@factory
def filters(density: float | None = None, *, keep: int | None = None) -> Constraint:
    """At most k non-zero filters (output channels, columns of the GEMM view; *rows* in the papers' matrices).

    argmin_z ||z - w||_2  s.t. at most k filters of z are non-zero: the k filters of largest energy stay.

    Args:
      density: share of filters kept, in (0, 1].
      keep: number of filters kept, instead of a density.

    Source: W. Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016 (filters as groups); as an
    ADMM set: T. Zhang et al., "StructADMM", 2018.

    Example:
      >>> w = jnp.asarray([[1.0, -5.0, 2.0], [4.0, 0.5, -3.0]])  # [in, out]
      >>> print(compressx.filters(keep=2).project(w, ()))
      [[ 1.  -5.   0. ]
       [ 4.   0.5  0. ]]
    """
    return _groups(
        lambda w: _energy(w, -1),
        lambda chosen, w: jnp.broadcast_to(chosen, w.shape),
        density,
        keep,
        "filters",
    )


def _energy(w: Array, *axes: int) -> Array:
    """Energy along the given axes, summed over the others, dims kept: a reshape first would gather a sharded leaf."""
    if w.ndim < 2:
        raise ValueError(f"groups of positions, channels or filters need a weight of at least 2 axes, got {w.shape}")
    held = {a % w.ndim for a in axes}
    return squares(w, tuple(a for a in range(w.ndim) if a not in held), keepdims=True)


@factory
def columns(density: float | None = None, *, keep: int | None = None) -> Constraint:
    """At most k positions (i, j, c) used by any filter (*columns* in the papers, also called filter shapes).

    argmin_z ||z - w||_2  s.t. at most k rows of the GEMM view [P, F] are non-zero: the k rows of largest energy stay.

    Args:
      density: share of positions kept, in (0, 1].
      keep: number of positions kept, instead of a density.

    Source: W. Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016 (filter shapes); as an ADMM
    set: T. Zhang et al., "StructADMM", 2018.

    Example:
      >>> w = jnp.ones((3, 3, 2, 4)).at[1, 1].set(2.0)  # [kh, kw, cin, cout]
      >>> z = compressx.columns(keep=2).project(w, ())
      >>> z.shape, int(jnp.sum(z != 0)), int(jnp.sum(z[1, 1] != 0))
      ((3, 3, 2, 4), 8, 8)
    """
    return _groups(
        lambda w: _energy(w, *range(w.ndim - 1)),
        lambda chosen, w: jnp.broadcast_to(chosen, w.shape),
        density,
        keep,
        "positions",
    )


@factory
def channels(density: float | None = None, *, keep: int | None = None) -> Constraint:
    """At most k input channels used: all taps and filters of the others are zero.

    argmin_z ||z - w||_2  s.t. at most k input channels of z are non-zero: the k of largest energy stay.

    Args:
      density: share of input channels kept, in (0, 1].
      keep: number of input channels kept, instead of a density.

    Source: W. Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016 (channels as groups); as an
    ADMM set: T. Zhang et al., "StructADMM", 2018.

    Example:
      >>> w = jnp.ones((3, 3, 2, 4)).at[:, :, 1].set(2.0)  # [kh, kw, cin, cout]
      >>> z = compressx.channels(density=0.5).project(w, ())
      >>> jnp.any(z != 0, axis=(0, 1, 3)).tolist()
      [False, True]
    """
    return _groups(
        lambda w: _energy(w, -2),
        lambda chosen, w: jnp.broadcast_to(chosen, w.shape),
        density,
        keep,
        "channels",
    )


@factory
def filters_and_columns(
    filter_density: float | None = None,
    column_density: float | None = None,
    *,
    keep_filters: int | None = None,
    keep_columns: int | None = None,
) -> Constraint:
    """At most f non-zero filters and at most p non-zero positions: what is left is a smaller dense matrix `[p, f]`.

    The exact joint projection is a combinatorial problem; this one keeps the f filters of largest energy, then the p
    positions of largest energy *within those filters*, which is exact for the positions given the filters. One set with
    one Z; `filters(...) & columns(...)` is the same set with two.

    Args:
      filter_density: share of filters kept, in (0, 1].
      column_density: share of positions kept, in (0, 1].
      keep_filters: number of filters kept, instead of a density.
      keep_columns: number of positions kept, instead of a density.

    Source: X. Ma et al., "Tiny but Accurate: A Pruned, Quantized and Optimized Memristor Crossbar Framework", 2020;
    G. Yuan et al., "FORMS", 2021, set S (prune, combined).

    Example:
      >>> w = jnp.arange(1.0, 13.0).reshape(3, 4)
      >>> print(compressx.filters_and_columns(0.5, keep_columns=2).project(w, ()))
      [[ 0.  0.  0.  0.]
       [ 0.  0.  7.  8.]
       [ 0.  0. 11. 12.]]
    """
    check_amount(filter_density, keep_filters, "filter")
    check_amount(column_density, keep_columns, "column")
    by_filter, by_column = filters(filter_density, keep=keep_filters), columns(column_density, keep=keep_columns)

    def alive(w: Array) -> Array:
        return by_filter.freeze(w, ()) & by_column.freeze(w, ())

    def select(w: Array) -> Array:
        z = by_column.project(by_filter.project(w, ()), ())
        return alive(z)

    return support(select, alive)
