"""The state of ADMM: what it holds, and how it is read out of any optimizer state.

`compressx.admm` makes and updates it, `compressx.harden` takes the structures from it, and a run logs its residuals.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compressx.rules import Rules
from compressx.tree import unboxed


class AdmmState(NamedTuple):
    """State of `admm`. Names are those of `rules.Bound` (a leaf's path, or a joint rule's pattern).

    Attributes:
      step: int32 [], gradient steps done.
      updates: int32 [], Z and U updates done.
      z: one tree per set number, shaped as params; unconstrained leaves (and leaves with fewer sets) are
        `optax.MaskedNode()`, which stores nothing. Dtype and sharding of the leaf.
      center: Z_k - U_k, likewise: the proximal centre, towards which the penalty moves W.
      structure: name -> tuple over sets of the structure of the set.
      rho: name -> float32 [].
      primal: name -> float32 [sets], ||W - Z_k|| / ||W|| at the last update; the largest number before the first.
      dual: name -> float32 [sets], ||Z_k - Z_k previous|| / ||W|| at the last update.

    Example:
      >>> tx = compressx.admm([("kernel", compressx.unstructured(keep=1))], rho=0.5)
      >>> state = tx.init({"kernel": jnp.asarray([[3.0, 1.0]]), "bias": jnp.zeros(2)})
      >>> print(state.z[0]["kernel"], float(state.rho["kernel"]))
      [[3. 0.]] 0.5

    Source: S. Boyd et al., 2011, 3.1.1 (the scaled form).
    """

    step: Array
    updates: Array
    z: tuple[Any, ...]
    center: tuple[Any, ...]
    structure: dict[str, tuple[Any, ...]]
    rho: dict[str, Array]
    primal: dict[str, Array]
    dual: dict[str, Array]

    @property
    def u(self) -> tuple[Any, ...]:
        """The scaled duals U_k, shaped as `z`."""
        return jax.tree.map(jnp.subtract, self.z, self.center)


def like(params: Any, tree: Any) -> list[Any]:
    """What a Z or U tree holds at each leaf of params: an array, or a `MaskedNode`."""
    return jax.tree.structure(params).flatten_up_to(tree)  # type: ignore[attr-defined]


def find_state(opt_state: Any) -> AdmmState:
    """The `AdmmState` inside any optimizer state (a chain, `MultiSteps`, `partition`, ...).

    Args:
      opt_state: the state of any optax transform.

    Returns:
      The state of `admm`.

    Raises:
      ValueError: there is none, or more than one; or it comes last in a chain, after an optimizer, whose learning rate
        its penalty then has not seen.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> state = optax.chain(compressx.admm(rules), optax.adam(1e-3)).init(params)
      >>> int(compressx.find_admm_state(state).updates)
      0
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda x: isinstance(x, AdmmState))
    found = [s for s in leaves if isinstance(s, AdmmState)]
    if len(found) != 1:
        raise ValueError(f"expected one AdmmState in the optimizer state, found {len(found)}")
    state = found[0]
    if _follows_an_optimizer(opt_state):
        raise ValueError(
            "admm comes after the optimizer, so that its penalty is no gradient but a step, added to the weights with "
            "the wrong sign: write optax.chain(compressx.admm(...), optax.adam(...)), and train again"
        )
    plain = {name: unboxed(getattr(state, name)) for name in AdmmState._fields if name not in ("z", "center")}
    return state._replace(**plain)


def _follows_an_optimizer(opt_state: Any) -> bool:
    """Whether the chain that holds the ADMM state ends with it and has an optimizer of several parts before."""
    if isinstance(opt_state, AdmmState) or not isinstance(opt_state, tuple | list | dict):
        return False
    parts = list(opt_state.values() if isinstance(opt_state, dict) else opt_state)
    chain = type(opt_state) is tuple
    if chain and parts and isinstance(parts[-1], AdmmState):
        return any(type(p) is tuple or hasattr(p, "inner_state") for p in parts[:-1])
    return not chain and any(map(_follows_an_optimizer, parts))


def by_set(primal: Mapping[str, Any], dual: Mapping[str, Any], rules: Rules) -> dict[str, dict[str, float]]:
    """The residuals of the leaves that lie in several sets, an entry for each: `<name> <kind of set>`.

    Args:
      primal, dual: of an `AdmmState`, on the host.
      rules: those of `admm`.

    Returns:
      `primal_by_set` and `dual_by_set`; a second set of a kind is called `<kind> 2`. Empty where no leaf has several.
    """
    out: dict[str, dict[str, float]] = {"primal_by_set": {}, "dual_by_set": {}}
    for name in primal:
        held = next(c for pattern, c, *_ in rules if name == pattern or re.fullmatch(pattern, name))
        kinds = [p.spec["kind"] for p in held.parts] if held is not None else []
        for k, kind in enumerate(kinds):
            number = kinds[: k + 1].count(kind)
            key = f"{name} {kind}" + (f" {number}" if number > 1 else "")
            out["primal_by_set"][key], out["dual_by_set"][key] = float(primal[name][k]), float(dual[name][k])
    return out if out["primal_by_set"] else {}


def metrics(opt_state: Any) -> dict[str, Array]:
    """rho and the residuals as a flat dictionary: `primal/<name>`, `dual/<name>` (largest over sets), `rho/<name>`.

    Args:
      opt_state: any optimizer state that holds one `AdmmState`.

    Returns:
      name -> float32 [], on the device; the largest number for a residual before the first update.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> state = optax.chain(compressx.admm(rules, rho=0.5), optax.adam(1e-3)).init(params)
      >>> sorted(compressx.admm_metrics(state))
      ['dual/dense/kernel', 'primal/dense/kernel', 'rho/dense/kernel']
    """
    state = find_state(opt_state)
    out = {f"primal/{n}": jnp.max(v) for n, v in state.primal.items()}
    out |= {f"dual/{n}": jnp.max(v) for n, v in state.dual.items()}
    return out | {f"rho/{n}": v for n, v in state.rho.items()}
