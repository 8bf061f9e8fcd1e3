"""Groups of channels that are chosen together, and where their units are."""

from typing import NamedTuple

import numpy as np

from compressx.compaction.channels import Channels


class Slot(NamedTuple):
    """An axis of a leaf whose indices are units of a group.

    Attributes:
      path: of the leaf.
      axis: of the leaf.
      units: int32 `[size of the axis]`, the unit of each index, -1 where it is none of the group. Several indices have
        one unit where they stay or go together (the dimensions of a head).
      role: "out" where a weight makes the channels, "in" where it reads them, "along" for what scales or shifts them
        (biases, normalisation, depthwise kernels).
      leaf: the number of the leaf in its tree.

    Example:
      >>> from compressx import compaction
      >>> two = lambda v, x: x @ v["a"] @ v["b"]
      >>> variables = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
      >>> (group,) = compaction.groups(compaction.channels(two, variables, jnp.ones((1, 2))))
      >>> [(slot.path, slot.axis, slot.role) for slot in group.slots]
      [('a', 1, 'out'), ('b', 0, 'in')]
    """

    path: str
    axis: int
    units: np.ndarray
    role: str
    leaf: int = 0


class Group(NamedTuple):
    """Channels that stay or go together: unit u of the group is index i of every slot with `units[i] == u`.

    Attributes:
      size: number of units.
      slots: where they are, in leaf order.
      steps: where the leaves are stacked along axis 0 (layers under a scan), how many slices they have: each chooses
        units of its own, all the same number.

    Example:
      >>> from compressx import compaction
      >>> two = lambda v, x: x @ v["a"] @ v["b"]
      >>> variables = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
      >>> (group,) = compaction.groups(compaction.channels(two, variables, jnp.ones((1, 2))))
      >>> print(group)
      3 units; made by a[1]; read by b[0]
    """

    size: int
    slots: tuple[Slot, ...]
    steps: int | None = None

    def __str__(self) -> str:
        """What is chosen, in words: `4 units; made by query/kernel[1] by 8; read by out/kernel[0]`."""
        each: dict[str, list[str]] = {role: [] for role in ("out", "along", "in")}
        for s in self.slots:
            wide = int(np.bincount(s.units[s.units >= 0]).max())
            each[s.role].append(f"{s.path}[{s.axis}]" + (f" by {wide}" if wide > 1 else ""))
        words = f"{self.size} units" + (f" in each of {self.steps} steps" if self.steps else "")
        names = {"out": "made by", "along": "along", "in": "read by"}
        return "; ".join([words, *(f"{names[role]} {', '.join(held)}" for role, held in each.items() if held)])


def groups(found: Channels) -> tuple[Group, ...]:
    """The coupled channels of a network: one group per set of filters that must be chosen together.

    Two weights whose filters share a unit (they are added, or one scales the other) are in one group; a group has all
    the slots that its units have. A residual stage is one group; the stages that shortcuts without parameters join are
    one group together; a concatenation leaves its parts in groups of their own. Heads are a group and so are the
    dimensions of every head; where one kernel makes heads and a layer's width side by side, these are two.

    Args:
      found: from `channels`.

    Returns:
      The groups, in the order in which their channels are first made.

    Source: groups of coupled layers as in G. Fang et al., "DepGraph: Towards Any Structural Pruning", 2023.

    Example:
      >>> from compressx import compaction
      >>> added = lambda v, x: (x @ v["a"] + x @ v["c"]) @ v["b"]  # a sum couples the outputs of a and c
      >>> variables = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1)), "c": jnp.ones((2, 3))}
      >>> [str(g) for g in compaction.groups(compaction.channels(added, variables, jnp.ones((1, 2))))]
      ['3 units; made by a[1], c[1]; read by b[0]']
    """
    named, steps = _named(found)
    makers = [at for at in named if found.roles[at] == "out"]
    owner: dict[int, int] = {}  # unit -> representative unit, by merging along the axes that make channels
    for at in makers:
        held, times = np.unique(named[at][named[at] > 0], return_counts=True)
        alike: dict[tuple[int, int], list[int]] = {}
        for unit, n in zip(held, times, strict=True):
            alike.setdefault((steps.get(int(unit), 0), int(n)), []).append(int(unit))
        for units in alike.values():
            heads = {owner.get(k, k) for k in units}
            head = min(heads)
            for k, old in list(owner.items()):
                if old in heads:
                    owner[k] = head
            owner |= dict.fromkeys(units, head)
    result = []
    members: dict[int, list[int]] = {}
    for unit, head in owner.items():
        members.setdefault(head, []).append(unit)
    for units in members.values():
        index = np.full(found.units, -1, np.int32)
        index[sorted(units)] = np.arange(len(units))
        slots = [
            Slot(found.program.paths[leaf], a, index[units], found.roles[leaf, a], leaf)
            for (leaf, a), units in named.items()
            if (index[units] >= 0).any()
        ]
        result.append(Group(len(units), tuple(slots), steps.get(units[0])))
    return tuple(result)


def _named(found: Channels) -> tuple[dict[tuple[int, int], np.ndarray], dict[int, int]]:
    """(leaf, axis) -> units, of a stacked leaf those of its first slice; and unit -> slices, where each has its own."""
    named: dict[tuple[int, int], np.ndarray] = {}
    steps: dict[int, int] = {}
    for leaf in range(len(found.program.paths)):
        for a, units in enumerate(found.axes[leaf]):
            if units is None or not units.any():
                continue
            if units.ndim == 2:
                steps |= dict.fromkeys(map(int, units[0][(units != units[0]).any(0)]), len(units))
                units = units[0]
            named[leaf, a] = units
    return named, steps
