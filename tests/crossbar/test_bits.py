"""Bit planes in words: each bit where NumPy's own packing puts it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar.bits import pack
from compressx.crossbar.design import Adc, Design
from compressx.crossbar.mvm import crossbar_matmul
from compressx.crossbar.program import program


@pytest.mark.parametrize("k", [1, 31, 32, 33, 100])
def test_bits_lie_where_numpy_packs_them(k, rng):
    x = rng.integers(-(2**15), 2**15, (k, 5))
    words = np.asarray(jax.jit(pack, static_argnums=1)(jnp.asarray(x, jnp.int32), 11))
    for plane in range(11):
        bits = np.pad((x >> plane) & 1, ((0, -k % 32), (0, 0))).astype(np.uint8)
        expected = np.packbits(bits, axis=0, bitorder="little").T.copy().view("<u4").T
        np.testing.assert_array_equal(words[plane], expected)


def test_inputs_are_only_picked_where_rows_are_left_out_or_moved(rng):
    design = Design(rows=16, cols=64, active_rows=16, input_bits=4, weight_bits=4, adc=Adc(8))
    w, x = rng.integers(-8, 8, (20, 3)), jnp.asarray(rng.integers(0, 16, (4, 20)), jnp.float32)
    gradient = jax.grad(lambda x, arrays: jnp.sum(crossbar_matmul(x, arrays) @ jnp.arange(3.0)))
    for order in (np.arange(20), rng.permutation(20)):
        arrays = program(w, design, rows=order)
        assert arrays.in_order == bool((order == np.arange(20)).all())
        np.testing.assert_array_equal(np.asarray(arrays.drive(x)), np.asarray(x)[:, order])
        np.testing.assert_array_equal(np.asarray(gradient(x, arrays)), np.tile(w @ np.arange(3), (4, 1)))
    assert not program(np.concatenate([w, 0 * w]), design).in_order
