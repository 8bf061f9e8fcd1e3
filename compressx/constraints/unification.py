"""Micro-structured unification: blocks whose weights share one magnitude (signs stay free), or are zero, or are free.

A block is cut from the GEMM view `[P, F]` (two extents: positions, filters) or from `[cin, kh*kw, cout]` (three). For
v, a block's n weights, the nearest point and its cost are

    unified:  sign(v) * mean(|v|)   sum |v|^2 - (sum |v|)^2 / n = n * Var(|v|)          (sign + for 0)
    pruned:   0                     sum |v|^2

Ragged blocks at the edges count as one each; padding is no part of their mean or cost.

Source: S. Lin et al., "Efficient Micro-Structured Weight Unification and Pruning for Neural Network Compression", 2021.
The sets and orders are the paper's; the closed forms of the projections are derived here.
"""

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx import views
from compressx.constraints.base import LEVEL, SIGN, SUPPORT, TIE, Constraint, check_choice, factory, support
from compressx.constraints.floats import bits, exponent, lift, negative, nonzero, scale, wide
from compressx.constraints.select import PEAK, squares, top_k_mask

FREE, UNIFIED, PRUNED = range(3)


class Ties(NamedTuple):
    """The active set around a unified weight.

    Attributes:
      tied: bool, one a block: its weights are `sign * a` for one free a >= 0.
      sign: int8 in -1, 0, 1, of the weight's shape; 0 stays 0 (all of a pruned block).
    """

    tied: Array
    sign: Array


@factory
def unify(block: Sequence[int], fraction: float, *, zeros: str = "tie") -> Constraint:
    """At least a given share of the blocks have a single magnitude each: max|w| - min|w| == 0, bit for bit.

        argmin_z ||z - w||_2  s.t.  |z_1| = ... = |z_n| in at least K blocks:
        the K blocks of least n * Var(|v|) become sign(v) * mean(|v|); ties go to the higher index

    Retraining keeps the blocks and their signs; each unified block trains one scalar, its magnitude, at or above 0.

    Args:
      block: (bh, bw), positions and filters; or (bc, bt, bo), input channels, taps and output channels.
      fraction: share of blocks unified, in (0, 1]; K = floor(fraction * blocks + 1/2).
      zeros: "tie" is the paper's set: a zero in a unified block takes its magnitude, with sign +. "keep" leaves zeros
        at zero and out of mean and cost, so that the set can be intersected with pruning and polarization.

    Source: S. Lin et al., "Efficient Micro-Structured Weight Unification and Pruning for Neural Network
    Compression", 2021; the closed forms of the projection are derived here.

    Example:
      >>> w = jnp.asarray([[1.0, -1.5, 1.0, -9.0]])
      >>> print(compressx.unify((1, 2), fraction=0.5).project(w, ()))  # the block that costs least
      [[ 1.25 -1.25  1.   -9.  ]]
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction must be in (0, 1], got {fraction}")
    return _tied(block, fraction, 0.0, "greedy", zeros)


@factory
def prune_blocks(block: Sequence[int], fraction: float) -> Constraint:
    """At least a given share of the blocks are zero: unification with all magnitudes 0.

    argmin_z ||z - w||_2  s.t. at least K blocks of z are zero: the K blocks of least energy go. For two extents this is
    `block(block, keep=blocks - K)`, with the same masks.

    Args:
      block: see `unify`.
      fraction: share of blocks pruned, in (0, 1); K = floor(fraction * blocks + 1/2).

    Source: S. Lin et al., "Efficient Micro-Structured Weight Unification and Pruning for Neural Network
    Compression", 2021.

    Example:
      >>> w = jnp.asarray([[1.0, -1.5, 1.0, -9.0]])
      >>> print(compressx.prune_blocks((1, 2), fraction=0.5).project(w, ()))
      [[ 0.  0.  1. -9.]]
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be in (0, 1), got {fraction}")
    view = views.tiles(_extents(block))

    def spread(keep: Array, w: Array) -> Array:
        return view.back(jnp.broadcast_to(_per_block(keep), view.to(w).shape), w.shape)

    def select(w: Array) -> Array:
        energy = squares(view.to(w), _odd(block))
        return spread(top_k_mask(energy, energy.size - _share(fraction, energy.size)), w)

    def alive(w: Array) -> Array:
        return spread(squares(view.to(w), _odd(block)) > 0, w)

    return support(select, alive)


