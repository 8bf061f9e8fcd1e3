"""Projection in a diagonal metric: the point of a set nearest in `sum_i metric_i (z_i - w_i)^2`.

No family of sets has to know of it. A support or a choice of signs is a set that is mapped onto itself when each weight
is multiplied by a positive number: it is chosen for sqrt(metric) * w. Tied magnitudes become weighted means, which are
quotients of two retractions. The nearest levels are the same in every diagonal metric; their scale is not.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from compressx.constraints import programs
from compressx.constraints.base import LEVEL, TIE, Constraint
from compressx.reconstruction.levels import levels_in, units

_ROUNDS = 4  # of nearest levels and their scale


def project_in_metric(
    constraint: Constraint, w: Array, metric: Array, structure: tuple[Any, ...] | None = None
) -> tuple[Array, tuple[Any, ...]]:
    """A point of a set near to a weight in a diagonal metric, and the structure of each set.

        argmin_z sum_i metric_i (z_i - w_i)^2  s.t. z in the set

    The nearest point for sets of supports that are projected exactly, for signs (with rule "energy") and for levels of
    a given structure. Which blocks are tied is decided in the Euclidean metric, their magnitudes in this one. Scales
    that are free are found by alternation. Of an intersection the sets are projected in turn.

    Args:
      constraint: over one leaf in Flax's layout; codebooks keep the entries that they have.
      w: the leaf.
      metric: of w's shape, or broadcasting against it; at least 0, as Adam's second moment or the diagonal of H.
      structure: of each set, which then stays; None: chosen for w.

    Returns:
      The point, exactly in the set, and the structures.

    Raises:
      ValueError: the constraint holds over several leaves, or the metric has another shape.

    Example:
      >>> w, metric = jnp.asarray([[1.0, -2.0, 3.0]]), jnp.asarray([[100.0, 1.0, 1.0]])
      >>> z, _ = project_in_metric(compressx.unstructured(keep=1), w, metric)
      >>> print(z)  # the weight that matters most
      [[1. 0. 0.]]
    """
    if constraint.joint or constraint.slice is not None:
        raise ValueError(f"{constraint} does not hold over one plain leaf, which this projection needs")
    try:
        d = jnp.broadcast_to(jnp.asarray(metric, jnp.float32), w.shape)
    except ValueError:
        raise ValueError(f"metric of shape {jnp.shape(metric)} does not broadcast against {w.shape}") from None
    root = jnp.sqrt(jnp.maximum(d, jnp.finfo(jnp.float32).tiny))
    chosen: list[Any] = []
    z = w
    for k, part in enumerate(constraint.sets):
        held = programs.programs(part)
        given = None if structure is None else structure[k]
        plain = part.stage in (TIE, LEVEL)
        seen = z if plain else (z * root).astype(w.dtype)
        own = held.init(seen) if given is None else given
        point = held.project(seen, own)
        if part.stage == TIE:
            z = held.project(_weighted_means(part, z, point, own, d), own)
        elif part.stage == LEVEL:
            z, own = _on_levels(part, z, own, d, fixed=given is not None)
        else:
            active = held.freeze(jnp.where(point == 0, jnp.zeros((), w.dtype), z), own)
            z = held.retract(z, active)
        chosen.append(own)
    return z, tuple(chosen)


def _weighted_means(part: Constraint, w: Array, z: Array, structure: Any, d: Array) -> Array:
    """Tied magnitudes as means weighted by d: retraction takes plain means, so of d w and of d, and their quotient."""
    active = part.freeze(z, structure)
    sign = jnp.sign(z)
    above, below = part.retract((d * w).astype(w.dtype), active), part.retract((d * sign).astype(w.dtype), active)
    return jnp.where(below == 0, z, sign * jnp.abs(above / jnp.where(below == 0, 1, below))).astype(w.dtype)


def _on_levels(part: Constraint, w: Array, structure: Any, d: Array, fixed: bool) -> tuple[Array, Any]:
    """The nearest levels and, unless fixed, their weighted least-squares scale, in turn."""
    held = programs.programs(part)
    z = held.project(w, structure)
    levels = levels_in(part)
    if fixed or held.moved is None or levels.grid == "codebook":
        return z, structure
    ids = jnp.asarray(units(w.shape, levels)).reshape(-1)
    number = int(ids.max()) + 1
    best, least = (z, structure), _cost(z, w, d)
    for _ in range(_ROUNDS):
        zf, wf = z.astype(jnp.float32), w.astype(jnp.float32)
        energy = jax.ops.segment_sum((d * zf * zf).reshape(-1), ids, number)
        factor = jax.ops.segment_sum((d * zf * wf).reshape(-1), ids, number) / jnp.where(energy > 0, energy, 1.0)
        factor = jnp.where(energy > 0, factor, 1.0)
        aim = (zf * factor[ids].reshape(w.shape)).astype(w.dtype)
        structure = held.moved(aim, held.freeze(z, structure))
        z = held.project(w, structure)
        cost = _cost(z, w, d)
        if cost < least:
            best, least = (z, structure), cost
    return best


def _cost(z: Array, w: Array, d: Array) -> float:
    return float(jnp.sum(d * jnp.square(z.astype(jnp.float32) - w.astype(jnp.float32))))
