"""The 8x8 digits that scikit-learn bundles: the embedded default, which needs no file."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from experiments.common.data.dataset import Array, Arrays, Info
from experiments.common.data.source import Blob, DataNotFoundError, Source


def _test_rows(labels: Array) -> Array:
    """Marks every fifth image of each class, in the order of the file."""
    marks = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        marks[np.flatnonzero(labels == label)[4::5]] = True
    return marks


def _read(split: str, blobs: Sequence[Blob]) -> Arrays:
    del blobs
    try:
        from sklearn.datasets import load_digits  # a second to import, and needed here only
    except ImportError as error:
        raise DataNotFoundError("data set 'digits' comes with scikit-learn: pip install scikit-learn") from error
    images, labels = load_digits(return_X_y=True)
    # 17 levels, 0 to 16, spread over a byte.
    pixels = np.rint(images * (255.0 / 16.0)).astype(np.uint8).reshape(-1, 8, 8, 1)
    rows = _test_rows(labels) == (split == "test")
    return {"inputs": pixels[rows], "labels": labels[rows].astype(np.int32)}


SOURCE = Source(
    info=Info(
        name="digits",
        source="UCI Optical Recognition of Handwritten Digits (test part), as bundled with scikit-learn",
        licence="CC BY 4.0",
        classes=10,
        shape=(8, 8, 1),
        mean=(0.3052,),
        std=(0.3760,),
        class_names=tuple("0123456789"),
        note="every fifth image of each class is the test split",
    ),
    splits={"train": (), "test": ()},
    read=_read,
)