@factory
def unify_and_prune(
    block: Sequence[int],
    unify_fraction: float,
    prune_fraction: float,
    *,
    selection: str = "greedy",
    zeros: str = "tie",
) -> Constraint:
    """Some blocks are zero, some have a single magnitude, the rest are free, in exact numbers of each.

        argmin_z ||z - w||_2  s.t.  K_p blocks of z are zero and K_u others are unified,
        K = floor(fraction * blocks + 1/2), and K_u at most what pruning leaves

    Args:
      block: see `unify`.
      unify_fraction: share of all blocks that is unified.
      prune_fraction: share of all blocks that is zero; both in [0, 1], together above 0 and at most 1.
      selection: "greedy" prunes the K_p blocks of least energy, then unifies the K_u blocks of least cost among the
        others: simple, shards, not always nearest. "exact" is the nearest point: the best assignment of all, found on
        the host (by a callback under jit) in B log B steps for B blocks; see `assign`.
      zeros: see `unify`.

    Source: greedy order as in W. Jiang et al., US patent application 2021/0397963.

    Example:
      >>> w = jnp.asarray([[0.1, 0.2, 1.0, -2.0, 3.0, 9.0]])
      >>> print(compressx.unify_and_prune((1, 2), 1 / 3, 1 / 3).project(w, ()))
      [[ 0.   0.   1.5 -1.5  3.   9. ]]
    """
    for name, value in (("unify_fraction", unify_fraction), ("prune_fraction", prune_fraction)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} must be in [0, 1], got {value}")
    if not 0 < unify_fraction + prune_fraction <= 1:
        raise ValueError(
            f"unify_fraction + prune_fraction must be above 0 and at most 1, got {unify_fraction} + {prune_fraction}"
        )
    check_choice("selection", selection, ("greedy", "exact"))
    return _tied(block, unify_fraction, prune_fraction, selection, zeros)


def _tied(
    block: Sequence[int],
    unify_fraction: float,
    prune_fraction: float,
    selection: str,
    zeros: str,
) -> Constraint:
    check_choice("zeros", zeros, ("tie", "keep"))
    extents, axes = _extents(block), _odd(block)
    view = views.tiles(extents)

    def live(x: Array, shape: tuple[int, ...]) -> Array:
        inside = jnp.broadcast_to(views.in_tiles(shape, extents), x.shape)
        return inside & nonzero(x) if zeros == "keep" else inside

    def kinds(w: Array) -> Array:
        x = view.to(w)
        unify, prune = _costs(x, live(x, w.shape), axes)
        number = unify.size
        to_unify, to_prune = _share(unify_fraction, number), _share(prune_fraction, number)
        if to_unify + to_prune == 0:
            raise ValueError(f"of {number} blocks none would be unified or pruned; raise the fraction")
        return _choose(unify, prune, min(to_unify, number - to_prune), to_prune, selection)

    def project(w: Array, _: tuple[()]) -> Array:
        x = view.to(w)
        kind, members = _per_block(kinds(w)), live(x, w.shape)
        a = _mean(jnp.abs(x), members, axes).astype(w.dtype)
        tied = jnp.where(members, jnp.where(negative(x), -a, a), jnp.zeros((), w.dtype))
        return view.back(jnp.where(kind == FREE, x, jnp.where(kind == UNIFIED, tied, jnp.zeros((), w.dtype))), w.shape)

    def freeze(w: Array, _: tuple[()]) -> Ties:
        x, kind = view.to(w), kinds(w)
        sign = jnp.where(negative(x), -1, 1).astype(jnp.int8)
        stays = (_per_block(kind) != PRUNED) & live(x, w.shape)
        return Ties(kind != FREE, view.back(jnp.where(stays, sign, jnp.int8(0)), w.shape))

    def retract(w: Array, active: Ties) -> Array:
        x, sign = view.to(w), view.to(active.sign)
        mean = _mean(jnp.where(sign < 0, -x, x), sign != 0, axes)
        a = jnp.where(jnp.signbit(mean), 0.0, mean).astype(w.dtype)
        tied = jnp.where(sign == 0, jnp.zeros((), w.dtype), jnp.where(sign < 0, -a, a))
        return view.back(jnp.where(_per_block(active.tied), tied, x), w.shape)

    def refuses(other: Constraint) -> str | None:
        if other.stage in (SUPPORT, SIGN) and zeros == "tie":
            return (
                "a unified block has no zeros, so unifying would bring back weights that the other set made 0; "
                'zeros="keep" unifies what is left of a block'
            )
        if other.stage == LEVEL and not other.spec.get("symmetric", True):
            return "a block shares one magnitude for both signs, and asymmetric levels may have it for one alone"
        if other.stage == LEVEL and other.spec.get("per") not in (None, "tensor", "channel"):
            return 'a block shares one magnitude, which a scale per row or group would part; quantize per "tensor"'
        if other.stage == LEVEL and other.spec.get("per") == "channel" and block[-1] > 1:
            return (
                f"a block of {block[-1]} filters shares one magnitude, which levels with a scale per channel would "
                'part; quantize per "tensor", or take blocks of one filter'
            )
        return None

    return Constraint(
        spec={"kind": "tied"},
        init=lambda w: (),
        project=project,
        refresh=lambda w, structure: structure,
        freeze=freeze,
        retract=retract,
        stage=TIE,
        refuses=refuses,
    )


def _extents(block: Sequence[int]) -> tuple[int, ...]:
    """Block extents along the axes of `views.tiles`: taps are its first axis, input channels its second."""
    if len(block) == 3:
        return block[1], block[0], block[2]
    return tuple(block)


def _odd(block: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(1, 2 * len(block), 2))


def _per_block(x: Array) -> Array:
    """One value a block, ready to broadcast against the tiles."""
    return x.reshape([n for m in x.shape for n in (m, 1)])


