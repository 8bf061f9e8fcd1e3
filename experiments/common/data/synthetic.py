"""Small images that a network can learn, as a pure function of a seed: for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.common.data.dataset import Array, Arrays, Info
from experiments.common.data.source import Blob, Source

_COUNTS = {"train": 512, "test": 256}
_SHAPE = (8, 8, 1)
_CLASSES = 4
_NOISE = 0.25


def images(
    seed: int, split: str, count: int, shape: tuple[int, int, int] = _SHAPE, classes: int = _CLASSES
) -> tuple[Array, Array]:
    """Draws `count` images: the pattern of the class, shifted by up to one pixel, with noise.

    The patterns depend on the seed alone, so that what is learnt on one split applies to another.

    Returns:
      uint8 `[count, h, w, c]` and int32 `[count]`; the classes are balanced to within one image.
    """
    patterns = _uniform(seed, 0, (classes, *shape))
    labels = np.arange(count, dtype=np.int32) % classes
    stream = 1 if split == "train" else 2
    noise = _uniform(seed, stream, (count, *shape))
    shifts = np.floor(_uniform(seed, stream + 2, (count, 2)) * 3.0).astype(np.int64) - 1
    clean = np.stack(
        [np.roll(patterns[label], shift, axis=(0, 1)) for label, shift in zip(labels, shifts.tolist(), strict=True)]
    )
    return np.floor(((1.0 - _NOISE) * clean + _NOISE * noise) * 255.0).astype(np.uint8), labels


def _uniform(seed: int, stream: int, shape: tuple[int, ...]) -> Array:
    """Draws from [0, 1) by the raw bits of Philox, which no NumPy release may change."""
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(int(np.prod(shape)))
    return ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(shape)


def _read(split: str, blobs: Sequence[Blob]) -> Arrays:
    del blobs
    inputs, labels = images(0, split, _COUNTS[split])
    return {"inputs": inputs, "labels": labels}


SOURCE = Source(
    info=Info(
        name="synthetic",
        source="drawn from seed 0",
        licence="Apache-2.0",
        classes=_CLASSES,
        shape=_SHAPE,
        mean=(0.5179,),
        std=(0.2305,),
        stand_in=True,
        note="for tests; stands in for any image set",
    ),
    splits={"train": (), "test": ()},
    read=_read,
)
