"""The RSNA Pneumonia Detection Challenge 2018 as it is distributed: a table of boxes and a folder of DICOM images.

    rsna_pneumonia/stage_2_train_labels.csv          patientId, x, y, width, height, Target; also .csv.gz
    rsna_pneumonia/stage_2_train_images/<patientId>.dcm

The challenge publishes no labels of its test images, so the training patients are split: 80 % train, 10 % val,
10 % test, by a hash of the patient's id. Needs pydicom (and pillow, for images are JPEG inside).
"""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.common.data import store, xray
from experiments.common.data.dataset import Array, Arrays, Dataset, Info, from_arrays
from experiments.common.data.readers import gunzip
from experiments.common.data.source import (
    Blob,
    DataFileError,
    DataNotFoundError,
    File,
    Source,
    read_blobs,
    search_places,
)

FOLDER = "rsna_pneumonia"
LABELS = "stage_2_train_labels.csv"
IMAGES = "stage_2_train_images"
SIDE = 1024  # pixels of the distributed images, in which boxes are given
PARTS: Mapping[str, float] = {"train": 0.8, "val": 0.1, "test": 0.1}
_CSV_LIMIT = 64 << 20
_DICOM_LIMIT = 64 << 20
_COLUMNS = ("patientId", "x", "y", "width", "height", "Target")

INFO = Info(
    name="rsna",
    source="RSNA Pneumonia Detection Challenge 2018, stage 2 training set, patients split 80/10/10",
    licence="RSNA challenge terms: non-commercial research and education, as usually stated",
    classes=1,
    shape=(SIDE, SIDE, 1),
    mean=(0.5,),
    std=(0.25,),
    class_names=("opacity",),
    note="the challenge's own test labels are not public",
)


class Patient(NamedTuple):
    """A patient: id, whether there is an opacity, and its boxes (x, y, w, h) in pixels of the 1024 image."""

    name: str
    positive: bool
    boxes: tuple[tuple[float, float, float, float], ...]


def read_labels(blob: Blob, policy: str = "error") -> tuple[list[Patient], xray.Faults]:
    """The patients of the challenge's table, by name.

    Faults (see `xray.Faults`; with "skip", the box or the patient is left out): a positive row without a box, a
    negative row with one, a box outside the image or without area or that is no number, a patient both positive and
    negative, a Target other than 0 and 1.

    Raises:
      DataFileError: not this table, or no rows; or a fault, with policy "error".
    """
    faults = xray.Faults(policy)
    try:
        data = gunzip(blob, _CSV_LIMIT) if blob.data[:2] == b"\x1f\x8b" else blob.data
        reader = csv.DictReader(io.StringIO(data.decode()), strict=True)
        lines = list(reader)
    except (UnicodeDecodeError, csv.Error, gzip.BadGzipFile) as error:
        raise DataFileError(f"{blob.path}: not a CSV table ({error})") from None
    missing = [c for c in _COLUMNS if c not in (reader.fieldnames or ())]
    if missing:
        raise DataFileError(f"{blob.path}: lacks the column {missing[0]}; expected {', '.join(_COLUMNS)}")
    if not lines:
        raise DataFileError(f"{blob.path}: holds no rows (empty labels)")
    targets: dict[str, set[str]] = {}
    boxes: dict[str, list[tuple[float, float, float, float]]] = {}
    for number, line in enumerate(lines, start=2):
        name, target = line["patientId"], line["Target"]
        where = f"{blob.path}, row {number}, patient {name}"
        if not name or target not in ("0", "1"):
            faults.add("row without a label", where, f"Target is {target!r}")
            continue
        targets.setdefault(name, set()).add(target)
        fields = [(line[c] or "").strip() for c in ("x", "y", "width", "height")]
        if not any(fields):
            if target == "1":
                faults.add("positive without a box", where, "x, y, width and height are empty")
            continue
        try:
            x, y, w, h = (float(v) for v in fields)
        except ValueError:
            x = y = w = h = float("nan")
        wrong = xray.check_box((x, y, w, h), (SIDE, SIDE))
        if target == "0":
            faults.add("negative with a box", where, ", ".join(fields))
        elif wrong:
            faults.add(wrong, where, ", ".join(fields))
        else:
            boxes.setdefault(name, []).append((x, y, w, h))
    patients = []
    for name in sorted(targets):
        mine = tuple(boxes.get(name, ()))
        if len(targets[name]) > 1:
            faults.add("patient both positive and negative", f"{blob.path}, patient {name}", "two Targets")
        elif "1" not in targets[name] or mine:  # a positive whose boxes are all at fault is left out
            patients.append(Patient(name, bool(mine), mine))
    return patients, faults


