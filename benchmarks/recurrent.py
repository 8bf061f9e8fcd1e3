"""GRU and LSTM steps on compressed recurrent matrices beside dense jax, onnxruntime and PyTorch, round by round.

    python -m benchmarks.recurrent [--cell=gru_after] [--hidden=1024] [--rates=1,10,29,103,300] [--steps=100]
        [--formats=bspc,block-max,csr] [--threads=1] [--rounds=15] [--model=FILE] [--results=docs/results]

One call runs a sequence of `--steps` steps of one layer, batch 1, given the input's part of the gates; a step's time is
that over the steps, so that a call's overhead is spread as it is in use. Ratios are taken within a round. Weights are
random: for BSPC four strips of outputs keep the same share of inputs and of outputs, each strip its own; block-max
keeps one weight of each block of a row; CSR scattered ones. onnxruntime and PyTorch run their own GRU or LSTM, whose
input is a single feature: they compute no input product to speak of, as the other two do not.

`--model` takes the recurrent matrices of a saved GRU instead, layer by layer: `compressed.safetensors` of a finished
run of `experiments.gru_speech`. `spread_own` and `spread_stored` say how unevenly a product's work would be shared by
8 threads, outputs in their own order and as they are stored (`recurrent.spread`): counted, for every format.
"""

import argparse
import importlib.util
import itertools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import measure, spread, table


def matrix(kind: str, hidden: int, rate: float, rng: Any) -> Any:
    """A random `[hidden, hidden]` at a rate, in the structure of a format."""
    import numpy as np

    w = np.zeros((hidden, hidden), np.float32)
    scale = np.float32(np.sqrt(rate / hidden) / 2)
    if rate == 1:
        return scale * rng.standard_normal(w.shape, dtype=np.float32)
    if kind == "bspc":
        share = rate**-0.5
        for outputs in np.array_split(np.arange(hidden), 4):
            inputs = rng.permutation(hidden)[: max(1, round(share * hidden))]
            kept = rng.permutation(outputs)[: max(1, round(share * outputs.size))]
            w[np.ix_(inputs, kept)] = rng.standard_normal((inputs.size, kept.size), dtype=np.float32)
    elif kind == "block-max":
        size = 1 << max(1, round(np.log2(rate)))
        for start in range(0, hidden, size):
            place = start + rng.integers(0, min(size, hidden - start), hidden)
            w[np.arange(hidden), place] = rng.standard_normal(hidden, dtype=np.float32)
    else:
        places = rng.permutation(w.size)[: round(w.size / rate)]
        w.reshape(-1)[places] = rng.standard_normal(places.size, dtype=np.float32)
    return scale * w


