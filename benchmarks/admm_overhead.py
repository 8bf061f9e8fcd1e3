"""What ADMM adds to an Adam step, in time and memory, and the same training as a plain PyTorch ADMM loop.

    python -m benchmarks.admm_overhead [--cases=lenet5,100m] [--every=100] [--rounds=7] [--results=docs/results]

Three jitted steps run in turn, round by round: Adam alone; Adam with `admm` in a step without a Z and U update; Adam
with `admm` in a step with one. The amortised overhead is (plain * (every - 1) + update) / every over Adam alone, from
the medians of per-round ratios. The PyTorch loop (extra `benchmarks`) adds rho * (W - Z + U) to the gradients and
projects by `kthvalue`, as public ADMM code does; it runs in the same rounds.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import interleave, spread, table

DENSITY = 0.1
RHO = 1e-3
# name -> (model, batch, input shape, classes)
CASES = {
    "lenet5": ("lenet5_caffe", 64, (28, 28, 1), 10),
    "resnet18": ("resnet18", 8, (64, 64, 3), 1000),
    "resnet18_batch32": ("resnet18", 32, (64, 64, 3), 1000),
    "100m": ("mlp", 256, (4096,), 4096),  # six dense layers of 4096 x 4096: 100.7M weights
}
MLP_LAYERS = 6


def _model(name: str, classes: int) -> Any:
    import flax.linen as nn

    from experiments.common import models

    if name != "mlp":
        return models.build(name, classes=classes)

    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool = False) -> Any:
            for _ in range(MLP_LAYERS):
                x = nn.relu(nn.Dense(4096)(x))
            return x

    return Mlp()


def our_steps(case: str, every: int) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """Adam alone, with admm between updates, with admm at an update; and bytes of params, Adam state, ADMM state."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    import compressx as cx

    name, batch, shape, classes = CASES[case]
    model = _model(name, classes)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((batch, *shape), dtype=np.float32))
    y = jnp.asarray(rng.integers(0, classes, batch).astype(np.int32))
    variables = jax.jit(model.init)(jax.random.key(0), x[:1])
    params, stats = variables["params"], {k: v for k, v in variables.items() if k != "params"}
    rules = [(".*kernel", cx.unstructured(DENSITY))]

    def build(tx: Any) -> Any:
        def step(params: Any, stats: Any, state: Any, x: Any, y: Any) -> Any:
            def loss_of(params: Any) -> Any:
                logits, new = model.apply({"params": params, **stats}, x, train=True, mutable=["batch_stats"])
                return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), dict(new)

            (_, new), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), new, state

        return jax.jit(step, donate_argnums=(0, 1, 2))

    adam = optax.adam(1e-3)
    both = optax.chain(cx.admm(rules, rho=RHO, every=every), adam)
    compiled = {"adam": build(adam), "admm": build(both)}
    held = {
        "adam": [jax.tree.map(jnp.copy, params), jax.tree.map(jnp.copy, stats), adam.init(params)],
        "admm": [jax.tree.map(jnp.copy, params), stats, both.init(params)],
    }

    def run(key: str, start: int | None) -> Callable[[], None]:
        def once() -> None:
            if start is not None:  # put the counter where the next step is, or is not, an update
                first, *rest = held[key][2]
                held[key][2] = (first._replace(step=jnp.asarray(start, jnp.int32)), *rest)
            held[key] = list(compiled[key](*held[key], x, y))
            jax.block_until_ready(held[key])

        return once

    def nbytes(tree: Any) -> int:
        return sum(v.nbytes for v in jax.tree.leaves(tree))

    constrained = sum(v.nbytes for p, v in jax.tree_util.tree_leaves_with_path(params) if "kernel" in str(p[-1]))
    admm_state = cx.find_admm_state(held["admm"][2])
    sizes = {
        "weights": sum(v.size for v in jax.tree.leaves(params)),
        "constrained_bytes": constrained,
        "admm_state_bytes": nbytes(admm_state),
    }
    return {"adam": run("adam", None), "between": run("admm", 0), "update": run("admm", every - 1)}, sizes


