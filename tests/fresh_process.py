"""Opens a native library in processes that are new to it: forked before anything was opened, in milliseconds each.

A line of standard input is a JSON object, a line of standard output its answer, a list with one entry a process:

    source, environment      the library's C++ file; variables that are set, or unset where the value is null
    symbols                  that it must have ("answer" is called)
    processes                how many run side by side (default 1)
    file_size, user          RLIMIT_FSIZE and the user's id of the processes, where they are given
    times                    how often each loads, in one process (default 1)
    space                    bytes that a folder has to have free, where they are not the usual

An entry holds `value` (null: the library could not be obtained), `warned` and `logged` (lines), or `signal` or `error`.
"""

import json
import logging
import os
import resource
import sys
import tempfile
import traceback
import warnings
from pathlib import Path
from typing import Any

from compressx.native import build as compiled


def _attempt(task: dict[str, Any]) -> dict[str, Any]:
    for name, value in task.get("environment", {}).items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    tempfile.tempdir = None  # chosen anew
    if "file_size" in task:
        resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_size"],) * 2)
    if "user" in task:
        os.setgroups([])
        os.setgid(task["user"])
        os.setuid(task["user"])
    compiled._SPACE = task.get("space", compiled._SPACE)
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    compiled.log.addHandler(handler)
    compiled.log.propagate = False
    library = compiled.Library(Path(task["source"]), {}, ("-shared", "-fPIC"))
    compiled.jax.ffi.register_ffi_target = lambda *a, **k: None
    compiled.jax.ffi.pycapsule = lambda f: f
    library = library._replace(targets={symbol: symbol for symbol in task.get("symbols", ["answer"])})
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(task.get("times", 1)):
            opened = compiled.load(library)
    value = None if opened is None else opened.answer()
    return {"value": value, "warned": [str(w.message) for w in told], "logged": logged}


def _fork(task: dict[str, Any]) -> tuple[int, int]:
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        os.close(read)
        try:
            answer = _attempt(task)
        except BaseException:
            answer = {"error": traceback.format_exc()}
        os.write(write, json.dumps(answer).encode())
    finally:
        os._exit(0)


def main() -> None:
    """Answers until standard input ends."""
    warnings.filterwarnings("ignore", message=".*fork")
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        answers = []
        for child, pipe in [_fork(task) for _ in range(task.get("processes", 1))]:
            with open(pipe, "rb") as f:
                said = f.read()
            status = os.waitpid(child, 0)[1]
            answers.append({"signal": os.WTERMSIG(status)} if os.WIFSIGNALED(status) else json.loads(said))
        print(json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
