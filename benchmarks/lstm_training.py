"""One training step of an LSTM language model beside PyTorch's on the same cores: Adam, float32, state carried on.

    python -m benchmarks.lstm_training [--threads=1] [--rounds=9] [--cases=lstm-2x200] [--results=docs/results]

Embedding, `nn.LSTM`, softmax over the vocabulary; every round runs each system three times, of which the median
counts, and ratios are taken within a round. The loss is checked to be PyTorch's for the same weights. Needs torch
(extra `benchmarks`).
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import measure, spread

# cells a layer, words in the vocabulary, lanes, words a window; 2 layers each
CASES = {"lstm-2x128": (128, 2048, 32, 32), "lstm-2x200": (200, 10_000, 20, 20), "lstm-2x1500": (1500, 10_000, 20, 35)}
LAYERS = 2


def our_step(units: int, vocabulary: int, x: Any, y: Any) -> tuple[Callable[[], float], Any]:
    """A jitted step with donated buffers, and the first weights."""
    import jax
    import jax.numpy as jnp
    import optax

    from experiments.common.models.lstm import LanguageModel
    from experiments.common.training.language import cross_entropy

    model, optimizer = LanguageModel(vocabulary, units, layers=LAYERS), optax.adam(1e-3)
    words, labels = jnp.asarray(x), jnp.asarray(y)
    first = model.init(jax.random.key(0), words[:1, :1])

    def step(state: Any, x: jax.Array, y: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state, carry = state

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            logits, end = model.apply(params, x, carry, True)
            return cross_entropy(logits.reshape(-1, vocabulary), y.reshape(-1)).mean(), end

        (loss, carry), gradient = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, carry), loss

    jitted = jax.jit(step, donate_argnums=0)
    state = (jax.tree.map(jnp.copy, first), optimizer.init(first), model.begin(x.shape[0]))

    def run() -> float:
        nonlocal state
        state, loss = jitted(state, words, labels)
        jax.block_until_ready(state)
        return float(loss)

    return run, jax.device_get(first)["params"]


def torch_step(units: int, vocabulary: int, weights: Any, x: Any, y: Any) -> Callable[[], float]:
    """The same step in PyTorch, from our first weights."""
    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import nn

    def tensor(w: Any) -> Any:
        return torch.from_numpy(np.array(w))

    table, lstm = nn.Embedding(vocabulary, units), nn.LSTM(units, units, LAYERS, batch_first=True)
    output = nn.Linear(units, vocabulary)
    with torch.no_grad():
        table.weight.copy_(tensor(weights["embedding"]["embedding"]))
        for i in range(LAYERS):
            p = weights[f"lstm_{i}"]
            getattr(lstm, f"weight_ih_l{i}").copy_(tensor(p["input"]["kernel"].T))
            getattr(lstm, f"weight_hh_l{i}").copy_(tensor(p["recurrent"]["kernel"].T))
            getattr(lstm, f"bias_ih_l{i}").copy_(tensor(p["bias"]))
            getattr(lstm, f"bias_hh_l{i}").zero_()
        output.weight.copy_(tensor(weights["softmax"]["kernel"].T))
        output.bias.copy_(tensor(weights["softmax"]["bias"]))
    words, labels = torch.from_numpy(x).long(), torch.from_numpy(y).long().reshape(-1)
    optimizer = torch.optim.Adam([*table.parameters(), *lstm.parameters(), *output.parameters()], 1e-3)
    carry: Any = None

    def run() -> float:
        nonlocal carry
        optimizer.zero_grad(set_to_none=True)
        h, end = lstm(table(words), carry)
        carry = tuple(s.detach() for s in end)
        loss = F.cross_entropy(output(h).reshape(-1, vocabulary), labels)
        loss.backward()
        optimizer.step()
        return float(loss)

    return run


def compare(case: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each system and ours over PyTorch's, per round.

    Raises:
      RuntimeError: the first two losses differ, so that not the same thing is measured.
    """
    import numpy as np

    units, vocabulary, lanes, steps = CASES[case]
    rng = np.random.default_rng(0)
    x, y = (rng.integers(0, vocabulary, (lanes, steps)).astype(np.int32) for _ in range(2))
    ours, weights = our_step(units, vocabulary, x, y)
    theirs = torch_step(units, vocabulary, weights, x, y)
    for number in ("first", "second"):  # the second has seen the state that the first left
        a, b = ours(), theirs()
        if abs(a - b) > 1e-3 * abs(b):
            raise RuntimeError(f"{case}: the {number} loss is {a} here and {b} in PyTorch")
    elapsed, processor = measure({"ours": ours, "torch": theirs}, rounds)
    result: dict[str, Any] = {"case": case, "rounds": rounds}
    result |= {f"{name}_ms": spread([1e3 * s for s in times]) for name, times in elapsed.items()}
    result |= {f"{name}_cpu_ms": spread([1e3 * s for s in times]) for name, times in processor.items()}
    result["ours_over_torch"] = spread([a / b for a, b in zip(elapsed["ours"], elapsed["torch"], strict=True)])
    result["cpu_ours_over_torch"] = spread([a / b for a, b in zip(processor["ours"], processor["torch"], strict=True)])
    return result


def main() -> None:
    """Runs the cases and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="cores of each system")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cases", default="lstm-2x128,lstm-2x200", help=f"comma-separated, of {', '.join(CASES)}")
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
        cells = [f"{name} {row[f'{name}_ms']['median']:.0f} ms" for name in ("ours", "torch")]
        ratios = [
            f"{what} {row[k]['median']:.2f} [{row[k]['low']:.2f}, {row[k]['high']:.2f}]"
            for what, k in (("elapsed", "ours_over_torch"), ("processor", "cpu_ours_over_torch"))
        ]
        print(f"{case}: {', '.join(cells)}; ours over torch: {', '.join(ratios)}")
    if args.results:
        named = {f"{case}-{args.threads}t": row for case, row in rows.items()}
        record(args.results, "lstm_training", named, environment(("jax", "torch")))


if __name__ == "__main__":
    main()
