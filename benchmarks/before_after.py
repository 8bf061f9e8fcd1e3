"""Compiled networks and recurrent steps of two checkouts, round by round: what a change costs.

    python -m benchmarks.before_after CHECKOUT [--cases=vgg16,resnet50,mobilenet_v2,gru10,gru103] [--rate=8.1]
        [--starts=5] [--rounds=12] [--runs=3] [--path=xla]

CHECKOUT is the root of the code before the change (`git worktree add ../before COMMIT`); this one is after it. Each has
a process of its own, both pinned to one core with one thread, and they take turns; who begins alternates. In its turn a
process runs `--runs` times, of which the least counts. Where a process's memory lies changes its speed by some percent
for as long as it lives, so both are started anew `--starts` times. The ratio after / before of processor time is taken
within a round, for a loaded machine lengthens elapsed time much more; its median is printed with a bootstrap interval
of 95 % (starts are drawn, and rounds within them), and the largest difference of the two outputs over the largest one.
"""

import argparse
import base64
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CASES = ("vgg16", "resnet50", "mobilenet_v2", "gru10", "gru103")


def step(case: str, rate: float, path: str | None) -> Callable[[], Any]:
    """One inference of a network, or ten steps of a GRU of 1024 units at the rate in its name."""
    import jax
    import numpy as np

    from benchmarks import pattern_conv, recurrent
    from compressx import formats, kernels

    rng = np.random.default_rng(0)
    if case.startswith("gru"):
        gates = [recurrent.matrix("bspc", 1024, float(case.removeprefix("gru")), rng) for _ in range(3)]
        packed = [formats.pack(g, format="bspc") for g in gates]
        cell = kernels.prepare_recurrent("gru_after", packed, threads=1, path=path)
        x = jax.device_put(rng.standard_normal((10, 1, 3 * 1024), dtype=np.float32))
        return lambda: jax.block_until_ready(cell(x)[0])
    if case == "mobilenet_v2":
        from experiments.common import models

        model = models.build(case, classes=1000)
        image = rng.standard_normal((1, 224, 224, 3), dtype=np.float32)

        def fill(leaf: Any) -> Any:
            if len(leaf.shape) == 4:
                return pattern_conv.sparse(leaf.shape, rate if min(leaf.shape[2:]) > 3 else 1.0, rng)
            return rng.uniform(0.2, 0.4, leaf.shape).astype(np.float32)

        variables = jax.tree.map(fill, jax.eval_shape(model.init, jax.random.key(0), image))
        forward: Callable[..., Any] = lambda v, x: model.apply(v, x, train=False)
    else:
        forward, variables, image = pattern_conv.network(case, rate)
    f, x = kernels.compile(forward, variables, threads=1, path=path), jax.device_put(image)
    return lambda: jax.block_until_ready(f(x))


def work(case: str, rate: float, path: str | None) -> None:
    """A process of one checkout: runs when a line asks for it, and answers with seconds, elapsed and processor's."""
    import numpy as np

    run = step(case, rate, path)
    y = np.asarray(run(), np.float32)
    print(json.dumps({"shape": y.shape, "y": base64.b64encode(y.tobytes()).decode()}), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            start, processor = time.perf_counter(), time.process_time()
            run()
            times.append((time.perf_counter() - start, time.process_time() - processor))
        print(json.dumps([min(t[0] for t in times), min(t[1] for t in times)]), flush=True)


class Side:
    """The process of a checkout."""

    def __init__(self, root: Path, case: str, rate: float, path: str | None):
        environment = os.environ | {"PYTHONPATH": str(root), "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
        words = [sys.executable, "-P", __file__, "--worker", case, str(rate), path or ""]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(words, cwd=root, env=environment, stdin=pipe, stdout=pipe, text=True)
        self.first = self._read()

    def _read(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.process.args[3:]} ended: {self.process.wait()}")  # type: ignore[index]
        return json.loads(line)

    def seconds(self, runs: int) -> list[float]:
        """Least elapsed and processor seconds of some runs."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{runs}\n")
        self.process.stdin.flush()
        return list(self._read())


def interval(ratios: Any, seed: int = 0) -> list[float]:
    """Median of ratios `[starts, rounds]`, and the interval that 95 % of the medians of resampled ones lie in."""
    import numpy as np

    rng = np.random.default_rng(seed)
    starts, rounds = ratios.shape
    chosen = rng.integers(0, starts, (5000, starts, 1))
    drawn = ratios[chosen, rng.integers(0, rounds, (5000, starts, rounds))].reshape(5000, -1)
    return [float(np.median(ratios)), *(float(v) for v in np.quantile(np.median(drawn, axis=1), [0.025, 0.975]))]


def start(before: Path, case: str, args: argparse.Namespace) -> tuple[dict[str, list[list[float]]], float]:
    """Seconds of each round of two fresh processes, elapsed and processor's, and how far their outputs differ."""
    import numpy as np

    sides = {"before": Side(before, case, args.rate, args.path), "after": Side(_ROOT, case, args.rate, args.path)}
    y = {name: np.frombuffer(base64.b64decode(side.first["y"]), np.float32) for name, side in sides.items()}
    seconds: dict[str, list[list[float]]] = {name: [] for name in sides}
    for number in range(args.rounds + 2):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            found = sides[name].seconds(args.runs)
            if number >= 2:
                seconds[name].append(found)
    for side in sides.values():
        assert side.process.stdin is not None
        side.process.stdin.close()
        side.process.wait()
    return seconds, float(np.abs(y["after"] - y["before"]).max() / np.abs(y["before"]).max())


def compare(before: Path, case: str, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a case."""
    import numpy as np

    found = [start(before, case, args) for _ in range(args.starts)]
    both = {name: np.array([seconds[name] for seconds, _ in found]) for name in ("before", "after")}
    ratios = both["after"] / both["before"]  # [starts, rounds, (elapsed, processor)]
    best = {f"{name}_ms": 1e3 * float(seconds[..., 1].min()) for name, seconds in both.items()}
    apart = max(apart for _, apart in found)
    return {"elapsed": interval(ratios[..., 0]), "processor": interval(ratios[..., 1]), **best, "apart": apart}


_ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Prints a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="root of the code before the change")
    parser.add_argument("--cases", default=",".join(CASES), help="names, with commas")
    parser.add_argument("--rate", type=float, default=8.1, help="compression of the networks")
    parser.add_argument("--starts", type=int, default=5, help="of both processes")
    parser.add_argument("--rounds", type=int, default=12, help="of a start")
    parser.add_argument("--runs", type=int, default=3, help="in a turn")
    parser.add_argument("--path", help="xla or native; the default where it is left out")
    args = parser.parse_args()
    unknown = set(args.cases.split(",")) - set(CASES)
    if unknown:
        parser.error(f"no cases {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if not (args.checkout / "compressx").is_dir():
        parser.error(f"{args.checkout} is no checkout: it has no folder compressx")
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
    for case in args.cases.split(","):
        row = compare(args.checkout.resolve(), case, args)
        ratio = "{:.4f} ({:.4f} to {:.4f})".format
        print(
            f"{case}: processor time {ratio(*row['processor'])}, elapsed {ratio(*row['elapsed'])} of before; best "
            f"{row['before_ms']:.2f} and {row['after_ms']:.2f} ms; outputs differ by {row['apart']:.1e}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], float(sys.argv[3]), sys.argv[4] or None)
    else:
        main()
