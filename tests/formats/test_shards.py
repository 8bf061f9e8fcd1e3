"""Models in several files, and models that stay on the disk: the same bits, and what is missing or swapped is named."""

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx as cx
from compressx import formats
from compressx.formats import CompressedFileError, file, shards, tensors
from compressx.formats.base import DTYPES

RULES = [(".*kernel", cx.unstructured(keep=300))]
INDEX = "m.safetensors.index.json"


def _tree(seed: int = 0) -> dict[str, Any]:
    r = np.random.default_rng(seed)
    out = {}
    for i in range(4):
        w = np.zeros(64 * 32, np.float32)
        w[r.permutation(w.size)[:300]] = r.standard_normal(300)
        out[f"l{i}"] = {"kernel": w.reshape(64, 32), "bias": r.standard_normal(32).astype(DTYPES["bfloat16"])}
    return out


def _same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes() for x, y in pairs)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The path of a model in several shards, in a folder of its own."""
    folder = tmp_path / "model"
    folder.mkdir()
    cx.save_model(folder / "m.safetensors", _tree(), RULES, extra={"seed": 0}, shard_bytes=2700)
    return folder / "m.safetensors"


def test_shards_hold_what_one_file_holds(model: Path) -> None:
    names = sorted(p.name for p in model.parent.iterdir())
    assert names == [f"m-0000{i}-of-00003.safetensors" for i in (1, 2, 3)] + [INDEX]
    one = cx.save_model(model.parent.parent / "one", _tree(), RULES, extra={"seed": 0})
    for path in (model, model.with_name(INDEX), model.parent):
        back = cx.load_model(path)
        assert _same(_tree(), back.params) and back.extra == {"seed": 0}
        assert (back.sizes.packed, back.sizes.stored) == (one.packed, one.stored)
        cx.check(back, back.rules)
    assert back.sizes.file == sum(p.stat().st_size for p in model.parent.iterdir())
    placed = json.loads(model.with_name(INDEX).read_text())["weight_map"]
    held = safetensors.numpy.load_file(model.parent / placed["l0/kernel:values"])
    assert held["l0/kernel:values"].tolist() == _tree()["l0"]["kernel"][_tree()["l0"]["kernel"] != 0].tolist()


def test_saving_over_a_model_leaves_no_file_of_the_old_one(model: Path) -> None:
    cx.save_model(model, _tree(1), RULES, shard_bytes=2700)
    names = sorted(p.name for p in model.parent.iterdir())
    assert names == [*(f"m-0000{i}-of-00003.2.safetensors" for i in (1, 2, 3)), INDEX]
    assert _same(_tree(1), cx.load_model(model).params)
    cx.save_model(model, _tree(2), RULES)
    assert [p.name for p in model.parent.iterdir()] == ["m.safetensors"]
    assert _same(_tree(2), cx.load_model(model).params)
    cx.save_model(model, _tree(3), RULES, shard_bytes=2700)
    assert not model.exists() and _same(_tree(3), cx.load_model(model).params)


def _change(index: Path, change: Callable[[Any], None]) -> None:
    content = json.loads(index.read_text())
    change(content)
    index.write_text(json.dumps(content))


def _rename(to: str) -> Callable[[Path], None]:
    def harm(folder: Path) -> None:
        def change(content: Any) -> None:
            placed = content["weight_map"]
            old = "m-00001-of-00003.safetensors"
            content["weight_map"] = {k: to if v == old else v for k, v in placed.items()}

        _change(folder / INDEX, change)

    return harm


def _missing(folder: Path) -> None:
    (folder / "m-00002-of-00003.safetensors").unlink()


def _swapped(folder: Path) -> None:
    a, b = (folder / f"m-0000{i}-of-00003.safetensors" for i in (1, 2))
    a.rename(folder / "x")
    b.rename(a)
    (folder / "x").rename(b)


def _of_another(folder: Path) -> None:
    other = folder.parent / "other"
    other.mkdir()
    cx.save_model(other / "m.safetensors", _tree(1), RULES, shard_bytes=2700)
    shutil.copy(other / "m-00002-of-00003.safetensors", folder)


def _truncated(folder: Path) -> None:
    with open(folder / "m-00003-of-00003.safetensors", "r+b") as f:
        f.truncate(500)


def _linked(folder: Path) -> None:
    shard = folder / "m-00001-of-00003.safetensors"
    shard.rename(folder.parent / "elsewhere")
    shard.symlink_to(folder.parent / "elsewhere")


def _twice(folder: Path) -> None:
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text.replace('"weight_map": {', '"weight_map": {"l0/bias:values": "x", ', 1))


def _header(folder: Path) -> None:
    _change(folder / INDEX, lambda c: c["metadata"].update(compressx=c["metadata"]["compressx"].replace("300", "301")))


def _sums(folder: Path) -> None:
    _change(folder / INDEX, lambda c: c["metadata"].pop("shards"))


HARM: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing": (_missing, "m-00002-of-00003.safetensors: this shard is missing"),
    "swapped": (_swapped, "m-00001-of-00003.safetensors: holds other arrays than the index says"),
    "of another model": (_of_another, "m-00002-of-00003.safetensors: this shard is damaged or another's"),
    "truncated": (_truncated, "m-00003-of-00003.safetensors: file: is not a whole safetensors file"),
    "a link": (_linked, "m-00001-of-00003.safetensors: this shard is a link out of the folder"),
    "above": (_rename("../elsewhere"), "weight_map: '../elsewhere' is no name of a file in the folder"),
    "parent": (_rename(".."), "weight_map: '..' is no name"),
    "absolute": (_rename("/etc/passwd"), "weight_map: '/etc/passwd' is no name"),
    "the index": (_rename(INDEX), f"{INDEX}: file: its header should take"),
    "an array twice": (_twice, "index: is not valid JSON: a key occurs twice"),
    "another header": (_header, "sha256: the file is damaged"),
    "no checksums": (_sums, "shards: the index does not say the checksum of each shard"),
    "no map": (lambda folder: _change(folder / INDEX, lambda c: c.pop("weight_map")), "index: has no 'weight_map'"),
    "a number": (_rename(3), "weight_map: '3' is no name"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", HARM)
def test_a_harmed_index_or_shard_is_refused_by_name(case: str, model: Path) -> None:
    harm, message = HARM[case]
    harm(model.parent)
    for read in (cx.load_model, formats.open_model):
        with pytest.raises(CompressedFileError, match=message) as caught:
            read(model)
        assert str(caught.value).startswith(f"{model}: ")


def test_a_download_cache_of_links_is_read(model: Path) -> None:
    cache = model.parent.parent / "snapshot"
    cache.mkdir()
    for p in model.parent.iterdir():
        (cache / p.name).symlink_to(p)
    assert _same(_tree(), cx.load_model(cache).params)


def test_the_limit_counts_all_shards(model: Path) -> None:
    size = sum(p.stat().st_size for p in model.parent.iterdir())
    with pytest.raises(CompressedFileError, match=r"safetensors: file: takes \d+ bytes, more than max_bytes="):
        cx.load_model(model, size - 1)


def test_the_limit_grows_with_the_file_and_the_memory(tmp_path: Path) -> None:
    from compressx.formats.loading import limit

    path = tmp_path / "f"
    path.write_bytes(bytes(100))
    assert limit(path, None) == formats.MAX_BYTES == 1 << 32
    with open(path, "wb") as f:
        f.truncate(1 << 42)  # sparse: no disk is used
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert limit(path, None) == max(memory // 4, 1 << 32)


# --- leaves that stay on the disk


@pytest.mark.parametrize("coding", ["none", "zlib"])
def test_leaves_are_read_one_by_one(coding: str, tmp_path: Path) -> None:
    path = tmp_path / "m"
    rules = [("l[01]/kernel", cx.quantize(4)), *RULES]
    hard = cx.harden(_tree(), rules, fresh=True)
    sizes = cx.save_model(path, hard, rules, model={"name": "x"}, extra=[1], coding=coding)
    whole = cx.load_model(path)
    with formats.open_model(path) as model:
        assert model.sizes == sizes == whole.sizes and model.extra == [1] and model.model == {"name": "x"}
        assert list(model) == cx.tree.paths(whole.params) and len(model) == 8
        assert _same([model[p] for p in model], jax.tree.leaves(whole.params))
        assert all(model.packed(p).format == model.format(p) == whole.packed[p].format for p in model)
        assert all(model.nbytes(p) == formats.nbytes(whole.packed[p]) for p in model)
        assert [b.paths for b in model.bound] == [b.paths for b in whole.bound]
        assert _same(model.structures, whole.structures)
        assert [(r[0], r[1].spec, *r[2:]) for r in model.rules] == [(r[0], r[1].spec, *r[2:]) for r in whole.rules]
        with pytest.raises(KeyError):
            model["l9/kernel"]
        kept = model["l0/kernel"]
    assert kept.tobytes() == np.asarray(hard.params["l0"]["kernel"]).tobytes()


def test_a_leaf_that_takes_too_much_is_refused_when_it_is_read(tmp_path: Path) -> None:
    cx.save_model(tmp_path / "m", {"a": np.zeros(1000, np.float32), "b": np.ones(3, np.float32)})
    with pytest.raises(CompressedFileError, match=r"m: a: shape \[1000\] needs more than max_bytes=3000"):
        formats.open_model(tmp_path / "m", 3000)
    with formats.open_model(tmp_path / "m", 4000) as model:
        assert model["a"].shape == (1000,)


# --- writing


names = st.text(st.characters(codec="utf-8"), max_size=5)
arrays = st.dictionaries(names, st.sampled_from(["float32", "uint8", "bfloat16", "bool", "int64"]), max_size=6)


@given(kinds=arrays, text=st.text(st.characters(codec="ascii", exclude_characters="\x7f"), max_size=9))
@settings(max_examples=60)
def test_files_are_those_that_safetensors_writes(kinds: dict[str, str], text: str, tmp_path_factory: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "written"
    kinds.pop("__metadata__", None)
    held = {name: np.ones(2 + i, DTYPES[kind]) for i, (name, kind) in enumerate(kinds.items())}
    tensors.write(path, held, lambda _: {"k": text})
    assert path.read_bytes() == safetensors.numpy.save(held, {"k": text})
    back = tensors.TensorFile(path)
    assert back.metadata == {"k": text} and back.entries.keys() == held.keys()
    assert all(back.array(name).tobytes() == a.tobytes() for name, a in held.items())
    back.close()


@pytest.mark.parametrize("shard_bytes", [None, 2700])
def test_a_full_disk_leaves_the_old_model(
    shard_bytes: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.safetensors"
    cx.save_model(path, _tree(), RULES, shard_bytes=shard_bytes)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    written = 0

    def full(f: Any, array: np.ndarray) -> None:
        nonlocal written
        written += array.nbytes
        if written > 4000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), f.name)
        f.write(tensors.raw(array).data)

    monkeypatch.setattr(tensors, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        cx.save_model(path, _tree(1), RULES, shard_bytes=shard_bytes)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert _same(_tree(), cx.load_model(path).params)


_SAVES = """
import sys, numpy as np
from compressx.formats import save_model, tensors
write, size = tensors.write_array, 0
def slowly(f, array):
    import time
    write(f, array)
    f.flush()
    print("written", flush=True)
    time.sleep(60)
