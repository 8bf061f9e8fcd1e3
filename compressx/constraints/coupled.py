"""Filters that must be pruned together: one mask over all the weights that make the same channels."""

from collections.abc import Sequence
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, ops

from compressx.constraints.base import Constraint, check_density, count, factory, support
from compressx.constraints.floats import nonzero
from compressx.constraints.select import energies, squares, top_k_mask

Run = Sequence[int]


@factory
def coupled_filters(
    members: Sequence[tuple[int, Sequence[Run]]],
    density: float | None = None,
    *,
    keep: int | None = None,
    column_density: float | None = None,
    stacked: bool = False,
) -> Constraint:
    """At most k channels that any weight of a group makes; a weight's filter is zero where its channel is out.

        argmin_z sum_l ||z_l - w_l||_2^2  s.t. at most k units u have a non-zero z_l[index_l == u]:
        the k units of largest energy, summed over all leaves, stay.

    The rule that holds it takes all weights of the group, in tree order (a joint constraint): `coupled_rules` of
    `compressx.compaction` makes both from a network.

    Args:
      members: per leaf, the axis that makes channels and the unit of each of its indices, as runs `(first, length)` of
        consecutive units; a first unit of -1 marks indices outside the group, which always stay.
      density: share of units kept.
      keep: number of units kept, instead of a density.
      column_density: then also keeps, in each leaf, only this share of positions (all axes but that one), those of
        largest energy within the kept filters: exact for the positions given the filters.
      stacked: whether the leaves are stacks of layers, `[layers, ...]`: the set then applies to every slice by itself,
        with the axes of a slice in `members`, and each keeps units of its own.

    Raises:
      ValueError: the amounts are impossible; on use, the leaves do not fit the members.

    Source: coupling as in H. Li et al., "Pruning Filters for Efficient ConvNets", 2017, section 3.3, with the energy
    summed over the group, which makes the selection the projection.

    Example:
      >>> first, second = jnp.ones((2, 3)).at[:, 1].set(5.0), jnp.ones((4, 3))  # both make the same 3 channels
      >>> members = [(1, [(0, 3)]), (1, [(0, 3)])]
      >>> z = compressx.coupled_filters(members, keep=1).project((first, second), ())
      >>> [jnp.any(x != 0, axis=0).tolist() for x in z]
      [[False, True, False], [False, True, False]]
    """
    if (density is None) == (keep is None):
        raise ValueError(f"give exactly one of density and keep, got density={density}, keep={keep}")
    if density is not None:
        check_density(density)
    if column_density is not None:
        check_density(column_density, "column_density")
    plain = [(int(axis), [[int(first), int(n)] for first, n in runs]) for axis, runs in members]
    lengths = [indices(runs) for _, runs in plain]
    size, missing = units_of([run for _, runs in plain for run in runs])
    if not size or missing:
        raise ValueError(f"members must have every unit 0..{size - 1}; missing are {missing or 'all'}")
    k = count(density, size, keep, "units")

    @cache
    def index() -> list[np.ndarray]:
        """The unit of each index of each member; made when `check` has found runs as long as the leaves, not before."""
        return [expand(runs) for _, runs in plain]

    def check(leaves: tuple[Array, ...]) -> None:
        if len(leaves) != len(plain):
            raise ValueError(f"the group has {len(plain)} members and the rule takes {len(leaves)} leaves")
        for w, (axis, _), n in zip(leaves, plain, lengths, strict=True):
            if not 0 <= axis < w.ndim or w.shape[axis] != n:
                raise ValueError(f"a member of {n} channels on axis {axis} does not fit shape {w.shape}")

    def spread(chosen: Array, leaves: tuple[Array, ...]) -> tuple[Array, ...]:
        """The mask of each leaf from the units that stay."""
        masks = []
        for w, (axis, _), units in zip(leaves, plain, index(), strict=True):
            along = jnp.where(units < 0, True, chosen[np.maximum(units, 0)])
            masks.append(jnp.broadcast_to(jnp.expand_dims(along, [a for a in range(w.ndim) if a != axis]), w.shape))
        return tuple(masks)

    def energy(leaves: tuple[Array, ...]) -> Array:
        check(leaves)
        total = jnp.zeros(size + 1, jnp.float32)  # the last one collects what is outside the group
        for each, (axis, _), units in zip(energies(leaves), plain, index(), strict=True):
            e = jnp.sum(each, tuple(a for a in range(each.ndim) if a != axis)).astype(jnp.float32)
            total = total + ops.segment_sum(e, np.where(units < 0, size, units), size + 1)
        return total[:size]

    def by_column(w: Array, axis: int, mask: Array) -> Array:
        e = squares(jnp.where(mask, w, jnp.zeros((), w.dtype)), axis, keepdims=True)
        return mask & top_k_mask(e, count(column_density, e.size, None, "positions"))

    def select(leaves: tuple[Array, ...]) -> tuple[Array, ...]:
        masks = spread(top_k_mask(energy(leaves), k), leaves)
        if column_density is None:
            return masks
        return tuple(by_column(w, axis, m) for w, (axis, _), m in zip(leaves, plain, masks, strict=True))

    def alive(leaves: tuple[Array, ...]) -> tuple[Array, ...]:
        masks = spread(energy(leaves) > 0, leaves)
        if column_density is None:
            return masks
        columns = [jnp.any(nonzero(w), axis=axis, keepdims=True) for w, (axis, _) in zip(leaves, plain, strict=True)]
        return tuple(m & c for m, c in zip(masks, columns, strict=True))

    if stacked:
        return support(jax.vmap(select), jax.vmap(alive), joint=True)
    return support(select, alive, joint=True)


def runs(units: np.ndarray) -> list[list[int]]:
    """An index as runs `[first unit, length]` of consecutive units, or of -1; inverse of `expand`."""
    out: list[list[int]] = []
    for u in map(int, units):
        if out and (u == out[-1][0] + out[-1][1] if out[-1][0] >= 0 else u < 0):
            out[-1][1] += 1
        else:
            out.append([max(u, -1), 1])
    return out


def indices(given: Sequence[Run]) -> int:
    """How many indices runs cover; ValueError for a run that is none."""
    for run in given:
        if len(run) != 2 or run[0] < -1 or run[1] < 1:
            raise ValueError(f"a run must be (first unit or -1, length of 1 or more), got {list(run)}")
    return sum(n for _, n in given)


def units_of(given: Sequence[Run]) -> tuple[int, str]:
    """One more than the last unit of runs, and the first units below it that no run has, in words ("" for none)."""
    end = 0
    for first, n in sorted((first, n) for first, n in given if first >= 0):
        if first > end:
            return max(f + m for f, m in given), f"[{end}]" if first == end + 1 else f"{end}..{first - 1}"
        end = max(end, first + n)
    return end, ""


def expand(given: Sequence[Run]) -> np.ndarray:
    """The unit of each index, int32, from runs."""
    parts = [np.full(n, -1) if first < 0 else np.arange(first, first + n) for first, n in given]
    return np.concatenate(parts).astype(np.int32) if parts else np.zeros(0, np.int32)
