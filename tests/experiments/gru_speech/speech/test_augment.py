"""Speeds: lengths, pitch, labels that move along, and what is refused."""

import numpy as np
import pytest

from experiments.gru_speech.speech import augment, tones
from experiments.gru_speech.speech.corpus import Utterance


def sine(hertz: float, n: int = 8000, rate: int = 8000) -> np.ndarray:
    """A loud tone."""
    return np.rint(12000 * np.sin(2 * np.pi * hertz * np.arange(n) / rate)).astype(np.int16)


@pytest.mark.parametrize("factor", [0.8, 0.9, 1.1, 1.25])
def test_speed_moves_pitch_and_length(factor: float) -> None:
    made = augment.at_speed(Utterance("a", "s", sine(500), ("x", "y"), ((0, 3000, "x"), (3000, 8000, "y"))), factor)
    assert len(made.samples) == pytest.approx(8000 / factor, abs=1)
    loudest = np.argmax(np.abs(np.fft.rfft(made.samples))) * 8000 / len(made.samples)
    assert loudest == pytest.approx(500 * factor, abs=2)
    assert made.labels == ("x", "y")
    assert made.segments[0][1] == made.segments[1][0] == pytest.approx(3000 / factor, abs=1)
    assert made.segments[1][1] <= len(made.samples)


def test_resampling_is_band_limited_interpolation() -> None:
    """Away from the ends a slowed tone is the tone of lower pitch, sample by sample."""
    made = augment.at_speed(Utterance("a", "s", sine(500), ()), 0.8).samples
    np.testing.assert_allclose(made[500:-500], sine(400, len(made))[500:-500], atol=30)


def test_loud_samples_do_not_wrap() -> None:
    square = np.where(np.arange(4000) // 40 % 2, 32767, -32768).astype(np.int16)
    made = augment.at_speed(Utterance("a", "s", square, ()), 0.9).samples
    assert made.max() == 32767
    assert made.min() == -32768
    loud = made[np.abs(made.astype(int)) > 8000]  # what wraps changes its sign amid a half wave
    assert np.count_nonzero(np.diff(np.sign(loud))) == 99


def test_a_corpus_at_three_speeds_has_three_times_the_utterances_and_speakers() -> None:
    corpus = tones.load("dev")
    made = augment.speeds(corpus, (0.9, 1.0, 1.1))
    assert len(made.utterances) == 3 * len(corpus.utterances)
    assert len(made.speakers) == 3 * len(corpus.speakers)
    assert {u.name for u in corpus.utterances} <= {u.name for u in made.utterances}
    assert [u.name for u in made.utterances] == sorted(u.name for u in made.utterances)
    assert augment.speeds(corpus, (1.0,)) is corpus


@pytest.mark.parametrize("factors", [(), (1.0, 1.0), (0.4,), (2.5, 1.0)])
def test_refuses_impossible_speeds(factors: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        augment.speeds(tones.load("dev"), factors)
