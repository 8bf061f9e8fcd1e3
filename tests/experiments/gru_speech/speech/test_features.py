"""The front end against loops over frames and filters with scipy's DCT; derivatives, normalisation, edge cases."""

import jax
import numpy as np
import pytest
import scipy.fft

from experiments.gru_speech.speech import features as fe
from experiments.gru_speech.speech.features import FrontEnd

RATE = 8_000


def _loops(x, rate, front):
    """The same formulas, a frame, a bin and a filter after the other, in float64."""
    window, hop = round(front.window * rate), round(front.hop * rate)
    size = 1
    while size < window:
        size *= 2
    top = front.high or rate / 2
    low, high = (1127 * np.log(1 + f / 700) for f in (front.low, top))
    edges = [low + (high - low) * i / (front.mels + 1) for i in range(front.mels + 2)]
    rows = []
    for start in range(0, len(x) - window + 1, hop):
        frame = np.array(x[start : start + window], np.float64)
        frame -= frame.mean()
        flat = frame.copy()
        for i in range(window):
            frame[i] = flat[i] - front.preemphasis * flat[max(i - 1, 0)]
            frame[i] *= 0.54 - 0.46 * np.cos(2 * np.pi * i / (window - 1))
        power = np.abs(np.fft.fft(np.pad(frame, (0, size - window))))[: size // 2 + 1] ** 2
        logs = []
        for m in range(front.mels):
            total = 0.0
            for k in range(size // 2 + 1):
                at = 1127 * np.log(1 + k * rate / size / 700)
                if edges[m] < at <= edges[m + 1]:
                    total += power[k] * (at - edges[m]) / (edges[m + 1] - edges[m])
                elif edges[m + 1] < at < edges[m + 2]:
                    total += power[k] * (edges[m + 2] - at) / (edges[m + 2] - edges[m + 1])
            logs.append(np.log(max(total, np.finfo(np.float32).eps)))
        if front.kind == "mfcc":
            c = scipy.fft.dct(np.array(logs), type=2, norm="ortho")[: front.coefficients]
            logs = [v * (1 + front.lifter / 2 * np.sin(np.pi * i / front.lifter)) for i, v in enumerate(c)]
        rows.append(logs)
    static = np.array(rows)

    def delta(rows):
        """Kaldi's: of the frames with the first and the last repeated on both sides, before filtering twice."""
        wide = np.stack([rows[min(max(t, 0), len(rows) - 1)] for t in range(-8, len(rows) + 8)])
        once = np.stack([sum(k * (wide[t + k] - wide[t - k]) for k in (1, 2)) / 10 for t in range(2, len(wide) - 2)])
        twice = np.stack([sum(k * (once[t + k] - once[t - k]) for k in (1, 2)) / 10 for t in range(2, len(once) - 2)])
        return once[6:-6], twice[4:-4]

    return np.concatenate([static, *delta(static)[: front.derivatives]], axis=1)


@pytest.mark.parametrize("front", [FrontEnd(), FrontEnd(kind="fbank", derivatives=0, mels=20)])
def test_it_is_the_loops(front, rng) -> None:
    x = np.rint(rng.normal(size=1500) * 900 + 2000 * np.sin(np.arange(1500) * 0.3)).astype(np.int16)
    have, want = fe.features(x, RATE, front), _loops(x, RATE, front)
    assert have.shape == want.shape == (1 + (1500 - 200) // 80, front.size)
    np.testing.assert_allclose(have, want, atol=2e-3)


def test_the_papers_39_features() -> None:
    assert FrontEnd().size == 39
    assert FrontEnd().frames(16_000, 16_000) == 98  # a second in windows of 25 ms every 10 ms
    assert FrontEnd().frames(399, 16_000) == 0


def test_filters_divide_the_band_and_peak_at_one() -> None:
    filters = fe.mel_filters(23, 512, 16_000, 20.0, 0.0)
    assert filters.shape == (257, 23)
    inside = filters.sum(axis=1)[(np.arange(257) > 3) & (np.arange(257) < 200)]
    np.testing.assert_allclose(inside, 1.0, atol=1e-5)  # neighbours overlap to one between the first and last peak
    with pytest.raises(ValueError, match="mels=120 is too many"):
        fe.mel_filters(120, 256, 8_000, 20.0, 0.0)
    with pytest.raises(ValueError, match="low=5000"):
        fe.mel_filters(23, 256, 8_000, 5000.0, 0.0)


def test_a_constant_has_no_derivatives_and_a_ramp_a_constant_one() -> None:
    rows = np.stack([np.full(20, 3.0), 0.5 * np.arange(20)], axis=1).astype(np.float32)
    out = np.asarray(fe.with_derivatives(jax.numpy.asarray(rows), 20, 2))
    np.testing.assert_allclose(out[:, 2], 0, atol=1e-6)
    np.testing.assert_allclose(out[4:-4, 3], 0.5, atol=1e-6)
    np.testing.assert_allclose(out[4:-4, 5], 0.0, atol=1e-6)


def test_silence_is_finite_and_too_short_is_refused() -> None:
    assert np.isfinite(fe.features(np.zeros(1500, np.int16), RATE, FrontEnd())).all()
    with pytest.raises(ValueError, match="do not fill a window of 200"):
        fe.features(np.zeros(199, np.int16), RATE, FrontEnd())


def test_per_speaker_normalisation(rng) -> None:
    frames = [rng.normal(loc=k, scale=1 + k, size=(30 + k, 4)).astype(np.float32) for k in range(4)]
    speakers = ["a", "b", "a", "b"]
    out, found = fe.per_speaker(frames, speakers)
    for who in "ab":
        mine = np.concatenate([f for f, s in zip(out, speakers, strict=True) if s == who])
        np.testing.assert_allclose(mine.mean(axis=0), 0, atol=1e-5)
        np.testing.assert_allclose(mine.std(axis=0), 1, atol=1e-5)
    np.testing.assert_array_equal(out[1], fe.normalise(frames[1], found["b"]))


@pytest.mark.parametrize("bad", [{"kind": "plp"}, {"coefficients": 30}, {"derivatives": 3}, {"hop": 0.05}])
def test_impossible_settings(bad) -> None:
    with pytest.raises(ValueError, match=f"features: {next(iter(bad))}="):
        FrontEnd(**bad)
