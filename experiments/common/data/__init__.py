"""Data sets by name, found where the user keeps them, and the order in which training sees them.

    load(name, split, data_dir)   a split in memory; names in `DATASETS`
    find_file(relpath, data_dir)  any other file, such as a checkpoint, by the same search
    augment                       image augmentation under jit
    batches                       the order of examples, a pure function of seed, epoch and step
    readers                       file formats, checked
    text                          texts for language models; `text.load(name, data_dir)`, names in `text.TEXTS`

A new set is a file that defines a `Source`, and a line in `DATASETS`.
"""

from __future__ import annotations

import os

from experiments.common.data import augment as augment
from experiments.common.data import batches as batches
from experiments.common.data import (
    chest_xray_nih,
    cifar,
    cifar10_subset,
    digits,
    idx_images,
    opacities,
    pneumoniamnist,
    synthetic,
)
from experiments.common.data import readers as readers
from experiments.common.data import text as text
from experiments.common.data.cifar import CHECKPOINT_MEAN as CHECKPOINT_MEAN
from experiments.common.data.cifar import CHECKPOINT_STD as CHECKPOINT_STD
from experiments.common.data.dataset import Dataset as Dataset
from experiments.common.data.dataset import Info as Info
from experiments.common.data.dataset import channel_moments as channel_moments
from experiments.common.data.dataset import from_arrays
from experiments.common.data.source import Blob as Blob
from experiments.common.data.source import DataFileError as DataFileError
from experiments.common.data.source import DataNotFoundError as DataNotFoundError
from experiments.common.data.source import File as File
from experiments.common.data.source import Source as Source
from experiments.common.data.source import cache_dir as cache_dir
from experiments.common.data.source import find_file as find_file
from experiments.common.data.source import find_files, read_blobs
from experiments.common.data.source import search_places as search_places

DATASETS: dict[str, Source] = {
    "digits": digits.SOURCE,
    "mnist": idx_images.MNIST,
    "fashion_mnist": idx_images.FASHION_MNIST,
    "cifar10": cifar.CIFAR10,
    "cifar100": cifar.CIFAR100,
    "cifar10_subset": cifar10_subset.SOURCE,
    "synthetic": synthetic.SOURCE,
    "chest_xray_nih": chest_xray_nih.SOURCE,
    "opacities": opacities.SOURCE,
    "pneumoniamnist": pneumoniamnist.SOURCE,
}


def load(name: str, split: str, data_dir: str | os.PathLike[str] | None = None, *, download: bool = True) -> Dataset:
    """Loads one split of a data set into memory.

    The files are looked for in `data_dir`, in `$COMPRESSX_DATA`, and last tfds downloads them where it can. What was
    decoded is kept in the cache folder (see `compressx.cache`) under a checksum of the files.

    Args:
      name: a key of `DATASETS`.
      split: a split of that set; all have `train` and `test`.
      data_dir: folder in the layout of docs/data.md; None to search `$COMPRESSX_DATA` only.
      download: False never touches the network.

    Returns:
      A `Dataset`; the image sets have inputs uint8 `[n, h, w, c]` and labels int32 `[n]`.

    Raises:
      DataNotFoundError: files are missing; says which, where it looked, and where to get them.
      DataFileError: a file is damaged or is not what its name says.
      ValueError: no such data set or split.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set {name!r}; there are {', '.join(DATASETS)}")
    source = DATASETS[name]
    if split not in source.splits:
        raise ValueError(f"data set {name!r} has no split {split!r}; it has {', '.join(source.splits)}")
    return load_source(source, split, data_dir, download=download)


def load_source(
    source: Source, split: str, data_dir: str | os.PathLike[str] | None = None, *, download: bool = True
) -> Dataset:
    """Loads a split of a `Source` of your own, as `load` does one of the index."""
    files = source.splits[split]
    if not files:
        return from_arrays(source.read(split, ()), source.info)
    blobs = read_blobs(files, find_files(source, split, data_dir, download))

    from experiments.common.data import store  # tfds takes half a second to import, and not every set needs it

    return from_arrays(store.cached(source, split, blobs, lambda: source.read(split, blobs)), source.info)
