"""Scaled ADMM on the layer-wise problem, for any set, as one compiled loop.

    W = argmin 1/2 |W - A|_H^2 + n rho / 2 |W - center|^2 = A + Q diag(n rho / (L + n rho)) Q' (center - A)
    Z = project(W + U);  U += W - Z;  rho *= ramp, U /= ramp

with H = Q L Q' in scaled coordinates, so that any rho costs two products. An intersection has one Z, projected onto its
sets in stage order (n = 1, center = Z - U), or a Z and a U for each set (center: the mean of their Z - U).

Source: S. Boyd et al., "Distributed Optimization and Statistical Learning via ADMM", 2011; on a Gram matrix, for
unstructured and N:M supports: X. Meng et al., "ALPS", 2024. The slow geometric ramp and the sets are ours.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from compressx.constraints.base import LEVEL, SIGN, Constraint
from compressx.reconstruction.problem import Layout, Scaled
from compressx.reconstruction.settings import Settings

Leaves = tuple[Array, ...]  # matrices [G, P, F] of every leaf
Structures = tuple[Any, ...]  # one of every set


class Reached(NamedTuple):
    """Where the loop ended: Z in scaled coordinates, the structure of each set, iterations, |W - Z| / |W|."""

    z: Leaves
    structure: tuple[Any, ...]
    iterations: Array
    residual: Array


class Coordinates(NamedTuple):
    """The functions of single sets on scaled matrices of the leaves."""

    sets: tuple[Constraint, ...]
    layouts: tuple[Layout, ...]

    def leaves(self, m: Sequence[Array], dtypes: bool = False) -> Any:
        """Matrices as a constraint takes them: a leaf, or a tuple of leaves."""
        held = [o.leaf(x) for o, x in zip(self.layouts, m, strict=True)]
        if dtypes:
            held = [x.astype(o.dtype) for o, x in zip(self.layouts, held, strict=True)]
        return tuple(held) if self.sets[0].joint else held[0]

    def matrices(self, w: Any) -> Leaves:
        """Inverse of `leaves`, float32."""
        held = w if self.sets[0].joint else (w,)
        return tuple(o.matrices(x).astype(jnp.float32) for o, x in zip(self.layouts, held, strict=True))

    def seen(self, part: Constraint, m: Leaves, s: Leaves) -> Any:
        """Scaled matrices as a set sees them: levels are those of the weights themselves, all else is scaled."""
        if part.stage != LEVEL:
            return self.leaves(m)
        return self.leaves([x / y for x, y in zip(m, s, strict=True)], dtypes=True)

    def project(self, part: Constraint, m: Leaves, structure: Any, s: Leaves) -> Leaves:
        out = self.matrices(part.project(self.seen(part, m, s), structure))
        return tuple(x * y for x, y in zip(out, s, strict=True)) if part.stage == LEVEL else out

    def choose(self, choose: Callable[[int, Constraint, Any], Any], m: Leaves, s: Leaves) -> tuple[Leaves, Structures]:
        """m projected onto one set after the other, and a structure for each, chosen as the sets before it leave m."""
        structure: list[Any] = []
        for k, part in enumerate(self.sets):
            structure.append(choose(k, part, self.seen(part, m, s)))
            m = self.project(part, m, structure[-1], s)
        return m, tuple(structure)


def admm_loop(
    sets: tuple[Constraint, ...], layouts: tuple[Layout, ...], settings: Settings, each: bool, chosen: bool
) -> Callable[[tuple[Scaled, ...], Leaves, Leaves, Structures], Reached]:
    """The compiled loop `(problems, targets, z, structure) -> Reached`.

    Args:
      sets: single sets in stage order.
      layouts: of the leaves.
      settings: see `Settings`.
      each: a Z and a U for every set of an intersection, instead of one Z through the chain.
      chosen: the structure was given and stays; else it is refreshed.

    Returns:
      A function of the leaves' `Scaled` problems, their targets and a point of the sets in scaled coordinates, and the
      structures with which it begins.
    """
    on = Coordinates(sets, layouts)
    number = len(sets) if each else 1

    def run(problems: tuple[Scaled, ...], targets: Leaves, start: Leaves, structure: Structures) -> Reached:
        s = tuple(p.s for p in problems)

        def towards(center: Leaves, rho: Array) -> Leaves:
            out = []
            for p, a, c in zip(problems, targets, center, strict=True):
                turned = jnp.matmul(p.vectors.mT, c - a, precision=lax.Precision.HIGHEST)
                shrunk = turned * (number * rho / (p.values + number * rho))
                out.append(a + jnp.matmul(p.vectors, shrunk, precision=lax.Precision.HIGHEST))
            return tuple(out)

        def refreshed(k: Array, structure: Structures) -> Callable[[int, Constraint, Any], Any]:
            def choose(i: int, part: Constraint, w: Any) -> Any:
                if chosen or part.stage == SIGN:
                    return structure[i] if chosen else part.refresh(w, structure[i])
                due = k % settings.refresh_every == 0
                return lax.cond(due, part.refresh, lambda w, before: before, w, structure[i])

            return choose

        def split(k: Array, v: list[Leaves], structure: Structures) -> tuple[list[Leaves], Structures]:
            choose = refreshed(k, structure)
            if not each:
                z, structure = on.choose(choose, v[0], s)
                return [z], structure
            after = tuple(choose(i, part, on.seen(part, x, s)) for i, (part, x) in enumerate(zip(sets, v, strict=True)))
            return [on.project(part, x, e, s) for part, x, e in zip(sets, v, after, strict=True)], after

        def body(carry: Any) -> Any:
            k, z, u, structure, rho, _ = carry
            w = towards(_mean([_minus(a, b) for a, b in zip(z, u, strict=True)]), rho)
            v = [_plus(w, b) for b in u]
            z, structure = split(k, v, structure)
            u = [jax.tree.map(lambda v, z: (v - z) / settings.ramp, a, b) for a, b in zip(v, z, strict=True)]
            apart = sum((_norm(_minus(w, x)) for x in z), jnp.zeros((), jnp.float32))
            residual = jnp.sqrt(apart / jnp.maximum(number * _norm(w), 1e-30))
            return k + 1, z, u, structure, rho * settings.ramp, residual

        def going(carry: Any) -> Array:
            return (carry[0] < settings.steps) & (carry[-1] > settings.tolerance)

        u = [jax.tree.map(jnp.zeros_like, targets)] * number
        first = (jnp.zeros((), jnp.int32), [start] * number, u, structure)
        carry = (*first, jnp.float32(settings.rho), jnp.float32(jnp.inf))
        k, z, u, structure, _, residual = lax.while_loop(going, body, carry)
        # of several Z none need lie in all sets: the caller projects their mean onto one after the other
        return Reached(_mean(z), structure, k, residual)

    return jax.jit(run)


def _mean(each: list[Leaves]) -> Leaves:
    return jax.tree.map(lambda *x: reduce(jnp.add, x) / len(each), *each)


def _minus(a: Leaves, b: Leaves) -> Leaves:
    return jax.tree.map(jnp.subtract, a, b)


def _plus(a: Leaves, b: Leaves) -> Leaves:
    return jax.tree.map(jnp.add, a, b)


def _norm(a: Leaves) -> Array:
    """The sum of squares over all leaves."""
    return sum((jnp.sum(jnp.square(x)) for x in a), jnp.zeros((), jnp.float32))
