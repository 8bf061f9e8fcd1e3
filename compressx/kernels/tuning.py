"""Tiles and loop order of a layer: a model that predicts a good start, a seeded search from there, a cache of results.

    plan = tuning.guess(s, geometry, grid)                       # the model alone: microseconds
    plan = tuning.search(s, geometry, grid, seed=0).plan         # measured, from the model's best and their neighbours

Measurements interleave their candidates and compare best samples, since other programs only ever make a sample slower.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx import cache, compiled
from compressx.kernels import native, pattern_conv, schedule
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


class Result(NamedTuple):
    """What a search found.

    Attributes:
      plan: the fastest.
      seconds: its best sample.
      tried: (plan, best sample) of every candidate, in the order of evaluation.
    """

    plan: Plan
    seconds: float
    tried: tuple[tuple[Plan, float], ...]


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


def _runner(s: Sparse, geometry: Geometry, g: Grid, plan: Plan, x: jax.Array, threads: int) -> Callable[[], object]:
    ready = pattern_conv.layer(s, geometry, g, plan, activation="relu")
    arrays = jax.tree.map(jnp.asarray, ready.arrays)
    f = jax.jit(lambda arrays, x: pattern_conv.run(ready.fixed, arrays, x, None, threads))
    f(arrays, x).block_until_ready()
    return lambda: f(arrays, x).block_until_ready()


def _measure(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Best sample of each, candidates interleaved."""
    best = [float("inf")] * len(runs)
    for _ in range(rounds):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def compare(
    s: Sparse, geometry: Geometry, g: Grid, plans: Sequence[Plan], *, rounds: int = 5, threads: int = 0
) -> list[float]:
    """Seconds of a layer by each plan, best of the rounds, interleaved."""
    shape = (s.shape[2] * geometry.groups * len(geometry.phases()), g.plane, g.lanes)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    return _measure([_runner(s, geometry, g, plan, x, threads) for plan in plans], rounds)


def _neighbours(plan: Plan, pool: Sequence[Plan]) -> list[Plan]:
    """Plans of the same order that differ in one choice, by the next value of it."""

    def apart(a: Plan, b: Plan) -> int:
        return sum(x != y for x, y in zip(a, b, strict=True))

    return [p for p in pool if p.order == plan.order and apart(p, plan) == 1 and abs(p.width - plan.width) <= 2]


def search(
    s: Sparse,
    geometry: Geometry,
    g: Grid,
    *,
    seed: int = 0,
    budget: int = 12,
    rounds: int = 5,
    threads: int = 0,
    start: str = "model",
) -> Result:
    """Measures up to `budget` plans: half are the start, the rest neighbours of the fastest so far, drawn by the seed.

    Args:
      s, geometry, g: the layer.
      seed: of the draws.
      budget: plans measured.
      rounds: samples of each.
      threads: of the layer.
      start: "model" (its best predictions, of every order at least one) or "random" (all of the budget drawn at random:
        the baseline at equal evaluations).

    Raises:
      ValueError: budget < 1 or an unknown start.
    """
    if budget < 1 or rounds < 1 or start not in ("model", "random"):
        raise ValueError(f"needs budget and rounds of at least 1 and start 'model' or 'random', got {start!r}")
    rng = np.random.default_rng(seed)
    pool = sorted(candidates(s, geometry, g), key=lambda plan: predict(s, geometry, g, plan, cores(threads)))
    tried: dict[Plan, float] = {}

    def evaluate(plans: Sequence[Plan]) -> None:
        times = compare(s, geometry, g, plans, rounds=rounds, threads=threads)
        tried.update(zip(plans, times, strict=True))

    if start == "random":
        chosen = rng.choice(len(pool), size=min(budget, len(pool)), replace=False)
        evaluate([pool[i] for i in chosen])
    else:
        first = [next(p for p in pool if p.order == order) for order in dict.fromkeys(p.order for p in pool)]
        first += [p for p in pool if p not in first][: max(0, -(-budget // 2) - len(first))]
        evaluate(first[:budget])
        while len(tried) < min(budget, len(pool)):
            best = min(tried, key=lambda p: tried[p])
            near = [p for p in _neighbours(best, pool) if p not in tried] or [p for p in pool if p not in tried]
            picked = rng.permutation(len(near))[: min(3, budget - len(tried))]
            evaluate([near[i] for i in picked])
    best = min(tried, key=lambda p: tried[p])
    return Result(best, tried[best], tuple(tried.items()))


# --- the cache: one JSON file, plan by key; what cannot be read counts as absent.


def _key(s: Sparse, geometry: Geometry, g: Grid, threads: int) -> str:
    facts = (compiled.processor(), native.isa_of(g), threads, geometry, g, s.shape, len(s.place), s.patterns.tolist())
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:32]


def _plans() -> Path:
    return cache.cache_folder("tuning") / "plans.json"


def _read() -> dict[str, list[object]]:
    try:
        held = json.loads(_plans().read_text())
    except (OSError, ValueError):
        return {}
    return held if isinstance(held, dict) else {}


def _write(key: str, plan: Plan) -> None:
    try:
        path = _plans()
        path.parent.mkdir(parents=True, exist_ok=True)
        cache.sweep(path.parent, alone=False)
        with cache.scratch(path.parent) as scratch:
            made = scratch / "plans"
            made.write_text(json.dumps(_read() | {key: list(plan)}))
            cache.publish(made, path)
    except OSError:
        pass  # a result that is not kept is found again


def tuned(s: Sparse, geometry: Geometry, g: Grid, *, seed: int = 0, budget: int = 12, threads: int = 0) -> Plan:
    """The plan of the cache, or of a search whose result is then kept."""
    key = _key(s, geometry, g, threads)
    held = _read().get(key)
    pool = candidates(s, geometry, g)
    if isinstance(held, list):
        found = next((p for p in pool if list(p) == held), None)
        if found is not None:
            return found
    plan = search(s, geometry, g, seed=seed, budget=budget, threads=threads).plan
    _write(key, plan)
    return plan
