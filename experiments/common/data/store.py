"""A cache of decoded arrays as tfds data sets in array_record files, read without TensorFlow.

A record is a block of examples, about a megabyte: read one example at a time, the 60,000 of MNIST take 2.6 s,
read in blocks 0.1 to 0.3 s. A folder is named by a checksum of the source files, so a changed file never meets an
old cache; it is made under another name, read back, and renamed, so that it is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from compressx.cache import UNFINISHED
from experiments.common.data.dataset import Arrays
from experiments.common.data.source import Blob, DataFileError, Source, cache_dir

_FORMAT = 1  # raised when the layout of the cache changes
_BLOCK_BYTES = 1 << 20


class Blocks(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """tfds builder of one split of named arrays with a common leading axis, stored in blocks of rows."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, arrays: Arrays, split: str, **options: Any):
        self._arrays = arrays
        self._split = split
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        # `Tensor` because tfds' `Image` and `Audio` import TensorFlow for arrays; bytes because its default
        # writes every number as a varint of its own.
        features = {
            name: tfds.features.Tensor(shape=(None, *array.shape[1:]), dtype=array.dtype, encoding="bytes")
            for name, array in self._arrays.items()
        }
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {self._split: self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[int, Arrays]]:
        rows = len(next(iter(self._arrays.values())))
        row_bytes = sum(array.nbytes for array in self._arrays.values()) // max(rows, 1)
        step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
        for start in range(0, rows, step):
            yield start, {name: array[start : start + step] for name, array in self._arrays.items()}


def cache_key(source: Source, split: str, blobs: Sequence[Blob]) -> str:
    """Returns a name for what `source.read` makes of these bytes."""
    digests = [hashlib.sha256(blob.data).hexdigest() for blob in blobs]
    facts = json.dumps([_FORMAT, source.info.name, source.version, split, digests])
    return hashlib.sha256(facts.encode()).hexdigest()[:24]


def cached(source: Source, split: str, blobs: Sequence[Blob], read: Callable[[], Arrays]) -> Arrays:
    """Returns `read()`, from the cache where it is there; otherwise it is put there.

    Safe with several processes at the same time: each makes its own, the first to finish is kept, and all are equal.

    Raises:
      DataFileError: the cache cannot be written or is damaged; the message names the folder.
    """
    folder = cache_dir() / source.info.name / f"{split}-{cache_key(source, split, blobs)}"
    if folder.is_dir():
        return _read(folder, split)
    arrays = read()
    try:
        return _prepare(arrays, split, folder)
    except OSError as error:
        raise DataFileError(
            f"{folder}: cannot write the cache ({error.strerror or error}); "
            "make room or set $COMPRESSX_CACHE to another folder"
        ) from error


def _prepare(arrays: Arrays, split: str, folder: Path) -> Arrays:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _sweep(folder.parent)
    unfinished = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder.parent))
    try:
        # tfds announces each step on the terminal; this is no step that a user asked for.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            builder = Blocks(arrays, split, data_dir=os.fspath(unfinished))
            builder.download_and_prepare()
        made = Path(builder.data_path)
        stored = _read(made, split)  # a full disk does not always raise while writing
        for name, array in arrays.items():
            if stored[name].tobytes() != array.tobytes():  # bits, so that NaN equals itself
                raise OSError(errno.EIO, f"{name} was not stored as it is")
        try:
            made.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same bytes
                raise
        return stored
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _read(folder: Path, split: str) -> Arrays:
    try:
        records = tfds.builder_from_directory(os.fspath(folder)).as_data_source(split)
        blocks = records.__getitems__(range(len(records)))
        return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    except Exception as error:  # array_record and tfds raise many kinds for a damaged file
        raise DataFileError(
            f"{folder}: the cache is damaged ({type(error).__name__}: {error}); delete this folder, it is made again"
        ) from error


def _sweep(parent: Path) -> None:
    """Removes what killed processes left behind more than a day ago."""
    for path in parent.glob(f"{UNFINISHED}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > 86400:
                shutil.rmtree(path, ignore_errors=True)
