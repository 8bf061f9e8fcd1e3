"""PneumoniaMNIST of MedMNIST v2: 28x28 paediatric chest X-rays, normal or pneumonia."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.common.data import readers
from experiments.common.data.dataset import Arrays, Info
from experiments.common.data.source import Blob, DataFileError, File, Source

_COUNTS = {"train": 4708, "val": 524, "test": 624}


def _read(split: str, blobs: Sequence[Blob]) -> Arrays:
    (blob,) = blobs
    arrays = readers.npz(blob, 16 << 20)
    images, labels = arrays.get(f"{split}_images"), arrays.get(f"{split}_labels")
    n = _COUNTS[split]
    if images is None or images.shape != (n, 28, 28) or images.dtype != np.uint8:
        got = "missing" if images is None else f"{images.dtype} {list(images.shape)}"
        raise DataFileError(f"{blob.path}: {split}_images is {got}, expected uint8 [{n}, 28, 28]")
    if labels is None or labels.size != n or labels.dtype.kind not in "iu" or int(labels.min()) < 0:
        raise DataFileError(f"{blob.path}: {split}_labels must be {n} integers, not negative")
    return {"inputs": images[..., None], "labels": readers.class_labels(blob, labels.reshape(n), 2)}


SOURCE = Source(
    info=Info(
        name="pneumoniamnist",
        source="PneumoniaMNIST of MedMNIST v2 (Yang et al., 2023), from Kermany et al., 2018",
        licence="CC BY 4.0, as usually stated",
        classes=2,
        shape=(28, 28, 1),
        mean=(0.5,),
        std=(0.25,),
        class_names=("normal", "pneumonia"),
        stand_in=True,
        note="stands in for RSNA: classification of small images of children, no boxes; patients are not named, the "
        "split is the published one",
    ),
    splits={split: (File("pneumoniamnist/pneumoniamnist.npz", 16 << 20),) for split in _COUNTS},
    read=_read,
    obtain="pneumoniamnist.npz from medmnist.com",
)
