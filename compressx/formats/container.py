"""The file that holds a saved model: one safetensors file, a JSON header in its metadata, a checksum over both.

    metadata  {"compressx": header, "sha256": hex digest of the header's text and of every array}
    header    {"version": 2, "arrays": {name: {"dtype", "shape", "coding"}}, "content": {...}}

An array is stored as it is (coding "none"), or as the bytes of its entropy-coded form ("zlib", "lzma"), whichever is
smaller. Any safetensors reader can open the file. The same content and arrays give the same bytes: keys are sorted, and
nothing of the day or the process is written. Reading believes nothing: sizes are checked against the file's length and
`max_bytes` before anything of that size is made, coded arrays are unfolded no further than the header says, and every
fault is a `CompressedFileError`. A checksum finds damage, not forgery: whoever reads the content checks it.
"""

import hashlib
import lzma
import math
import os
import zlib
from collections.abc import Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from compressx.formats import shards, tensors
from compressx.formats.base import DTYPES, CompressedFileError, fail
from compressx.formats.shards import ShardedFile
from compressx.formats.strict_json import MAX_HEADER, from_json, to_json
from compressx.formats.tensors import MAX_ARRAYS, MAX_NAME, TensorFile, check_shape, raw, replaced, viewed

VERSION = 2
READ = (1, 2)  # what is read; 1 is what 0.1 wrote
CODINGS = ("none", "zlib", "lzma")
_LZMA_MEMORY = 1 << 25  # what `_encode` writes takes 9 MiB to read
_PIECE = 1 << 16  # bytes of a coded array that are unfolded together


def write(
    path: Path,
    content: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray],
    coding: str = "none",
    shard_bytes: int | None = None,
) -> tuple[int, int]:
    """Writes the file in one step: a reader sees the old file or the whole new one, also when the disk fills up.

    Args:
      path: the file; its folder must exist.
      content: JSON-able, what the arrays mean.
      arrays: by name.
      coding: "none", "zlib" or "lzma", tried on each array and used where it saves bytes.
      shard_bytes: None for one file, or the bytes of arrays that each of several may have (see `shards`).

    Returns:
      Bytes of all arrays as stored, after coding, and of the file or files.

    Raises:
      ValueError: no such coding, content without a JSON form, or a header that no reader would take.
      OSError: the file cannot be written; what was there before is untouched.
    """
    if coding not in CODINGS:
        raise ValueError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}")
    if len(arrays) > MAX_ARRAYS or max(map(len, arrays), default=0) > MAX_NAME:
        raise ValueError(f"more than {MAX_ARRAYS} arrays, or one whose name has more than {MAX_NAME} characters")
    described, stored = encoded(arrays, coding)
    header = header_text(content, described)
    total = sum(a.nbytes for a in stored.values())
    if shard_bytes is not None and total > shard_bytes:
        return total, shards.write_shards(path, stored, header, shard_bytes, _digest)[1]
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(_digest, header, stored)  # hashed while it is written
        size = tensors.write(
            path, stored, lambda done: {"compressx": header, "sha256": found.result() if done else "0" * 64}
        )
    index = path.with_name(path.name + shards.INDEX)
    if index.exists():  # the model that was there before was sharded; readers take the whole file from now on
        shards.remove(path.parent, [index.name, *shards.listed(index)])
    return total, size


def encoded(arrays: Mapping[str, np.ndarray], coding: str) -> tuple[dict[str, dict[str, Any]], dict[str, np.ndarray]]:
    """What a header says of arrays, and the arrays as they are stored; entropy coding runs on every core."""
    described, stored = {}, {}

    def one(array: np.ndarray) -> tuple[str, np.ndarray]:
        plain = np.ascontiguousarray(array).reshape(array.shape)
        used, data = _encode(plain, coding)
        return used, plain if used == "none" else np.frombuffer(data, np.uint8)

    with ThreadPoolExecutor(1 if coding == "none" else os.cpu_count() or 1) as pool:
        for (name, array), (used, kept) in zip(arrays.items(), pool.map(one, arrays.values()), strict=True):
            described[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "coding": used}
            stored[name] = kept
    return described, stored


