"""The acoustic front end: MFCC or log mel filterbanks with their derivatives, normalised per speaker.

    sound -> frames -> (no offset, pre-emphasis, window) -> |FFT|^2 -> mel filters -> log -> DCT, lifter -> derivatives

With s samples a hop and w a window, frame t covers samples [t s, t s + w), and n samples have 1 + floor((n - w) / s)
frames: nothing is padded. Mel filters are triangles on the mel scale, 1127 ln(1 + f / 700). Derivatives are

    delta_t = sum_{k=1..2} k (c_{t+k} - c_{t-k}) / 10,      delta-delta: the same filter twice, as one of +-4 frames,

over the static features with their first and last frame repeated. The conventions are Kaldi's, except for the window
(Hamming) and no dither. Filter tables are NumPy constants; everything on the sound is JAX.

Source: S. Davis, P. Mermelstein, "Comparison of Parametric Representations for Monosyllabic Word Recognition", 1980.
"""

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

_FLOOR = float(np.finfo(np.float32).eps)  # of the mel energies: digital silence has a logarithm too
_REACH = 2  # frames on each side of a derivative


@dataclass(frozen=True)
class FrontEnd:
    """What is computed from the sound.

    Attributes:
      kind: "mfcc", or "fbank" for the log mel energies themselves.
      coefficients: of an MFCC frame; the paper's network has 13.
      mels: mel filters.
      derivatives: 0, 1 (deltas) or 2 (delta-deltas too).
      window: seconds.
      hop: seconds.
      low: Hz, lower edge of the first filter.
      high: Hz, upper edge of the last filter; 0 is half the sampling rate.
      preemphasis: x_t - preemphasis * x_{t-1} inside a frame.
      lifter: cepstra are scaled by 1 + lifter / 2 * sin(pi i / lifter); 0 is not at all.
    """

    kind: str = "mfcc"
    coefficients: int = 13
    mels: int = 23
    derivatives: int = 2
    window: float = 0.025
    hop: float = 0.010
    low: float = 20.0
    high: float = 0.0
    preemphasis: float = 0.97
    lifter: float = 22.0

    def __post_init__(self) -> None:
        for ok, key, value, allowed in (
            (self.kind in ("mfcc", "fbank"), "kind", self.kind, "mfcc or fbank"),
            (1 <= self.coefficients <= self.mels, "coefficients", self.coefficients, "1 to the number of mel filters"),
            (self.derivatives in (0, 1, 2), "derivatives", self.derivatives, "0, 1 or 2"),
            (0 < self.hop <= self.window, "hop", self.hop, "positive and at most the window"),
            (self.low >= 0, "low", self.low, "0 or more"),
            (0 <= self.preemphasis < 1, "preemphasis", self.preemphasis, "in [0, 1)"),
            (self.lifter >= 0, "lifter", self.lifter, "0 or more"),
        ):
            if not ok:
                raise ValueError(f"features: {key}={value!r} is impossible; it must be {allowed}")

    @property
    def static(self) -> int:
        """Static features a frame."""
        return self.coefficients if self.kind == "mfcc" else self.mels

    @property
    def size(self) -> int:
        """Features a frame, derivatives included: 39 by default."""
        return self.static * (1 + self.derivatives)

    @property
    def context(self) -> int:
        """Frames on each side that a frame's derivatives see: the look-ahead of streaming."""
        return _REACH * self.derivatives

    def samples(self, rate: int) -> tuple[int, int]:
        """Samples of a window and of a hop."""
        return round(self.window * rate), round(self.hop * rate)

    def frames(self, n: int, rate: int) -> int:
        """Frames of n samples; 0 where they do not fill a window."""
        window, hop = self.samples(rate)
        return 0 if n < window else 1 + (n - window) // hop


def mel(hz: float | np.ndarray) -> np.ndarray:
    """Frequency on the mel scale, 1127 ln(1 + f / 700)."""
    return 1127.0 * np.log1p(np.asarray(hz, np.float64) / 700.0)


