"""Planes: the layout in which activations stay between layers, and the moves into and out of it.

Images of a batch lie one below the other in one tall image: element (b, y, x) is element b * image + y * row + x of a
flat sequence, with zeros in the gaps between rows and images, which are the padding of every convolution. The sequence
is cut into `lanes` segments of S elements, and a channel is the vectors j = 0 ... S - 1 whose lane l holds element
l S + j. A shift by (dy, dx) is then a shift by dy row + dx whole vectors, whatever the size of the image: every load of
a convolution is aligned and no lane is wasted on borders. `margin` vectors before and after continue the sequence.

An array of c channels is `[c, segment + 2 margin, lanes]` float32.
"""

import functools
from typing import NamedTuple

import numpy as np


class Grid(NamedTuple):
    """How images `[n, h, w]` lie in planes.

    Attributes:
      n, h, w: images, rows, columns.
      row: elements from a row to the next, at least w.
      image: elements from an image to the next.
      cells: elements of the whole sequence.
      lanes: of a vector.
      margin: vectors before and after the segment.
    """

    n: int
    h: int
    w: int
    row: int
    image: int
    cells: int
    lanes: int
    margin: int

    @property
    def segment(self) -> int:
        """Vectors of a plane without its margins."""
        return -(-self.cells // self.lanes)

    @property
    def plane(self) -> int:
        """Vectors of a plane."""
        return self.segment + 2 * self.margin


def grid(n: int, h: int, w: int, gap: tuple[int, int], reach: tuple[int, int], lanes: int) -> Grid:
    """The smallest grid for images `[n, h, w]` whose readers need `gap` zeros (rows, columns) and shifts up to `reach`.

    Args:
      n, h, w: images, rows, columns.
      gap: rows of zeros between images, columns of zeros between rows.
      reach: the farthest row and column that a reader steps from an element.
      lanes: of a vector.
    """
    row = w + gap[1]
    image = (h + gap[0]) * row
    return Grid(n, h, w, row, image, (n - 1) * image + (h - 1) * row + w, lanes, reach[0] * row + reach[1])


def cell(g: Grid, b: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The float of a plane, margins counted, that holds element (b, y, x); y and x may lie in the gaps or before 0."""
    flat = b * g.image + y * g.row + x
    lane = np.clip(flat // g.segment, 0, g.lanes - 1)
    return (g.margin + flat - lane * g.segment) * g.lanes + lane


@functools.lru_cache(maxsize=256)
def valid(g: Grid) -> np.ndarray:
    """uint16 `[segment]`, bit l of vector j: an image has an element there."""
    return elements(g._replace(margin=0), (g.h, g.w))[0]


@functools.lru_cache(maxsize=256)
def elements(
    g: Grid, size: tuple[int, int], strides: tuple[int, int] = (1, 1), phases: tuple[tuple[int, int], ...] = ((0, 0),)
) -> np.ndarray:
    """uint16 `[phases, plane]`, bit l of vector j: that phase of images of `size` has an element there, margins too."""
    flat = np.arange(g.lanes)[None, :] * g.segment + np.arange(-g.margin, g.segment + g.margin)[:, None]
    b, rest = flat // g.image, flat % g.image
    y, x = rest // g.row, rest % g.row
    cell = (flat >= 0) & (b < g.n) & (y < g.h) & (x < g.w)
    inside = np.stack([cell & (y * strides[0] + i < size[0]) & (x * strides[1] + j < size[1]) for i, j in phases])
    return (inside << np.arange(g.lanes)).sum(axis=2).astype(np.uint16)


def to_planes(x: np.ndarray, g: Grid) -> np.ndarray:
    """The definition, in NumPy: images `[n, h, w, c]` as planes `[c, plane, lanes]`, margins filled."""
    n, h, w, c = x.shape
    flat = np.zeros((c, g.segment * g.lanes), x.dtype)
    b, y, z = np.meshgrid(np.arange(n), np.arange(h), np.arange(w), indexing="ij")
    flat[:, (b * g.image + y * g.row + z).reshape(-1)] = x.reshape(-1, c).T
    wide = np.pad(flat, ((0, 0), (g.margin, g.margin)))
    at = np.arange(g.lanes)[None, :] * g.segment + np.arange(g.plane)[:, None]
    return wide[:, at]


def from_planes(planes: np.ndarray, g: Grid) -> np.ndarray:
    """Inverse of `to_planes`: `[n, h, w, c]`."""
    b, y, x = np.meshgrid(np.arange(g.n), np.arange(g.h), np.arange(g.w), indexing="ij")
    flat = planes.reshape(planes.shape[0], -1)
    return np.ascontiguousarray(np.moveaxis(flat[:, cell(g, b, y, x)], 0, -1))


def window_source(g: Grid, out: Grid, stride: tuple[int, int], starts: list[tuple[int, int]]) -> np.ndarray:
    """Where the window of every output element begins: int32 `[len(starts), segment * lanes]` floats of a plane of `g`.

    Args:
      g: of the input.
      out: of the output.
      stride: of the windows.
      starts: row and column of the first window, one a phase. What lies outside the images
        points to 0, a zero of the margin.
    """
    if not g.margin:
        raise ValueError("windows are cut from grids with a margin")
    flat = (np.arange(out.lanes)[None, :] * out.segment + np.arange(out.segment)[:, None]).reshape(-1)
    b, rest = flat // out.image, flat % out.image
    y, x = rest // out.row, rest % out.row
    inside = (b < out.n) & (y < out.h) & (x < out.w)
    b, y, x = (np.where(inside, v, 0) for v in (b, y, x))
    places = []
    for top, left in starts:
        yy, xx = y * stride[0] + top, x * stride[1] + left
        found = inside & (yy < g.h) & (xx < g.w)  # a phase may end one earlier than the output
        places.append(np.where(found, cell(g, b, yy, xx), 0))
    return np.stack(places).astype(np.int32)
