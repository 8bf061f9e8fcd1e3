"""Convolutions and whole networks in compressed form beside the fastest engines for dense ones, round by round.

    python -m benchmarks.pattern_conv [--cases=vgg16,vgg16_whole,resnet50,64x224x64] [--rates=2.25,8.1,12] [--threads=1]
        [--rounds=15] [--tune] [--ablation] [--search] [--model=FILE] [--results=docs/results]

Each round runs every system in turn, three times, of which the median counts: as in use, where one image follows
another. Ratios are taken within a round and their median is quoted, the ratio of best samples beside it. The process is
pinned to `--threads` cores before anything starts. Peers are those that can be imported (`make peers` installs what can
be installed): jax (XLA, the same fused steps with the zeros in place), torch (channels last), onnxruntime, openvino,
MNN, LiteRT, TVM with a schedule made by hand (chains of convolutions only), and DeepSparse, which skips the zeros too.
Each peer that is left out is named with the reason, and the reasons are recorded. All get batch normalisation folded
in, as ours do.

Weights are random: each 3x3 kernel keeps one of eight patterns, and 1 of rate / 2.25 kernels stays (1x1: 1 of rate);
the first layer keeps its patterns only. `vgg16` is the 13 convolutions and poolings, `vgg16_whole` has the three
linear layers too, dense in every system; what is counted is the convolutions' in both. `--model` runs a saved model
instead, with the weights it was trained to.
A speedup is printed only where the native path is active.
"""

import argparse
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import deepsparse, peers, tvm_schedule
from benchmarks.record import environment, record
from benchmarks.training import measure, spread, table

PATTERNS = (
    (4, 5, 7, 8),
    (3, 4, 6, 7),
    (1, 2, 4, 5),
    (0, 1, 3, 4),
    (3, 4, 5, 7),
    (1, 4, 5, 7),
    (1, 3, 4, 7),
    (1, 3, 4, 5),
)
STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
LINEAR = (7 * 7 * 512, 4096, 4096, 1000)
LAYERS = (
    "3x224x64",
    "64x224x64",
    "64x112x128",
    "128x112x128",
    "128x56x256",
    "256x56x256",
    "256x28x512",
    "512x28x512",
    "512x14x512",
)
NETWORKS = ("vgg16", "vgg16_whole", "resnet50")
CASES = (*NETWORKS, *LAYERS)  # a layer: input channels x image x filters


def sparse(shape: tuple[int, ...], rate: float, rng: Any) -> Any:
    """A random kernel at a rate, scaled so that activations keep their size."""
    import numpy as np

    kh, kw, cin, cout = shape
    w = rng.standard_normal(shape, dtype=np.float32)
    keep = 1.0
    if cin > 3:
        keep = min(1.0, (2.25 if kh == 3 else 1.0) / rate)
    alive = np.zeros(cin * cout, np.float32)
    alive[rng.permutation(cin * cout)[: round(keep * cin * cout)]] = 1
    w *= alive.reshape(cin, cout)
    if kh == 3:
        masks = np.zeros((8, 9), np.float32)
        for row, taps in zip(masks, PATTERNS, strict=True):
            row[list(taps)] = 1
        w *= masks[rng.integers(0, 8, (cin, cout))].transpose(2, 0, 1).reshape(3, 3, cin, cout)
    return w * np.float32(np.sqrt(2 / max(1.0, np.count_nonzero(w) / cout)))


def network(case: str, rate: float) -> tuple[Any, Any, Any]:
    """(function of variables and images, variables, images) of a case."""
    import flax.linen as nn
    import jax
    import numpy as np

    from experiments.common import models

    rng = np.random.default_rng(0)
    if case == "resnet50":
        model = models.build("resnet50", classes=1000)
        x = rng.standard_normal((1, 224, 224, 3), dtype=np.float32)
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)

        def fill(leaf: Any) -> Any:
            if len(leaf.shape) == 4:
                return sparse(leaf.shape, rate if leaf.shape[2] > 3 else 1.0, rng)
            return rng.uniform(0.2, 0.4, leaf.shape).astype(np.float32)

        return lambda v, x: model.apply(v, x, train=False), jax.tree.map(fill, shapes), x
    if case in NETWORKS:
        size, channels, stages = 224, 3, STAGES
    else:
        channels, size, filters = (int(part) for part in case.split("x"))
        stages = ((filters,),)
    kernels: list[Any] = []
    cin = channels
    for features in (f for stage in stages for f in stage):
        kernels.append(sparse((3, 3, cin, features), rate, rng))
        cin = features
    variables = {"w": kernels, "b": [np.full(w.shape[3], 0.01, np.float32) for w in kernels], "linear": []}
    if case == "vgg16_whole":
        for m, n in itertools.pairwise(LINEAR):
            w = rng.standard_normal((m, n), dtype=np.float32) * np.float32(np.sqrt(2 / m))
            variables["linear"].append((w, np.full(n, 0.01, np.float32)))

    def forward(v: Any, x: Any) -> Any:
        weights = iter(zip(v["w"], v["b"], strict=True))
        for stage in stages:
            for _ in stage:
                w, b = next(weights)
                numbers = ("NHWC", "HWIO", "NHWC")
                y = jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers)
                x = nn.relu(y + b[None, None, None])
            if case in NETWORKS:
                x = nn.max_pool(x, (2, 2), (2, 2))
        if v["linear"]:
            x = x.reshape(x.shape[0], -1)
        for i, (w, b) in enumerate(v["linear"]):
            x = (nn.relu(x) if i else x) @ w + b[None]
        return x

    return forward, variables, rng.standard_normal((1, size, size, channels), dtype=np.float32)


