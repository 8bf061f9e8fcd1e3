"""Splits are disjoint, complete and functions of their seed; and they are what their names say."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from compressx.federated import splits

LABELS = np.repeat(np.arange(10), 40)[np.random.default_rng(0).permutation(400)].astype(np.int32)


@settings(max_examples=30)
@given(
    name=st.sampled_from(list(splits.SPLITS)),
    seed=st.integers(0, 2**32 - 1),
    clients=st.integers(5, 40),
    labels=st.lists(st.integers(0, 4), min_size=120, max_size=300),
)
def test_every_example_goes_to_exactly_one_client(name: str, seed: int, clients: int, labels: list[int]) -> None:
    given_labels = np.array([*range(5), *labels] * 3)
    split = splits.SPLITS[name](seed, given_labels, clients)
    assert len(split) == clients and all(len(part) >= 1 for part in split)
    assert sorted(np.concatenate(split).tolist()) == list(range(len(given_labels)))
    again = splits.SPLITS[name](seed, given_labels, clients)
    assert all(np.array_equal(a, b) for a, b in zip(split, again, strict=True))
    assert int(splits.table(split, given_labels).sum()) == len(given_labels)


def test_other_seeds_give_other_splits() -> None:
    for make in splits.SPLITS.values():
        a, b = make(0, LABELS, 8), make(1, LABELS, 8)
        assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_iid_sizes_differ_by_at_most_one() -> None:
    sizes = [len(p) for p in splits.iid(3, LABELS, 7)]
    assert max(sizes) - min(sizes) <= 1


def test_shards_hold_few_labels() -> None:
    counts = splits.table(splits.shards(3, LABELS, 20, each=2), LABELS)
    assert np.all((counts > 0).sum(1) <= 2) and np.all(counts.sum(1) == 20)


def test_classes_hold_exactly_so_many() -> None:
    counts = splits.table(splits.classes(3, LABELS, 15, each=2), LABELS)
    assert np.all((counts > 0).sum(1) == 2)


def test_dirichlet_skew_grows_as_alpha_falls() -> None:
    skew = [
        np.mean([splits.heterogeneity(splits.table(splits.dirichlet(s, LABELS, 10, a), LABELS)) for s in range(4)])
        for a in (100.0, 1.0, 0.1)
    ]
    assert skew[0] < 0.15 < skew[1] < skew[2]


def test_dirichlet_keeps_the_least() -> None:
    assert min(len(p) for p in splits.dirichlet(0, LABELS, 20, alpha=0.01, least=6)) >= 6


def test_quantity_skews_sizes_only() -> None:
    counts = splits.table(splits.quantity(0, LABELS, 10, alpha=0.3, least=4), LABELS)
    assert counts.sum(1).min() >= 4 and counts.sum(1).max() > 80


def test_heterogeneity_by_hand() -> None:
    assert splits.heterogeneity(np.array([[5, 5], [5, 5]])) == 0
    assert splits.heterogeneity(np.array([[10, 0], [0, 10]])) == pytest.approx(0.5)
    # 3/4 of the examples in a client of shares (2/3, 1/3), 1/4 in one of (0, 1); overall (1/2, 1/2)
    assert splits.heterogeneity(np.array([[10, 5], [0, 5]])) == pytest.approx(0.75 / 6 + 0.25 / 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: splits.iid(0, LABELS, 401), "400 examples cannot give 401 clients"),
        (lambda: splits.dirichlet(0, LABELS, 4, alpha=0.0), "alpha must be positive"),
        (lambda: splits.classes(0, LABELS, 4, each=2), "cannot hold 10 classes"),
        (lambda: splits.shards(0, LABELS, 4, each=0), "each must be at least 1"),
        (lambda: splits.iid(0, LABELS.astype(float), 4), "labels must be integers"),
    ],
)
def test_impossible_splits_are_refused(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
