"""What the sets of chest X-rays with boxes share: their arrays, faults that are named and counted, resizing, splits."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.common.data.dataset import Array, Arrays
from experiments.common.data.source import DataFileError

POLICIES = ("error", "skip")


@dataclass
class Faults:
    """Faults of a data set by kind: an immediate error, or counted and what they concern left out.

    Attributes:
      policy: "error" raises at the first fault, "skip" counts it.
      found: kind -> the names concerned, in the order in which they were met.
    """

    policy: str = "error"
    found: dict[str, list[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} is impossible; it must be one of {', '.join(POLICIES)}")

    def add(self, kind: str, name: str, detail: str) -> None:
        """Notes a fault.

        Raises:
          DataFileError: the policy is "error".
        """
        if self.policy == "error":
            raise DataFileError(f"{name}: {kind} ({detail}); correct it, or skip what is at fault and have it counted")
        self.found.setdefault(kind, []).append(name)

    def __str__(self) -> str:
        parts = [f"{len(v)} {k} ({', '.join(v[:3])}{', ...' if len(v) > 3 else ''})" for k, v in self.found.items()]
        return "; ".join(parts) or "no faults"

    @property
    def counts(self) -> dict[str, int]:
        """kind -> how many."""
        return {kind: len(names) for kind, names in self.found.items()}


def check_box(box: Sequence[float], size: tuple[float, float]) -> str | None:
    """What is wrong with a box (x, y, width, height) in an image of `size` (width, height), or None."""
    if not all(np.isfinite(v) for v in box):
        return "box that is no number"
    x, y, w, h = box
    if w <= 0 or h <= 0:
        return "box without area"
    if x < 0 or y < 0 or x + w > size[0] + 1e-6 or y + h > size[1] + 1e-6:
        return "box outside the image"
    return None


def resize_area(images: Array, size: int) -> Array:
    """Resizes square grey images by averaging the area that each new pixel covers (enlarging repeats pixels).

    Args:
      images: uint8 `[n, h, h, 1]`.
      size: new height and width.

    Returns:
      uint8 `[n, size, size, 1]`, rounded to nearest.
    """
    n, h, w, c = images.shape
    if h != w or c != 1 or size < 1:
        raise ValueError(f"images must be square and grey and size positive, got {list(images.shape)} and {size}")
    if h == size:
        return images
    if h % size == 0:  # whole blocks of pixels
        block = h // size
        sums = images[..., 0].reshape(n, size, block, size, block).sum((2, 4), dtype=np.uint32)
        return ((2 * sums + block * block) // (2 * block * block)).astype(np.uint8)[..., None]
    ends = np.arange(size + 1) * (h / size)
    cover = np.minimum(ends[1:, None], np.arange(1, h + 1)) - np.maximum(ends[:-1, None], np.arange(h))
    weight = (np.clip(cover, 0, None) * (size / h)).astype(np.float32)  # [size, h], rows sum to 1
    out = np.empty((n, size, size, 1), np.uint8)
    for i in range(n):
        out[i, ..., 0] = np.rint(weight @ images[i, ..., 0].astype(np.float32) @ weight.T)
    return out


def table(boxes: Sequence[Sequence[Sequence[float]]], most: int | None = None) -> tuple[Array, Array]:
    """Boxes of each image as one array, filled up with zeros.

    Args:
      boxes: per image its boxes (x, y, w, h).
      most: rows an image; None: as many as the fullest has, at least one.

    Returns:
      float32 `[n, most, 4]` and int32 `[n]`, how many rows are real.
    """
    count = np.array([len(b) for b in boxes], np.int32)
    rows = max(1, int(count.max(initial=0))) if most is None else most
    if count.max(initial=0) > rows:
        raise ValueError(f"an image has {count.max()} boxes and there is room for {rows}")
    out = np.zeros((len(boxes), rows, 4), np.float32)
    for i, each in enumerate(boxes):
        if len(each):
            out[i, : len(each)] = each
    return out, count


def part_of(patient: str, parts: Mapping[str, float]) -> str:
    """The split of a patient: a function of the name alone, so that all images of a patient are in one.

    Args:
      patient: any name.
      parts: split -> share; shares sum to 1.
    """
    if abs(sum(parts.values()) - 1) > 1e-9:
        raise ValueError(f"the shares {dict(parts)} must sum to 1")
    place = int.from_bytes(hashlib.sha256(patient.encode()).digest()[:8], "big") / 2**64
    edge = 0.0
    for name, share in parts.items():
        edge += share
        if place < edge:
            return name
    return next(reversed(list(parts)))


def check_patients(splits: Mapping[str, Sequence[str]], where: str) -> None:
    """Raises DataFileError, naming a patient, where one is in two splits."""
    seen: dict[str, str] = {}
    for split, patients in splits.items():
        for patient in set(patients):
            if patient in seen:
                raise DataFileError(f"{where}: patient {patient} is in {seen[patient]} and in {split}")
            seen[patient] = split


def arrays(
    images: Array, boxes: Sequence[Sequence[Sequence[float]]], patients: Sequence[int], **more: Array
) -> Arrays:
    """The arrays of a set with boxes, as `dataset.from_arrays` takes them.

    Args:
      images: uint8 `[n, h, w, 1]`.
      boxes: per image (x, y, w, h) in its pixels.
      patients: a number for each image, the same for images of one patient.
      **more: further labels `[n, ...]`.

    Returns:
      `inputs`, `labels/boxes` float32 `[n, m, 4]`, `labels/count` int32 `[n]`, `labels/patient` int32 `[n]`, and more.
    """
    rows, count = table(boxes)
    labels = {"boxes": rows, "count": count, "patient": np.asarray(patients, np.int32), **more}
    return {"inputs": images, **{f"labels/{name}": value for name, value in labels.items()}}


