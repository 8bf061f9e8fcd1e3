"""Chest X-rays with boxes: readers against hostile files, generated opacities, the challenge's layout."""

import csv
import gzip
import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from experiments.common import data
from experiments.common.data import chest_xray_nih as nih
from experiments.common.data import opacities, rsna, xray
from experiments.common.data.source import Blob

HEADER = "patientId,x,y,width,height,Target"


# -- what the sets share -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), [(8, 4), (8, 8), (9, 4), (6, 5), (4, 6)])
def test_resizing_averages_areas(rng, old, new) -> None:
    images = rng.integers(0, 256, (2, old, old, 1), np.uint8)
    fine = images[..., 0].repeat(new, 1).repeat(new, 2).astype(float)  # every new pixel is old x old of these
    want = fine.reshape(2, new, old, new, old).mean((2, 4))
    got = xray.resize_area(images, new)
    assert got.shape == (2, new, new, 1) and np.abs(got[..., 0] - want).max() <= 0.5 + 1e-3


def test_boxes_become_a_table() -> None:
    rows, count = xray.table([[], [(1, 2, 3, 4), (5, 6, 7, 8)]])
    assert count.tolist() == [0, 2] and rows.shape == (2, 2, 4) and rows[1, 1].tolist() == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="room for 1"):
        xray.table([[(1, 2, 3, 4)] * 2], most=1)


def test_patients_fall_into_parts_by_name_alone() -> None:
    names = [f"p{i}" for i in range(4000)]
    parts = [xray.part_of(n, rsna.PARTS) for n in names]
    assert parts == [xray.part_of(n, rsna.PARTS) for n in names]
    assert parts.count("train") / 4000 == pytest.approx(0.8, abs=0.03)
    assert parts.count("val") / 4000 == pytest.approx(0.1, abs=0.02)


def test_a_patient_in_two_splits_is_an_error() -> None:
    with pytest.raises(data.DataFileError, match="patient 7 is in train and in test"):
        xray.check_patients({"train": ["7", "7", "8"], "test": ["9", "7"]}, "labels.csv")


# -- chest_xray_nih ----------------------------------------------------------------------------------------------------


def _png(pixels: np.ndarray, filters) -> bytes:
    """A PNG with the given filter for each line, encoded pixel by pixel from the specification."""
    h, w = pixels.shape
    raw = bytearray()
    for y in range(h):
        raw.append(int(filters[y]))
        for x in range(w):
            a = int(pixels[y, x - 1]) if x else 0
            b = int(pixels[y - 1, x]) if y else 0
            c = int(pixels[y - 1, x - 1]) if x and y else 0
            p = a + b - c
            paeth = min((a, b, c), key=lambda v: (abs(p - v), (a, b, c).index(v)))
            raw.append((int(pixels[y, x]) - (0, a, b, (a + b) // 2, paeth)[int(filters[y])]) % 256)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", w, h, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(raw))) + chunk(b"IEND", b"")


def test_png_filters_are_undone(rng) -> None:
    pixels = rng.integers(0, 256, (16, 16), np.uint8)
    for filters in (np.ones(16, int), rng.integers(0, 5, 16)):
        np.testing.assert_array_equal(nih.grey_png(_png(pixels, filters), "x.png", 16), pixels)


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:60],
        lambda b: b"GIF89a" + b[6:],
        lambda b: b[:50] + bytes([b[50] ^ 1]) + b[51:],
        lambda b: b.replace(struct.pack(">II", 16, 16), struct.pack(">II", 16, 9999)),
        lambda b: b[:8] + b"\xff\xff\xff\xff" + b[12:],
        lambda b: b"",
    ],
)
def test_a_damaged_png_is_named(rng, damage) -> None:
    good = _png(rng.integers(0, 256, (16, 16), np.uint8), np.zeros(16, int))
    with pytest.raises(data.DataFileError, match=r"^x\.png: not a sound"):
        nih.grey_png(damage(good), "x.png", 16)


def test_a_png_that_unpacks_to_too_much_is_refused() -> None:
    bomb = _png(np.zeros((16, 16), np.uint8), np.zeros(16, int))
    at = bomb.index(b"IDAT")
    body = zlib.compress(bytes(5_000_000))
    chunk = struct.pack(">I", len(body)) + b"IDAT" + body + struct.pack(">I", zlib.crc32(b"IDAT" + body))
    with pytest.raises(data.DataFileError, match="bytes of pixels"):
        nih.grey_png(bomb[: at - 4] + chunk, "x.png", 16)


