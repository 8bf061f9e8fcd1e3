"""The sets of the index: shapes, counts, contents and refusals; the big ones where their files are present."""

import gzip
import hashlib
import io
import shutil
import struct
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest

from experiments.common import data
from experiments.common.data import cifar, cifar10_subset, idx_images, synthetic


def check_contract(ds: data.Dataset, count: int) -> None:
    assert len(ds) == count
    assert ds.inputs.dtype == np.uint8 and ds.inputs.shape == (count, *ds.info.shape)
    assert ds.labels.dtype == np.int32 and ds.labels.shape == (count,)
    assert set(np.unique(ds.labels)) == set(range(ds.info.classes))
    assert ds.info.name in data.DATASETS
    assert len(ds.info.mean) == len(ds.info.std) == ds.info.shape[-1]


def check_moments(ds: data.Dataset) -> None:
    assert np.allclose((ds.info.mean, ds.info.std), data.channel_moments(ds.inputs), atol=6e-5)


def test_moments_are_those_of_numpy() -> None:
    images = np.random.default_rng(0).integers(0, 255, (9, 5, 6, 3), dtype=np.uint8)
    expected = [moment(images / 255.0, axis=(0, 1, 2)) for moment in (np.mean, np.std)]
    assert np.allclose(data.channel_moments(images), expected, rtol=1e-12)


def digest(ds: data.Dataset) -> str:
    return hashlib.sha256(np.ascontiguousarray(ds.inputs).tobytes() + ds.labels.astype("<i4").tobytes()).hexdigest()


def test_names_and_splits_are_checked() -> None:
    with pytest.raises(ValueError, match=r"no data set 'mnsit'; there are digits, mnist"):
        data.load("mnsit", "train")
    with pytest.raises(ValueError, match=r"'digits' has no split 'val'; it has train, test"):
        data.load("digits", "val")


@pytest.mark.parametrize("name", data.DATASETS)
def test_the_index_is_consistent(name: str) -> None:
    source = data.DATASETS[name]
    assert source.info.name == name and source.info.licence and source.info.source
    assert {"train", "test"} <= set(source.splits)
    assert not source.info.class_names or len(source.info.class_names) == source.info.classes
    assert not source.info.stand_in or "stands in for" in source.info.note
    for file in (file for files in source.splits.values() for file in files):
        assert bool(file.url) == bool(file.sha256)
        assert file.path.split("/")[0] in data.DATASETS  # a set made from another names its files


def test_digits_are_those_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits

    train, test = data.load("digits", "train"), data.load("digits", "test")
    check_contract(train, 1442)
    check_contract(test, 355)
    check_moments(train)
    images, labels = load_digits(return_X_y=True)
    theirs = sorted((tuple(row), int(label)) for row, label in zip(images.astype(int).tolist(), labels, strict=True))
    levels = np.concatenate([train.inputs, test.inputs]).reshape(-1, 64)
    ours = np.concatenate([train.labels, test.labels])
    back = np.rint(levels / 255.0 * 16.0).astype(int).tolist()
    assert sorted((tuple(row), int(label)) for row, label in zip(back, ours, strict=True)) == theirs


def test_the_digits_split_is_stratified_and_fixed() -> None:
    train, test = data.load("digits", "train"), data.load("digits", "test")
    share = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert np.allclose(share, 0.2, atol=0.006)
    assert digest(test) == "3f53dde2e1e7e8a55378950dc46794171d8451ca9063e7992a75fb9672256dc1"
    assert digest(train) == "0d9c5288f6e33780c379517635d2a09a9a36ba665165e1332d94557bc77dac86"


def test_synthetic_is_a_pure_function_that_never_changes() -> None:
    train = data.load("synthetic", "train")
    check_contract(train, 512)
    check_moments(train)
    check_contract(data.load("synthetic", "test"), 256)
    assert digest(train) == "e40e17cc1f49474b1792e8d26059319b806e6bffe77fdd12d1fac519c2c56a80"
    assert not np.array_equal(synthetic.images(0, "test", 20)[0], synthetic.images(0, "train", 20)[0])
    assert not np.array_equal(synthetic.images(1, "train", 20)[0], synthetic.images(0, "train", 20)[0])
    other, labels = synthetic.images(3, "train", 7, (5, 6, 3), 2)
    assert other.shape == (7, 5, 6, 3) and labels.tolist() == [0, 1, 0, 1, 0, 1, 0]


