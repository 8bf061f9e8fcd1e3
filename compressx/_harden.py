"""Hardening: the weights are projected once onto their sets, and the result is checked against every one of them."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx._admm_state import AdmmState, find_state
from compressx.constraints.floats import nonzero
from compressx.constraints.programs import programs
from compressx.rules import Bound, Rules, pairs, resolve
from compressx.tree import check_finite, described, in_their_precision


class ConstraintViolation(ValueError):
    """Weights that should lie in a set do not; the text names the leaf, the set and how many entries are outside.

    Example:
      >>> params = {"kernel": jnp.ones((2, 2))}
      >>> try:
      ...     compressx.check(params, [("kernel", compressx.unstructured(keep=1))])
      ... except compressx.ConstraintViolation as error:
      ...     print(str(error).splitlines()[1].strip())
      kernel: 3 entries outside unstructured(keep=1, scope=leaf)
    """


class Hardened(NamedTuple):
    """Weights that lie in their sets, and the structure of their sets; a pytree.

    Attributes:
      params: the tree that was given, every constrained leaf in its sets.
      structures: name of a leaf (or of a joint rule) -> a structure for each set of its constraint (signs of fragments,
        pattern library, block sizes, scale; `()` for a set without one).

    Example:
      >>> rules = [("kernel", compressx.quantize(2))]
      >>> hard = compressx.harden({"kernel": jnp.asarray([[3.0, 1.0]])}, rules, fresh=True)
      >>> print(hard.params["kernel"], hard.structures["kernel"][0])  # two bits: one level of each sign
      [[2. 2.]] 2.0
    """

    params: Any
    structures: dict[str, tuple[Any, ...]]


def parts(weights: Any, structures: Any = None) -> tuple[Any, dict[str, Any] | None]:
    """Parameters and structures, of a `Hardened` (or a `SavedModel`), or as they are given side by side.

    Raises:
      ValueError: structures are given twice.
    """
    if not (hasattr(weights, "params") and hasattr(weights, "structures")):
        if isinstance(structures, Hardened):
            structures = structures.structures
        return weights, None if structures is None else dict(structures)
    if structures is not None:
        raise ValueError("structures are given twice: those of the hardened weights are used, leave the argument out")
    return weights.params, dict(weights.structures)


def structures(params: Any, rules: Rules, state: Any = None) -> dict[str, tuple[Any, ...]]:
    """The structure of every set (signs, libraries, scales), by name: as in ADMM's state, or chosen for params.

    What in ADMM's state follows from the zeros of other sets (the order of the rows in polarized fragments) is formed
    anew where these zeros are others by now. Chosen for weights that lie in their sets already, structures are such
    that the weights stay where they are, wherever those can be found; `check` tells.

    Args:
      params: any pytree of arrays.
      rules: pairs (pattern, constraint).
      state: an `AdmmState`, or any optimizer state that holds one; None: chosen for params.

    Returns:
      name -> a structure for each set of its constraint, as in `Hardened`.

    Example:
      >>> params = {"kernel": jnp.asarray([[0.5, -1.0, 1.5]])}
      >>> held = compressx.structures(params, [("kernel", compressx.quantize(3))])
      >>> print(held["kernel"][0])  # the scale
      0.5
    """
    leaves = jax.tree.leaves(params)
    bound = resolve(rules, params)
    if state is None:
        return {b.name: b.choose(b.take(leaves)) for b in bound}
    held = state if isinstance(state, AdmmState) else find_state(state)
    given = agree(held.structure, bound, leaves, "ADMM's state")
    return {b.name: _settled(b, b.take(leaves), given[b.name]) for b in bound}


def agree(
    given: Mapping[str, Any], bound: tuple[Bound, ...], leaves: Sequence[Any], what: str
) -> dict[str, tuple[Any, ...]]:
    """Structures as a `Hardened` has them, a tuple over the sets for each name.

    Raises:
      ValueError: they are not those of these rules on this tree.
    """
    names = [b.name for b in bound]
    if set(given) != set(names):
        odd = ", ".join(sorted(set(given) ^ set(names))[:4])
        raise ValueError(
            f"{what} and the rules disagree on {odd}: it holds {_some(given)}, the rules apply to {_some(names)}. Use "
            "the rules and the tree of parameters that it was made with (all variables of a model, or its params alone)"
        )
    out = {}
    for b in bound:
        try:
            out[b.name] = tuple(s for _, s in b.constraint.each(given[b.name]))
        except ValueError as error:
            raise ValueError(f"{b.name}: {what} is of other rules: {error}") from None
        expected = jax.eval_shape(b.choose, jax.tree.map(described, b.take(leaves)))
        wanted, found = (jax.tree.map(np.shape, x) for x in (expected, out[b.name]))
        kinds: list[Any] = [jax.tree.structure(x) for x in (expected, out[b.name])]
        same = kinds[0] == kinds[1]
        if not same or wanted != found:
            raise ValueError(f"{b.name}: {what} is of other rules: {b.constraint} needs shapes {wanted}, got {found}")
    return out


def _some(names: Iterable[str]) -> str:
    listed = sorted(names)
    return ", ".join(listed[:4]) + (f" and {len(listed) - 4} more" if len(listed) > 4 else "") or "nothing"


def _settled(b: Bound, w: Any, structures: tuple[Any, ...]) -> tuple[Any, ...]:
    """The structures of an ADMM state, made to agree with the zeros that the projection of w will have."""
    sets = b.constraint.each(structures)
    last = max((k for k, (part, _) in enumerate(sets) if part.settle), default=-1)
    out = list(structures)
    for k, (part, _) in enumerate(sets[: last + 1]):
        settle = programs(part).settle
        if settle:
            out[k] = settle(w, out[k])
        if k < last:
            w = programs(part).project(w, out[k])
    return tuple(out)


def project(params: Any, rules: Rules, structures: Mapping[str, Any]) -> Any:
    """Every constrained leaf at its nearest point of its set (pure, jits); the other leaves are untouched."""
    leaves, treedef = jax.tree.flatten(params)
    for b in resolve(rules, params):
        b.put(leaves, b.project(b.take(leaves), structures[b.name]))
    return jax.tree.unflatten(treedef, leaves)


def count_violations(params: Any, rules: Rules, structures: Mapping[str, Any]) -> dict[str, Array]:
    """How many entries of every constrained leaf lie outside its sets, by name (int32; pure, jits).

    Args:
      params: any pytree of arrays.
      rules: pairs (pattern, constraint).
      structures: the structure of the sets, as in `Hardened`.

    Returns:
      name -> int32 [], 0 where the leaf lies in its sets.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> held = compressx.structures(params, rules)
      >>> {name: int(n) for name, n in compressx.count_violations(params, rules, held).items()}
      {'dense/kernel': 2}
    """
    leaves = jax.tree.leaves(params)
    return {b.name: b.violations(b.take(leaves), structures[b.name]) for b in resolve(rules, params)}


def harden(params: Any, rules: Rules, state: Any = None, *, fresh: bool = False) -> Hardened:
    """Projects every constrained leaf onto its sets, once, and proves that it lies in all of them.

    Args:
      params: any pytree of arrays. Under `jit` or `vmap` they are projected alike, and nothing can be proved: `check`
        what comes out.
      rules: pairs (pattern, constraint).
      state: the optimizer's state after training with `admm`, in which the ADMM state is found; its signs, libraries
        and scales are used.
      fresh: choose them for these weights instead: for weights that ADMM did not train (one-shot baselines).

    Returns:
      The parameters, every rule satisfied exactly, and the structures under which it is: what `retrain`, `check`,
      `save_model` and `compile` take.

    Raises:
      ValueError: a constrained leaf holds NaN or infinity; there is no state, and a set has a structure to choose (a
        scale, signs, a library); the state is of other rules.
      ConstraintViolation: a projected leaf does not lie in one of its sets.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> hard = compressx.harden(params, rules, fresh=True)  # one-shot; after ADMM: its opt_state
      >>> print(hard.params["dense"]["kernel"])
      [[ 0. -5.]
       [ 4.  0.]]
      >>> hard.structures  # a support has no structure
      {'dense/kernel': ((),)}
    """
    if fresh and state is not None:
        raise ValueError("harden takes ADMM's state or fresh=True, not both")
    rules = pairs(rules)
    leaves = jax.tree.leaves(params)
    held = {p: leaves[i] for b in resolve(rules, params) for p, i in zip(b.paths, b.indices, strict=True)}
    traced = any(isinstance(x, jax.core.Tracer) for x in held.values())
    if not traced:
        check_finite(held)
    if state is None and not fresh:
        _refuse_to_choose(params, rules)
    structure = structures(params, rules, state)
    hard = project(params, rules, structure)
    if not traced:
        check(hard, rules, structure)
    return Hardened(hard, structure)


def _refuse_to_choose(params: Any, rules: Rules) -> None:
    """Raises ValueError where a set has a structure that training chose and nobody has given."""
    bound, leaves = resolve(rules, params), jax.tree.leaves(params)
    for b in bound:
        for part, open_part in b.constraint.each(jax.eval_shape(b.choose, b.take(leaves))):
            if jax.tree.leaves(open_part):
                raise ValueError(
                    f"{b.name}: {part} has a structure that training chose (signs, a library, a scale). Pass the "
                    "optimizer's state, harden(params, rules, opt_state); or fresh=True to choose anew, for weights "
                    "that ADMM did not train"
                )


def check(weights: Any, rules: Rules, structures: Mapping[str, Any] | None = None) -> None:
    """Raises `ConstraintViolation` unless every constrained leaf lies in its sets exactly, to the bit.

    Args:
      weights: a `Hardened`, or any pytree of concrete arrays.
      rules: pairs (pattern, constraint).
      structures: the structure of the sets, beside plain parameters; None: chosen anew for them.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> compressx.check(compressx.harden(params, rules, fresh=True), rules)
      >>> compressx.check(params, rules)  # doctest: +ELLIPSIS
      Traceback (most recent call last):
      compressx._harden.ConstraintViolation: weights do not satisfy their constraints:
        dense/kernel: 2 entries outside unstructured(density=0.5, scope=leaf)
      ...
    """
    rules = pairs(rules)
    params, given = parts(weights, structures)
    prove(params, rules, _choose(params, rules) if given is None else given, given is None)


_choose = structures  # `check` has an argument of that name


def prove(params: Any, rules: Rules, structures: Mapping[str, Any], chosen: bool) -> None:
    """`check`, where the structures may just have been `chosen` for the weights: the error then says what to do."""
    bound = resolve(rules, params)
    structures = agree(structures, bound, jax.tree.leaves(params), "what is given as structures")
    counts = outside(params, rules, structures)
    bad = [(b, counts[b.name]) for b in bound if counts[b.name]]
    if not bad:
        return
    lines = "\n  ".join(f"{b.name}: {n} entries outside {b.constraint}" for b, n in bad)
    advice = "were they hardened with these rules, and moved inside their sets since (retrain, retract)?"
    if chosen:
        advice += (
            " The structure of the sets (libraries, orders, sizes, scales) was chosen anew for these weights. If"
            " hardening chose otherwise, pass its choice on: retrain, check and save_model take what"
            " harden(params, rules, opt_state) returns, or its structures beside weights that have moved since"
        )
    raise ConstraintViolation(f"weights do not satisfy their constraints:\n  {lines}\n{advice}")


def outside(params: Any, rules: Rules, structures: Mapping[str, Any]) -> dict[str, int]:
    """`count_violations` of concrete arrays, compiled, of the numbers as they are."""
    bound, leaves = resolve(rules, params), jax.tree.leaves(params)
    held = {b.name: b.take(leaves) for b in bound}
    with in_their_precision(held):
        counts = jax.device_get({b.name: b.violations(held[b.name], structures[b.name]) for b in bound})
    return {name: int(n) for name, n in counts.items()}


def kept(params: Any, bound: tuple[Bound, ...]) -> dict[str, tuple[int, int]]:
    """`path -> (non-zero weights, all weights)` of every constrained leaf."""
    leaves = jax.tree.leaves(params)
    pairs = [(p, leaves[i]) for b in bound for p, i in zip(b.paths, b.indices, strict=True)]
    return {p: (int(jnp.sum(nonzero(w))), w.size) for p, w in pairs}
