"""How many channels and positions a network keeps at a rate: the rules that prune it, from the groups found in it."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from compressx.compaction.groups import Group
from compressx.constraints.base import Constraint
from compressx.constraints.coupled import runs
from compressx.constraints.network import network_structure
from compressx.tree import paths

KINDS = ("filters", "columns", "combined")


class Kernel(NamedTuple):
    """A convolution's kernel `[kh, kw, cin, cout]` and the channels it touches.

    Attributes:
      path: of the leaf.
      shape: of the leaf.
      makes: groups whose channels it makes, all of each; the outputs that are in none (of a head) always stay.
      reads: likewise of its inputs.
    """

    path: str
    shape: tuple[int, ...]
    makes: tuple[int, ...]
    reads: tuple[int, ...]


class Amounts(NamedTuple):
    """What stays of a network.

    Attributes:
      channels: per group.
      columns: per kernel (by path), positions of what the channels leave; None: all.
      weights: of all kernels together after compaction.
      total: before.

    Example:
      >>> from compressx import compaction
      >>> units = np.arange(4)  # of the four channels between two convolutions
      >>> found = [compaction.Group(4, (compaction.Slot("a", 3, units, "out"), compaction.Slot("b", 2, units, "in")))]
      >>> params = {"a": np.ones((3, 3, 1, 4)), "b": np.ones((3, 3, 4, 1))}
      >>> compaction.amounts(found, compaction.kernels(found, params), "filters", rate=2.0)
      Amounts(channels=(2,), columns={'a': None, 'b': None}, weights=36, total=72)
    """

    channels: tuple[int, ...]
    columns: dict[str, int | None]
    weights: int
    total: int


def kernels(found: Sequence[Group], params: Any) -> tuple[Kernel, ...]:
    """The convolutions of a network, with their groups.

    Args:
      found: from `compaction.groups`.
      params: arrays or shapes, the tree that was analysed.

    Returns:
      A `Kernel` for each leaf of four axes, in leaf order.

    Raises:
      ValueError: a kernel that touches only a part of a group, or one channel twice: its size after pruning would
        depend on which channels stay.

    Example:
      >>> from compressx import compaction
      >>> units = np.arange(4)  # of the four channels between two convolutions
      >>> found = [compaction.Group(4, (compaction.Slot("a", 3, units, "out"), compaction.Slot("b", 2, units, "in")))]
      >>> params = {"a": np.ones((3, 3, 1, 4)), "b": np.ones((3, 3, 4, 1))}
      >>> [(k.path, k.makes, k.reads) for k in compaction.kernels(found, params)]
      [('a', (0,), ()), ('b', (), (0,))]
    """
    out = []
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if len(leaf.shape) != 4:
            continue
        touched: dict[str, list[int]] = {"out": [], "in": []}
        for number, group in enumerate(found):
            for slot in group.slots:
                if slot.path == path and slot.role in touched:
                    held = slot.units[slot.units >= 0]
                    if held.size != group.size or np.unique(held).size != group.size:
                        raise ValueError(f"{path}: holds {held.size} channels of a group of {group.size}, not all once")
                    touched[slot.role].append(number)
        out.append(Kernel(path, tuple(leaf.shape), tuple(touched["out"]), tuple(touched["in"])))
    return tuple(out)


def _extent(kernel: Kernel, found: Sequence[Group], channels: Sequence[int]) -> tuple[int, int]:
    """Positions and filters of a kernel once so many channels of each group stay."""
    kh, kw, cin, cout = kernel.shape
    lost = [sum(found[g].size - channels[g] for g in groups) for groups in (kernel.reads, kernel.makes)]
    return kh * kw * (cin - lost[0]), cout - lost[1]


def count_weights(
    found: Sequence[Group],
    convolutions: Sequence[Kernel],
    channels: Sequence[int],
    columns: Mapping[str, int | None] | None = None,
) -> int:
    """Weights of all kernels after compaction."""
    total = 0
    for kernel in convolutions:
        positions, filters = _extent(kernel, found, channels)
        kept = None if columns is None else columns.get(kernel.path)
        total += (positions if kept is None else min(kept, positions)) * filters
    return total


def amounts(
    found: Sequence[Group],
    convolutions: Sequence[Kernel],
    kind: str,
    rate: float,
    *,
    power: float = 0.5,
    share: float = 0.5,
    least: int = 1,
) -> Amounts:
    """Shares out what may stay, so that the kernels together have `rate` times fewer weights, no more.

    A group of n channels keeps about c * n^power of them, a kernel of p positions about c * p^power: with a power below
    1, large layers, which hold nearly all weights, give more than small ones. c is found by bisection; what rounding
    leaves over goes, one at a time, to whoever is furthest below its share. With "combined" a kernel that is the only
    reader of some channels keeps a position for each, as long as the rate allows: a channel that nobody reads is lost.

    Args:
      found: from `compaction.groups`.
      convolutions: from `kernels`.
      kind: "filters" (whole channels), "columns" (positions), or "combined": channels at rate^share, then positions of
        what they leave.
      rate: weights before over weights after, all kernels counted, the ones that keep everything too.
      power: see above, in 0..1.
      share: see above, in 0..1.
      least: channels of a group and positions of a kernel that stay at least, where there are so many.

    Returns:
      `Amounts`: channels of each group, positions of each kernel, and the weights that leaves.

    Raises:
      ValueError: an unknown kind, a rate below 1, or one that even `least` does not reach.

    Example:
      >>> from compressx import compaction
      >>> units = np.arange(4)  # of the four channels between two convolutions
      >>> found = [compaction.Group(4, (compaction.Slot("a", 3, units, "out"), compaction.Slot("b", 2, units, "in")))]
      >>> params = {"a": np.ones((3, 3, 1, 4)), "b": np.ones((3, 3, 4, 1))}
      >>> kept = compaction.amounts(found, compaction.kernels(found, params), "columns", rate=3.0)
      >>> kept.columns, kept.weights, kept.total
      ({'a': 4, 'b': 8}, 24, 72)
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if not rate >= 1 or not 0 <= power <= 1 or not 0 <= share <= 1 or least < 1:
        raise ValueError(f"rate={rate} must be 1 or more, power={power} and share={share} in 0..1, least={least} >= 1")
    sizes = [g.size for g in found]
    total = count_weights(found, convolutions, sizes)
    channels = list(sizes)
    if kind != "columns":
        goal = total / (rate if kind == "filters" else rate**share)
        floors = [least] * len(sizes)
        channels = _share_out(sizes, lambda k: count_weights(found, convolutions, k), goal, power, floors)
    columns: dict[str, int | None] = {k.path: None for k in convolutions}
    if kind != "filters":
        extents = [_extent(k, found, channels) for k in convolutions]
        floors = [least] * len(convolutions)
        if kind == "combined":
            readers = Counter(g for k in convolutions for g in k.reads)
            for i, k in enumerate(convolutions):
                if any(readers[g] == 1 for g in k.reads):
                    floors[i] = max(least, extents[i][0] // (k.shape[0] * k.shape[1]))

        def weigh(columns: Sequence[int]) -> int:
            return sum(n * f for n, (_, f) in zip(columns, extents, strict=True))

        if weigh([min(a, p) for a, (p, _) in zip(floors, extents, strict=True)]) > total / rate:
            floors = [least] * len(convolutions)
        kept = _share_out([p for p, _ in extents], weigh, total / rate, power, floors)
        columns = {k.path: c for k, c in zip(convolutions, kept, strict=True)}
    weights = count_weights(found, convolutions, channels, columns)
    return Amounts(tuple(channels), columns, weights, total)


def _share_out(
    sizes: Sequence[int], weigh: Callable[[Sequence[int]], int], goal: float, power: float, floors: Sequence[int]
) -> list[int]:
    """Integers near c * size^power, between floor and size, of weight at most `goal` and nearly it."""

    def at(c: float) -> list[int]:
        return [min(n, max(least, math.floor(c * n**power))) for n, least in zip(sizes, floors, strict=True)]

    low, high = 0.0, float(max(n ** (1 - power) for n in sizes)) + 1
    if weigh(at(low)) > goal:
        raise ValueError(f"even {min(floors)} of each leaves {weigh(at(low))} weights, more than the {goal:.0f} wanted")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if weigh(at(middle)) <= goal else (low, middle)
    kept = at(low)
    while True:
        wants = sorted(range(len(sizes)), key=lambda i: kept[i] - low * sizes[i] ** power)
        for i in wants:
            tried = [*kept[:i], kept[i] + 1, *kept[i + 1 :]]
            if kept[i] < sizes[i] and kept[i] + 1 <= low * sizes[i] ** power + 1 and weigh(tried) <= goal:
                kept = tried
                break
        else:
            return kept


def structure_rules(
    found: Sequence[Group],
    params: Any,
    kept: Amounts,
    *,
    pattern: str | None = None,
    selection: str = "energy",
    seed: int = 0,
) -> list[tuple[str, Constraint]]:
    """The rule that prunes a network to these amounts: one constraint over all weights that touch a channel.

    Args:
      found: from `compaction.groups`.
      params: arrays or shapes, the tree that was analysed.
      kept: from `amounts`.
      pattern: a short regular expression to name the rule by, which must match the same leaves; None: their names.
      selection: see `constraints.network_structure`.
      seed: likewise.

    Returns:
      One (pattern, constraint), a list of rules.

    Raises:
      ValueError: the pattern matches other leaves than the structure holds.

    Example:
      >>> from compressx import compaction
      >>> units = np.arange(4)  # of the four channels between two convolutions
      >>> found = [compaction.Group(4, (compaction.Slot("a", 3, units, "out"), compaction.Slot("b", 2, units, "in")))]
      >>> params = {"a": np.ones((3, 3, 1, 4)), "b": np.ones((3, 3, 4, 1))}
      >>> kept = compaction.amounts(found, compaction.kernels(found, params), "filters", rate=2.0)
      >>> [(pattern, constraint)] = compaction.structure_rules(found, params, kept)
      >>> pattern, constraint.spec["kind"]
      ('a|b', 'network_structure')
    """
    first = np.cumsum([0, *(g.size for g in found)])
    names = paths(params)
    shapes = [tuple(leaf.shape) for leaf in jax.tree.leaves(params)]
    members: dict[str, dict[str, Any]] = {}
    for path, shape in zip(names, shapes, strict=True):
        held = [(number, s) for number, g in enumerate(found) for s in g.slots if s.path == path]
        if not held and kept.columns.get(path) is None:
            continue
        member: dict[str, Any] = {"columns": kept.columns.get(path)}
        for role, wanted in (("makes", ("out", "along")), ("reads", ("in",))):
            mine = [(number, s) for number, s in held if s.role in wanted]
            axes = {s.axis for _, s in mine}
            if len(axes) > 1:
                raise ValueError(f"{path}: {role} channels on the axes {sorted(axes)}, and a member has one")
            units = np.full(shape[next(iter(axes))] if axes else 0, -1)
            for number, s in mine:
                units[s.units >= 0] = first[number] + s.units[s.units >= 0]
            member |= {role: next(iter(axes), None), f"{role}_units": runs(units) if axes else None}
        members[path] = member
    expression = pattern if pattern is not None else "|".join(map(re.escape, members))
    matched = [name for name in names if re.fullmatch(expression, name)]
    if matched != list(members):
        odd = sorted(set(matched) ^ set(members))
        raise ValueError(f"pattern {expression!r} and the structure differ in {', '.join(odd)}")
    groups = [(int(a), g.size, k) for a, g, k in zip(first, found, kept.channels, strict=False)]
    return [(expression, network_structure(list(members.values()), groups, selection=selection, seed=seed))]
