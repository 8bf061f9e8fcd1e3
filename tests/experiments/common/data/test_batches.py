"""The order of examples: permutations, exact resumption, and values that must never change."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common.data.batches import (
    Position,
    advance,
    batch_indices,
    batches,
    cover,
    epoch_batches,
    epoch_order,
    steps_per_epoch,
)


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


@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["drop", "wrap"]), st.integers(0, 3))
def test_an_epoch_covers_what_it_says(n: int, size: int, remainder: str, epoch: int) -> None:
    if size > n:
        return
    rows = epoch_batches(3, epoch, n, size, remainder)
    seen = np.bincount(rows.ravel(), minlength=n)
    assert rows.shape == (steps_per_epoch(n, size, remainder), size)
    if remainder == "drop":
        assert seen.max() == 1 and (seen == 0).sum() == n % size
    else:
        assert seen.min() == 1 and seen.max() <= 2 and seen.sum() - n < size


@pytest.mark.parametrize("remainder", ["drop", "wrap"])
def test_a_resumed_run_sees_the_same_batches(remainder: str) -> None:
    whole = list(itertools.islice(batches(5, 23, 4, remainder), 20))
    for taken in range(19):
        after = advance(whole[taken][0], 23, 4, remainder)
        resumed = itertools.islice(batches(5, 23, 4, remainder, start=after), 19 - taken)
        for (position, rows), (expected_position, expected_rows) in zip(resumed, whole[taken + 1 :], strict=True):
            assert position == expected_position
            assert np.array_equal(rows, expected_rows)
            assert np.array_equal(rows, batch_indices(5, position, 23, 4, remainder))


def test_advance_counts_many_steps() -> None:
    position = Position(0, 0)
    for steps in range(50):
        assert advance(Position(0, 0), 23, 4, steps=steps) == position
        position = advance(position, 23, 4)


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
    with pytest.raises(ValueError, match="remainder .* 'keep'"):
        steps_per_epoch(5, 2, "keep")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step must be 0 to 1, got 2"):
        batch_indices(0, Position(0, 2), 5, 2)
    with pytest.raises(ValueError, match=r"start.step"):
        next(batches(0, 5, 2, start=Position(0, 9)))
    with pytest.raises(ValueError, match="got 3 and 0"):
        cover(3, 0)
