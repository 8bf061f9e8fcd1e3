"""ADMM as an optax gradient transformation: the penalty, the Z and U updates, rho, the residuals.

    minimise f(W)  subject to  W in S_1, ..., W in S_n          (the sets of each leaf's constraint)

    gradient:      g + rho * sum_k (W - Z_k + U_k)               every step
    every `every` steps:  Z_k <- P_k(W + U_k),  U_k <- U_k + W - Z_k

Stored are Z_k and Z_k - U_k, so that the penalty of a step reads one array of each set; U_k is their difference.

Ties and levels (stages TIE, LEVEL) are sets for the weights that the sets before them keep: 0 is no level of a kept
weight, and all levels of a pruned one. So their P_k is taken of W + U_k with zeros where an earlier Z is zero.

This is ADMM over the whole network, with the inner problem solved inexactly by the optimizer that follows in the
chain; it is not the layer-wise ADMM by which a layer's outputs are fitted one layer at a time.

Sources: S. Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating Direction Method of
Multipliers", 2011 (scaled form, 3.1.1); W. Niu et al., "PatDNN", 2020 (several sets, each with Z and U).
"""

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from compressx import schedules as rho_schedules
from compressx._admm_state import AdmmState, like
from compressx.constraints.base import LEVEL, TIE, Constraint
from compressx.constraints.floats import exponent, lift, nonzero, scale
from compressx.constraints.programs import programs
from compressx.rules import Bound, Rules, pairs, resolve
from compressx.schedules import RhoSchedule

OneRho = float | Array | RhoSchedule | Callable[[Any], Any]
Rho = OneRho | Sequence[tuple[str, OneRho]]


def _norm(x: Any, top: Array | None = None) -> Array:
    """||x|| over a leaf or a tuple of leaves, in units of 2**top, so that no square leaves the range (None: of 1)."""
    leaves = jax.tree.leaves(x)
    if top is not None:
        leaves = [lift(v, -top) for v in leaves]
    parts = [jnp.sum(jnp.square(v.astype(jnp.float32))) for v in leaves]
    return jnp.sqrt(sum(parts, jnp.zeros((), jnp.float32)))


def _in_range(x: Array) -> Array:
    """An infinity as the largest number: what is out of range stays comparable."""
    return jnp.minimum(x, float(jnp.finfo(x.dtype).max))


def _sets(b: Bound) -> tuple[Constraint, ...]:
    return b.constraint.sets


@jax.jit
def _only_where(v: Array, z: Array) -> Array:
    return jnp.where(nonzero(z), v, jnp.zeros((), v.dtype))


def _kept(part: Constraint, v: Any, earlier: Sequence[Any]) -> Any:
    """What a set is projected from: for ties and levels, v with zeros where an earlier set's Z has them."""
    if part.stage >= TIE:
        for z in earlier:
            v = jax.tree.map(_only_where, v, z)
    return v


def _schedules(rho: Rho, bound: Sequence[Bound], every: int) -> dict[str, RhoSchedule]:
    def one(value: Any) -> RhoSchedule:
        if isinstance(value, RhoSchedule):
            return value
        return rho_schedules.of_steps(value, every) if callable(value) else rho_schedules.constant(value)

    if not isinstance(rho, Sequence) or isinstance(rho, RhoSchedule):
        return {b.name: one(rho) for b in bound}
    chosen = {}
    for b in bound:
        hits = [value for pattern, value in rho if any(re.fullmatch(pattern, p) for p in b.paths)]
        if not hits:
            raise ValueError(f"no rho given for {b.name}; the rho patterns are {[p for p, _ in rho]}")
        chosen[b.name] = one(hits[0])
    return chosen


