"""Installs the engines that ours are compared with into this environment, one by one, and says what failed and why.

    python -m benchmarks.install_peers [--peers=torch,onnxruntime,...]          # or: make peers

Each is installed alone with the pins of constraints.txt, so that one that cannot be obtained neither ends the others
nor moves a version of ours, DeepSparse in an environment of its own; then it is imported in a process of its own. What
stays absent is left out of the benchmarks, which name it. The exit status is 1 where a peer is missing in the end.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import deepsparse

PACKAGES = {  # package: module
    "torch": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "MNN": "MNN",
    "onnx": "onnx",
    "ai-edge-litert": "ai_edge_litert",
    "flatbuffers": "flatbuffers",
    "apache-tvm": "tvm",
    "deepsparse": "deepsparse",
}
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"

Command = Callable[[list[str]], tuple[int, str]]


def run(command: list[str]) -> tuple[int, str]:
    """Exit status and all output of a command."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=3600)
    except subprocess.TimeoutExpired:
        return 124, "ERROR: took more than an hour"
    return done.returncode, done.stdout


def reason(output: str) -> str:
    """The lines of an output that say why it failed: what a package itself said, pip's errors, else the last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip(" =|╰─>×│")]
    marks = ("end-of-life", "ERROR:", "Error:")
    told = [line for mark in marks for line in lines if mark in line]
    return "; ".join(dict.fromkeys(told[:3])) or (lines[-1] if lines else "no output")


def install(package: str, command: Command = run) -> tuple[bool, str]:
    """Whether a peer can be imported after its install, and its version or why not."""
    python, what = sys.executable, ["-c", str(CONSTRAINTS), package]
    if package == "deepsparse":
        status, output = command([deepsparse.interpreter(), "-m", "venv", str(deepsparse.ENVIRONMENT)])
        if status:
            return False, f"not installed: {reason(output)}"
        python, what = str(deepsparse.PYTHON), [deepsparse.RELEASE]
    status, output = command([python, "-m", "pip", "--disable-pip-version-check", "install", "-q", *what])
    if status:
        return False, f"not installed: {reason(output)}"
    ask = f"import importlib.metadata as m, {PACKAGES[package]}; print(m.version({package!r}))"
    status, output = command([python, "-c", ask])
    return (False, f"installed, not imported: {reason(output)}") if status else (True, output.split()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(PACKAGES), help=f"comma-separated, of {', '.join(PACKAGES)}")
    names = parser.parse_args().peers.split(",")
    unknown = [name for name in names if name not in PACKAGES]
    if unknown:
        parser.error(f"--peers: no peer {', '.join(unknown)}; they are {', '.join(PACKAGES)}")
    missing = 0
    for name in names:
        there, text = install(name)
        missing += not there
        print(f"{name:15} {text}", flush=True)
    return int(missing > 0)


if __name__ == "__main__":
    sys.exit(main())
