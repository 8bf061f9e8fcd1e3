"""The aggregator's work for one client's update: dense, common mask, the client's own mask, that obliviously.

    python -m benchmarks.aggregation [--density=0.05] [--rounds=5] [--results=docs/results]

Timed are `timing.measure`'s parts that run in the enclave: opening and parsing an update of float16 values, and adding
it to the average. SIMULATED: no enclave's paging or memory encryption is in it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import environment, record
from benchmarks.training import spread, table
from compressx.federated import timing
from compressx.federated.trusted import rounds
from compressx.federated.trusted.messages import Layer
from compressx.federated.trusted.rounds import Plan, State

MODELS = {"lenet5_caffe": (500, 25_000, 400_000, 5_000), "mobilenet_v2": (*[60_000] * 32, 320_000)}  # weights by layer
ARMS = {"dense": ("none", False), "common": ("common", False), "client": ("client", False)}
ARMS |= {"oblivious": ("client", True)}


def one(sizes: Sequence[int], density: float, sparsify: str, oblivious: bool) -> tuple[float, float]:
    """Milliseconds of parsing an update and of adding it, the smallest of three each."""
    budgets = [n if sparsify == "none" else round(density * n) for n in sizes]
    layers = tuple(Layer(f"layer{k}", n, b) for k, (n, b) in enumerate(zip(sizes, budgets, strict=True)))
    plan = Plan(layers, {0: ("00" * 32, 1)}, 1, sparsify, value_type="float16", oblivious=oblivious)
    rng = np.random.default_rng(0)
    flat, masks = rounds.prune(plan, [rng.standard_normal(n, np.float32) for n in sizes])
    costs = timing.measure(plan, State(0, flat, masks, bytes(32), {}))
    return 1e3 * costs.take, 1e3 * costs.average


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--density", type=float, default=0.05, help="share of the weights in a sparse update")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds, at least 2 (default 5)")
    parser.add_argument("--results", type=Path, help="folder for the summaries that the tables are built from")
    args = parser.parse_args()
    if args.rounds < 2 or not 0 < args.density < 1:
        parser.error(f"--rounds={args.rounds} must be at least 2, --density={args.density} between 0 and 1")
    rows = []
    for model, sizes in MODELS.items():
        times: dict[str, list[float]] = {name: [] for name in ARMS}
        for _ in range(args.rounds):  # the arms in turn, so that a loaded machine is loaded for all
            for name, (sparsify, oblivious) in ARMS.items():
                times[name].append(sum(one(sizes, args.density, sparsify, oblivious)))
        row: dict[str, Any] = {"case": model, "weights": sum(sizes), "density": args.density}
        row |= {f"{name}_ms": spread(t) for name, t in times.items()}
        pairs = zip(times["oblivious"], times["client"], strict=True)
        row["oblivious_over_client"] = spread([a / b for a, b in pairs])
        rows.append(row)
        print(table(rows[-1:]), flush=True)
    if args.results:
        about = environment(("numpy", "cryptography"))
        record(args.results, "aggregation", {row.pop("case"): row for row in rows}, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