LABELS = "file,label,split,patient\na.png,1,train,1\nb.png,0,train,2\nc.png,0,test,3\n"
BOXES = "file,x,y,w,h\na.png,10,20,30,40\n"


def _tables(labels=LABELS, boxes=BOXES):
    return Blob(Path("labels.csv"), labels.encode()), Blob(Path("boxes.csv"), boxes.encode())


def test_the_tables_are_joined() -> None:
    rows, faults = nih.rows(*_tables())
    assert [(r.file, r.label, r.split, r.boxes) for r in rows][0] == ("a.png", 1, "train", ((10.0, 20.0, 30.0, 40.0),))
    assert faults.counts == {}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("a.png,250,20,30,40", "box outside the image"),
        ("a.png,10,20,0,40", "box without area"),
        ("a.png,x,20,30,40", "box that is no number"),
        ("z.png,10,20,30,40", "box without an image"),
    ],
)
def test_a_bad_box_is_an_error_or_counted(line, kind) -> None:
    with pytest.raises(data.DataFileError, match=f"{line[:5]}: {kind}"):
        nih.rows(*_tables(boxes=BOXES + line + "\n"))
    rows, faults = nih.rows(*_tables(boxes=BOXES + line + "\n"), policy="skip")
    assert faults.counts == {kind: 1} and len(rows[0].boxes) == 1


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (LABELS + "d.png,0,test,1\n", "patient 1 is in train and in test"),
        (LABELS + "d.png,2,test,9\n", "label '2'"),
        (LABELS + "d.png,1\n", "row 5 is too short"),
        ("file,label,split\n", "lacks the column patient"),
        ("file,label,split,patient\n", "holds no rows"),
        ("\xff\xfe", "lacks the column file"),
    ],
)
def test_a_bad_table_is_named(labels, text) -> None:
    with pytest.raises(data.DataFileError, match=text):
        nih.rows(*_tables(labels=labels))


def test_a_broken_archive_is_named(tmp_path) -> None:
    with pytest.raises(data.DataFileError, match="not a sound zip"):
        nih.images(Blob(Path("i.zip"), b"PK\x03\x04 nonsense"), ["a.png"])
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        archive.writestr("a.png", b"no image")
    with pytest.raises(data.DataFileError, match=r"lacks b\.png"):
        nih.images(Blob(Path("i.zip"), held.getvalue()), ["b.png"])
    with pytest.raises(data.DataFileError, match=r"i\.zip, a\.png: not a sound"):
        nih.images(Blob(Path("i.zip"), held.getvalue()), ["a.png"])


# -- opacities ---------------------------------------------------------------------------------------------------------


def test_opacities_are_where_their_boxes_say_and_depend_on_names_alone(rng) -> None:
    images = np.full((6, 256, 256, 1), 70, np.uint8)
    images[:, :, 100:150] = 210
    names = [f"{k}.png" for k in range(6)]
    made, boxes = opacities.generate(images, names, 3)
    again, same = opacities.generate(images[::-1], names[::-1], 3)
    np.testing.assert_array_equal(again.reshape(6, 3, -1)[::-1], made.reshape(6, 3, -1))
    assert [same[3 * (5 - k) : 3 * (6 - k)] for k in range(6)] == [boxes[3 * k : 3 * k + 3] for k in range(6)]
    counts = [len(b) for b in boxes]
    assert set(counts) == {0, 1, 2}
    for image, before, each in zip(made[..., 0], images.repeat(3, 0)[..., 0], boxes, strict=True):
        rise = image.astype(int) - before
        assert rise.min() >= 0
        if not each:
            assert rise.max() == 0
            continue
        inside = np.zeros((256, 256), bool)
        for x, y, w, h in each:
            assert xray.check_box((x, y, w, h), (256, 256)) is None and 20 < w < 130 and 20 < h < 180
            inside[int(y) : int(y + h), int(x) : int(x + w)] = True
        dark = before < 100
        assert rise[inside & dark].mean() > 4 * rise[~inside & dark].mean()


