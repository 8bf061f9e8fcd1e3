"""What the kernels' tests share: running an attack on native code that watches its own memory."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture
def under_address_sanitizer(tmp_path):
    """`run(file, call)`: evaluates `call` of a test file with all native code under the address sanitizer.

    The call returns how many hostile calls were refused; an access outside the buffers ends the process instead.
    """
    compiler = os.environ.get("CXX", "g++")
    names = ("libasan.so", "libstdc++.so.6")  # the second, so that the first finds what it intercepts of exceptions
    ask = lambda name: subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    preload = [ask(name).stdout.strip() for name in names]
    if not all(Path(name).is_absolute() for name in preload):
        pytest.skip("the compiler has no address sanitizer")

    def run(file: str, call: str) -> int:
        code = (
            f"import importlib.util as u; s = u.spec_from_file_location('t', {file!r});"
            "m = u.module_from_spec(s); s.loader.exec_module(m);"
            "from compressx.kernels import recurrent; assert recurrent.available();"  # both libraries
            f"print('refused', m.{call})"
        )
        environment = os.environ | {
            "LD_PRELOAD": ":".join(preload),
            "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
            "COMPRESSX_NATIVE_FLAGS": "-fsanitize=address -g1",
            "COMPRESSX_CACHE": str(tmp_path),
        }
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0 and "AddressSanitizer" not in done.stderr, done.stderr[-3000:]
        return int(done.stdout.split()[-1])

    return run
