"""The layout of planes: where elements lie, and the native moves against the NumPy ones."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressx.kernels import native
from compressx.kernels.grid import from_planes, grid, to_planes, valid, window_source

sizes = st.integers(1, 9)


@settings(max_examples=40, deadline=None)
@given(sizes, sizes, sizes, st.integers(0, 2), st.integers(0, 2), st.sampled_from([4, 8, 16]), st.integers(1, 3))
def test_shifts_of_the_image_are_shifts_by_vectors(n, h, w, rows, columns, lanes, c):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((n, h, w, c)).astype(np.float32)
    g = grid(n, h, w, (rows, columns), (rows, columns), lanes)
    planes = to_planes(x, g)
    assert planes.shape == (c, g.plane, lanes)
    np.testing.assert_array_equal(from_planes(planes, g), x)
    bits = (valid(g)[:, None] >> np.arange(lanes)[None] & 1).sum()
    assert bits == n * h * w
    padded = np.pad(x, ((0, 0), (rows, rows), (columns, columns), (0, 0)))
    for dy in (-rows, rows):
        for dx in (-columns, columns):
            moved = np.roll(planes, -(dy * g.row + dx), axis=1)
            expected = padded[:, rows + dy : rows + dy + h, columns + dx : columns + dx + w]
            np.testing.assert_array_equal(from_planes(moved, g), expected)


@pytest.mark.skipif(not native.available(), reason="no compiler, so no native kernels")
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_native_moves_equal_the_definition(lanes):
    if lanes > native.LANES[native.isa()]:
        pytest.skip("this processor lacks the instruction set")
    rng = np.random.default_rng(1)
    for n, h, w in ((1, 7, 6), (3, 4, 5), (1, 1, 1)):
        x = rng.standard_normal((n, h, w, 3)).astype(np.float32)
        g = grid(n, h, w, (1, 1), (2, 2), lanes)
        np.testing.assert_array_equal(native.to_planes(jnp.asarray(x), g), to_planes(x, g))
        np.testing.assert_array_equal(native.from_planes(jnp.asarray(to_planes(x, g)), g), x)
        half = grid(n, -(-h // 2), -(-w // 2), (1, 1), (1, 1), lanes)
        source = window_source(g, half, (2, 2), [(0, 0), (1, 1)])
        phases = np.asarray(native.resample(jnp.asarray(to_planes(x, g)), g, half, source, valid(half), (1, 1)))
        expected = np.zeros((n, half.h, half.w, 3, 2), np.float32)
        expected[..., 0] = x[:, ::2, ::2]
        odd = x[:, 1::2, 1::2]
        expected[:, : odd.shape[1], : odd.shape[2], :, 1] = odd
        np.testing.assert_array_equal(phases, to_planes(expected.reshape(n, half.h, half.w, 6), half))
        positive = np.abs(x)
        source = window_source(g, half, (2, 2), [(-1, -1)])
        pooled = native.resample(jnp.asarray(to_planes(positive, g)), g, half, source, valid(half), (3, 3))
        padded = np.pad(positive, ((0, 0), (1, 2), (1, 2), (0, 0)))
        windows = np.stack([padded[:, i : i + h + 1, j : j + w + 1] for i in range(3) for j in range(3)])
        expected = windows.max(axis=0)[:, ::2, ::2][:, : half.h, : half.w]
        np.testing.assert_array_equal(pooled, to_planes(np.ascontiguousarray(expected), half))
