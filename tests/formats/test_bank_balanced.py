"""The bank-balanced format: exact inverses, bytes from the formula, the smallest where it fits, nothing believed."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx as cx
from compressx import formats
from compressx.formats import CompressedFileError, Packed
from compressx.formats.base import same
from tests.formats.mutations import mutated


def hard(constraint: cx.Constraint, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    w = jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
    return np.asarray(jax.jit(constraint.project)(w, constraint.init(w)))


CASES = {
    "whole": (cx.bank_balanced(0.25, 16), (6, 64)),
    "ragged": (cx.bank_balanced(0.3, 10), (7, 64)),
    "inputs": (cx.bank_balanced(0.25, 8, axis="inputs"), (33, 5)),
    "conv": (cx.bank_balanced(0.5, 4), (3, 3, 4, 9)),
    "bank of one": (cx.bank_balanced(1.0, 1), (4, 5)),
    "longer than a row": (cx.bank_balanced(0.5, 64), (6, 5)),
    "joined": (cx.bank_balanced(0.25, 16) & cx.unstructured(0.1), (6, 64)),
}


@pytest.mark.parametrize("name", CASES)
def test_round_trip_and_bytes(name: str) -> None:
    constraint, shape = CASES[name]
    w = hard(constraint, shape)
    packed = formats.pack(w, constraint, None, format="bank-balanced")
    assert same(formats.unpack(packed), w)
    spec = constraint.sets[0].spec
    m = w.reshape(-1, shape[-1])
    m = m.T if spec["axis"] == "inputs" else m
    bank, length = spec["bank"], m.shape[1]
    banks = [[row[i : i + bank] for i in range(0, length, bank)] for row in m]
    most = max((int((b != 0).sum()) for row in banks for b in row if len(b) == bank), default=0)
    last = max((int((b != 0).sum()) for row in banks for b in row if len(b) < bank), default=0)
    number = len(m) * (length // bank * most + last)
    assert formats.nbytes(packed) == 4 * number + math.ceil(number * math.ceil(math.log2(bank)) / 8)
    assert packed.meta["keep"] == [most, last]
    if name in ("whole", "ragged", "inputs"):
        assert most == math.floor(spec["density"] * bank + 0.5)
        assert number == np.count_nonzero(w)


def test_places_are_read_bank_after_bank() -> None:
    w = np.zeros((2, 8), np.float32)
    w[0, 1], w[0, 3], w[0, 4], w[1, 2], w[1, 6], w[1, 7] = 1, 2, 3, 4, 5, 6
    packed = formats.pack(w, cx.bank_balanced(0.5, 4), (), format="bank-balanced")
    assert packed.arrays["values"].tolist() == [1, 2, 3, 0, 0, 4, 5, 6]  # zeros fill up banks that keep fewer
    places = "".join(f"{byte:08b}" for byte in packed.arrays["offsets"])
    assert places == "".join(("01", "11", "00", "01", "00", "10", "10", "11"))


def test_an_index_of_log2_bank_bits_a_weight_is_the_smallest() -> None:
    constraint = cx.bank_balanced(0.25, 8)
    w = hard(constraint, (64, 256))
    packed = formats.pack(w, constraint, ())
    kept = np.count_nonzero(w)
    assert packed.format == "bank-balanced" and formats.nbytes(packed) == kept * 4 + kept * 3 // 8
    assert all(formats.nbytes(packed) < formats.nbytes(formats.pack(w, format=f)) for f in ("bitmask", "coo-delta"))
    both = constraint & cx.quantize(4)
    coded = hard(both, (64, 256))
    packed = formats.pack(coded, both)
    assert packed.format == "bank-balanced-coded" and formats.nbytes(packed) == kept // 2 + kept * 3 // 8 + 4


@settings(max_examples=100)
@given(st.integers(1, 6), st.integers(1, 40), st.integers(1, 20), st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_any_weight_comes_back(rows: int, length: int, bank: int, density: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = np.where(rng.random((rows, length)) < density, rng.normal(size=(rows, length)), 0).astype(np.float32)
    w[rng.integers(rows), rng.integers(length)] = -0.0
    assert same(formats.unpack(formats.pack(w, cx.bank_balanced(1.0, bank), (), "bank-balanced")), w)


def test_without_banks_it_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"needs a constraint with bank_balanced\(...\)"):
        formats.pack(np.ones((3, 4), np.float32), cx.block_max(2), (), "bank-balanced")


CONSTRAINT = cx.bank_balanced(0.3, 6)


@functools.cache
def small():
    """A packed layer to damage, made when the first test asks: every worker of a run imports this file."""
    return formats.pack(hard(CONSTRAINT, (8, 20)), CONSTRAINT, (), format="bank-balanced")


def meta(**changes: Any) -> Packed:
    return small()._replace(meta={**small().meta, **changes})


def array(name: str, change: Any) -> Packed:
    return small()._replace(arrays={**small().arrays, name: change(small().arrays[name].copy())})


DAMAGE = {
    "axis": (lambda: meta(axis="rows"), "bank-balanced/axis: 'rows'"),
    "bank": (lambda: meta(bank=0), "bank-balanced/bank: 0"),
    "banks": (lambda: meta(bank=1 << 40), "bank-balanced/bank"),
    "keep": (lambda: meta(keep=[7, 1]), r"keep: \[7, 1\] values do not fit banks of 6 and a last one of 2"),
    "last": (lambda: meta(keep=[2, 3]), "bank-balanced/keep"),
    "one": (lambda: meta(keep=[2]), "bank-balanced/keep"),
    "type": (lambda: meta(keep=[2, True]), "bank-balanced/keep"),
    "values": (lambda: array("values", lambda a: a[1:]), "bank-balanced/values: shape"),
    "offsets": (lambda: array("offsets", lambda a: a[1:]), "bank-balanced/offsets: shape"),
    "outside": (lambda: array("offsets", lambda a: np.full_like(a, 255)), "a place lies outside its bank"),
    "order": (lambda: array("offsets", lambda a: a * 0), "the positions of a bank do not ascend"),
    "shape": (lambda: small()._replace(shape=(160,)), "bank-balanced: shape"),
    "unknown": (lambda: small()._replace(arrays={**small().arrays, "x": np.zeros(1)}), "bank-balanced/x: unknown"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str) -> None:
    make, message = DAMAGE[case]
    with pytest.raises(CompressedFileError, match=message):
        formats.unpack(make())


@settings(max_examples=300)
@given(data=st.data())
def test_mutations_unpack_to_a_weight_or_one_error(data: st.DataObject) -> None:
    packed = mutated(data, small())
    try:
        back = formats.unpack(packed, max_bytes=1 << 20)
    except CompressedFileError:
        return
    assert back.shape == packed.shape
