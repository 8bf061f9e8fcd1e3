"""Models in several files: shards, and an index in JSON that says which array is in which, as Hugging Face has it.

    model-00001-of-00002.safetensors, ...    the arrays
    model.safetensors.index.json             {"metadata": {...}, "weight_map": {array: shard}}

A sharded model that `save_model` wrote keeps its header in the index's metadata ("compressx"), a checksum of every
shard ("shards") and one over the header and these ("sha256"). The index is written last and in one step, over shards
whose names are new in the folder: until then the folder holds the model that was there before.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from compressx.formats import tensors
from compressx.formats.base import CompressedFileError, fail
from compressx.formats.strict_json import MAX_HEADER, from_json, to_json
from compressx.formats.tensors import Entry, TensorFile, opened, replaced, sync_folder

INDEX = ".index.json"
MAX_SHARDS = 4096


class ShardedFile:
    """An index and its shards, read as one file.

    Attributes:
      size: bytes of the index and of all shards.
      metadata: of the index.
      entries: name -> where the array lies in its shard.
      shards: file name -> the shard.
    """

    def __init__(self, index: Path, mapped: bool = False, max_bytes: int | None = None) -> None:
        """Reads the index and the headers of all shards; see `TensorFile`.

        Raises:
          CompressedFileError: a shard is missing, holds other arrays than the index says, or lies outside its folder.
          OSError: a file cannot be opened or read.
        """
        self.metadata, placed = read_index(index)
        self.shards: dict[str, TensorFile] = {}
        self.entries: dict[str, Entry] = {}
        self._of = placed
        self.size = index.stat().st_size
        names: dict[str, set[str]] = {}
        for array, shard in placed.items():
            names.setdefault(shard, set()).add(array)
        if len(names) > MAX_SHARDS:
            fail("weight_map", f"{len(names)} shards, more than {MAX_SHARDS}")
        try:
            for shard in sorted(names):
                left = None if max_bytes is None else max(max_bytes - self.size, 0)
                self.shards[shard] = file = _shard(index, shard, mapped, left)
                self.size += file.size
                if file.entries.keys() != names[shard]:
                    odd = sorted(file.entries.keys() ^ names[shard])[0]
                    fail(shard, f"holds other arrays than the index says, such as {odd[:80]!r}: swapped, or another's")
                self.entries |= file.entries
        except BaseException:
            self.close()
            raise

    def array(self, name: str) -> np.ndarray:
        """The array of that name, as `TensorFile.array` gives it."""
        return self.shards[self._of[name]].array(name)

    def close(self) -> None:
        """Closes all shards."""
        for file in self.shards.values():
            file.close()


def _shard(index: Path, shard: str, mapped: bool, max_bytes: int | None) -> TensorFile:
    """A shard that lies beside its index; through links only where the index itself is one (a download cache)."""
    path = index.parent / shard
    if not path.exists():
        fail(shard, "this shard is missing")
    if path.resolve().parent not in (index.parent.resolve(), index.resolve().parent):
        fail(shard, "this shard is a link out of the folder of its index")
    try:
        return TensorFile(path, mapped, max_bytes)
    except CompressedFileError as error:
        fail(shard, str(error))


def read_index(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The metadata and the map from arrays to shards of an index.

    Raises:
      CompressedFileError: it is none, or names a file that is not beside it.
      OSError: it cannot be opened or read.
    """
    with opened(path, MAX_HEADER) as f:
        data = f.read()
    try:
        parsed = from_json(data.decode(), "index")
    except UnicodeDecodeError:
        fail("index", "is not text")
    metadata, placed = (parsed.get(key) if isinstance(parsed, dict) else None for key in ("metadata", "weight_map"))
    if not isinstance(placed, dict) or not placed or len(placed) > tensors.MAX_ARRAYS:
        fail("index", f"has no 'weight_map' of 1 to {tensors.MAX_ARRAYS} arrays")
    for shard in placed.values():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]{1,200}", shard) or shard.startswith("."):
            fail("weight_map", f"{str(shard)[:80]!r} is no name of a file in the folder of the index")
    return metadata if isinstance(metadata, dict) else {}, placed


