"""Polarization: all weights of a fragment (the weights that share a crossbar column) have one sign, or are zero.

A ReRAM column then stores magnitudes alone, and one sign bit for a fragment. Rows of the GEMM view `[P, F]` that are
pruned away are no part of a fragment: fragments run over the compact matrix, kept rows first.

Source: G. Yuan et al., "FORMS: Fine-grained Polarized ReRAM-based In-situ Computation for Mixed-signal DNN
Accelerator", 2021, section III.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from compressx import views
from compressx.constraints.base import SIGN, Constraint, check_choice, factory, first_that_holds
from compressx.constraints.floats import differ, exponent, lift, negative, nonzero
from compressx.constraints.select import PEAK


class Polarity(NamedTuple):
    """The structure of a polarized set.

    Attributes:
      order: int32 `[P]`, row of the GEMM view at each place: kept rows in the fragment order, then pruned ones.
        Fragment f holds the positions f * size .. (f + 1) * size - 1.
      negative: bool `[ceil(P/size), F]`, the sign of each fragment (False is +).
    """

    order: Array
    negative: Array


@factory
def polarize(fragment: int, *, order: str = "W", rule: str = "sum") -> Constraint:
    """Every fragment of `fragment` consecutive weights of a filter has a single sign (zeros allowed).

        project(w) = argmin_z ||z - w||_2  s.t.  sign * z >= 0 on every fragment:  weights of the wrong sign become 0

    for the fragments' signs in the structure, which `init` and `refresh` choose from the weights:

        rule "sum":     + where sum(w) >= 0 over the fragment, else -                                   (eq. 2)
        rule "energy":  + where sum(max(w, 0)^2) >= sum(max(-w, 0)^2), else -

    "energy" makes the projection the nearest point over all choices of signs; the paper's "sum" does not in general.
    Signs are constant between refreshes (`admm(refresh_every=...)`). `init` and `refresh` also choose the order of the
    rows: those that are zero in all filters come last; where `init` finds weights that lie in the set only if some such
    rows keep their place, they keep it. So prune and harden before polarizing, or intersect, where the
    signs are chosen for the pruned weights: `filters(...) & columns(...) & polarize(8)`. Where pruning moves during
    ADMM, hardening forms order and signs anew for the rows that are left in the end. The last fragment may be short.
    Retraining moves in the cone of the signs; a weight at 0 may grow again to its fragment's side. Polarizing can empty
    a row that was kept: hand this structure on to later phases, or their fragments will close the gap.

    Args:
      fragment: weights in a fragment (rows of a sub-array), at least 1; the paper builds 4, 8 and 16.
      order: which kernel axis runs fastest in a filter: "W" (c, h, w), "H" (c, w, h) or "C" (h, w, c); of no effect on
        dense weights, whose fragments run along the inputs.
      rule: "sum" or "energy".

    Returns:
      A SIGN constraint whose structure is a `Polarity`.

    Source: G. Yuan et al., "FORMS: Fine-grained Polarized ReRAM-based In-situ Computation for Mixed-signal DNN
    Accelerator", 2021, section III, equation 2.

    Example:
      >>> w = jnp.asarray([[3.0], [-1.0], [-4.0], [2.0]])  # two fragments of one filter
      >>> constraint = compressx.polarize(2)
      >>> constraint.project(w, constraint.init(w)).ravel().tolist()
      [3.0, 0.0, -4.0, 0.0]
    """
    if fragment < 1:
        raise ValueError(f"a fragment holds at least 1 weight, got fragment={fragment}")
    check_choice("order", order, ("W", "H", "C"))
    check_choice("rule", rule, ("sum", "energy"))

    def choose(w: Array) -> Polarity:
        return polarity(w, fragment, order, rule)

    def init(w: Array) -> Polarity:
        def again() -> Polarity:
            return polarity(w, fragment, order, rule, left_out(w, fragment, order))

        return first_that_holds(project, w, choose(w), again)

    def settle(w: Array, structure: Polarity) -> Polarity:
        anew = choose(w)
        moved = jnp.any(anew.order != structure.order) & jnp.any(differ(project(w, structure), w))
        return jax.tree.map(lambda a, b: jnp.where(moved, a, b), anew, structure)

    def project(w: Array, structure: Polarity) -> Array:
        wrong = nonzero(w) & (negative(w) != required(structure, fragment).reshape(w.shape))
        return jnp.where(wrong, jnp.zeros((), w.dtype), w)

    return Constraint(
        spec={"kind": "polarize"},
        init=init,
        project=project,
        refresh=lambda w, _: choose(w),
        freeze=lambda w, structure: structure,
        retract=project,
        stage=SIGN,
        changed=lambda w, before, after: flipped_share(w, before, after, fragment),
        settle=settle,
    )


def polarity(w: Array, fragment: int, order: str = "W", rule: str = "sum", pruned: Array | None = None) -> Polarity:
    """Row order and fragment signs chosen for a weight, see `polarize`.

    Args:
      w: the weight.
      fragment, order, rule: of `polarize`.
      pruned: bool `[P]`, the rows (in the order of fragments) that come last; None: all that are zero.
    """
    nested = jnp.asarray(views.position_order(w.shape, order))
    m = views.gemm().to(jnp.asarray(w))
    if pruned is None:
        pruned = ~jnp.any(nonzero(m), axis=1)[nested]
    rows = nested[jnp.argsort(pruned, stable=True)]
    pieces = _cut(m[rows], fragment)
    below = jnp.any(negative(pieces), axis=1)
    mixed = below & jnp.any(nonzero(pieces) & ~negative(pieces), axis=1)
    # each on a scale of its own: neither a sum nor a square leaves the range, nor is small beside another fragment's
    x = lift(pieces, PEAK - exponent(pieces, axis=1, keepdims=True))
    if rule == "energy":
        x = jnp.sign(x) * jnp.square(x)
    return Polarity(rows, jnp.where(mixed, jnp.sum(x, axis=1) < 0, below))


def left_out(w: Array, fragment: int, order: str = "W") -> Array:
    """Which zero rows of a polarized weight to leave out of its fragments: bool `[P]`, rows in the order of fragments.

    Polarizing may empty a row that was kept; where it is left out, later rows move up and meet others. So rows are
    assigned to fragments such that each has a single sign in every filter: each fragment takes `fragment` rows, and
    what lies between them and was left out must be zero. Of the rows p at which a fragment may begin, the last one
    before q reaches farthest; so whether one may begin at q follows from that p alone. Useless without one.
    """
    m = views.gemm().to(jnp.asarray(w))[views.position_order(w.shape, order)]
    rows = m.shape[0]
    index = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], m.shape)

    def following(flags: Array) -> Array:
        """The first row from each one on where a flag is set, in every filter; `rows` where there is none."""
        return lax.cummin(jnp.where(flags, index, rows), axis=0, reverse=True)

    live = jnp.any(nonzero(m), axis=1)
    before = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(live, dtype=jnp.int32)])  # live rows before each
    both = jnp.maximum(following(nonzero(m) & ~negative(m)), following(negative(m)))
    full = jnp.searchsorted(before, before[:-1] + fragment, side="right").astype(jnp.int32) - 1
    # a fragment that begins at p may end before any row up to reach[p]
    reach = jnp.concatenate([jnp.minimum(jnp.min(both, axis=1, initial=rows), full), jnp.full(1, rows, jnp.int32)])

    def step(last: Array, q: Array) -> tuple[Array, Array]:
        """`last[q]` is the last row up to q at which a fragment may begin; given out is where the one before began."""
        p = jnp.where(q >= fragment, last[jnp.maximum(q - fragment, 0)], -1)
        begins = (p >= 0) & (reach[jnp.maximum(p, 0)] >= q)
        return last.at[q].set(jnp.where(begins, q, last[q - 1])), p

    q = jnp.arange(1, rows + 1, dtype=jnp.int32)
    last, earlier = lax.scan(step, jnp.zeros(rows + 1, jnp.int32), q)
    earlier = jnp.concatenate([jnp.full(1, -1, jnp.int32), earlier])

    def back(at: Array, _: None) -> tuple[Array, Array]:
        return jnp.where(at > 0, earlier[at], -1), at

    _, begun = lax.scan(back, last[rows], None, length=rows // fragment + 1)
    first = jnp.zeros(rows + 1, jnp.int32).at[begun].set(1, mode="drop", wrap_negative_indices=False)[:rows]
    number = jnp.cumsum(first) - 1
    kept = jax.ops.segment_sum(live.astype(jnp.int32), number, rows // fragment + 1)
    dead = jnp.cumsum(~live, dtype=jnp.int32)
    begin = jax.ops.segment_min(jnp.arange(rows, dtype=jnp.int32), number, rows // fragment + 1)
    place = dead - jnp.concatenate([jnp.zeros(1, jnp.int32), dead])[begin[number]]  # among its fragment's zero rows
    return ~live & (place > fragment - kept[number])


def required(structure: Polarity, fragment: int) -> Array:
    """Whether each weight has to be negative (or 0): bool `[P, F]`, rows in the order of the GEMM view."""
    positions = structure.order.shape[0]
    place = jnp.zeros(positions, jnp.int32).at[structure.order].set(jnp.arange(positions, dtype=jnp.int32))
    return structure.negative[place // fragment]


def compact(w: Array, structure: Polarity, fragment: int) -> Array:
    """The fragments as they lie on the crossbar, kept rows first: `[ceil(P/fragment), fragment, F]`."""
    return _cut(views.gemm().to(jnp.asarray(w))[structure.order], fragment)


def flipped_share(w: Array, before: Polarity, after: Polarity, fragment: int) -> Array:
    """The share of fragments with a weight whose required sign is no longer that of `before`: float32 [], in 0..1."""
    flipped = jnp.any(_cut((required(before, fragment) != required(after, fragment))[after.order], fragment), axis=1)
    kept = jnp.any(nonzero(compact(w, after, fragment)), axis=1)
    return jnp.sum(flipped & kept, dtype=jnp.float32) / jnp.maximum(jnp.sum(kept, dtype=jnp.float32), 1)


def mixed_fragments(w: Array, structure: Polarity, fragment: int) -> Array:
    """How many fragments hold both signs: int32 [], 0 in a polarized weight."""
    pieces = compact(w, structure, fragment)
    below = negative(pieces)
    mixed = jnp.any(nonzero(pieces) & ~below, axis=1) & jnp.any(below, axis=1)
    return jnp.sum(mixed, dtype=jnp.int32)


def _cut(m: Array, fragment: int) -> Array:
    number = math.ceil(m.shape[0] / fragment)
    return jnp.pad(m, ((0, number * fragment - m.shape[0]), (0, 0))).reshape(number, fragment, m.shape[1])
