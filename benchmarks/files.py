"""Seconds and memory of hardening, checking, saving, loading and verifying a model, beside a plain copy of its weights.

    python -m benchmarks.files [--leaves=4] [--side=4096] [--dtype=float32] [--only=block,levels] [--coding=zlib]
                               [--results=docs/results]

A model has so many square leaves, all under one set. Every set runs in a process of its own. `copy` is
`safetensors.numpy.save_file` of the dense weights, synchronized with the disk as `save_model` does; `pack` is
`formats.pack` of all leaves, one after the other, without a file. Memory is what the process holds at most beyond the
tree and the compiled programs, without pages of files (`RssAnon`, sampled every 10 ms). Seconds of the processor stand
beside elapsed ones, which other programs lengthen. With --coding the weights are also saved entropy-coded: what that
saves in bytes and costs in seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import environment, record
from benchmarks.training import table


def sets() -> dict[str, Any]:
    """A set of every family, by name."""
    import compressx as cx

    return {
        "unstructured": cx.unstructured(0.2),
        "n_of_m": cx.n_of_m(2, 4),
        "block": cx.block((4, 4), 0.25),
        "bsp": cx.bsp(0.5, 0.5),
        "block_max": cx.block_max(16),
        "darb": cx.darb(1 / 16),
        "bank_balanced": cx.bank_balanced(1 / 8, 64),
        "filters": cx.filters(0.5),
        "unify": cx.unify((4, 4), 0.5),
        "levels": cx.quantize(4, per="channel"),
        "levels_tensor": cx.quantize(4),
        "levels_sparse": cx.unstructured(0.25) & cx.quantize(4),
    }


class Memory:
    """The most that this process holds while a block runs, beyond what it held when the block began."""

    def __enter__(self) -> "Memory":
        self._done, self.start, self.peak = threading.Event(), _held(), 0
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, _held() - self.start)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def _held() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


def measured(run: Callable[[], Any]) -> tuple[Any, float, float, int]:
    """What a function returns, its elapsed seconds, those of the processor, and its peak of memory in bytes."""
    with Memory() as memory:
        start, processor = time.perf_counter(), time.process_time()
        result = run()
        seconds, processor = time.perf_counter() - start, time.process_time() - processor
    return result, seconds, processor, memory.peak


def one(name: str, leaves: int, side: int, dtype: str, coding: str | None, folder: Path) -> dict[str, Any]:
    """One row."""
    import contextlib
    import io

    import jax

    import compressx as cx
    from compressx import cli

    rules = [(".*", sets()[name])]
    keys = jax.random.split(jax.random.key(0), leaves)
    make = jax.jit(lambda k: jax.random.normal(k, (side, side)).astype(dtype))
    dense = {f"leaf{i:03}": jax.block_until_ready(make(k)) for i, k in enumerate(keys)}
    size = sum(x.nbytes for x in dense.values())
    row: dict[str, Any] = {"set": str(rules[0][1]), "weights": leaves * side * side, "dtype": dtype, "bytes": size}

    def keep(step: str, run: Callable[[], Any]) -> Any:
        result, seconds, processor, peak = measured(run)
        row[f"{step}_seconds"], row[f"{step}_processor"], row[f"{step}_peak"] = seconds, processor, peak
        return result

    cx.harden({"leaf": dense["leaf000"]}, rules, fresh=True)  # compiles
    hard = keep("harden", partial(cx.harden, dense, rules, fresh=True))
    del dense
    keep("check", partial(cx.check, hard, rules))
    path = folder / "model.safetensors"
    keep("copy", partial(_copy, hard.params, folder / "copy"))
    keep("pack", partial(_pack, hard, rules[0][1]))
    sizes = keep("save", partial(cx.save_model, path, hard, rules))
    row["packed_bytes"], row["file_bytes"] = sizes.packed, sizes.file
    if coding:
        coded = keep("coding", partial(cx.save_model, folder / "coded", hard, rules, coding=coding))
        row["coding"], row["coded_bytes"] = coding, coded.stored
    del hard
    saved = keep("load", partial(cx.load_model, path))
    row["format"] = "/".join(sorted({p.format for p in saved.packed.values()}))
    del saved
    with contextlib.redirect_stdout(io.StringIO()):
        code = keep("verify", partial(cli.main, ["verify", str(path)]))
    assert code == 0, "the saved model violates its rules"
    row["save_mb_a_second"] = size / 1e6 / row["save_seconds"]
    row["save_peak_ratio"] = row["save_peak"] / size
    return row


def _copy(params: Any, path: Path) -> None:
    import jax
    import safetensors.numpy

    safetensors.numpy.save_file({k: jax.device_get(x) for k, x in params.items()}, path)
    with open(path, "rb") as f:
        os.fsync(f.fileno())
    path.unlink()


def _pack(hard: Any, constraint: Any) -> None:
    from compressx import formats

    for name, x in hard.params.items():
        formats.pack(x, constraint, hard.structures[name])


def main() -> None:
    """Runs every set and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, default=4)
    parser.add_argument("--side", type=int, default=4096)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", default="", help="names of sets, separated by commas")
    parser.add_argument("--coding", choices=("zlib", "lzma"), help="also save entropy-coded")
    parser.add_argument("--results", type=Path, help="folder to keep the rows in")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        with tempfile.TemporaryDirectory() as folder:
            row = one(given.one, given.leaves, given.side, given.dtype, given.coding, Path(folder))
        print(json.dumps(row))
        return
    about = environment()
    rows: dict[str, dict[str, Any]] = {}
    for name in [n for n in sets() if not given.only or n in given.only.split(",")]:
        command = [sys.executable, "-m", "benchmarks.files", f"--one={name}", f"--leaves={given.leaves}"]
        command += [f"--side={given.side}", f"--dtype={given.dtype}"]
        command += [f"--coding={given.coding}"] if given.coding else []
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            print(f"{name}: {done.stderr.splitlines()[-1:]}", file=sys.stderr)
            continue
        row = json.loads(done.stdout.splitlines()[-1])
        case = f"{name}-{row['weights'] / 1e6:.0f}m-{given.dtype}"
        rows[case] = row
        print(json.dumps({case: row}), file=sys.stderr, flush=True)
        if given.results:
            record(given.results, "files", {case: row}, about)
    print(table([_line(case, row) for case, row in rows.items()]))


def _line(case: str, row: dict[str, Any]) -> dict[str, Any]:
    steps = ("harden", "check", "copy", "pack", "save", "load", "verify")
    times = {f"{s} s": f"{row[f'{s}_seconds']:.2f} ({row[f'{s}_processor']:.2f})" for s in steps}
    memory = {"save MB/s": f"{row['save_mb_a_second']:.0f}", "save peak": f"{row['save_peak_ratio']:.2f} x"}
    return {"set": case, "format": row["format"], **times, **memory, "file MB": f"{row['file_bytes'] / 1e6:.1f}"}


if __name__ == "__main__":
    main()
