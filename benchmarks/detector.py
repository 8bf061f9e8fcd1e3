"""One training step of the narrow YOLOv3 beside the same network in PyTorch, on the same cores: SGD, float32.

    python -m benchmarks.detector [--threads=2] [--rounds=9] [--width=0.125] [--size=96] [--batch=16] [--results=DIR]

Both run the network's 107 blocks forward, a sum of squares of its heads, backward, and a step of plain SGD; the
detection loss is left out of both, for it is small and PyTorch has none. Rounds are interleaved as in
`benchmarks.training`. Needs torch (extra `benchmarks`).
"""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import measure, spread, table


def our_step(x: Any, width: float) -> Callable[[], None]:
    """A jitted step of ours, with donated buffers; each call waits for its end."""
    import jax
    import jax.numpy as jnp

    from experiments.common import models
    from experiments.common.models import initial

    model = models.build("yolov3", classes=1, width=width)
    x = jnp.asarray(x)
    variables = initial.draw(model, x[:1], 0)

    def step(params: Any, stats: Any, x: jax.Array) -> Any:
        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            variables = {"params": params, "batch_stats": stats}
            heads, new = model.apply(variables, x, train=True, mutable=["batch_stats"])
            return sum(jnp.square(h).mean() for h in heads), new["batch_stats"]

        (_, stats_), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 1e-4 * g, params, gradient), stats_

    jitted = jax.jit(step, donate_argnums=(0, 1))
    state = variables["params"], variables["batch_stats"]

    def run() -> None:
        nonlocal state
        state = jax.block_until_ready(jitted(*state, x))

    return run


def torch_step(x: Any, width: float, channels_last: bool) -> Callable[[], None]:
    """The same step in PyTorch, its network built from the same list of blocks."""
    import torch
    import torch.nn.functional as F
    from torch import nn

    from experiments.common.models.yolov3 import blocks

    layers = blocks(18, width)
    channels = {-1: x.shape[-1]}
    modules = nn.ModuleDict()
    for i, b in enumerate(layers):
        if b.kind == "conv":
            cin, pad = channels[b.inputs[0]], b.size // 2
            conv = nn.Conv2d(cin, b.features, b.size, b.stride, pad, bias=b.linear)
            tail = [] if b.linear else [nn.BatchNorm2d(b.features), nn.LeakyReLU(0.1)]
            modules[str(i)] = nn.Sequential(conv, *tail)
            channels[i] = b.features
        elif b.kind == "route":
            channels[i] = sum(channels[k] for k in b.inputs)
        else:
            channels[i] = channels[b.inputs[0]]
    images = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    if channels_last:
        modules = modules.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(modules.parameters(), 1e-4)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        values: dict[int, Any] = {-1: images}
        total = 0
        for i, b in enumerate(layers):
            ins = [values[k] for k in b.inputs]
            if b.kind == "conv":
                values[i] = modules[str(i)](ins[0])
            elif b.kind == "shortcut":
                values[i] = ins[0] + ins[1]
            elif b.kind == "route":
                values[i] = torch.cat(ins, 1) if len(ins) > 1 else ins[0]
            elif b.kind == "upsample":
                values[i] = F.interpolate(ins[0], scale_factor=2)
            else:
                values[i] = ins[0]
                total = total + ins[0].square().mean()
        total.backward()  # type: ignore[attr-defined]
        optimizer.step()

    return run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="cores for every system (default 2)")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds, at least 2 (default 9)")
    parser.add_argument("--width", type=float, default=0.125, help="factor on all channels (default 0.125)")
    parser.add_argument("--size", type=int, default=96, help="height and width, a multiple of 32 (default 96)")
    parser.add_argument("--batch", type=int, default=16, help="images a step (default 16)")
    parser.add_argument("--results", type=Path, help="folder for the summary that the tables are built from")
    args = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= args.threads <= len(cores) or args.rounds < 2 or args.size % 32 or args.size < 32:
        parser.error(f"--threads is 1 to {len(cores)}, --rounds 2 or more, --size a multiple of 32")
    os.sched_setaffinity(0, cores[: args.threads])  # before jax sizes its thread pool

    import numpy as np
    import torch

    torch.set_num_threads(args.threads)
    x = np.random.default_rng(0).standard_normal((args.batch, args.size, args.size, 1), dtype=np.float32)
    steps = {"ours": our_step(x, args.width)}
    steps |= {"torch": torch_step(x, args.width, False), "torch_channels_last": torch_step(x, args.width, True)}
    times, processor = measure(steps, args.rounds)
    row: dict[str, Any] = {f"{name}_ms": spread([1e3 * t for t in seconds]) for name, seconds in times.items()}
    row |= {f"{name}_cpu_ms": spread([1e3 * t for t in seconds]) for name, seconds in processor.items()}
    for name in ("torch", "torch_channels_last"):
        pairs = zip(times["ours"], times[name], strict=True)
        row[f"ours_over_{name}"] = spread([a / b for a, b in pairs])
    case = f"yolov3-w{args.width:g}-{args.size}-b{args.batch}"
    print(table([{"case": case, **row}]))
    if args.results:
        record(args.results, "detector_speed", {case: {**row, "rounds": args.rounds}}, environment(("jax", "torch")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
