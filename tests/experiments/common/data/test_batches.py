"""The order of examples: permutations, and values that must never change."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.data.batches import cover, epoch_batches, epoch_order, steps_per_epoch


def philox4x64_first_block(key: tuple[int, int]) -> list[int]:
    """Philox4x64-10 of counter 1, written out from the algorithm (Salmon et al. 2011) in Python integers."""
    mask = 2**64 - 1
    counter, (k0, k1) = [1, 0, 0, 0], key  # NumPy raises its counter before the first block
    for _ in range(10):
        p0, p1 = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(p1 >> 64) ^ counter[1] ^ k0, p1 & mask, (p0 >> 64) ^ counter[3] ^ k1, p0 & mask]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & mask, (k1 + 0xBB67AE8584CAA73B) & mask
    return counter


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
@pytest.mark.parametrize("epoch", [0, 7])
def test_the_order_is_that_of_the_published_generator(seed: int, epoch: int) -> None:
    keys = philox4x64_first_block((seed, epoch))
    expected = sorted(range(4), key=lambda i: keys[i])
    assert epoch_order(seed, epoch, 4).tolist() == expected


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 500))
def test_order_is_a_permutation(seed: int, epoch: int, n: int) -> None:
    order = epoch_order(seed, epoch, n)
    assert order.dtype == np.int32
    assert np.array_equal(np.sort(order), np.arange(n))


def test_epochs_and_seeds_differ() -> None:
    orders = [tuple(epoch_order(seed, epoch, 100)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 3))
def test_an_epoch_sees_no_example_twice_and_leaves_out_less_than_a_batch(n: int, size: int, epoch: int) -> None:
    if size > n:
        return
    rows = epoch_batches(3, epoch, n, size)
    seen = np.bincount(rows.ravel(), minlength=n)
    assert rows.shape == (steps_per_epoch(n, size), size)
    assert seen.max() == 1 and (seen == 0).sum() == n % size


@given(st.integers(0, 50), st.integers(1, 20))
def test_cover_sees_each_example_once(n: int, size: int) -> None:
    rows, valid = cover(n, size)
    assert np.array_equal(rows[valid], np.arange(n))
    assert rows.shape == valid.shape and rows.shape[1] == size
    assert not rows[~valid].any()


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"seed must be .* got -1"):
        epoch_order(-1, 0, 5)
    with pytest.raises(ValueError, match=r"batch_size .*\(5\), got 6"):
        steps_per_epoch(5, 6)
    with pytest.raises(ValueError, match="got 3 and 0"):
        cover(3, 0)
