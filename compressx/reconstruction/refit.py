"""The refit: the best weights of the active set (fixed supports, signs, ties) that a projection has chosen.

A fixed support is a subspace, and each column of W a least-squares problem on it: conjugate gradients, all columns side
by side. Cones of signs and tied magnitudes are convex: accelerated projected gradients, through `retract`. Both start
from the given point and never end above it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from compressx.constraints.base import SUPPORT, Constraint
from compressx.reconstruction.iterate import Coordinates, Leaves
from compressx.reconstruction.problem import Layout, Scaled

_CONVERGED = 1e-7  # of the squared gradient at the start, or of a step against the weights


def refit_loop(
    sets: tuple[Constraint, ...], layouts: tuple[Layout, ...], steps: int
) -> Callable[[tuple[Scaled, ...], Leaves, Any, tuple[Any, ...]], Leaves]:
    """The compiled refit `(problems, targets, w, structure) -> matrices`.

    Args:
      sets: single sets in stage order, none of levels.
      layouts: of the leaves.
      steps: iterations at most.

    Returns:
      A function of the leaves' problems, their targets in scaled coordinates, a feasible w as the constraint takes it,
      and its structures; the matrices it gives are unscaled.
    """
    on = Coordinates(sets, layouts)
    subspace = all(part.stage == SUPPORT for part in sets)

    def run(problems: tuple[Scaled, ...], targets: Leaves, w: Any, structure: tuple[Any, ...]) -> Leaves:
        active = [part.freeze(w, e) for part, e in zip(sets, structure, strict=True)]
        start = tuple(m * p.s for m, p in zip(on.matrices(w), problems, strict=True))

        def retract(m: Leaves) -> Leaves:
            held = on.leaves(m)
            for part, a in zip(sets, active, strict=True):
                held = part.retract(held, a)
            return on.matrices(held)

        find = _conjugate if subspace else _accelerated
        found = find(problems, targets, start, retract, steps)
        return tuple(m / p.s for m, p in zip(found, problems, strict=True))

    return jax.jit(run)


def _times(problems: tuple[Scaled, ...], m: Leaves) -> Leaves:
    """H m, leaf by leaf."""
    return tuple(jnp.matmul(p.h, x, precision=lax.Precision.HIGHEST) for p, x in zip(problems, m, strict=True))


def _gradient(problems: tuple[Scaled, ...], x: Leaves, targets: Leaves) -> Leaves:
    return _times(problems, jax.tree.map(jnp.subtract, x, targets))


def _dots(a: Leaves, b: Leaves) -> Leaves:
    """The inner product of every column, dims kept."""
    return jax.tree.map(lambda x, y: jnp.sum(x * y, axis=1, keepdims=True), a, b)


def _conjugate(
    problems: tuple[Scaled, ...], targets: Leaves, x: Leaves, onto: Callable[[Leaves], Leaves], steps: int
) -> Leaves:
    r = jax.tree.map(jnp.negative, onto(_gradient(problems, x, targets)))
    first = _dots(r, r)

    def going(carry: Any) -> Array:
        k, _, _, _, rr = carry
        left = [jnp.any(a > _CONVERGED * b) for a, b in zip(rr, first, strict=True)]
        return (k < steps) & jnp.any(jnp.stack(left))

    def body(carry: Any) -> Any:
        k, x, r, p, rr = carry
        hp = onto(_times(problems, p))
        alpha = jax.tree.map(_ratio, rr, _dots(p, hp))
        x = jax.tree.map(lambda x, a, p: x + a * p, x, alpha, p)
        r = jax.tree.map(lambda r, a, h: r - a * h, r, alpha, hp)
        after = _dots(r, r)
        beta = jax.tree.map(_ratio, after, rr)
        return k + 1, x, r, jax.tree.map(lambda r, b, p: r + b * p, r, beta, p), after

    return lax.while_loop(going, body, (jnp.zeros((), jnp.int32), x, r, r, first))[1]


def _ratio(a: Array, b: Array) -> Array:
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)


def _accelerated(
    problems: tuple[Scaled, ...], targets: Leaves, x: Leaves, onto: Callable[[Leaves], Leaves], steps: int
) -> Leaves:
    step = 1 / jnp.max(jnp.stack([jnp.max(p.values) for p in problems]))

    def cost(x: Leaves) -> Array:
        d = jax.tree.map(jnp.subtract, x, targets)
        return sum((jnp.sum(v) for v in _dots(d, _times(problems, d))), jnp.zeros((), jnp.float32))

    def going(carry: Any) -> Array:
        return (carry[0] < steps) & ~carry[-1]

    def body(carry: Any) -> Any:
        k, x, y, t, best, cheapest, _ = carry
        moved = onto(jax.tree.map(lambda y, g: y - step * g, y, _gradient(problems, y, targets)))
        delta = jax.tree.map(jnp.subtract, moved, x)
        # the momentum is dropped where it points uphill (B. O'Donoghue, E. Candes, "Adaptive Restart", 2015)
        uphill = sum((jnp.sum((a - b) * d) for a, b, d in zip(y, moved, delta, strict=True)), jnp.zeros(())) > 0
        t = jnp.where(uphill, 1.0, t)
        after = (1 + jnp.sqrt(1 + 4 * t * t)) / 2
        y = jax.tree.map(lambda m, d: m + (t - 1) / after * d, moved, delta)
        length, change = (sum((jnp.sum(jnp.square(v)) for v in m), jnp.zeros(())) for m in (moved, delta))
        now = cost(moved)
        lower = now < cheapest
        best = jax.tree.map(lambda a, b: jnp.where(lower, a, b), moved, best)
        return k + 1, moved, y, after, best, jnp.minimum(now, cheapest), change <= _CONVERGED * length

    start = (jnp.zeros((), jnp.int32), x, x, jnp.ones(()), x, cost(x), jnp.zeros((), bool))
    return lax.while_loop(going, body, start)[4]
