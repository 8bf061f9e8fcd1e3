"""Rules that prune coupled channels together, from the groups found in a network."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from compressx.compaction.groups import Group, Slot
from compressx.constraints.base import Constraint, intersection
from compressx.constraints.coupled import coupled_filters, runs


def coupled_rules(
    found: Sequence[Group],
    density: float | Mapping[int, float],
    column_density: float | None = None,
    vectors: bool = False,
) -> list[tuple[str, Constraint]]:
    """One rule per group of channels: all weights that make them share one mask.

    Groups that a weight makes on two axes, or on parts of one, get one rule that holds all their masks: heads and their
    dimensions in a kernel `[d, heads, head_dim]`, heads and a layer's width in one fused projection. Each mask is then
    nearest given those of the groups before it. To leave some of them whole give shares by the group's place, which
    `str(group)` tells apart.

    Args:
      found: from `groups`.
      density: share of each group's units to keep, or shares by the group's place; groups that are not in it are free.
        Of stacked layers each keeps that share, of units of its own.
      column_density: see `coupled_filters`.
      vectors: whether the mask also applies to what shifts and scales the channels (biases, normalisation, depthwise
        kernels; not on batch statistics), so that a removed channel is exactly zero, and goes from behind zero padding
        too. Not together with `column_density`.

    Returns:
      Rules whose patterns match exactly the leaves of each group, for the tree that was analysed or its parameters.

    Raises:
      ValueError: `vectors` with `column_density`, or that with groups that share a weight; a weight that makes the same
        channels on two axes; a place that no group has.

    Source: coupling as in H. Li et al., "Pruning Filters for Efficient ConvNets", 2017, section 3.3; groups as in G.
    Fang et al., "DepGraph: Towards Any Structural Pruning", 2023.

    Example:
      >>> def layer(v, x):
      ...     return jax.nn.relu(x @ v["up"]) @ v["down"]
      >>> v = {"up": jnp.ones((4, 8)), "down": jnp.ones((8, 2))}
      >>> found = compressx.compaction.groups(compressx.compaction.channels(layer, v, jnp.ones((1, 4))))
      >>> print(*found)
      8 units; made by up[1]; read by down[0]
      >>> [(pattern, str(c).split("(")[0]) for pattern, c in compressx.compaction.coupled_rules(found, 0.5)]
      [('up', 'coupled_filters')]
    """
    if vectors and column_density is not None:
        raise ValueError("vectors have no columns: give vectors or column_density, not both")
    if isinstance(density, Mapping) and not set(density) <= set(range(len(found))):
        raise ValueError(f"density names groups {sorted(density)}, and there are {len(found)}, from 0 on")
    roles = ("out", "along") if vectors else ("out",)
    wanted: list[tuple[Group, float, list[Slot]]] = []
    for number, group in enumerate(found):
        if isinstance(density, Mapping) and number not in density:
            continue
        share = density[number] if isinstance(density, Mapping) else density
        slots = [s for s in group.slots if s.role in roles and not s.path.startswith("batch_stats/")]
        names = [s.path for s in slots]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(
                f"{', '.join(twice)}: makes the same channels on two axes (group {number}), and one mask cannot "
                f"apply to both; leave the group out: density={{place: share}} for the others"
            )
        wanted.append((group, share, slots))
    rules = []
    for together in _sharing(wanted):
        every = {s.leaf: s for _, _, slots in together for s in slots}
        names = [every[leaf].path for leaf in sorted(every)]
        if len(together) > 1 and column_density is not None:
            raise ValueError(f"{', '.join(names)}: several groups share these weights, and columns are of one")
        sets = [_set(group, share, slots, every, column_density) for group, share, slots in together]
        held = sets[0] if len(sets) == 1 else intersection(*sets)
        rules.append(("|".join(map(re.escape, names)), held))
    return rules


def _sharing(
    wanted: Sequence[tuple[Group, float, list[Slot]]],
) -> list[list[tuple[Group, float, list[Slot]]]]:
    """Groups by the leaves that they have in common, in the order of their first."""
    together: list[tuple[set[str], list[tuple[Group, float, list[Slot]]]]] = []
    for entry in wanted:
        names = {s.path for s in entry[2]}
        meets = [t for t in together if t[0] & names]
        if not meets:
            together.append((names, [entry]))
            continue
        first, *others = meets
        first[0].update(names, *(t[0] for t in others))
        first[1].extend([e for t in others for e in t[1]] + [entry])
        together = [t for t in together if not any(t is o for o in others)]
    return [held for _, held in together]


def _set(
    group: Group, share: float, held: Sequence[Slot], every: Mapping[int, Slot], column_density: float | None
) -> Constraint:
    """The mask of one group over all leaves of its rule; those that it does not touch stay as they are."""
    stacked = group.steps is not None  # then the axes are those of a slice
    mine = {s.leaf: s for s in held}
    members = []
    for leaf in sorted(every):
        slot = mine.get(leaf, every[leaf])
        units = slot.units if leaf in mine else np.full(slot.units.size, -1)
        members.append((slot.axis - stacked, runs(units)))
    return coupled_filters(members, share, column_density=column_density, stacked=stacked)
