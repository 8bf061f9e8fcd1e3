"""A speech-like corpus that needs no file: sequences of two-tone sounds, some alike, from speakers of different pitch.

Seven sounds and silence follow each other by a Markov chain, so that a bigram helps; a sound is two partials with a
gliding first one, in noise, its pitch scaled by the speaker. A pure function of the split.
"""

from __future__ import annotations

import numpy as np

from experiments.common.data import Info
from experiments.common.data.batches import epoch_order
from experiments.gru_speech.speech import phones
from experiments.gru_speech.speech.corpus import Corpus, Utterance

RATE = 8_000
NAMES = ("sil", "a", "e", "i", "o", "u", "m", "s")
_PARTIALS = {  # Hz of the two partials: a and o, e and i, u and m are neighbours
    "a": (620.0, 1180.0),
    "o": (560.0, 1000.0),
    "e": (480.0, 1900.0),
    "i": (420.0, 2200.0),
    "u": (340.0, 800.0),
    "m": (300.0, 950.0),
    "s": (2900.0, 3500.0),
}
_SPEAKERS = {"train": 6, "dev": 2, "test": 3}
_EACH = {"train": 10, "dev": 5, "test": 6}
_STREAM = {"train": 0, "dev": 1, "test": 2}

INFO = Info(
    name="tones",
    source="generated: two-tone sounds in noise",
    licence="Apache-2.0",
    classes=len(NAMES),
    shape=(),
    class_names=NAMES,
    stand_in=True,
    note="no speech; shows that everything works, and nothing else",
)


def load(split: str) -> Corpus:
    """The split: 60, 10 or 18 utterances of about a second."""
    out = []
    for speaker in range(_SPEAKERS[split]):
        who = f"{split}{speaker}"
        pitch = 0.88 + 0.24 * _draw(_STREAM[split], speaker, 1)[0]
        for number in range(_EACH[split]):
            draws = _draw(_STREAM[split], 100 + 50 * speaker + number, 40_000)
            out.append(_utterance(who, number, float(pitch), draws))
    return Corpus(tuple(out), RATE, phones.plain(NAMES), "phone", INFO)


def _draw(stream: int, number: int, n: int) -> np.ndarray:
    """n numbers in [0, 1) from the raw bits of Philox, which no NumPy release may change."""
    bits = np.random.Philox(key=np.array([0x70E5 + stream, number], np.uint64)).random_raw(n)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _next(unit: int, draw: float) -> int:
    """The unit after another: with probability 0.6 one of its two usual followers, otherwise any other."""
    followers = [int(k) for k in epoch_order(77, unit, len(NAMES)) if k != unit]
    if draw < 0.6:
        return followers[0] if draw < 0.35 else followers[1]
    return followers[2 + int((draw - 0.6) / 0.4 * (len(followers) - 2))]


def _utterance(who: str, number: int, pitch: float, u: np.ndarray) -> Utterance:
    unit, parts, segments, at = 0, [], [], 0
    count = 7 + int(5 * u[0])
    for k in range(count):
        length = int(RATE * (0.05 + 0.09 * u[10 + 3 * k]))
        name = NAMES[unit]
        if name == "sil":
            part = np.zeros(length)
        else:
            t, ramp = np.arange(length) / RATE, np.linspace(0, 1, length)
            low, high = (f * pitch for f in _PARTIALS[name])
            glide = low * (1 + 0.12 * (u[11 + 3 * k] - 0.5) * ramp)
            edge = np.minimum(1, np.minimum(ramp, 1 - ramp) * 8)
            part = edge * (np.sin(2 * np.pi * np.cumsum(glide) / RATE) + 0.6 * np.sin(2 * np.pi * high * t))
        parts.append(part)
        segments.append((at, at + length, name))
        at += length
        unit = _next(unit, u[12 + 3 * k])
    sound = np.concatenate(parts) * (0.5 + u[1])
    noise = np.sqrt(-2 * np.log1p(-u[100 : 100 + at])) * np.cos(2 * np.pi * u[20_000 : 20_000 + at])  # Box-Muller
    samples = np.clip(np.rint(4000 * (sound + 0.55 * noise)), -32_768, 32_767).astype(np.int16)
    return Utterance(f"{who}/{number:02d}", who, samples, tuple(n for _, _, n in segments), tuple(segments))
