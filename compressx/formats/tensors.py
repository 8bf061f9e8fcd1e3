"""Safetensors files, array by array: read from the file or through a memory map, written straight to the disk.

`TensorFile` checks the whole header before it reads an array: they lie one after the other, without gaps, and end
where the file ends. `write` puts arrays behind each other as it is given them, beside the old file, which is replaced
in one step when all of it is on the disk.
"""

import contextlib
import io
import math
import mmap
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import safetensors.numpy

from compressx.formats.base import DTYPES, fail
from compressx.formats.strict_json import MAX_HEADER, from_json, to_json

MAX_ARRAYS = 1 << 16
MAX_NAME = 2048  # characters of an array's name
MAX_AXES = 16
_WRITTEN = 1 << 24  # bytes that are written together
NAMES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "BOOL": "bool",
    **{f"{s}{b}": f"{name}{b}" for s, name in (("I", "int"), ("U", "uint")) for b in (8, 16, 32, 64)},
}


class Entry(NamedTuple):
    """Where an array lies in a file, in bytes from its start."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """A safetensors file that is open: its metadata, and its arrays one by one.

    Attributes:
      size: bytes of the file.
      metadata: the `__metadata__` of its header, or nothing.
      entries: name -> where the array lies.
    """

    def __init__(self, path: Path, mapped: bool = False, max_bytes: int | None = None) -> None:
        """Reads the header.

        Args:
          path: the file.
          mapped: arrays are views of a memory map, and take no memory of their own. Nobody may change the file in place
            meanwhile; replacing it, as `save_model` does, is fine.
          max_bytes: the file may not be larger; None: it may, as nothing of that size is made.

        Raises:
          CompressedFileError: no whole safetensors file.
          OSError: it cannot be opened or read.
        """
        self._map: mmap.mmap | None = None
        self._file = opened(path, max_bytes)
        try:
            self.size = os.fstat(self._file.fileno()).st_size
            self.metadata, self.entries = self._header()
            if mapped and self.size:
                self._map = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except BaseException:
            self._file.close()
            raise

    def _header(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        if self.size < 8:
            fail("file", f"{self.size} bytes are too few for a safetensors file")
        length, behind = int.from_bytes(self._file.read(8), "little"), self.size - 8
        if length > behind:
            fail(
                "file",
                f"its header should take {length} bytes and {behind} follow: truncated, or no safetensors file",
            )
        if length > MAX_HEADER:
            fail("file", f"its header takes {length} bytes, more than {MAX_HEADER}")
        try:
            text = self._file.read(length).decode()
        except UnicodeDecodeError:
            fail("file", "its header is not text: damaged, or no safetensors file")
        return read_header(text, 8 + length, self.size)

    def array(self, name: str) -> np.ndarray:
        """The array of that name: read from the file, or a view of the memory map."""
        dtype, shape, start, stop = self.entries[name]
        if self._map is not None:
            flat = np.frombuffer(self._map, np.uint8, stop - start, start) if stop > start else np.zeros(0, np.uint8)
        else:
            flat = np.empty(stop - start, np.uint8)
            self._file.seek(start)
            if stop > start and self._file.readinto(flat.data) != stop - start:
                fail(name, "the file has become shorter while it was read")
        return viewed(name, flat, dtype, shape)

    def close(self) -> None:
        """Closes the file; a memory map stays as long as any of its arrays is used."""
        self._file.close()
        self._map = None


def opened(path: Path, max_bytes: int | None = None) -> io.BufferedReader:
    """A regular file, opened for reading, that is no larger than `max_bytes`."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe that nobody writes to would wait for ever
        fail("file", "is not a regular file")
    file = open(path, "rb")
    size = os.fstat(file.fileno()).st_size
    if max_bytes is not None and size > max_bytes:
        file.close()
        fail("file", f"takes {size} bytes, more than max_bytes={max_bytes}")
    return file


def read_header(text: str, start: int, size: int) -> tuple[dict[str, Any], dict[str, Entry]]:
    """Metadata and entries of a header's JSON, where the arrays begin at `start` of a file of `size` bytes."""
    parsed = from_json(text, "file")
    if not isinstance(parsed, dict):
        return {}, {}
    metadata = parsed.pop("__metadata__", {})
    if len(parsed) > MAX_ARRAYS or max(map(len, parsed), default=0) > MAX_NAME:
        fail("file", f"more than {MAX_ARRAYS} arrays, or one whose name has more than {MAX_NAME} characters")
    entries = {}
    for name, about in parsed.items():
        if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
            fail(name, "its entry in the header is no dtype, shape and data_offsets")
        if about["dtype"] not in tuple(NAMES):
            fail(name, f"dtype {str(about['dtype'])[:40]} is never written")
        dtype = DTYPES[NAMES[about["dtype"]]]
        shape = check_shape(name, about["shape"], dtype.itemsize, max(size, 1 << 30))
        at = about["data_offsets"]
        if not isinstance(at, list) or len(at) != 2 or not all(type(n) is int and n >= 0 for n in at):
            fail(name, f"data_offsets {str(at)[:80]} are not two positions")
        if at[1] - at[0] != dtype.itemsize * math.prod(shape):
            fail(name, f"data_offsets {str(at)[:80]} do not fit {dtype} {list(shape)}")
        entries[name] = Entry(dtype, shape, start + at[0], start + at[1])
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            fail(name, f"begins at byte {entry.start} of the file, where {end} is next: not a whole safetensors file")
        end = entry.stop
    if end != size:
        fail("file", f"is not a whole safetensors file: its arrays end at byte {end} of {size}")
    return metadata if isinstance(metadata, dict) else {}, entries


