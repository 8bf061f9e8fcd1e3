"""Shares are exact integers, respect the leaves' sizes, and follow their formulas."""

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressx.budget import allocate

LENET = {"c1": (5, 5, 1, 20), "c2": (5, 5, 20, 50), "f1": (800, 500), "f2": (500, 10)}
leaf = st.lists(st.integers(1, 30), min_size=2, max_size=4).map(tuple)
trees = st.lists(leaf, min_size=1, max_size=6).map(lambda shapes: {f"l{i}": s for i, s in enumerate(shapes)})


@given(trees, st.floats(0.01, 1.0))
def test_erk_meets_the_total_and_every_leaf(tree: dict[str, tuple[int, ...]], density: float) -> None:
    sizes = {n: allocate._size(s) for n, s in tree.items()}
    total = int(density * sum(sizes.values()) + 0.5)
    if total < len(tree):
        with pytest.raises(ValueError, match="impossible"):
            allocate.erk(tree, density)
        return
    kept = allocate.erk(tree, density)
    assert sum(kept.values()) == total
    assert all(1 <= kept[n] <= sizes[n] for n in tree)


def test_erk_densities_follow_the_formula_where_no_leaf_is_full() -> None:
    kept = allocate.erk(LENET, 0.02)
    scale = {n: kept[n] / sum(LENET[n]) for n in LENET if kept[n] < allocate._size(LENET[n])}
    assert max(scale.values()) / min(scale.values()) == pytest.approx(1.0, abs=0.05)


def test_uniform_keeps_the_same_share() -> None:
    assert allocate.uniform(LENET, 0.1) == {"c1": 50, "c2": 2500, "f1": 40000, "f2": 500}
    with pytest.raises(ValueError, match="keeps no weight of c1"):
        allocate.uniform(LENET, 0.0001)


def test_bytes_stay_within_the_budget_and_use_it() -> None:
    kept = sum(allocate.by_bytes(LENET, 100_000).values())
    spent = 4 * kept + -(-430_500 // 8)
    assert 100_000 - 4 < spent <= 100_000
    with pytest.raises(ValueError, match="bytes of indices"):
        allocate.by_bytes(LENET, 1000)


def test_flops_stay_within_the_budget_and_one_more_weight_does_not() -> None:
    positions = {"c1": 576, "c2": 64, "f1": 1, "f2": 1}
    kept = allocate.by_flops(LENET, positions, 200_000)
    assert sum(k * positions[n] for n, k in kept.items()) <= 200_000
    sizes = {n: allocate._size(s) for n, s in LENET.items()}
    more = allocate._share(sizes, {n: float(sum(s)) for n, s in LENET.items()}, sum(kept.values()) + 1)
    assert sum(k * positions[n] for n, k in more.items()) > 200_000


def test_shapes_match_whole_paths() -> None:
    tree = {"a": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    assert allocate.shapes(tree) == {"a/kernel": (2, 3)}
    with pytest.raises(ValueError, match="matches no leaf; the paths are a/bias, a/kernel"):
        allocate.shapes(tree, "kernel")
