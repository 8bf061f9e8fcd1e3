"""Readers of file formats that treat every byte as hostile: bounded, checked, and executing nothing."""

from __future__ import annotations

import contextlib
import gzip
import io
import lzma
import math
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping

import numpy as np

from experiments.common.data.dataset import Array, Arrays
from experiments.common.data.source import Blob, DataFileError

_XZ_MEMORY = 1 << 28  # an xz header may ask for gigabytes of dictionary
_DECODER_ERRORS = (
    *(zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError, struct.error),
    *(EOFError, OSError, RuntimeError, ValueError, OverflowError, KeyError),
)


@contextlib.contextmanager
def _sound(blob: Blob, kind: str) -> Iterator[None]:
    """Turns whatever a decoder raises for bad bytes into one `DataFileError` that names the file."""
    try:
        yield
    except DataFileError:
        raise
    except _DECODER_ERRORS as error:
        reason = str(error) or type(error).__name__
        raise DataFileError(f"{blob.path}: not a sound {kind} file ({reason}); fetch it again") from error


def gunzip(blob: Blob, limit: int) -> bytes:
    """Returns the decompressed bytes, at most `limit` of them."""
    with _sound(blob, "gzip"), gzip.GzipFile(fileobj=io.BytesIO(blob.data)) as stream:
        data = stream.read(limit + 1)
    if len(data) > limit:
        raise DataFileError(f"{blob.path}: unpacks to more than the {limit} bytes expected")
    return data


def unxz(blob: Blob, size: int) -> bytes:
    """Returns the decompressed bytes of a single xz stream, which must be exactly `size`."""
    stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
    with _sound(blob, "xz"):
        data = stream.decompress(blob.data, size + 1)
    if len(data) > size or stream.unused_data:
        raise DataFileError(f"{blob.path}: holds more than the {size} bytes expected")
    if not stream.eof:
        raise DataFileError(f"{blob.path}: the xz file is truncated; fetch it again")
    if len(data) < size:
        raise DataFileError(f"{blob.path}: unpacks to {len(data)} bytes, expected {size}")
    return data


def idx(blob: Blob, shape: tuple[int, ...]) -> Array:
    """Reads a gzipped idx file of uint8 (the MNIST format), whose header must state exactly `shape`."""
    header = 4 + 4 * len(shape)
    size = math.prod(shape)
    data = gunzip(blob, header + size)
    magic = bytes([0, 0, 8, len(shape)])
    if data[:4] != magic:
        raise DataFileError(f"{blob.path}: begins with {data[:4].hex()}, not with the idx magic {magic.hex()}")
    if len(data) < header:
        raise DataFileError(f"{blob.path}: ends inside its header")
    stated = tuple(int(n) for n in np.frombuffer(data, ">u4", len(shape), 4))
    if stated != shape:
        raise DataFileError(f"{blob.path}: states the shape {list(stated)}, expected {list(shape)}")
    if len(data) != header + size:
        raise DataFileError(f"{blob.path}: holds {len(data) - header} values, its header states {size}")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


def delta_images(blob: Blob, shape: tuple[int, int, int, int]) -> Array:
    """Reads xz-packed uint8 images `[n, c, h, w]` stored as differences to the left neighbour modulo 256.

    Returns:
      uint8 `[n, h, w, c]`.
    """
    deltas = np.frombuffer(unxz(blob, math.prod(shape)), np.uint8).reshape(shape)
    return np.ascontiguousarray(np.cumsum(deltas, axis=-1, dtype=np.uint8).transpose(0, 2, 3, 1))


def raw_labels(blob: Blob, count: int) -> Array:
    """Reads `count` labels of one byte each."""
    if len(blob.data) != count:
        raise DataFileError(f"{blob.path}: holds {len(blob.data)} labels, expected {count}")
    return np.frombuffer(blob.data, np.uint8)


def class_labels(blob: Blob, values: Array, classes: int) -> Array:
    """Returns labels as int32 after checking that each is below `classes`."""
    if values.size and int(values.max()) >= classes:
        where = int(np.argmax(values >= classes))
        raise DataFileError(f"{blob.path}: label {int(values[where])} at row {where}, expected 0 to {classes - 1}")
    return values.astype(np.int32)


def npz(blob: Blob, limit: int) -> Arrays:
    """Reads a NumPy .npz archive of plain arrays; an entry of Python objects (a pickle) is refused.

    Args:
      blob: the file.
      limit: bytes that all entries may have together when unpacked.

    Returns:
      The arrays by name.

    Raises:
      DataFileError: damaged, too large, or not plain arrays; the message names file and entry.
    """
    arrays: Arrays = {}
    with _sound(blob, ".npz"), zipfile.ZipFile(io.BytesIO(blob.data)) as archive:
        members = archive.infolist()
        if sum(member.file_size for member in members) > limit:
            raise DataFileError(f"{blob.path}: unpacks to more than the {limit} bytes expected")
        for member in members:
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise DataFileError(f"{blob.path}: entry {name!r} occurs twice")
            arrays[name] = _npy(archive.read(member), f"{blob.path}: entry {name!r}")
    return arrays


def tar_gz(blob: Blob, sizes: Mapping[str, int], limit: int) -> dict[str, bytes]:
    """Returns the named members of a .tar.gz, each of exactly the given size; nothing is written to disk.

    Args:
      blob: the file.
      sizes: member name to its size in bytes.
      limit: bytes that the whole archive may have when unpacked.
    """
    data = io.BytesIO(gunzip(blob, limit))
    found = {}
    with _sound(blob, "tar"), tarfile.open(fileobj=data, mode="r:") as archive:
        for member in archive:
            if member.name in sizes and member.isreg():
                handle = archive.extractfile(member) if member.size == sizes[member.name] else None
                found[member.name] = handle.read() if handle else b""
    for name, size in sizes.items():
        if len(found.get(name, b"")) != size:
            raise DataFileError(f"{blob.path}: lacks {name} ({size} bytes)")
    return found


def _npy(data: bytes, where: str) -> Array:
    # NumPy's own reader allocates what the header asks for before it looks at how much is there.
    try:
        stream = io.BytesIO(data)
        version = np.lib.format.read_magic(stream)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(stream)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as error:
        raise DataFileError(f"{where} is not a NumPy array ({error})") from error
    if dtype.kind not in "biufcSU" or dtype.itemsize == 0:
        raise DataFileError(f"{where} holds {dtype}, not plain numbers or strings; Python objects are never loaded")
    body = data[stream.tell() :]
    if any(n < 0 for n in shape) or math.prod(shape) * dtype.itemsize != len(body):
        raise DataFileError(f"{where} holds {len(body)} bytes, its header states {list(shape)} of {dtype}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
