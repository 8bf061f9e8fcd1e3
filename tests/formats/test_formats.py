"""The contract of all formats that need no constraint: exact inverses, exact bytes, nothing believed when read."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressx import formats
from compressx.formats import CompressedFileError, Packed
from compressx.formats.base import COMPUTED, DTYPES, check_offsets, filters_first, index_dtype, nonzero, same

FREE = ("dense", "compact", "bitmask", "csr", "csr16", "coo-delta")


@st.composite
def weights(draw: st.DrawFn, least: int = 0, dtypes: tuple[str, ...] = COMPUTED) -> np.ndarray:
    """Any bits at all (NaN with payloads, negative zeros), zeros in runs, any dtype, empty axes and scalars too."""
    shape = tuple(draw(st.lists(st.integers(0, 6), min_size=least, max_size=4)))
    dtype = DTYPES[draw(st.sampled_from(dtypes))]
    r = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = math.prod(shape)
    raw = r.integers(0, 256, n * dtype.itemsize, np.uint8)
    w = (raw % 2).astype(bool) if dtype.kind == "b" else raw.view(dtype)
    w = np.where(r.random(n) < draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])), w, np.zeros((), dtype))
    if n and dtype.name in ("float32", "bfloat16"):
        w[r.integers(n)] = dtype.type(-0.0)
    w = w.reshape(shape)
    if draw(st.booleans()) and w.ndim >= 2:
        w = np.where(r.random(shape[-1]) < 0.5, w, np.zeros((), dtype))
    return w


@pytest.mark.parametrize("name", FREE)
@settings(max_examples=100)
@given(w=weights())
def test_pack_and_unpack_are_exact_inverses(name: str, w: np.ndarray) -> None:
    if formats.FORMATS[name].supports(w, None) is not True:
        assert w.ndim < 2
        with pytest.raises(ValueError, match="needs at least 2 axes"):
            formats.pack(w, format=name)
        return
    packed = formats.pack(w, format=name)
    assert packed.format == name and packed.shape == w.shape and packed.dtype == w.dtype.name
    back = formats.unpack(packed)
    assert back.dtype == w.dtype and back.shape == w.shape and back.tobytes() == w.tobytes()


def _loop_bits(w: np.ndarray) -> int:
    size = w.dtype.itemsize
    raw = np.ascontiguousarray(w).tobytes()
    return sum(any(raw[i : i + size]) for i in range(0, len(raw), size))


@settings(max_examples=100)
@given(w=weights(least=2))
def test_bytes_are_the_formulas(w: np.ndarray) -> None:
    nnz, v, n = _loop_bits(w), w.dtype.itemsize, w.size
    positions, filters = math.prod(w.shape[:-1]), w.shape[-1]
    size = {name: formats.nbytes(formats.pack(w, format=name)) for name in FREE}
    assert size["dense"] == n * v
    assert size["bitmask"] == math.ceil(n / 8) + nnz * v
    assert size["csr"] == 4 * nnz + 4 * (filters + 1) + nnz * v
    assert size["csr16"] == 2 * nnz + 4 * (filters + 1) + nnz * v
    m = nonzero(w).reshape(positions, filters)
    p, f = sum(row.any() for row in m), sum(column.any() for column in m.T)
    assert size["compact"] == p * f * v + (p if p < positions else 0) + (f if f < filters else 0)
    assert size["coo-delta"] == _delta_bytes(nonzero(w).reshape(-1).tolist()) + nnz * v
    chosen = formats.pack(w)
    assert formats.nbytes(chosen) <= min(formats.nbytes(formats.pack(w, format=name)) for name in FREE)


def _delta_bytes(mask: list[bool]) -> int:
    """Codes counted one by one, for every width."""
    best = None
    for width in range(1, 17):
        escape, codes, zeros = 2**width - 1, 0, 0
        for kept in mask:
            if kept:
                while zeros >= escape:
                    codes, zeros = codes + 1, zeros - escape
                codes, zeros = codes + 1, 0
            else:
                zeros += 1
        size = math.ceil(codes * width / 8)
        best = size if best is None else min(best, size)
    assert best is not None
    return best


def test_csr_takes_the_bytes_of_the_papers_on_the_512_by_512_layer(rng: np.random.Generator) -> None:
    """PatDNN's example: 3x3 kernels, 72,818 of 262,144 kernels stay with 4 weights each: 1,167,140 bytes of index."""
    nnz = 291_272
    w = np.zeros(9 * 512 * 512, np.float32)
    w[rng.permutation(w.size)[:nnz]] = 1.5
    packed = formats.pack(w.reshape(3, 3, 512, 512), format="csr")
    assert packed.arrays["indptr"].nbytes + packed.arrays["indices"].nbytes == 1_167_140
    assert formats.nbytes(packed) == 1_167_140 + 4 * nnz
    sixteen = formats.pack(w.reshape(3, 3, 512, 512), format="csr16")
    assert formats.nbytes(packed) - formats.nbytes(sixteen) == 2 * nnz