def viewed(name: str, raw: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Bytes as an array; those of a bool are checked."""
    if dtype.kind == "b" and raw.max(initial=0) > 1:
        fail(name, "holds a byte that is no bool")
    return raw.view(dtype).reshape(shape)


def check_shape(entry: str, shape: Any, itemsize: int, max_bytes: int) -> tuple[int, ...]:
    """A shape from a file: a short list of sizes that, empty axes aside, takes at most `max_bytes`."""
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        fail(entry, f"shape {str(shape)[:80]} is not a list of sizes")
    if len(shape) > MAX_AXES:
        fail(entry, f"{len(shape)} axes, more than {MAX_AXES}")
    if math.prod(max(n, 1) for n in shape) * itemsize > max_bytes:
        fail(entry, f"shape {str(shape)[:80]} needs more than max_bytes={max_bytes} bytes")
    return tuple(shape)


def header_of(arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
    """The length and header of a safetensors file, and the arrays in the order in which they follow it.

    safetensors orders arrays by dtype and name: it is asked to, with arrays of no length. (It writes metadata in no
    order.)
    """
    empty = safetensors.numpy.save({name: np.zeros(0, a.dtype) for name, a in arrays.items()})
    listed = from_json(bytes(empty[8:]).decode(), "file") if arrays else {}
    order, at = list(listed), 0
    for name in order:
        a = arrays[name]
        listed[name] = {"dtype": listed[name]["dtype"], "shape": list(a.shape), "data_offsets": [at, at + a.nbytes]}
        at += a.nbytes
    entries = "".join(f",{_quoted(name)}:{_entry(about)}" for name, about in listed.items())
    header = f'{{"__metadata__":{to_json(metadata)}{entries}}}'.encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, order


def _quoted(name: str) -> str:
    """A name as safetensors quotes it."""
    return to_json(name, ascii=False)


def _entry(about: Mapping[str, Any]) -> str:
    shape, at = (",".join(map(str, about[key])) for key in ("shape", "data_offsets"))
    return f'{{"dtype":"{about["dtype"]}","shape":[{shape}],"data_offsets":[{at}]}}'


def write(path: Path, arrays: Mapping[str, np.ndarray], metadata: Callable[[bool], Mapping[str, str]]) -> int:
    """Writes a safetensors file in one step, array by array; what was there before survives any failure.

    Args:
      path: the file.
      arrays: by name.
      metadata: called with False before the arrays are written and with True after them, so that a checksum can be
        found meanwhile; what it returns takes the same bytes both times.

    Returns:
      Bytes of the file.
    """
    head, order = header_of(arrays, metadata(False))
    from_json(head[8:].decode(), "file")  # what a reader would refuse is not written
    with replaced(path) as f:
        f.write(head)
        for name in order:
            write_array(f, arrays[name])
        size = f.tell()
        f.seek(0)
        f.write(header_of(arrays, metadata(True))[0])
    return size


def raw(array: np.ndarray) -> np.ndarray:
    """The bytes of an array without gaps, uint8."""
    return array.reshape(-1).view(np.uint8)


def write_array(file: IO[bytes], array: np.ndarray) -> None:
    """Appends the bytes of an array, a few MiB at a time."""
    data = raw(array)
    for start in range(0, data.size, _WRITTEN):
        file.write(data[start : start + _WRITTEN].data)


@contextlib.contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` in one step: a reader sees the old file or the whole new one.

    Where writing fails (the disk is full, the program is interrupted) nothing is left of the new file.
    """
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a power cut."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Spool:
    """A nameless file beside the one that is written, for packed arrays that would not fit into memory together.

    It has no name, so nothing is left of it however the program ends.
    """

    def __init__(self, folder: Path, least: int = 1 << 20) -> None:
        """`least`: bytes from which an array is moved to the file."""
        self._folder, self._least = folder, least
        self._file: IO[bytes] | None = None

    def keep(self, array: np.ndarray) -> np.ndarray:
        """The array, on the disk if it is large: a read-only view of the file."""
        if array.nbytes < self._least:
            return array
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)
        self._file.seek(0, os.SEEK_END)
        start = self._file.tell()
        write_array(self._file, np.ascontiguousarray(array))
        self._file.flush()
        return np.memmap(self._file, array.dtype, "r", start, array.shape)

    def close(self) -> None:
        """Closes the file; it is gone when the last of its arrays is."""
        if self._file is not None:
            self._file.close()