def build(case: str, rate: float, args: argparse.Namespace) -> tuple[dict[str, Callable[[], Any]], dict[str, Any]]:
    """A callable for every system, ours first, checked against each other; and what was counted."""
    import jax
    import numpy as np

    from compressx import kernels
    from compressx.kernels import graph
    from compressx.trace import trace

    forward, variables, x = network(case, rate)
    ours = kernels.compile(forward, variables, threads=args.threads, tune=args.tune)
    xla = kernels.compile(forward, variables, path="xla")
    on_device = jax.device_put(x)
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(ours(on_device)),
        "jax": lambda: jax.block_until_ready(xla(on_device)),
    }
    steps, _ = graph.steps(program := trace(forward, variables, x), variables)
    start, fused = program.inputs[0], [s for s in steps if not isinstance(s, graph.Other)]
    head = None
    if case == "resnet50":
        linear = variables["params"]["linear"]
        head = peers.Head([(linear["kernel"], linear["bias"])], True)
    elif variables["linear"]:
        head = peers.Head(variables["linear"], False)
    model = peers.onnx_bytes(fused, head, x.shape, start) if _has("onnx") else b""
    makers: dict[str, Callable[[], Callable[[], Any]]] = {
        "torch": lambda: peers.torch_step(fused, head, x, start, args.threads),
        "onnxruntime": lambda: peers.ort_step(model, x, args.threads),
        "openvino": lambda: peers.openvino_step(model, x, args.threads),
        "MNN": lambda: peers.mnn_step(model, x, args.threads),
        "ai_edge_litert": lambda: peers.litert_step(peers.tflite_bytes(fused, head, x.shape, start), x, args.threads),
        "tvm": lambda: _tvm(fused, head, x, start, args.threads),
        "deepsparse": lambda: deepsparse.Step(model, x, args.threads),
    }
    left_out: dict[str, str] = {}
    for name, make in makers.items():
        if not _has(name):
            left_out[name] = "not installed"
        elif name in ("onnxruntime", "openvino", "MNN", "deepsparse") and not model:
            left_out[name] = "needs onnx, which is not installed"
        else:
            try:
                runs[name] = make()
            except Exception as e:  # a peer that does not run is reported, and does not end the run
                left_out[name] = f"does not run: {type(e).__name__}: {str(e)[:200]}"
    expected = np.asarray(runs["jax"]())
    scale = np.abs(expected).max()
    for name, run in list(runs.items()):
        y = np.asarray(run())
        if y.ndim == 4 and name not in ("ours", "jax", "ai_edge_litert"):
            y = y.transpose(0, 2, 3, 1)
        error = float(np.abs(y - expected).max() / scale)
        if not error < 1e-3:
            if name == "ours":
                raise RuntimeError(f"{case}: ours differs from jax by {error:.1e} of the largest output")
            left_out[name] = f"differs from jax by {error:.1e} of the largest output"
            del runs[name]
    for name, why in left_out.items():
        print(f"{case}: {name} is left out: {why}")
    layers = [line for line in ours.layers(x) if line.kind == "convolution"]
    dense = sum(round(r.macs / max(r.density, 1e-12)) for r in layers)
    macs = sum(r.macs for r in layers)
    weights = sum(int(np.prod(r.shape)) for r in layers)
    kept = sum(r.density * np.prod(r.shape) for r in layers)
    return runs, {
        "path": ours.path,
        "left_out": left_out,
        "rate": rate,
        "rate_counted": float(weights / kept),
        "gflop": 2e-9 * macs,
        "gflop_dense": 2e-9 * dense,
        "weight_bytes": sum(int(a.nbytes) for layer in ours.lower(x)[1].values() for a in layer.values()),
        "activation_bytes": 4
        * sum(
            int(np.prod(r.image)) + round(r.macs / max(1, r.density * np.prod(r.shape))) * r.shape[3] for r in layers
        ),
        "plans": [list(r.plan) if r.plan else None for r in layers],
    } | loads([r.loads for r in layers if r.loads])


