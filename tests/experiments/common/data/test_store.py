"""The cache: exact, keyed by content, safe when killed and with several processes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from experiments.common import data
from experiments.common.data import store
from experiments.common.data.dataset import Arrays

INFO = data.Info(name="tiny", source="test", licence="none", classes=2, shape=(1,))
ARRAYS: Arrays = {
    "inputs/wave": np.random.default_rng(0).normal(size=(3000, 200)).astype(np.float32),
    "inputs/length": np.arange(3000, dtype=np.int64),
    "labels": np.arange(3000, dtype=np.int32) % 2,
}


def source(arrays: Arrays = ARRAYS, version: int = 1) -> data.Source:
    return data.Source(INFO, {"train": ()}, lambda split, blobs: arrays, version=version)


def through(arrays: Arrays, content: bytes = b"1", version: int = 1) -> Arrays:
    return store.cached(source(arrays, version), "train", [data.Blob(Path("x"), content)], lambda: arrays)


def refuse() -> Arrays:
    raise AssertionError("read again although it was cached")


def folder_of(content: bytes = b"1") -> Path:
    key = store.cache_key(source(), "train", [data.Blob(Path("x"), content)])
    return data.cache_dir() / "tiny" / f"train-{key}"


def test_the_second_load_comes_from_the_cache() -> None:
    first = through(ARRAYS)
    second = store.cached(source(), "train", [data.Blob(Path("elsewhere"), b"1")], refuse)
    for name, array in ARRAYS.items():
        for out in (first[name], second[name]):
            assert out.dtype == array.dtype and np.array_equal(out, array)
            assert out.flags.writeable and out.flags.c_contiguous  # alike, cached or not
    assert len(list(folder_of().glob("*array_record*"))) == 1


@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hnp.arrays(
        st.sampled_from([np.uint8, np.int8, np.int16, np.int32, np.int64, np.float32, np.float64, np.bool_]),
        hnp.array_shapes(min_dims=1, max_dims=4, max_side=5),
    ),
    st.binary(min_size=8, max_size=8),
)
def test_any_array_comes_back_as_it_was(array: np.ndarray, content: bytes) -> None:
    key = content + array.tobytes() + repr((array.shape, array.dtype)).encode()
    first = through({"inputs": array, "labels": array}, key)
    assert first["inputs"].dtype == array.dtype
    assert np.array_equal(first["inputs"], array, equal_nan=array.dtype.kind == "f")


def test_changed_files_or_code_never_meet_an_old_cache() -> None:
    other = {name: array[::-1].copy() for name, array in ARRAYS.items()}
    through(ARRAYS, b"1")
    for out in (through(other, b"2"), through(other, b"1", version=2)):
        assert np.array_equal(out["labels"], other["labels"])
    assert np.array_equal(through(other, b"1")["labels"], ARRAYS["labels"])
    blobs = [data.Blob(Path("x"), b"1")]
    assert store.cache_key(source(), "train", blobs) != store.cache_key(source(), "test", blobs)


def test_a_damaged_cache_is_an_error_that_names_it() -> None:
    through(ARRAYS)
    (record,) = folder_of().glob("*array_record*")
    sound = record.read_bytes()
    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 1
    for damaged in (sound[: len(sound) // 2], bytes(flipped), b""):
        record.write_bytes(damaged)
        with pytest.raises(data.DataFileError, match=f"^{folder_of()}: the cache is damaged.*delete this folder"):
            through(ARRAYS)


def test_a_cache_that_cannot_be_written_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path / "file"))
    with pytest.raises(data.DataFileError, match=r"cannot write the cache .*\$COMPRESSX_CACHE"):
        through(ARRAYS)


KILLED_AND_RACING = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_store as t
whole = t.store.Blocks._generate_examples
def killed(self):
    for number, example in enumerate(whole(self)):
        if number == 1:
            os._exit(9)
        yield example
if sys.argv[1] == "killed":
    t.store.Blocks._generate_examples = killed
else:
    Path(sys.argv[2]).touch()
    while not Path(sys.argv[3]).exists():
        time.sleep(0.005)
out = t.through(t.ARRAYS)
assert all((out[name] == array).all() for name, array in t.ARRAYS.items())
"""


def start(*args: str) -> subprocess.Popen[bytes]:
    script = KILLED_AND_RACING.format(tests=str(Path(__file__).parent))
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[4])}
    return subprocess.Popen([sys.executable, "-c", script, *args], env=env)


def test_a_killed_preparation_leaves_nothing_broken() -> None:
    assert start("killed").wait() == 9
    leftovers = list(folder_of().parent.iterdir())
    assert [path.name.startswith(store.UNFINISHED) for path in leftovers] == [True]
    assert np.array_equal(through(ARRAYS)["inputs/wave"], ARRAYS["inputs/wave"])
    assert folder_of().is_dir() and leftovers[0].is_dir()  # it might be another process at work
    old = time.time() - 2 * 86400
    os.utime(leftovers[0], (old, old))
    through(ARRAYS, b"2")
    assert not leftovers[0].exists()


def test_processes_at_the_same_time_do_not_disturb_each_other(tmp_path: Path) -> None:
    go = tmp_path / "go"
    ready = [tmp_path / f"ready{number}" for number in range(2)]
    processes = [start("racing", str(path), str(go)) for path in ready]
    deadline = time.time() + 60
    while not all(path.exists() for path in ready) and time.time() < deadline:
        time.sleep(0.01)
    go.touch()
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in folder_of().parent.iterdir()] == [folder_of().name]
    assert np.array_equal(
        store.cached(source(), "train", [data.Blob(Path("x"), b"1")], refuse)["labels"], ARRAYS["labels"]
    )


def test_the_loser_of_a_race_keeps_the_winners_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    through(ARRAYS)
    before = {path: path.stat().st_ino for path in folder_of().iterdir()}
    assert np.array_equal(store._prepare(ARRAYS, "train", folder_of())["labels"], ARRAYS["labels"])
    assert {path: path.stat().st_ino for path in folder_of().iterdir()} == before
    assert list(folder_of().parent.iterdir()) == [folder_of()]