@functools.cache
def mel_filters(mels: int, size: int, rate: int, low: float, high: float) -> np.ndarray:
    """Triangular filters over the bins of an FFT, float32 `[size / 2 + 1, mels]`.

    Filter i rises from edge i to edge i + 1 and falls to edge i + 2, linearly on the mel scale; the edges divide
    [low, high] evenly there.

    Raises:
      ValueError: the band is empty, or a filter holds no bin.
    """
    top = high or rate / 2
    if not low < top <= rate / 2:
        raise ValueError(f"features: low={low} and high={high} are impossible at {rate} samples a second")
    edges = np.linspace(mel(low), mel(top), mels + 2)
    at = mel(np.arange(size // 2 + 1) * rate / size)[:, None]
    left, centre, right = edges[:-2][None], edges[1:-1][None], edges[2:][None]
    weights = np.maximum(0, np.minimum((at - left) / (centre - left), (right - at) / (right - centre)))
    if not weights.any(axis=0).all():
        raise ValueError(f"features: mels={mels} is too many for windows of {size} points at {rate} samples a second")
    return weights.astype(np.float32)


@functools.cache
def dct_matrix(mels: int, coefficients: int, lifter: float) -> np.ndarray:
    """The orthonormal DCT-II with its lifter, float32 `[mels, coefficients]`."""
    i, j = np.arange(coefficients)[None], np.arange(mels)[:, None]
    matrix = np.cos(math.pi * i * (j + 0.5) / mels) * math.sqrt(2.0 / mels)
    matrix[:, 0] = math.sqrt(1.0 / mels)
    if lifter:
        matrix = matrix * (1 + 0.5 * lifter * np.sin(math.pi * np.arange(coefficients) / lifter))[None]
    return matrix.astype(np.float32)


def static_features(samples: Array, rate: int, front: FrontEnd) -> Array:
    """Static features of every whole frame: float32 samples `[n]` -> `[frames, front.static]` (jits)."""
    window, hop = front.samples(rate)
    count = front.frames(samples.shape[0], rate)
    size = 1 << (window - 1).bit_length()
    x = samples[np.arange(count)[:, None] * hop + np.arange(window)[None]]
    x = x - jnp.mean(x, axis=1, keepdims=True)
    x = x - front.preemphasis * jnp.concatenate([x[:, :1], x[:, :-1]], axis=1)
    spectrum = jnp.fft.rfft(x * jnp.asarray(np.hamming(window), jnp.float32)[None], n=size, axis=1)
    power = jnp.square(jnp.real(spectrum)) + jnp.square(jnp.imag(spectrum))
    energies = power @ mel_filters(front.mels, size, rate, front.low, front.high)
    logs = jnp.log(jnp.maximum(energies, _FLOOR))
    return logs @ dct_matrix(front.mels, front.coefficients, front.lifter) if front.kind == "mfcc" else logs


def derivative_filters(order: int) -> np.ndarray:
    """Row d filters frames -2 order .. 2 order into the d-th derivative, float32 `[order + 1, 4 order + 1]`."""
    one = np.arange(-_REACH, _REACH + 1) / 10.0
    rows, row = [], np.ones(1)
    for _ in range(order + 1):
        rows.append(np.pad(row, _REACH * order - len(row) // 2))
        row = np.convolve(row, one)
    return np.stack(rows).astype(np.float32)


def with_derivatives(static: Array, count: Array | int, order: int) -> Array:
    """Static features with their derivatives: `[t, c] -> [t, c * (order + 1)]` of the first `count` (jits).

    Frames before the first and after the last of `count` are these repeated; rows from `count` on have no meaning.
    """
    filters = derivative_filters(order)
    at = np.arange(static.shape[0])[:, None] + np.arange(-_REACH * order, _REACH * order + 1)[None]
    around = static[jnp.clip(at, 0, jnp.maximum(count, 1) - 1)]
    return jnp.einsum("tkc,dk->tdc", around, filters).reshape(static.shape[0], -1)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _features(samples: Array, count: Array, rate: int, front: FrontEnd) -> Array:
    return with_derivatives(static_features(samples, rate, front), count, front.derivatives)


def features(samples: np.ndarray, rate: int, front: FrontEnd) -> np.ndarray:
    """Features of a recording: int16 (or float in int16's range) `[n]` -> float32 `[frames, front.size]`.

    The recording is filled up with zeros to whole seconds, so that a corpus compiles only a few programs; the frames
    that touch them are cut off again.

    Raises:
      ValueError: shorter than one window.
    """
    count = front.frames(len(samples), rate)
    if count == 0:
        raise ValueError(f"{len(samples)} samples do not fill a window of {front.samples(rate)[0]}")
    padded = np.zeros(-(-len(samples) // rate) * rate, np.float32)
    padded[: len(samples)] = samples
    return np.asarray(_features(jnp.asarray(padded), jnp.int32(count), rate, front))[:count]


class Moments(NamedTuple):
    """Mean and standard deviation of every feature, float32 `[features]`."""

    mean: np.ndarray
    std: np.ndarray


def moments(frames: Sequence[np.ndarray]) -> Moments:
    """Over all frames of several recordings, in float64; a feature that never changes gets a deviation of 1."""
    whole = np.concatenate(list(frames)).astype(np.float64)
    std = whole.std(axis=0)
    return Moments(whole.mean(axis=0).astype(np.float32), np.where(std > 1e-8, std, 1.0).astype(np.float32))


def per_speaker(
    frames: Sequence[np.ndarray], speakers: Sequence[str]
) -> tuple[list[np.ndarray], Mapping[str, Moments]]:
    """Every recording normalised to mean 0 and deviation 1 over all of its speaker's frames; and the moments used."""
    found = {s: moments([f for f, who in zip(frames, speakers, strict=True) if who == s]) for s in set(speakers)}
    return [normalise(f, found[s]) for f, s in zip(frames, speakers, strict=True)], found


def normalise(frames: np.ndarray, by: Moments) -> np.ndarray:
    """(frames - mean) / std, float32."""
    return ((frames - by.mean[None]) / by.std[None]).astype(np.float32)