def loads(layers: list[Any]) -> dict[str, Any]:
    """Vector loads of an inference, in millions: at each stage of the elimination, of sums, and of each layer."""
    if not layers:
        return {}
    total = {f"loads_{name}_m": sum(getattr(one, name) for one in layers) / 1e6 for name in layers[0]._fields}
    return total | {"layer_loads": [list(one) for one in layers]}


def _tvm(steps: list[Any], head: Any, x: Any, start: int, threads: int) -> Callable[[], Any]:
    if head is not None:
        raise ValueError("linear layers are not scheduled")
    return tvm_schedule.step(steps, x, start, threads)


def _has(name: str) -> bool:
    if name == "deepsparse":
        return deepsparse.installed()
    return importlib.util.find_spec(name) is not None


def compare(case: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """One row: milliseconds of each system, and each peer's time over ours."""
    from compressx.kernels import native

    runs, about = build(case, rate, args)
    elapsed, processor = measure(runs, args.rounds)
    row: dict[str, Any] = {"case": case, "threads": args.threads, **about}
    for name, seconds in elapsed.items():
        row[f"{name}_ms"] = spread([1e3 * t for t in seconds])
        row[f"{name}_best_ms"] = 1e3 * min(seconds)
        row[f"{name}_cpu_per_wall"] = sum(processor[name]) / sum(seconds)
    active = str(about["path"]).startswith("native")
    if active:
        row["peak"] = native.peak_gflops() * args.threads
        row["of_peak"] = about["gflop"] / min(elapsed["ours"]) / row["peak"]
        for name in elapsed:
            if name != "ours":
                pairs = zip(elapsed[name], elapsed["ours"], strict=True)
                row[f"{name}_over_ours"] = spread([a / b for a, b in pairs])
                row[f"{name}_over_ours_best"] = min(elapsed[name]) / min(elapsed["ours"])
    return row


def ablation(case: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """One layer with the parts added one after the other, as in PatDNN's ablation, and the loads of each."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from compressx.kernels import native, pattern_conv, schedule, tuning

    channels, size, filters = (int(part) for part in case.split("x"))
    rng = np.random.default_rng(0)
    w = sparse((3, 3, channels, filters), rate, rng)
    geometry = schedule.Geometry((3, 3), (1, 1), ((1, 1), (1, 1)))
    g = pattern_conv.layer_grid(geometry, (1, size, size), native.LANES[native.isa()])
    plain, reordered = schedule.from_weight(w, reorder=False), schedule.from_weight(w)
    single = schedule.Plan("runs", 1, 64, 6, channels)
    tuned = tuning.search(reordered, geometry, g, budget=16, threads=args.threads).plan
    variants = {
        "none": (plain, single),
        "fkr": (reordered, single),
        "fkr_lre": (reordered, schedule.Plan()),
        "fkr_lre_tuned": (reordered, tuned),
    }
    x = jnp.asarray(rng.standard_normal((channels, g.plane, g.lanes), dtype=np.float32))
    runs: dict[str, Callable[[], Any]] = {}
    counted = {}
    for name, (s, plan) in variants.items():
        ready = pattern_conv.layer(s, geometry, g, plan, activation="relu")
        arrays = jax.tree.map(jnp.asarray, ready.arrays)
        f = jax.jit(lambda a, x, fixed=ready.fixed: pattern_conv.run(fixed, a, x, None, args.threads))
        runs[name] = lambda f=f, a=arrays: jax.block_until_ready(f(a, x))  # type: ignore[misc]
        counted[name] = ready.loads._asdict()
    elapsed, _ = measure(runs, args.rounds)
    row: dict[str, Any] = {"case": case, "rate": rate, "plan": list(tuned), "loads": counted}
    row |= {f"{name}_ms": spread([1e3 * t for t in seconds]) for name, seconds in elapsed.items()}
    return row | schedule.counts(reordered, geometry, size, size)


def searches(case: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """The tuner against the default plan and random search, at equal evaluations: best times, measured together."""
    import numpy as np

    from compressx.kernels import native, pattern_conv, plans, schedule, tuning

    channels, size, filters = (int(part) for part in case.split("x"))
    s = schedule.from_weight(sparse((3, 3, channels, filters), rate, np.random.default_rng(0)))
    geometry = schedule.Geometry((3, 3), (1, 1), ((1, 1), (1, 1)))
    g = pattern_conv.layer_grid(geometry, (1, size, size), native.LANES[native.isa()])
    tried = {"default": schedule.Plan(), "model": plans.guess(s, geometry, g)}
    for start in ("model", "random"):
        for seed in range(3):
            found = tuning.search(s, geometry, g, seed=seed, budget=12, threads=args.threads, start=start)
            tried[f"search_{start}_{seed}"] = found.plan
    times = tuning.compare(s, geometry, g, list(tried.values()), rounds=args.rounds, threads=args.threads)
    return {"case": case, "rate": rate} | {f"{n}_ms": 1e3 * t for n, t in zip(tried, times, strict=True)}


def saved(file: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A saved model with the weights it was trained to: ours beside jax."""
    import jax
    import numpy as np

    import compressx
    from compressx import kernels
    from experiments.common import models

    held = compressx.load_model(file)
    network = models.named(held)
    shape = tuple(int(n) for n in args.shape.split(","))
    x = jax.device_put(np.random.default_rng(0).standard_normal(shape, dtype=np.float32))
    ours, xla = (kernels.compile(network, held, threads=args.threads, tune=args.tune, path=p) for p in (None, "xla"))
    runs = {n: lambda f=f: jax.block_until_ready(f(x)) for n, f in (("ours", ours), ("jax", xla))}
    elapsed, _ = measure(runs, args.rounds)
    row: dict[str, Any] = {"case": file.parent.name, "path": ours.path}
    row |= {f"{name}_ms": spread([1e3 * t for t in seconds]) for name, seconds in elapsed.items()}
    if ours.path != "xla":
        row["jax_over_ours"] = spread([a / b for a, b in zip(elapsed["jax"], elapsed["ours"], strict=True)])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="vgg16", help=f"comma-separated, of {', '.join(CASES)}; or 'all'")
    parser.add_argument("--rates", default="8.1", help="comma-separated weight reductions, 2.25 and more")
    parser.add_argument("--threads", type=int, default=1, help="cores for every system (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 2")
    parser.add_argument("--tune", action="store_true", help="measure plans of each layer first (kept in a cache)")
    parser.add_argument("--ablation", action="store_true", help="layers part by part, ours alone")
    parser.add_argument("--search", action="store_true", help="the tuner against default and random search")
    parser.add_argument("--model", type=Path, help="a saved model instead of the cases")
    parser.add_argument("--shape", default="1,32,32,3", help="images for --model")
    parser.add_argument("--results", type=Path, help="folder for the summaries, docs/results")
    args = parser.parse_args()
    names = list(CASES) if args.cases == "all" else args.cases.split(",")
    unknown = [case for case in names if case not in CASES]
    if unknown:
        parser.error(f"--cases: no case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= args.threads <= len(cores):
        parser.error(f"--threads={args.threads}: this process may use 1 to {len(cores)} cores")
    rates = [float(rate) for rate in args.rates.split(",")]
    if args.rounds < 2 or min(rates) < 2.25:
        parser.error("--rounds of at least 2 and --rates of at least 2.25 are needed")
    os.sched_setaffinity(0, cores[: args.threads])  # before jax sizes its thread pool

    from compressx import kernels

    print(f"path: {kernels.active_path()}")
    if args.model:
        rows = {f"model-{args.model.parent.name}": saved(args.model, args)}
    else:
        single = args.ablation or args.search
        what, tag = (
            (ablation, "ablation-") if args.ablation else (searches, "search-") if args.search else (compare, "")
        )
        rows = {
            f"{tag}{case}-{rate:g}x-{args.threads}t": what(case, rate, args)
            for case in names
            for rate in rates
            if not (single and case in NETWORKS)
        }
    hidden = ("plans", "layer_loads", "left_out")
    shown = [
        {k: v for k, v in row.items() if k not in hidden and not k.endswith("cpu_per_wall")} for row in rows.values()
    ]
    for case, row in zip(rows, shown, strict=True):
        print(f"\n{case}")
        print(table([{"": key, "value": value} for key, value in row.items()]))
    if args.results:
        about = environment(("jax", "torch", "onnxruntime", "openvino", "MNN", "ai-edge-litert", "apache-tvm"))
        about["versions"]["deepsparse"] = deepsparse.RELEASE.split("==")[1] if deepsparse.installed() else None
        record(args.results, "pattern_conv", rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
