"""From a network's outputs to a sequence of units: a bigram, Viterbi over frames, prefix beam search for CTC.

Frames. Every unit is one state that stays for a geometric number of frames. A path s_1..s_T scores

    sum_t [log p(s_t | x_t) - a log p(s_t)]  +  w log P(units)  +  v (number of units)  +  log of staying and leaving

with p(s) from counts, the bigram P, and the weights a (prior), w (language model) and v (a reward a unit).

CTC. A unit sequence scores  log p(units | x) + w log P(units) + v (number of units), p summed over all its alignments.

Sources: L. Rabiner, "A Tutorial on Hidden Markov Models", 1989; A. Hannun et al., "First-Pass Large Vocabulary
Continuous Speech Recognition using Bi-Directional Recurrent DNNs", 2014 (prefix search).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

NEVER = -1e30  # a log-probability of 0 that does not make NaN when two of them are subtracted


class Bigram(NamedTuple):
    """Natural logarithms of probabilities over N units.

    Attributes:
      first: float32 `[N]`, of beginning with a unit.
      after: float32 `[N, N]`, row: the unit before.
      last: float32 `[N]`, of ending after a unit.
    """

    first: np.ndarray
    after: np.ndarray
    last: np.ndarray


def bigram(sequences: Sequence[Sequence[int]], units: int, strength: float = 2.0) -> Bigram:
    """A bigram, its counts mixed with the unigram as if that had been seen `strength` times in every context:

        P(j | i) = (c(i, j) + strength * P(j)) / (c(i) + strength),    P(j) = (c(j) + 1) / (c + N + 1)

    over j in the units and the end; the start is one more context. Nothing has probability 0.
    """
    counts = np.zeros((units + 1, units + 1))  # rows: units, start; columns: units, end
    for s in sequences:
        for a, b in zip([units, *s], [*s, units], strict=True):
            counts[a, b] += 1
    unigram = (counts.sum(axis=0) + 1) / (counts.sum() + units + 1)
    p = (counts + strength * unigram[None]) / (counts.sum(axis=1, keepdims=True) + strength)
    logs = np.log(p).astype(np.float32)
    return Bigram(logs[units, :units], logs[:units, :units], logs[:units, units])


class Frames(NamedTuple):
    """What training says about frames.

    Attributes:
      prior: float32 `[N]`, log share of each unit's frames (+1 smoothed).
      stay: float32 `[N]`, probability that a unit's state stays for another frame, 1 - 1 / mean length.
    """

    prior: np.ndarray
    stay: np.ndarray


def frame_statistics(labels: Sequence[np.ndarray], units: int) -> Frames:
    """From frame labels of training utterances, int `[t]`, -1 for frames without one."""
    frames, runs = np.ones(units), np.ones(units)  # a unit never seen has one run of one frame
    for row in labels:
        seen = row[row >= 0]
        frames += np.bincount(seen, minlength=units)
        starts = seen[np.insert(seen[1:] != seen[:-1], 0, True)] if seen.size else seen
        runs += np.bincount(starts, minlength=units)
    mean = np.maximum(frames / runs, 1.001)
    return Frames(np.log(frames / frames.sum()).astype(np.float32), (1 - 1 / mean).astype(np.float32))


@jax.jit
def viterbi(
    scores: Array, lengths: Array, lm: Bigram, stay: Array, lm_weight: Array, reward: Array, beam: Array
) -> tuple[Array, Array]:
    """The best state path of every utterance, exact where `beam` is infinite.

    Args:
      scores: float32 `[n, t, N]`, the first sum's terms.
      lengths: int32 `[n]`, frames of each utterance, at least 1.
      lm: the bigram; going from a unit to itself is staying.
      stay: float32 `[N]`.
      lm_weight: w.
      reward: v.
      beam: states worse than the best by more are given up.

    Returns:
      Paths int32 `[n, t]` (-1 from an utterance's end on) and scores float32 `[n]`.
    """
    units = scores.shape[-1]
    leave = jnp.log1p(-stay)
    move = leave[:, None] + lm_weight * lm.after + reward
    step = jnp.where(jnp.eye(units, dtype=bool), jnp.log(stay)[:, None], move)

    def one(score: Array, length: Array) -> tuple[Array, Array]:
        def forward(best: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            s, t = at
            kept = jnp.where(best < jnp.max(best) - beam, NEVER, best)
            through = kept[:, None] + step
            new = jnp.max(through, axis=0) + s
            return jnp.where(t < length, new, best), jnp.argmax(through, axis=0).astype(jnp.int32)

        start = lm_weight * lm.first + reward + score[0]
        times = jnp.arange(1, score.shape[0], dtype=jnp.int32)
        best, back = lax.scan(forward, start, (score[1:], times))
        total = best + leave + lm_weight * lm.last

        def backward(state: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
            pointers, t = at
            return jnp.where(t < length, pointers[state], state), jnp.where(t < length, state, -1)

        final = jnp.argmax(total).astype(jnp.int32)
        first, path = lax.scan(backward, final, (back, times), reverse=True)
        return jnp.concatenate([first[None], path]), jnp.max(total)

    return jax.vmap(one)(scores, lengths)


def units_of(path: np.ndarray) -> list[int]:
    """The units of a state path: runs become one, -1 is left out."""
    path = path[path >= 0]
    return path[np.insert(path[1:] != path[:-1], 0, True)].tolist() if path.size else []


def greedy(log_p: np.ndarray) -> list[int]:
    """CTC's best alignment `[t, 1 + N]` as units: repeats joined, the blank (output 0) left out."""
    return [k - 1 for k in units_of(np.argmax(log_p, axis=1)) if k > 0]


def prefix_beam(
    log_p: np.ndarray,
    lm: Bigram | None = None,
    lm_weight: float = 0.0,
    reward: float = 0.0,
    beam: int = 8,
    floor: float = -9.0,
) -> tuple[list[int], float]:
    """The best unit sequence under CTC by prefix beam search, exact for an endless beam and floor.

    Args:
      log_p: float `[t, 1 + N]`, log-probabilities; output 0 is the blank, output k + 1 unit k.
      lm: a bigram, or None.
      lm_weight: w.
      reward: v.
      beam: prefixes kept after every frame.
      floor: units whose log-probability at a frame is below it do not extend a prefix there.

    Returns:
      The units and their score.
    """

    def language(prefix: tuple[int, ...], k: int) -> float:
        if lm is None:
            return reward
        return lm_weight * float(lm.first[k] if not prefix else lm.after[prefix[-1], k]) + reward

    # prefix -> (log p of its alignments that end in a blank, that end in its last unit, language score)
    beams: dict[tuple[int, ...], tuple[float, float, float]] = {(): (0.0, NEVER, 0.0)}
    for row in np.asarray(log_p, np.float64):
        likely = np.flatnonzero(row[1:] >= floor)
        new: dict[tuple[int, ...], tuple[float, float, float]] = {}

        def add(prefix: tuple[int, ...], blank: float, unit: float, words: float, into: dict = new) -> None:
            old = into.get(prefix, (NEVER, NEVER, words))
            into[prefix] = (float(np.logaddexp(old[0], blank)), float(np.logaddexp(old[1], unit)), words)

        for prefix, (blank, unit, words) in beams.items():
            both = float(np.logaddexp(blank, unit))
            add(prefix, both + row[0], unit + row[1 + prefix[-1]] if prefix else NEVER, words)
            for k in likely.tolist():
                before = blank if prefix and prefix[-1] == k else both  # a repeat needs a blank between
                add((*prefix, k), NEVER, before + row[1 + k], words + language(prefix, k))
        ranked = sorted(new.items(), key=lambda item: (-_total(item[1]), item[0]))
        beams = dict(ranked[:beam])

    def final(prefix: tuple[int, ...], at: tuple[float, float, float]) -> float:
        end = lm_weight * float(lm.last[prefix[-1]]) if lm is not None and prefix else 0.0
        return _total(at) + end

    best = max(beams, key=lambda p: (final(p, beams[p]), p))
    return list(best), final(best, beams[best])


def _total(at: tuple[float, float, float]) -> float:
    return float(np.logaddexp(at[0], at[1])) + at[2]
