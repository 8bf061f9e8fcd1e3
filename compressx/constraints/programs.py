"""The functions of a constraint, compiled once for each set and shape and kept for the whole process.

A constraint is made anew wherever rules are written; its functions are closures, which jax takes for new ones each
time. Two constraints whose factory and arguments are the same are the same set and share their programs, so that
hardening a network compiles as many programs as it has sets and shapes, and nothing the second time.
"""

import functools
import json
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compressx.constraints.base import Constraint
from compressx.constraints.floats import differ

_KEPT = 512  # sets whose programs are kept


class Programs(NamedTuple):
    """Functions of a single set as they stand in a `Constraint`, jitted; None where the set has none."""

    init: Callable[..., Any]
    project: Callable[..., Any]
    refresh: Callable[..., Any]
    freeze: Callable[..., Any]
    retract: Callable[..., Any]
    settle: Callable[..., Any] | None
    moved: Callable[..., Any] | None
    changed: Callable[..., Any] | None


def programs(single: Constraint) -> Programs:
    """The programs of one set: kept ones where a `factory` made it, new ones for a set made by hand."""
    key = set_key(single)
    return _compiled(single) if key is None else _kept(_Set(key, single))


def choose(constraint: Constraint, w: Any) -> tuple[Any, ...]:
    """The structure of every set, each chosen for w as the sets before it leave it."""
    chosen: list[Any] = []
    for k, single in enumerate(constraint.sets):
        chosen.append(programs(single).init(w))
        if k + 1 < len(constraint.sets):
            w = programs(single).project(w, chosen[-1])
    return tuple(chosen)


def project(constraint: Constraint, w: Any, structures: tuple[Any, ...]) -> Any:
    """The weights projected onto one set after the other."""
    for single, structure in constraint.each(structures):
        w = programs(single).project(w, structure)
    return w


def freeze(constraint: Constraint, w: Any, structures: tuple[Any, ...]) -> Any:
    """The active set around w, as `Constraint.freeze` returns it."""
    each = tuple(programs(single).freeze(w, structure) for single, structure in constraint.each(structures))
    return each if constraint.parts else each[0]


def retract(constraint: Constraint, w: Any, active: Any) -> Any:
    """The nearest point of the active set, as `Constraint.retract` returns it."""
    for single, part in zip(constraint.sets, active if constraint.parts else (active,), strict=True):
        w = programs(single).retract(w, part)
    return w


def violations(constraint: Constraint, w: Any, structures: tuple[Any, ...]) -> Array:
    """`base.violations`, of w that is compared with its projection onto each set."""
    counts = [_changed(programs(single).project(w, s), w) for single, s in constraint.each(structures)]
    return sum(counts[1:], counts[0])


@jax.jit
def _changed(a: Any, b: Any) -> Array:
    each = jax.tree.map(lambda a, b: jnp.sum(differ(a, b), dtype=jnp.int32), a, b)
    return sum(jax.tree.leaves(each), jnp.zeros((), jnp.int32))


class _Set:
    """A constraint that equals another one of the same call."""

    def __init__(self, key: Hashable, constraint: Constraint) -> None:
        self.key, self.constraint = key, constraint

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Set) and self.key == other.key


def set_key(constraint: Constraint) -> Hashable | None:
    if constraint.slice is not None:
        key = set_key(constraint.slice)
        return None if key is None else ("every slice", key)
    if constraint.leaf is not None:
        key = set_key(constraint.leaf)
        return None if key is None else ("every leaf", key)
    if constraint.made is None:
        return None
    return constraint.made, json.dumps(constraint.spec, sort_keys=True)


@functools.lru_cache(_KEPT)
def _kept(of: _Set) -> Programs:
    return _compiled(of.constraint)


def _compiled(single: Constraint) -> Programs:
    made: dict[str, Any] = {name: _on_any_mesh(getattr(single, name)) for name in Programs._fields}
    return Programs(**made)


def _on_any_mesh(function: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """The function jitted; on weights whose sharding is part of their type (a mesh of `Explicit` axes), inside
    `jax.sharding.auto_axes`, where XLA shards what is in between: reshapes and sorts are no operations of such types.

    What has the shape of a weight is sharded like it; all else (signs of fragments, scales, libraries) is on every
    device.
    """
    if function is None:
        return None
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(w: Any, *rest: Any) -> Any:
        held = {x.shape: _explicit(x) for x in jax.tree.leaves(w)}
        found = next((s for s in held.values() if s is not None), None)
        if found is None:
            return compiled(w, *rest)
        plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (w, *rest))
        everywhere = jax.sharding.NamedSharding(found.mesh, jax.sharding.PartitionSpec())
        out = jax.tree.map(lambda x: held.get(x.shape) or everywhere, jax.eval_shape(function, *plain))
        return jax.jit(jax.sharding.auto_axes(function, out_sharding=out))(w, *rest)

    return call


def _explicit(x: Any) -> jax.sharding.NamedSharding | None:
    """The sharding of an array that lies on a mesh of `Explicit` axes."""
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    mesh = getattr(sharding, "mesh", None)
    return sharding if mesh is not None and getattr(mesh, "explicit_axes", None) else None
