"""Crossbar products against a float32 matrix product of the same shape in the same process, and against peers.

    python -m benchmarks.crossbar_mvm [--rounds=15] [--shape=1152,256] [--batch=256] [--threads=2] [--results=DIR]
    python -m benchmarks.crossbar_mvm --small      # a few seconds, to see that it works; its numbers mean nothing
    python -m benchmarks.crossbar_mvm --paths      # every formulation on this device (on a GPU: what `tune` picks from)
    python -m benchmarks.crossbar_mvm --network    # ResNet-18 found, mapped and programmed: seconds and peak memory

The layer: 8-bit weights in four 2-bit slices, 8 input bits, 128 rows, 8-bit ADC. Weights are programmed before
timing. Every round times each case in turn, three times, so that other work on the machine meets all alike; the ratio
is taken within a round, and the median of rounds is printed with its quartiles. Each case is checked once, on a few
inputs and filters, against the integer definition; a case that differs stops the program. aihwkit-lightning runs where
it is installed (pip install --no-deps aihwkit-lightning, beside the torch of the extra `benchmarks`), in rounds of its
own: one conversion a tile instead of one a bit, slice and tile, so it is no like for like.
"""

import argparse
import os
import resource
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import environment, record
from benchmarks.training import measure, spread, table

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
        "ideal_lsb_3_2": (w, program(w, base.but(adc=Adc(8, Fraction(3, 2))), rows=everything, prove=False)),
        "lossless": (w, program(w, base.but(adc_bits=9), rows=everything)),
        "polarized": (polar, program(polar, fragment, rows=everything, prove=False)),
        "conductances": (w, None),
    }
    ideal = program(w, base, rows=everything, prove=False)
    matrices["conductances"] = (w, perturb(jax.random.key(0), ideal, Variation(sigma=0.1)))
    given = jnp.asarray(x, jnp.int32)
    made: dict[str, tuple[Callable[[], Any], int]] = {}
    run = jax.jit(crossbar_matmul)
    for name, (ints, programmed) in matrices.items():
        assert programmed is not None
        if name != "conductances":
            few = np.asarray(run(given, programmed))[:2, :2]
            expected = reference(x[:2], ints[:, :2], programmed.design).y
            if not (few == expected).all():
                raise SystemExit(f"{name}: differs from the definition: {few.tolist()}, not {expected.tolist()}")
        design = programmed.design
        groups = -(-len(w) // design.active_rows)
        conversions = len(x) * design.cycles * groups * design.columns_per_weight * w.shape[1]
        made[name] = (partial(_finish, run, given, programmed), conversions)
    return made


def _finish(run: Callable[..., Any], *args: Any) -> None:
    run(*args).block_until_ready()


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
    config.forward.out_bound = 12.0  # without a bound and an input range it refuses to quantize outputs
    config.pre_post.input_range.enable = True
    config.pre_post.input_range.init_value = float(x.max())
    layer = AnalogLinear(w.shape[0], w.shape[1], bias=False, rpu_config=config).eval()
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(w.T / np.abs(w).max(), dtype=torch.float32))
    given = torch.tensor(x, dtype=torch.float32)

    def run() -> Any:
        with torch.no_grad():
            return layer(given)

    return run


