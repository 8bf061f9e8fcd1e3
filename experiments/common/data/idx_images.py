"""MNIST and Fashion-MNIST: gzipped idx files, as their authors published them."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.common.data import readers
from experiments.common.data.dataset import Arrays, Info
from experiments.common.data.source import Blob, File, Source

_COUNTS = {"train": 60000, "test": 10000}
_CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


def _read(split: str, blobs: Sequence[Blob]) -> Arrays:
    images, labels = blobs
    count = _COUNTS[split]
    return {
        "inputs": readers.idx(images, (count, 28, 28))[..., None],
        "labels": readers.class_labels(labels, readers.idx(labels, (count,)), 10),
    }


def _splits(folder: str, url: str, sha256: Sequence[str]) -> dict[str, tuple[File, ...]]:
    names = [f"{part}-{kind}-ubyte.gz" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    limits = [60 << 20, 1 << 20, 12 << 20, 1 << 20]  # room for a gzip that compresses nothing
    files = [
        File(f"{folder}/{name}", limit, url + name, digest)
        for name, limit, digest in zip(names, limits, sha256, strict=True)
    ]
    return {"train": (files[0], files[1]), "test": (files[2], files[3])}


MNIST = Source(
    info=Info(
        name="mnist",
        source="MNIST (LeCun, Cortes, Burges)",
        licence="CC BY-SA 3.0, as usually stated",
        classes=10,
        shape=(28, 28, 1),
        mean=(0.1307,),
        std=(0.3081,),
        class_names=tuple("0123456789"),
    ),
    splits=_splits(
        "mnist",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        [
            "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
            "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
            "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
            "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        ],
    ),
    read=_read,
    obtain="the four idx .gz files of MNIST, from any of its mirrors",
)

FASHION_MNIST = Source(
    info=Info(
        name="fashion_mnist",
        source="Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017)",
        licence="MIT",
        classes=10,
        shape=(28, 28, 1),
        mean=(0.2860,),
        std=(0.3530,),
        class_names=_CLOTHES,
    ),
    splits=_splits(
        "fashion_mnist",
        "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
        [
            "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        ],
    ),
    read=_read,
    obtain="the four idx .gz files of github.com/zalandoresearch/fashion-mnist",
)
