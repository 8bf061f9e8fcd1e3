"""The product from the packed form is the masked dense product; a decoder's work counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from compressx import formats
from compressx.constraints import block_max, darb, quantize
from compressx.formats import decoding


@pytest.mark.parametrize("axis", ["outputs", "inputs"])
@pytest.mark.parametrize("kind", ["block_max", "darb"])
def test_the_packed_product_is_the_masked_dense_one(rng, axis, kind) -> None:
    w = jnp.asarray(rng.normal(size=(24, 50)).astype(np.float32))
    constraint = block_max(8, axis) if kind == "block_max" else darb(0.2, (1, 2, 4, 8, 16), axis)
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


def test_gaps_of_four_bits() -> None:
    """A gap of 15 places fits; the 16th needs a stored zero, the 32nd another."""
    for first, stored in ((15, 1), (16, 2), (31, 2), (32, 3)):
        w = np.zeros((40, 1), np.float32)
        w[first] = 1.0
        assert decoding.work(w)["relative-index columns"].products == stored
