"""Damaged checkpoints, none that can be read, and a full disk."""

import gc
import os
import resource
import shutil
import subprocess
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.training.checkpoint import CheckpointError, Checkpoints

# orbax leaves coroutines behind when a read fails; Python says so when it collects them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def _collect():
    yield
    gc.collect()


def _tree(x: float):
    return {
        "w": jnp.full((64, 64), x),
        "key": jax.random.key(int(x)),
        "n": jnp.int32(x),
        "mask": jnp.array([True, False]),
    }


def _meta(step: int) -> dict:
    return {"phase": "dense", "global_step": step}


def _restore(folder: Path) -> tuple[int, dict]:
    with Checkpoints(folder) as c:
        (number, meta), *_ = c.read_meta()[0]
        return number, c.restore(number, meta, _tree(0))


def _largest(folder: Path) -> Path:
    """The file with the arrays' bytes."""
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def test_the_last_two_are_kept_and_come_back_bit_for_bit(tmp_path) -> None:
    with Checkpoints(tmp_path) as c:
        for i in (1, 5, 9):
            c.save(i, _tree(i), _meta(i))
        assert [n for n, _ in c.read_meta()[0]] == [9, 5]
    number, state = _restore(tmp_path)
    assert number == 9
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(_tree(9)), strict=True):
        assert a.dtype == b.dtype
        assert bool(jnp.all(a == b))


def test_nothing_saved_is_no_fault(tmp_path) -> None:
    assert Checkpoints(tmp_path).read_meta() == ([], [])


@pytest.mark.parametrize("damage", ["truncated", "flipped", "emptied", "gone"])
def test_a_damaged_checkpoint_is_noticed(tmp_path, damage) -> None:
    with Checkpoints(tmp_path) as c:
        c.save(1, {"w": jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)))}, _meta(1))
    file = _largest(tmp_path / "steps" / "1")
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    elif damage == "flipped":
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    elif damage == "emptied":
        file.write_bytes(b"")
    else:
        shutil.rmtree(tmp_path / "steps" / "1" / "state")
    with Checkpoints(tmp_path) as c:
        (number, meta), *_ = c.read_meta()[0]
        with pytest.raises(CheckpointError, match=f"checkpoint {tmp_path}/steps/1 is damaged: "):
            c.restore(number, meta, {"w": jnp.zeros((64, 64))})


def test_a_damaged_place_in_the_run_is_noticed(tmp_path) -> None:
    with Checkpoints(tmp_path) as c:
        for i in (1, 2):
            c.save(i, _tree(i), _meta(i))
    (tmp_path / "steps" / "2" / "meta" / "metadata").write_text('{"phase"')
    with Checkpoints(tmp_path) as c:
        found, faults = c.read_meta()
    assert [n for n, _ in found] == [1]
    assert len(faults) == 1
    assert "steps/2 is damaged" in faults[0]


class _Halt(Exception):
    pass


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> bytes:
    """The metrics of the short run, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    tiny.run(folder, plan=tiny.SHORT)
    return (folder / "metrics.jsonl").read_bytes()


@pytest.fixture
def halted(tiny, tmp_path):
    """The folder of the short run, stopped after step 11 with checkpoints at 5 and 10."""

    class Halt(tiny.training.Display):
        def move(self, phase, step):
            if step >= 11:
                raise _Halt

    with pytest.raises(_Halt):
        tiny.run(tmp_path, Halt(1, quiet=True), tiny.SHORT)
    assert sorted(p.name for p in (tmp_path / "checkpoints" / "steps").iterdir()) == ["10", "5"]
    return tmp_path


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(tiny, halted, whole) -> None:
    _largest(halted / "checkpoints" / "steps" / "10").write_bytes(b"x")
    said = []

    class Say(tiny.training.Display):
        def say(self, line):
            said.append(line)

    outcome = tiny.run(halted, Say(1), tiny.SHORT)
    assert outcome.resumed == 5
    (line,) = [x for x in said if "damaged" in x]
    assert "steps/10 is damaged" in line
    assert "going back to the one before it" in line
    assert (halted / "metrics.jsonl").read_bytes() == whole


def test_no_readable_checkpoint_is_an_error_that_says_what_to_do(tiny, halted) -> None:
    for number in ("5", "10"):
        _largest(halted / "checkpoints" / "steps" / number).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint can be read:.*steps/10.*steps/5.*to start anew"):
        tiny.run(halted, plan=tiny.SHORT)
    assert sorted(p.name for p in (halted / "checkpoints" / "steps").iterdir()) == ["10", "5"]


def test_weights_of_a_phase_are_checked_too(tmp_path) -> None:
    c = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="weights/dense does not exist; run that phase first"):
        c.load_weights("dense", _tree(0))
    noise = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32))
    c.save_weights("dense", {"w": jnp.ones((64, 64))})
    c.save_weights("dense", {"w": noise})  # replaces
    np.testing.assert_array_equal(c.load_weights("dense", {"w": jnp.zeros((64, 64))})["w"], noise)
    with pytest.raises(CheckpointError, match="cannot be read"):
        c.load_weights("dense", {"other": jnp.zeros(3)})
    _largest(tmp_path / "weights" / "dense").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="cannot be read|is damaged"):
        c.load_weights("dense", {"w": jnp.zeros((64, 64))})


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 400 KiB; skipped where one cannot be mounted."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


def test_a_full_disk_leaves_the_checkpoint_before_it(small_disk) -> None:
    rng = np.random.default_rng(0)  # noise does not compress
    small, large = ({"w": jnp.asarray(rng.normal(size=n).astype(np.float32))} for n in (5_000, 150_000))
    with Checkpoints(small_disk) as c:
        c.save(1, small, _meta(1))
        with pytest.raises(
            CheckpointError, match=r"step 2 could not be written .*the one before it is whole"
        ) as caught:
            c.save(2, large, _meta(2))
        assert "\n" not in str(caught.value)
    with Checkpoints(small_disk) as c:
        found, faults = c.read_meta()
        assert [n for n, _ in found] == [1]
        assert faults == []
        state = c.restore(1, found[0][1], small)
    np.testing.assert_array_equal(state["w"], small["w"])


def test_a_failing_write_says_so_and_the_run_goes_on_from_before(tiny, halted, whole) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # no file may grow beyond 4 KiB: a disk that is full
    try:
        with pytest.raises(CheckpointError, match=r"could not be written .*; the one before it is whole"):
            tiny.run(halted, plan=tiny.SHORT)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    outcome = tiny.run(halted, plan=tiny.SHORT)
    assert outcome.resumed == 10
    assert (halted / "metrics.jsonl").read_bytes() == whole
