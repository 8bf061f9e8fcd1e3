import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx as cx
from compressx import formats
from compressx.formats import CompressedFileError
from compressx.formats.base import same
from compressx.formats.block_max import row_sizes
from compressx.formats.parts import clean, pack_bits, read_bits


def hard(constraint, shape, seed=0):
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(*shape[:-1], 1)))
    w = jnp.asarray(rng.normal(size=shape) * scale, jnp.float32)

    @jax.jit
    def both(w):
        structure = constraint.init(w)
        return constraint.project(w, structure), structure

    z, structure = both(w)
    return np.asarray(z), structure


@given(st.lists(st.tuples(st.integers(0, 32), st.integers(0, 2**32 - 1)), max_size=20))
def test_bits_come_back(pairs):
    widths = np.array([w for w, _ in pairs], np.int64)
    values = np.array([v % (1 << w) for w, v in pairs], np.int64)
    packed = pack_bits(values, widths)
    expected = "".join(f"{v:0{w}b}" if w else "" for w, v in zip(widths.tolist(), values.tolist(), strict=True))
    assert packed.size == math.ceil(len(expected) / 8)
    assert "".join(f"{b:08b}" for b in packed)[: len(expected)] == expected
    assert clean(packed, len(expected))
    assert read_bits(packed, np.cumsum(widths) - widths, widths).tolist() == values.tolist()
    if len(expected) % 8:
        assert not clean(packed | np.uint8(1), len(expected))


def formula(length, sizes, value_bytes=4):
    blocks = [math.ceil(length / s) for s in sizes]
    bits = sum(n * math.ceil(math.log2(s)) for n, s in zip(blocks, sizes, strict=True))
    kinds = len(set(sizes))
    codes = math.ceil(len(sizes) * math.ceil(math.log2(kinds)) / 8) if kinds > 1 else 0
    return sum(blocks) * value_bytes + math.ceil(bits / 8) + codes


def test_index_bytes_of_the_papers_row():
    constraint = cx.block_max(16)
    w, structure = hard(constraint, (1, 6000))
    packed = formats.pack(w, constraint, structure, format="block-max")
    assert packed.arrays["values"].size == 375 and packed.arrays["offsets"].nbytes == 188
    assert 188 / (2 * 375) == pytest.approx(0.25, abs=1e-3)  # against 16-bit column ids
    assert "codes" not in packed.arrays


CASES = {
    "uniform": (cx.block_max(8), (20, 64)),
    "ragged": (cx.block_max(14), (9, 100)),
    "inputs": (cx.block_max(5, axis="inputs"), (33, 7)),
    "whole": (cx.block_max(1), (6, 5)),
    "longer than a row": (cx.block_max(64), (6, 5)),
    "darb": (cx.darb(0.1), (60, 64)),
    "darb, inputs": (cx.darb(0.2, allowed=(1, 2, 4, 8, 16), axis="inputs"), (64, 40)),
    "darb, conv": (cx.darb(0.2), (3, 3, 8, 32)),
    "joined": (cx.darb(0.1) & cx.unstructured(0.05), (60, 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_and_bytes(name):
    constraint, shape = CASES[name]
    w, structure = hard(constraint, shape)
    packed = formats.pack(w, constraint, structure, format="block-max")
    assert same(formats.unpack(packed), w)
    spec = constraint.sets[0].spec
    m = w.reshape(-1, shape[-1])
    m = m.T if spec["axis"] == "inputs" else m
    if spec["kind"] == "block_max":
        sizes = [spec["size"]] * len(m)
    else:
        places = structure[0] if constraint.parts else structure
        sizes = np.array(spec["allowed"])[np.asarray(places)].tolist()
    assert formats.nbytes(packed) == formula(m.shape[1], sizes)
    assert packed.meta["sizes"] == sorted(set(sizes))


def test_without_a_constraint_rows_take_the_largest_power_of_two():
    w, structure = hard(cx.darb(0.1), (50, 64))
    sizes = row_sizes(w != 0)
    for row, size in zip(w != 0, sizes, strict=True):

        def fits(s, row=row):
            return all(row[i : i + s].sum() <= 1 for i in range(0, 64, s))

        assert fits(size) and (size == 128 or not fits(2 * size))
    packed = formats.pack(w, format="block-max")
    assert same(formats.unpack(packed), w) and formats.nbytes(packed) == formula(64, sizes.tolist())
    assert formats.nbytes(packed) <= formats.nbytes(formats.pack(w, cx.darb(0.1), structure, format="block-max"))
    assert formats.pack(w).format == "block-max"


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(1, 40), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_any_weight_comes_back(rows, length, density, seed):
    rng = np.random.default_rng(seed)
    w = np.where(rng.random((rows, length)) < density, rng.normal(size=(rows, length)), 0).astype(np.float32)
    w[rng.integers(rows), rng.integers(length)] = -0.0
    assert same(formats.unpack(formats.pack(w, format="block-max")), w)


def test_weights_outside_the_blocks_are_named():
    w = np.zeros((3, 8), np.float32)
    w[1, 4:6] = 1
    with pytest.raises(ValueError, match="row 1 has a block of 4 with more than one"):
        formats.pack(w, cx.block_max(4), (), format="block-max")


CONSTRAINT = cx.darb(0.3, allowed=(1, 2, 4, 8))


@functools.cache
def small():
    """A packed layer to damage, made when the first test asks: every worker of a run imports this file."""
    structure = jnp.arange(16, dtype=jnp.int32) % 4
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 19)), jnp.float32)
    return formats.pack(np.asarray(CONSTRAINT.project(w, structure)), CONSTRAINT, structure, format="block-max")