def _share(fraction: float, number: int) -> int:
    return math.floor(fraction * number + 0.5)


def _mean(x: Array, members: Array, axes: tuple[int, ...]) -> Array:
    """The mean of every block's members, dims kept, 0 for none; summed below the peak, so exact where all are equal.

    Of weights brought to about 1 by a power of two for each block: their sum stays in range, and so does what is lost.
    """
    zero = jnp.zeros((), wide(x).dtype)
    top = exponent(jnp.where(members, x, jnp.zeros((), x.dtype)), axes, keepdims=True)
    x = lift(x, -top)
    peak = jnp.max(jnp.where(members, x, -jnp.inf), axis=axes, keepdims=True)
    number = jnp.sum(members, axis=axes, keepdims=True, dtype=jnp.int32)
    peak = jnp.where(number > 0, peak, zero)
    below = jnp.sum(jnp.where(members, x - peak, zero), axis=axes, keepdims=True)
    return scale(peak + below / jnp.maximum(number, 1).astype(x.dtype), top)


def _costs(x: Array, members: Array, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """What unifying and pruning every block would cost; exactly 0 where, and only where, it would change nothing."""
    peak = jnp.max(bits(x), axis=axes)
    uneven = jnp.any(members & (bits(x) != _per_block(peak)), axis=axes)
    magnitude = jnp.abs(lift(x, PEAK - exponent(x)))  # on the scale of `squares`
    mean, zero = _mean(magnitude, members, axes), jnp.zeros((), magnitude.dtype)
    unify = jnp.sum(jnp.where(members, jnp.square(magnitude - mean), zero), axis=axes)
    # what is left of a difference may be nothing, but only a feasible block may cost 0
    unify = jnp.maximum(unify, float(jnp.finfo(unify.dtype).tiny))
    return jnp.where(uneven, unify, zero), squares(x, axes)


def _choose(unify: Array, prune: Array, to_unify: int, to_prune: int, selection: str) -> Array:
    """FREE, UNIFIED or PRUNED for every block: int8 of the costs' shape."""
    if selection == "exact" and to_unify and to_prune:
        out = jax.ShapeDtypeStruct(unify.shape, jnp.int8)
        chosen: Array = jax.pure_callback(
            lambda u, p: assign(np.asarray(u), np.asarray(p), to_unify, to_prune),
            out,
            unify,
            prune,
            vmap_method="sequential",
        )
        return chosen
    pruned = ~top_k_mask(prune, prune.size - to_prune)
    # pruned blocks count as the dearest to unify, so that they are never chosen
    unified = ~top_k_mask(jnp.where(pruned, jnp.inf, unify), unify.size - to_unify)
    kind = jnp.where(unified, UNIFIED, FREE)
    return jnp.where(pruned, PRUNED, kind).astype(jnp.int8)


def assign(unify: np.ndarray, prune: np.ndarray, to_unify: int, to_prune: int) -> np.ndarray:
    """The cheapest choice of `to_prune` blocks to prune and `to_unify` others to unify, exactly; on the host.

        minimise  sum over pruned of prune + sum over unified of unify

    Swapping a pruned block a with a unified block b changes the sum by (prune_b - unify_b) - (prune_a - unify_a). So in
    the order of prune - unify some best choice has all its pruned blocks before all its unified ones, and it is enough
    to know, for every cut of that order, the cheapest `to_prune` before it and the cheapest `to_unify` after it: two
    sweeps with a heap. Sums are kept as integers (multiples of the least float), so nothing is rounded.

    Args:
      unify: cost of unifying each block, >= 0, any shape.
      prune: cost of pruning it, likewise.
      to_unify: how many to unify.
      to_prune: how many to prune; together at most the number of blocks.

    Returns:
      int8 of the costs' shape: FREE, UNIFIED or PRUNED.
    """
    u, p = unify.ravel().astype(np.float64), prune.ravel().astype(np.float64)
    order = np.argsort(p - u, kind="stable")
    before = _running_least(p[order], to_prune)
    after = _running_least(u[order][::-1], to_unify)[::-1]
    cut = min(range(to_prune, u.size - to_unify + 1), key=lambda i: before[i] + after[i])
    first, last = order[:cut], order[cut:]
    kind = np.zeros(u.size, np.int8)
    kind[first[np.argsort(p[first], kind="stable")[:to_prune]]] = PRUNED
    kind[last[np.argsort(u[last], kind="stable")[:to_unify]]] = UNIFIED
    return kind.reshape(unify.shape)


def _running_least(costs: np.ndarray, k: int) -> list[int]:
    """The sum of the k least of the first i costs, for i = 0..n, in units of 2**-149 (of less than k: of all)."""
    exact = [int(math.ldexp(c, 149)) for c in costs.tolist()]
    heap: list[int] = []
    total = 0
    sums = [0]
    for c in exact:
        if len(heap) < k:
            heapq.heappush(heap, -c)
            total += c
        elif k:
            total += c + heapq.heappushpop(heap, -c)
        sums.append(total)
    return sums
