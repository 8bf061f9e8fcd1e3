"""Error rates of sequences: substitutions, deletions and insertions of a cheapest alignment, and confusions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Pair = tuple[int | None, int | None]  # of reference and hypothesis; None on the left is inserted, on the right deleted


class Errors(NamedTuple):
    """Counts over any number of sequences.

    Attributes:
      substitutions, deletions, insertions: errors of each kind.
      tokens: length of the references.
    """

    substitutions: int
    deletions: int
    insertions: int
    tokens: int

    @property
    def rate(self) -> float:
        """(substitutions + deletions + insertions) / tokens: can exceed 1."""
        return (self.substitutions + self.deletions + self.insertions) / max(self.tokens, 1)

    def parts(self) -> dict[str, float]:
        """The three kinds as fractions of the tokens."""
        n = max(self.tokens, 1)
        return {
            "substitutions": self.substitutions / n,
            "deletions": self.deletions / n,
            "insertions": self.insertions / n,
        }


def align(reference: Sequence[int], hypothesis: Sequence[int]) -> list[Pair]:
    """A cheapest alignment, every error costing 1, as pairs in order.

    Of several cheapest ones the last step prefers a pair over a deletion over an insertion, so that the split into
    kinds is defined; the sum does not depend on that.
    """
    ref, hyp = np.asarray(reference, np.int64), np.asarray(hypothesis, np.int64)
    n, m = len(ref), len(hyp)
    cost = np.zeros((n + 1, m + 1), np.int64)
    cost[0], cost[:, 0] = np.arange(m + 1), np.arange(n + 1)
    steps = np.arange(m + 1)
    for i in range(1, n + 1):
        row = np.empty(m + 1, np.int64)
        row[0] = i
        row[1:] = np.minimum(cost[i - 1, 1:] + 1, cost[i - 1, :-1] + (hyp != ref[i - 1]))
        # cost[j] = min over k <= j of row[k] + (j - k): insertions after k, as a running minimum
        cost[i] = np.minimum.accumulate(row - steps) + steps
    pairs: list[Pair] = []
    i, j = n, m
    while i or j:
        if i and j and cost[i, j] == cost[i - 1, j - 1] + (ref[i - 1] != hyp[j - 1]):
            i, j = i - 1, j - 1
            pairs.append((int(ref[i]), int(hyp[j])))
        elif i and cost[i, j] == cost[i - 1, j] + 1:
            i -= 1
            pairs.append((int(ref[i]), None))
        else:
            j -= 1
            pairs.append((None, int(hyp[j])))
    return pairs[::-1]


def count(references: Sequence[Sequence[int]], hypotheses: Sequence[Sequence[int]]) -> Errors:
    """Errors over pairs of sequences."""
    pairs = [p for r, h in zip(references, hypotheses, strict=True) for p in align(r, h)]
    return Errors(
        substitutions=sum(a is not None and b is not None and a != b for a, b in pairs),
        deletions=sum(b is None for _, b in pairs),
        insertions=sum(a is None for a, _ in pairs),
        tokens=sum(len(r) for r in references),
    )


def confusion(references: Sequence[Sequence[int]], hypotheses: Sequence[Sequence[int]], units: int) -> np.ndarray:
    """How often each reference unit was recognised as which, int64 `[units + 1, units + 1]`.

    Row r is the reference, column h the hypothesis; the last row counts insertions, the last column deletions.
    """
    table = np.zeros((units + 1, units + 1), np.int64)
    for r, h in zip(references, hypotheses, strict=True):
        for a, b in align(r, h):
            table[units if a is None else a, units if b is None else b] += 1
    return table
