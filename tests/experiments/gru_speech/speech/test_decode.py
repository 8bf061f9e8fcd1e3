"""Bigram, Viterbi and CTC search against enumeration."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.gru_speech.speech import decode


def test_a_bigram_is_a_distribution_and_counts() -> None:
    lm = decode.bigram([[0, 1, 0, 1], [0, 1]], 3)
    # at the start the end comes with (0 + 2 P(end)) / (2 + 2), P(end) = (2 + 1) / (8 + 4)
    np.testing.assert_allclose(np.exp(lm.first).sum(), 1 - 2 * 3 / 12 / 4, atol=1e-6)
    rows = np.exp(lm.after).sum(axis=1) + np.exp(lm.last)
    np.testing.assert_allclose(rows, 1, atol=1e-6)
    # after 0 comes 1 three times of three: (3 + 2 P(1)) / (3 + 2), P(1) = (3 + 1) / (8 + 4)
    np.testing.assert_allclose(np.exp(lm.after[0, 1]), (3 + 2 * 4 / 12) / 5, atol=1e-6)
    assert np.isfinite(lm.after).all()  # what was never seen is unlikely, not impossible


def test_frame_statistics() -> None:
    found = decode.frame_statistics([np.array([0, 0, 0, 1, -1, 1]), np.array([1, 1])], 3)
    np.testing.assert_allclose(np.exp(found.prior), np.array([4, 5, 1]) / 10, atol=1e-6)
    np.testing.assert_allclose(found.stay[0], 1 - 2 / 4, atol=1e-6)  # one run of 3 frames, and one of 1 by smoothing
    assert np.all((found.stay > 0) & (found.stay < 1))


def _path_score(path, scores, lm, stay, w, v):
    total = sum(scores[t, s] for t, s in enumerate(path)) + w * lm.first[path[0]] + v
    for a, b in itertools.pairwise(path):
        total += np.log(stay[a]) if a == b else np.log1p(-stay[a]) + w * lm.after[a, b] + v
    return total + np.log1p(-stay[path[-1]]) + w * lm.last[path[-1]]


def test_viterbi_is_the_best_of_all_paths(rng) -> None:
    n, t, units = 4, 5, 3
    lm = decode.bigram([[0, 1, 2], [2, 1], [0, 2, 0]], units)
    stay = np.array([0.3, 0.6, 0.8], np.float32)
    scores = rng.normal(size=(n, t, units)).astype(np.float32) * 2
    lengths = np.array([5, 3, 1, 4], np.int32)
    paths, totals = decode.viterbi(scores, lengths, lm, stay, jnp.float32(1.5), jnp.float32(-0.4), jnp.float32(np.inf))
    for i, length in enumerate(lengths):
        every = {p: _path_score(p, scores[i], lm, stay, 1.5, -0.4) for p in itertools.product(range(3), repeat=length)}
        best = max(every, key=every.get)
        assert tuple(np.asarray(paths[i, :length])) == best
        np.testing.assert_allclose(totals[i], every[best], rtol=1e-5)
        assert np.all(np.asarray(paths[i, length:]) == -1)
    narrow, worse = decode.viterbi(
        scores, lengths, lm, stay, jnp.float32(1.5), jnp.float32(-0.4), jnp.float32(0.0)
    )  # a beam that keeps one state: never better, still a path
    assert np.all(np.asarray(worse) <= np.asarray(totals) + 1e-5)
    assert np.asarray(narrow).max() < units


def test_units_of_a_path() -> None:
    assert decode.units_of(np.array([2, 2, 0, 0, 2, -1, -1])) == [2, 0, 2]
    assert decode.units_of(np.array([-1])) == []


def _collapse(path):
    return tuple(k - 1 for k, _ in itertools.groupby(path) if k)


def _all_strings(log_p):
    out = {}
    for path in itertools.product(range(log_p.shape[1]), repeat=len(log_p)):
        s, p = _collapse(path), sum(log_p[t, k] for t, k in enumerate(path))
        out[s] = np.logaddexp(out.get(s, -np.inf), p)
    return out


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.3]))
def test_prefix_search_is_exact_with_an_endless_beam(seed, weight) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(5, 3)) * 2
    log_p = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    lm = decode.bigram([[0, 1], [1, 1, 0]], 2)

    def language(s):
        total = 0.2 * len(s)
        if s:
            total += weight * (lm.first[s[0]] + sum(lm.after[a, b] for a, b in itertools.pairwise(s)) + lm.last[s[-1]])
        return total

    every = {s: p + language(s) for s, p in _all_strings(log_p).items()}
    best = max(every.values())
    units, score = decode.prefix_beam(log_p, lm, weight, 0.2, beam=10_000, floor=-1e9)
    assert score == pytest.approx(best, abs=1e-5)
    assert every[tuple(units)] == pytest.approx(best, abs=1e-5)
    assert decode.prefix_beam(log_p, lm, weight, 0.2, beam=1)[1] <= best + 1e-6


def test_greedy_collapses() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    assert decode.greedy(np.log(np.eye(3)[path] + 1e-9)) == [0, 0, 1]
