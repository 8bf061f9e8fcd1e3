"""Sign-sum products: equal to the dense product, exactly in integers, and the counts of the formulas."""

import jax.numpy as jnp
import numpy as np
import pytest

import compressx
from compressx import formats
from compressx.kernels import unified
from tests.thinning import some


def packed(shape, block, seed=0, integers=False):
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal(shape, dtype=np.float32))
    constraint = compressx.unify_and_prune(block, 0.5, 0.25)
    structure = constraint.init(w)
    w = np.asarray(constraint.project(w, structure))
    if integers:
        w = np.sign(w) * np.float32(2)
    return formats.pack(w, constraint, structure, format="unified")


PRODUCTS = [((12, 8), (4, 1)), ((13, 7), (4, 2)), ((3, 3, 5, 6), (4, 3, 2))]


@pytest.mark.parametrize(("shape", "block"), some(PRODUCTS[1:2], PRODUCTS))
def test_product_equals_dense(shape, block):
    p = packed(shape, block)
    w = formats.unpack(p).reshape(-1, shape[-1])
    x = np.random.default_rng(1).standard_normal((3, w.shape[0]), dtype=np.float32)
    np.testing.assert_allclose(unified.reference(p, x), x.astype(np.float64) @ w, atol=1e-5)
    np.testing.assert_allclose(unified.product(unified.prepare_unified(p), jnp.asarray(x)), x @ w, atol=1e-5)


def test_product_is_exact_in_integers():
    p = packed((16, 8), (4, 1), integers=True)
    w = formats.unpack(p)
    x = np.random.default_rng(2).integers(-8, 9, (2, 16)).astype(np.float32)
    np.testing.assert_array_equal(unified.product(unified.prepare_unified(p), jnp.asarray(x)), x @ w)


def test_counts_follow_the_formula():
    p = packed((16, 8), (4, 1))  # 32 blocks of 4: 16 unified, 8 pruned, 8 free
    c = unified.counts(p)
    assert c == unified.Counts(16 + 8 * 4, 16 * 4 + 8 * 4)
    wide = unified.counts(packed((16, 8), (4, 2)))  # 16 blocks of 4x2: 8 unified, 4 pruned, 4 free
    assert wide.multiplications == 8 * 2 + 4 * 8 and wide.additions == 8 * 8 + 4 * 8
    flat = unified.counts(packed((16, 8), (2, 4)))  # as many, of 2x4: the inputs are multiplied, not the outputs' sums
    assert (flat.multiplications, flat.additions) == (wide.multiplications, wide.additions)
    assert unified.counts(packed((16, 8), (1, 4))).multiplications == 16 + 8 * 4
