"""Crossbar-aware pruning: every pruned row and column belongs to a freed array, and the counts are exact."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compressx as cx
from compressx.constraints.crossbar_prune import arrays, kept


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@given(
    p=st.integers(1, 60),
    f=st.integers(1, 60),
    filter_density=st.one_of(st.none(), st.floats(0.05, 1)),
    column_density=st.one_of(st.none(), st.floats(0.05, 1)),
    rows=st.sampled_from([4, 8, 128]),
    cells=st.sampled_from([1, 2, 4]),
)
def test_one_more_pruned_group_would_free_no_array_and_one_less_would_need_one(
    p: int, f: int, filter_density: Any, column_density: Any, rows: int, cells: int
) -> None:
    aim_p = p if column_density is None else int(np.floor(column_density * p + 0.5))
    aim_f = f if filter_density is None else int(np.floor(filter_density * f + 0.5))
    if min(aim_p, aim_f) == 0:
        with pytest.raises(ValueError, match="keeps none"):
            kept((p, f), filter_density, column_density, rows, 8, cells)
        return
    kp, kf = kept((p, f), filter_density, column_density, rows, 8, cells)
    assert aim_p <= kp <= p and aim_f <= kf <= f
    # the arrays are those that the densities ask for, and nothing smaller than these counts fills them
    assert arrays(kp, kf, rows, 8, cells) == arrays(aim_p, aim_f, rows, 8, cells)
    if kp < p:
        assert arrays(kp + 1, kf, rows, 8, cells) > arrays(kp, kf, rows, 8, cells)
    if kf < f:
        assert arrays(kp, kf + 1, rows, 8, cells) > arrays(kp, kf, rows, 8, cells)


def test_counts_and_choice() -> None:
    w = normal((3, 3, 8, 20))  # 72 positions, 20 filters
    c = cx.crossbar_aware(0.5, 0.6, rows=16, cols=16, cells_per_weight=2)  # aims at 10 filters and 43 positions
    z = np.asarray(jax.jit(c.project)(w, ())).reshape(72, 20)
    assert kept(w.shape, 0.5, 0.6, 16, 16, 2) == (48, 16)
    rows, cols = np.any(z != 0, axis=1), np.any(z != 0, axis=0)
    assert (rows.sum(), cols.sum()) == (48, 16)
    m = np.asarray(w, np.float64).reshape(72, 20)
    best_cols = np.sort(np.argsort(-np.sum(m**2, axis=0))[:16])
    best_rows = np.sort(np.argsort(-np.sum(m[:, best_cols] ** 2, axis=1))[:48])
    np.testing.assert_array_equal(np.flatnonzero(cols), best_cols)
    np.testing.assert_array_equal(np.flatnonzero(rows), best_rows)
    np.testing.assert_array_equal(
        z[np.ix_(best_rows, best_cols)], np.asarray(w).reshape(72, 20)[np.ix_(best_rows, best_cols)]
    )
    assert (arrays(72, 20, 16, 16, 2), arrays(48, 16, 16, 16, 2)) == (15, 6)
    np.testing.assert_array_equal(c.project(jnp.asarray(z).reshape(w.shape), ()), z.reshape(w.shape))


def test_a_layer_in_one_array_is_left_alone() -> None:
    w = normal((5, 5, 1, 20))  # LeNet's first layer
    np.testing.assert_array_equal(cx.crossbar_aware(0.3, 0.3).project(w, ()), w)


def test_one_dimension_alone() -> None:
    w = normal((40, 40))
    z = np.asarray(cx.crossbar_aware(column_density=0.3, rows=8, cols=8, cells_per_weight=1).project(w, ()))
    assert np.any(z, axis=1).sum() == 16 and np.all(np.any(z, axis=0))


def test_the_reduction_is_that_of_the_paper() -> None:
    """FORMS: crossbars fall by pruning x 4 (32 to 8 bits) x 2 (no split arrays)."""
    dense = arrays(1152, 256, cells_per_weight=2 * 16)
    p, f = kept((3, 3, 128, 256), 0.5, 1 / 3)
    assert (p, f) == (384, 128)
    assert dense / arrays(p, f) == 6 * 4 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "filter_density, column_density or both"),
        ({"filter_density": 1.5}, "filter_density must be in"),
        ({"filter_density": 0.5, "rows": 0}, "rows must be at least 1"),
        ({"filter_density": 0.5, "cells_per_weight": 3}, "does not divide cols=128"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cx.crossbar_aware(**arguments)


def test_a_bias_has_no_crossbar() -> None:
    with pytest.raises(ValueError, match=r"b \(8,\).*at least 2 axes"):
        cx.resolve([("b", cx.crossbar_aware(0.5))], {"b": jnp.ones(8)})
