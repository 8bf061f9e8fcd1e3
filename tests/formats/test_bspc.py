import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx as cx
from compressx import formats
from compressx.formats import CompressedFileError, Packed
from compressx.formats.base import index_dtype, same


def hard(constraint, shape, seed=0):
    w = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    structure = constraint.init(w)
    return np.asarray(jax.jit(constraint.project)(w, structure)), structure


def blocks(packed):
    """(outputs, inputs) of every block, read apart from the format's own reader."""
    a = packed.arrays
    return [
        (a["reorder"][r0:r1].tolist(), a["column"][c0:c1].tolist())
        for r0, r1, c0, c1 in zip(a["offset"][:-1], a["offset"][1:], a["stride"][:-1], a["stride"][1:], strict=True)
    ]


CASES = {
    "columns": (cx.bsp_columns(0.2, strips=4), (40, 30)),
    "columns balanced": (cx.bsp_columns(0.25, strips=3, blocks=2), (40, 30)),
    "rows": (cx.bsp_rows(keep=7, strips=4), (39, 32)),
    "both": (cx.bsp(0.25, 0.5, column_strips=4, row_strips=2), (39, 32)),
    "chain": (cx.bsp_columns(0.25) & cx.bsp_rows(0.5, strips=2), (300, 20)),
    "conv": (cx.bsp(0.25, 0.5), (3, 3, 6, 16)),
    "unstructured": (cx.unstructured(0.1), (20, 30)),
    "dense": (cx.unstructured(1.0), (5, 4)),
}


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_round_trip_and_bytes(name, known):
    constraint, shape = CASES[name]
    w, structure = hard(constraint, shape)
    packed = formats.pack(w, *((constraint, structure) if known else ()), format="bspc")
    assert same(formats.unpack(packed), w)
    filters, positions = shape[-1], w.size // shape[-1]
    listed = blocks(packed)
    expected = 8 * (len(listed) + 1)
    expected += sum(len(c) for _, c in listed) * index_dtype(positions).itemsize
    expected += sum(len(r) for r, _ in listed) * index_dtype(filters).itemsize
    expected += 4 * sum(len(r) * len(c) for r, c in listed)
    assert formats.nbytes(packed) == expected
    assert [len(c) for _, c in listed] == sorted((len(c) for _, c in listed), reverse=True)
    m = w.reshape(-1, filters)
    if not known:
        for outputs, inputs in listed:
            assert all(np.flatnonzero(m[:, o]).tolist() == inputs for o in outputs)
        assert len({tuple(c) for _, c in listed}) == len(listed)


def test_index_cost_of_a_strip_is_its_rows_and_columns():
    constraint = cx.bsp_columns(keep=50, strips=4)
    w, structure = hard(constraint, (1024, 512))
    packed = formats.pack(w, constraint, structure, format="bspc")
    assert sorted(len(r) for r, _ in blocks(packed)) == [128] * 4
    assert {len(c) for _, c in blocks(packed)} == {50}
    index = formats.nbytes(packed) - packed.arrays["weight"].nbytes
    assert index == 2 * 4 * (50 + 128) + 2 * 4 * 5
    csr = formats.pack(w, format="csr")
    assert packed.arrays["weight"].size == csr.arrays["values"].size  # no stored zeros
    assert index < 0.02 * (csr.arrays["indices"].nbytes + csr.arrays["indptr"].nbytes)
    assert formats.pack(w, constraint, structure).format == "bspc"


def test_two_steps_leave_one_dense_block_a_tile():
    constraint = cx.bsp(keep_columns=16, keep_rows=24, column_strips=4, row_strips=2)
    w, structure = hard(constraint, (64, 48))
    packed = formats.pack(w, constraint, structure, format="bspc")
    assert len(blocks(packed)) <= 8
    assert packed.arrays["weight"].size == np.count_nonzero(w)


def test_zero_and_signed_zero_weights():
    w = np.zeros((6, 5), np.float32)
    assert blocks(formats.pack(w, format="bspc")) == [] and same(formats.unpack(formats.pack(w, format="bspc")), w)
    w[2, 3] = -0.0
    packed = formats.pack(w, cx.bsp_columns(0.5, strips=2), (), format="bspc")
    assert blocks(packed) == [([3], [2])] and same(formats.unpack(packed), w)


W = np.zeros((5, 6), np.float32)
W[np.ix_([0, 3], [1, 2])] = [[1, 2], [3, 4]]
W[np.ix_([1, 2, 4], [0, 5])] = 7
PACKED = formats.pack(W, format="bspc")


def edit(name, index, value):
    array = PACKED.arrays[name].copy()
    array[index] = value
    return PACKED._replace(arrays={**PACKED.arrays, name: array})


def overlap():
    ones = np.ones(4, np.float32)
    arrays = {
        "stride": np.array([0, 2, 4], np.uint32),
        "column": np.array([0, 1, 0, 1], np.uint8),
        "offset": np.array([0, 1, 2], np.uint32),
        "reorder": np.array([3, 3], np.uint8),
        "weight": ones,
    }
    return Packed("bspc", (5, 6), "float32", arrays, {})


DAMAGE = {
    "stride": (lambda: edit("stride", 1, 9), "bspc/stride: offsets"),
    "offset": (lambda: edit("offset", -1, 9), "bspc/offset: offsets"),
    "column": (lambda: edit("column", 0, 5), "bspc/column: values"),
    "column order": (lambda: edit("column", 0, 4), "bspc/column: the ids of a block"),
    "reorder": (lambda: edit("reorder", 0, 6), "bspc/reorder: values"),
    "reorder twice": (lambda: edit("reorder", 0, PACKED.arrays["reorder"][1]), "bspc/reorder: the ids of a block"),
    "weight": (
        lambda: PACKED._replace(arrays={**PACKED.arrays, "weight": PACKED.arrays["weight"][1:]}),
        "bspc/weight: 9 weights",
    ),
    "overlap": (overlap, "bspc: blocks overlap"),
    "shape": (lambda: PACKED._replace(shape=(30,)), "bspc: shape"),
    "empty": (lambda: PACKED._replace(shape=(1 << 40, 1 << 40, 0, 3)), "bspc: shape"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case):
    make, message = DAMAGE[case]
    with pytest.raises(CompressedFileError, match=message):
        formats.unpack(make())


@settings(max_examples=300)
@given(data=st.data())
def test_mutations_unpack_to_a_weight_or_one_error(data):
    packed = PACKED
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(packed.arrays)))
        array = packed.arrays[name].copy()
        kind = data.draw(st.sampled_from(["bytes", "cut", "shape"]))
        if kind == "bytes" and array.nbytes:
            raw = array.view(np.uint8).reshape(-1)
            raw[data.draw(st.integers(0, raw.size - 1))] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            array = array[: data.draw(st.integers(0, len(array)))]
        else:
            packed = packed._replace(shape=tuple(data.draw(st.lists(st.integers(0, 1 << 40), max_size=4))))
        packed = packed._replace(arrays={**packed.arrays, name: array})
    try:
        back = formats.unpack(packed, max_bytes=1 << 20)
    except CompressedFileError:
        return
    assert back.shape == packed.shape
