"""Which Python `make` takes: the newest supported one that runs, wherever a broken one stands before it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BROKEN = "echo no such version >&2; exit 127"
OTHER = "exit 1"  # runs, and says of itself that it is none of the supported versions
RUNS = f'exec "{sys.executable}" "$@"'

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def _make(folder: Path, scripts: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`make env` where the folder is the whole PATH."""
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)
    command = [str(shutil.which("make")), "env", f"VENV={folder / 'none'}", *arguments]
    return subprocess.run(
        command, cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True, check=False, timeout=300
    )


def _taken(folder: Path, scripts: dict[str, str], *arguments: str) -> str:
    """The Python that the environment would be made with, read off the commands that `make` would run."""
    (line,) = (text for text in _make(folder, scripts, "-n", *arguments).stdout.splitlines() if "-m venv" in text)
    return line.split('"')[1]


@pytest.mark.parametrize(
    ("found", "taken"),
    [
        ({"python3.13": RUNS, "python3.12": RUNS, "python3.11": RUNS, "python3": RUNS}, "python3.13"),
        ({"python3.13": BROKEN, "python3.12": BROKEN, "python3.11": RUNS, "python3": RUNS}, "python3.11"),
        ({"python3.13": OTHER, "python3.12": RUNS}, "python3.12"),
        ({"python3.11": BROKEN, "python3": RUNS}, "python3"),
    ],
)
def test_make_takes_the_newest_python_that_runs(tmp_path, found, taken) -> None:
    assert _taken(tmp_path, found) == str(tmp_path / taken)


def test_make_can_be_told_another(tmp_path) -> None:
    assert _taken(tmp_path, {"python3.13": RUNS}, "PYTHON=/opt/python") == "/opt/python"


@pytest.mark.parametrize("found", [{}, {"python3.13": BROKEN, "python3": OTHER}])
def test_make_says_what_is_missing(tmp_path, found) -> None:
    said = _make(tmp_path, found)
    assert said.returncode != 0
    assert "No Python 3.11 to 3.13 was found that runs" in said.stderr
