import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx as cx
from compressx import formats
from compressx.formats import CompressedFileError
from compressx.formats.base import nonzero, same
from compressx.formats.fkw import assign_patterns, kernel_array, reorder_filters


def hard(constraint, shape, seed=0, dtype=np.float32):
    """A projected weight and the structure it was projected with."""
    w = jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    structure = jax.jit(constraint.init)(w)
    return np.asarray(jax.jit(constraint.project)(w, structure)), structure


def packed_layer(cin, cout, k=8, rate=3.6):
    constraint = cx.pattern_connectivity(1 / rate, k=k)
    w, structure = hard(constraint, (3, 3, cin, cout))
    return w, formats.pack(w, constraint, structure, format="fkw")


def index_bytes(packed, *values):
    return sum(a.nbytes for name, a in packed.arrays.items() if name not in values)


@pytest.mark.parametrize(
    ("size", "index", "saved", "total"), [(512, 157_928, 86.5, 43.3), (64, None, 79.3, 40.0)], ids=["512x512", "64x64"]
)
def test_index_bytes_of_the_papers_layers(size, index, saved, total):
    w, packed = packed_layer(size, size)
    kernels = round(size * size / 3.6)
    expected = 4 * (size + 1) + 2 * size + 2 * kernels + 2 * size * 9
    csr = formats.pack(w, format="csr")
    assert csr.arrays["values"].size == 4 * kernels
    assert index_bytes(packed, "weight") == expected == (index or expected)
    assert packed.arrays["weight"].nbytes == 16 * kernels
    assert 100 * (1 - expected / index_bytes(csr, "values")) == pytest.approx(saved, abs=0.06)
    assert 100 * (1 - formats.nbytes(packed) / formats.nbytes(csr)) == pytest.approx(total, abs=0.06)
    assert same(formats.unpack(packed), w)


CASES = {
    "natural": (cx.pattern_connectivity(0.3, k=8), (3, 3, 12, 10)),
    "balanced": (cx.pattern_connectivity(0.5, balance="filter", library="elog"), (3, 3, 8, 10)),
    "pattern only": (cx.pattern("scp"), (3, 3, 5, 7)),
    "intersection": (cx.pattern("group", k=4) & cx.connectivity(0.4), (3, 3, 6, 7)),
    "shrunk": (cx.pattern("all", k=8, shrink=[8]), (3, 3, 9, 9)),
    "connectivity": (cx.connectivity(0.3), (5, 5, 6, 7)),
    "1x1": (cx.connectivity(0.3), (1, 1, 9, 11)),
    "unstructured": (cx.unstructured(0.1), (2, 2, 9, 11)),
}


@functools.cache
def made(name):
    """A case's weight and its structure."""
    constraint, shape = CASES[name]
    w, structure = hard(constraint, shape)
    if name == "shrunk":
        structure = jax.jit(constraint.refresh)(w, structure)
    return np.asarray(jax.jit(constraint.project)(jnp.asarray(w), structure)), structure


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("known", [True, False])
def test_round_trip_and_layout(name, known):
    constraint, shape = CASES[name]
    w, structure = made(name)
    w = np.array(w)
    if name == "unstructured":
        w[0, 0] = 0  # so that three taps are left and every kernel lies in one pattern
        w[0, 1, 0, 0], w[1, 0, 0, 0], w[1, 1, 0, 0] = 1, 2, 3
    packed = formats.pack(w, constraint if known else None, structure if known else None, format="fkw")
    assert same(formats.unpack(packed), w)
    kernels = nonzero(kernel_array(w))
    order, offset, stride = (packed.arrays[n].astype(int) for n in ("reorder", "offset", "stride"))
    entries = len(packed.meta["patterns"][0])
    alive = int(kernels.any(axis=2).sum())
    cout, patterns = shape[-1], len(packed.meta["patterns"])
    assert (
        formats.nbytes(packed)
        == 4 * (cout + 1) + 2 * cout + 2 * alive + 2 * cout * (patterns + 1) + 4 * entries * alive
    )
    assert sorted(order) == list(range(cout))
    lengths = np.diff(offset)
    assert (lengths == kernels.any(axis=2).sum(axis=1)[order]).all() and (np.diff(lengths) <= 0).all()
    assert (stride[:, 0] == 0).all() and (stride[:, -1] == lengths).all()
    for f in range(
        cout
    ):  # kernels sorted by pattern: at most P - 1 switches, and each lies in the pattern it is filed under
        for p in range(patterns):
            for k in range(offset[f] + stride[f, p], offset[f] + stride[f, p + 1]):
                kept = np.flatnonzero(kernels[order[f], packed.arrays["index"][k]])
                assert set(kept) <= set(packed.meta["patterns"][p])


def test_reordering_brings_like_filters_together(rng):
    ids = rng.integers(-1, 4, (40, 30))
    ids = np.concatenate([ids, ids])[rng.permutation(80)]  # every filter has a twin
    order = reorder_filters(ids)
    length = (ids >= 0).sum(axis=1)
    assert sorted(order) == list(range(80)) and (np.diff(length[order]) <= 0).all()
    by_length = np.argsort(-length, kind="stable")

    def similarity(ids):  # input channels at which neighbouring filters carry the same pattern
        return int(((ids[1:] == ids[:-1]) & (ids[1:] >= 0)).sum())

    assert similarity(ids[order]) > similarity(ids[by_length]) >= 0
    assert similarity(ids[order]) > similarity(ids)
    pairs = sum(np.array_equal(a, b) for a, b in itertools.pairwise(ids[order]))
    assert pairs == 40


