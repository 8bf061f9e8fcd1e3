"""Crossbar products against a float32 matrix product of the same shape in the same process, and against peers.

    python -m benchmarks.crossbar_mvm [--rounds=15] [--shape=1152,256] [--batch=256] [--threads=2] [--out=FILE]
    python -m benchmarks.crossbar_mvm --small      # a few seconds, to see that it works; its numbers mean nothing

The layer: 8-bit weights in four 2-bit slices, 8 input bits, 128 rows, 8-bit ADC. Weights are programmed before
timing. Every round times each case in turn, so that other work on the machine meets all alike; the ratio is taken
within a round, and the median of rounds is printed with its quartiles. Each case is checked once, on a few inputs and
filters, against the integer definition; a case that differs stops the program. Peers run where they are installed
(aihwkit-lightning: one conversion a tile instead of one a bit, slice and tile, so it is no like for like).
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

GOALS = {"ideal": 8.0, "lossless": 1.5, "polarized": 8.0, "conductances": 45.0}  # x the float32 product


def cases(w: np.ndarray, polar: np.ndarray, x: np.ndarray) -> dict[str, tuple[Callable[[], Any], int]]:
    """The product of each kind, ready to time, with the conversions that it stands for."""
    import jax
    import jax.numpy as jnp

    from compressx.crossbar import Adc, Design
    from compressx.crossbar.mvm import crossbar_matmul
    from compressx.crossbar.noise import Variation, perturb
    from compressx.crossbar.program import program
    from compressx.crossbar.reference import reference

    base = Design(adc=Adc(8))
    fragment = base.but(active_rows=8, adc=Adc(4), signs="polarized")
    everything = np.arange(len(w))
    matrices = {
        "ideal": (w, program(w, base, rows=everything, prove=False)),
        "ideal, lsb 3/2": (w, program(w, base.but(adc=Adc(8, Fraction(3, 2))), rows=everything, prove=False)),
        "lossless": (w, program(w, base.but(adc_bits=9), rows=everything)),
        "polarized": (polar, program(polar, fragment, rows=everything, prove=False)),
        "conductances": (w, None),
    }
    ideal = program(w, base, rows=everything, prove=False)
    matrices["conductances"] = (w, perturb(jax.random.key(0), ideal, Variation(sigma=0.1)))
    given = jnp.asarray(x, jnp.int32)
    made: dict[str, tuple[Callable[[], Any], int]] = {}
    for name, (ints, programmed) in matrices.items():
        assert programmed is not None
        run = jax.jit(lambda v, p: crossbar_matmul(v, p))
        if name != "conductances":
            few = np.asarray(run(given, programmed))[:2, :2]
            expected = reference(x[:2], ints[:, :2], programmed.design).y
            if not (few == expected).all():
                raise SystemExit(f"{name}: differs from the definition: {few.tolist()}, not {expected.tolist()}")
        design = programmed.design
        groups = -(-len(w) // design.active_rows)
        conversions = len(x) * design.cycles * groups * design.columns_per_weight * w.shape[1]
        made[name] = (lambda run=run, p=programmed: run(given, p).block_until_ready(), conversions)
    return made


def unit(w: np.ndarray, x: np.ndarray) -> Callable[[], Any]:
    """The float32 product of the same shape."""
    import jax
    import jax.numpy as jnp

    a, b = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)
    run = jax.jit(jnp.matmul)
    return lambda: run(a, b).block_until_ready()


def lightning(w: np.ndarray, x: np.ndarray, threads: int) -> Callable[[], Any] | None:
    """The layer in aihwkit-lightning with tiles of 128 rows and 8-bit converters, or None where it is not installed."""
    try:
        import torch
        from aihwkit_lightning.nn import AnalogLinear
        from aihwkit_lightning.simulator.configs import TorchInferenceRPUConfig
    except ImportError:
        return None
    torch.set_num_threads(threads)
    config = TorchInferenceRPUConfig()
    config.mapping.max_input_size = 128
    config.forward.inp_res = 2**8 - 2
    config.forward.out_res = 2**8 - 2
    layer = AnalogLinear(w.shape[0], w.shape[1], bias=False, rpu_config=config).eval()
    given = torch.tensor(x, dtype=torch.float32)

    def run() -> Any:
        with torch.no_grad():
            return layer(given)

    return run


def measure(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, in turn; one warm-up each."""
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--shape", default="1152,256")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    if args.small:
        args.rounds, args.shape, args.batch = 2, "144,16", 8
    rows, filters = (int(n) for n in args.shape.split(","))
    if hasattr(os, "sched_setaffinity"):
        cpus = sorted(os.sched_getaffinity(0))[: args.threads]
        os.sched_setaffinity(0, cpus)  # before jax starts its threads

    rng = np.random.default_rng(0)
    w = np.clip(np.rint(rng.normal(0, 30, (rows, filters))), -128, 127).astype(np.int32)
    signs = np.repeat(rng.choice([-1, 1], (-(-rows // 8), filters)), 8, axis=0)[:rows]
    polar = np.abs(w) * signs
    x = rng.integers(0, 256, (args.batch, rows))

    made = cases(w, polar, x)
    runs: dict[str, Callable[[], Any]] = {"float32 product": unit(w, x), **{k: v[0] for k, v in made.items()}}
    peer = lightning(w, x, args.threads)
    if peer is not None:
        runs["aihwkit-lightning"] = peer
    times = measure(runs, args.rounds)

    base = times["float32 product"]
    results = []
    for name, spent in times.items():
        ratios = sorted(t / b for t, b in zip(spent, base, strict=True))
        quarter = len(ratios) // 4
        results.append(
            {
                "case": name,
                "ms": statistics.median(spent) * 1e3,
                "x float32 product": statistics.median(ratios),
                "quartiles": [ratios[quarter], ratios[-1 - quarter]],
                "goal": GOALS.get(name),
                "conversions": made[name][1] if name in made else None,
            }
        )
        shown = results[-1]
        goal = f"   goal {shown['goal']}x" if shown["goal"] else ""
        print(
            f"{name:20s} {shown['ms']:9.2f} ms {shown['x float32 product']:8.1f}x "
            f"({ratios[quarter]:.1f}..{ratios[-1 - quarter]:.1f}){goal}"
        )
    if peer is None:
        print("aihwkit-lightning is not installed", file=sys.stderr)
    if args.out:
        load = os.getloadavg() if hasattr(os, "getloadavg") else None
        args.out.write_text(json.dumps({"settings": vars(args) | {"out": None}, "load": load, "results": results}))


if __name__ == "__main__":
    main()
