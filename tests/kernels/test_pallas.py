"""Pallas kernels in interpret mode against NumPy, and their lowering for a TPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import kernels
from compressx.kernels import pallas
from compressx.kernels.schedule import Geometry


def block_sparse(rng, shape, block, keep):
    w = rng.standard_normal(shape, dtype=np.float32)
    live = rng.random((*shape[:-2], shape[-2] // block[0], shape[-1] // block[1])) < keep
    return w * np.repeat(np.repeat(live, block[0], axis=-2), block[1], axis=-1)


@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_block_sparse_matmul(keep):
    rng = np.random.default_rng(0)
    w = block_sparse(rng, (24, 16), (4, 8), keep)
    x = rng.standard_normal((6, 24), dtype=np.float32)
    y = pallas.block_sparse_matmul(jnp.asarray(x), pallas.blocks(w, (4, 8)), rows=3, interpret=True)
    np.testing.assert_allclose(y, x @ w, atol=1e-5)


@pytest.mark.parametrize(("stride", "size", "pads"), [(1, (3, 3), ((1, 1), (1, 1))), (2, (3, 2), ((1, 1), (0, 1)))])
def test_block_sparse_conv(stride, size, pads):
    rng = np.random.default_rng(1)
    w = block_sparse(rng, (*size, 8, 12), (4, 4), 0.4)
    x = rng.standard_normal((2, 7, 6, 8), dtype=np.float32)
    y = pallas.block_sparse_conv(
        jnp.asarray(x), pallas.blocks(w, (4, 4)), size=size, stride=stride, pads=pads, interpret=True
    )
    expected = kernels.reference(x, w, Geometry(size, (stride, stride), pads))
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_only_live_blocks_are_stored():
    w = block_sparse(np.random.default_rng(2), (3, 3, 16, 8), (4, 8), 0.3)
    live = w.reshape(9, 4, 4, 8).any(axis=(2, 3)).sum()
    assert int(pallas.blocks(w, (4, 8)).live.sum()) == live == pallas.blocks(w, (4, 8)).weight.shape[1]


def test_blocks_must_divide():
    with pytest.raises(ValueError, match="do not divide"):
        pallas.blocks(np.ones((10, 8), np.float32), (4, 8))


def test_the_product_lowers_for_a_tpu():
    w = pallas.blocks(np.ones((256, 256), np.float32), (128, 128))
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    exported = jax.export.export(pallas.block_sparse_matmul, platforms=["tpu"])(x, w)
    assert "tpu_custom_call" in exported.mlir_module()
