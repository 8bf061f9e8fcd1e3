"""What a plain count model gives on a text: the reference beside which a network's perplexity is read.

Source of the bigram: H. Ney, U. Essen, R. Kneser, "On structuring probabilistic dependences in stochastic language
modelling", 1994 (absolute discounting, interpolated, with Kneser and Ney's lower order).
"""

from __future__ import annotations

import numpy as np

from experiments.common.data.dataset import Array


def unigram_perplexity(train: Array, test: Array, words: int) -> float:
    """Perplexity of test[1:] by the words' shares of train, one added to each count."""
    counts = np.bincount(train, minlength=words) + 1.0
    return float(np.exp(-np.mean(np.log(counts[test[1:]] / counts.sum()))))


def bigram_perplexity(train: Array, test: Array, words: int, discount: float = 0.75) -> float:
    """Perplexity of test[1:] by pairs of neighbours in train.

        p(w | v) = max(c(v, w) - D, 0) / c(v) + D N(v) / c(v) q(w),   N(v) = |{w : c(v, w) > 0}|

    with q(w) proportional to the number of different words before w, half an occurrence added; q alone where v has no
    successor in train.

    Args:
      train, test: int32 ids.
      words: size of the vocabulary.
      discount: D, in (0, 1).
    """
    pairs = train[:-1].astype(np.int64) * words + train[1:]
    kinds, counts = np.unique(pairs, return_counts=True)
    before, after = kinds // words, kinds % words
    q = np.bincount(after, minlength=words) + 0.5
    q /= q.sum()
    total = np.bincount(before, weights=counts, minlength=words)
    different = np.bincount(before, minlength=words)
    v, w = test[:-1].astype(np.int64), test[1:]
    place = np.minimum(np.searchsorted(kinds, v * words + w), len(kinds) - 1)
    seen = np.where(kinds[place] == v * words + w, counts[place] - discount, 0.0)
    share = np.maximum(total[v], 1.0)
    p = np.where(total[v] > 0, seen / share + discount * different[v] / share * q[w], q[w])
    return float(np.exp(-np.mean(np.log(p))))