def paths(rows: int, filters: int, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of every formulation that can run three designs on this device, and the fastest."""
    from compressx.crossbar import Adc, Design, isaac
    from compressx.crossbar.tune import measure_paths

    base = Design(adc=Adc(8))
    designs = {"128 rows": base, "8 rows": base.but(active_rows=8, adc=Adc(4), signs="polarized"), "ISAAC": isaac()}
    found = []
    for name, design in designs.items():
        times = measure_paths(design, rows, filters, batch, rounds)
        row = {path: f"{1e3 * t:.3g} ms" for path, t in times.items()}
        found.append({"design": name, **row, "fastest": min(times, key=lambda path: times[path])})
    return found


def network(width: float) -> dict[str, Any]:
    """Seconds to find ResNet-18's layers, map them and programme them on FORMS-8, and the process's peak memory."""
    import jax
    import jax.numpy as jnp

    from compressx.crossbar import forms, map_network
    from compressx.crossbar.network import deploy_network, find_layers, levels_of, on_grid
    from experiments.common import models

    model, x = models.build("resnet18", classes=1000, width=width), jnp.zeros((1, 224, 224, 3), jnp.float32)
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda v: rng.standard_normal(v.shape, np.float32), shapes)
    design = forms(8).but(signs="differential_digital")  # random weights are not polarized
    marks = [time.perf_counter()]
    found = find_layers(model.apply, variables, x, train=False)
    mapped = map_network(found, design)
    marks.append(time.perf_counter())
    names = [layer.name for layer in found]
    grid = on_grid(variables, dict.fromkeys(names, levels_of(design)))
    marks.append(time.perf_counter())
    deploy_network(grid, dict.fromkeys(names, design), dict.fromkeys(names, 1.0))
    marks.append(time.perf_counter())
    steps = dict(zip(("map_s", "levels_s", "programme_s"), np.diff(marks).tolist(), strict=True))
    return {
        "weights": sum(int(layer.kept.size) for layer in found),
        "arrays": sum(m.arrays for m in mapped),
        **steps,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def compare(rows: int, filters: int, batch: int, threads: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Milliseconds of every case and its ratio to the float32 product, per round."""
    rng = np.random.default_rng(0)
    w = np.clip(np.rint(rng.normal(0, 30, (rows, filters))), -128, 127).astype(np.int32)
    signs = np.repeat(rng.choice([-1, 1], (-(-rows // 8), filters)), 8, axis=0)[:rows]
    x = rng.integers(0, 256, (batch, rows))
    made = cases(w, np.abs(w) * signs, x)
    product = unit(w, x)
    times = measure({"float32": product, **{k: v[0] for k, v in made.items()}}, rounds)[0]
    found = {name: _row(spent, times["float32"], *made.get(name, ())[1:]) for name, spent in times.items()}
    peer = lightning(w, x, threads)
    if peer is None:
        print("aihwkit-lightning is not installed", file=sys.stderr)
    else:  # in rounds of its own: torch's threads go on spinning for a while, which slows whatever comes next
        beside = measure({"float32": product, "aihwkit_lightning": peer}, rounds)[0]
        found["aihwkit_lightning"] = _row(beside["aihwkit_lightning"], beside["float32"])
    return {name: row | {"goal": GOALS.get(name)} for name, row in found.items()}


def _row(spent: list[float], product: list[float], conversions: int | None = None) -> dict[str, Any]:
    ratios = [t / one for t, one in zip(spent, product, strict=True)]
    return {"ms": spread([1e3 * t for t in spent]), "ratio": spread(ratios), "conversions": conversions}


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 2 (default 15)")
    parser.add_argument("--shape", default="1152,256", help="rows and filters of the layer")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2, help="cores for every system (default 2)")
    parser.add_argument("--small", action="store_true", help="a tiny layer (with --network: a narrow network)")
    parser.add_argument("--paths", action="store_true", help="time every formulation instead")
    parser.add_argument("--network", action="store_true", help="map and programme ResNet-18 instead")
    parser.add_argument("--results", type=Path, help="folder for the summaries that the tables are built from")
    args = parser.parse_args(argv)
    if args.small:
        args.rounds, args.shape, args.batch = 2, "144,16", 8
    try:
        rows, filters = (int(n) for n in args.shape.split(","))
    except ValueError:
        parser.error(f"--shape={args.shape} must be two numbers, as 1152,256")
    if args.rounds < 2:
        parser.error(f"--rounds={args.rounds}: needs at least 2")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])  # before jax starts its threads
    if args.paths:
        print(table(paths(rows, filters, args.batch, args.rounds)))
        return 0
    found = {"resnet18": network(0.125 if args.small else 1.0)} if args.network else None
    found = found or compare(rows, filters, args.batch, args.threads, args.rounds)
    print(table([{"case": name, **row} for name, row in found.items()]))
    if args.results:
        about = environment(("jax", "torch", "aihwkit-lightning")) | {"threads": args.threads, "shape": args.shape}
        record(args.results, "crossbar_mvm", found, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
