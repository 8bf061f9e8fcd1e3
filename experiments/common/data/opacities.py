"""Generated opacities on real normal chest X-rays: boxes are known, so that detectors can be trained and ranked.

What it is: every image is a real X-ray without a finding from `chest_xray_nih`; opacities are soft bright clouds drawn
into the lungs by program. What it is not: pneumonia. Figures on it say how well a detector finds such clouds on real
backgrounds, and nothing about patients.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np

from experiments.common.data import chest_xray_nih as nih
from experiments.common.data import xray
from experiments.common.data.dataset import Array, Arrays, Info
from experiments.common.data.source import Blob, Source

COPIES = {"train": 3, "val": 3, "test": 3}  # images made of each X-ray
_NEGATIVE = 0.4  # share of images without an opacity
_TWO = 0.5  # of the others, share with two
Box = tuple[float, float, float, float]


def _noise(rng: np.random.Generator, h: int, w: int) -> Array:
    """Smooth noise in -1..1: random values on three grids, each interpolated linearly."""
    total = np.zeros((h, w))
    for cells, weight in ((3, 1.0), (6, 0.6), (12, 0.35)):
        grid = rng.uniform(-1, 1, (cells + 1, cells + 1))
        total += weight * (_between(h, cells) @ grid @ _between(w, cells).T)
    return total / 1.95


def _between(n: int, cells: int) -> Array:
    """Weights `[n, cells + 1]` of linear interpolation at n positions among so many corners."""
    place = np.linspace(0, cells, n)
    return np.clip(1 - np.abs(place[:, None] - np.arange(cells + 1)), 0, None)


def opacity(rng: np.random.Generator, image: Array, side: int) -> tuple[Array, Box]:
    """Draws one opacity into a lung.

    An ellipse with a soft, ragged edge and cloudy inside moves the pixels towards white, as a denser lung does:
    new = old + alpha * (level - old). Centre, size and strength are drawn so that boxes have the sizes and positions of
    the challenge's (median 217 x 298 of 1024 pixels). The box is the smallest around what is at least a quarter as
    strong as the strongest place.

    Args:
      rng: source of the draws.
      image: float64 `[256, 256]`.
      side: 0 the left half of the image, 1 the right half.

    Returns:
      The image with it, and its box (x, y, w, h) in pixels.
    """
    n = image.shape[0]
    w = float(np.clip(rng.lognormal(np.log(0.23), 0.28), 0.12, 0.36)) * n
    h = float(np.clip(rng.lognormal(np.log(0.31), 0.36), 0.12, 0.55)) * n
    cx = (rng.uniform(0.25, 0.36) if side == 0 else rng.uniform(0.64, 0.75)) * n
    cy = float(np.clip(rng.normal(0.50, 0.09), 0.30, 0.64)) * n
    y, x = np.mgrid[0:n, 0:n] + 0.5
    radius = np.sqrt(((x - cx) / (w / 2)) ** 2 + ((y - cy) / (h / 2)) ** 2)
    soft = 1 / (1 + np.exp((radius + 0.25 * _noise(rng, n, n) - 0.85) / rng.uniform(0.08, 0.18)))
    alpha = rng.uniform(0.4, 0.75) * soft * (1 + 0.35 * _noise(rng, n, n))
    level = rng.uniform(0.9, 1.05) * np.quantile(image, 0.9)  # as bright as this film's bones and heart
    drawn = image + np.clip(alpha, 0, 1) * np.clip(level - image, 0, None)
    strong = alpha >= 0.25 * alpha.max()
    rows, columns = np.flatnonzero(strong.any(1)), np.flatnonzero(strong.any(0))
    box = (float(columns[0]), float(rows[0]), float(columns[-1] - columns[0] + 1), float(rows[-1] - rows[0] + 1))
    return drawn, box


def generate(images: Array, names: Sequence[str], copies: int, seed: int = 0) -> tuple[Array, list[list[Box]]]:
    """Makes `copies` images of each X-ray, with none, one or two opacities.

    What is drawn for an image depends on its name, the number of the copy and the seed alone.

    Args:
      images: uint8 `[n, 256, 256, 1]`, without findings.
      names: of the images.
      copies: of each.
      seed: of all draws.

    Returns:
      uint8 `[n * copies, 256, 256, 1]`, copies of an image side by side, and the boxes of each.
    """
    out = np.repeat(images, copies, 0)
    boxes: list[list[Box]] = []
    for i in range(len(out)):
        rng = np.random.default_rng([seed, zlib.crc32(names[i // copies].encode()), i % copies])
        sides = rng.permutation(2)
        number = 0 if rng.uniform() < _NEGATIVE else 2 if rng.uniform() < _TWO else 1
        image, mine = out[i, ..., 0].astype(np.float64), []
        for side in sides[:number]:
            image, box = opacity(rng, image, int(side))
            mine.append(box)
        out[i, ..., 0] = np.rint(np.clip(image, 0, 255))
        boxes.append(mine)
    return out, boxes


def _read(split: str, blobs: Sequence[Blob]) -> Arrays:
    archive, labels, boxes = blobs
    normal = [r for r in nih.rows(labels, boxes)[0] if r.split == split and r.label == 0]
    images, drawn = generate(nih.images(archive, [r.file for r in normal]), [r.file for r in normal], COPIES[split])
    patients = np.repeat([int(r.patient) for r in normal], COPIES[split])
    positive = np.array([len(b) > 0 for b in drawn], np.int32)
    return xray.arrays(images, drawn, patients.tolist(), positive=positive)


SOURCE = Source(
    info=Info(
        name="opacities",
        source="simulated opacities on normal X-rays of NIH ChestX-ray14 (Wang et al., 2017), 256x256",
        licence=nih.SOURCE.info.licence,
        classes=1,
        shape=(nih.SIZE, nih.SIZE, 1),
        mean=(0.5,),
        std=(0.25,),
        class_names=("simulated opacity",),
        stand_in=True,
        note="stands in for RSNA: the X-rays are real, the opacities are drawn by program and are not pneumonia",
    ),
    splits=dict.fromkeys(nih.SPLITS, nih.FILES),
    read=_read,
    obtain="made from chest_xray_nih when first read",
)
