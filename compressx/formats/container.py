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
import json
import lzma
import math
import os
import stat
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import safetensors
import safetensors.numpy

from compressx.formats.base import DTYPES, CompressedFileError, fail

VERSION = 2
READ = (1, 2)  # what is read; 1 is what 0.1 wrote
MAX_HEADER = 1 << 24  # bytes of JSON
MAX_VALUES = 1 << 20  # in the JSON of a header; parsed, each takes up to 200 bytes
MAX_NESTING = 64  # of lists and objects in it
MAX_DIGITS = 128  # of a number in it
MAX_ARRAYS = 1 << 16
MAX_NAME = 2048  # characters of an array's name
MAX_AXES = 16
CODINGS = ("none", "zlib", "lzma")
_LZMA_MEMORY = 1 << 25  # what `_encode` writes takes 9 MiB to read
_PIECE = 1 << 16  # bytes of a coded array that are unfolded together
_SAFETENSORS = {
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


def write(path: Path, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray], coding: str = "none") -> int:
    """Writes the file in one step: a reader sees the old file or the whole new one, also when the disk fills up.

    Args:
      path: the file; its folder must exist.
      content: JSON-able, what the arrays mean.
      arrays: by name.
      coding: "none", "zlib" or "lzma", tried on each array and used where it saves bytes.

    Returns:
      Bytes of all arrays as stored, after coding.

    Raises:
      ValueError: no such coding, content without a JSON form, or a header that no reader would take.
      OSError: the file cannot be written; what was there before is untouched.
    """
    if coding not in CODINGS:
        raise ValueError(f"coding must be one of {', '.join(CODINGS)}, got {coding!r}")
    if len(arrays) > MAX_ARRAYS or max(map(len, arrays), default=0) > MAX_NAME:
        raise ValueError(f"more than {MAX_ARRAYS} arrays, or one whose name has more than {MAX_NAME} characters")
    described, stored = {}, {}
    for name, array in arrays.items():
        plain = np.ascontiguousarray(array).reshape(array.shape)
        used, data = _encode(plain, coding)
        described[name] = {"dtype": array.dtype.name, "shape": list(array.shape), "coding": used}
        stored[name] = plain if used == "none" else np.frombuffer(data, np.uint8)
    header = to_json({"version": VERSION, "arrays": described, "content": content})
    if len(header) > MAX_HEADER // 2:  # it is quoted once more inside the safetensors header
        raise ValueError(f"the header takes {len(header)} characters, more than a reader accepts ({MAX_HEADER // 2})")
    metadata = {"compressx": header, "sha256": _digest(header, stored)}
    head, body = _serialized(stored, metadata)
    for text, entry in ((header, "header"), (head[8:].decode(), "file")):
        from_json(text, entry)  # what a reader would refuse is not written
    replace(path, head, body)
    return sum(a.nbytes for a in stored.values())


def read(path: Path, max_bytes: int) -> tuple[int, dict[str, Any], dict[str, np.ndarray], tuple[int, int]]:
    """The version, content and arrays of a file, and its bytes (arrays as stored, whole file); inverse of `write`.

    Args:
      path: the file.
      max_bytes: the file, and its arrays together when unfolded, may not be larger.

    Raises:
      CompressedFileError: the file is damaged, truncated, foreign, too large or inconsistent.
      OSError: the file cannot be opened or read.
    """
    data = read_bytes(path, max_bytes)
    size = len(data)
    metadata = _metadata(data)
    header, checksum = metadata.get("compressx"), metadata.get("sha256")
    if not isinstance(header, str) or not isinstance(checksum, str):
        fail("header", "a safetensors file that compressx did not write (no 'compressx' and 'sha256' in its metadata)")
    stored = _stored_arrays(data)
    del data  # of which the arrays are a copy
    found = _digest(header, stored)
    if found != checksum:
        fail("sha256", f"the file is damaged: its checksum is {found[:16]}..., the header says {checksum[:16]!r}")
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
    if described.keys() != stored.keys():
        odd = sorted(described.keys() ^ stored.keys())[0]
        fail(odd, "is not in both the header and the file")
    held = sum(a.nbytes for a in stored.values())
    return version, content, _decode_all(described, stored, max_bytes), (held, size)


