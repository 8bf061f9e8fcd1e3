"""Retraining inside the structure: an optax transform that keeps weights in the convex part of their set."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from compressx._harden import Hardened, agree, parts, prove, structures
from compressx.constraints.programs import programs
from compressx.rules import Bound, Rules, pairs, resolve
from compressx.tree import unboxed


class RetrainState(NamedTuple):
    """State of `retrain`.

    Attributes:
      active: name -> the constraint's active set (a mask, signs, ties, levels).
      structures: name -> the structure of each of its sets when retraining began.

    Example:
      >>> rules = [("kernel", compressx.unstructured(keep=1))]
      >>> hard = compressx.harden({"kernel": jnp.asarray([[3.0, 1.0]])}, rules, fresh=True)
      >>> state = compressx.retrain(rules, hard).init(hard.params)
      >>> print(state.active["kernel"])
      [[ True False]]
    """

    active: dict[str, Any]
    structures: dict[str, tuple[Any, ...]]


def retrain(rules: Rules, hard: Hardened | Mapping[str, Any] | None = None) -> optax.GradientTransformationExtraArgs:
    """Keeps every constrained leaf inside the part of its set in which it starts; put it **last** in the chain.

        W <- P_active(W + update),   active = the mask, sign cone, tied magnitudes or levels of the hardened weights

    Neither momentum nor weight decay can bring a pruned weight back: zeros stay exactly 0 after every step.

    Args:
      rules: the rules the weights were hardened with.
      hard: what `harden` returned, or its structures; None: chosen anew from the weights that `init` is given, which do
        not always tell.

    Returns:
      A transform with a `RetrainState`; `init` takes `hard.params`, `update` needs `params`. Its updates land in the
      active set up to one rounding of the addition `params + update` (masks, signs and ties exactly); `retract` makes
      levels exact as well.

    Raises:
      ConstraintViolation: at `init`, the weights do not lie in their sets with those structures, so that the first step
        would take kept weights away. Where `init` is traced (under jit, vmap, eval_shape) there are no weights to look
        at and nothing is raised: call `check(hard, rules)` before.

    Source: masked retraining of T. Zhang et al., "A Systematic DNN Weight Pruning Framework using Alternating
    Direction Method of Multipliers", 2018, made to hold for every set.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> hard = compressx.harden(params, rules, fresh=True)
      >>> tx = optax.chain(optax.sgd(0.1), compressx.retrain(rules, hard))
      >>> state, params = tx.init(hard.params), hard.params
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> print(params["dense"]["kernel"])  # what was pruned stays exactly 0
      [[ 0.  -5.1]
       [ 3.9  0. ]]
    """
    rules = pairs(rules)
    given = hard.structures if isinstance(hard, Hardened) else hard

    def init_fn(params: Any) -> RetrainState:
        params, held = parts(params, given if not isinstance(params, Hardened) else None)
        chosen = structures(params, rules) if held is None else jax.tree.map(jnp.copy, held)
        bound, leaves = resolve(rules, params), jax.tree.leaves(params)
        chosen = agree(chosen, bound, leaves, "what is given as structures")
        if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((params, chosen))):
            prove(params, rules, chosen, chosen=held is None)
        active = {b.name: b.freeze(b.take(leaves), chosen[b.name]) for b in bound}
        return RetrainState(active, jax.tree.map(jnp.copy, chosen))  # no buffer twice: the state may be donated

    def update_fn(updates: Any, state: RetrainState, params: Any = None, **extra_args: Any) -> tuple[Any, RetrainState]:
        del extra_args
        if params is None:
            raise ValueError("retrain needs the parameters: call update(updates, state, params)")
        leaves, treedef = jax.tree.flatten(params)
        moves = treedef.flatten_up_to(updates)  # type: ignore[attr-defined]
        stays = [d is None or isinstance(d, optax.MaskedNode) for d in moves]  # frozen leaves: nothing moves them
        moved = [w if stay else w + d.astype(w.dtype) for w, d, stay in zip(leaves, moves, stays, strict=True)]
        for b in resolve(rules, params):
            target = list(leaves)
            b.put(target, _retract(b, b.take(moved), state))
            for i in b.indices:
                if not stays[i]:
                    moves[i] = (target[i] - leaves[i]).astype(moves[i].dtype)
        return jax.tree.unflatten(treedef, moves), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _retract(b: Bound, w: Any, state: RetrainState) -> Any:
    return b.retract(w, state.active[b.name])


def retract(params: Any, rules: Rules, state: Any) -> Hardened:
    """Retrained weights at the nearest point of their active sets, to the bit, with the levels they lie on (pure).

    Args:
      params: any pytree of arrays, as retraining left them.
      rules: those of `retrain`.
      state: the optimizer's state, or the `RetrainState` in it.

    Returns:
      What `check`, `save_model`, `compile` and a further `retrain` take. Scales and codebooks are those that retraining
      moved to; signs, libraries and orders are as they were.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> hard = compressx.harden(params, rules, fresh=True)
      >>> tx = optax.chain(optax.sgd(0.1), compressx.retrain(rules, hard))
      >>> state, params = tx.init(hard.params), hard.params
      >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> compressx.check(compressx.retract(params, rules, state), rules)
    """
    held = state if isinstance(state, RetrainState) else find_state(state)
    leaves, treedef = jax.tree.flatten(params)
    moved = {}
    for b in resolve(rules, params):
        w, active = b.take(leaves), held.active[b.name]
        each = active if b.constraint.parts else (active,)
        structures = []
        for (part, structure), a in zip(b.constraint.each(held.structures[b.name]), each, strict=True):
            move = programs(part).moved
            structures.append(move(w, a) if move else structure)
        moved[b.name] = tuple(structures)
        b.put(leaves, _retract(b, w, held))
    return Hardened(jax.tree.unflatten(treedef, leaves), moved)


def find_state(opt_state: Any) -> RetrainState:
    """The `RetrainState` inside any optimizer state.

    Args:
      opt_state: the state of any optax transform.

    Returns:
      The state of `retrain`.

    Raises:
      ValueError: there is none, or more than one.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> hard = compressx.harden(params, rules, fresh=True)
      >>> state = optax.chain(optax.sgd(0.1), compressx.retrain(rules, hard)).init(hard.params)
      >>> compressx.find_retrain_state(state).active["dense/kernel"].tolist()
      [[False, True], [True, False]]
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, RetrainState))
    found = [s for s in leaves if isinstance(s, RetrainState)]
    if len(found) != 1:
        raise ValueError(f"expected one RetrainState in the optimizer state, found {len(found)}")
    state: RetrainState = unboxed(found[0])
    return state