@pytest.mark.data
@pytest.mark.slow
def test_the_sets_load(data_dir, monkeypatch) -> None:
    monkeypatch.setenv("COMPRESSX_DATA", str(data_dir))
    every = {s: data.load("chest_xray_nih", s) for s in nih.SPLITS}
    assert {s: len(d) for s, d in every.items()} == {"train": 682, "val": 90, "test": 168}
    assert sum(int(d.labels["count"].sum()) for d in every.values()) == 43
    assert sum(int((d.labels["count"] > 0).sum()) for d in every.values()) == 38
    made = {s: data.load("opacities", s) for s in nih.SPLITS}
    assert {s: len(d) for s, d in made.items()} == {"train": 3 * 342, "val": 3 * 51, "test": 3 * 77}
    patients = [set(d.labels["patient"].tolist()) for d in made.values()]
    assert not patients[0] & patients[1] and not patients[0] & patients[2] and not patients[1] & patients[2]
    assert {s: len(data.load("pneumoniamnist", s)) for s in nih.SPLITS} == {"train": 4708, "val": 524, "test": 624}


def test_pneumoniamnist_that_is_something_else_is_named(tmp_path) -> None:
    folder = tmp_path / "pneumoniamnist"
    folder.mkdir()
    np.savez(folder / "pneumoniamnist.npz", train_images=np.zeros((5, 28, 28), np.uint8), train_labels=np.zeros(5, int))
    with pytest.raises(data.DataFileError, match=r"train_images is uint8 \[5, 28, 28\]"):
        data.load("pneumoniamnist", "train", tmp_path)


# -- rsna --------------------------------------------------------------------------------------------------------------


def _labels(*lines: str) -> Blob:
    return Blob(Path("labels.csv"), "\n".join((HEADER, *lines)).encode())


def test_the_challenges_table_is_read() -> None:
    blob = _labels("b,,,,,0", "a,264.0,152.0,213.0,379.0,1", "a,562.0,152.0,256.0,453.0,1")
    patients, faults = rsna.read_labels(blob)
    assert [(p.name, p.positive, len(p.boxes)) for p in patients] == [("a", True, 2), ("b", False, 0)]
    assert patients[0].boxes[0] == (264.0, 152.0, 213.0, 379.0) and not faults.counts
    packed, _ = rsna.read_labels(Blob(Path("labels.csv.gz"), gzip.compress(blob.data)))
    assert packed == patients


@pytest.mark.parametrize(
    ("line", "kind", "left"),
    [
        ("c,,,,,1", "positive without a box", 1),
        ("c,1,2,3,4,0", "negative with a box", 2),
        ("c,1000,2,300,4,1", "box outside the image", 1),
        ("c,-1,2,3,4,1", "box outside the image", 1),
        ("c,1,2,0,4,1", "box without area", 1),
        ("c,1,2,nan,4,1", "box that is no number", 1),
        ("c,1,two,3,4,1", "box that is no number", 1),
        ("c,,,,,", "row without a label", 1),
        ("a,1,2,3,4,1", "patient both positive and negative", 0),
    ],
)
def test_a_fault_is_an_error_or_counted(line, kind, left) -> None:
    with pytest.raises(data.DataFileError, match=kind):
        rsna.read_labels(_labels("a,,,,,0", line))
    patients, faults = rsna.read_labels(_labels("a,,,,,0", line), policy="skip")
    assert faults.counts == {kind: 1} and len(patients) == left
    assert kind in str(faults) and "labels.csv" in str(faults)


def test_empty_labels_and_foreign_tables_are_named() -> None:
    with pytest.raises(data.DataFileError, match="empty labels"):
        rsna.read_labels(_labels())
    with pytest.raises(data.DataFileError, match="lacks the column Target"):
        rsna.read_labels(Blob(Path("x.csv"), b"patientId,x,y,width,height\n"))
    with pytest.raises(data.DataFileError, match=r"x\.csv"):
        rsna.read_labels(Blob(Path("x.csv"), b"\x1f\x8bnonsense"))
    with pytest.raises(data.DataFileError, match="not a CSV"):
        rsna.read_labels(Blob(Path("x.csv"), b"\xff\xfe\x00"))


@pytest.mark.data
def test_the_real_table_has_the_sheets_numbers(data_dir) -> None:
    path = data_dir / "rsna_pneumonia_labels" / "stage_2_train_labels.csv.gz"
    patients, faults = rsna.read_labels(Blob(path, path.read_bytes()))
    boxes = [b for p in patients for b in p.boxes]
    rows = len(list(csv.reader(io.StringIO(gzip.decompress(path.read_bytes()).decode())))) - 1
    assert rows == 30_227 == len(boxes) + sum(not p.positive for p in patients) and not faults.counts
    assert (len(patients), sum(p.positive for p in patients), len(boxes)) == (26_684, 6_012, 9_555)
    assert np.median(np.array(boxes)[:, 2:], 0).tolist() == [217.0, 298.0]


