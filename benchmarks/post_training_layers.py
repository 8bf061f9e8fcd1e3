"""The layer solver beside its baselines on every convolution of a CIFAR-10 ResNet: error by layer, no training.

    python -m benchmarks.post_training_layers [--network=resnet20] [--images=1024] [--only=70,2:4] [--held_out=0]
        [--cache=FILE] [--results=docs/results]

H is X'X / rows of the dense network's inputs on so many *training* images; --held_out=N also gives the error on H of
the next N training images. No test image is read. Constrained are all convolutions but the first.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.record import environment, record
from benchmarks.training import table

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the published checkpoints
BATCH = 64
PUBLISHED = ("Wanda", "SparseGPT", "L-ADMM", "ALPS", "GPTQ", "GPTQ sorted", "AWQ")


def rows() -> dict[str, Any]:
    """Constraints by name."""
    import compressx as cx

    crossbar = cx.crossbar_aware(column_density=0.5, rows=32, cols=64)
    return {
        "70": cx.unstructured(0.3),
        "80": cx.unstructured(0.2),
        "90": cx.unstructured(0.1),
        "2:4": cx.n_of_m(2, 4),
        "4bit": cx.quantize(4, zero_level=True),
        "3bit": cx.quantize(3, zero_level=True),
        "2bit": cx.quantize(2, zero_level=True),
        "3bit_channel": cx.quantize(3, per="channel", zero_level=True),
        "2bit_channel": cx.quantize(2, per="channel", zero_level=True),
        "free_patterns": cx.pattern("free"),
        "patterns": cx.pattern(k=8),
        "patterns_connectivity": cx.pattern_connectivity(1 / 3.6, k=8),
        "patterns_and_connectivity": cx.pattern(k=8) & cx.connectivity(1 / 3.6),
        "blocks": cx.block((4, 4), 0.5),
        "positions": cx.columns(0.5),
        "filters": cx.filters(0.75),
        "polarize": cx.polarize(8),
        "polarize_energy": cx.polarize(8, rule="energy"),
        "unify": cx.unify((4, 1), 1.0),
        "bsp": cx.bsp(0.5, 0.5, column_strips=4),
        "darb": cx.darb(0.25, axis="inputs"),
        "50_4bit": cx.unstructured(0.5) & cx.quantize(4, per="channel"),
        "crossbar": crossbar,
        "crossbar_polarize": crossbar & cx.polarize(8),
    }


def images(number: int) -> Any:
    """The first training images, normalised: float32 `[n, 32, 32, 3]`."""
    from experiments.common import data
    from experiments.common.data.augment import normalise

    held = data.load("cifar10_subset", "train")
    return np.asarray(normalise(held.inputs[:number], MEAN, STD))


def patches(x: Any, kernel: tuple[int, int], stride: int, pad: int) -> Any:
    """im2col: `[n, h, w, c]` to `[n * positions, kh * kw * c]`, only the positions that a stride visits."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(1, 2))[:, ::stride, ::stride]
    return windows.transpose(0, 1, 2, 4, 5, 3).reshape(-1, kernel[0] * kernel[1] * x.shape[3])


def inputs(network: str) -> tuple[Any, dict[str, Any], dict[str, tuple[int, int]]]:
    """A compiled function from images to the inputs of every convolution, the kernels, and their (stride, padding)."""
    import flax.linen as nn
    import jax

    from experiments.common.data.source import find_file
    from experiments.common.models import convert

    model, variables = convert.load_cifar_resnet(find_file(f"checkpoints/{network}_cifar10.npz"))
    steps: dict[str, tuple[int, int]] = {}
    kernels: dict[str, Any] = {}

    @jax.jit
    def run(x: Any) -> dict[str, Any]:
        seen = {}

        def watch(following: Any, args: Any, kwargs: Any, context: Any) -> Any:
            module = context.module
            if isinstance(module, nn.Conv):
                name, stride = "/".join(module.path), module.strides
                seen[name] = args[0]
                steps[name] = (stride if isinstance(stride, int) else (stride or (1,))[0], module.padding[0][0])
            return following(*args, **kwargs)

        with nn.intercept_methods(watch):
            model.apply(variables, x)
        return seen

    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if leaf.ndim == 4:
            kernels["/".join(str(p.key) for p in path[:-1])] = leaf
    return run, kernels, steps