def torch_resnet18(classes: int) -> Any:
    """ResNet-18 as PyTorch's users write it."""
    import torch
    from torch import nn
    from torch.nn.functional import relu

    def conv(cin: int, cout: int, size: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(cin, cout, size, stride, size // 2, bias=False), nn.BatchNorm2d(cout))

    class Block(nn.Module):
        def __init__(self, cin: int, cout: int, stride: int) -> None:
            super().__init__()
            self.a, self.b = conv(cin, cout, 3, stride), conv(cout, cout, 3, 1)
            self.skip = nn.Identity() if stride == 1 else conv(cin, cout, 1, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return relu(self.skip(x) + self.b(relu(self.a(x))))

    layers = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for cin, cout, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2)):
        layers += [Block(cin, cout, stride), Block(cout, cout, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))


def torch_steps(case: str) -> dict[str, Callable[[], None]]:
    """A plain PyTorch ADMM loop on the same network: a step between updates, and a step with one."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    name, batch, shape, classes = CASES[case]
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((batch, *shape), dtype=np.float32))
    y = torch.from_numpy(rng.integers(0, classes, batch))
    if name == "mlp":
        layers: list[nn.Module] = []
        for _ in range(MLP_LAYERS):
            layers += [nn.Linear(4096, 4096), nn.ReLU()]
        model: nn.Module = nn.Sequential(*layers)
    elif name == "lenet5_caffe":
        first = [nn.Conv2d(1, 20, 5), nn.MaxPool2d(2), nn.Conv2d(20, 50, 5), nn.MaxPool2d(2)]
        model = nn.Sequential(*first, nn.Flatten(), nn.Linear(800, 500), nn.ReLU(), nn.Linear(500, 10))
        x = x.permute(0, 3, 1, 2).contiguous()
    else:
        model = torch_resnet18(classes)
        x = x.permute(0, 3, 1, 2).contiguous()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    kernels = [p for p in model.parameters() if p.ndim > 1]

    def project(v: Any) -> Any:
        keep = round(DENSITY * v.numel())
        threshold = v.abs().flatten().kthvalue(v.numel() - keep + 1).values
        return torch.where(v.abs() >= threshold, v, torch.zeros_like(v))

    z = [project(p.detach()) for p in kernels]
    u = [torch.zeros_like(p) for p in kernels]

    def step(update: bool) -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for i, p in enumerate(kernels):
                if update:
                    z[i] = project(p + u[i])
                    u[i] += p - z[i]
                p.grad.add_(p - z[i] + u[i], alpha=RHO)
        optimizer.step()

    return {"torch_between": lambda: step(False), "torch_update": lambda: step(True)}


def compare(case: str, every: int, rounds: int, with_torch: bool) -> dict[str, Any]:
    """One row: medians in ms, the amortised overhead of admm, ours over PyTorch, bytes."""
    steps, sizes = our_steps(case, every)
    if with_torch:
        steps |= torch_steps(case)
    times = interleave(steps, rounds)
    row: dict[str, Any] = {"case": case, "every": every, "rounds": rounds, **sizes}
    row["state_copies"] = round(sizes["admm_state_bytes"] / sizes["constrained_bytes"], 4)

    def amortised(between: str, update: str) -> list[float]:
        return [(b * (every - 1) + u) / every for b, u in zip(times[between], times[update], strict=True)]

    ours, plain = amortised("between", "update"), times["adam"]
    row["plain_ms"], row["admm_ms"], row["update_ms"] = (
        spread([1e3 * t for t in s]) for s in (plain, ours, times["update"])
    )
    row["ratio"] = spread([a / b for a, b in zip(ours, plain, strict=True)])
    if "torch_between" in times:
        theirs = amortised("torch_between", "torch_update")
        row["torch_ms"] = spread([1e3 * t for t in theirs])
        row["ours_over_torch"] = spread([a / b for a, b in zip(ours, theirs, strict=True)])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--every", type=int, default=100, help="steps between Z and U updates (default 100)")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, at least 2 (default 7)")
    parser.add_argument("--no-torch", action="store_true", help="leave the PyTorch loop out")
    parser.add_argument("--results", type=Path, help="folder for the summaries that the tables are built from")
    args = parser.parse_args()
    unknown = [case for case in args.cases.split(",") if case not in CASES]
    if unknown:
        parser.error(f"--cases: no case {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    if args.rounds < 2 or args.every < 1:
        parser.error(f"--rounds={args.rounds} must be at least 2, --every={args.every} at least 1")

    rows = [compare(case, args.every, args.rounds, not args.no_torch) for case in args.cases.split(",")]
    for row in rows:  # one case is wider than a line: print it down
        print(f"\n{row['case']}")
        print(table([{"quantity": k, "value": v} for k, v in row.items() if k != "case"]))
    if args.results:
        cases = {row.pop("case"): row for row in rows}
        record(args.results, "admm_overhead", cases, environment(("jax", "torch")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