def test_reordered_convolution_is_the_masked_one():
    w, packed = packed_layer(6, 9)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2, 7, 7, 6)), jnp.float32)

    def conv(w):
        return jax.lax.conv_general_dilated(
            x, jnp.asarray(w), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    order = packed.arrays["reorder"].astype(int)
    back = np.empty((2, 7, 7, 9), np.float32)
    back[..., order] = conv(w[..., order])
    np.testing.assert_allclose(back, conv(w), rtol=1e-6, atol=1e-6)


def test_low_precision_and_kept_zeros_are_exact():
    w, structure = hard(cx.pattern("elog"), (3, 3, 4, 4), dtype=jnp.bfloat16)
    w = w.copy()
    w[w != 0] = np.where(np.arange((w != 0).sum()) % 3 == 0, np.asarray(-0.0, w.dtype), w[w != 0])
    packed = formats.pack(w, cx.pattern("elog"), structure, format="fkw")
    assert packed.arrays["weight"].dtype == w.dtype and same(formats.unpack(packed), w)


def test_what_does_not_fit_says_why():
    w = np.ones((3, 3, 2, 2), np.float32)
    constraint = cx.pattern("elog")
    with pytest.raises(ValueError, match=r"kernel \(cin=0, cout=0\) keeps taps \[0, 1, 2"):
        formats.pack(w, constraint, constraint.init(jnp.asarray(w)), format="fkw")
    with pytest.raises(ValueError, match="no kernel is alive"):
        formats.pack(np.zeros_like(w), format="fkw")
    with pytest.raises(ValueError, match="needs at least 4 axes"):
        formats.pack(np.ones((4, 4), np.float32), format="fkw")
    with pytest.raises(ValueError, match="62 taps"):
        formats.pack(np.ones((8, 8, 1, 1), np.float32), format="fkw")
    with pytest.raises(ValueError, match="no weights"):
        formats.pack(np.ones((3, 3, 0, 1), np.float32), format="fkw")
    assert (assign_patterns(nonzero(kernel_array(w)), np.ones((1, 9), bool)) == 0).all()


@functools.cache
def small():
    """A packed layer to damage, made when the first test asks: every worker of a run imports this file."""
    return packed_layer(4, 5, k=3, rate=2)[1]


def edit(name, index, value):
    array = small().arrays[name].copy()
    array[index] = value
    return small()._replace(arrays={**small().arrays, name: array})


DAMAGE = {
    "offset": (lambda: edit("offset", 1, 11), "fkw/offset: offsets"),
    "reorder": (lambda: edit("reorder", 0, small().arrays["reorder"][1]), "fkw/reorder: is not a permutation"),
    "reorder range": (lambda: edit("reorder", 0, 5), "fkw/reorder: is not a permutation"),
    "index": (lambda: edit("index", 0, 4), "fkw/index: values"),
    "index twice": (lambda: edit("index", 0, small().arrays["index"][1]), "fkw/index: a filter has"),
    "stride": (lambda: edit("stride", (0, -1), 9), "fkw/stride: rows"),
    "stride start": (lambda: edit("stride", (0, 0), 1), "fkw/stride: rows"),
    "weight": (
        lambda: small()._replace(arrays={**small().arrays, "weight": small().arrays["weight"][:, :3]}),
        r"fkw/weight: shape \[10, 3\], expected \[10, 4\]",
    ),
    "shape": (lambda: small()._replace(shape=(3, 3, 4)), "fkw: shape"),
    "taps": (lambda: small()._replace(shape=(2, 2, 4, 5)), "fkw/patterns: .* leaves the 4 taps"),
    "no patterns": (lambda: small()._replace(meta={}), "fkw/patterns: not a list"),
    "pattern": (lambda: small()._replace(meta={"patterns": [[1, 0, 2, 3]]}), "does not ascend"),
    "pattern type": (lambda: small()._replace(meta={"patterns": [[0, 1, 2, "3"]]}), "does not ascend"),
    "pattern length": (lambda: small()._replace(meta={"patterns": [[0, 1], [0]]}), "as long as the others"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case):
    make, message = DAMAGE[case]
    with pytest.raises(CompressedFileError, match=message):
        formats.unpack(make())


@settings(max_examples=300)
@given(data=st.data())
def test_mutations_unpack_to_a_weight_or_one_error(data):
    packed = small()
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(packed.arrays)))
        array = packed.arrays[name].copy()
        kind = data.draw(st.sampled_from(["bytes", "cut", "shape", "meta"]))
        if kind == "bytes" and array.nbytes:
            raw = array.view(np.uint8).reshape(-1)
            raw[data.draw(st.integers(0, raw.size - 1))] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            array = array[: data.draw(st.integers(0, len(array)))]
        elif kind == "shape":
            packed = packed._replace(shape=tuple(data.draw(st.lists(st.integers(0, 1 << 40), max_size=5))))
        else:
            json = st.recursive(st.none() | st.integers() | st.text(max_size=2), lambda s: st.lists(s, max_size=4))
            packed = packed._replace(meta={"patterns": data.draw(json)})
        packed = packed._replace(arrays={**packed.arrays, name: array})
    try:
        back = formats.unpack(packed, max_bytes=1 << 20)
    except CompressedFileError:
        return
    assert back.shape == packed.shape
