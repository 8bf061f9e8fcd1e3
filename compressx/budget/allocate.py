"""Sharing out a density over a network's leaves: uniform, Erdos-Renyi-Kernel, or a budget by size or sensitivity.

The functions map `path -> shape` to `path -> number of weights to keep`, exact integers whose sum is the budget, so
that a list of rules is one comprehension: `[(p, unstructured(keep=k)) for p, k in erk(shapes, 0.1).items()]`.
`by_sensitivity` chooses among rates whose loss was measured, within a budget of bytes, multiply-adds or time.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from compressx.budget.sensitivity import Row
from compressx.tree import paths

Shapes = Mapping[str, tuple[int, ...]]


def shapes(params: Any, pattern: str = ".*kernel") -> dict[str, tuple[int, ...]]:
    """`path -> shape` of the leaves whose whole path matches.

    Args:
      params: pytree of arrays or shapes.
      pattern: regular expression for the slash-joined path.

    Returns:
      `path -> shape`, in leaf order.

    Raises:
      ValueError: the pattern matches no leaf.

    Example:
      >>> from compressx.budget import allocate
      >>> allocate.shapes({"a": {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}})
      {'a/kernel': (3, 4)}
    """
    named = {name: tuple(leaf.shape) for name, leaf in zip(paths(params), jax.tree.leaves(params), strict=True)}
    out = {name: shape for name, shape in named.items() if re.fullmatch(pattern, name)}
    if not out:
        raise ValueError(f"{pattern!r} matches no leaf; the paths are {', '.join(named)}")
    return out


def _size(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def _check(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density}")


def _erk_weight(leaf_shapes: Shapes) -> dict[str, float]:
    return {n: float(sum(s)) for n, s in leaf_shapes.items()}


def _share(sizes: Mapping[str, int], weight: Mapping[str, float], budget: int) -> dict[str, int]:
    """Integers 1 <= k <= size, in proportion to `weight`, that sum to the budget; full leaves pass the rest on.

    Fractions are rounded by largest remainder; ties go to the earlier leaf.
    """
    if not len(sizes) <= budget <= sum(sizes.values()):
        raise ValueError(
            f"a budget of {budget} weights is impossible for {len(sizes)} leaves of {sum(sizes.values())} weights "
            "that each keep at least one"
        )
    fixed: dict[str, int] = {}
    while True:
        free = [n for n in sizes if n not in fixed]
        rest = budget - sum(fixed.values())
        total = sum(weight[n] for n in free)
        wanted = {n: rest * weight[n] / total for n in free}
        full = {n: sizes[n] for n in free if wanted[n] >= sizes[n]}
        poor = {n: 1 for n in free if wanted[n] < 1}
        if full and len(full) < len(free):
            fixed |= full
        elif poor and len(poor) < len(free):
            fixed |= poor
        else:
            break
    down = {n: min(math.floor(wanted[n]), sizes[n]) for n in free}
    left = rest - sum(down.values())
    for n in sorted(free, key=lambda n: down[n] - wanted[n]):
        if left > 0 and down[n] < sizes[n]:
            down[n] += 1
            left -= 1
    kept = fixed | down
    return {n: kept[n] for n in sizes}


def uniform(leaf_shapes: Shapes, density: float) -> dict[str, int]:
    """Every leaf keeps the same share: floor(density * n + 1/2) of its n weights.

    Args:
      leaf_shapes: path -> shape.
      density: share kept, in (0, 1].

    Returns:
      path -> weights to keep.

    Raises:
      ValueError: the density is not in (0, 1], or keeps no weight of some leaf.

    Example:
      >>> from compressx.budget import allocate
      >>> allocate.uniform({"a": (10, 10), "b": (20,)}, 0.25)
      {'a': 25, 'b': 5}
    """
    _check(density)
    out = {n: math.floor(density * _size(s) + 0.5) for n, s in leaf_shapes.items()}
    empty = [n for n, k in out.items() if k == 0]
    if empty:
        raise ValueError(f"density={density} keeps no weight of {', '.join(empty)}; leave them out or raise it")
    return out


def erk(leaf_shapes: Shapes, density: float) -> dict[str, int]:
    """Erdos-Renyi-Kernel: a leaf's density is proportional to (sum of its axes) / (product of its axes).

        density_l ~ (kh + kw + cin + cout) / (kh * kw * cin * cout)

    Small leaves stay denser; leaves that would pass density 1 stay whole and the others share what is left. The total
    is floor(density * all + 1/2), exactly.

    Args:
      leaf_shapes: path -> shape.
      density: share of all weights kept, in (0, 1].

    Returns:
      path -> weights to keep, at least one each.

    Raises:
      ValueError: the density is not in (0, 1], or keeps fewer weights than there are leaves.

    Source: U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020.

    Example:
      >>> from compressx.budget import allocate
      >>> allocate.erk({"large": (100, 100), "small": (10, 10)}, 0.1)  # 1,010 weights; small leaves stay denser
      {'large': 918, 'small': 92}
    """
    _check(density)
    sizes = {n: _size(s) for n, s in leaf_shapes.items()}
    return _share(sizes, _erk_weight(leaf_shapes), math.floor(density * sum(sizes.values()) + 0.5))


def by_bytes(leaf_shapes: Shapes, budget: int, value_bytes: int = 4, index_bits: float = 1.0) -> dict[str, int]:
    """ERK shares of the number of weights that fit a byte budget.

        bytes = kept * value_bytes + all * index_bits / 8     (index_bits = 1: a bitmask; 0: free structure)

    Args:
      leaf_shapes: path -> shape.
      budget: bytes of all leaves together.
      value_bytes: of a kept weight.
      index_bits: of each weight, kept or not.

    Returns:
      path -> weights to keep, at least one each.

    Raises:
      ValueError: the budget does not even hold the indices and one weight a leaf.

    Example:
      >>> from compressx.budget import allocate
      >>> allocate.by_bytes({"a": (10, 10)}, budget=200, index_bits=0)  # 50 floats
      {'a': 50}
    """
    total = sum(_size(s) for s in leaf_shapes.values())
    kept = math.floor((budget - math.ceil(total * index_bits / 8)) / value_bytes)
    if kept < len(leaf_shapes):
        raise ValueError(
            f"a budget of {budget} bytes leaves room for {kept} weights of {value_bytes} bytes after "
            f"{math.ceil(total * index_bits / 8)} bytes of indices; {len(leaf_shapes)} leaves need at least one each"
        )
    sizes = {n: _size(s) for n, s in leaf_shapes.items()}
    return _share(sizes, _erk_weight(leaf_shapes), min(kept, total))


def by_flops(leaf_shapes: Shapes, positions: Mapping[str, int], budget: int) -> dict[str, int]:
    """ERK shares scaled so that the multiply-adds fit a budget.

        multiply-adds = sum over leaves of kept_l * positions_l

    Args:
      leaf_shapes: path -> shape.
      positions: path -> how often each weight is used in one inference (output height * width; 1 for a dense layer).
      budget: multiply-adds of one inference.

    Returns:
      path -> weights to keep, at least one each.

    Raises:
      ValueError: a leaf has no entry in `positions`, or the budget is below one weight a leaf.

    Example:
      >>> from compressx.budget import allocate
      >>> allocate.by_flops({"a": (10, 10)}, {"a": 4}, budget=200)  # each weight is used four times
      {'a': 50}
    """
    missing = [n for n in leaf_shapes if n not in positions]
    if missing:
        raise ValueError(f"positions is missing {', '.join(missing)}")
    sizes = {n: _size(s) for n, s in leaf_shapes.items()}
    weight = _erk_weight(leaf_shapes)

    def cost(kept: Mapping[str, int]) -> int:
        return sum(k * positions[n] for n, k in kept.items())

    low, high = len(sizes), sum(sizes.values())
    if cost(_share(sizes, weight, low)) > budget:
        least = cost(_share(sizes, weight, low))
        raise ValueError(f"a budget of {budget} multiply-adds is below the {least} of one weight a leaf")
    while low < high:  # the largest number of weights whose cost fits
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(_share(sizes, weight, middle)) <= budget else (low, middle - 1)
    return _share(sizes, weight, low)


def by_sensitivity(rows: Sequence[Row], cost: Callable[[Row], float], budget: float, states: int = 4096) -> list[Row]:
    """One rate per leaf, of those measured, so that the losses added up are least within a budget.

        argmin over choices  sum_l change(l, d_l)   s.t.   sum_l cost(l, d_l) <= budget

    A multiple-choice knapsack, solved over leaves by keeping the choices so far that no other one beats in both cost
    and loss: exact while there are at most `states` of them. Beyond that the budget is cut into `states` equal steps
    and the best choice of each step goes on: the budget still holds, the loss is near the least. That the losses of
    leaves add up is an assumption; after pruning all of them together it has to be measured.

    Args:
      rows: from `sensitivity`, for every leaf the same or different densities; smaller `change` is better.
      cost: of a row, in the budget's unit, not negative: `bytes_cost()`, `flops_cost(positions)`, `table_cost(table)`.
      budget: the most that all leaves may cost.
      states: how many partial choices are kept.

    Returns:
      The chosen row of every leaf, in the leaves' first order.

    Raises:
      ValueError: no rows, a cost or change that is not a number, or a budget below the cheapest choice.

    Example:
      >>> from compressx.budget.allocate import by_sensitivity, bytes_cost
      >>> from compressx.budget.sensitivity import Row
      >>> rows = [Row("a", 1.0, 8, 8, 8, 0.1, 0.0), Row("a", 0.5, 4, 8, 4, 0.2, 0.1)]
      >>> rows += [Row("b", 1.0, 8, 8, 8, 0.1, 0.0), Row("b", 0.5, 4, 8, 4, 0.6, 0.5)]  # b suffers more
      >>> [(r.path, r.density) for r in by_sensitivity(rows, bytes_cost(), budget=48)]
      [('a', 0.5), ('b', 1.0)]
    """
    options: dict[str, list[tuple[float, float, Row]]] = {}
    for row in rows:
        c = float(cost(row))
        if not (math.isfinite(c) and c >= 0 and math.isfinite(row.change)):
            raise ValueError(f"{row.path} at density {row.density}: cost {c}, change {row.change}; both must be finite")
        options.setdefault(row.path, []).append((c, row.change, row))
    if not options:
        raise ValueError("there are no rows to choose from")
    rest = [min(c for c, _, _ in choices) for choices in options.values()]
    if sum(rest) > budget:
        raise ValueError(f"a budget of {budget} is below {sum(rest)}, the least that the measured rates can cost")
    front: list[tuple[float, float, tuple[Row, ...]]] = [(0.0, 0.0, ())]
    for number, choices in enumerate(options.values()):
        room = budget - sum(rest[number + 1 :])  # what the later leaves need at least is not spent
        tried = [(c0 + c, v0 + v, (*taken, row)) for c0, v0, taken in front for c, v, row in choices if c0 + c <= room]
        tried.sort(key=lambda t: t[:2])
        front = []
        for state in tried:
            if not front or state[1] < front[-1][1]:
                front.append(state)
        if len(front) > states:  # losses fall along the front: the last state of a step is its best
            best = {int(state[0] / room * states): state for state in front}
            front = [front[0], *(s for s in best.values() if s is not front[0])]  # the cheapest always goes on
    return list(min(front, key=lambda t: (t[1], t[0]))[2])


def bytes_cost(value_bytes: int = 4, index_bits: float = 0.0) -> Callable[[Row], float]:
    """Bytes of a row: `weights * value_bytes + groups * index_bits / 8` (index_bits = 1: a bitmask over the groups).

    Args:
      value_bytes: of a weight.
      index_bits: of a group; 1 is a bitmask, 0 a structure that costs nothing.

    Returns:
      What `by_sensitivity` takes as `cost`.

    Example:
      >>> from compressx.budget.allocate import bytes_cost
      >>> from compressx.budget.sensitivity import Row
      >>> bytes_cost(index_bits=1.0)(Row("a", 0.5, 8, 16, 8, 0.2, 0.1))  # 8 floats and 16 bits
      34
    """
    return lambda row: row.weights * value_bytes + math.ceil(row.groups * index_bits / 8)


def flops_cost(positions: Mapping[str, int]) -> Callable[[Row], float]:
    """Multiply-adds of a row: `weights * positions[path]`, positions as in `by_flops`.

    Args:
      positions: path -> how often each weight is used in one inference.

    Returns:
      What `by_sensitivity` takes as `cost`; it raises a `ValueError` for a path without positions.

    Example:
      >>> from compressx.budget.allocate import flops_cost
      >>> from compressx.budget.sensitivity import Row
      >>> flops_cost({"conv": 64})(Row("conv", 0.5, 8, 16, 8, 0.2, 0.1))
      512.0
    """

    def cost(row: Row) -> float:
        if row.path not in positions:
            raise ValueError(f"positions is missing {row.path}")
        return float(row.weights * positions[row.path])

    return cost


def table_cost(table: Mapping[tuple[str, int], float]) -> Callable[[Row], float]:
    """Cost by measurement: `table[path, kept]`, such as the milliseconds of that layer with so many groups.

    Args:
      table: (path, groups kept) -> cost, in any unit.

    Returns:
      What `by_sensitivity` takes as `cost`; it raises a `ValueError` for a row that was not measured.

    Example:
      >>> from compressx.budget.allocate import table_cost
      >>> from compressx.budget.sensitivity import Row
      >>> table_cost({("conv", 8): 0.25})(Row("conv", 0.5, 8, 16, 8, 0.2, 0.1))
      0.25
    """

    def cost(row: Row) -> float:
        if (row.path, row.kept) not in table:
            raise ValueError(f"the table has no entry for {row.path} with {row.kept} of {row.groups} groups")
        return float(table[row.path, row.kept])

    return cost
