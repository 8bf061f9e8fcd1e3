"""Files from others: whatever is in one, opening it takes bounded memory and time, and ends in a model or one error."""

import json
import os
import random
import re
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import compressx as cx
from compressx import formats
from compressx.formats import FORMATS, CompressedFileError, Packed, container
from compressx.formats.base import dtype_of, extent
from tests.formats import hostile
from tests.formats.hostile import Opener, Source, forge

_MB = 1 << 20
# Beside four times max_bytes: what Python, NumPy's pieces and JAX's traces take for small files, and for long headers.
SMALL, WHOLE = 96 * _MB, 512 * _MB
# A loaded machine doubles processor time.
_PATIENCE = 3


def bound(size: int, max_bytes: int) -> float:
    """Processor seconds that `load_model` promises for a file of so many bytes."""
    return 2 + 1e-7 * (size + max_bytes)


@pytest.fixture(scope="module")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., hostile.Seen]]:
    """Gives a function that opens a file in another process, which is started anew where it has died."""
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not measure the peak of a process's memory anew (/proc/self/clear_refs)")
    harmless = tmp_path_factory.mktemp("harmless") / "f"
    forge(harmless, *hostile.ruled(hostile.SPECS[0]))
    with Opener() as process:
        assert process.open(harmless, 1 << 24, 1 << 32).outcome == "loaded", "a forged file that is harmless must load"
        yield process.open


def _look(opener: Callable[..., hostile.Seen], path: Path, max_bytes: int, peak: int, verify: bool = False) -> str:
    """Opens a file within the bounds; what came of it."""
    seen = opener(path, max_bytes, (8 if verify else 4) * max_bytes + 2 * WHOLE, verify)
    assert seen.outcome in ("loaded", "refused"), f"{seen.outcome}: {seen.reason}"
    if not verify:
        assert seen.peak <= 4 * max_bytes + peak, f"{seen.peak / _MB:.0f} MiB, max_bytes {max_bytes / _MB:.0f} MiB"
        limit = _PATIENCE * bound(path.stat().st_size, max_bytes)
        assert seen.seconds <= limit, f"{seen.seconds:.1f} s, {path.stat().st_size} bytes"
    return seen.reason if seen.outcome == "refused" else "loaded"


def _many(opener: Callable[..., hostile.Seen], folder: Path, number: int, verified: float) -> dict[str, int]:
    seed = int(
        os.environ.get("COMPRESSX_HOSTILE_SEED", 0 if os.environ.get("CI") else random.SystemRandom().getrandbits(32))
    )
    print(f"COMPRESSX_HOSTILE_SEED={seed}")
    counts = {"loaded": 0, "refused": 0}
    for i in range(number):
        r = random.Random(f"{seed} {i}")
        max_bytes = r.choice([1 << 20, 1 << 22, 1 << 24])
        path = folder / "f"
        hostile.write(path, r, max_bytes)
        print(f"file {i}")
        long = path.stat().st_size > _MB
        came = _look(opener, path, max_bytes, WHOLE if long else SMALL, r.random() < verified)
        counts["loaded" if came == "loaded" else "refused"] += 1
    return counts


def test_hostile_files_load_or_are_refused_in_bounded_memory_and_time(opener: Any, tmp_path: Path) -> None:
    counts = _many(opener, tmp_path, 80, 0.0)
    assert min(counts.values()) > 0, counts


@pytest.mark.slow
def test_thousands_of_hostile_files_load_or_are_refused_in_bounded_memory_and_time(opener: Any, tmp_path: Path) -> None:
    _many(opener, tmp_path, 3000, 0.03)


@pytest.mark.parametrize("format", FORMATS)
def test_unpacking_takes_no_more_on_the_way_than_the_format_says(format: str) -> None:
    r, max_bytes = random.Random(format), 1 << 22
    for _ in range(3):
        s = hostile.large(r, max_bytes, format)
        leaf = s.header["content"]["leaves"][0]
        held = container._decode_all(dict(s.header["arrays"]), dict(s.arrays), 1 << 40)
        arrays = {key: held[name] for key, name in leaf["arrays"].items()}
        packed = Packed(format, tuple(leaf["shape"]), leaf["dtype"], arrays, leaf["meta"])
        size = extent(packed) * dtype_of(packed).itemsize
        tracemalloc.start()
        try:
            formats.unpack(packed, max_bytes, 1 << 40)
        except CompressedFileError:
            size = min(size, max_bytes)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= size + FORMATS[format].workspace(packed) + 12 * _MB, (
            f"{packed.shape} {packed.dtype} {packed.meta}"
        )


# --- files with a purpose


def _rule(spec: dict[str, Any], shape: tuple[int, ...] = (8, 8)) -> Source:
    s = hostile.ruled(hostile.SPECS[0], shape)
    s.header["content"]["rules"][0]["spec"] = spec
    return s


