"""A part of CIFAR-10 that is small enough to pass around: a stand-in for the whole."""

from __future__ import annotations

import lzma
from collections.abc import Sequence

import numpy as np

from experiments.common.data import readers
from experiments.common.data.cifar import CIFAR10_CLASSES
from experiments.common.data.dataset import Array, Arrays, Info
from experiments.common.data.source import Blob, DataFileError, File, Source

_COUNTS = {"train": 10000, "test": 2000}
_LOSSLESS = 78


def _read(split: str, blobs: Sequence[Blob]) -> Arrays:
    if split == "lossless":
        return _read_lossless(blobs[0])
    images, labels = blobs
    count = _COUNTS[split]
    return {
        "inputs": readers.delta_images(images, (count, 3, 32, 32)),
        "labels": readers.class_labels(labels, readers.raw_labels(labels, count), 10),
    }


def _read_lossless(blob: Blob) -> Arrays:
    arrays = readers.npz(blob, 4 << 20)
    shapes = {"x": (_LOSSLESS, 3, 32, 32), "y": (_LOSSLESS,)}
    for name, shape in shapes.items():
        array = arrays.get(name)
        if array is None or array.shape != shape or array.dtype.kind not in "iu":
            got = "nothing" if array is None else f"{array.dtype} {list(array.shape)}"
            raise DataFileError(f"{blob.path}: entry {name!r} is {got}, expected integers {list(shape)}")
    images, labels = arrays["x"], arrays["y"]
    if images.dtype != np.uint8 or int(labels.min()) < 0:
        raise DataFileError(f"{blob.path}: x must be uint8 (is {images.dtype}) and y not negative")
    return {
        "inputs": np.ascontiguousarray(images.transpose(0, 2, 3, 1)),
        "labels": readers.class_labels(blob, labels, 10),
    }


def encode(images: Array) -> bytes:
    """Packs images into the bytes of a `*_delta.xz` file: the inverse of `readers.delta_images`.

    Args:
      images: uint8 `[n, h, w, c]`.
    """
    planes = np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    left = np.concatenate([np.zeros_like(planes[..., :1]), planes[..., :-1]], axis=-1)
    return lzma.compress((planes - left).tobytes())


SOURCE = Source(
    info=Info(
        name="cifar10_subset",
        source="CIFAR-10 (Krizhevsky, 2009), first 1,000 + 200 images of each class, decoded from JPEG",
        licence="none stated; cite Krizhevsky 2009",
        classes=10,
        shape=(32, 32, 3),
        mean=(0.4934, 0.4831, 0.4470),
        std=(0.2460, 0.2441, 0.2616),
        class_names=CIFAR10_CLASSES,
        stand_in=True,
        note="stands in for CIFAR-10: a fifth of it, and the images went through JPEG; "
        "split 'lossless' holds 78 training images that did not",
    ),
    splits={
        "train": (
            File("cifar10_subset/train_x_10000x3x32x32_delta.xz", 40 << 20),
            File("cifar10_subset/train_y_10000.u8", 10000),
        ),
        "test": (
            File("cifar10_subset/test_x_2000x3x32x32_delta.xz", 8 << 20),
            File("cifar10_subset/test_y_2000.u8", 2000),
        ),
        "lossless": (File("cifar10_subset/lossless_78.npz", 4 << 20),),
    },
    read=_read,
    obtain="made from CIFAR-10 in a few lines",
)
