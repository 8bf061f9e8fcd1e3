"""The masks of a pattern library, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.common.report import style
from experiments.common.report.style import PathLike

MAX_MASKS = 64


def library(
    path: PathLike, masks: Sequence[Sequence[int]], counts: Sequence[int], kernel: tuple[int, int] = (3, 3)
) -> Path:
    """Every mask as a small kernel, dark where a weight is kept, with the share of the kernels that use it.

    Args:
      path: the PNG.
      masks: kept taps of each, the most used first; at most `MAX_MASKS` are drawn.
      counts: kernels that use each.
      kernel: `(kh, kw)`.

    Raises:
      ValueError: there is no mask.
    """
    if not len(masks):
        raise ValueError(f"{path}: no mask to draw")
    shown, total = min(len(masks), MAX_MASKS), max(1, sum(counts))
    rows = -(-shown // 8)
    with style.figure(path, 0.7 + 1.15 * rows) as fig:
        axes = fig.subplots(rows, 8, squeeze=False).ravel()
        for ax, taps, count in zip(axes, masks[:shown], counts, strict=False):
            kept = np.zeros(kernel[0] * kernel[1])
            kept[list(taps)] = 1
            ax.imshow(kept.reshape(kernel), cmap=style.mask_colours(), vmin=1e-9, vmax=1)  # below it: white
            ax.set_title(f"{100 * count / total:.3g} %", fontsize=8.5)
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(visible=False)
            for side in ax.spines.values():
                side.set_visible(True)
        for ax in axes[shown:]:
            ax.set_axis_off()
        more = "" if shown == len(masks) else f" (the {shown} most used of {len(masks)})"
        fig.suptitle("Pattern library" + more, x=0.01, ha="left", weight="bold")
    return Path(path)
