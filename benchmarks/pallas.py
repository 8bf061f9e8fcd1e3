"""Block-sparse convolutions by Pallas beside XLA's dense ones on a GPU or TPU, round by round; needs such a device.

    python -m benchmarks.pallas [--cases=128x56x128,256x28x256,512x14x512] [--shares=0.05,0.1,0.25,0.5,1]
        [--batch=8] [--rounds=15] [--results=docs/results]

A case is input channels x image x filters, 3x3, of which a share of the blocks that `pallas.block_for` chooses is
live, at random. `xla` is the dense convolution as XLA runs it by default, which on these devices rounds its inputs;
`xla_exact` rounds nothing, as Pallas here does not. Ratios are taken within a round. Without a GPU or TPU the command
says so and fails: kernels that are interpreted have no time worth stating.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import measure, spread, table


def compare(case: str, share: float, batch: int, rounds: int) -> dict[str, Any]:
    """One row: milliseconds of each, and XLA's time over Pallas'."""
    import jax
    import numpy as np

    from compressx import kernels
    from compressx.kernels import pallas

    channels, size, filters = (int(part) for part in case.split("x"))
    rng = np.random.default_rng(0)
    backend, _ = pallas.target()
    block = pallas.block_for((channels, filters), backend)
    if block is None:
        raise ValueError(f"{case}: no blocks divide {channels} channels and {filters} filters on a {backend}")
    bk, bf = block
    cut = 9 * (channels // bk) * (filters // bf)
    live = np.zeros(cut, bool)
    live[rng.permutation(cut)[: max(1, round(share * cut))]] = True
    live = live.reshape(3, 3, channels // bk, filters // bf).repeat(bk, axis=2).repeat(bf, axis=3)
    w = rng.standard_normal(live.shape, dtype=np.float32) * live / np.float32(np.sqrt(9 * channels * share))
    x = jax.device_put(rng.standard_normal((batch, size, size, channels), dtype=np.float32))
    ours, xla = (kernels.prepare(w, x.shape, path=path) for path in ("pallas", "xla"))
    dense = jax.jit(lambda w, x: kernels.xla(x, w, xla.geometry))
    with jax.default_matmul_precision("highest"):
        exact = jax.jit(lambda w, x: kernels.xla(x, w, xla.geometry)).lower(xla.weight, x).compile()
    error = float(abs(ours(x) - exact(xla.weight, x)).max())
    if not error < 1e-3:
        raise RuntimeError(f"{case} at {share:g}: Pallas differs from the dense convolution by {error:.1e}")
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: jax.block_until_ready(ours(x)),
        "xla": lambda: jax.block_until_ready(dense(xla.weight, x)),
        "xla_exact": lambda: jax.block_until_ready(exact(xla.weight, x)),
    }
    elapsed, _ = measure(runs, rounds)
    row: dict[str, Any] = {"case": case, "path": ours.path, "block": f"{bk}x{bf}", "share": float(live.mean())}
    row |= {f"{name}_ms": spread([1e3 * t for t in seconds]) for name, seconds in elapsed.items()}
    for name in ("xla", "xla_exact"):
        row[f"{name}_over_ours"] = spread([a / b for a, b in zip(elapsed[name], elapsed["ours"], strict=True)])
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", default="128x56x128,256x28x256,512x14x512", help="channels x image x filters")
    parser.add_argument("--shares", default="0.05,0.1,0.25,0.5,1", help="of live blocks")
    parser.add_argument("--batch", type=int, default=8, help="images")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds, at least 2")
    parser.add_argument("--results", type=Path, help="folder for the summaries, docs/results")
    args = parser.parse_args()
    shares = [float(share) for share in args.shares.split(",")]
    if args.rounds < 2 or args.batch < 1 or not all(0 < share <= 1 for share in shares):
        parser.error("--rounds of at least 2, --batch of 1 and --shares above 0 and up to 1 are needed")

    import jax

    from compressx.kernels import pallas

    if pallas.target()[1]:
        print(f"No GPU or TPU here (jax runs on the {jax.default_backend()}): nothing is timed.", file=sys.stderr)
        return 1
    rows = {
        f"{case}-{share:g}": compare(case, share, args.batch, args.rounds)
        for case in args.cases.split(",")
        for share in shares
    }
    print(table([{"": name, **row} for name, row in rows.items()]))
    if args.results:
        device = str(jax.devices()[0].device_kind)
        record(args.results, "pallas", {n: row | {"device": device} for n, row in rows.items()}, environment())
    return 0


if __name__ == "__main__":
    sys.exit(main())