def grams(network: str, first: int, number: int, cache: Path | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """The kernels of a network, without the first layer's, and the Gram statistics of their inputs.

    Products of float32 of a batch are summed in float64.
    """
    from compressx.capture.matrix import Gram

    run, kernels, steps = inputs(network)
    kernels = {name: w for name, w in kernels.items() if w.shape[2] > 3}
    if cache and cache.exists():
        held = np.load(cache)
        return kernels, {n: Gram(held[f"{n}:h"], int(held[f"{n}:rows"]), held[f"{n}:mean"]) for n in kernels}
    sums: dict[str, list[Any]] = {}
    x = images(first + number)[first:]
    for start in range(0, number, BATCH):
        for name, seen in run(x[start : start + BATCH]).items():
            if name not in kernels:
                continue
            m = patches(np.asarray(seen), kernels[name].shape[:2], *steps[name])
            old = sums.setdefault(name, [0.0, 0.0, 0])
            old[0], old[1], old[2] = (
                old[0] + (m.T @ m).astype(np.float64),
                old[1] + m.sum(0, np.float64),
                old[2] + len(m),
            )
    found = {n: Gram((h / rows)[None], rows, (total / rows)[None]) for n, (h, total, rows) in sums.items()}
    if cache:
        parts = {f"{n}:{key}": value for n, g in found.items() for key, value in g._asdict().items()}
        np.savez(cache, **parts)
    return kernels, found


def published(row: str, constraint: Any, w: Any, h: Any) -> dict[str, Any]:
    """The weights `[P, F]` that each published method gives, by name."""
    from compressx.constraints.quantization import decode, encode, levels_of
    from compressx.reconstruction import baselines as r

    spec = constraint.spec
    if spec["kind"] in ("unstructured", "n_of_m"):
        amount = r.Amount(spec["density"]) if "density" in spec else r.Amount(None, spec["n"], spec["m"])
        methods = {"Wanda": r.wanda, "SparseGPT": r.sparsegpt, "L-ADMM": r.l_admm, "ALPS": r.alps}
        return {name: method(w, h, amount) for name, method in methods.items()}
    if spec["kind"] != "quantize":
        return {}
    import jax.numpy as jnp

    levels, leaf = levels_of(spec), jnp.asarray(w, jnp.float32)
    scale = constraint.init(leaf)

    def nearest(values: Any, _: int) -> Any:
        line = jnp.asarray(values, jnp.float32)[None]
        return np.asarray(decode(encode(line, scale, levels), scale, levels)[0], np.float64)

    def quantize(m: Any) -> Any:
        m = jnp.asarray(m, jnp.float32)
        return np.asarray(constraint.project(m, constraint.init(m)), np.float64)

    return {
        "GPTQ": r.gptq(w, h, nearest, sort=False),
        "GPTQ sorted": r.gptq(w, h, nearest),
        "AWQ": r.awq(w, h, quantize),
    }


def measure(
    row: str, constraint: Any, kernels: dict[str, Any], factored: dict[str, Any], held: Any, settings: Any
) -> Any:
    """One set on all layers: the error of each method by layer, and what the solver reports."""
    from compressx.reconstruction.solve import solve

    layers = []
    for name, w in kernels.items():
        f = factored[name]
        a = np.asarray(w, np.float64).reshape(1, -1, w.shape[-1])
        began = time.perf_counter()
        found = solve(w, f, constraint, settings=settings, name=name)
        spent = time.perf_counter() - began
        errors = {"ours": found.error} | own(found.tried)
        for method, m in published(row, constraint, a[0], f.h[0]).items():
            errors[method] = f.error(m[None], a)
        entry = {"layer": name, "errors": errors, "tried": found.tried, "kept": found.kept}
        entry |= {"iterations": found.iterations, "seconds": spent}
        if held:
            entry["held_out"] = held[name].error(np.asarray(found.w).reshape(a.shape), a)
        layers.append(entry)
    return summary(layers)


def own(tried: dict[str, float]) -> dict[str, float]:
    """The solver's own candidates without ADMM: projections, in both metrics, and with a refit."""
    names = {"projection": "magnitude", "metric": "diagonal"}
    found = {title: tried[name] for name, title in names.items() if name in tried}
    for name, title in names.items():
        refits = [v for k, v in tried.items() if k in (f"{name} + refit", f"{name} + descent")]
        found |= {f"{title} refitted": v for v in refits}
    return found


def summary(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the layers, and on how many of them ours is at most as large as each published method."""
    names = list(dict.fromkeys(n for e in layers for n in e["errors"]))
    mean = {n: float(np.mean([e["errors"][n] for e in layers if n in e["errors"]])) for n in names}
    others = [n for n in names if n in PUBLISHED]
    ahead = {n: sum(e["errors"]["ours"] <= e["errors"][n] for e in layers) for n in others}
    kept: dict[str, int] = {}
    for e in layers:
        kept[e["kept"]] = kept.get(e["kept"], 0) + 1
    found = {"mean": mean, "of": len(layers), "kept": kept, "layers": layers}
    return found | ({"not_above": ahead} if ahead else {})


def command(network: str, images: int, row: str, settings: str = "") -> str:
    """What makes one row again."""
    said = f"python -m benchmarks.post_training_layers --network={network} --images={images} --only={row}"
    return said + (f" --settings={settings}" if settings else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="resnet20")
    parser.add_argument("--images", type=int, default=1024)
    parser.add_argument("--held_out", type=int, default=0)
    parser.add_argument("--only", default="")
    parser.add_argument("--settings", default="", help="name=value pairs of Settings, with commas between them")
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=None)
    args = parser.parse_args()

    from compressx.reconstruction.problem import Factored
    from compressx.reconstruction.settings import Settings

    given = dict(pair.split("=") for pair in args.settings.split(",") if pair)
    kinds = Settings.__annotations__
    settings = Settings(**{k: v if kinds[k] is str else kinds[k](v) for k, v in given.items()})
    kernels, found = grams(args.network, 0, args.images, args.cache)
    factored = {n: Factored(g, settings.damp, n) for n, g in found.items()}
    held = {}
    if args.held_out:
        held = {n: Factored(g) for n, g in grams(args.network, args.images, args.held_out)[1].items()}
    about, chosen = environment(("jax", "numpy")), args.only.split(",") if args.only else list(rows())
    for row in chosen:
        began = time.perf_counter()
        result = measure(row, rows()[row], kernels, factored, held, settings)
        result |= {"seconds": time.perf_counter() - began, "network": args.network, "images": args.images}
        solver = [e["seconds"] for e in result["layers"]]
        result |= {"solver_seconds": sum(solver), "settings": {k: getattr(settings, k) for k in kinds}}
        print(table([{"set": row} | {k: f"{v:.5f}" for k, v in result["mean"].items()}]))
        print(
            f"  not above, of {result['of']}: {result.get('not_above')}; kept: {result['kept']}; {sum(solver):.1f} s\n"
        )
        sys.stdout.flush()
        if args.results:
            about["command"] = command(args.network, args.images, row, args.settings)
            record(args.results, "post_training_layers", {f"{args.network}_{row.replace(':', 'of')}": result}, about)


if __name__ == "__main__":
    main()
