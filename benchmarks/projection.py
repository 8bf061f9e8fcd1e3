"""Every projection on a leaf of 16.8 million weights, beside one `jnp.sort` of the same leaf.

    python -m benchmarks.projection [--side=4096] [--rounds=3] [--only=darb] [--results=docs/results]

Timed is `constraint.project(w, structure)`, jitted, with what `init` chose; the time of `init` stands beside it. The
sort, far the slowest of all on a CPU, runs once before every case, and the ratio is to that time.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import interleave, spread, table


def cases(side: int) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Constraints by name, with the shape of their leaf: a matrix, or 3x3 kernels of about as many weights."""
    import compressx as cx

    channels = round(side / 3)
    matrix, conv = (side, side), (3, 3, channels, channels)
    pruned = cx.filters_and_columns(0.5, 0.5)
    return {
        "unstructured": (cx.unstructured(0.1), matrix),
        "n_of_m": (cx.n_of_m(2, 4), matrix),
        "block": (cx.block((4, 4), 0.1), matrix),
        "filters": (cx.filters(0.5), matrix),
        "columns": (cx.columns(0.5), matrix),
        "channels": (cx.channels(0.5), conv),
        "filters_and_columns": (pruned, matrix),
        "pattern": (cx.pattern(k=8), conv),
        "pattern_all": (cx.pattern("all"), conv),
        "connectivity": (cx.connectivity(1 / 3.6), conv),
        "pattern_connectivity": (cx.pattern_connectivity(1 / 3.6, k=8), conv),
        "bsp_columns": (cx.bsp_columns(0.1, strips=8), matrix),
        "bsp_rows": (cx.bsp_rows(0.5, strips=8), matrix),
        "bsp": (cx.bsp(0.2, 0.5, column_strips=8, row_strips=8), matrix),
        "block_max": (cx.block_max(16), matrix),
        "darb": (cx.darb(1 / 16), matrix),
        "balanced_block_max": (cx.balanced_block_max(1 / 16), matrix),
        "bank_balanced": (cx.bank_balanced(1 / 8, 64), matrix),
        "crossbar_aware": (cx.crossbar_aware(0.5, 0.5), matrix),
        "polarize": (cx.polarize(8), matrix),
        "polarize_conv": (cx.polarize(8, order="W", rule="energy"), conv),
        "quantize": (cx.quantize(8), matrix),
        "quantize_codebook": (cx.quantize(4, grid="codebook"), matrix),
        "unify": (cx.unify((4, 4), 0.5), matrix),
        "prune_blocks": (cx.prune_blocks((4, 4), 0.5), matrix),
        "unify_and_prune": (cx.unify_and_prune((4, 4), 0.3, 0.5), matrix),
        "unify_and_prune_exact": (cx.unify_and_prune((4, 4), 0.3, 0.5, selection="exact"), matrix),
        "forms": (pruned & cx.polarize(8) & cx.quantize(8, grid="cells"), matrix),
    }


def sorter(side: int) -> Callable[[], Any]:
    """One sort of a leaf, compiled."""
    import jax
    import jax.numpy as jnp

    w = jax.random.normal(jax.random.key(0), (side, side))
    sort = jax.jit(lambda w: jnp.sort(w.ravel()))
    jax.block_until_ready(sort(w))
    return lambda: jax.block_until_ready(sort(w))


def seconds(step: Callable[[], Any]) -> float:
    """Elapsed seconds of one call."""
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def compare(name: str, side: int, rounds: int, sort: Callable[[], Any]) -> dict[str, Any]:
    """One row: milliseconds of the projection, of the sort and of init; the ratio to the sort."""
    import jax

    constraint, shape = cases(side)[name]
    w = jax.random.normal(jax.random.key(0), shape)
    init, project = jax.jit(constraint.init), jax.jit(constraint.project)
    structure = jax.block_until_ready(init(w))
    sort_s = seconds(sort)
    times = interleave({"project": lambda: jax.block_until_ready(project(w, structure))}, rounds)["project"]
    return {
        "case": name,
        "weights": w.size,
        "rounds": rounds,
        "sort_ms": 1e3 * sort_s,
        "init_ms": 1e3 * seconds(lambda: jax.block_until_ready(init(w))),
        "project_ms": spread([1e3 * t for t in times]),
        "ratio": spread([t / sort_s for t in times]),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=4096, help="of the square leaf (default 4096)")
    parser.add_argument("--rounds", type=int, default=3, help="measured rounds, at least 2 (default 3)")
    parser.add_argument("--only", default="", help="comma-separated cases; all where left out")
    parser.add_argument("--results", type=Path, help="folder for the summaries that the tables are built from")
    args = parser.parse_args()
    if args.rounds < 2 or args.side < 64:
        parser.error(f"--rounds={args.rounds} must be at least 2, --side={args.side} at least 64")
    known = cases(args.side)
    chosen = args.only.split(",") if args.only else list(known)
    unknown = [name for name in chosen if name not in known]
    if unknown:
        parser.error(f"--only: no case {', '.join(unknown)}; the cases are {', '.join(known)}")
    rows, sort = [], sorter(args.side)
    for name in chosen:
        rows.append(compare(name, args.side, args.rounds, sort))
        print(table(rows[-1:]), flush=True)
    if args.results:
        record(args.results, "projection", {row.pop("case"): row for row in rows}, environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