def find(path: Path) -> tuple[Path, bool]:
    """The file that holds a model, and whether that is an index: a path itself, its index, or what a folder holds."""
    if path.is_dir():
        held = sorted(p for p in path.iterdir() if p.name.endswith((INDEX, ".safetensors")))
        found = [p for p in held if p.name.endswith(".safetensors" + INDEX)] or held
        if len(found) != 1:
            fail("file", f"is a folder with {len(found)} models in it, not a regular file")
        path = found[0]
    elif not path.exists() and (index := path.with_name(path.name + INDEX)).exists():
        path = index
    return path, path.name.endswith(INDEX)


def open_tensors(path: Path, mapped: bool = False, max_bytes: int | None = None) -> TensorFile | ShardedFile:
    """The safetensors file, or the sharded ones, that a path names."""
    found, sharded = find(path)
    return ShardedFile(found, mapped, max_bytes) if sharded else TensorFile(found, mapped, max_bytes)


def digest_of_shards(header: str, shards: Mapping[str, str]) -> str:
    """The checksum over a header and the checksums of all shards."""
    return hashlib.sha256((header + to_json(dict(shards))).encode("utf-8", "surrogatepass")).hexdigest()


def write_shards(
    path: Path, stored: Mapping[str, np.ndarray], header: str, shard_bytes: int, digest: Any
) -> tuple[Path, int]:
    """Writes shards of at most `shard_bytes` (more where one array has more), then the index; then removes old shards.

    Args:
      path: of the model, such as `model.safetensors`; the index and the shards are named after it.
      stored: the arrays.
      header: the text of the header.
      shard_bytes: bytes of arrays that a shard may have.
      digest: `digest(header, arrays)`, the checksum of a file.

    Returns:
      The index, and the bytes of it and all shards.
    """
    groups = _groups(stored, shard_bytes)
    index = path.with_name(path.name + INDEX)
    names = _names(path, len(groups))
    sums, size, written = {}, 0, []
    try:
        for name, group in zip(names, groups, strict=True):
            arrays = {key: stored[key] for key in group}
            size += tensors.write(path.with_name(name), arrays, lambda _: {"format": "compressx"})
            written.append(name)
            sums[name] = digest("", arrays)
        about = {"total_size": sum(a.nbytes for a in stored.values()), "compressx": header, "shards": sums}
        about["sha256"] = digest_of_shards(header, sums)
        placed = {key: name for name, group in zip(names, groups, strict=True) for key in group}
        text = json.dumps({"metadata": about, "weight_map": placed}, sort_keys=True, indent=1).encode()
        if len(text) > MAX_HEADER:
            raise ValueError(f"the index takes {len(text)} characters, more than a reader accepts ({MAX_HEADER})")
        before = listed(index)
        with replaced(index) as f:
            f.write(text)
    except BaseException:
        remove(path.parent, written)
        raise
    remove(path.parent, [*(name for name in before if name not in names), path.name])
    return index, size + len(text)


def listed(index: Path) -> list[str]:
    """The shards of an index that is there, or none."""
    try:
        return sorted(set(read_index(index)[1].values()))
    except (CompressedFileError, OSError):
        return []


def remove(folder: Path, names: list[str]) -> None:
    """Removes files of a folder that nothing refers to any more."""
    for name in names:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / name)
    if names:
        sync_folder(folder)


def _groups(stored: Mapping[str, np.ndarray], most: int) -> list[list[str]]:
    groups: list[list[str]] = []
    held = 0
    for name, a in stored.items():
        if not groups or held + a.nbytes > most:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += a.nbytes
    return groups


def _names(path: Path, number: int) -> list[str]:
    """Names of shards that no file of the folder has yet."""
    if number > MAX_SHARDS:
        raise ValueError(f"{number} shards, more than {MAX_SHARDS}; make them larger")
    stem = path.name.removesuffix(".safetensors")
    for tag in itertools.chain([""], (f".{i}" for i in itertools.count(2))):
        names = [f"{stem}-{i + 1:05}-of-{number:05}{tag}.safetensors" for i in range(number)]
        if not any(path.with_name(name).exists() for name in names):
            return names
    raise AssertionError  # there is always a free number
