"""The matrix on which a structure is cut: one weight's, or all gates of a recurrent cell side by side.

A recurrent cell stores a matrix `[in, out]` for each gate. With `scope="leaf"` every matrix is a weight of its own.
With `scope="rule"` the matrices that one rule matches are joined along their outputs, `[in, out_1 + out_2 + ...]` in
leaf order, and ranked as one: input and recurrent matrices, and different layers, need rules of their own.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from compressx import views
from compressx.constraints.base import SCOPES, Constraint, check_choice, tree_where

_VIEW = views.gemm()


def join(w: Any, together: bool) -> Array:
    """The matrix `[in, out]` of a leaf (its GEMM view), or of a tuple of leaves joined along their outputs."""
    if not together:
        return _VIEW.to(w)
    parts = [_VIEW.to(x) for x in w]
    if len({p.shape[0] for p in parts}) > 1:
        raise ValueError(
            f'matrices joined by scope="rule" need the same inputs, got shapes {[x.shape for x in w]}; '
            "give input and recurrent matrices, and each layer, a rule of their own"
        )
    return jnp.concatenate(parts, axis=1)


def split(m: Array, w: Any, together: bool) -> Any:
    """Inverse of `join`: m cut and shaped like w."""
    if not together:
        return _VIEW.back(m, w.shape)
    out, at = [], 0
    for x in w:
        out.append(_VIEW.back(m[:, at : at + x.shape[-1]], x.shape))
        at += x.shape[-1]
    return tuple(out)


def matrix_set(
    scope: str,
    init: Callable[[Array], Any],
    select: Callable[[Array, Any], Array],
    alive: Callable[[Array, Any], Array],
) -> Constraint:
    """A set of supports of a matrix; `constraints.support` with a structure, on a leaf or on all leaves of a rule.

    Args:
      scope: "leaf", or "rule" to join the leaves of a rule.
      init: `init(m) -> structure`.
      select: `select(m, structure) -> mask`, the admissible support of largest energy.
      alive: `alive(m, structure) -> mask`, the positions where a feasible m may move in retraining.
    """
    check_choice("scope", scope, SCOPES)
    together = scope == "rule"

    def on_leaves(choose: Callable[[Array, Any], Array]) -> Callable[[Any, Any], Any]:
        return lambda w, s: split(choose(join(w, together), s), w, together)

    stays, moves = on_leaves(select), on_leaves(alive)
    return Constraint(
        spec={"kind": "matrix"},
        init=lambda w: init(join(w, together)),
        project=lambda w, s: tree_where(stays(w, s), w),
        refresh=lambda w, s: s,
        freeze=moves,
        retract=lambda w, active: tree_where(active, w),
        joint=together,
    )
