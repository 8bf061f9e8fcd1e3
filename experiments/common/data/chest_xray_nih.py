"""A small part of NIH ChestX-ray14: 940 frontal X-rays, half without a finding, half labelled pneumonia; 43 boxes."""

from __future__ import annotations

import csv
import io
import zipfile
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from experiments.common.data import xray
from experiments.common.data.dataset import Array, Arrays, Info
from experiments.common.data.source import Blob, DataFileError, File, Source

SIZE = 256
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNK_LIMIT = 1 << 20
FILES = (
    File("chest_xray_nih/images_256.zip", 60 << 20),
    File("chest_xray_nih/labels.csv", 1 << 20),
    File("chest_xray_nih/boxes.csv", 1 << 20),
)
SPLITS = ("train", "val", "test")


class Row(NamedTuple):
    """An image: its file, label (1 = pneumonia), split, patient, and boxes in its pixels."""

    file: str
    label: int
    split: str
    patient: str
    boxes: tuple[tuple[float, float, float, float], ...]


def grey_png(data: bytes, where: str, size: int = SIZE) -> Array:
    """Reads an 8-bit grey PNG of known size, uint8 `[size, size]`; every chunk is bounded and its checksum checked.

    Raises:
      DataFileError: anything else, or damage; the message begins with `where`.
    """

    def fail(why: str) -> DataFileError:
        return DataFileError(f"{where}: not a sound 8-bit grey PNG of {size}x{size} ({why})")

    if data[:8] != _SIGNATURE:
        raise fail("no PNG signature")
    at, header, body = 8, b"", b""
    while at + 12 <= len(data):
        length, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        chunk = data[at + 8 : at + 8 + length]
        if length > _CHUNK_LIMIT or at + 12 + length > len(data):
            raise fail("a chunk is longer than the file")
        if zlib.crc32(kind + chunk) != int.from_bytes(data[at + 8 + length : at + 12 + length], "big"):
            raise fail("a chunk's checksum is wrong")
        header, body = (chunk if kind == b"IHDR" else header), body + (chunk if kind == b"IDAT" else b"")
        at += 12 + length
        if kind == b"IEND":
            break
    if header != size.to_bytes(4, "big") * 2 + b"\x08\x00\x00\x00\x00":
        raise fail(f"its header is {header.hex() or 'missing'}")
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(body, size * (size + 1) + 1)
    except zlib.error as error:
        raise fail(str(error)) from None
    if len(raw) != size * (size + 1) or not stream.eof:
        raise fail(f"{len(raw)} bytes of pixels")
    lines = np.frombuffer(raw, np.uint8).reshape(size, size + 1)
    if not (lines[:, 0] <= 4).all():
        raise fail("an unknown filter")
    return _unfilter(lines)


def _unfilter(lines: Array) -> Array:
    """Undoes PNG's five line filters, for one byte a pixel."""
    out = np.zeros((len(lines), lines.shape[1] - 1), np.uint8)
    if (lines[:, 0] == 1).all():  # left neighbour throughout
        return np.cumsum(lines[:, 1:], 1, dtype=np.uint8)
    above = np.zeros(out.shape[1], np.uint8)
    for y, line in enumerate(lines):
        kind, values = int(line[0]), line[1:]
        if kind == 0:
            out[y] = values
        elif kind == 1:
            out[y] = np.cumsum(values, dtype=np.uint8)
        elif kind == 2:
            out[y] = values + above
        else:
            left = upper_left = 0
            for x, value in enumerate(values.tolist()):
                up = int(above[x])
                if kind == 3:
                    guess = (left + up) // 2
                else:
                    p = left + up - upper_left
                    gaps = (abs(p - left), abs(p - up), abs(p - upper_left))
                    guess = (left, up, upper_left)[gaps.index(min(gaps))]
                left, upper_left = (value + guess) & 255, up
                out[y, x] = left
        above = out[y]
    return out


