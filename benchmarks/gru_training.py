"""One training step of a GRU beside PyTorch's `nn.GRU` on the same cores: Adam, float32, a unit for every frame.

    python -m benchmarks.gru_training [--threads=1] [--rounds=9] [--cases=gru-2x1024] [--results=docs/results]

`ours` has PyTorch's recurrence (reset after the product), `ours_before` the paper's; every round runs each system
three times, of which the median counts, and ratios are taken within a round. The loss is checked to be PyTorch's for
the same weights. Needs torch (extra `benchmarks`).
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import measure, spread

# units, utterances, frames; 39 features, 2 layers and 48 outputs each
CASES = {"gru-2x1024": (1024, 8, 300), "gru-2x192": (192, 8, 300)}
FEATURES, LAYERS, OUTPUTS = 39, 2, 48


def our_step(units: int, reset: str, x: Any, y: Any) -> tuple[Callable[[], float], Any]:
    """A jitted step with donated buffers, and the first weights."""
    import jax
    import jax.numpy as jnp
    import optax

    from experiments.common import models

    model = models.build("gru", classes=OUTPUTS, hidden=units, layers=LAYERS, dropout=0.0, reset=reset)
    optimizer, inputs, labels = optax.adam(1e-3), jnp.asarray(x), jnp.asarray(y)
    first = model.init(jax.random.key(0), inputs[:1, :1])

    def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state = state

        def loss_of(params: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(model.apply(params, x, train=True), y).mean()

        loss, gradient = jax.value_and_grad(loss_of)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    jitted = jax.jit(step, donate_argnums=0)
    state = (jax.tree.map(jnp.copy, first), optimizer.init(first))

    def run() -> float:
        nonlocal state
        state, loss = jitted(state, inputs, labels)
        jax.block_until_ready(state)
        return float(loss)

    return run, jax.device_get(first)["params"]


def torch_step(units: int, weights: Any, x: Any, y: Any) -> Callable[[], float]:
    """The same step in PyTorch, from our first weights (reset after)."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    gru, output = nn.GRU(FEATURES, units, LAYERS, batch_first=True), nn.Linear(units, OUTPUTS)
    with torch.no_grad():
        for i in range(LAYERS):
            p = weights[f"gru_{i}"]
            joined = {kind: np.concatenate([p[f"{kind}{g}"].T for g in "rzh"]) for kind in "wu"}
            getattr(gru, f"weight_ih_l{i}").copy_(torch.from_numpy(joined["w"]))
            getattr(gru, f"weight_hh_l{i}").copy_(torch.from_numpy(joined["u"]))
            getattr(gru, f"bias_ih_l{i}").zero_()
            getattr(gru, f"bias_hh_l{i}").zero_()
        output.weight.copy_(torch.from_numpy(np.array(weights["output"]["kernel"].T)))
        output.bias.zero_()
    inputs, labels = torch.from_numpy(x), torch.from_numpy(y).long().reshape(-1)
    optimizer = torch.optim.Adam([*gru.parameters(), *output.parameters()], 1e-3)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = F.cross_entropy(output(gru(inputs)[0]).reshape(-1, OUTPUTS), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def compare(case: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each system and ours over PyTorch's, per round.

    Raises:
      RuntimeError: the first losses differ, so that not the same thing is measured.
    """
    import numpy as np

    units, n, t = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, t, FEATURES), dtype=np.float32)
    y = rng.integers(0, OUTPUTS, (n, t)).astype(np.int32)
    ours, weights = our_step(units, "after", x, y)
    theirs, before = torch_step(units, weights, x, y), our_step(units, "before", x, y)[0]
    a, b = ours(), theirs()
    if abs(a - b) > 1e-4 * abs(b):
        raise RuntimeError(f"{case}: the first loss is {a} here and {b} in PyTorch")
    elapsed, processor = measure({"ours": ours, "ours_before": before, "torch": theirs}, rounds)
    result: dict[str, Any] = {"case": case, "rounds": rounds}
    result |= {f"{name}_ms": spread([1e3 * s for s in times]) for name, times in elapsed.items()}
    result |= {f"{name}_cpu_ms": spread([1e3 * s for s in times]) for name, times in processor.items()}
    for name in ("ours", "ours_before"):
        ratios = [x / y for x, y in zip(elapsed[name], elapsed["torch"], strict=True)]
        result[f"{name}_over_torch"] = spread(ratios)
    return result


def main() -> None:
    """Runs the cases and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores of each system")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", default=",".join(CASES), help=f"comma-separated, of {', '.join(CASES)}")
    parser.add_argument("--results", type=Path, help="folder to keep the rows in, such as docs/results")
    args = parser.parse_args()
    unknown = [case for case in args.cases.split(",") if case not in CASES]
    if unknown or args.rounds < 2:
        parser.error(f"--cases are {', '.join(CASES)}, not {', '.join(unknown) or args.cases}; --rounds is at least 2")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= args.threads <= len(cores):
        parser.error(f"--threads must be 1 to {len(cores)}")
    os.sched_setaffinity(0, cores[: args.threads])  # before jax makes its thread pool
    import torch

    torch.set_num_threads(args.threads)
    rows = {case: compare(case, args.rounds) for case in args.cases.split(",")}
    for case, row in rows.items():
        cells = [f"{name} {row[f'{name}_ms']['median']:.0f} ms" for name in ("ours", "ours_before", "torch")]
        median, low, high = (row["ours_over_torch"][k] for k in ("median", "low", "high"))
        print(f"{case}: {', '.join(cells)}; ours over torch {median:.2f} [{low:.2f}, {high:.2f}]")
    if args.results:
        record(args.results, "gru_training", rows, environment(("jax", "torch")))


if __name__ == "__main__":
    main()