def header_text(content: Mapping[str, Any], described: Mapping[str, Any]) -> str:
    """The JSON of a header.

    Raises:
      ValueError: it has no JSON form, or is longer than a reader accepts.
    """
    header = to_json({"version": VERSION, "arrays": described, "content": content})
    if len(header) > MAX_HEADER // 2:  # it is quoted once more inside the safetensors header
        raise ValueError(f"the header takes {len(header)} characters, more than a reader accepts ({MAX_HEADER // 2})")
    from_json(header, "header")
    return header


def read(path: Path, max_bytes: int) -> tuple[int, dict[str, Any], dict[str, np.ndarray], tuple[int, int]]:
    """The version, content and arrays of a file, and its bytes (arrays as stored, whole file); inverse of `write`.

    Args:
      path: the file.
      max_bytes: the file, and its arrays together when unfolded, may not be larger.

    Raises:
      CompressedFileError: the file is damaged, truncated, foreign, too large or inconsistent.
      OSError: the file cannot be opened or read.
    """
    file = shards.open_tensors(path, max_bytes=max_bytes)
    try:
        header, stored = checked(file)
    finally:
        file.close()
    version, content, described = parsed_header(header, stored.keys())
    held = sum(a.nbytes for a in stored.values())
    return version, content, _decode_all(described, stored, max_bytes), (held, file.size)


def checked(file: TensorFile | ShardedFile) -> tuple[str, dict[str, np.ndarray]]:
    """The text of the header and the arrays as they are stored, after the checksums were compared."""
    header, checksum = file.metadata.get("compressx"), file.metadata.get("sha256")
    if not isinstance(header, str) or not isinstance(checksum, str):
        fail("header", "a safetensors file that compressx did not write (no 'compressx' and 'sha256' in its metadata)")
    stored: dict[str, np.ndarray] = {}
    if isinstance(file, ShardedFile):
        sums = file.metadata.get("shards")
        if not isinstance(sums, dict) or sums.keys() != file.shards.keys():
            fail("shards", "the index does not say the checksum of each shard")
        for name, shard in file.shards.items():
            found, held = _hashed("", shard)
            if found != sums[name]:
                fail(name, f"this shard is damaged or another's: its checksum is {found[:16]}...")
            stored |= held
        found = shards.digest_of_shards(header, sums)
    else:
        found, stored = _hashed(header, file)
    if found != checksum:
        fail("sha256", f"the file is damaged: its checksum is {found[:16]}..., the header says {checksum[:16]!r}")
    return header, stored


def _hashed(header: str, file: TensorFile) -> tuple[str, dict[str, np.ndarray]]:
    """The checksum of a file's arrays under a header, and the arrays."""
    digest, stored = hashlib.sha256(header.encode("utf-8", "surrogatepass")), {}
    with ThreadPoolExecutor(1) as pool:  # an array is hashed while the next one is read
        for name in sorted(file.entries):
            stored[name] = file.array(name)
            pool.submit(_hash, digest, name, stored[name])
    return digest.hexdigest(), stored