def edit(name, index, value):
    array = small().arrays[name].copy()
    array[index] = value
    return small()._replace(arrays={**small().arrays, name: array})


DAMAGE = {
    "axis": (lambda: small()._replace(meta={**small().meta, "axis": "rows"}), "block-max/axis: 'rows' is not"),
    "sizes": (lambda: small()._replace(meta={**small().meta, "sizes": 4}), "block-max/sizes: not a list"),
    "sizes order": (lambda: small()._replace(meta={**small().meta, "sizes": [2, 1, 4, 8]}), "do not ascend"),
    "size": (lambda: small()._replace(meta={**small().meta, "sizes": [0, 1]}), "block-max/sizes: not a list"),
    "no sizes": (lambda: small()._replace(meta={**small().meta, "sizes": []}), "block-max/codes: do not fit"),
    "codes": (lambda: small()._replace(meta={**small().meta, "sizes": [1, 2, 4]}), "block-max/codes: name other"),
    "code": (lambda: edit("codes", -1, 255), "block-max/values: .* one a block"),
    "codes left": (lambda: small()._replace(meta={**small().meta, "sizes": [4]}), "block-max/codes: do not fit"),
    "values": (
        lambda: small()._replace(arrays={**small().arrays, "values": small().arrays["values"][1:]}),
        "block-max/values: .* expected .*, one a block",
    ),
    "few values": (
        lambda: small()._replace(arrays={**small().arrays, "values": small().arrays["values"][:15]}),
        "block-max/values: 15 values cannot fill",
    ),
    "offsets": (lambda: edit("offsets", slice(None), 255), "block-max/offsets: "),
    "shape": (lambda: small()._replace(shape=(304,)), "block-max: shape"),
    "empty": (lambda: small()._replace(shape=(1 << 40, 0)), "block-max: shape"),
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
            packed = packed._replace(shape=tuple(data.draw(st.lists(st.integers(0, 1 << 40), max_size=4))))
        else:
            field = data.draw(st.sampled_from(["axis", "sizes"]))
            value = data.draw(st.none() | st.text(max_size=3) | st.lists(st.integers(-1, 1 << 40), max_size=5))
            packed = packed._replace(meta={**packed.meta, field: value})
        packed = packed._replace(arrays={**packed.arrays, name: array})
    try:
        back = formats.unpack(packed, max_bytes=1 << 20)
    except CompressedFileError:
        return
    assert back.shape == packed.shape