def rows(labels: Blob, boxes: Blob, policy: str = "error") -> tuple[list[Row], xray.Faults]:
    """The images of the two tables, all splits.

    Args:
      labels: labels.csv.
      boxes: boxes.csv.
      policy: what faulty boxes do, see `xray.Faults`.

    Raises:
      DataFileError: not these tables, a patient in two splits, or (policy "error") a box outside its image.
    """
    faults = xray.Faults(policy)
    held: dict[str, list[tuple[float, float, float, float]]] = {}
    table = _table(labels, ("file", "label", "split", "patient"))
    known = {line["file"] for line in table}
    for line in _table(boxes, ("file", "x", "y", "w", "h")):
        try:
            box = (float(line["x"]), float(line["y"]), float(line["w"]), float(line["h"]))
        except ValueError:
            box = (float("nan"),) * 4
        wrong = xray.check_box(box, (SIZE, SIZE))
        if line["file"] not in known:
            faults.add("box without an image", f"{boxes.path}, {line['file']}", "labels.csv lacks it")
        elif wrong:
            faults.add(wrong, f"{boxes.path}, {line['file']}", f"{line['x']}, {line['y']}, {line['w']}, {line['h']}")
        else:
            held.setdefault(line["file"], []).append(box)
    found = []
    for line in table:
        if line["label"] not in ("0", "1") or line["split"] not in SPLITS:
            raise DataFileError(f"{labels.path}: {line['file']} has label {line['label']!r}, split {line['split']!r}")
        mine = tuple(held.get(line["file"], ()))
        found.append(Row(line["file"], int(line["label"]), line["split"], line["patient"], mine))
    xray.check_patients({s: [r.patient for r in found if r.split == s] for s in SPLITS}, str(labels.path))
    return found, faults


def _table(blob: Blob, wanted: Sequence[str]) -> list[dict[str, str]]:
    try:
        reader = csv.DictReader(io.StringIO(blob.data.decode()), strict=True)
        lines = list(reader)
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataFileError(f"{blob.path}: not a CSV table ({error})") from None
    missing = [name for name in wanted if name not in (reader.fieldnames or ())]
    if missing or not lines:
        raise DataFileError(f"{blob.path}: {'lacks the column ' + missing[0] if missing else 'holds no rows'}")
    short = next((i for i, line in enumerate(lines) if any(line[name] is None for name in wanted)), None)
    if short is not None:
        raise DataFileError(f"{blob.path}: row {short + 2} is too short")
    return lines


def images(blob: Blob, names: Sequence[str]) -> Array:
    """The named members of the image archive, uint8 `[n, 256, 256, 1]`.

    Raises:
      DataFileError: the archive or a member is missing or damaged.
    """
    out = np.empty((len(names), SIZE, SIZE, 1), np.uint8)
    try:
        with zipfile.ZipFile(io.BytesIO(blob.data)) as archive:
            sizes = {member.filename: member.file_size for member in archive.infolist()}
            for i, name in enumerate(names):
                if not 0 < sizes.get(name, 0) <= _CHUNK_LIMIT:
                    raise DataFileError(f"{blob.path}: lacks {name}, or it is larger than {_CHUNK_LIMIT} bytes")
                out[i, ..., 0] = grey_png(archive.read(name), f"{blob.path}, {name}")
    except (zipfile.BadZipFile, zlib.error, OSError, RuntimeError, NotImplementedError, EOFError) as error:
        raise DataFileError(f"{blob.path}: not a sound zip file ({error}); fetch it again") from None
    return out


def _read(split: str, blobs: Sequence[Blob]) -> Arrays:
    archive, labels, boxes = blobs
    mine = [row for row in rows(labels, boxes)[0] if row.split == split]
    patients = [int(row.patient) for row in mine]
    label = np.array([row.label for row in mine], np.int32)
    return xray.arrays(images(archive, [r.file for r in mine]), [r.boxes for r in mine], patients, positive=label)


SOURCE = Source(
    info=Info(
        name="chest_xray_nih",
        source="NIH ChestX-ray14 (Wang et al., 2017), 470 normal and 470 pneumonia frontal X-rays, 256x256",
        licence="NIH Clinical Center: free use with attribution (Wang et al., 2017, and a link to the NIH download)",
        classes=1,
        shape=(SIZE, SIZE, 1),
        mean=(0.5,),
        std=(0.25,),
        class_names=("pneumonia",),
        stand_in=True,
        note="stands in for RSNA: labels read from reports by program; only 38 images have boxes, and a pneumonia "
        "without a box has count 0 and positive 1",
    ),
    splits=dict.fromkeys(SPLITS, FILES),
    read=_read,
    obtain="made from the NIH download",
)
