"""Tiles and loop order of a layer: the plans there are, and a model that predicts which of them is fast.

plan = plans.guess(s, geometry, grid)          # microseconds; `tuning` measures from there
"""

import os

import numpy as np

from compressx.kernels import native, schedule
from compressx.kernels.grid import Grid
from compressx.kernels.schedule import Geometry, Plan, Sparse

_BLOCKS = (32, 64, 128, 256)
_GROUPS = (8, 16, 32, 64)

# Cycles, fitted to timings of 17 layers alone and of VGG-16's in the network, each by some 20 plans, on a Sapphire
# Rapids core (AVX-512; caches of 48 KiB and 2 MiB): the plan that they choose is on average 4 % slower than the fastest
# of the 20. Loads and stores of sums are what costs, more than the multiply-adds.
_KERNEL, _SUM, _VISIT, _INPUT = 3.0, 2.2, 15.0, 0.6  # kernels and chunks
_WEIGHT, _FMA, _FILTER = 3.0, 0.5, 13.0  # runs
_FAR, _FAR_SUM = 0.5, 0.7  # inputs and sums of runs beyond the first cache
_STORE = 8.0  # an output's way to memory
_L1 = 48 << 10


def candidates(s: Sparse, geometry: Geometry, g: Grid) -> list[Plan]:
    """Every plan that the search may choose for a layer."""
    isa, taps, cout = native.isa_of(g), s.patterns.shape[1], len(s.order)
    wide, wide_runs = native.WIDTHS[isa]
    directions = (False, True) if g.segment > 2 * g.row else (False,)
    blocks = sorted({min(b, cout) for b in _BLOCKS})
    found: list[Plan] = []
    parts = -(-taps // schedule.WIDEST)
    if taps > 1 and len(s.patterns) * parts <= schedule.MOST_PATTERNS:
        e = -(-taps // parts)
        found += [
            Plan("kernels", e, b, f, 0, d) for b in blocks for f in range(min(2, wide), wide + 1) for d in directions
        ]
    if geometry.groups == 1:
        found += [
            *(
                Plan("chunks", e, b, f, 0, d)
                for e in (4, 5)
                for b in blocks
                for f in range(2, wide + 1)
                for d in directions
            )
        ]
    cin = s.shape[2] * geometry.groups
    groups = sorted({min(c, cin) for c in _GROUPS})
    for d in directions:
        span = min(g.row, g.segment) if d else g.segment  # widths that share it out evenly
        widths = sorted({-(-span // n) for n in range(-(-span // wide_runs), span + 1)})
        widths = [f for f in widths if f > wide_runs // 3] or [min(span, wide_runs)]
        found += [Plan("runs", schedule.LONGEST, min(cout, 256), f, c, d) for c in groups for f in widths]
    return found


def cores(threads: int) -> int:
    """Threads that a layer runs on when at most so many are allowed; 0 is all."""
    if threads:
        return threads
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def predict(s: Sparse, geometry: Geometry, g: Grid, plan: Plan, threads: int = 1) -> float:
    """Cycles that the model expects; only their order matters."""
    f, cout, weights = min(plan.width, g.segment), len(s.order), int(np.count_nonzero(s.weight))
    tiles = -(-g.segment // f)
    if plan.columns:
        tiles = -(-min(g.row, g.segment) // f) * -(-g.segment // g.row)
    channels, blocks = s.shape[2] * geometry.groups, -(-cout // plan.filters)
    if plan.order == "runs":
        rows = len({(p, dy) for p, dy, _ in geometry.taps()})
        inputs = min(plan.channels, channels) * rows * (f + geometry.size[1] - 1) * g.lanes * 4
        sums = min(plan.filters, cout) * f * g.lanes * 4
        items = -(-channels // plan.channels) * cout
        fixed = weights * _WEIGHT + items * _FILTER
        each = weights * (_FMA + (_FAR if inputs > 0.75 * _L1 else 0.0)) + items * (_FAR_SUM if sums > _L1 / 2 else 0.0)
    else:
        if plan.order == "kernels":
            parts = -(-s.patterns.shape[1] // schedule.WIDEST)
            kernels, e = len(s.place) * parts, -(-s.patterns.shape[1] // parts)
            pairs = len(s.patterns) * s.shape[2] * parts
            visits = pairs * blocks * (1 - np.exp(-kernels / max(1, pairs * blocks)))
        else:
            e = plan.taps
            positions = s.shape[0] * s.shape[1] * s.shape[2]
            density = weights / max(1, positions * cout)
            kernels = -(-positions // e) * cout * (1 - (1 - density) ** e)
            visits = -(-positions // e) * blocks
        fixed = kernels * _KERNEL + visits * _VISIT
        each = kernels * _SUM * (e + 1) / 5 + visits * _INPUT * e
    turns = tiles * blocks
    return float(tiles * fixed + g.segment * (each + _STORE * cout)) * (-(-turns // threads) * threads / turns)


def guess(s: Sparse, geometry: Geometry, g: Grid, threads: int = 1) -> Plan:
    """The plan for which the model predicts the fewest cycles."""
    return min(candidates(s, geometry, g), key=lambda plan: predict(s, geometry, g, plan, threads))
