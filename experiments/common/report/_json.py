"""Strict JSON in and out: plain values only, no NaN by accident, no duplicate keys, files replaced atomically."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def plain(value: Any, where: str = "value", *, finite: bool = True) -> Any:
    """Turns a value into plain JSON types: dict, list, str, int, float, bool, None.

    NumPy and JAX scalars and arrays become numbers and nested lists. With `finite=False` non-finite numbers are
    written as the strings "NaN", "Infinity" and "-Infinity" (the protobuf JSON mapping), so that the text stays
    valid JSON.

    Args:
      value: what to convert.
      where: a name for the value, used in messages.
      finite: whether NaN and infinities are refused.

    Returns:
      The plain value.

    Raises:
      ValueError: a number is not finite, or a key is not text.
      TypeError: the value has no JSON form.
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):  # np.float64 is one too
        if math.isfinite(value):
            return float(value)
        if finite:
            raise ValueError(f"{where} is {value!r}; a finite number or null is needed")
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        out = {}
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where} has the key {key!r}; keys must be text")
            out[key] = plain(item, f"{where}.{key}", finite=finite)
        return out
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain(item, f"{where}[{i}]", finite=finite) for i, item in enumerate(value)]
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype.kind not in "biuf" and array.dtype.name == "bfloat16":
            array = array.astype(np.float32)
        if array.dtype.kind in "biuf":
            return plain(array.tolist(), where, finite=finite)
    raise TypeError(f"{where} is {type(value).__name__}, which has no JSON form; give numbers, text, lists or dicts")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(k for k in keys if keys.count(k) > 1)!r} occurs twice")
    return out


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} does not fit in a float")
    return value


def loads(text: str | bytes) -> Any:
    """Parses strict JSON: NaN, Infinity, numbers that overflow and duplicate keys raise ValueError."""
    try:
        return json.loads(
            text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant, parse_float=_finite_float
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_atomic(path: str | os.PathLike[str], data: bytes) -> Path:
    """Writes a file so that a reader, a crash or a full disk sees either the old content or the new, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        mode = path.stat().st_mode & 0o777 if path.exists() else 0o666 & ~_umask()
        os.chmod(name, mode)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _umask() -> int:
    # mkstemp makes private files; the umask can only be read by setting it.
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
