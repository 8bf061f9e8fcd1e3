"""Keeps a benchmark's rows as summaries from which `make tables` builds the tables."""

import os
import platform
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from experiments.common.report.summary import own_summary, write_summary


def environment(packages: tuple[str, ...] = ("jax",)) -> dict[str, Any]:
    """What a figure depends on besides the code: processor, cores, load, versions, date, command."""

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "load": [round(x, 2) for x in os.getloadavg()],
        "versions": {"python": platform.python_version(), **{name: of(name) for name in packages}},
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join([f"python -m benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def record(folder: Path, driver: str, rows: Mapping[str, Mapping[str, Any]], about: Mapping[str, Any]) -> None:
    """Writes `folder/driver/case/summary.json` for every case, the block being its row and the environment."""
    machine = {"processor": about["processor"], "cores": about["cores"]}
    run = {"machine": machine, **{key: about[key] for key in ("command", "date", "versions")}}
    for case, row in rows.items():
        where = folder / driver / case
        where.mkdir(parents=True, exist_ok=True)
        block = {**row, "environment": dict(about), "run": run}
        write_summary(where / "summary.json", own_summary(driver, case, block))