def read_dicom(path: Path) -> Array:
    """The pixels of one image, uint8 `[1024, 1024]`, bright where the body is dense.

    Raises:
      DataFileError: not a DICOM file, damaged, too large, or not one grey 8-bit image of 1024x1024.
      DataNotFoundError: pydicom is not installed.
    """
    try:
        import pydicom  # an extra, and needed here only
    except ImportError as error:
        raise DataNotFoundError("reading DICOM needs pydicom: pip install 'compressx[images]'") from error
    (blob,) = read_blobs([File(path.name, _DICOM_LIMIT)], [path])
    try:
        image = pydicom.dcmread(io.BytesIO(blob.data))
        shape = (int(image.Rows), int(image.Columns), int(image.SamplesPerPixel), int(image.BitsAllocated))
        kind = str(image.PhotometricInterpretation)
        if shape != (SIDE, SIDE, 1, 8) or int(image.get("NumberOfFrames", 1) or 1) != 1:
            raise DataFileError(f"{path}: rows, columns, samples, bits are {shape}, expected (1024, 1024, 1, 8)")
        if kind not in ("MONOCHROME1", "MONOCHROME2"):
            raise DataFileError(f"{path}: is {kind}, not grey")
        pixels = np.asarray(image.pixel_array)
    except DataFileError:
        raise
    except Exception as error:  # pydicom and its decoders raise many kinds for damaged files
        raise DataFileError(f"{path}: not a sound DICOM image ({type(error).__name__}: {error})") from error
    if pixels.shape != (SIDE, SIDE) or pixels.dtype != np.uint8:
        raise DataFileError(f"{path}: holds {pixels.dtype} {list(pixels.shape)}, expected uint8 [1024, 1024]")
    return 255 - pixels if kind == "MONOCHROME1" else pixels


def find(data_dir: str | os.PathLike[str] | None = None) -> Path:
    """The folder `rsna_pneumonia` in `data_dir` or `$COMPRESSX_DATA`.

    Raises:
      DataNotFoundError: there is none with a table and a folder of images.
    """
    places = search_places(data_dir)
    for place in places:
        for folder in (place / FOLDER, place):
            if _labels_file(folder) is not None and (folder / IMAGES).is_dir():
                return folder
    raise DataNotFoundError(
        f"data set 'rsna' not found: {FOLDER}/{LABELS} and {FOLDER}/{IMAGES}/*.dcm are needed; looked in "
        f"{', '.join(map(str, places)) or 'nowhere, for neither data_dir nor $COMPRESSX_DATA is set'}. They come from "
        "the RSNA Pneumonia Detection Challenge 2018, whose terms must be accepted first (docs/data.md)"
    )


def _labels_file(folder: Path) -> Path | None:
    return next((p for p in (folder / LABELS, folder / f"{LABELS}.gz") if p.is_file()), None)


def load(
    split: str, data_dir: str | os.PathLike[str] | None = None, *, size: int = 256, policy: str = "error"
) -> tuple[Dataset, xray.Faults]:
    """Reads a split, images averaged down to `size`; boxes are in pixels of that size.

    What was decoded is kept in the cache under a checksum of the table and of the images' names, sizes and times.

    Args:
      split: "train", "val" or "test".
      data_dir: folder that holds `rsna_pneumonia`, or that folder itself.
      size: height and width of the images.
      policy: "error", or "skip": faulty boxes and images are left out, named and counted.

    Returns:
      The data set with arrays as in `xray.arrays`, and the faults.

    Raises:
      DataNotFoundError, DataFileError: what is missing or at fault.
    """
    if split not in PARTS:
        raise ValueError(f"data set 'rsna' has no split {split!r}; it has {', '.join(PARTS)}")
    folder = find(data_dir)
    table = _labels_file(folder)
    assert table is not None
    (blob,) = read_blobs([File(table.name, _CSV_LIMIT)], [table])
    patients, faults = read_labels(blob, policy)
    mine = [p for p in patients if xray.part_of(p.name, PARTS) == split]
    there = _listing(folder, mine, faults)
    mine = [p for p in mine if p.name in there]
    if not mine:
        raise DataFileError(f"{folder}: no image of split {split!r} can be used: {faults}")
    if policy == "skip":  # which files are at fault is only known by reading them
        return from_arrays(_decode(folder, mine, size, faults), _info(size)), faults
    listing = "\n".join(f"{p.name} {there[p.name]}" for p in mine)
    source = Source(info=_info(size), splits={split: ()}, read=lambda *_: {}, version=size)
    blobs = [blob, Blob(folder / IMAGES, listing.encode())]
    return from_arrays(store.cached(source, split, blobs, lambda: _decode(folder, mine, size, faults)), source.info), (
        faults
    )


def _info(size: int) -> Info:
    return Info(**{**INFO.__dict__, "shape": (size, size, 1)})


def _listing(folder: Path, patients: Sequence[Patient], faults: xray.Faults) -> dict[str, str]:
    """patient -> size and time of the image, for those that have one."""
    there = {}
    for p in patients:
        if "/" in p.name or "\\" in p.name or p.name.startswith("."):
            faults.add("patient with an impossible name", repr(p.name), "it must be a file's name")
            continue
        path = folder / IMAGES / f"{p.name}.dcm"
        try:
            stat = path.stat()
        except OSError as error:
            faults.add("missing image", str(path), str(error.strerror))
            continue
        there[p.name] = f"{stat.st_size} {stat.st_mtime_ns}"
    return there


def _decode(folder: Path, patients: Sequence[Patient], size: int, faults: xray.Faults) -> Arrays:
    images: list[Array] = []
    kept: list[Patient] = []
    for p in patients:
        try:
            pixels = read_dicom(folder / IMAGES / f"{p.name}.dcm")
        except DataFileError as error:
            if faults.policy == "error":
                raise
            faults.add("bad image", f"{p.name}.dcm", str(error))
            continue
        images.append(xray.resize_area(pixels[None, ..., None], size)[0])
        kept.append(p)
    if not kept:
        raise DataFileError(f"{folder}: no image can be used: {faults}")
    scale = size / SIDE
    boxes = [[tuple(v * scale for v in box) for box in p.boxes] for p in kept]
    positive = np.array([p.positive for p in kept], np.int32)
    return xray.arrays(np.stack(images), boxes, list(range(len(kept))), positive=positive)