def _check_rho(rho: Any) -> None:
    if isinstance(rho, Sequence) and not isinstance(rho, RhoSchedule | str):
        for entry in rho:
            if not (isinstance(entry, list | tuple) and len(entry) == 2 and isinstance(entry[0], str)):
                raise ValueError(f"rho for each leaf is given as pairs (pattern, rho), got {entry!r} among them")
            _check_rho(entry[1])
    elif isinstance(rho, int | float) and not isinstance(rho, bool):
        if not 0 <= rho < math.inf:
            raise ValueError(f"rho must be finite and not negative, got {rho}")
    elif not (callable(rho) or isinstance(rho, RhoSchedule | jax.Array | np.ndarray | np.generic)):
        raise ValueError(f"rho must be a number, a schedule, or pairs (pattern, rho), got {rho!r}")


def admm(
    rules: Rules,
    *,
    rho: Rho = 1e-3,
    every: int = 100,
    refresh_every: int | None = None,
    fit_until: int | None = None,
    rescale_dual: bool = True,
) -> optax.GradientTransformationExtraArgs:
    """Moves the constrained leaves towards their sets while any optimizer trains them.

    Put it before the optimizer, so that the penalty is part of the gradient: `optax.chain(admm(...), optax.adam(lr))`;
    or between `scale_by_adam` and `scale_by_learning_rate`, so that Adam does not normalise the penalty (decoupled).
    Stored: two copies (Z, Z - U) of every constrained leaf per set, nothing else of a leaf's size.

    Args:
      rules: pairs (pattern, constraint), see `compressx.rules`.
      rho: penalty weight: a number, a schedule (`compressx.schedules`), an optax schedule (of gradient steps), or pairs
        (pattern, any of these). With `optax.inject_hyperparams` it is a number that moves; 0 switches the penalty off.
      every: gradient steps between Z and U updates, >= 1.
      refresh_every: updates between refreshes of what training chooses (fragment signs, pattern libraries, sizes of
        blocks); None keeps the first choice.
      fit_until: the update after which scales and codebooks stay as they are; None: they are fitted to the weights at
        every update, so that a layer may start at zero or small.
      rescale_dual: keep rho * U, the true dual, unchanged when rho moves. The papers' public code does not (False).

    Returns:
      A transform whose state is an `AdmmState`; `update` needs `params`.

    Raises:
      ValueError: `every` or `refresh_every` below 1; at init, whatever `rules.resolve` finds.

    Source: S. Boyd et al., "Distributed Optimization and Statistical Learning via the Alternating Direction Method
    of Multipliers", 2011, section 3.1.1 (scaled form); for pruning: T. Zhang et al., "A Systematic DNN Weight
    Pruning Framework using Alternating Direction Method of Multipliers", 2018.

    Example:
      >>> params = {"dense": {"kernel": jnp.asarray([[1.0, -5.0], [4.0, 0.5]])}}
      >>> rules = [(".*/kernel", compressx.unstructured(density=0.5))]
      >>> tx = optax.chain(compressx.admm(rules, rho=0.1, every=5), optax.sgd(0.1))
      >>> state, update = tx.init(params), jax.jit(tx.update)
      >>> for _ in range(200):  # nothing but the penalty acts here: a real loss gives the gradient
      ...     updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(compressx.admm_metrics(state)["primal/dense/kernel"]) < 0.2
      True
      >>> print(compressx.harden(params, rules, state).params["dense"]["kernel"])
      [[ 0. -5.]
       [ 4.  0.]]
    """
    for name, value in (("every", every), ("refresh_every", refresh_every), ("fit_until", fit_until)):
        if isinstance(value, int) and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if not (isinstance(value, int | np.integer | jax.Array) or (value is None and name != "every")):
            raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}; only rho takes a schedule")
    _check_rho(rho)
    rules = pairs(rules)

    def init_fn(params: Any) -> AdmmState:
        bound = resolve(rules, params)
        schedules = _schedules(rho, bound, every)
        leaves, treedef = jax.tree.flatten(params)
        depth = max((len(_sets(b)) for b in bound), default=0)
        z = [[optax.MaskedNode()] * len(leaves) for _ in range(depth)]
        center = [[optax.MaskedNode()] * len(leaves) for _ in range(depth)]
        structure: dict[str, tuple[Any, ...]] = {}
        for b in bound:
            w = b.take(leaves)
            structure[b.name] = b.choose(w)
            before: list[Any] = []
            for k, (part, s) in enumerate(zip(_sets(b), structure[b.name], strict=True)):
                before.append(programs(part).project(_kept(part, w, before), s))
                b.put(z[k], before[-1])
                b.put(center[k], jax.tree.map(jnp.copy, before[-1]))  # U is zero
        # a distinct array for every entry: shared buffers cannot be donated
        far = float(jnp.finfo(jnp.float32).max)
        residuals = [{b.name: jnp.full(len(_sets(b)), far, jnp.float32) for b in bound} for _ in range(2)]
        return AdmmState(
            step=jnp.zeros((), jnp.int32),
            updates=jnp.zeros((), jnp.int32),
            z=tuple(jax.tree.unflatten(treedef, x) for x in z),
            center=tuple(jax.tree.unflatten(treedef, x) for x in center),
            structure=structure,
            rho={name: s.init() for name, s in schedules.items()},
            primal=residuals[0],
            dual=residuals[1],
        )

    def update_fn(updates: Any, state: AdmmState, params: Any = None, **extra_args: Any) -> tuple[Any, AdmmState]:
        del extra_args
        if params is None:
            raise ValueError("admm needs the parameters: call update(updates, state, params)")
        bound = resolve(rules, params)
        _same_rules(state, bound)
        schedules = _schedules(rho, bound, every)
        leaves, treedef = jax.tree.flatten(params)
        gradients = like(params, updates)  # None, or optax's MaskedNode, where there is none

        # A loop that runs once or not at all: unlike `lax.cond` it updates Z and U in place, where XLA's conditional
        # copies them at every step.
        due = (state.step + 1) % every == 0
        state = lax.fori_loop(
            0,
            due.astype(jnp.int32),
            lambda _, s: _dual_step(s, params, bound, schedules, refresh_every, fit_until, rescale_dual),
            state._replace(step=optax.safe_increment(state.step)),
        )
        if isinstance(rho, jax.Array | np.ndarray | np.generic):  # injected: it may be another one at every step
            state = _injected(state, jnp.asarray(rho, jnp.float32), params, bound, rescale_dual)
        trees = [like(params, t) for t in state.center]
        for b in bound:
            r = state.rho[b.name]
            for i in b.indices:
                w, g = leaves[i], gradients[i]
                if g is None or isinstance(g, optax.MaskedNode):
                    continue  # a frozen leaf: nothing moves it
                for k in range(len(_sets(b))):
                    g = g + (r.astype(w.dtype) * (w - trees[k][i])).astype(g.dtype)
                gradients[i] = g
        return jax.tree.unflatten(treedef, gradients), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _injected(state: AdmmState, rho: Array, params: Any, bound: Sequence[Bound], rescale_dual: bool) -> AdmmState:
    """The state with a penalty weight from outside; where it has moved, rho * U stays as it was."""
    old, now = state.rho, dict.fromkeys(state.rho, rho)
    if not rescale_dual:
        return state._replace(rho=now)
    trees_z, centers = [like(params, t) for t in state.z], [like(params, t) for t in state.center]
    treedef = jax.tree.structure(params)
    for b in bound:
        ratio = _ratio(old[b.name], rho)
        for k in range(len(_sets(b))):
            for i in b.indices:
                z, center = trees_z[k][i], centers[k][i]
                centers[k][i] = jnp.where(ratio == 1, center, z - (z - center) * ratio.astype(z.dtype))
    return state._replace(rho=now, center=tuple(jax.tree.unflatten(treedef, t) for t in centers))


