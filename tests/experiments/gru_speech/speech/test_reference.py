"""The plain recogniser, against all paths of small chains, and on sequences whose units are known."""

import itertools

import numpy as np
import pytest

from experiments.gru_speech.speech import decode, reference


def total(scores: np.ndarray, stay: np.ndarray, path: tuple[int, ...]) -> float:
    """What a path through a chain scores, step by step."""
    out = scores[0, path[0]]
    for t in range(1, len(path)):
        out += np.log(stay[path[t]] if path[t] == path[t - 1] else 1 - stay[path[t - 1]]) + scores[t, path[t]]
    return float(out)


@pytest.mark.parametrize("seed", range(6))
def test_align_is_the_best_of_all_paths(seed: int) -> None:
    rng = np.random.default_rng(seed)
    frames, states = int(rng.integers(3, 8)), int(rng.integers(1, 4))
    scores, stay = rng.normal(size=(frames, states)), rng.uniform(0.1, 0.9, states)
    ways = [
        p
        for p in itertools.product(range(states), repeat=frames)
        if p[0] == 0 and p[-1] == states - 1 and all(b - a in (0, 1) for a, b in itertools.pairwise(p))
    ]
    best = max(ways, key=lambda p: total(scores, stay, p))
    assert tuple(reference.align(scores, stay)) == best


@pytest.mark.parametrize("seed", range(6))
def test_recognise_is_the_best_of_all_unit_sequences(seed: int) -> None:
    """Every sequence of up to three of two units, every alignment of each: the loop finds the best of all."""
    rng = np.random.default_rng(seed)
    units, states, frames = 2, 2, 6
    shape = (units, states, 3)
    stay = rng.uniform(0.2, 0.8, shape[:2])
    models = reference.Models(rng.normal(size=shape), rng.uniform(0.5, 2, shape), stay)
    x = rng.normal(size=(frames, 3))
    lm = decode.bigram([[0, 1, 1], [1, 0]], units)
    scores = reference.log_likelihood(models, x)
    best, winner = -np.inf, []
    for n in range(1, frames // states + 1):
        for s in itertools.product(range(units), repeat=n):
            chain = scores[:, s].reshape(frames, -1)
            stay = models.stay[list(s)].reshape(-1)
            path = reference.align(chain, stay)
            language = lm.first[s[0]] + sum(lm.after[a, b] for a, b in itertools.pairwise(s)) + lm.last[s[-1]]
            leave = np.log(1 - models.stay[s[-1], -1])
            value = total(chain, stay, tuple(path)) + leave + 1.5 * language - 0.3 * n
            if value > best:
                best, winner = value, list(s)
    assert reference.recognise(models, x, lm, 1.5, -0.3) == winner


def test_log_likelihood_is_the_normal_density() -> None:
    rng = np.random.default_rng(0)
    models = reference.Models(rng.normal(size=(2, 1, 3)), rng.uniform(0.5, 2, (2, 1, 3)), np.full((2, 1), 0.5))
    x = rng.normal(size=(4, 3))
    for t, n in itertools.product(range(4), range(2)):
        m, v = models.mean[n, 0], models.variance[n, 0]
        density = np.prod(np.exp(-((x[t] - m) ** 2) / (2 * v)) / np.sqrt(2 * np.pi * v))
        np.testing.assert_allclose(reference.log_likelihood(models, x)[t, n, 0], np.log(density), rtol=1e-10)


def test_training_finds_units_without_boundaries() -> None:
    """Units of two states with means of their own, random lengths: an unseen string is read without an error."""
    rng = np.random.default_rng(1)
    means = rng.normal(size=(4, 2, 5)) * 2

    def say(s: list[int]) -> np.ndarray:
        lengths = rng.integers(3, 12, size=(len(s), 2))
        rows = [np.repeat(means[u, k][None], lengths[i, k], axis=0) for i, u in enumerate(s) for k in range(2)]
        clean = np.concatenate(rows)
        return clean + rng.normal(size=clean.shape) * 0.5

    spoken = [rng.integers(0, 4, size=5).tolist() for _ in range(30)]
    models = reference.train([say(s) for s in spoken], spoken, units=4, states=2)
    lm = decode.bigram(spoken, 4)
    for s in [[0, 0, 3], [2, 1], [3, 3, 3, 1, 0]]:
        assert reference.recognise(models, say(s), lm, 1.0, -5.0) == s
    assert np.abs(models.mean - means).max() < 0.5


def test_refuses_what_it_cannot_align() -> None:
    with pytest.raises(ValueError, match="no utterance has"):
        reference.train([np.zeros((2, 3))], [[0]], units=1, states=3)
