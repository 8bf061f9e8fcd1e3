"""Retraining inside the structure: an optax transform that keeps weights in the convex piece they landed in."""

from typing import Any, NamedTuple

import jax
import optax

from compressx._harden import prove, structures
from compressx.rules import Bound, Rules, resolve


class RetrainState(NamedTuple):
    """State of `retrain`.

    Attributes:
      piece: name -> the constraint's frozen piece (a mask, signs, ties, levels).
    """

    piece: dict[str, Any]


def retrain(rules: Rules, structure: dict[str, Any] | None = None) -> optax.GradientTransformationExtraArgs:
    """Keeps every constrained leaf inside the part of its set in which it starts; put it **last** in the chain.

        W <- P_piece(W + update),   piece = the mask, sign cone, tied magnitudes or levels of the hardened weights

    Neither momentum nor weight decay can bring a pruned weight back: zeros stay exactly 0 after every step.

    Args:
      rules: the rules the weights were hardened with.
      structure: what the sets left open, from `harden.structures` of the weights before hardening; by default chosen
        anew from the hardened weights, which do not always tell.

    Returns:
      A transform with a `RetrainState`; `update` needs `params`. Its updates land in the piece up to one rounding of
      the addition `params + update` (masks, signs and ties exactly); `retract` makes levels exact as well.

    Raises:
      ConstraintViolation: at `init`, the weights do not lie in their sets with that structure, so that the first step
        would take kept weights away. Where `init` is traced (under jit, vmap, eval_shape) there are no weights to look
        at and nothing is raised: call `harden.check(params, rules, structure)` before.
    """

    def init_fn(params: Any) -> RetrainState:
        given = structures(params, rules) if structure is None else structure
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, given))):
            prove(params, rules, given, chosen=structure is None)
        leaves = jax.tree.leaves(params)
        piece = {}
        for b in resolve(rules, params):
            piece[b.name] = b.constraint.freeze(b.take(leaves), given[b.name])
        return RetrainState(piece)

    def update_fn(updates: Any, state: RetrainState, params: Any = None, **extra_args: Any) -> tuple[Any, RetrainState]:
        del extra_args
        if params is None:
            raise ValueError("retrain needs the parameters: call update(updates, state, params)")
        leaves = jax.tree.leaves(params)
        moves, treedef = jax.tree.flatten(updates)
        for b in resolve(rules, params):
            w = b.take(leaves)
            target = _retract(b, jax.tree.map(lambda w, d: w + d.astype(w.dtype), w, b.take(moves)), state)
            b.put(moves, jax.tree.map(lambda t, w, d: (t - w).astype(d.dtype), target, w, b.take(moves)))
        return jax.tree.unflatten(treedef, moves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _retract(b: Bound, w: Any, state: RetrainState) -> Any:
    return b.constraint.retract(w, state.piece[b.name])


def retract(params: Any, rules: Rules, state: RetrainState) -> Any:
    """Every constrained leaf at the nearest point of its piece (pure); keeps levels exact where a loop wants that."""
    leaves, treedef = jax.tree.flatten(params)
    for b in resolve(rules, params):
        b.put(leaves, _retract(b, b.take(leaves), state))
    return jax.tree.unflatten(treedef, leaves)


def find_state(opt_state: Any) -> RetrainState:
    """The `RetrainState` inside any optimizer state.

    Raises:
      ValueError: there is none, or more than one.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, RetrainState))
    found = [s for s in leaves if isinstance(s, RetrainState)]
    if len(found) != 1:
        raise ValueError(f"expected one RetrainState in the optimizer state, found {len(found)}")
    return found[0]
