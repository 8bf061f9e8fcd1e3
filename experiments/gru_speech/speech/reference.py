"""A plain recogniser to compare with: hidden Markov models with one Gaussian a state, trained by Viterbi.

Every unit is a chain of S states without skips, every state a Gaussian with a diagonal covariance. Training begins with
each utterance cut evenly among the states of its units, then takes turns: means, variances and the probabilities of
staying from the alignment, the best alignment from them. Recognition is exact Viterbi over a loop of all units with
`decode.bigram`: what a textbook's first system reaches on the same features.

Source: L. Rabiner, "A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition", 1989, VI.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.gru_speech.speech import decode

FLOOR = 0.05  # of a variance; features are normalised to 1 per speaker


class Models(NamedTuple):
    """One chain a unit.

    Attributes:
      mean: float64 `[N, S, D]`.
      variance: float64 `[N, S, D]`.
      stay: float64 `[N, S]`, probability that a state stays for another frame.
    """

    mean: np.ndarray
    variance: np.ndarray
    stay: np.ndarray


def log_likelihood(models: Models, x: np.ndarray) -> np.ndarray:
    """log N(x_t; mean, variance) of every frame and state, float64 `[t, N, S]`, for x `[t, D]`."""
    precision = 1 / models.variance
    constant = np.sum(np.log(2 * np.pi * models.variance) + models.mean**2 * precision, axis=-1)
    square = np.einsum("td,nsd->tns", x**2, precision)
    cross = np.einsum("td,nsd->tns", x, models.mean * precision)
    return -0.5 * (square - 2 * cross + constant)


def align(scores: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """The best way through a chain: argmax over non-decreasing s_t in steps of at most 1, s_1 = 0, s_T = L - 1, of

        sum_t scores[t, s_t] + sum of log stay[s] (another frame in s) and log(1 - stay[s]) (going on)

    Args:
      scores: float `[t, L]`, t at least L.
      stay: float `[L]`.

    Returns:
      int64 `[t]`.
    """
    frames, states = scores.shape
    keep, go = np.log(stay), np.log1p(-stay)
    best = np.full(states, -np.inf)
    best[0] = scores[0, 0]
    came = np.zeros((frames, states), bool)
    for t in range(1, frames):
        onward = np.concatenate([[-np.inf], best[:-1] + go[:-1]])
        came[t] = onward > best + keep
        best = np.where(came[t], onward, best + keep) + scores[t]
    path = np.zeros(frames, np.int64)
    path[-1] = states - 1
    for t in range(frames - 1, 0, -1):
        path[t - 1] = path[t] - came[t, path[t]]
    return path


def train(
    features: Sequence[np.ndarray], spoken: Sequence[Sequence[int]], units: int, states: int = 3, rounds: int = 8
) -> Models:
    """Models of every unit from utterances whose units are known and whose boundaries are not.

    A state that no utterance reaches has mean 0 and variance 1. Utterances with fewer frames than states are left out.

    Args:
      features: float `[t, D]` each.
      spoken: units of each.
      units: N.
      states: S.
      rounds: alignments after the first, even one.

    Raises:
      ValueError: no utterance is long enough.
    """
    chains = [(x, np.asarray(s, np.int64)) for x, s in zip(features, spoken, strict=True)]
    usable = [(x, s) for x, s in chains if 0 < len(s) * states <= len(x)]
    if not usable:
        raise ValueError(f"no utterance has a unit, and a frame for each of its {states} states")
    dim = usable[0][0].shape[1]
    paths = [np.arange(len(x)) * (len(s) * states) // len(x) for x, s in usable]
    for turn in range(rounds + 1):
        count, visits = np.zeros(units * states), np.zeros(units * states)
        first, second = np.zeros((units * states, dim)), np.zeros((units * states, dim))
        for (x, s), path in zip(usable, paths, strict=True):
            place = (s[:, None] * states + np.arange(states)).reshape(-1)
            at = place[path]
            np.add.at(count, at, 1)
            np.add.at(visits, place, 1)
            np.add.at(first, at, x)
            np.add.at(second, at, np.square(x, dtype=np.float64))
        seen = np.maximum(count, 1)[:, None]
        mean = first / seen
        spread = np.where(count[:, None] > 0, np.maximum(second / seen - mean**2, FLOOR), 1.0)
        stay = np.clip(1 - visits / np.maximum(count, 1), 1e-3, 1 - 1e-3)
        shape = (units, states, dim)
        models = Models(mean.reshape(shape), spread.reshape(shape), stay.reshape(units, states))
        if turn < rounds:
            paths = [
                align(log_likelihood(models, x)[:, s].reshape(len(x), -1), models.stay[s].reshape(-1))
                for x, s in usable
            ]
    return models


def recognise(models: Models, x: np.ndarray, lm: decode.Bigram, lm_weight: float, reward: float) -> list[int]:
    """The units of the best path through a loop of all units, exact; a unit costs lm_weight log P and earns `reward`.

    Args:
      models: `train`'s.
      x: float `[t, D]`; in fewer frames than a unit has states nothing is heard.
      lm: over the units.
      lm_weight: against log-likelihoods, which grow with the number of features: a value near D / 4 is usual.
      reward: a unit.
    """
    units, states = models.stay.shape
    if len(x) < states:
        return []
    scores = log_likelihood(models, x)
    keep, go = np.log(models.stay), np.log1p(-models.stay)
    best = np.full((units, states), -np.inf)
    best[:, 0] = lm_weight * lm.first + reward + scores[0, :, 0]
    came = np.zeros((len(x), units, states), bool)  # from the state before; of state 0: from another unit
    origin = np.zeros((len(x), units), np.int64)
    for t in range(1, len(x)):
        leaving = (best[:, -1] + go[:, -1])[:, None] + lm_weight * lm.after + reward
        origin[t] = np.argmax(leaving, axis=0)
        entering = np.max(leaving, axis=0)
        onward = np.concatenate([entering[:, None], best[:, :-1] + go[:, :-1]], axis=1)
        came[t] = onward > best + keep
        best = np.where(came[t], onward, best + keep) + scores[t]
    unit = int(np.argmax(best[:, -1] + go[:, -1] + lm_weight * lm.last))
    state, found = states - 1, [unit]
    for t in range(len(x) - 1, 0, -1):
        if came[t, unit, state]:
            if state:
                state -= 1
            else:
                unit, state = int(origin[t, unit]), states - 1
                found.append(unit)
    return found[::-1]
