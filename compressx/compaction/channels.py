"""Which channels of a network belong together, found from its traced program."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from scipy import sparse

from compressx.compaction.primitives import LABELS, MANY, Axes, Axis, Contraction, Units
from compressx.trace import Function, Program, settled, trace


class CompactionError(ValueError):
    """A network, or its variables, that cannot be analysed or compacted; the text names the operation or the leaf."""


class Slot(NamedTuple):
    """An axis of a leaf whose indices are units of a group.

    Attributes:
      path: of the leaf.
      axis: of the leaf.
      units: int32 `[size of the axis]`, the unit of each index, -1 where it is none of the group.
      role: "out" where a weight makes the channels, "in" where it reads them, "along" for what scales or shifts them
        (biases, normalisation, depthwise kernels).
    """

    path: str
    axis: int
    units: np.ndarray
    role: str


class Group(NamedTuple):
    """Channels that stay or go together: unit u of the group is index i of every slot with `units[i] == u`.

    Attributes:
      size: number of units.
      slots: where they are, in leaf order.
    """

    size: int
    slots: tuple[Slot, ...]


class Channels(NamedTuple):
    """The units of a program.

    Attributes:
      program: the traced network.
      axes: per value, per axis: the unit of every index, or None where the axis is fixed. Units that are joined have
        one number; 0 is the fixed one.
      units: number of units.
      roles: (leaf, axis) -> "out", "in" or "along".
      contractions: where values flow from one unit to others.
      reasons: unit -> why it is fixed, for units that are fixed somewhere only by what they meet.
      weights: values that depend on the variables alone.
    """

    program: Program
    axes: tuple[tuple[Axis, ...], ...]
    units: int
    roles: dict[tuple[int, int], str]
    contractions: tuple[Contraction, ...]
    reasons: dict[tuple[int, int], str]
    weights: frozenset[int]


def channels(model: nn.Module | Function, variables: Any, x: Any, keep: Sequence[str] = ()) -> Channels:
    """Finds the units of a network: which indices of which axes must be cut together.

    Channels are followed through the traced program: convolutions and matrix products make them on the output axis of
    a weight and read them on the input axis of the next; what is added or multiplied elementwise is joined;
    concatenation, slices, padding and reshapes map them. Outputs and inputs of the network are fixed, and so is what
    depends on no variable.

    Args:
      model: a flax module (in evaluation mode, see `trace.function_of`), or any `f(variables, x)`.
      variables: pytree of arrays or shapes.
      x: inputs, arrays or shapes.
      keep: names of primitives without a rule (such as `scan`) whose operands may be left whole.

    Raises:
      CompactionError: channels pass through a primitive that has no rule and is not in `keep`.
    """
    program = settled(trace(model, variables, x))
    weights = set(range(len(program.paths))) | set(program.constants)
    touched = set(range(len(program.paths)))  # what depends on the variables at all: only that has channels
    for op in program.ops:
        if all(v in weights for v in op.inputs):
            weights |= set(op.outputs)
        if any(v in touched for v in op.inputs):
            touched |= set(op.outputs)
    u = Units(weights, program.constants)
    axes: dict[int, Axes] = {}
    blocks: list[tuple[int, int, int]] = []  # first unit, leaf, axis
    for value in (*range(len(program.paths)), *program.constants):
        axes[value] = []
        for a, n in enumerate(program.shapes[value]):
            blocks.append((u.count, value, a))
            axes[value].append(u.fresh(n, loose=value in program.constants))
    blocks.append((u.count, len(program.paths), 0))  # where the leaves' and constants' units end
    for value in program.inputs:
        axes[value] = [None] * len(program.shapes[value])
    for number, op in enumerate(program.ops):
        ins = [axes[v] for v in op.inputs]
        name, outs = op.primitive.name, [program.shapes[v] for v in op.outputs]
        if name in LABELS:
            given = LABELS[name](u, number, op, ins, [program.shapes[v] for v in op.inputs], outs[0])
            results = given if name in MANY else [given] * len(outs)
        else:
            free = any(units is not None for v in op.inputs if v in touched for units in axes[v])
            if free and name not in keep:
                shapes = ", ".join(str(program.shapes[v]) for v in op.inputs)
                raise CompactionError(
                    f"channels pass through the operation {name!r} (operands {shapes}), and no rule says what it does "
                    f"to them; keep=({name!r},) leaves whole whatever meets it"
                )
            for operand in ins:
                u.fix_all(operand, f"they pass through {name}")
            results = [[None] * len(shape) for shape in outs]
        for v, shape, found in zip(op.outputs, outs, results, strict=True):
            axes[v] = found if len(found) == len(shape) else [None] * len(shape)
    for v in program.outputs:
        u.fix_all(axes[v], "they are the network's output")
    joined = _components(u)
    return Channels(
        program,
        tuple(
            tuple(None if x is None else joined[x] for x in axes.get(v, [None] * len(s)))
            for v, s in enumerate(program.shapes)
        ),
        int(joined.max()) + 1,
        _roles(u, blocks, len(program.paths)),
        tuple(u.contractions),
        _reasons(u, blocks, len(program.paths)),
        frozenset(weights),
    )


def _components(u: Units) -> np.ndarray:
    """unit -> the number of its class, 0 for whatever is joined with something fixed."""
    ends = [(np.zeros_like(x), x) for x, _ in u.fixed] + u.edges
    a, b = (np.concatenate([e[side] for e in ends]) if ends else np.zeros(0, int) for side in (0, 1))
    graph = sparse.coo_matrix((np.ones(a.size, bool), (a, b)), shape=(u.count, u.count))
    _, labels = sparse.csgraph.connected_components(graph, directed=False)
    return np.where(labels == labels[0], 0, labels + 1 - (labels > labels[0])).astype(np.int64)


def _block(blocks: list[tuple[int, int, int]], units: np.ndarray, leaves: int) -> tuple[int, int] | None:
    """The (leaf, axis) whose units these are."""
    if not units.size:
        return None
    place = np.searchsorted([b[0] for b in blocks], units[0], side="right") - 1
    if place < 0 or blocks[place][1] >= leaves:
        return None
    return blocks[place][1:] if units.max() < blocks[place + 1][0] else None


def _roles(u: Units, blocks: list[tuple[int, int, int]], leaves: int) -> dict[tuple[int, int], str]:
    roles = dict.fromkeys((b[1:] for b in blocks if b[1] < leaves), "along")
    for units, role in u.roles:
        at = _block(blocks, units, leaves)
        if at is not None:
            roles[at] = role
    return roles


def _reasons(u: Units, blocks: list[tuple[int, int, int]], leaves: int) -> dict[tuple[int, int], str]:
    reasons: dict[tuple[int, int], str] = {}
    for units, why in u.fixed:
        at = _block(blocks, units, leaves)
        if at is not None:
            reasons.setdefault(at, why)
    return reasons


def groups(found: Channels) -> tuple[Group, ...]:
    """The coupled channels of a network: one group per set of filters that must be chosen together.

    Two weights whose filters share a unit (they are added, or one scales the other) are in one group; a group has all
    the slots that its units have. A residual stage is one group; the stages that shortcuts without parameters join are
    one group together; a concatenation leaves its parts in groups of their own.
    """
    leaves = len(found.program.paths)
    named = {
        (leaf, a): units
        for leaf in range(leaves)
        for a, units in enumerate(found.axes[leaf])
        if units is not None and units.any()
    }
    makers = [at for at in named if found.roles[at] == "out"]
    owner: dict[int, int] = {}  # unit -> representative unit, by merging along the axes that make channels
    for at in makers:
        units = np.unique(named[at][named[at] > 0])
        heads = {owner.get(int(k), int(k)) for k in units}
        head = min(heads)
        for k, old in list(owner.items()):
            if old in heads:
                owner[k] = head
        owner |= dict.fromkeys(map(int, units), head)
    result = []
    for head in sorted(set(owner.values()), key=list(owner.values()).index):
        members = np.array(sorted(k for k, h in owner.items() if h == head))
        index = np.full(found.units, -1, np.int32)
        index[members] = np.arange(members.size)
        slots = [
            Slot(found.program.paths[leaf], a, index[units], found.roles[leaf, a])
            for (leaf, a), units in named.items()
            if (index[units] >= 0).any()
        ]
        result.append(Group(int(members.size), tuple(slots)))
    return tuple(result)
