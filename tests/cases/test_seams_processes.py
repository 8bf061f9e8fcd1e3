"""Seams that need a process of their own: hostile files, and the cache of the native library.

Each case is a small input that was wrong, and stands for its kind.
"""

import shutil
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cases import api

# Hostile files: small files must not take the machine.
#
# A forged file is one of today's version with today's digest, and its harmless twin loads: else a case would pass
# because the forgery is old.


def _rule_file(path: Path, spec: Any) -> Path:
    a = np.random.default_rng(0).standard_normal((8, 8)).astype(np.float32)
    leaf = api.forged_leaf("k", (8, 8), "float32", "dense", {}, {"values": "k:v"})
    return api.forge(path, [leaf], {"k:v": api.stored_plainly(a)}, [api.forged_rule(["k"], spec)])


def test_hostile_run_longer_than_the_leaf(tmp_path: Path) -> None:
    api.load(_rule_file(tmp_path / "harmless", api.spec_of_coupled_filters([[0, [[0, 8]]]], 1.0)))
    spec = api.spec_of_coupled_filters([[0, [[0, 30_000_000]]]], 0.5)
    seconds, size = api.cost_of_opening(_rule_file(tmp_path / "run", spec))
    assert size < 3e8 and seconds < 2, f"{size / 1e9:.1f} GB and {seconds:.1f} s for a file of 900 bytes"


def test_hostile_intersection_of_hundreds(tmp_path: Path) -> None:
    api.load(_rule_file(tmp_path / "harmless", api.spec_of_intersection([api.spec_of_unstructured(1.0)] * 2)))
    spec = api.spec_of_intersection([api.spec_of_unstructured(0.5)] * 400)
    seconds, _ = api.cost_of_opening(_rule_file(tmp_path / "parts", spec))
    assert seconds < 2, f"{seconds:.1f} s for 400 parts"


def _zeros(size: int) -> np.ndarray:
    """So many zero bytes, as zlib codes them."""
    z, step = zlib.compressobj(9), min(size, 1 << 20)
    return np.frombuffer(b"".join([z.compress(bytes(step)) for _ in range(size // step)] + [z.flush()]), np.uint8)


def _bomb(path: Path, n: int) -> Path:
    leaf = api.forged_leaf(
        *("k", (1, n), "uint8", "block-max", {"axis": "outputs", "sizes": [2]}),
        {"values": "k:values", "offsets": "k:offsets"},
    )
    sizes = {"k:values": n // 2, "k:offsets": n // 16}
    return api.forge(path, [leaf], {k: api.Stored("uint8", (m,), "zlib", _zeros(m)) for k, m in sizes.items()})


def test_hostile_memory_on_the_way(tmp_path: Path) -> None:
    """max_bytes bounds what unpacking takes, within a small stated multiple, not the result alone."""
    n = 64 << 20
    small = api.load(_bomb(tmp_path / "harmless", 1 << 16))["k"]
    assert small.shape == (1, 1 << 16) and not small.any()
    _, size = api.cost_of_opening(_bomb(tmp_path / "bomb", n), max_bytes=n)
    assert size < 8 * n, f"{size / n:.0f} times max_bytes"


# The native library's cache.


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder that holds the library, with which a process has run."""
    if not api.native_available():
        pytest.skip("no compiler, so no native library")
    cache = tmp_path_factory.mktemp("built") / "cache"
    api.copy_native_libraries(cache)
    done = api.compile_in_a_process(cache)
    assert "native" in done.stdout, done.stderr[-2000:]
    return cache


def _copying(built: Path, folder: Path) -> str:
    """A compiler that writes what the real one did, which takes a minute: of libraries the one named as its source."""
    held = {f.name.rpartition("-")[0]: f for f in built.rglob("*.so")}
    cases = "".join(f'*/{stem}.cc) from="{f}";;\n' for stem, f in held.items())
    path = folder / "cc"
    path.write_text(
        f'#!/bin/sh\nfor out; do case "$out" in\n{cases}esac; done\ncp "$from" "$out" && echo "$out" >> "$0.made"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_cache_cut_short(built: Path, tmp_path: Path) -> None:
    """A library that a power cut left short is built anew."""
    cache = shutil.copytree(built, tmp_path / "cut")
    libraries = list(cache.rglob("*.so"))
    assert libraries, "no library in the folder that was given: another variable, another name?"
    for f in libraries:
        f.write_bytes(f.read_bytes()[: f.stat().st_size // 2])
    out = api.compile_in_a_process(cache, CXX=_copying(built, tmp_path))
    assert out.returncode == 0 and "native" in out.stdout, f"exit {out.returncode}"
    assert (tmp_path / "cc.made").read_text().split(), "nothing was built"


def test_cache_without_a_compiler(built: Path, tmp_path: Path) -> None:
    """A library that is built is used where there is no compiler."""
    cache = shutil.copytree(built, tmp_path / "lean")
    assert list(cache.rglob("*.so")), "no library in the folder that was given: another variable, another name?"
    out = api.compile_in_a_process(cache, PATH=str(tmp_path), CXX="")
    assert "native" in out.stdout, f"{out.stdout.strip()!r}, without a word: {out.stderr.strip()[-80:]!r}"
