"""How much of what training chooses a refresh of ADMM changes: fragment signs, patterns, sizes of blocks."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from compressx._admm_state import AdmmState, like
from compressx.constraints.programs import programs
from compressx.rules import Bound, Rules, pairs, resolve


class Watched(NamedTuple):
    """State of `watch_refreshes`.

    Attributes:
      admm: of the watched transform.
      changed: name -> float32 [], what the leaf's set says changed at the last refresh; -1 before the first.
    """

    admm: AdmmState
    changed: dict[str, Array]


def watch_refreshes(
    inner: optax.GradientTransformationExtraArgs, rules: Rules, refresh_every: int
) -> optax.GradientTransformationExtraArgs:
    """`admm(rules, refresh_every=...)`, keeping for each leaf how much of its structure the last refresh changed.

    Leaves none of whose sets has `Constraint.changed` are not watched. Read it with `changes`.
    """
    rules = pairs(rules)

    def watched(params: Any) -> list[tuple[Bound, int]]:
        firsts = []
        for b in resolve(rules, params):
            places = [k for k, part in enumerate(b.constraint.sets) if part.changed is not None]
            firsts += [(b, k) for k in places[:1]]
        return firsts

    def init_fn(params: Any) -> Watched:
        return Watched(inner.init(params), {b.name: jnp.full((), -1, jnp.float32) for b, _ in watched(params)})

    def update_fn(updates: Any, state: Watched, params: Any = None, **extra_args: Any) -> tuple[Any, Watched]:
        before = state.admm
        updates, after = inner.update(updates, before, params, **extra_args)

        def compare() -> dict[str, Array]:
            found = {}
            for b, k in watched(params):
                z, (old, new) = b.take(like(params, after.z[k])), (s.structure[b.name][k] for s in (before, after))
                found[b.name] = programs(b.constraint.sets[k]).changed(z, old, new).astype(jnp.float32)  # type: ignore[misc]
            return found

        fresh = (after.updates != before.updates) & (after.updates % refresh_every == 0)
        return updates, Watched(after, lax.cond(fresh, compare, lambda: state.changed))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def changes(opt_state: Any) -> dict[str, Array]:
    """What the last refresh changed, by name, of the leaves that are watched and have had one (on the host)."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, Watched))
    found = [s.changed for s in leaves if isinstance(s, Watched)]
    return {n: v for changed in found for n, v in jax.device_get(changed).items() if v >= 0}
