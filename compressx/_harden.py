"""Hardening: the weights are projected once onto their sets, and the result is checked against every one of them."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from compressx._admm import AdmmState
from compressx.constraints.base import Constraint, violations
from compressx.constraints.floats import nonzero
from compressx.rules import Bound, Rules, resolve
from compressx.tree import check_finite


class ConstraintViolation(ValueError):
    """Weights that should lie in a set do not; the text names the leaf, the set and how many entries are outside."""


def structures(params: Any, rules: Rules, state: AdmmState | None = None) -> dict[str, Any]:
    """What every set leaves open (signs, libraries, scales), by name: as in ADMM's state, or chosen for params.

    What in ADMM's state follows from the zeros of other sets (the order of the rows in polarized fragments) is formed
    anew where these zeros are others by now.

    Take them before hardening, for the weights that are hardened, and hand them to every later phase: hardened weights
    do not always tell with which library, order or scale they were hardened. Chosen for weights that lie in their sets
    already, they are such that the weights stay where they are, wherever those can be found; `check` tells.
    """
    leaves = jax.tree.leaves(params)
    out = {}
    for b in resolve(rules, params):
        if state is None:
            out[b.name] = b.constraint.init(b.take(leaves))
        else:
            each = _settled(b.constraint, b.take(leaves), state.structure[b.name])
            out[b.name] = each if b.constraint.parts else each[0]
    return out


def _settled(constraint: Constraint, w: Any, each: tuple[Any, ...]) -> tuple[Any, ...]:
    """The structures of an ADMM state, made to agree with the zeros that the projection of w will have."""
    last = max((k for k, p in enumerate(constraint.sets) if p.settle), default=-1)
    out = list(each)
    for k, part in enumerate(constraint.sets[: last + 1]):
        if part.settle:
            out[k] = part.settle(w, out[k])
        if k < last:
            w = part.project(w, out[k])
    return tuple(out)


def project(params: Any, rules: Rules, structure: dict[str, Any]) -> Any:
    """Every constrained leaf at its nearest point of its set (pure, jits); the other leaves are untouched."""
    leaves, treedef = jax.tree.flatten(params)
    for b in resolve(rules, params):
        b.put(leaves, b.constraint.project(b.take(leaves), structure[b.name]))
    return jax.tree.unflatten(treedef, leaves)


def count_violations(params: Any, rules: Rules, structure: dict[str, Any]) -> dict[str, Array]:
    """How many entries of every constrained leaf lie outside its sets, by name (int32; pure, jits)."""
    leaves = jax.tree.leaves(params)
    return {b.name: violations(b.constraint, b.take(leaves), structure[b.name]) for b in resolve(rules, params)}


def harden(params: Any, rules: Rules, state: AdmmState | None = None) -> Any:
    """Projects every constrained leaf onto its sets, once, and proves that it lies in all of them.

    Args:
      params: any pytree of concrete arrays.
      rules: pairs (pattern, constraint).
      state: the ADMM state (`admm.find_state`), whose signs, libraries and scales are then used.

    Returns:
      Parameters that satisfy every rule exactly.

    Raises:
      ValueError: a leaf holds NaN or infinity.
      ConstraintViolation: a projected leaf does not lie in one of its sets.
    """
    check_finite(params)
    structure = structures(params, rules, state)
    hard = jax.jit(lambda p, s: project(p, rules, s))(params, structure)
    check(hard, rules, structure)
    return hard


def check(params: Any, rules: Rules, structure: dict[str, Any] | None = None) -> None:
    """Raises `ConstraintViolation` unless every constrained leaf lies in its sets exactly, to the bit.

    Args:
      params: any pytree of concrete arrays.
      rules: pairs (pattern, constraint).
      structure: what the sets leave open, as `structures` returned it before hardening; None: chosen anew for params.
    """
    prove(params, rules, structures(params, rules) if structure is None else structure, structure is None)


def prove(params: Any, rules: Rules, structure: dict[str, Any], chosen: bool) -> None:
    """`check`, where the structure may just have been `chosen` for the weights: the error then says what to do."""
    counts = outside(params, rules, structure)
    bad = [(b, counts[b.name]) for b in resolve(rules, params) if counts[b.name]]
    if not bad:
        return
    lines = "\n  ".join(f"{b.name}: {n} entries outside {b.constraint}" for b, n in bad)
    advice = "were they hardened with these rules, and moved inside their sets since (retrain, retract)?"
    if chosen:
        advice += (
            " What the sets leave open (libraries, orders, sizes, scales) was chosen anew for these weights. If"
            " hardening chose otherwise, pass its choice on: structures(params, rules, state) of the weights before"
            " harden(params, rules, state) is what retrain, check and save_model take"
        )
    raise ConstraintViolation(f"weights do not satisfy their constraints:\n  {lines}\n{advice}")


def in_their_precision(tree: Any) -> AbstractContextManager[Any]:
    """A context in which the arrays of a tree are computed with as they are: no float64 is cut to float32."""
    cut = any(jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype for x in jax.tree.leaves(tree))
    return jax.enable_x64(True) if cut else nullcontext()


def outside(params: Any, rules: Rules, structure: dict[str, Any]) -> dict[str, int]:
    """`count_violations` of concrete arrays, compiled, of the numbers as they are."""
    bound, leaves = resolve(rules, params), jax.tree.leaves(params)
    held = {b.name: b.take(leaves) for b in bound}
    with in_their_precision(held):
        count = jax.jit(lambda w, s: {b.name: violations(b.constraint, w[b.name], s[b.name]) for b in bound})
        counts = jax.device_get(count(held, {b.name: structure[b.name] for b in bound}))
    return {name: int(n) for name, n in counts.items()}


def kept(params: Any, bound: tuple[Bound, ...]) -> dict[str, tuple[int, int]]:
    """`path -> (non-zero weights, all weights)` of every constrained leaf."""
    leaves = jax.tree.leaves(params)
    pairs = [(p, leaves[i]) for b in bound for p, i in zip(b.paths, b.indices, strict=True)]
    return {p: (int(jnp.sum(nonzero(w))), w.size) for p, w in pairs}