def to_json(value: Any) -> str:
    """Compact JSON with sorted keys.

    Raises:
      ValueError: the value has no JSON form.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be written as JSON: {error}") from None


def from_json(text: str, entry: str) -> Any:
    """Strict JSON of a bounded size: no NaN, no key twice, no number, nesting or list without end."""
    if len(text) > MAX_HEADER or text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        fail(entry, f"takes more than {MAX_HEADER} characters or holds more than {MAX_VALUES} values")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key occurs twice")
        return out

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def short(digits: str) -> str:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"{digits[:20]}... has {len(digits)} digits")
        return digits

    def finite(digits: str) -> float:
        value = float(short(digits))
        if not math.isfinite(value):
            raise ValueError(f"{digits[:20]} is not a finite number")
        return value

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=finite,
            parse_int=lambda digits: int(short(digits)),
        )
    except (ValueError, RecursionError) as error:
        fail(entry, f"is not valid JSON: {error}")
    level = [value]
    for _ in range(MAX_NESTING):
        inside = (n.values() if isinstance(n, dict) else n for n in level if isinstance(n, dict | list))
        level = [child for children in inside for child in children]
        if not level:
            return value
    fail(entry, f"is nested more than {MAX_NESTING} deep")


def check_shape(entry: str, shape: Any, itemsize: int, max_bytes: int) -> tuple[int, ...]:
    """A shape from a file: a short list of sizes that, empty axes aside, takes at most `max_bytes`."""
    if not isinstance(shape, list) or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        fail(entry, f"shape {str(shape)[:80]} is not a list of sizes")
    if len(shape) > MAX_AXES:
        fail(entry, f"{len(shape)} axes, more than {MAX_AXES}")
    if math.prod(max(n, 1) for n in shape) * itemsize > max_bytes:
        fail(entry, f"shape {str(shape)[:80]} needs more than max_bytes={max_bytes} bytes")
    return tuple(shape)


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


def _decode_all(described: dict[str, Any], stored: dict[str, np.ndarray], max_bytes: int) -> dict[str, np.ndarray]:
    arrays, left = {}, max_bytes
    for name, about in described.items():
        if not isinstance(about, dict) or str(about.get("dtype")) not in DTYPES or about.get("coding") not in CODINGS:
            fail(name, f"its description is not understood: {str(about)[:120]}")
        dtype, coding = DTYPES[str(about["dtype"])], about["coding"]
        shape = check_shape(name, about.get("shape"), dtype.itemsize, left)
        size = math.prod(shape) * dtype.itemsize
        left -= size
        held = stored.pop(name)
        if coding == "none":
            if held.dtype != dtype or held.shape != shape:
                fail(name, f"is {held.dtype} {list(held.shape)} in the file, {dtype} {list(shape)} in the header")
            arrays[name] = held
            continue
        if held.dtype != np.uint8 or held.ndim != 1:
            fail(name, f"is {held.dtype} {list(held.shape)} in the file; coded data is uint8 with one axis")
        arrays[name] = _view(name, _decode(name, held, coding, size), dtype, shape)
    return arrays


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The bytes of a regular file that is no larger than `max_bytes`."""
    if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe that nobody writes to would wait for ever
        fail("file", "is not a regular file")
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size
        if size > max_bytes:
            fail("file", f"takes {size} bytes, more than max_bytes={max_bytes}")
        return f.read(size)


def _metadata(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        fail("file", f"{len(data)} bytes are too few for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > len(data) - 8:
        fail(
            "file",
            f"its header should take {length} bytes and {len(data) - 8} follow: truncated, or no safetensors file",
        )
    if length > MAX_HEADER:
        fail("file", f"its header takes {length} bytes, more than {MAX_HEADER}")
    try:
        text = data[8 : 8 + length].decode()
    except UnicodeDecodeError:
        fail("file", "its header is not text: damaged, or no safetensors file")
    parsed = from_json(text, "file")
    if isinstance(parsed, dict) and (len(parsed) - 1 > MAX_ARRAYS or max(map(len, parsed), default=0) > MAX_NAME):
        fail("file", f"more than {MAX_ARRAYS} arrays, or one whose name has more than {MAX_NAME} characters")
    metadata = parsed.get("__metadata__", {}) if isinstance(parsed, dict) else {}
    return metadata if isinstance(metadata, dict) else {}


def _stored_arrays(data: bytes) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        fail("file", f"is not a whole safetensors file: {error}")
    arrays = {}
    for name, about in entries:
        if about["dtype"] not in _SAFETENSORS:
            fail(name, f"dtype {about['dtype']} is never written")
        dtype = DTYPES[_SAFETENSORS[about["dtype"]]]
        shape = check_shape(name, list(about["shape"]), dtype.itemsize, max(len(data), 1 << 30))
        arrays[name] = _view(name, about["data"], dtype, shape)
    return arrays


def _view(name: str, raw: bytearray | np.ndarray, dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    if dtype.kind == "b" and np.frombuffer(raw, np.uint8).max(initial=0) > 1:
        fail(name, "holds a byte that is no bool")
    return np.frombuffer(raw, dtype).reshape(shape)


def _digest(header: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    for name in sorted(arrays):
        a = arrays[name]
        digest.update(to_json([name, a.dtype.name, list(a.shape)]).encode())
        digest.update(a.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _serialized(stored: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> tuple[bytes, memoryview]:
    """A safetensors file: its length and header, and its arrays. (safetensors itself writes metadata in no order.)"""
    plain = memoryview(safetensors.numpy.save(dict(stored)))
    start = 8 + int.from_bytes(plain[:8], "little")
    listed = bytes(plain[8:start]).rstrip()[1:]  # without its brace
    header = b'{"__metadata__":' + to_json(metadata).encode() + (b"," if stored else b"") + listed
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, plain[start:]


def replace(path: Path, *parts: bytes | memoryview) -> None:
    """Puts these bytes in the place of a file in one step: a reader sees the old file or the whole new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as f:
            f.writelines(parts)
            f.flush()
            os.fsync(f.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the new name survives a power cut too
    finally:
        os.close(folder)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = ["CODINGS", "CompressedFileError", "VERSION", "read", "write"]
