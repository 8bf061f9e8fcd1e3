"""More speakers than were recorded: every utterance also slower and faster, with pitch and formants moved along.

Source: T. Ko, V. Peddinti, D. Povey, S. Khudanpur, "Audio Augmentation for Speech Recognition", 2015.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from scipy import signal

from experiments.gru_speech.speech.corpus import Corpus, Utterance


def at_speed(utterance: Utterance, factor: float) -> Utterance:
    """The utterance resampled to 1 / factor of its length (band-limited), under the name of another speaker.

    The factor is rounded to a fraction p / q with q up to 100; sample n becomes sample n q / p of the result.

    Raises:
      ValueError: a factor outside 0.5 to 2.
    """
    if not 0.5 <= factor <= 2:
        raise ValueError(f"speed={factor} is impossible; it must be 0.5 to 2")
    if factor == 1:
        return utterance
    part = Fraction(factor).limit_denominator(100)
    p, q = part.numerator, part.denominator
    sound = signal.resample_poly(utterance.samples.astype(np.float64), q, p)
    samples = np.clip(np.rint(sound), -32768, 32767).astype(np.int16)
    segments = tuple((a * q // p, min(b * q // p, len(samples)), label) for a, b, label in utterance.segments)
    name = f"{factor:g}"
    return utterance._replace(
        name=f"{utterance.name}@{name}", speaker=f"{utterance.speaker}@{name}", samples=samples, segments=segments
    )


def speeds(corpus: Corpus, factors: Sequence[float]) -> Corpus:
    """A corpus with every utterance at every speed; 1 is as it was recorded.

    Raises:
      ValueError: no factor, one twice, or one that is impossible.
    """
    if not factors or len(set(factors)) != len(factors):
        raise ValueError(f"speeds={tuple(factors)} is impossible; they must be different factors, 1 for the recordings")
    if tuple(factors) == (1,):
        return corpus
    made = [at_speed(u, f) for u in corpus.utterances for f in factors]
    return dataclasses.replace(corpus, utterances=tuple(sorted(made, key=lambda u: u.name)))
