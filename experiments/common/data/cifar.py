"""CIFAR-10 and CIFAR-100: the binary archives of their authors, read without unpacking them to disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from experiments.common.data import readers
from experiments.common.data.dataset import Arrays, Info
from experiments.common.data.source import Blob, File, Source

_PIXELS = 3 * 32 * 32
_ARCHIVE = 200 << 20  # both archives hold 184 MB
_SITE = "https://www.cs.toronto.edu/~kriz/"

# What the CIFAR-10 ResNet checkpoints were trained with; not the moments of CIFAR-10 itself, which `Info` has.
CHECKPOINT_MEAN = (0.485, 0.456, 0.406)
CHECKPOINT_STD = (0.229, 0.224, 0.225)

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

_CIFAR100_CLASSES = tuple(
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""".split()
)

# Members of the archives, with the images in each.
_CIFAR10_PARTS = {
    "train": {f"cifar-10-batches-bin/data_batch_{i}.bin": 10000 for i in range(1, 6)},
    "test": {"cifar-10-batches-bin/test_batch.bin": 10000},
}
_CIFAR100_PARTS = {"train": {"cifar-100-binary/train.bin": 50000}, "test": {"cifar-100-binary/test.bin": 10000}}


def _read(blobs: Sequence[Blob], parts: Mapping[str, int], label_bytes: int, classes: int) -> Arrays:
    """Reads rows of `label_bytes` labels, of which the last counts, and an image `[3, 32, 32]`."""
    (blob,) = blobs
    row = label_bytes + _PIXELS
    members = readers.tar_gz(blob, {name: count * row for name, count in parts.items()}, _ARCHIVE)
    rows = np.frombuffer(b"".join(members[name] for name in parts), np.uint8).reshape(-1, row)
    images = rows[:, label_bytes:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = readers.class_labels(blob, rows[:, label_bytes - 1], classes)
    return {"inputs": np.ascontiguousarray(images), "labels": labels}


def _read_cifar10(split: str, blobs: Sequence[Blob]) -> Arrays:
    return _read(blobs, _CIFAR10_PARTS[split], 1, 10)


def _read_cifar100(split: str, blobs: Sequence[Blob]) -> Arrays:
    return _read(blobs, _CIFAR100_PARTS[split], 2, 100)  # the coarse label comes first


def _splits(name: str, archive: str, sha256: str) -> dict[str, tuple[File, ...]]:
    file = File(f"{name}/{archive}", _ARCHIVE, _SITE + archive, sha256)
    return {"train": (file,), "test": (file,)}


CIFAR10 = Source(
    info=Info(
        name="cifar10",
        source="CIFAR-10 (Krizhevsky, 2009)",
        licence="none stated; cite Krizhevsky 2009",
        classes=10,
        shape=(32, 32, 3),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        class_names=CIFAR10_CLASSES,
    ),
    splits=_splits(
        "cifar10",
        "cifar-10-binary.tar.gz",
        "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    ),
    read=_read_cifar10,
    obtain="cifar-10-binary.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
)

CIFAR100 = Source(
    info=Info(
        name="cifar100",
        source="CIFAR-100 (Krizhevsky, 2009), fine labels",
        licence="none stated; cite Krizhevsky 2009",
        classes=100,
        shape=(32, 32, 3),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        class_names=_CIFAR100_CLASSES,
    ),
    splits=_splits(
        "cifar100",
        "cifar-100-binary.tar.gz",
        "58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
    ),
    read=_read_cifar100,
    obtain="cifar-100-binary.tar.gz from www.cs.toronto.edu/~kriz/cifar.html",
)
