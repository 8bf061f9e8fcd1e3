"""Rules that prune coupled channels together, from the groups found in a network."""

import re
from collections.abc import Mapping, Sequence

from compressx.compaction.channels import Group
from compressx.constraints.base import Constraint
from compressx.constraints.coupled import coupled_filters, runs


def coupled_rules(
    found: Sequence[Group],
    density: float | Mapping[int, float],
    column_density: float | None = None,
    vectors: bool = False,
) -> list[tuple[str, Constraint]]:
    """One rule per group of channels: all weights that make them share one mask.

    Args:
      found: from `groups`.
      density: share of each group's units to keep, or shares by the group's place; groups that are not in it are free.
      column_density: see `coupled_filters`.
      vectors: whether the mask also applies to what shifts and scales the channels (biases, normalisation, depthwise
        kernels; not on batch statistics), so that a removed channel is exactly zero, and goes from behind zero padding
        too. Not together with `column_density`.

    Returns:
      Rules whose patterns match exactly the leaves of each group, for the tree that was analysed or its parameters.

    Raises:
      ValueError: `vectors` with `column_density`, or a weight that makes channels on two axes.
    """
    if vectors and column_density is not None:
        raise ValueError("vectors have no columns: give vectors or column_density, not both")
    rules = []
    for number, group in enumerate(found):
        if isinstance(density, Mapping) and number not in density:
            continue
        share = density[number] if isinstance(density, Mapping) else density
        roles = ("out", "along") if vectors else ("out",)
        slots = [s for s in group.slots if s.role in roles and not s.path.startswith("batch_stats/")]
        names = [s.path for s in slots]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"{', '.join(twice)}: makes channels on two axes, and one mask cannot apply to both")
        pattern = "|".join(map(re.escape, names))
        members = [(s.axis, runs(s.units)) for s in slots]
        rules.append((pattern, coupled_filters(members, share, column_density=column_density)))
    return rules
