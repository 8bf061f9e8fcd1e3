"""Memory that is kept: a process that has asked for it takes freed blocks again without faults."""

import subprocess
import sys

import pytest

CODE = """
import ctypes, resource, sys
from compressx.native.memory import keep_memory
kept = keep_memory() if sys.argv[1] == "keep" else None
malloc, free = ctypes.CDLL(None).malloc, ctypes.CDLL(None).free
malloc.restype, free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def block():
    p = malloc(48 << 20)
    ctypes.memset(p, 1, 48 << 20)
    free(p)
block()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    block()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how):
    done = subprocess.run([sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return kept, int(count)


def test_blocks_come_back_without_faults():
    kept, few = faults("keep")
    if kept != "True":
        pytest.skip("another C library than glibc: nothing is promised there")
    assert few * 4 < faults("default")[1]
