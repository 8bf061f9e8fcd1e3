"""One training step beside PyTorch's on the same cores: LeNet-5 and ResNet-20, Adam, float32.

    python -m benchmarks.training [--threads=2] [--rounds=15] [--cases=resnet20-128] [--results=docs/results]
    python -m benchmarks.training --layers     # the ways to convolve, layer by layer, for `convolve.formulation`

Every round runs one step of each system in turn, so that other work on the machine meets all of them alike, and the
ratio is taken within a round. Beside the elapsed time stands the processor time: on a loaded machine PyTorch's threads
spin while they wait, so compare there with `--threads=1`. Needs torch (extra `benchmarks`).
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from compressx.native.memory import keep_memory

CASES = {
    "lenet5_caffe-64": ("lenet5_caffe", 64, (28, 28, 1)),
    "lenet5_caffe-256": ("lenet5_caffe", 256, (28, 28, 1)),
    "resnet20-128": ("resnet20", 128, (32, 32, 3)),
}
# images, rows, cin, cout, kernel, padding
LAYERS = [
    (64, 28, 1, 20, 5, 0),
    (256, 28, 1, 20, 5, 0),
    (64, 12, 20, 50, 5, 0),
    (256, 12, 20, 50, 5, 0),
    (128, 32, 3, 16, 3, 1),
    (128, 32, 16, 16, 3, 1),
    (128, 16, 32, 32, 3, 1),
    (128, 8, 64, 64, 3, 1),
    (64, 16, 128, 128, 3, 1),
    (64, 8, 256, 256, 3, 1),
    (64, 4, 512, 512, 3, 1),
    (128, 16, 32, 192, 1, 0),
]


def our_step(name: str, x: Any, y: Any) -> Callable[[], None]:
    """A jitted step of ours, with donated buffers; each call waits for its end."""
    import jax
    import jax.numpy as jnp
    import optax

    from experiments.common import models

    model, optimizer = models.build(name, classes=10), optax.adam(1e-3)
    x, y = jnp.asarray(x), jnp.asarray(y)
    variables = model.init(jax.random.key(0), x[:1])
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        params, stats, opt_state = state

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits, new = model.apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), dict(new)

        (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), loss

    jitted = jax.jit(step, donate_argnums=0)
    state = (params, stats, optimizer.init(params))

    def run() -> None:
        nonlocal state
        state, loss = jitted(state, x, y)
        jax.block_until_ready((state, loss))

    return run


def torch_step(name: str, x: Any, y: Any, channels_last: bool) -> Callable[[], None]:
    """The same step in PyTorch."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    class Block(nn.Module):
        def __init__(self, cin: int, cout: int, stride: int) -> None:
            super().__init__()
            self.pad, self.stride = (cout - cin) // 2, stride
            self.conv1, self.bn1 = nn.Conv2d(cin, cout, 3, stride, 1, bias=False), nn.BatchNorm2d(cout)
            self.conv2, self.bn2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False), nn.BatchNorm2d(cout)

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
            if self.stride != 1:
                x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
            return F.relu(x + y)

    def resnet20() -> nn.Module:
        layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
        for stage in range(3):
            for block in range(3):
                first = stage > 0 and block == 0
                layers.append(Block(16 << (stage - first), 16 << stage, 2 if first else 1))
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

    def lenet5() -> nn.Module:
        first = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
        return nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))

    model = {"resnet20": resnet20, "lenet5_caffe": lenet5}[name]()
    images, labels = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(y).long()
    if channels_last:
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return run