def _rules(specs: list[dict[str, Any]], widths: list[int]) -> Source:
    leaves = {f"k{i}": hostile._zeros((4, w)) for i, w in enumerate(widths)}
    rules = [{"paths": [n], "spec": s, "structure": []} for n, s in zip(leaves, specs, strict=True)]
    return hostile._source(leaves, rules)


def _streams(number: int) -> Source:
    """A leaf of zeros whose coded bytes are several streams one after the other."""
    s = hostile._source({"k": Packed("dense", (1 << 20,), "uint8", {"values": np.zeros(1 << 20, np.uint8)}, {})})
    s.arrays["k:values"] = np.frombuffer(zlib.compress(bytes(1 << 20)) * number, np.uint8)
    return s


def _shared(number: int) -> Source:
    """Many leaves that name one array."""
    s = hostile._source({"k0": Packed("dense", (1 << 18,), "float32", {"values": np.zeros(1 << 18, np.float32)}, {})})
    first = s.header["content"]["leaves"][0]
    s.header["content"]["leaves"] += [{**first, "path": f"k{i}"} for i in range(1, number)]
    return s


def _extra(text: str) -> tuple[Source, str]:
    s = hostile.ruled(hostile.SPECS[0])
    return s, json.dumps(s.header).replace('"extra": [1]', f'"extra": {text}')


_UNSTRUCTURED = hostile.SPECS[0]
_MEMBER = {"makes": 0, "makes_units": [[0, 8]], "reads": None, "reads_units": None, "columns": None}
_NETWORK = {"kind": "network_structure", "members": [_MEMBER], "groups": [[0, 8, 2]], "selection": "energy", "seed": 0}
_COUPLED = {"kind": "coupled_filters", "density": 0.5, "keep": None, "column_density": None}
SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "a run longer than the leaf": (
        _COUPLED | {"members": [[0, [[0, 30_000_000]]]]},
        "30000000 channels on axis 0 does",
    ),
    "a run of 64 bits": (_COUPLED | {"members": [[0, [[0, 1 << 62]]]]}, "does not fit"),
    "runs that leave units out": (_COUPLED | {"members": [[0, [[1 << 40, 8]]]]}, "missing are 0\\.\\."),
    "a run without a length": (_COUPLED | {"members": [[0, [[0, 8], [8, 0]]]]}, "a run must be"),
    "more members than leaves": (_COUPLED | {"members": [[0, [[0, 8]]]] * 1000}, "1000 members"),
    "a group longer than the leaf": (_NETWORK | {"groups": [[0, 1 << 33, 2]]}, "more than 1 members can make"),
    "units beyond the leaf": (
        _NETWORK | {"groups": [[0, 1 << 33, 2]], "members": [_MEMBER | {"makes_units": [[0, 1 << 33]]}]},
        "is not \\(8, 8\\)",
    ),
    "thousands of groups": (_NETWORK | {"groups": [[i, 1, 1] for i in range(5000)]}, "more than 1 members"),
    "an axis from the end": (_NETWORK | {"members": [_MEMBER | {"makes": -1}]}, "is not \\(8, 8\\)"),
    "an intersection of hundreds": ({"kind": "all", "parts": [_UNSTRUCTURED] * 400}, "a list of 1 to 32 parts"),
    "an intersection of nothing": ({"kind": "all", "parts": []}, "a list of 1 to 32 parts"),
    "intersections of intersections": (
        {"kind": "all", "parts": [{"kind": "all", "parts": [_UNSTRUCTURED]}]},
        "single sets",
    ),
    "a pattern longer than the kernel": ({"kind": "pattern", "kernel": [1 << 20, 1 << 20]}, "too large for patterns"),
    "all patterns of a large kernel": (
        {"kind": "pattern", "kernel": [31, 33], "entries": 1022},
        "does not fit|needs a conv",
    ),
    "a block beyond the leaf": (
        {"kind": "block", "block": [1 << 40, 1 << 40], "keep": 1},
        "does not fit|projecting onto",
    ),
    "a block of megabytes": ({"kind": "block", "block": [1 << 13, 1 << 13], "keep": 1}, "projecting onto"),
    "a fragment beyond the leaf": ({"kind": "polarize", "fragment": 1 << 40}, "does not fit|projecting onto"),
    "a bank beyond 64 bits": (
        {"kind": "bank_balanced", "density": 0.5, "bank": 1 << 63},
        "bank=.* is not of the type int",
    ),
    "a bool for a number": ({"kind": "unstructured", "keep": True}, "keep=True is not of the type int"),
    "a string for a number": ({"kind": "unstructured", "density": "0.5"}, "density='0.5' is not of the type float"),
    "a number for a string": ({"kind": "unstructured", "density": 0.5, "scope": 1}, "scope=1 is not of the type str"),
    "a fraction for an integer": ({"kind": "n_of_m", "n": 2.0, "m": 4}, "n=2.0 is not of the type int"),
    "a block of three": ({"kind": "block", "block": [2, 2, 2], "keep": 1}, "block=\\[2, 2, 2\\] is not of the type"),
    "a callback of millions": (
        {
            "kind": "unify_and_prune",
            "block": [1, 1],
            "unify_fraction": 0.3,
            "prune_fraction": 0.3,
            "selection": "exact",
        },
        "loaded",
    ),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_rule_that_its_leaves_do_not_allow_is_refused_before_it_costs(case: str, opener: Any, tmp_path: Path) -> None:
    spec, message = SPECS[case]
    forge(tmp_path / "f", *_rule(spec))
    seen = opener(tmp_path / "f", 1 << 24, WHOLE)
    assert re.search(message, seen.reason or seen.outcome), seen
    assert seen.outcome == ("loaded" if message == "loaded" else "refused")
    assert seen.peak < SMALL
    assert seen.seconds < _PATIENCE


