"""Alignments against the recursive definition; counts add up."""

import functools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from experiments.gru_speech.speech import errors

words = st.lists(st.integers(0, 3), max_size=6)


def _distance(a, b):
    @functools.cache
    def d(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


@given(words, words)
def test_the_alignment_is_a_cheapest_one(a, b) -> None:
    pairs = errors.align(a, b)
    assert [x for x, _ in pairs if x is not None] == a
    assert [y for _, y in pairs if y is not None] == b
    e = errors.count([a], [b])
    assert e.substitutions + e.deletions + e.insertions == _distance(tuple(a), tuple(b))
    assert e.tokens == len(a)
    table = errors.confusion([a], [b], 4)
    assert table.sum() == len(pairs)
    assert np.trace(table) == len(pairs) - _distance(tuple(a), tuple(b))
    assert (table[:4, 4].sum(), table[4, :4].sum()) == (e.deletions, e.insertions)


def test_kinds_and_rate() -> None:
    e = errors.count([[1, 2, 3, 4], [5]], [[1, 9, 3], [5, 6]])
    assert e == (1, 1, 1, 5)
    assert e.rate == 3 / 5
    assert e.parts() == {"substitutions": 0.2, "deletions": 0.2, "insertions": 0.2}
    assert errors.count([[1]], [[2, 2, 2]]).rate == 3.0  # insertions can pass 1
