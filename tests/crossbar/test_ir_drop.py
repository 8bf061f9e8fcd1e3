"""Wire resistance against a sparse direct solve of all nodes of the stated circuit, and circuits done by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import sparse
from scipy.sparse.linalg import spsolve

from compressx.crossbar.ir_drop import effective_conductance


def _nodal(g, r_word, r_bit, v):
    """Kirchhoff's law at every node, word-line nodes first."""
    n, m = g.shape
    node = lambda line, i, j: line * n * m + i * m + j
    matrix, right = sparse.lil_matrix((2 * n * m, 2 * n * m)), np.zeros(2 * n * m)

    def connect(a, b, conductance):
        matrix[a, a] += conductance
        if b is not None:
            matrix[b, b] += conductance
            matrix[a, b] -= conductance
            matrix[b, a] -= conductance

    for i in range(n):
        connect(node(0, i, 0), None, 1 / r_word)
        right[node(0, i, 0)] += v[i] / r_word
        for j in range(m):
            connect(node(0, i, j), node(1, i, j), g[i, j])
            if j + 1 < m:
                connect(node(0, i, j), node(0, i, j + 1), 1 / r_word)
            connect(node(1, i, j), node(1, i + 1, j) if i + 1 < n else None, 1 / r_bit)
    solved = spsolve(matrix.tocsc(), right)
    return solved[node(1, n - 1, 0) : node(1, n - 1, 0) + m] / r_bit


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 1), (9, 12)])
@pytest.mark.parametrize("wires", [(1.0, 2.5), (300.0, 70.0)])
def test_equals_a_direct_solve_of_all_nodes(shape, wires, rng):
    g = rng.uniform(0, 1e-3, shape)
    g[rng.random(shape) < 0.2] = 0.0
    v = rng.uniform(0, 1, shape[0])
    effective = np.asarray(effective_conductance(jnp.asarray(g, jnp.float32), *wires), np.float64)
    np.testing.assert_allclose(v @ effective, _nodal(g, *wires, v), rtol=2e-5)


def test_one_cell_is_three_resistors_in_series():
    found = effective_conductance(jnp.asarray([[1 / 50.0]], jnp.float32), 20.0, 30.0)
    np.testing.assert_allclose(np.asarray(found), [[1 / 100.0]], rtol=1e-6)


def test_no_wires_change_nothing(rng):
    g = jnp.asarray(rng.uniform(0, 1, (7, 4)), jnp.float32)
    np.testing.assert_array_equal(np.asarray(effective_conductance(g, 0.0, 0.0)), np.asarray(g))


def test_current_falls_with_the_distance():
    g = jnp.full((8, 8), 1e-4, jnp.float32)
    found = np.asarray(effective_conductance(g, 10.0, 10.0))
    assert (np.diff(found, axis=1) < 0).all()  # farther from the driver
    assert (np.diff(found, axis=0) > 0).all()  # nearer to the amplifier


def test_gradient_is_that_of_finite_differences(rng):
    g, c = rng.uniform(1, 2, (3, 4)), rng.normal(size=(3, 4))
    f = lambda x: jnp.sum(effective_conductance(x, 0.2, 0.3) * jnp.asarray(c, jnp.float32))
    found = jax.grad(f)(jnp.asarray(g, jnp.float32))
    for i, j in ((0, 0), (2, 1)):
        step = np.zeros_like(g)
        step[i, j] = 1e-2
        slope = (f(jnp.asarray(g + step, jnp.float32)) - f(jnp.asarray(g - step, jnp.float32))) / 2e-2
        assert float(found[i, j]) == pytest.approx(float(slope), rel=5e-3, abs=1e-4)


def test_refuses():
    with pytest.raises(ValueError, match="at least 0"):
        effective_conductance(jnp.ones((1, 1)), -1.0, 0.0)
