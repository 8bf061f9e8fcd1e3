"""A time step of RTMobile's 2 x 1024 network at each rate: stored blocks against dense, and faster than real time by.

    python -m benchmarks.speech_step [--cores=1] [--hidden=1024] [--rates=10,29,301] [--results=docs/results]

Weights are random and put into BSP's set, for only their positions matter here. All networks take their turn in every
round; ratios are taken within a round, and only where the native kernels are active: for `bspc_xla`, the fallback,
times alone are given. The real-time factor is from sound to outputs, a second of noise in chunks of 0.1 s.
"""

import argparse
import os
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import measure, spread


def networks(hidden: int, wanted: list[int]) -> dict[str, Any]:
    """`dense` and one of each rate, as packed leaves."""
    import jax
    import jax.numpy as jnp

    from compressx import constraints, formats
    from compressx.tree import paths
    from experiments.common import models
    from experiments.gru_speech.speech import rates

    model = models.build("gru", classes=48, hidden=hidden)
    params = model.init(jax.random.key(0), jnp.zeros((1, 1, 39)))
    leaves = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    shapes = {n: w.shape for n, w in leaves.items() if "/gru_" in n and w.ndim == 2}
    out = {"dense": {n: formats.pack(w, format="dense") for n, w in leaves.items()}}
    for rate in wanted:
        keep = rates.budgets(shapes, rate, rates.ROW_RATES.get(rate, rate**0.5))
        packed = dict(out["dense"])
        for name, spec in rates.rules("bsp", shapes, keep)[-1]:
            c = constraints.from_spec(spec)
            s = c.init(leaves[name])
            packed[name] = formats.pack(c.project(leaves[name], s), c, s, "bspc")
        out[f"{rate}x"] = packed
    return out


def times(dense: list[float], ours: list[float], native: bool) -> dict[str, dict[str, float]]:
    """Milliseconds of a step and, for the native way, the ratios within each round, from seconds of every round."""
    row = {"step_ms": spread([1e3 * t for t in ours])}
    if native:
        row["dense_over_this"] = spread([a / b for a, b in zip(dense, ours, strict=True)])
    return row


def compare(hidden: int, wanted: list[int], rounds: int) -> dict[str, dict[str, Any]]:
    """A row for each rate and way: milliseconds a step, dense over it where native, energy estimates, real time."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from experiments.gru_speech.speech import FrontEnd, streaming

    state, x = jnp.zeros((2, 1, hidden)), jnp.ones((1, 39))
    stored = networks(hidden, wanted)
    runs, nets = {}, {}
    for name, packed in stored.items():
        for way in ("dense",) if name == "dense" else [w for w in streaming.ways() if w != "dense"]:
            label = name if name == "dense" else f"{name}-{way}"
            nets[label] = (name, way, streaming.prepare(packed, way, 2))
            step = jax.jit(streaming.make_step(way))
            runs[label] = lambda step=step, network=nets[label][2]: jax.block_until_ready(step(network, state, x))
    elapsed, _ = measure(runs, rounds)
    noise = (np.random.default_rng(0).normal(size=16_000) * 1000).astype(np.int16)
    rows = {}
    for label, (name, way, network) in nets.items():
        work = streaming.work(stored[name])
        live = streaming.real_time(network, streaming.make_step(way), noise, 16_000, FrontEnd(), state, rounds=3)
        rows[label] = {
            **times(elapsed["dense"], elapsed[label], way == "bspc_native"),
            "multiply_adds": work.multiply_adds,
            "weight_bytes": work.weight_bytes,
            "energy_uj_dram": streaming.energy_uj(work),
            "real_time": live,
        }
    return rows


def main() -> None:
    """Runs all rates and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rates", default="10,20,29,80,103,245,301")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--results", type=Path, help="folder to keep the rows in, such as docs/results")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= args.cores <= len(cores) or args.rounds < 2:
        parser.error(f"--cores must be 1 to {len(cores)} and --rounds at least 2")
    os.sched_setaffinity(0, cores[: args.cores])  # before jax makes its thread pool
    rows = compare(args.hidden, [int(r) for r in args.rates.split(",")], args.rounds)
    for label, row in rows.items():
        t, live, ratio = row["step_ms"], row["real_time"], row.get("dense_over_this")
        faster = f"{ratio['median']:.1f}x dense  " if ratio else ""
        print(
            f"{label:16} {t['median']:.3f} ms [{t['low']:.3f}, {t['high']:.3f}]  {faster}"
            f"{live['factor']:.1f}x real time ({live['network_factor']:.1f}x without the front end)"
        )
    if args.results:
        record(args.results, "speech_step", rows, environment())


if __name__ == "__main__":
    main()