def test_csr_rows_are_filters(rng: np.random.Generator) -> None:
    w = np.where(rng.random((3, 3, 4, 5)) < 0.3, rng.normal(size=(3, 3, 4, 5)), 0).astype(np.float32)
    packed = formats.pack(w, format="csr")
    k = 0
    for f in range(5):
        for i in range(3):
            for j in range(3):
                for c in range(4):
                    if w[i, j, c, f] != 0:
                        assert packed.arrays["indices"][k] == (i * 3 + j) * 4 + c
                        assert packed.arrays["values"][k] == w[i, j, c, f]
                        k += 1
        assert packed.arrays["indptr"][f + 1] == k


def test_csr16_says_when_positions_do_not_fit() -> None:
    wide = np.zeros((65_537, 1), np.float32)
    with pytest.raises(ValueError, match="65537 positions need more than 16 bits"):
        formats.pack(wide, format="csr16")
    edge = np.zeros((65_536, 1), np.float32)
    edge[65_535] = 1.0
    assert formats.pack(edge, format="csr16").arrays["indices"].tolist() == [65_535]


def test_delta_escapes_bridge_long_gaps() -> None:
    w = np.zeros(300_000, np.float32)
    w[[0, 1, 70_000, 299_998]] = 1.0
    packed = formats.pack(w, format="coo-delta")
    assert same(formats.unpack(packed), w)
    assert formats.nbytes(packed) == _delta_bytes((w != 0).tolist()) + 4 * 4


def test_compact_keeps_a_smaller_dense_matrix(rng: np.random.Generator) -> None:
    w = rng.normal(size=(5, 5, 20, 50)).astype(np.float32)
    positions, filters = rng.permutation(500)[:60], rng.permutation(50)[:20]
    mask = np.zeros((500, 50), bool)
    mask[np.ix_(positions, filters)] = True
    w = np.where(mask.reshape(w.shape), w, np.float32(0))
    packed = formats.pack(w, format="compact")
    assert packed.arrays["matrix"].shape == (60, 20)
    assert formats.nbytes(packed) == 60 * 20 * 4 + 60 * 2 + 20
    assert formats.pack(w).format == "compact"


def test_bfloat16_values_stay_bfloat16(rng: np.random.Generator) -> None:
    w = rng.normal(size=(8, 8)).astype(DTYPES["bfloat16"])
    w[rng.random((8, 8)) < 0.9] = 0
    for name in FREE:
        values = [a for a in formats.pack(w, format=name).arrays.values() if a.dtype == DTYPES["bfloat16"]]
        assert len(values) == 1


def test_what_is_asked_for_wrongly() -> None:
    with pytest.raises(ValueError, match="unknown format 'zip'; known: dense"):
        formats.pack(np.zeros((2, 2)), format="zip")
    with pytest.raises(ValueError, match="no format holds a weight of dtype complex128"):
        formats.pack(np.zeros((2, 2), np.complex128))


# --- what is read is not believed


def test_a_shape_that_unfolds_too_far_is_refused_before_anything_is_allocated() -> None:
    bomb = Packed("bitmask", (1 << 40,), "float32", {"mask": np.zeros(1, np.uint8), "values": np.zeros(0, "f4")}, {})
    with pytest.raises(CompressedFileError, match="bitmask: .*needs 4398046511104 bytes, more than max_bytes"):
        formats.unpack(bomb)
    with pytest.raises(CompressedFileError, match="more than max_bytes=10"):
        formats.unpack(formats.pack(np.zeros(3, np.float32)), max_bytes=10)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(CompressedFileError, match="pickle: unknown format"):
        formats.unpack(Packed("pickle", (), "float32", {}, {}))


def _edit(packed: Packed, name: str, change: Callable[[np.ndarray], np.ndarray | None]) -> Packed:
    arrays = dict(packed.arrays)
    new = change(arrays[name].copy())
    if new is None:
        del arrays[name]
    else:
        arrays[name] = new
    return packed._replace(arrays=arrays)


