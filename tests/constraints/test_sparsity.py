"""Sparsity sets: counts, nearest points by brute force over all supports, bad arguments."""

import itertools
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx


def nearest(w: np.ndarray, supports: Iterable[np.ndarray]) -> float:
    """Least squared distance from w to any weight whose non-zeros lie in one of the supports."""
    return min(float(np.sum(np.square(np.where(s, 0.0, w)))) for s in supports)


def distance(constraint: cx.Constraint, w: np.ndarray) -> float:
    z = np.asarray(constraint.project(jnp.asarray(w), constraint.init(jnp.asarray(w))))
    return float(np.sum(np.square(z - w)))


def groups_of(labels: np.ndarray, keep: int) -> Iterable[np.ndarray]:
    """All supports made of `keep` whole groups, from an array of group numbers."""
    for chosen in itertools.combinations(np.unique(labels), keep):
        yield np.isin(labels, chosen)


@pytest.fixture
def conv(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((2, 1, 3, 4)).astype(np.float32)  # [kh, kw, cin, cout]


def test_filters_are_the_nearest_point(conv: np.ndarray) -> None:
    labels = np.broadcast_to(np.arange(4), conv.shape)
    assert distance(cx.filters(keep=2), conv) == pytest.approx(nearest(conv, groups_of(labels, 2)), rel=1e-6)


def test_columns_are_the_nearest_point(conv: np.ndarray) -> None:
    labels = np.broadcast_to(np.arange(6).reshape(2, 1, 3, 1), conv.shape)
    assert distance(cx.columns(keep=3), conv) == pytest.approx(nearest(conv, groups_of(labels, 3)), rel=1e-6)


def test_channels_are_the_nearest_point(conv: np.ndarray) -> None:
    labels = np.broadcast_to(np.arange(3).reshape(1, 1, 3, 1), conv.shape)
    assert distance(cx.channels(keep=1), conv) == pytest.approx(nearest(conv, groups_of(labels, 1)), rel=1e-6)


def test_blocks_are_the_nearest_point_with_ragged_edges(rng: np.random.Generator) -> None:
    w = rng.standard_normal((5, 7)).astype(np.float32)
    labels = (np.arange(5)[:, None] // 2) * 10 + np.arange(7)[None] // 3
    assert distance(cx.block((2, 3), keep=4), w) == pytest.approx(nearest(w, groups_of(labels, 4)), rel=1e-6)


def test_blocks_of_a_convolution_lie_in_its_gemm_view(conv: np.ndarray) -> None:
    z = cx.block((2, 2), keep=3).project(jnp.asarray(conv), ())
    tiles = np.asarray(z).reshape(6, 4).reshape(3, 2, 2, 2).transpose(0, 2, 1, 3)
    alive = (tiles != 0).any((2, 3))
    assert alive.sum() == 3
    assert ((tiles != 0).all((2, 3)) == alive).all()


def test_unstructured_is_the_nearest_point(rng: np.random.Generator) -> None:
    w = rng.standard_normal((2, 5)).astype(np.float32)
    labels = np.arange(10).reshape(2, 5)
    assert distance(cx.unstructured(keep=4), w) == pytest.approx(nearest(w, groups_of(labels, 4)), rel=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -2, -1])
def test_n_of_m_is_the_nearest_point(axis: int, rng: np.random.Generator) -> None:
    w = rng.standard_normal((4, 8)).astype(np.float32)
    z = np.asarray(cx.n_of_m(2, 4, axis=axis).project(jnp.asarray(w), ()))
    groups = np.moveaxis(z, axis, -1).reshape(-1, 4)
    source = np.moveaxis(w, axis, -1).reshape(-1, 4)
    for got, line in zip(groups, source, strict=True):
        best = min(itertools.combinations(range(4), 2), key=lambda c: sum(line[i] ** 2 for i in range(4) if i not in c))
        assert set(np.flatnonzero(got)) == set(best)


def test_filters_and_columns_leave_a_dense_matrix(conv: np.ndarray) -> None:
    z = np.asarray(cx.filters_and_columns(keep_filters=2, keep_columns=3).project(jnp.asarray(conv), ())).reshape(6, 4)
    rows, cols = np.flatnonzero(z.any(1)), np.flatnonzero(z.any(0))
    assert (len(rows), len(cols), np.count_nonzero(z)) == (3, 2, 6)
    energy = np.square(conv.reshape(6, 4)).sum(0)
    assert set(cols) == set(np.argsort(-energy)[:2])  # filters first, then positions within them
    within = np.square(conv.reshape(6, 4)[:, cols]).sum(1)
    assert set(rows) == set(np.argsort(-within)[:3])


def test_global_threshold_ranks_over_leaves() -> None:
    leaves = (jnp.array([5.0, 1.0, 4.0]), jnp.array([[3.0, 2.0]]))
    z = cx.unstructured(0.6, scope="rule").project(leaves, ())
    np.testing.assert_array_equal(z[0], [5, 0, 4])
    np.testing.assert_array_equal(z[1], [[3, 0]])


def test_a_kept_group_stays_free_where_a_member_is_zero() -> None:
    w = jnp.array([[1.0, 0.0], [0.0, 0.0], [2.0, 0.0]])
    f = cx.filters(keep=1)
    np.testing.assert_array_equal(f.freeze(w, ()), [[True, False]] * 3)


def test_a_kept_group_of_tiny_weights_stays_free() -> None:
    w = jnp.array([[1e-30, 0.0], [2e-30, 0.0]])
    np.testing.assert_array_equal(cx.filters(keep=1).freeze(w, ()), [[True, False]] * 2)


def test_all_zero_and_all_equal_inputs_keep_exact_counts() -> None:
    assert int(jnp.count_nonzero(cx.unstructured(0.3).project(jnp.ones((10, 10)), ()))) == 30
    assert int(jnp.count_nonzero(cx.unstructured(0.3).project(jnp.zeros((10, 10)), ()))) == 0
    z = cx.columns(keep=3).project(jnp.ones((5, 4)), ())
    np.testing.assert_array_equal(z.any(1), [True, True, True, False, False])


def test_one_element_blocks_are_unstructured(rng: np.random.Generator) -> None:
    w = jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)
    np.testing.assert_array_equal(cx.block((1, 1), keep=9).project(w, ()), cx.unstructured(keep=9).project(w, ()))


def test_empty_leaf_passes() -> None:
    assert cx.unstructured(0.5).project(jnp.zeros((0, 4)), ()).shape == (0, 4)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan")])
def test_impossible_density_is_named(density: float) -> None:
    with pytest.raises(ValueError, match="density"):
        cx.unstructured(density)


@pytest.mark.parametrize("make", [cx.unstructured, cx.filters, cx.columns, cx.channels])
def test_both_or_neither_amount_is_an_error(make: type) -> None:
    with pytest.raises(ValueError, match="exactly one"):
        make()
    with pytest.raises(ValueError, match="exactly one"):
        make(0.5, keep=3)


def test_a_density_that_keeps_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="keeps none"):
        jax.eval_shape(lambda w: cx.unstructured(0.001).project(w, ()), jnp.ones(10))


def test_n_of_m_must_divide() -> None:
    with pytest.raises(ValueError, match=r"m=4 does not divide axis 0 of shape \(6, 4\)"):
        cx.n_of_m(2, 4, axis=0).project(jnp.ones((6, 4)), ())
