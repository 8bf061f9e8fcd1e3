"""Sharing out a density over the leaves of a network: uniform, Erdos-Renyi-Kernel, or by a budget of bytes or FLOPs.

Every function maps `path -> shape` to `path -> number of weights to keep`, exact integers whose sum is the budget, so
that a list of rules is one comprehension: `[(p, unstructured(keep=k)) for p, k in erk(shapes, 0.1).items()]`.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import jax

from compressx.rules import path_name

Shapes = Mapping[str, tuple[int, ...]]


def shapes(params: Any, pattern: str = ".*kernel") -> dict[str, tuple[int, ...]]:
    """`path -> shape` of the leaves whose whole path matches.

    Raises:
      ValueError: the pattern matches no leaf.
    """
    flat = jax.tree_util.tree_leaves_with_path(params)
    named = {path_name(p): tuple(leaf.shape) for p, leaf in flat}
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

    Raises:
      ValueError: the density is not in (0, 1], or keeps no weight of some leaf.
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

    Source: U. Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020.
    """
    _check(density)
    sizes = {n: _size(s) for n, s in leaf_shapes.items()}
    return _share(sizes, _erk_weight(leaf_shapes), math.floor(density * sum(sizes.values()) + 0.5))


def by_bytes(leaf_shapes: Shapes, budget: int, value_bytes: int = 4, index_bits: float = 1.0) -> dict[str, int]:
    """ERK shares of the number of weights that fit a byte budget.

        bytes = kept * value_bytes + all * index_bits / 8     (index_bits = 1: a bitmask; 0: free structure)

    Raises:
      ValueError: the budget does not even hold the indices and one weight a leaf.
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

    Raises:
      ValueError: a leaf has no entry in `positions`, or the budget is below one weight a leaf.
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