def _set(i: int, value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(a: np.ndarray) -> np.ndarray:
        a[i] = value
        return a

    return change


W = np.zeros((3, 4), np.float32)
W[0, 1], W[2, 1], W[2, 3] = 1, 2, 3
FAR = formats.pack(np.eye(1, 60, 59), format="coo-delta")

DAMAGE = {
    "dense shape": ("dense", lambda p: p._replace(shape=(4, 3)), r"dense/values: shape \[3, 4\], expected \[4, 3\]"),
    "dtype": ("dense", lambda p: p._replace(dtype="float16"), "dense/values: dtype float32, expected float16"),
    "no such dtype": ("dense", lambda p: p._replace(dtype="object"), "dense: dtype 'object' is not one of"),
    "missing": ("csr", lambda p: _edit(p, "indptr", lambda a: None), "csr/indptr: missing"),
    "extra": ("csr", lambda p: p._replace(arrays={**p.arrays, "x": W}), "csr/x: unknown array"),
    "one axis": ("csr", lambda p: p._replace(shape=(12,)), "csr: shape"),
    "column": ("csr", lambda p: _edit(p, "indices", _set(0, 3)), "csr/indices: values .* leave the range 0..2"),
    "column order": ("csr16", lambda p: _edit(p, "indices", _set(1, 0)), "csr16/indices: ids do not increase"),
    "offset order": ("csr", lambda p: _edit(p, "indptr", _set(1, 3)), "csr/indptr: offsets decrease"),
    "offset end": (
        "csr",
        lambda p: _edit(p, "indptr", _set(4, 9)),
        "csr/indptr: offsets run over 0..9, expected",
    ),
    "mask": ("bitmask", lambda p: _edit(p, "mask", _set(0, 255)), "bitmask/values: shape"),
    "mask tail": ("bitmask", lambda p: _edit(p, "mask", _set(1, 1)), "bitmask/mask: bits after the last weight"),
    "mask size": ("bitmask", lambda p: _edit(p, "mask", lambda a: a[:1]), r"bitmask/mask: shape \[1\], expected \[2\]"),
    "width": ("coo-delta", lambda p: p._replace(meta={"width": 17, "codes": 3}), "coo-delta/width: 17 is not"),
    "width type": ("coo-delta", lambda p: p._replace(meta={"width": True, "codes": 3}), "coo-delta/width: True is not"),
    "codes": ("coo-delta", lambda p: p._replace(meta={**p.meta, "codes": 1 << 60}), "coo-delta/codes: .* is not"),
    "code": (
        "coo-delta",
        lambda p: FAR._replace(shape=(59,)),
        "coo-delta/codes: values .* leave the range 0..58",
    ),
    "row": (
        "compact",
        lambda p: _edit(p, "positions", _set(1, 3)),
        "compact/positions: values 0..3 leave",
    ),
    "row twice": ("compact", lambda p: _edit(p, "positions", _set(1, 0)), "compact/positions: ids do not increase"),
    "matrix": ("compact", lambda p: _edit(p, "filters", lambda a: a[:1]), "compact/matrix: shape"),
    "compact one axis": ("compact", lambda p: p._replace(shape=(12,)), "compact: shape"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str) -> None:
    name, change, message = DAMAGE[case]
    with pytest.raises(CompressedFileError, match=message):
        formats.unpack(change(formats.pack(W, format=name)))


@pytest.mark.parametrize("name", FREE)
@settings(max_examples=200)
@given(w=weights(least=2, dtypes=("float32", "bfloat16", "uint8")), data=st.data())
def test_mutated_arrays_unpack_to_a_weight_or_one_error(name: str, w: np.ndarray, data: st.DataObject) -> None:
    packed = formats.pack(w, format=name)
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(sorted(packed.arrays)))
        kind = data.draw(st.sampled_from(["bytes", "cut", "dtype", "shape", "meta"]))
        a = packed.arrays[key]
        if kind == "bytes" and a.nbytes:
            raw = bytearray(a.tobytes())
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
            if a.dtype == bool:
                raw = bytearray(b & 1 for b in raw)
            packed = _edit(packed, key, lambda a, raw=raw: np.frombuffer(bytes(raw), a.dtype).reshape(a.shape))
        elif kind == "cut":
            packed = _edit(packed, key, lambda a: a.reshape(-1)[: data.draw(st.integers(0, a.size))])
        elif kind == "dtype":
            name = data.draw(st.sampled_from(["int64", "uint8", "float16"]))
            packed = _edit(packed, key, lambda a, name=name: np.ones(a.shape, name))
        elif kind == "shape":
            packed = packed._replace(shape=tuple(data.draw(st.lists(st.integers(0, 1 << 33), max_size=4))))
        elif kind == "meta" and packed.meta:
            field = data.draw(st.sampled_from(sorted(packed.meta)))
            value = data.draw(st.one_of(st.none(), st.integers(), st.text(max_size=3), st.floats(), st.booleans()))
            packed = packed._replace(meta={**packed.meta, field: value})
    try:
        back = formats.unpack(packed, max_bytes=1 << 20)
    except CompressedFileError:
        return
    assert back.shape == packed.shape and back.dtype.name == packed.dtype


def test_offsets_of_an_empty_list() -> None:
    check_offsets("x", np.zeros(1, np.int64), 0)
    with pytest.raises(CompressedFileError, match="x: offsets run over nothing"):
        check_offsets("x", np.zeros(0, np.int64), 0)


def test_filters_first_is_the_papers_matrix(rng: np.random.Generator) -> None:
    w = rng.normal(size=(3, 2, 4, 5))
    m = filters_first(w)
    assert m.shape == (5, 24) and m[3, (2 * 2 + 1) * 4 + 2] == w[2, 1, 2, 3]
    assert same(m.T.reshape(w.shape), w)


@pytest.mark.parametrize(
    ("high", "name"), [(0, "uint8"), (256, "uint8"), (257, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_ids_take_the_smallest_dtype(high: int, name: str) -> None:
    assert index_dtype(high).name == name
