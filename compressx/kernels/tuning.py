"""A seeded, measured search for the tiles and loop order of a layer, from the model's choice, and a cache of results.

    plan = tuning.search(s, geometry, grid, seed=0).plan         # measured, from the model's best and their neighbours

Measurements interleave their candidates and compare best samples, since other programs only ever make a sample slower.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx import cache
from compressx.kernels import native, pattern_conv
from compressx.kernels.grid import Grid
from compressx.kernels.plans import candidates, cores, predict
from compressx.kernels.schedule import Geometry, Plan, Sparse
from compressx.native import build as compiled
from compressx.timing import interleaved


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


def _runner(s: Sparse, geometry: Geometry, g: Grid, plan: Plan, x: jax.Array, threads: int) -> Callable[[], object]:
    ready = pattern_conv.layer(s, geometry, g, plan, activation="relu")
    arrays = jax.tree.map(jnp.asarray, ready.arrays)
    f = jax.jit(lambda arrays, x: pattern_conv.run(ready.fixed, arrays, x, None, threads))
    return lambda: f(arrays, x)


def compare(
    s: Sparse, geometry: Geometry, g: Grid, plans: Sequence[Plan], *, rounds: int = 5, threads: int = 0
) -> list[float]:
    """Seconds of a layer by each plan, best of the rounds, interleaved."""
    shape = (s.shape[2] * geometry.groups * len(geometry.phases()), g.plane, g.lanes)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    calls = {number: _runner(s, geometry, g, plan, x, threads) for number, plan in enumerate(plans)}
    return [min(spent) for spent in interleaved(calls, rounds).values()]


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
