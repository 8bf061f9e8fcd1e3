"""The product from the packed form is the masked dense product; a decoder's work counted by hand."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from compressx import formats
from compressx.constraints import bank_balanced, block_max, darb, quantize
from compressx.formats import decoding


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["block_max", "darb"])
def test_the_packed_product_is_the_masked_dense_one(rng, axis, kind) -> None:
    w = jnp.asarray(rng.normal(size=(24, 50)).astype(np.float32))
    constraint = block_max(8, axis=axis) if kind == "block_max" else darb(0.2, allowed=(1, 2, 4, 8, 16), axis=axis)
    structure = constraint.init(w)
    z = constraint.project(w, structure)
    packed = formats.pack(z, constraint, structure, format="block-max")
    x = rng.normal(size=(2, 3, 24)).astype(np.float32)
    np.testing.assert_allclose(decoding.multiply(packed, x), x @ np.asarray(z), rtol=1e-4, atol=1e-5)
    with pytest.raises(formats.CompressedFileError, match="reads the block-max format alone"):
        decoding.multiply(formats.pack(z, format="bitmask"), x)


def test_the_packed_product_of_codes_is_that_of_their_weights(rng) -> None:
    constraint = block_max(8) & quantize(6)
    w = jnp.asarray(rng.normal(size=(24, 50)).astype(np.float32))
    structure = constraint.init(w)
    z = constraint.project(w, structure)
    x = rng.normal(size=(3, 24)).astype(np.float32)
    packed = formats.pack(z, constraint, structure, format="block-max-coded")
    np.testing.assert_allclose(decoding.multiply(packed, x), x @ np.asarray(z), rtol=1e-4, atol=1e-5)


def test_work_by_hand() -> None:
    w = np.zeros((40, 10), np.float32)
    w[0, 1] = w[0, 9] = w[39, 1] = 1.0  # two blocks of 8 in each row
    work = decoding.work(w, np.full(40, 8))
    assert work["block-max"] == (3, 80 + 40, 0, 80)
    # column 1: row 0, then 38 rows skipped, two of them zeros stored in between; column 9: row 0
    assert work["relative-index columns"] == (3, 5 + 20, 5, 5)
    assert work["compressed sparse rows"] == (3, 3 + 80, 0, 3)
    assert work["blocks"] == (3, 3, 0, 3 * 64)
    assert "block-max" not in decoding.work(w)


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
@pytest.mark.parametrize(("shape", "bank"), [((6, 24), 8), ((24, 21), 8), ((5, 7), 16), ((9, 13), 6)])
def test_bank_balanced_counted_entry_by_entry(rng, axis, shape, bank) -> None:
    """Every bank written out with its padding, and the matrix read back from value and offset alone."""
    w = np.where(rng.random(shape) < 0.2, rng.normal(size=shape), 0).astype(np.float32)
    m = w if axis == "outputs" else w.T
    banks = [(r, s, m[r, s : s + bank]) for r in range(len(m)) for s in range(0, m.shape[1], bank)]
    most = {n: max(np.count_nonzero(b) for _, _, b in banks if len(b) == n) for n in {len(b) for _, _, b in banks}}
    entries, back = 0, np.zeros_like(m)
    for r, start, b in banks:
        offsets = list(np.flatnonzero(b))
        entries += most[len(b)]  # those that are missing store a zero
        assert len(offsets) <= most[len(b)] and all(offset < bank for offset in offsets)
        for offset in offsets:
            back[r, start + offset] = b[offset]
    np.testing.assert_array_equal(back, m)
    work = decoding.work(w, bank=bank, axis=axis)["bank-balanced"]
    assert work == (np.count_nonzero(w), entries, 0, entries)
    bits = {6: 3, 8: 3, 16: 4}[bank]
    packed = formats.pack(w, bank_balanced(1.0, bank, axis=axis), (), "bank-balanced")
    assert formats.nbytes(packed) == 4 * entries + math.ceil(entries * bits / 8)


def test_a_bank_balanced_matrix_has_no_padding(rng) -> None:
    w = jnp.asarray(rng.normal(size=(12, 70)).astype(np.float32))
    z = np.asarray(bank_balanced(0.25, 16).project(w, ()))
    assert decoding.bank_entries(z, 16) == np.count_nonzero(z)
    assert decoding.bank_entries(np.zeros((3, 9)), 4) == 0


def test_blocks_along_the_inputs_are_counted_there(rng) -> None:
    w = jnp.asarray(rng.normal(size=(24, 50)).astype(np.float32))
    constraint = darb(0.2, allowed=(1, 2, 4, 8, 16), axis="inputs")
    structure = constraint.init(w)
    sizes = np.array((1, 2, 4, 8, 16))[np.asarray(structure)]
    z = constraint.project(w, structure)
    packed = formats.pack(z, constraint, structure, format="block-max")
    assert decoding.work(np.asarray(z), sizes, axis="inputs")["block-max"].products == len(packed.arrays["values"])


def test_gaps_of_four_bits() -> None:
    """A gap of 15 positions fits; the 16th needs a stored zero, the 32nd another."""
    for first, stored in ((15, 1), (16, 2), (31, 2), (32, 3)):
        w = np.zeros((40, 1), np.float32)
        w[first] = 1.0
        assert decoding.work(w)["relative-index columns"].products == stored