def test_synthetic_can_be_learnt() -> None:
    train, test = data.load("synthetic", "train"), data.load("synthetic", "test")
    from sklearn.linear_model import RidgeClassifier

    flat = lambda ds: ds.inputs.reshape(len(ds), -1) / 255.0
    score = RidgeClassifier().fit(flat(train), train.labels).score(flat(test), test.labels)
    assert 0.5 < score  # chance is 0.25; the shifts put the whole of it beyond a linear model


def test_idx_sets_read_their_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(idx_images._COUNTS, "test", 30)
    images = np.random.default_rng(0).integers(0, 255, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    for name in ("mnist", "fashion_mnist"):
        (tmp_path / name).mkdir()
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
            (tmp_path / name / f"t10k-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
        ds = data.load(name, "test", tmp_path)
        check_contract(ds, 30)
        assert np.array_equal(ds.inputs[..., 0], images) and np.array_equal(ds.labels, labels)


def cifar_archive(members: dict[str, np.ndarray]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz", compresslevel=1) as archive:
        for name, rows in members.items():
            info = tarfile.TarInfo(name)
            info.size = rows.nbytes
            archive.addfile(info, io.BytesIO(rows.tobytes()))
    return stream.getvalue()


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_reads_the_archive(name: str, split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, label_bytes, classes = {
        "cifar10": (cifar._CIFAR10_PARTS, 1, 10),
        "cifar100": (cifar._CIFAR100_PARTS, 2, 100),
    }[name]
    small = {key: dict.fromkeys(members, 100) for key, members in parts.items()}
    for key, members in small.items():
        monkeypatch.setitem(parts, key, members)
    rng = np.random.default_rng(0)
    content = {}
    for member in [member for members in small.values() for member in members]:
        rows = rng.integers(0, 255, (100, label_bytes + 3072), dtype=np.uint8)
        rows[:, 0] = 7
        rows[:, label_bytes - 1] = np.arange(100) % classes
        content[member] = rows
    (tmp_path / name).mkdir()
    shuffled = dict(sorted(content.items(), reverse=True))  # the order of the members must not matter
    (tmp_path / name / f"{name.replace('cifar', 'cifar-')}-binary.tar.gz").write_bytes(cifar_archive(shuffled))
    ds = data.load(name, split, tmp_path)
    check_contract(ds, 100 * len(small[split]))
    rows = np.concatenate([content[member] for member in small[split]])
    for index in (0, 57, len(rows) - 1):
        planes = rows[index, label_bytes:]
        for y, x, c in ((0, 0, 0), (3, 9, 1), (31, 30, 2)):
            assert ds.inputs[index, y, x, c] == planes[c * 1024 + y * 32 + x]
        assert ds.labels[index] == rows[index, label_bytes - 1]


def test_cifar_refuses_an_archive_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "cifar10").mkdir()
    rows = np.zeros((5, 3073), np.uint8)
    path = tmp_path / "cifar10/cifar-10-binary.tar.gz"
    path.write_bytes(cifar_archive({"cifar-10-batches-bin/test_batch.bin": rows}))
    with pytest.raises(data.DataFileError, match=rf"^{path}: lacks cifar-10-batches-bin/test_batch.bin \(30730000"):
        data.load("cifar10", "test", tmp_path)


def test_cifar10_subset_reads_what_encode_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cifar10_subset._COUNTS, "test", 20)
    images = np.random.default_rng(0).integers(0, 255, (20, 32, 32, 3), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    folder = tmp_path / "cifar10_subset"
    folder.mkdir()
    (folder / "test_x_2000x3x32x32_delta.xz").write_bytes(cifar10_subset.encode(images))
    (folder / "test_y_2000.u8").write_bytes(labels.tobytes())
    ds = data.load("cifar10_subset", "test", tmp_path)
    check_contract(ds, 20)
    assert np.array_equal(ds.inputs, images) and np.array_equal(ds.labels, labels)
    assert ds.info.stand_in
    (folder / "test_y_2000.u8").write_bytes(labels.tobytes()[:-1] + b"\x0a")
    with pytest.raises(data.DataFileError, match=r"test_y_2000\.u8: label 10 at row 19"):
        data.load("cifar10_subset", "test", tmp_path)


def test_a_wrong_lossless_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cifar10_subset").mkdir()
    path = tmp_path / "cifar10_subset/lossless_78.npz"
    x, y = np.zeros((78, 3, 32, 32), np.uint8), np.zeros(78, np.uint8)
    for arrays, message in [
        ({"x": x}, "entry 'y' is nothing"),
        ({"x": x[:5], "y": y}, r"entry 'x' is uint8 \[5, 3, 32, 32\]"),
        ({"x": x, "y": y.astype(np.float32)}, "entry 'y' is float32"),
        ({"x": x.astype(np.int16), "y": y}, "is int16"),
        ({"x": x, "y": y + np.uint8(10)}, "label 10 at row 0"),
    ]:
        np.savez(path, **arrays)
        with pytest.raises(data.DataFileError, match=f"^{path}.*{message}"):
            data.load("cifar10_subset", "lossless", tmp_path)


@pytest.mark.data
@pytest.mark.parametrize(("split", "count"), [("train", 60000), ("test", 10000)])
def test_mnist_is_mnist(split: str, count: int, data_dir: Path) -> None:
    ds = data.load("mnist", split, data_dir, download=False)
    check_contract(ds, count)
    if split == "train":
        check_moments(ds)
        raw = ds.inputs.tobytes()
        header = struct.pack(">4I", 0x803, 60000, 28, 28)
        md5 = hashlib.md5(header + raw, usedforsecurity=False).hexdigest()
        assert md5 == "6bbc9ace898e44ae57da46a324031adb"  # of the published file, unpacked
        assert ds.labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    again = data.load("mnist", split, data_dir, download=False)
    assert np.array_equal(again.inputs, ds.inputs) and np.array_equal(again.labels, ds.labels)


@pytest.mark.data
@pytest.mark.parametrize(("split", "count"), [("train", 10000), ("test", 2000), ("lossless", 78)])
def test_cifar10_subset_is_balanced(split: str, count: int, data_dir: Path) -> None:
    ds = data.load("cifar10_subset", split, data_dir)
    check_contract(ds, count)
    if split == "lossless":
        assert ds.info.stand_in and count == 78
    else:
        assert np.bincount(ds.labels).tolist() == [count // 10] * 10
    if split == "train":
        check_moments(ds)


@pytest.mark.data
def test_a_truncated_copy_of_mnist_is_refused(data_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    for name in ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"):
        shutil.copyfile(data_dir / "mnist" / name, tmp_path / "mnist" / name)
    assert len(data.load("mnist", "test", tmp_path, download=False)) == 10000  # the test split needs no other file
    path = tmp_path / "mnist/t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(data.DataFileError, match=f"^{path}: not a sound gzip file"):
        data.load("mnist", "test", tmp_path, download=False)


@pytest.mark.data
@pytest.mark.parametrize("depth", [20, 32, 56])
def test_checkpoints_are_found_and_plain(depth: int, data_dir: Path) -> None:
    path = data.find_file(f"checkpoints/resnet{depth}_cifar10.npz", data_dir)
    arrays = data.readers.npz(data.Blob(path, path.read_bytes()), 8 << 20)
    with np.load(path) as theirs:
        assert set(arrays) == set(theirs.files)
        assert all(np.array_equal(arrays[name], theirs[name]) for name in theirs.files)


WITHOUT_TENSORFLOW = """
import sys
from pathlib import Path
import numpy as np
from experiments.common import data
info = data.Info(name="x", source="", licence="", classes=2, shape=(3,))
read = lambda split, blobs: {"inputs": np.ones((4, 3), np.float32), "labels": np.zeros(4, np.int32)}
source = data.Source(info, {"train": (data.File("x.bin", 10),)}, read)
Path(sys.argv[1], "x.bin").write_bytes(b"1")
for _ in range(2):  # prepared, then read
    assert len(data.load_source(source, "train", sys.argv[1])) == 4
assert "tensorflow_datasets" in sys.modules
assert "tensorflow" not in sys.modules
"""


def test_no_tensorflow_is_imported(tmp_path: Path) -> None:
    root = Path(__file__).parents[4]
    strict = ["-W", "error", "-W", "ignore:label() is deprecated:DeprecationWarning"]  # tfds, with protobuf 6
    subprocess.run([sys.executable, *strict, "-c", WITHOUT_TENSORFLOW, str(tmp_path)], check=True, cwd=root)
