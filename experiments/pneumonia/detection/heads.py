"""Raw heads to boxes: what a YOLO network's numbers mean, with fixed shapes throughout."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.models.yolov3 import ANCHORS_PER_HEAD, COCO_ANCHORS, STRIDES

_MOST = 12.0  # exp of it is far beyond any image; an untrained network must not give infinite boxes


@dataclass(frozen=True)
class Geometry:
    """Where a detector's cells and anchors lie.

    Attributes:
      size: (height, width) of the input in pixels, multiples of the largest stride.
      anchors: nine (w, h) in pixels of that input, three a head in the order of the heads.
      strides: pixels a cell, by head.
      classes: number of classes.
    """

    size: tuple[int, int]
    anchors: tuple[tuple[float, float], ...] = COCO_ANCHORS
    strides: tuple[int, ...] = STRIDES
    classes: int = 1

    def __post_init__(self) -> None:
        if len(self.anchors) != ANCHORS_PER_HEAD * len(self.strides) or min(min(a) for a in self.anchors) <= 0:
            raise ValueError(f"{len(self.strides)} heads need three positive anchors each, got {self.anchors}")
        if any(n % self.strides[0] or n <= 0 for n in self.size):
            raise ValueError(f"size={self.size} must be multiples of {self.strides[0]}")

    @property
    def grids(self) -> tuple[tuple[int, int], ...]:
        """(rows, columns) of cells of each head."""
        return tuple((self.size[0] // s, self.size[1] // s) for s in self.strides)

    @property
    def number(self) -> int:
        """How many boxes are predicted for an image."""
        return sum(ANCHORS_PER_HEAD * h * w for h, w in self.grids)

    def cells(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of every predicted box in order (head, row, column, anchor): cell (x, y), stride, anchor (w, h).

        Returns:
          float32 `[number, 2]`, `[number]`, `[number, 2]`.
        """
        corner, stride, anchor = [], [], []
        for k, ((h, w), s) in enumerate(zip(self.grids, self.strides, strict=True)):
            y, x = np.meshgrid(np.arange(h), np.arange(w), indexing="ij")
            corner.append(np.repeat(np.stack([x, y], -1).reshape(-1, 2), ANCHORS_PER_HEAD, 0))
            stride.append(np.full(h * w * ANCHORS_PER_HEAD, s))
            mine = self.anchors[ANCHORS_PER_HEAD * k : ANCHORS_PER_HEAD * (k + 1)]
            anchor.append(np.tile(np.array(mine), (h * w, 1)))
        parts = (np.concatenate(p).astype(np.float32) for p in (corner, stride, anchor))
        return tuple(parts)  # type: ignore[return-value]


class Decoded(NamedTuple):
    """What the heads say of every cell and anchor, in the order of `Geometry.cells`.

    Attributes:
      boxes: corners in pixels `[n, number, 4]`; they may reach beyond the image.
      objectness: logits `[n, number]`.
      classes: logits `[n, number, classes]`.
      raw: (tx, ty, tw, th) `[n, number, 4]`.
    """

    boxes: jax.Array
    objectness: jax.Array
    classes: jax.Array
    raw: jax.Array


def decode(heads: Sequence[jax.Array], geometry: Geometry) -> Decoded:
    """Turns raw heads into boxes.

        centre = (sigmoid(tx, ty) + cell) * stride,   size = anchor * exp(tw, th)

    Args:
      heads: `[n, rows, columns, 3 * (5 + classes)]` by stride.
      geometry: of the input the heads were made from.

    Raises:
      ValueError: heads that do not have the geometry's shapes.

    Source: Redmon, Farhadi, "YOLOv3: An Incremental Improvement", 2018, section 2.1.
    """
    depth = 5 + geometry.classes
    wanted = [(h, w, ANCHORS_PER_HEAD * depth) for h, w in geometry.grids]
    if [head.shape[1:] for head in heads] != wanted:
        raise ValueError(f"heads {[h.shape for h in heads]} do not fit {geometry}; expected [n, ...] of {wanted}")
    flat = jnp.concatenate([head.reshape(head.shape[0], -1, depth) for head in heads], 1)
    cell, stride, anchor = (jnp.asarray(x)[None] for x in geometry.cells())
    centre = (jax.nn.sigmoid(flat[..., :2]) + cell) * stride[..., None]
    half = 0.5 * anchor * jnp.exp(jnp.minimum(flat[..., 2:4], _MOST))
    boxes = jnp.concatenate([centre - half, centre + half], -1)
    return Decoded(boxes, flat[..., 4], flat[..., 5:], flat[..., :4])
