"""Files that `save_model` never wrote: sound ones of every format and every set, changed on purpose; who opens them.

`bomb` makes arrays that a hostile file holds in a few bytes: of a format's right sizes, for a leaf as large as allowed.
`sources` are sound files, one for each format and each set. `changed` gives bombs as they are, rules whose numbers and
lists are extreme but of their own types, very many leaves and rules, and files in which any field or array is changed.
`Opener` opens files in a process whose memory is limited, and tells for each what came of it, its processor time and
its peak of memory.

    python -m tests.formats.hostile        the other end of `Opener`
"""

import contextlib
import copy
import io
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.numpy

from compressx.formats import FORMATS, Packed, container, tensors
from compressx.formats.base import DTYPES, index_dtype

# --- forging


class Source(NamedTuple):
    """A file in parts: the header's JSON, and the arrays as they are stored."""

    header: Any
    arrays: dict[str, np.ndarray]


def opened(data: bytes) -> Source:
    """A sound file in parts."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["compressx"])
    arrays = {}
    for name, about in safetensors.deserialize(data):  # safetensors.numpy.load knows no bfloat16
        arrays[name] = np.frombuffer(about["data"], DTYPES[tensors.NAMES[about["dtype"]]]).reshape(about["shape"])
    return Source(header, arrays)


def forge(path: Path, header: Any, arrays: dict[str, np.ndarray], text: str | None = None) -> None:
    """Writes a file whose checksum is right, whatever its content."""
    text = json.dumps(header) if text is None else text
    digest = container._digest(text, arrays)
    path.write_bytes(safetensors.numpy.save(arrays, {"compressx": text, "sha256": digest}))


# --- sound files


def _source(leaves: dict[str, Packed], rules: list[dict[str, Any]] = [], more: dict[str, Any] = {}) -> Source:  # noqa: B006
    """A header and arrays for packed leaves, every array coded where that makes it small."""
    entries, arrays, described = [], {}, {}

    def put(name: str, a: np.ndarray) -> str:
        coded = np.frombuffer(zlib.compress(a.tobytes(), 1), np.uint8) if a.nbytes > 4096 else None
        small = coded is not None and coded.size < a.nbytes
        arrays[name] = coded if coded is not None and small else a
        described[name] = {"dtype": a.dtype.name, "shape": list(a.shape), "coding": "zlib" if small else "none"}
        return name

    for path, p in leaves.items():
        held = {key: put(f"{path}:{key}", a) for key, a in p.arrays.items()}
        entry = {"path": path, "shape": list(p.shape), "dtype": p.dtype, "format": p.format, "meta": p.meta}
        entries.append({**entry, "arrays": held})
    for key, a in more.items():
        put(key, a)
    content = {"model": {"name": "lenet5", "options": {"classes": 10}}, "extra": [1], "leaves": entries, "rules": rules}
    return Source({"version": 1, "arrays": described, "content": content}, arrays)


def bomb(format: str, shape: tuple[int, ...], dtype: str, r: random.Random) -> Packed:
    """A leaf whose arrays have the sizes that the format asks for, and are all the same or simple counts."""
    n, rows, last = math.prod(shape), math.prod(shape[:-1]), shape[-1] if shape else 1
    if format.endswith("-coded"):
        name = {"compact": "matrix", "fkw": "weight", "bspc": "weight"}.get(format.removesuffix("-coded"), "values")
        plain = bomb(format.removesuffix("-coded"), shape, "uint8", r)
        bits, number = r.choice([2, 4, 8, 9, 16]), plain.arrays[name].size
        levels, about = _levels(dtype, last, bits)
        codes = np.zeros(-(-number * about["bits"] // 8), np.uint8)
        meta = plain.meta | about | {"values": list(plain.arrays[name].shape)}
        return Packed(format, shape, dtype, plain.arrays | {name: codes, "levels": levels}, meta)
    kind = DTYPES[dtype]
    arrays: dict[str, np.ndarray] = {}
    meta: dict[str, Any] = {}
    if format == "dense":
        arrays["values"] = np.zeros(shape, kind)
    elif format == "compact":
        arrays["matrix"] = np.zeros((rows, last), kind)
        for name, extent in (("positions", rows), ("filters", last)):
            if r.random() < 0.7:
                arrays[name] = np.arange(extent).astype(index_dtype(extent))
    elif format == "bitmask":
        arrays = {"mask": np.packbits(np.ones(n, bool)), "values": np.zeros(n, kind)}
    elif format in ("csr", "csr16"):
        ids = np.uint32 if format == "csr" else np.uint16
        column = np.arange(rows).astype(ids) if r.random() < 0.8 else np.zeros(0, ids)
        ends = (np.arange(last + 1) * column.size).astype(np.uint32)
        arrays = {"indptr": ends, "indices": np.tile(column, last), "values": np.zeros(column.size * last, kind)}
    elif format == "coo-delta":
        meta = {"width": r.choice([1, 3, 8, 16]), "codes": n}
        arrays = {"codes": np.zeros(-(-n * meta["width"] // 8), np.uint8), "values": np.zeros(n, kind)}
    elif format == "fkw":
        taps, (cin, cout) = shape[0] * shape[1], shape[2:]
        meta["patterns"] = [[t] for t in range(taps)] * r.choice([1, 1, 255 // taps])
        stride = np.zeros((cout, len(meta["patterns"]) + 1), np.uint16)
        stride[:, -1] = cin
        index = np.tile(np.arange(cin, dtype=np.uint16), cout)
        arrays = {"offset": (np.arange(cout + 1) * cin).astype(np.uint32), "reorder": np.arange(cout).astype(np.uint16)}
        arrays |= {"index": index, "stride": stride, "weight": np.zeros((cin * cout, 1), kind)}
    elif format == "bspc":
        one, weights = r.random() < 0.5, np.zeros(n, kind)
        column, output = np.arange(rows).astype(index_dtype(rows)), np.arange(last).astype(index_dtype(last))
        if not one:  # a block for each output
            column = np.tile(column, last)
        ends = [0, rows] if one else np.arange(last + 1) * rows
        outputs = [0, last] if one else np.arange(last + 1)
        arrays = {"stride": np.array(ends, np.uint32), "offset": np.array(outputs, np.uint32)}
        arrays |= {"column": column, "reorder": output, "weight": weights}
    elif format == "block-max":
        meta = {"axis": r.choice(["outputs", "inputs"]), "sizes": r.choice([[1], [2], [128], [1, 2], [1, 2, 4, 8]])}
        lines, length = (rows, last) if meta["axis"] == "outputs" else (last, rows)
        blocks, bits = -(-length // meta["sizes"][0]) * lines, math.ceil(math.log2(meta["sizes"][0]))
        arrays = {"values": np.zeros(blocks, kind), "offsets": np.zeros(-(-blocks * bits // 8), np.uint8)}
        if len(meta["sizes"]) > 1:
            arrays["codes"] = np.zeros(-(-lines * math.ceil(math.log2(len(meta["sizes"]))) // 8), np.uint8)
    elif format == "bank-balanced":
        meta = {"axis": r.choice(["outputs", "inputs"]), "bank": r.choice([1, 2, 64, 1 << 30])}
        lines, length = (rows, last) if meta["axis"] == "outputs" else (last, rows)
        whole, rest = divmod(length, meta["bank"])
        meta["keep"] = [r.choice([0, 1]), min(rest, 1)]
        number = lines * (whole * meta["keep"][0] + meta["keep"][1])
        bits = (meta["bank"] - 1).bit_length()
        arrays = {"values": np.zeros(number, kind), "offsets": np.zeros(-(-number * bits // 8), np.uint8)}
    elif format == "quantized":
        levels, meta = _levels(dtype, last, r.choice([2, 4, 8, 16]))
        meta["masked"] = r.random() < 0.5
        arrays = {"levels": levels, "codes": np.zeros(-(-n * meta["bits"] // 8), np.uint8)}
        if meta["masked"]:
            arrays["mask"] = np.packbits(np.ones(n, bool))
    elif format in ("bit-planes", "bit-planes-complement"):
        levels, meta = _levels(dtype, last, r.choice([2, 8, 16]))
        arrays = {"levels": levels, "planes": np.zeros((r.randrange(meta["bits"] + 2), -(-n // 8)), np.uint8)}
    elif format == "cells":
        levels, meta = _levels(dtype, last, r.choice([2, 8, 16]))
        meta |= {"fragment": r.choice([1, 8, 1 << 20]), "order": r.choice("WHC"), "cell": r.choice([1, 2, 16])}
        slices = -(-(2 ** (meta["bits"] - 1) - 1).bit_length() // meta["cell"])
        arrays = {"levels": levels, "cells": np.zeros((slices, -(-n * meta["cell"] // 8)), np.uint8)}
        arrays["signs"] = np.zeros(math.ceil(math.ceil(rows / meta["fragment"]) * last / 8), np.uint8)
    else:
        meta = {"block": [r.choice([1, 4, 1 << 30]), r.choice([1, 4, 1 << 30])], "coded": False}
        blocks = math.prod(-(-a // b) for a, b in zip((rows, last), meta["block"], strict=True))
        which = r.choice(["pruned", "unified", "free"])
        if which == "pruned":
            arrays["pruned"] = np.packbits(np.ones(blocks, bool))
        if which == "unified":
            arrays["unified"], arrays["signs"] = np.packbits(np.ones(blocks, bool)), np.zeros(-(-n // 8), np.uint8)
        arrays["magnitudes"] = np.zeros(blocks if which == "unified" else 0, kind)
        arrays["free"] = np.zeros(n if which == "free" else 0, kind)
    return Packed(format, shape, dtype, arrays, meta)


def _levels(dtype: str, channels: int, bits: int) -> tuple[np.ndarray, dict[str, Any]]:
    per = "channel" if channels < 1 << 16 and bits == 4 else "tensor"
    held = "float64" if dtype == "float64" else "float32"
    scale = np.ones(channels if per == "channel" else 1, held)
    return scale, {"grid": "uniform", "per": per, "bits": bits}


def shapes(n: int, least: int, most: int, r: random.Random) -> tuple[int, ...]:
    """A shape of about n weights, often with all of them on one axis."""
    kinds: list[tuple[int, ...]] = [(n,), (1, n), (n, 1), (math.isqrt(n), math.isqrt(n)), (7, n // 7), (n // 7, 7)]
    kinds += [
        (1, 1, 1, n),
        (3, 3, n // 9, 1),
        (3, 3, math.isqrt(n // 9), math.isqrt(n // 9)),
        (2, 1, n // 2),
        (1, n, 1, 1),
    ]
    return r.choice([s for s in kinds if least <= len(s) <= most])


def large(r: random.Random, max_bytes: int, format: str | None = None) -> Source:
    """A bomb of a format that just fits, or just does not."""
    format = format or r.choice(sorted(FORMATS))
    coded = format in ("quantized", "unified", "cells", "bit-planes", "bit-planes-complement") or "-coded" in format
    dtype = r.choice(["float16", "float32", "float64", "bfloat16"] if coded else [*DTYPES, "uint8", "int8", "bool"])
    n = int(max_bytes / DTYPES[dtype].itemsize * r.choice([1.0, 1.0, 1.01, 0.9, 0.5, 0.24, 0.12]))
    inner = format.removesuffix("-coded")
    free = inner in ("dense", "bitmask", "coo-delta", "quantized", "bit-planes", "bit-planes-complement")
    state = r.getstate()
    for _ in range(3):  # until the arrays fit too
        r.setstate(state)
        side = math.isqrt(n)
        shape = shapes(n, 1 if free else 2, 4, r)
        if inner == "fkw":
            most = min(n, 65_535)
            square = min(side, 65_535)
            shape = r.choice([(1, 1, square, square), (1, 1, most, 1), (1, 1, 1, most), (3, 3, side // 3, side // 3)])
        packed = bomb(format, shape, dtype, r)
        held = sum(a.nbytes for a in packed.arrays.values())
        if held <= max_bytes:
            break
        n = int(n * max_bytes / held * r.choice([1.0, 0.99]))
    return _source({"k": packed})


def _zeros(shape: tuple[int, ...], dtype: str = "float32") -> Packed:
    """A leaf that takes a byte, whatever its shape."""
    arrays = {"codes": np.zeros(0, np.uint8), "values": np.zeros(0, DTYPES[dtype])}
    return Packed("coo-delta", shape, dtype, arrays, {"width": 1, "codes": 0})


_PATTERN = {"library": "natural", "k": 6, "entries": 4, "kernel": [3, 3], "scope": "leaf", "aligned": None}
_MEMBER = {"makes": 1, "makes_units": [[0, 8]], "reads": None, "reads_units": None, "columns": 3}
SPECS: list[dict[str, Any]] = [
    {"kind": "unstructured", "density": 0.5, "keep": None, "scope": "leaf"},
    {"kind": "unstructured", "density": 0.5, "keep": None, "scope": "rule"},
    {"kind": "n_of_m", "n": 1, "m": 2, "axis": -2},
    {"kind": "block", "block": [2, 2], "density": 0.5, "keep": None},
    {"kind": "filters", "density": 0.5, "keep": None},
    {"kind": "columns", "density": None, "keep": 3},
    {"kind": "channels", "density": 0.5, "keep": None},
    {
        "kind": "filters_and_columns",
        "filter_density": 0.5,
        "column_density": 0.5,
        "keep_filters": None,
        "keep_columns": None,
    },
    {
        "kind": "coupled_filters",
        "members": [[1, [[0, 8]]], [1, [[0, 8]]]],
        "density": 0.5,
        "keep": None,
        "column_density": 0.5,
    },
    {
        "kind": "network_structure",
        "members": [_MEMBER, _MEMBER],
        "groups": [[0, 5, 2], [5, 3, 1]],
        "selection": "energy",
        "seed": 0,
    },
    {"kind": "network_structure", "members": [_MEMBER], "groups": [[0, 8, 2]], "selection": "random", "seed": 0},
    {"kind": "pattern", **_PATTERN, "shrink": None},
    {"kind": "pattern", **_PATTERN, "shrink": [12, 6]},
    {
        "kind": "pattern",
        **_PATTERN,
        "scope": "rule",
        "aligned": 2,
        "library": [[1, 3, 4, 5], [0, 1, 3, 4]],
        "k": None,
        "shrink": None,
    },
    {"kind": "connectivity", "density": 0.5, "keep": None, "balance": "filter", "aligned": 2},
    {"kind": "pattern_connectivity", "density": 0.5, "keep": None, "balance": "layer", **_PATTERN, "shrink": 0.5},
    {"kind": "bsp_columns", "density": 0.5, "keep": None, "strips": 2, "blocks": 2, "scope": "leaf"},
    {"kind": "bsp_rows", "density": 0.5, "keep": None, "strips": 2, "blocks": 1, "scope": "rule", "chained": True},
    {
        "kind": "bsp",
        "column_density": 0.5,
        "row_density": 0.5,
        "keep_columns": None,
        "keep_rows": None,
        "column_strips": 2,
    }
    | {"column_blocks": 1, "row_strips": 1, "row_blocks": 1, "scope": "leaf"},
    {"kind": "block_max", "size": 4, "axis": "outputs", "scope": "leaf"},
    {
        "kind": "darb",
        "density": 0.4,
        "allowed": [1, 2, 4],
        "axis": "outputs",
        "scope": "leaf",
        "assignment": "adaptive",
        "seed": 0,
    },
    {"kind": "balanced_block_max", "density": 0.5, "size": 2, "axis": "outputs", "scope": "leaf"},
    {"kind": "bank_balanced", "density": 0.5, "bank": 4, "axis": "inputs", "scope": "leaf"},
    {
        "kind": "crossbar_aware",
        "filter_density": 0.5,
        "column_density": 0.5,
        "rows": 4,
        "cols": 8,
        "cells_per_weight": 4,
    },
    {"kind": "polarize", "fragment": 4, "order": "W", "rule": "sum"},
    {
        "kind": "quantize",
        "bits": 4,
        "grid": "uniform",
        "per": "tensor",
        "zero_level": False,
        "cell_bits": 2,
        "tune": True,
    },
    {
        "kind": "quantize",
        "bits": 3,
        "grid": "codebook",
        "per": "channel",
        "zero_level": True,
        "cell_bits": 2,
        "tune": True,
    },
    {"kind": "unify", "block": [2, 2], "fraction": 0.5, "zeros": "keep"},
    {"kind": "prune_blocks", "block": [1, 2, 2], "fraction": 0.5},
    {
        "kind": "unify_and_prune",
        "block": [2, 2],
        "unify_fraction": 0.3,
        "prune_fraction": 0.3,
        "selection": "exact",
        "zeros": "keep",
    },
]


def ruled(spec: dict[str, Any], shape: tuple[int, ...] | None = None, dtype: str = "float32") -> Source:
    """A file with one or two zero leaves, of any size at no cost, and one rule on them; its structure is all zeros."""
    import jax

    from compressx.constraints import from_spec

    constraint = from_spec(spec)
    taps = "pattern" in spec["kind"] or spec["kind"] == "connectivity"
    shape = shape or ((3, 3, 4, 8) if taps else (4, 8))
    members = len(spec["members"]) if "members" in spec else 2 if constraint.joint else 1
    names = [f"k{i}" for i in range(members)]
    like = jax.ShapeDtypeStruct(shape, DTYPES[dtype])
    try:
        held = jax.tree.leaves(jax.eval_shape(constraint.init, (like,) * members if constraint.joint else like))
    except Exception:  # the spec does not fit the shape: the file says so
        held = []
    structure = {f"rule 0:{i}": np.zeros(x.shape, x.dtype) for i, x in enumerate(held)}
    rule = {"paths": names, "spec": copy.deepcopy(spec), "structure": list(structure)}
    return _source({name: _zeros(shape, dtype) for name in names}, [rule], structure)


def intersected(r: random.Random) -> dict[str, Any]:
    """An intersection of up to four sets, seldom a sensible one; sometimes of hundreds, or of intersections."""
    parts = [copy.deepcopy(r.choice(SPECS)) for _ in range(r.choice([1, 2, 2, 3, 4, 40, 400]))]
    for _ in range(r.choice([0, 0, 0, 1, 5, 60])):
        parts = [{"kind": "all", "parts": parts}]
    return {"kind": "all", "parts": parts}


def many(r: random.Random) -> Source:
    """As many leaves, rules or arrays as can be, or some more, alike or all different."""
    number = r.choice([50, 300, 1000, 8192, 8193])
    spec = r.choice(SPECS)
    alike = r.random() < 0.5
    shape = (3, 3, 4, 8) if "kernel" in spec else (4, 8)
    leaves = {f"k{i}" * r.choice([1, 1, 100]): _zeros(shape if alike else (*shape[:-1], 8 + i)) for i in range(number)}
    single = {k: v for k, v in spec.items() if k != "members"}
    rules = [{"paths": [name], "spec": single, "structure": []} for name in leaves]
    if r.random() < 0.4:
        rules = [{"paths": list(leaves), "spec": spec, "structure": []}]
    return _source(leaves, rules)


def sources(r: random.Random, max_bytes: int) -> Source:
    """A file to be changed: a rule on small leaves or on large ones, an intersection, a small leaf or a bomb."""
    what = r.random()
    if what < 0.7:
        spec, dtype = r.choice(SPECS), r.choice(["float32", "float32", "float16", "bfloat16"])
        shape = None
        if r.random() < 0.4:
            four = "pattern" in spec["kind"] or spec["kind"] == "connectivity"
            shape = shapes(int(max_bytes / DTYPES[dtype].itemsize * r.choice([1, 0.3, 0.01])), 4 if four else 1, 4, r)
        return ruled(spec, shape, dtype)
    if what < 0.8:
        base = ruled(SPECS[0])
        base.header["content"]["rules"][0]["spec"] = intersected(r)
        return base
    if what < 0.9:
        return _source({"k": bomb(name := r.choice(sorted(FORMATS)), (3, 3, 4, 8), _dtype(name, r), r)})
    return large(r, max_bytes)


def _dtype(format: str, r: random.Random) -> str:
    exact = format in ("quantized", "unified", "cells", "bit-planes", "bit-planes-complement") or "-coded" in format
    return r.choice(["float16", "float32", "bfloat16"] if exact else sorted(DTYPES))


# --- changes


def places(tree: Any, here: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in JSON."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*here, key)
        yield from places(value, (*here, key))


def at(tree: Any, keys: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in keys:
        tree = tree[key]
    return tree


def extreme(value: Any, r: random.Random, max_bytes: int) -> Any:
    """What a field must not be, or may just be."""
    near = [max_bytes // k + d for k in (1, 2, 4, 8, 64) for d in (-1, 0, 1)] + [math.isqrt(max_bytes)]
    wide = [2**k + d for k in (8, 16, 31, 32, 53, 62, 63, 64, 200) for d in (-1, 0, 1)] + [10**120, 10**4000]
    odd = [
        True,
        False,
        None,
        "",
        "1",
        "all",
        [],
        {},
        [[]],
        "x" * 10_000,
        "a\ud800",
        "\x1b[2J",
        [1] * 1000,
        1e308,
        1e-320,
    ]
    if isinstance(value, bool) or value is None or r.random() < 0.08:
        return r.choice([*odd, 0, 1, 0.5, 7])
    if isinstance(value, int):
        return r.choice(
            [
                r.choice(near),
                r.choice(wide),
                -r.choice(wide),
                0,
                1,
                2,
                -1,
                value + 1,
                value - 1,
                2 * value,
                float(value),
            ]
        )
    if isinstance(value, float):
        return r.choice([0.0, -0.0, 1.0, 1e-9, 5e-324, 1e308, -value, 2 * value, str(value), value / 2, 1 - 1e-9])
    if isinstance(value, list):
        times = r.choice([0, 2, 3, 50, 1000, 50_000 // max(len(value), 1)])
        longer = [value * times, value[:-1], value[::-1], [value], [*value, *value[:1]], list(range(times))]
        nested: Any = value
        for _ in range(r.choice([1, 10, 60, 70, 500])):
            nested = [nested]
        return r.choice([*longer, nested])
    if isinstance(value, dict):
        return r.choice(
            [
                {},
                {**value, "x": 1},
                dict(list(value.items())[1:]),
                [value],
                dict.fromkeys(map(str, range(2000)), 0),
            ]
        )
    return r.choice(
        [*odd, value + value, value[:-1], value.upper(), r.choice(["lzma", "zlib", "none", "csr", "float16", "bool"])]
    )


def _recode(s: Source, name: str, r: random.Random) -> None:
    """Stores an array in another coding, truthfully or not, cut, followed by another stream, or grown by zeros."""
    about, a = s.header["arrays"].get(name), s.arrays[name]
    if not isinstance(about, dict):
        return
    raw = a.tobytes()
    if about.get("coding") == "zlib":
        with contextlib.suppress(zlib.error):
            raw = zlib.decompress(raw)
    if r.random() < 0.5:
        raw = raw + bytes(r.choice([1, 1000, 1 << 20, 1 << 24]))
        if r.random() < 0.7 and isinstance(about.get("shape"), list) and str(about.get("dtype")) in DTYPES:
            about["shape"] = [len(raw) // DTYPES[about["dtype"]].itemsize]
    import lzma

    coding = r.choice(["zlib", "lzma"])
    data = zlib.compress(raw, 1) if coding == "zlib" else lzma.compress(raw, preset=0)
    data = r.choice([data, data, data[: len(data) // 2], data + data, data + b"\0" * 8, b""])
    about["coding"] = coding
    s.arrays[name] = np.frombuffer(data, np.uint8)


def _array(s: Source, r: random.Random) -> None:
    name = r.choice(sorted(s.arrays))
    a = s.arrays[name]
    what = r.choice(["swap", "cut", "noise", "ones", "dtype", "gone", "twice", "recode", "recode", "shape"])
    if what == "swap":
        other = r.choice(sorted(s.arrays))
        s.arrays[name], s.arrays[other] = s.arrays[other], a
        d = s.header["arrays"]
        if r.random() < 0.5 and name in d and other in d:
            d[name], d[other] = d[other], d[name]
    elif what == "cut" and a.ndim:
        s.arrays[name] = a[: r.randrange(len(a) + 1)]
        if isinstance(s.header["arrays"].get(name), dict):
            s.header["arrays"][name]["shape"] = list(s.arrays[name].shape)
    elif what in ("noise", "ones") and a.nbytes:
        raw = bytearray(a.tobytes())
        for _ in range(r.choice([1, 3, 50])):
            raw[r.randrange(len(raw))] = 255 if what == "ones" else r.randrange(256)
        if a.dtype != bool:
            s.arrays[name] = np.frombuffer(bytes(raw), a.dtype).reshape(a.shape)
    elif what == "dtype":
        s.arrays[name] = a.astype(r.choice(["uint8", "float64", "int64", "float16"]))
    elif what == "gone":
        del s.arrays[name]
    elif what == "twice":
        s.arrays[name + "'"] = a
        s.header["arrays"][name + "'"] = copy.deepcopy(s.header["arrays"].get(name))
    elif what == "shape":
        s.arrays[name] = a.reshape(1, *a.shape) if a.ndim < 8 else a.reshape(-1)
    elif what == "recode":
        _recode(s, name, r)


def _text(text: str, r: random.Random) -> str:
    """JSON that no honest writer makes."""
    deep, nothing = r.choice([60, 500, 5000, 100_000]), r.choice(["[],", "{},", "0,", '"",', "1e5,", '{"a":[]},'])
    number = r.choice([1000, 100_000, 1_000_000, 4_000_000]) // len(nothing)
    big = r.choice(["9" * 5000, "1" + "0" * 100, "1e999", "-1e-999", "NaN", "-Infinity", "0." + "3" * 5000, "1" * 129])
    extra = r.choice(["[" * deep + "]" * deep, '{"a":' * deep + "0" + "}" * deep, f"[{nothing * number}0]", big])
    if r.random() < 0.2:
        extra = "{" + ",".join(f'"{i}":0' for i in range(number)) + "}"
    text = text.replace('"extra": [1]', f'"extra": {extra}', 1)
    if r.random() < 0.1:
        text = text.replace(
            '"version": 1',
            r.choice(['"version": 1.0', '"version": true', '"version": "1"', '"version": 1, "version": 1']),
        )
    return text


def stretched(spec: dict[str, Any], r: random.Random, max_bytes: int) -> dict[str, Any]:
    """A spec in which one or two numbers are extreme, of their own type, or lists are long, of their own elements."""
    spec = copy.deepcopy(spec)
    near = [max_bytes // k + d for k in (1, 2, 4, 8, 64) for d in (0, 1)] + [math.isqrt(max_bytes), 1000, 100]
    for _ in range(r.choice([1, 1, 2])):
        kinds = (int, float) if r.random() < 0.75 else (list,)
        found = [p for p in places(spec) if type(at(spec, p)) in kinds] or [("kind",)]
        keys, times = r.choice(found), r.choice([2, 50, 1000, 20_000])
        value = at(spec, keys)
        if isinstance(value, int):
            value = r.choice([*near, *near, 1 << 31, 1 << 40, 1 << 62, 0, 1, 2, 3, -1, value + 1, value - 1])
        elif isinstance(value, float):
            value = r.choice([1.0, 1e-3, 1e-9, 5e-324, 1 - 1e-9, value / 2, 0.0])
        elif isinstance(value, list):
            counted = [[i, 1, 1] for i in range(times)] if keys[-1] == "groups" else list(range(1, times))
            value = r.choice([value * (times // max(len(value), 1)), value[:-1], counted, counted[::-1]])
        at(spec, keys[:-1])[keys[-1]] = value
    return spec


def _any_change(s: Source, r: random.Random, max_bytes: int) -> None:
    """A value of the header becomes extreme or another one, or an array or the shapes are changed."""
    what = r.random()
    found = list(places(s.header))
    fields = [p for p in found if p[:1] == ("content",) and ("spec" in p or "meta" in p or "shape" in p)] or found
    keys = r.choice(fields if r.random() < 0.6 else found)
    if what < 0.65:
        parent = at(s.header, keys[:-1])
        parent[keys[-1]] = extreme(parent[keys[-1]], r, max_bytes)
    elif what < 0.72:
        at(s.header, keys[:-1])[keys[-1]] = copy.deepcopy(at(s.header, r.choice(found)))
    elif what < 0.95 and s.arrays and isinstance(s.header.get("arrays"), dict):
        _array(s, r)
    else:
        content = s.header.get("content")
        for leaf in content["leaves"] if isinstance(content, dict) and isinstance(content.get("leaves"), list) else []:
            if isinstance(leaf, dict) and isinstance(leaf.get("shape"), list):
                leaf["shape"] = list(shapes(max_bytes // r.choice([1, 2, 4, 8]), 1, 4, r))


def changed(r: random.Random, max_bytes: int) -> tuple[Any, dict[str, np.ndarray], str | None]:
    """Header, arrays, and the header's text where that is no more its JSON.

    A bomb as it is, a rule with extreme numbers, very many leaves, rules or parts, or any of these with some changes.
    """
    what = r.random()
    if what < 0.3:
        s = large(r, max_bytes)
    elif what < 0.65:
        s = sources(r, max_bytes)
        for rule in s.header["content"]["rules"]:
            rule["spec"] = stretched(rule["spec"], r, max_bytes)
    elif what < 0.7:
        s = many(r)
    else:
        s = sources(r, max_bytes)
        s = Source(copy.deepcopy(s.header), dict(s.arrays))
        for _ in range(r.choice([1, 1, 2, 4])):
            _any_change(s, r, max_bytes)
    text = _text(json.dumps(s.header, default=str), r) if r.random() < 0.05 else None
    return s.header, s.arrays, text


def write(path: Path, r: random.Random, max_bytes: int) -> None:
    """Writes the next changed file that safetensors writes and whose text is text."""
    while True:
        header, arrays, text = changed(r, max_bytes)
        try:
            text = json.dumps(header) if text is None else text
            text.encode()
            forge(path, header, arrays, text)
        except (UnicodeEncodeError, ValueError, RecursionError):
            continue
        return


# --- opening


class Seen(NamedTuple):
    """What came of a file: "loaded", "refused" or anything else; why; processor seconds, bytes at the peak."""

    outcome: str
    reason: str
    seconds: float
    peak: float


class Opener:
    """A process that opens files, with at most so much memory beyond what it starts with."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.formats.hostile"]
        env = {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        root = Path(__file__).resolve().parents[2]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, text=True, env=env, cwd=root, **pipes)

    def __enter__(self) -> "Opener":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def open(self, path: Path, max_bytes: int, more: int, verify: bool = False) -> Seen:
        """Opens a file under a limit of `more` bytes."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps([str(path), max_bytes, more, verify]) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            return Seen("died", f"exit {self.process.wait(60)}", 0.0, 0.0)
        return Seen(*json.loads(line))


def _status(key: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return 1024 * int(line.split()[1])


def _serve() -> None:
    import jax  # noqa: F401  (what the first file needs must not count as its memory)

    from compressx import cli
    from compressx.formats import CompressedFileError, load_model

    out = sys.stdout
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]

    def look(path: str, max_bytes: int, verify: bool) -> tuple[str, str]:
        try:
            load_model(path, max_bytes)
        except CompressedFileError as error:
            return "refused", str(error)[:2000]
        if verify:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as told:
                for command in ("inspect", "verify"):
                    if cli.main([command, path, "--max-bytes", str(max_bytes)]) not in (0, 1, 2):
                        return "odd", command
            return "loaded", told.getvalue()[:300]
        return "loaded", ""

    for line in sys.stdin:
        path, max_bytes, more, verify = json.loads(line)
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + more, hard))
        Path("/proc/self/clear_refs").write_text("5")
        before, start = _status("VmRSS"), time.process_time()
        try:
            outcome, reason = look(path, max_bytes, verify)
        except BaseException:
            outcome, reason = "failed", traceback.format_exc()[-3000:]
        seconds, peak = time.process_time() - start, _status("VmHWM") - before
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        print(json.dumps([outcome, reason, seconds, peak]), file=out, flush=True)


if __name__ == "__main__":
    _serve()