def interleave(steps: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round, after two rounds of warming up."""
    return measure(steps, rounds)[0]


def measure(steps: Mapping[str, Callable[[], Any]], rounds: int, burst: int = 3) -> tuple[dict[str, list[float]], ...]:
    """Elapsed and processor seconds of each step in each round, after two rounds of warming up.

    In its turn a step runs `burst` times and the median counts, for in use one step follows another: of 3 not the
    first, which finds the caches as another system left them and that system's threads still spinning. The process
    keeps its memory, as drivers do, which every system gains from.
    """
    keep_memory()
    elapsed: dict[str, list[float]] = {name: [] for name in steps}
    processor: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds + 2):
        for name, step in steps.items():
            seconds, cpu = [], []
            for _ in range(burst):
                start, start_cpu = time.perf_counter(), time.process_time()
                step()
                seconds.append(time.perf_counter() - start)
                cpu.append(time.process_time() - start_cpu)
            if round_ >= 2:
                elapsed[name].append(statistics.median(seconds))
                processor[name].append(statistics.median(cpu))
    return elapsed, processor


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def compare(case: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of ours, PyTorch and PyTorch with channels last, and ours over each, per round."""
    import numpy as np

    name, batch, shape = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *shape), dtype=np.float32)
    y = rng.integers(0, 10, batch).astype(np.int32)
    steps = {"ours": our_step(name, x, y), "torch": torch_step(name, x, y, False)}
    steps["torch_channels_last"] = torch_step(name, x, y, True)
    times, processor = measure(steps, rounds)
    result: dict[str, Any] = {"case": case, "rounds": rounds}
    for system, seconds in times.items():
        result[f"{system}_ms"] = spread([1e3 * t for t in seconds])
    for system, seconds in processor.items():
        result[f"{system}_cpu_ms"] = spread([1e3 * t for t in seconds])
    for system in ("torch", "torch_channels_last"):
        pairs = zip(times["ours"], times[system], strict=True)
        result[f"ours_over_{system}"] = spread([a / b for a, b in pairs])
    return result


def compare_layers(rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of forward and both gradients of one convolution, by formulation."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax import lax

    from compressx.native import conv as native
    from compressx.native import convolve

    rows = []
    for n, size, cin, cout, k, pad in LAYERS:
        rng = np.random.default_rng(0)
        x = jnp.asarray(rng.standard_normal((n, size, size, cin), dtype=np.float32))
        kernel = jnp.asarray(rng.standard_normal((k, k, cin, cout), dtype=np.float32))
        pads = ((pad, pad), (pad, pad))
        ways: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
            "lax": lambda x, w, p=pads: lax.conv_general_dilated(  # type: ignore[misc]
                x, w, (1, 1), p, dimension_numbers=("NHWC", "HWIO", "NHWC")
            ),
            "im2col": lambda x, w, p=pads: convolve.im2col(x, w, (1, 1), p),  # type: ignore[misc]
        }
        if native.available():
            ways["native"] = lambda x, w, p=pads: native.conv(x, w, 1, p)  # type: ignore[misc]
        steps = {}
        for way, f in ways.items():
            both = jax.jit(jax.grad(lambda x, w, f=f: jnp.square(f(x, w)).sum(), argnums=(0, 1)))
            steps[way] = lambda both=both, x=x, w=kernel: jax.block_until_ready(both(x, w))
        times = interleave(steps, rounds)
        row: dict[str, Any] = {"images": n, "size": size, "cin": cin, "cout": cout, "kernel": k}
        rows.append(row | {f"{way}_ms": spread([1e3 * t for t in seconds]) for way, seconds in times.items()})
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as aligned text: medians with quartiles in brackets."""
    heads = list(dict.fromkeys(key for row in rows for key in row))

    def cell(value: Any) -> str:
        if isinstance(value, dict):
            return f"{value['median']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"
        return "-" if value is None else str(value)

    lines = [heads, *[[cell(row.get(head)) for head in heads] for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="cores for every system (default 2)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 2 (default 15)")
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--layers", action="store_true", help="measure single convolutions instead of steps")
    parser.add_argument("--results", type=Path, help="folder for the summaries that the tables are built from")
    args = parser.parse_args()
    unknown = [case for case in args.cases.split(",") if case not in CASES]
    if unknown:
        parser.error(f"--cases: no case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= args.threads <= len(cores):
        parser.error(f"--threads={args.threads}: this process may use 1 to {len(cores)} cores")
    if args.rounds < 2:
        parser.error(f"--rounds={args.rounds}: needs at least 2")
    os.sched_setaffinity(0, cores[: args.threads])  # before jax sizes its thread pool

    if args.layers:
        print(table(compare_layers(args.rounds)))
        return 0
    import torch

    torch.set_num_threads(args.threads)
    rows = [compare(case, args.rounds) for case in args.cases.split(",")]
    print(table(rows))
    if args.results:
        cases = {row.pop("case"): row for row in rows}
        record(args.results, "training_speed", cases, environment(("jax", "torch")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