def _dicom(path: Path, pixels: np.ndarray, **changes) -> None:
    pydicom = pytest.importorskip("pydicom", reason="needs pydicom (extra images)")
    image = pydicom.Dataset()
    image.file_meta = pydicom.dataset.FileMetaDataset()
    image.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    image.file_meta.MediaStorageSOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    image.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    image.Rows, image.Columns = pixels.shape
    image.SamplesPerPixel, image.BitsAllocated, image.BitsStored, image.HighBit = 1, 8, 8, 7
    image.PixelRepresentation, image.PhotometricInterpretation = 0, "MONOCHROME2"
    image.PixelData = pixels.tobytes()
    for name, value in changes.items():
        setattr(image, name, value)
    image.save_as(path, enforce_file_format=True)


@pytest.fixture
def challenge(tmp_path):
    """The challenge's layout with twelve patients, half of them positive."""
    folder = tmp_path / "rsna_pneumonia"
    (folder / rsna.IMAGES).mkdir(parents=True)
    names = [f"p{i}" for i in range(12)]
    lines = [f"{n},{100 + 8 * i},200,300,400,1" if i % 2 else f"{n},,,,,0" for i, n in enumerate(names)]
    (folder / rsna.LABELS).write_text("\n".join((HEADER, *lines)))
    for i, n in enumerate(names):
        _dicom(folder / rsna.IMAGES / f"{n}.dcm", np.full((1024, 1024), i, np.uint8))
    return tmp_path, names


def test_the_layout_is_read_and_boxes_follow_the_size(challenge) -> None:
    place, names = challenge
    there = {xray.part_of(n, rsna.PARTS) for n in names}
    got = {s: rsna.load(s, place, size=64)[0] for s in there}
    assert sum(len(d) for d in got.values()) == 12
    train = got["train"]
    mine = [n for n in sorted(names) if xray.part_of(n, rsna.PARTS) == "train"]
    assert train.inputs[:, 5, 5, 0].tolist() == [int(n[1:]) for n in mine] and train.inputs.shape[1:] == (64, 64, 1)
    for k, n in enumerate(mine):
        i = int(n[1:])
        assert train.labels["count"][k] == i % 2 == train.labels["positive"][k]
        if i % 2:
            want = np.array([100 + 8 * i, 200, 300, 400]) / 16
            np.testing.assert_allclose(train.labels["boxes"][k, 0], want, rtol=1e-6)
    again, _ = rsna.load("train", place, size=64)  # from the cache
    np.testing.assert_array_equal(again.inputs, train.inputs)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda p: p.unlink(), "missing image"),
        (lambda p: p.write_bytes(b"no image at all"), "bad image"),
        (_truncate, "bad image"),
        (lambda p: _dicom(p, np.zeros((512, 512), np.uint8)), "bad image"),
        (lambda p: _dicom(p, np.zeros((1024, 1024), np.uint8), PhotometricInterpretation="RGB"), "bad image"),
    ],
)
def test_bad_images_are_an_error_or_counted(challenge, damage, kind) -> None:
    place, names = challenge
    mine = [n for n in names if xray.part_of(n, rsna.PARTS) == "train"]
    path = place / "rsna_pneumonia" / rsna.IMAGES / f"{mine[0]}.dcm"
    damage(path)
    with pytest.raises(data.DataFileError, match=f"{mine[0]}.dcm"):
        rsna.load("train", place, size=32)
    got, faults = rsna.load("train", place, size=32, policy="skip")
    assert len(got) == len(mine) - 1 and faults.counts == {kind: 1}


def test_inverted_images_are_turned(tmp_path) -> None:
    path = tmp_path / "a.dcm"
    _dicom(path, np.full((1024, 1024), 10, np.uint8), PhotometricInterpretation="MONOCHROME1")
    assert (rsna.read_dicom(path) == 245).all()


def test_a_missing_layout_is_explained(tmp_path) -> None:
    with pytest.raises(data.DataNotFoundError, match=r"stage_2_train_images/\*\.dcm are needed"):
        rsna.load("train", tmp_path)