def parsed_header(header: str, names: Set[str]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The version, the content and the descriptions of arrays in a header's text, for arrays of these names."""
    parsed = from_json(header, "header")
    if not isinstance(parsed, dict):
        fail("header", "is not a JSON object")
    version = parsed.get("version")
    if type(version) is not int or version not in READ:  # 1.0 and true are equal to 1
        known = " and ".join(map(str, READ))
        fail("header/version", f"{repr(version)[:80]} cannot be read by this release, which reads {known}")
    content, described = parsed.get("content"), parsed.get("arrays")
    if not isinstance(content, dict) or not isinstance(described, dict):
        fail("header", "'content' and 'arrays' must be JSON objects")
    if described.keys() != names:
        odd = sorted(described.keys() ^ names)[0]
        fail(odd, "is not in both the header and the file")
    return version, content, described


def _encode(array: np.ndarray, coding: str) -> tuple[str, bytes]:
    if coding == "none" or not array.nbytes:
        return "none", b""
    raw = array.tobytes()
    data = zlib.compress(raw, 9) if coding == "zlib" else lzma.compress(raw, lzma.FORMAT_XZ)
    return (coding, data) if len(data) < len(raw) else ("none", b"")


def _decode(name: str, data: np.ndarray, coding: str, size: int) -> np.ndarray:
    """Unfolds a coded array piece by piece, at most one byte further than the header says: uint8 `[size]`."""
    out, done, ended = np.empty(size, np.uint8), 0, False
    try:
        expand = zlib.decompressobj() if coding == "zlib" else lzma.LZMADecompressor(lzma.FORMAT_XZ, _LZMA_MEMORY)
        for start in range(0, data.size, _PIECE):
            rest = data[start : start + _PIECE].tobytes()
            while not ended and done <= size:
                raw = expand.decompress(rest, min(_PIECE, size - done + 1))
                rest = getattr(expand, "unconsumed_tail", b"")  # lzma keeps what it has not read yet
                ended = expand.eof
                if done + len(raw) > size:
                    fail(name, f"its {coding} data does not unfold to the {size} bytes that the header says")
                out[done : done + len(raw)] = np.frombuffer(raw, np.uint8)
                done += len(raw)
                if not raw and not rest:
                    break
            if ended and (expand.unused_data or start + _PIECE < data.size):
                fail(name, f"its {coding} data goes on behind its end")
    except (zlib.error, lzma.LZMAError, EOFError) as error:
        fail(name, f"its {coding} data is damaged: {error}")
    if done != size or not ended:
        fail(name, f"its {coding} data does not unfold to the {size} bytes that the header says")
    return out


def described_as(name: str, about: Any, most: int) -> tuple[np.dtype[Any], tuple[int, ...], str]:
    """The dtype, the shape and the coding that a header says an array has, which may take so many bytes at most."""
    if not isinstance(about, dict) or str(about.get("dtype")) not in DTYPES or about.get("coding") not in CODINGS:
        fail(name, f"its description is not understood: {str(about)[:120]}")
    dtype = DTYPES[str(about["dtype"])]
    return dtype, check_shape(name, about.get("shape"), dtype.itemsize, most), about["coding"]


def decode(name: str, held: np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...], coding: str) -> np.ndarray:
    """An array as it was before it was stored: `held`, or what its coded bytes unfold to."""
    if coding == "none":
        if held.dtype != dtype or held.shape != shape:
            fail(name, f"is {held.dtype} {list(held.shape)} in the file, {dtype} {list(shape)} in the header")
        return held
    if held.dtype != np.uint8 or held.ndim != 1:
        fail(name, f"is {held.dtype} {list(held.shape)} in the file; coded data is uint8 with one axis")
    return viewed(name, _decode(name, held, coding, math.prod(shape) * dtype.itemsize), dtype, shape)


def _decode_all(described: dict[str, Any], stored: dict[str, np.ndarray], max_bytes: int) -> dict[str, np.ndarray]:
    arrays, left = {}, max_bytes
    for name, about in described.items():
        dtype, shape, coding = described_as(name, about, left)
        left -= math.prod(shape) * dtype.itemsize
        arrays[name] = decode(name, stored.pop(name), dtype, shape, coding)
    return arrays


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file that is no larger than `max_bytes`."""
    with tensors.opened(path, max_bytes) as f:
        return f.read()


def _digest(header: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    for name in sorted(arrays):
        _hash(digest, name, arrays[name])
    return digest.hexdigest()


def _hash(digest: Any, name: str, a: np.ndarray) -> None:
    digest.update(to_json([name, a.dtype.name, list(a.shape)]).encode())
    digest.update(raw(a).data)


def replace(path: Path, data: bytes) -> None:
    """Puts these bytes in the place of a file in one step: a reader sees the old file or the whole new one."""
    with replaced(path) as f:
        f.write(data)


__all__ = ["CODINGS", "CompressedFileError", "VERSION", "read", "write"]
