"""How far the layer solver and published methods are from the true optimum, where all supports or levels can be tried.

    python -m benchmarks.post_training_optimum [--count=200] [--cache=FILE] [--results=docs/results]

Problems are pieces of ResNet-20: 10 inputs of a layer, drawn at random, one filter's weights of them, and their part of
H (of 1,024 training images). Half of the weights are kept: 252 supports, each with its least-squares weights. Ternary
weights of a fixed scale: 59,049 points.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.post_training_layers import grams
from benchmarks.record import environment, record
from benchmarks.training import table

SIZE, KEPT = 10, 5


def problems(count: int, cache: Path | None) -> Iterator[tuple[Any, Any]]:
    """Weights `[10, 1]` and their H `[10, 10]`."""
    kernels, found = grams("resnet20", 0, 1024, cache)
    rng, names = np.random.default_rng(0), sorted(kernels)
    for k in range(count):
        name = names[k % len(names)]
        w = np.asarray(kernels[name], np.float64).reshape(-1, kernels[name].shape[-1])
        rows = rng.choice(len(w), SIZE, replace=False)
        yield w[rows, rng.integers(w.shape[1])][:, None], found[name].h[0][np.ix_(rows, rows)]


def cost(w: Any, a: Any, h: Any) -> float:
    """The error, as a share of that of zeros."""
    d = np.asarray(w, np.float64) - a
    return float((d.T @ h @ d)[0, 0] / (a.T @ h @ a)[0, 0])


def refitted(mask: Any, a: Any, h: Any) -> Any:
    """The best weights on a support."""
    w, kept = np.zeros_like(a), np.flatnonzero(mask)
    w[kept, 0] = np.linalg.lstsq(h[np.ix_(kept, kept)], (h @ a)[kept, 0], rcond=None)[0]
    return w


def supports(a: Any, h: Any) -> tuple[float, dict[str, float]]:
    """The least error of all supports, and that of each method with the best weights on the support it chose."""
    import jax.numpy as jnp

    import compressx as cx
    from compressx.capture.matrix import Gram
    from compressx.reconstruction import baselines as b
    from compressx.reconstruction.solve import solve

    amount = b.Amount(KEPT / SIZE)
    methods: dict[str, Callable[[], Any]] = {
        "magnitude": lambda: np.where(amount.kept(np.abs(a)), a, 0.0),
        "SparseGPT": lambda: b.sparsegpt(a, h, amount),
        "ALPS": lambda: b.alps(a, h, amount),
        "ours": lambda: np.asarray(
            solve(jnp.asarray(a, jnp.float32), Gram(h[None], 10**6, np.zeros((1, SIZE))), cx.unstructured(keep=KEPT)).w
        ),
    }
    every = (np.isin(np.arange(SIZE), rows) for rows in itertools.combinations(range(SIZE), KEPT))
    best = min(cost(refitted(mask, a, h), a, h) for mask in every)
    return best, {name: cost(refitted(method()[:, 0] != 0, a, h), a, h) for name, method in methods.items()}


def ternary(a: Any, h: Any) -> tuple[float, dict[str, float]]:
    """The least error of all ternary weights of the scale that fits best without H, and that of each method."""
    import jax.numpy as jnp

    import compressx as cx
    from compressx.capture.matrix import Gram
    from compressx.reconstruction import baselines as b
    from compressx.reconstruction.solve import solve

    constraint, leaf = cx.quantize(2, zero_level=True, tune=False), jnp.asarray(a, jnp.float32)
    scale = constraint.init(leaf)
    step = float(scale)

    def nearest(row: Any, _: int = 0) -> Any:
        return np.clip(np.round(row / step), -1, 1) * step

    d = np.array(list(itertools.product((-step, 0.0, step), repeat=SIZE))).T - a
    best = float(np.min(np.sum(d * (h @ d), axis=0)) / (a.T @ h @ a)[0, 0])
    found = solve(leaf, Gram(h[None], 10**6, np.zeros((1, SIZE))), constraint, structure=(scale,))
    methods = {"magnitude": nearest(a), "GPTQ sorted": b.gptq(a, h, nearest), "ours": np.asarray(found.w)}
    return best, {name: cost(w, a, h) for name, w in methods.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--cache", type=Path, default=None)
    parser.add_argument("--results", type=Path, default=None)
    args = parser.parse_args()
    about, done = environment(("jax", "numpy")), {}
    about["command"] = f"python -m benchmarks.post_training_optimum --count={args.count}"
    for case, method in {"half": supports, "ternary": ternary}.items():
        ratios: dict[str, list[float]] = {}
        for a, h in problems(args.count, args.cache):
            best, errors = method(a, h)
            for name, error in errors.items():
                ratios.setdefault(name, []).append(error / best)
        row: dict[str, Any] = {"problems": args.count}
        for name, values in ratios.items():
            x = np.array(values)
            row[name] = {"median": float(np.median(x)), "mean": float(x.mean()), "optimal": float((x < 1.001).mean())}
        done[case] = row
        print(
            table([{"method": n, **{k: f"{v:.3f}" for k, v in r.items()}} for n, r in row.items() if n != "problems"])
        )
    if args.results:
        record(args.results, "post_training_optimum", done, about)


if __name__ == "__main__":
    main()