def torch_step(cell: str, u: Any, steps: int, threads: int) -> Callable[[], Any]:
    """PyTorch's own layer with the same dense recurrent weights (its gates are r, z, n and i, f, g, o)."""
    import numpy as np
    import torch

    torch.set_num_threads(threads)
    hidden = u.shape[0]
    layer = (torch.nn.LSTM if cell == "lstm" else torch.nn.GRU)(1, hidden)
    gates = np.split(u, u.shape[1] // hidden, axis=1)
    order = gates if cell == "lstm" else [gates[1], gates[0], gates[2]]
    with torch.no_grad():
        layer.weight_hh_l0.copy_(torch.tensor(np.concatenate([g.T for g in order])))
    x = torch.zeros(steps, 1, 1)

    def run() -> Any:
        with torch.inference_mode():
            return layer(x)[0]

    return run


def ort_step(cell: str, u: Any, steps: int, threads: int) -> Callable[[], Any]:
    """onnxruntime's own operator with the same dense recurrent weights (gates z, r, h and i, o, f, c)."""
    import numpy as np
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    hidden = u.shape[0]
    gates = np.split(u, u.shape[1] // hidden, axis=1)
    order = [gates[0], gates[3], gates[1], gates[2]] if cell == "lstm" else gates
    r = np.concatenate([g.T for g in order])[None]
    constants = [
        numpy_helper.from_array(np.ascontiguousarray(r, np.float32), "R"),
        numpy_helper.from_array(np.zeros((1, r.shape[1], 1), np.float32), "W"),
    ]
    options = {"hidden_size": hidden} | ({} if cell == "lstm" else {"linear_before_reset": int(cell == "gru_after")})
    node = helper.make_node("LSTM" if cell == "lstm" else "GRU", ["X", "W", "R"], ["Y"], **options)
    x = helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, 1, 1])
    y = helper.make_tensor_value_info("Y", TensorProto.FLOAT, list("tdnh"))
    graph = helper.make_graph([node], "cell", [x], [y], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads, session_options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(
        made.SerializeToString(), session_options, providers=["CPUExecutionProvider"]
    )
    feed = {"X": np.zeros((steps, 1, 1), np.float32)}
    return lambda: session.run(None, feed)[0]


def compare(kind: str, rate: float, args: argparse.Namespace) -> dict[str, Any]:
    """The row of a format at a rate, with random weights."""
    import numpy as np

    from compressx import formats

    rng = np.random.default_rng(0)
    gates = [matrix(kind, args.hidden, rate, rng) for _ in range(4 if args.cell == "lstm" else 3)]
    packed = gates if rate == 1 else [formats.pack(g, format=kind) for g in gates]
    return {"format": kind, "rate": rate} | measured(args.cell, packed, gates, rng, args)


def saved(file: Path, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The rows of a saved GRU's layers, with the weights they were trained to.

    Raises:
      ValueError: the file holds no `params/gru_<i>/u<z, r, h>`.
    """
    import numpy as np

    import compressx
    from compressx import formats

    held = compressx.load_model(file).packed
    rows: dict[str, dict[str, Any]] = {}
    for layer in itertools.takewhile(lambda i: f"params/gru_{i}/uz" in held, itertools.count()):
        prefix = f"params/gru_{layer}/"
        packed = [held[f"{prefix}u{gate}"] for gate in "zrh"]
        cell = "gru_after" if f"{prefix}bu" in held else "gru_before"
        gates, kinds = [formats.unpack(p) for p in packed], sorted({p.format for p in packed})
        row = {"format": ", ".join(kinds)} | measured(cell, packed, gates, np.random.default_rng(0), args)
        rows[f"model-{'-'.join(file.parts[-3:-1])}-gru_{layer}-{args.threads}t"] = row
    if not rows:
        raise ValueError(f"{file}: no matrices params/gru_0/u<z, r, h>; it must be a saved GRU")
    return rows


def measured(cell: str, packed: list[Any], gates: list[Any], rng: Any, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of a step by each system, each peer's time over ours, and what is counted."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from compressx import kernels
    from compressx.kernels import recurrent

    u = np.concatenate(gates, axis=1)
    hidden = u.shape[0]
    ours = kernels.prepare_recurrent(cell, packed, threads=args.threads)
    dense = kernels.prepare_recurrent(cell, gates, path="xla")
    x = jnp.asarray(rng.standard_normal((args.steps, 1, u.shape[1]), dtype=np.float32))
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(ours(x)),
        "jax": lambda: jax.block_until_ready(dense(x)),
    }
    if importlib.util.find_spec("torch") and cell != "gru_before":
        runs["torch"] = torch_step(cell, u, args.steps, args.threads)
    if importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnx"):
        runs["onnxruntime"] = ort_step(cell, u, args.steps, args.threads)
    error = float(jnp.abs(ours(x)[0] - dense(x)[0]).max())
    if not error < 1e-4:
        raise RuntimeError(f"{ours.path} differs from the dense cell by {error:.1e}")
    elapsed, _ = measure(runs, args.rounds)
    row: dict[str, Any] = {"path": ours.path, "cell": cell, "hidden": hidden}
    row["rate_counted"] = float(u.size / max(1, np.count_nonzero(u)))
    for name, seconds in elapsed.items():
        row[f"{name}_us"] = spread([1e6 * t / args.steps for t in seconds])
        row[f"{name}_best_us"] = 1e6 * min(seconds) / args.steps
    if ours.path != "xla":
        tiles = recurrent.tiles_of(packed, 16)
        row |= recurrent.loads(tiles, 16)
        row["spread_own"], row["spread_stored"] = recurrent.spread(tiles, u.shape[1], 16, 8)
        for name in elapsed:
            if name != "ours":
                pairs = zip(elapsed[name], elapsed["ours"], strict=True)
                row[f"{name}_over_ours"] = spread([a / b for a, b in pairs])
                row[f"{name}_over_ours_best"] = min(elapsed[name]) / min(elapsed["ours"])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="gru_after", choices=("gru_before", "gru_after", "lstm"))
    parser.add_argument("--hidden", type=int, default=1024, help="units")
    parser.add_argument("--rates", default="1,10,29,103,300", help="comma-separated weight reductions, 1 and more")
    parser.add_argument("--formats", default="bspc", help="comma-separated, of bspc, block-max, csr")
    parser.add_argument("--steps", type=int, default=100, help="of a sequence")
    parser.add_argument("--threads", type=int, default=1, help="cores for every system (default 1)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 2")
    parser.add_argument("--model", type=Path, help="a saved GRU instead of random weights")
    parser.add_argument("--results", type=Path, help="folder for the summaries, docs/results")
    args = parser.parse_args()
    kinds, rates = args.formats.split(","), [float(rate) for rate in args.rates.split(",")]
    unknown = sorted(set(kinds) - {"bspc", "block-max", "csr"})
    if unknown:
        parser.error(f"--formats: no format {', '.join(unknown)}; they are bspc, block-max, csr")
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= args.threads <= len(cores):
        parser.error(f"--threads={args.threads}: this process may use 1 to {len(cores)} cores")
    if args.rounds < 2 or args.steps < 1 or args.hidden < 4 or min(rates) < 1:
        parser.error("--rounds of at least 2, --steps of 1, --hidden of 4 and --rates of 1 are needed")
    os.sched_setaffinity(0, cores[: args.threads])  # before jax sizes its thread pool

    from compressx import kernels

    print(f"path: {kernels.active_path()}")
    rows = (
        saved(args.model, args)
        if args.model
        else {
            f"{args.cell}-{kind}-{rate:g}x-{args.threads}t": compare(kind, rate, args)
            for kind in kinds
            for rate in rates
        }
    )
    for case, row in rows.items():
        print(f"\n{case}")
        print(table([{"": key, "value": value} for key, value in row.items()]))
    if args.results:
        record(args.results, "recurrent", rows, environment(("jax", "torch", "onnxruntime")))
    return 0


if __name__ == "__main__":
    sys.exit(main())
