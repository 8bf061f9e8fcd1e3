"""DeepSparse, the one engine for sparse networks on CPUs, in an environment and a process of its own.

    run = Step(onnx_bytes(...), x, threads)        # run() is an inference there

Its last release that runs, 1.8.0, is archived and needs an older NumPy and onnx than ours, and Python 3.11 or older, so
`make peers` puts it in an environment inside this one, of such a Python where one is found. The worker, `python
deepsparse.py MODEL IMAGES OUTPUTS THREADS`, answers every line that it is sent by one inference; the pipe adds some 50
microseconds, which are counted as its own.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from pathlib import Path
from typing import Any

import numpy as np

ENVIRONMENT = Path(sys.prefix) / "deepsparse"
PYTHON = ENVIRONMENT / "bin" / "python"
RELEASE = "deepsparse==1.8.0"


def interpreter() -> str:
    """A Python for its environment: this one, where its last release has a wheel for it, or the newest such found."""
    names = ["python3.11", "python3.10", "python3.9"]
    folder = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = [sys.executable] if sys.version_info < (3, 12) else []
    found += [*names, *(str(p) for name in names for p in sorted(folder.glob(f"*/bin/{name}")))]
    for each in found:
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            subprocess.run([each, "-c", "import ensurepip, venv"], check=True, capture_output=True)
            return each
    return sys.executable


def installed() -> bool:
    """Whether its environment is there."""
    return PYTHON.exists()


class Step:
    """The engine with an ONNX model for images `[n, h, w, c]`; a call is an inference, with the model's own output.

    Raises:
      RuntimeError: the worker ended; with the end of what it said.
    """

    def __init__(self, model: bytes, x: Any, threads: int):
        folder = tempfile.mkdtemp(prefix="deepsparse")
        files = {name: Path(folder, name) for name in ("m.onnx", "x.npy", "y.npy", "log")}
        self._log = files["log"]
        files["m.onnx"].write_bytes(model)
        np.save(files["x.npy"], np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        command = [str(PYTHON), __file__, *(str(files[name]) for name in ("m.onnx", "x.npy", "y.npy")), str(threads)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with self._log.open("w") as log:
            self._worker = subprocess.Popen(command, stderr=log, **pipes)
        weakref.finalize(self, _end, self._worker, folder)
        self._ask("output")
        self._y = np.load(files["y.npy"])

    def _ask(self, word: str) -> None:
        to, answers = self._worker.stdin, self._worker.stdout
        assert to is not None and answers is not None
        try:
            to.write(word + "\n")
            to.flush()
        except BrokenPipeError:
            pass  # it has said why
        if answers.readline().strip() != "done":
            raise RuntimeError(self._log.read_text()[-500:] or "the worker ended without a word")

    def __call__(self) -> Any:
        self._ask("run")
        return self._y


def _end(worker: "subprocess.Popen[str]", folder: str) -> None:
    """Closes the worker's input, at which it ends, and removes its files."""
    for pipe in (worker.stdin, worker.stdout):
        with contextlib.suppress(BrokenPipeError):
            assert pipe is not None
            pipe.close()
    worker.wait()
    shutil.rmtree(folder)


def serve(model: str, images: str, outputs: str, threads: int) -> None:
    """The worker: an inference for every line of the standard input, and for `output` its result in a file."""
    from deepsparse import Engine  # the package: this file runs as a script here

    x = np.load(images)
    engine = Engine(model, batch_size=len(x), num_cores=threads)
    for line in sys.stdin:
        y = engine.run([x])[0]
        if line.strip() == "output":
            np.save(outputs, y)
        print("done", flush=True)


if __name__ == "__main__":
    sys.path = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]
    serve(*sys.argv[1:4], int(sys.argv[4]))
