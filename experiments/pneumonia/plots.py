"""Pictures of a detector: images with boxes drawn on them, and how well probabilities match frequencies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.patches import Rectangle

from experiments.common.report import style
from experiments.common.report.style import PathLike

_LINES = ("-", "--", ":")


class Boxes(NamedTuple):
    """Boxes of one kind on one image: corners `[k, (x1, y1, x2, y2)]` in its pixels, and scores `[k]` or None."""

    corners: np.ndarray
    scores: np.ndarray | None = None


def boxes_on_images(path: PathLike, images: Sequence[np.ndarray], boxes: Mapping[str, Sequence[Boxes]]) -> Path:
    """Images in a grid, with the boxes of each kind in a colour of its own, scores beside them.

    Args:
      path: the PNG.
      images: grey, uint8 `[h, w]` each.
      boxes: kind (such as "truth", "dense", "compressed") -> for each image its boxes.

    Raises:
      ValueError: no images, or kinds with another number of them.
    """
    if not images or any(len(each) != len(images) for each in boxes.values()):
        raise ValueError(f"{path}: {len(images)} images and {({k: len(v) for k, v in boxes.items()})} of boxes")
    columns = min(4, len(images))
    rows = -(-len(images) // columns)
    colours = (style.COLOURS[2], style.COLOURS[5], style.COLOURS[4])
    with style.figure(path, 0.5 + rows * style.WIDTH / columns) as fig:
        axes = fig.subplots(rows, columns, squeeze=False).ravel()
        for ax in axes:
            ax.set_axis_off()
        for number, (ax, image) in enumerate(zip(axes, images, strict=False)):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            for k, each in enumerate(boxes.values()):
                _draw(ax, each[number], colours[k % 3], _LINES[k % 3], bottom=k % 2 == 0)
        handles = [
            Rectangle((0, 0), 1, 1, fill=False, edgecolor=colours[k % 3], linestyle=_LINES[k % 3], linewidth=1.8)
            for k in range(len(boxes))
        ]
        fig.legend(handles, list(boxes), loc="outside upper center", ncols=len(boxes), frameon=False)
    return Path(path)


def _draw(ax: object, boxes: Boxes, colour: str, line: str, bottom: bool) -> None:
    for i, (x1, y1, x2, y2) in enumerate(boxes.corners):
        patch = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linestyle=line, linewidth=1.6)
        ax.add_patch(patch)  # type: ignore[attr-defined]
        if boxes.scores is not None:
            place = (x1 + 1, y2 - 1, "bottom") if bottom else (x1 + 1, y1 + 1, "top")
            text = f"{boxes.scores[i]:.2f}"
            ax.text(place[0], place[1], text, color=colour, fontsize=7, va=place[2])  # type: ignore[attr-defined]


def reliability(path: PathLike, curves: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Path:
    """Observed frequency against predicted probability, one curve a network, the number of images as the dots' size.

    Args:
      path: the PNG.
      curves: by name: mean predicted probability, observed frequency and number of images of each bin.
    """
    if not curves:
        raise ValueError(f"{path}: no curve to draw")
    with style.figure(path, 4.2) as fig:
        ax = fig.add_subplot()
        ax.plot([0, 1], [0, 1], color=style.GREY, linewidth=1, linestyle="--", label="perfect")
        for i, (name, (predicted, observed, count)) in enumerate(curves.items()):
            colour = style.colour_of(i, len(curves))
            ax.plot(predicted, observed, color=colour, linewidth=1.4, label=name)
            ax.scatter(predicted, observed, s=8 + 90 * count / max(1, count.sum()), color=colour, zorder=3)
        ax.set_xlim(0, 1)
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("predicted probability of an opacity in the image")
        ax.set_ylabel("share of images with one")
        ax.set_title("Reliability of the decision per image")
        ax.legend(loc="upper left")
    return Path(path)
