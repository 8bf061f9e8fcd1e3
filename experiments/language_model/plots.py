"""Pictures of rows: how dense magnitude pruning leaves them, and which of their weights a structure keeps."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm

from experiments.common.report import style
from experiments.common.report.style import PathLike

MAX_LEAVES = 6


def row_densities(path: PathLike, leaves: Mapping[str, Any], mean: float) -> Path:
    """The densities of each leaf's rows in ascending order, and beside them their histogram.

    Args:
      path: the PNG.
      leaves: shares in 0..1 `[R]` by leaf path.
      mean: the density in all.
    """
    if not leaves or any(np.ndim(d) != 1 or np.size(d) == 0 for d in leaves.values()):
        raise ValueError(f"{path}: needs the densities of the rows of at least one leaf")
    with style.figure(path, 3.4) as fig:
        left, right = fig.subplots(1, 2)
        top = max(float(np.max(d)) for d in leaves.values())
        edges = np.linspace(0.0, max(top, 1e-6), 25)
        for i, (leaf, d) in enumerate(leaves.items()):
            colour = style.colour_of(i, len(leaves))
            d = np.sort(np.asarray(d, np.float64))
            left.plot((np.arange(d.size) + 0.5) / d.size, d, color=colour, label=style.short_name(leaf))
            share = np.histogram(d, edges)[0] / d.size
            right.stairs(share, edges, color=colour, linewidth=1.4)
        left.axhline(mean, color=style.GREY, linestyle="--", linewidth=1.0)
        right.axvline(mean, color=style.GREY, linestyle="--", linewidth=1.0)
        left.set_xlabel("rows, ascending (share)")
        left.set_ylabel("density of the row")
        right.set_xlabel("density of the row")
        right.set_ylabel("share of rows")
        left.set_title("Row densities")
        left.legend(loc="upper left", fontsize=8)
    return Path(path)


def kept_blocks(
    path: PathLike, leaves: Mapping[str, Any], sizes: Mapping[str, Any], rows: int = 32, columns: int = 128
) -> Path:
    """Kept weights of some rows of each matrix `[in, out]`, coloured by the block size of their row.

    Args:
      path: the PNG.
      leaves: weights by leaf path; not zero is kept.
      sizes: block size of every row, of those leaves that have any.
      rows: shown of each leaf, evenly over its rows sorted by block size.
      columns: shown, from the left.
    """
    shown = [leaf for leaf in leaves if np.ndim(leaves[leaf]) == 2][:MAX_LEAVES]
    if not shown:
        raise ValueError(f"{path}: no matrix to draw")
    high = max([2, *(int(np.max(sizes[leaf])) for leaf in shown if leaf in sizes)])
    norm = LogNorm(1, high)
    with style.figure(path, 0.9 + 1.5 * len(shown)) as fig:
        axes = fig.subplots(len(shown), 1, squeeze=False)[:, 0]
        for ax, leaf in zip(axes, shown, strict=True):
            w = np.asarray(leaves[leaf])
            along = np.asarray(sizes.get(leaf, np.ones(w.shape[0], np.int64)))
            if along.size != w.shape[0]:
                w = w.T  # blocks along the inputs: a row is an output
            order = np.argsort(along, kind="stable")
            picked = order[np.unique(np.linspace(0, order.size - 1, min(rows, order.size)).round().astype(int))]
            part = w[picked, :columns]
            image = np.ma.masked_where(part == 0, np.broadcast_to(along[picked][:, None], part.shape))
            ax.imshow(image, cmap="viridis_r", norm=norm, aspect="auto", interpolation="nearest")
            ax.grid(visible=False)
            ax.set_title(style.short_name(leaf), fontsize=10)
            ax.set_yticks([])
            ax.tick_params(labelsize=8)
        axes[-1].set_xlabel("place along the row")
        if high > 2:
            bar = fig.colorbar(ScalarMappable(norm, "viridis_r"), ax=axes.tolist(), fraction=0.03, pad=0.01)
            bar.set_label("block size")
            powers = 2 ** np.arange(int(np.log2(high)) + 1)
            bar.set_ticks(powers.tolist(), labels=[str(p) for p in powers])
            bar.ax.minorticks_off()
    return Path(path)