tensors.write_array = slowly
save_model(sys.argv[1], {"w": np.arange(1 << 16, dtype=np.float32)}, shard_bytes=eval(sys.argv[2]))
"""


@pytest.mark.parametrize("shard_bytes", [None, 1000])
def test_a_kill_while_saving_leaves_the_old_model(shard_bytes: int | None, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    cx.save_model(path, _tree(), RULES, shard_bytes=shard_bytes)
    command = [sys.executable, "-c", _SAVES, str(path), str(shard_bytes)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "written\n"
        process.kill()
    assert _same(_tree(), cx.load_model(path).params)
    cx.save_model(path, _tree(1), RULES)
    assert _same(_tree(1), cx.load_model(path).params)


def test_large_leaves_wait_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file, "_IN_MEMORY", 1000)
    kept = []
    real = tensors.Spool.keep

    def keep(spool: tensors.Spool, array: np.ndarray) -> np.ndarray:
        spool._least = 100
        kept.append(real(spool, array))
        return kept[-1]

    monkeypatch.setattr(tensors.Spool, "keep", keep)
    steps: list[tuple[int, int]] = []
    cx.save_model(tmp_path / "m", _tree(), RULES, progress=lambda done, total: steps.append((done, total)))
    assert any(isinstance(a, np.memmap) for a in kept) and [p.name for p in tmp_path.iterdir()] == ["m"]
    assert _same(_tree(), cx.load_model(tmp_path / "m").params)
    total = 4 * (64 * 32 + 32)
    assert len(steps) == 8 and steps[-1] == (total, total) and sorted(steps) == steps


def test_names_of_shards_are_free(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    assert shards._names(path, 2) == ["m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors"]
    (tmp_path / "m-00002-of-00002.safetensors").touch()
    assert shards._names(path, 2)[0] == "m-00001-of-00002.2.safetensors"