def _ratio(old: Array, new: Array) -> Array:
    """What U is multiplied by where rho moves, so that rho * U stays; 1 where there is no penalty on either side."""
    some = (old > 0) & (new > 0)
    return jnp.where(some, old / jnp.where(some, new, 1.0), 1.0)


def _same_rules(state: AdmmState, bound: Sequence[Bound]) -> None:
    """Raises ValueError where a state was made by other rules, or for another tree."""
    held = {name: len(each) for name, each in state.structure.items()}
    now = {b.name: len(_sets(b)) for b in bound}
    if held != now:
        odd = sorted(n for n in held.keys() | now.keys() if held.get(n) != now.get(n))
        raise ValueError(
            f"the state of admm was made by other rules or for another tree: {', '.join(odd[:4])} has "
            f"{held.get(odd[0], 0)} sets in the state and {now.get(odd[0], 0)} by the rules. Call init again"
        )


def _dual_step(
    state: AdmmState,
    params: Any,
    bound: Sequence[Bound],
    schedules: dict[str, RhoSchedule],
    refresh_every: int | None,
    fit_until: int | None,
    rescale_dual: bool,
) -> AdmmState:
    """One Z and U update of every leaf, with the residuals and the next rho."""
    number = optax.safe_increment(state.updates)
    leaves, treedef = jax.tree.flatten(params)
    trees_z, centers = [like(params, t) for t in state.z], [like(params, t) for t in state.center]
    structure, rho, primal, dual = dict(state.structure), dict(state.rho), dict(state.primal), dict(state.dual)
    for b in bound:
        w = b.take(leaves)
        residuals, moves, top = [], [], None
        chosen: list[Any] = []
        done: list[Any] = []
        duals: list[Any] = []
        for k, (part, s) in enumerate(zip(_sets(b), state.structure[b.name], strict=True)):
            before = b.take(trees_z[k])
            v = jax.tree.map(lambda w, z, t: w + (z - t), w, before, b.take(centers[k]))
            inside = _kept(part, v, done)
            if part.stage == LEVEL:
                if fit_until is None:
                    s = programs(part).refresh(inside, s)
                else:
                    s = lax.cond(number <= fit_until, programs(part).refresh, lambda _, s: s, inside, s)
            elif refresh_every is not None:
                earlier = list(zip(_sets(b), chosen, strict=False))

                def anew(v: Any, s: Any, part: Constraint = part, earlier: Any = earlier) -> Any:
                    for p, c in earlier:
                        v = programs(p).project(v, c)
                    return programs(part).refresh(v, s)

                s = lax.cond(number % refresh_every == 0, anew, lambda _, s: s, v, s)
            z = programs(part).project(inside, s)
            done.append(z)
            duals.append(jax.tree.map(jnp.subtract, v, z))
            b.put(trees_z[k], z)
            residual = jax.tree.map(jnp.subtract, w, z)
            # ||W||, written so that it depends on Z: as a loop invariant XLA would compute it at every step
            again = jax.tree.map(jnp.add, residual, z)
            if top is None:
                top = functools.reduce(jnp.maximum, map(exponent, jax.tree.leaves((again, z))))
            residuals.append(_norm(residual, top))
            moves.append(_norm(jax.tree.map(jnp.subtract, z, before), top))
            chosen.append(s)
        structure[b.name] = tuple(chosen)
        assert top is not None
        size = jnp.maximum(_norm(again, top), jnp.finfo(jnp.float32).tiny)
        primal[b.name], dual[b.name] = (_in_range(jnp.stack(n) / size) for n in (residuals, moves))
        old = rho[b.name]
        far, moved = (_in_range(scale(_norm(n), top)) for n in (residuals, moves))
        rho[b.name] = schedules[b.name].update(old, far, moved, number)
        ratio = _ratio(old, rho[b.name]) if rescale_dual else jnp.ones((), jnp.float32)
        for k, (z, u) in enumerate(zip(done, duals, strict=True)):
            b.put(centers[k], jax.tree.map(lambda z, u, s=ratio: z - u * s.astype(u.dtype), z, u))
    return state._replace(
        updates=number,
        z=tuple(jax.tree.unflatten(treedef, t) for t in trees_z),
        center=tuple(jax.tree.unflatten(treedef, t) for t in centers),
        structure=structure,
        rho=rho,
        primal=primal,
        dual=dual,
    )