FILES: dict[str, Callable[[], tuple[Source, str | None]]] = {
    "a callback of millions": lambda: (_rule(SPECS["a callback of millions"][0], (1024, 2048)), None),
    "leaves that share an array": lambda: (_shared(1000), None),
    "two streams in one array": lambda: (_streams(2), None),
    "lists without end": lambda: _extra("[" + "[]," * 4_000_000 + "0]"),
    "lists in lists": lambda: _extra("[" * 5000 + "]" * 5000),
    "a long number": lambda: _extra("1" + "0" * 4000),
    "many long numbers": lambda: _extra("[" + ",".join(["9" * 4000] * 3000) + "]"),
    "commas that are hidden": lambda: _extra("[" + "0\\u002c" * 2_000_000 + "0]"),
    "rules that all differ": lambda: (_rules([_UNSTRUCTURED | {"density": 0.9}] * 900, list(range(1, 901))), None),
    "codebooks that all differ": lambda: (
        _rules([{"kind": "quantize", "bits": 8, "grid": "codebook"}] * 60, list(range(1, 61))),
        None,
    ),
    "a rule over thousands": lambda: (
        hostile._source(
            {f"k{i}": hostile._zeros((2, 2)) for i in range(4000)},
            [{"paths": [f"k{i}" for i in range(4000)], "spec": hostile.SPECS[1], "structure": []}],
        ),
        None,
    ),
    "more leaves than can be": lambda: (hostile._source({f"k{i}": hostile._zeros((1,)) for i in range(8193)}), None),
}


@pytest.mark.parametrize("case", FILES)
def test_counts_and_nesting_are_bounded(case: str, opener: Any, tmp_path: Path) -> None:
    source, text = FILES[case]()
    forge(tmp_path / "f", *source, text)
    assert _look(opener, tmp_path / "f", 1 << 24, WHOLE) != "loaded"


def test_thousands_of_rules_that_are_alike_are_read(opener: Any, tmp_path: Path) -> None:
    forge(tmp_path / "f", *_rules([_UNSTRUCTURED] * 3000, [8] * 3000))
    assert _look(opener, tmp_path / "f", 1 << 24, WHOLE) == "loaded"


@pytest.mark.parametrize("sets", [["filters", "bsp_columns"], ["unstructured", "quantize"]])
def test_a_joint_rule_is_read_with_the_structure_of_each_leaf(sets: list[str], tmp_path: Path) -> None:
    of = {
        "filters": cx.filters(0.5),
        "bsp_columns": cx.bsp_columns(0.5, strips=2, scope="rule"),
        "unstructured": cx.unstructured(0.5, scope="rule"),
        "quantize": cx.quantize(4, per="channel"),
    }
    constraint = of[sets[0]] & of[sets[1]]
    params = {"a": np.ones((4, 8), np.float32), "b": np.ones((4, 6), np.float32)}
    structures = {".*": constraint.init((params["a"], params["b"]))}
    leaves = {k: formats.pack(w) for k, w in params.items()}
    arrays = {f"rule 0:{i}": np.asarray(x) for i, x in enumerate(jax.tree.leaves(structures))}
    rule = {"paths": ["b", "a"], "spec": dict(constraint.spec), "structure": list(arrays)}
    forge(tmp_path / "f", *hostile._source(leaves, [rule], arrays))
    back = formats.load_model(tmp_path / "f", 1 << 20)
    assert [b.paths for b in back.bound] == [("a", "b")] and [b.indices for b in back.bound] == [(0, 1)]
    (name,) = back.structures
    assert name == "a|b" == back.rules[0][0]
    assert jax.tree.structure(back.structures[name]) == jax.tree.structure(structures[".*"])
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(back.structures), arrays.values(), strict=True))
    assert cx.rules.resolve(back.rules, back.params)[0][:3] == back.bound[0][:3]


@pytest.mark.parametrize("max_bytes", [0, -1, True, 1.0, "1"])
def test_a_limit_that_is_none_is_refused(max_bytes: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_bytes must be a positive integer"):
        formats.load_model(tmp_path / "f", max_bytes)
