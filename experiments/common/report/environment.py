"""What a run ran on: versions, machine, command and date, as plain dicts for summaries and pages."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("compressx", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow-datasets")


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str]:
    """Python's version and those of the installed packages among `packages`; one not installed is left out."""
    out = {"python": platform.python_version()}
    for package in packages:
        try:
            out[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return out


def machine() -> dict[str, Any]:
    """The machine in a few words: system, processor, cores this process may use, memory in bytes, jax devices.

    The host's name and the user's are left out: pages and summaries are published.
    """
    import jax  # here, so that tables and pages can be built without starting a backend

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    kinds = [device.device_kind for device in jax.devices()]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": cores,
        "memory_bytes": _memory(),
        "backend": jax.default_backend(),
        "devices": ", ".join(f"{kinds.count(kind)} x {kind}" for kind in dict.fromkeys(kinds)),
    }


def command(module: str, argv: Sequence[str] | None = None) -> str:
    """The command line to type again: `python -m <module> <flags>`, quoted for a shell.

    Args:
      module: for example `experiments.cnn`.
      argv: the arguments without the program; those of this process by default.
    """
    return shlex.join(["python", "-m", module, *(sys.argv[1:] if argv is None else argv)])


def run_record(command: str, date: datetime.datetime | None = None) -> dict[str, Any]:
    """The `run` record of a summary's own block: command, date (UTC, to the second), machine, versions."""
    moment = (date or datetime.datetime.now(datetime.UTC)).astimezone(datetime.UTC)
    return {
        "command": command,
        "date": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "machine": machine(),
        "versions": versions(),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
