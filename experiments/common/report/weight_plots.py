"""Pictures of the weights themselves, one panel or bar a layer: histograms, kept weights, masks.

What does not fit is left out by size, smallest first, and the title says how many are shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter

from experiments.common.report import style
from experiments.common.report.style import PathLike

MAX_PANELS = 24  # of a plot with one panel a layer
MAX_BARS = 60
MASK_PIXELS = 256  # a mask with a longer side is drawn by block density


def weight_histograms(path: PathLike, before: Mapping[str, Any], after: Mapping[str, Any], bins: int = 61) -> Path:
    """Histograms of the non-zero weights of each layer before and after, with the zeros counted in words.

    Args:
      path: the PNG.
      before: weights by leaf path, any shape.
      after: the same leaves after compression.
      bins: of the histogram.
    """
    if not before or set(before) != set(after):
        raise ValueError(f"{path}: weight histograms need the same leaves before and after, at least one")
    chosen = sorted(before, key=lambda leaf: -np.size(before[leaf]))[:MAX_PANELS]
    leaves = [leaf for leaf in before if leaf in chosen]
    with style.figure(path, 0.7 + 1.95 * -(-len(leaves) // 2)) as fig:
        axes = fig.subplots(-(-len(leaves) // 2), 2, squeeze=False).ravel()
        for ax, leaf in zip(axes, leaves, strict=False):
            _histogram(ax, leaf, _flat(before[leaf], leaf, path), _flat(after[leaf], leaf, path), bins)
        for ax in axes[len(leaves) :]:
            ax.set_axis_off()
        handles, names = axes[0].get_legend_handles_labels()
        fig.legend(handles, names, loc="outside upper right", ncols=2)
        fig.suptitle("Non-zero weights per layer" + _note_left_out(leaves, before), x=0.01, ha="left", weight="bold")
    return Path(path)


def kept_weights(path: PathLike, names: Sequence[str], kept: Sequence[int], total: Sequence[int]) -> Path:
    """One bar a layer: weights kept on top of weights before, log scale, with the numbers beside it."""
    if not names or not len(names) == len(kept) == len(total):
        raise ValueError(f"{path}: needs as many names ({len(names)}) as kept ({len(kept)}) and total ({len(total)})")
    order = sorted(range(len(names)), key=lambda i: -total[i])[:MAX_BARS]
    rows = [i for i in range(len(names)) if i in order]
    with style.figure(path, 1.1 + 0.3 * len(rows)) as fig:
        ax = fig.add_subplot()
        where = np.arange(len(rows))
        floor = 0.8  # a log axis has no zero: one weight is still a visible bar
        ax.barh(where, [max(total[i], floor) for i in rows], color=style.PALE, height=0.62, label="before")
        ax.barh(where, [max(kept[i], floor) for i in rows], color=style.BLUE, height=0.62, label="kept")
        style.log_scale(ax, "x")
        ax.set_xlim(floor, max(max(total[i] for i in rows), 1) * 1.3)
        ax.set_yticks(where, [style.short_name(names[i]) for i in rows])
        ax.set_ylim(len(rows) - 0.4, -0.6)
        for y, i in zip(where, rows, strict=True):
            share = f"{100 * kept[i] / total[i]:.3g} %" if total[i] else "empty"
            ax.annotate(
                f"{kept[i]:,} of {total[i]:,}  ({share})",
                (1.0, y),
                xycoords=("axes fraction", "data"),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
        ax.set_xlabel("weights (log scale)")
        ax.grid(axis="y", visible=False)
        fig.legend(*ax.get_legend_handles_labels(), loc="outside upper right", ncols=2)
        ax.set_title("Kept weights per layer" + _note_left_out(rows, names))
    return Path(path)


def masks(path: PathLike, leaves: Mapping[str, Any]) -> Path:
    """The masks as pictures in the GEMM view `[positions, filters]`: dark is kept, white is zero.

    A mask with a side above `MASK_PIXELS` is drawn by the density of its blocks; its title gives the block's size.

    Args:
      path: the PNG.
      leaves: boolean arrays by leaf path; the last axis is the filters, all others together the positions.
    """
    if not leaves:
        raise ValueError(f"{path}: no mask to draw")
    chosen = sorted(leaves, key=lambda leaf: -np.size(leaves[leaf]))[:MAX_PANELS]
    shown = [leaf for leaf in leaves if leaf in chosen]
    rows = -(-len(shown) // 2)
    with style.figure(path, 0.6 + 2.55 * rows) as fig:
        axes = fig.subplots(rows, 2, squeeze=False).ravel()
        for ax, leaf in zip(axes, shown, strict=False):
            mask = np.asarray(leaves[leaf])
            if mask.dtype != bool or mask.size == 0:
                raise ValueError(
                    f"{path}: the mask of {leaf} is {mask.dtype}{list(mask.shape)}; bool, not empty, is due"
                )
            _mask(ax, leaf, mask.reshape(-1, mask.shape[-1]) if mask.ndim else mask.reshape(1, 1))
        for ax in axes[len(shown) :]:
            ax.set_axis_off()
        fig.get_layout_engine().set(h_pad=0.09)  # type: ignore[union-attr, call-arg]
        fig.suptitle("Masks, GEMM view" + _note_left_out(shown, leaves), x=0.01, ha="left", weight="bold")
    return Path(path)


def block_density(mask: np.ndarray, pixels: int = MASK_PIXELS) -> tuple[np.ndarray, tuple[int, int]]:
    """The share kept in each block of a mask, so that no side has more than `pixels` blocks.

    Args:
      mask: bool `[positions, filters]`.
      pixels: the most blocks along a side.

    Returns:
      float64 densities, and the block's `(rows, columns)`; the last blocks may be smaller and count as what they are.
    """
    rows, columns = (-(-n // pixels) for n in mask.shape)
    if (rows, columns) == (1, 1):
        return mask.astype(np.float64), (1, 1)
    at_row, at_column = np.arange(0, mask.shape[0], rows), np.arange(0, mask.shape[1], columns)
    kept = np.add.reduceat(np.add.reduceat(mask, at_row, axis=0, dtype=np.int64), at_column, axis=1)
    heights = np.diff(np.append(at_row, mask.shape[0]))
    widths = np.diff(np.append(at_column, mask.shape[1]))
    return kept / (heights[:, None] * widths[None, :]), (rows, columns)


def _flat(weights: Any, leaf: str, path: PathLike) -> np.ndarray:
    flat = np.asarray(weights).astype(np.float64).ravel()
    if not np.all(np.isfinite(flat)):
        raise ValueError(f"{path}: {leaf} holds {np.count_nonzero(~np.isfinite(flat))} weights that are not finite")
    return flat


def _histogram(ax: Axes, leaf: str, before: np.ndarray, after: np.ndarray, bins: int) -> None:
    both = np.concatenate([before[before != 0], after[after != 0]])
    reach = float(np.max(np.abs(both))) if both.size else 1.0
    edges = np.linspace(-reach, reach, bins + 1).tolist()
    ax.hist(before[before != 0], edges, color=style.PALE, label="before")
    ax.hist(after[after != 0], edges, histtype="stepfilled", color=style.RED, alpha=0.75, label="after")
    highest = max(np.histogram(w[w != 0], edges)[0].max() for w in (before, after))
    ax.set_ylim(0.8, max(2.0, 1.6 * highest))
    style.log_scale(ax, "y")
    ax.set_title(style.short_name(leaf), fontsize=10)
    zeros = [int(np.count_nonzero(w == 0)) for w in (before, after)]
    ax.set_xlabel(f"zeros: {zeros[0]:,} before, {zeros[1]:,} after, of {before.size:,}", fontsize=8.5)
    ax.tick_params(labelsize=8)


def _mask(ax: Axes, leaf: str, mask: np.ndarray) -> None:
    density, (rows, columns) = block_density(mask)
    blocked = (rows, columns) != (1, 1)
    top = max(float(density.max()), 1e-6) if blocked else 1.0
    image = ax.imshow(density, cmap=style.mask_colours(), vmin=1e-9, vmax=top, aspect="auto", interpolation="nearest")
    ax.grid(visible=False)
    for side in ax.spines.values():
        side.set_visible(True)
        side.set_linewidth(0.6)
    size = f"{mask.shape[0]:,} × {mask.shape[1]:,}, {100 * mask.mean():.3g} % kept"
    detail = f"{size}, a pixel is {rows} × {columns}" if blocked else size
    # Both may be wider than the panel, and would make the layout shrink it.
    ax.set_title(f"{style.short_name(leaf)}\n", fontsize=10).set_in_layout(False)
    note = ax.annotate(detail, (0, 1), xycoords="axes fraction", xytext=(0, 4), textcoords="offset points", fontsize=8)
    note.set_in_layout(False)
    ax.set_xlabel("filters", fontsize=8.5)
    ax.set_ylabel("positions", fontsize=8.5)
    for axis, blocks, step, n in ((ax.xaxis, density.shape[1], columns, mask.shape[1]),
                                  (ax.yaxis, density.shape[0], rows, mask.shape[0])):  # fmt: skip
        at = sorted({0, (blocks - 1) // 2, blocks - 1})
        axis.set_major_locator(FixedLocator([float(i) for i in at]))
        axis.set_major_formatter(FuncFormatter(lambda i, _, step=step, n=n: f"{min(int(i) * step, n - 1):,}"))
    ax.tick_params(labelsize=8)
    if blocked:
        figure = ax.get_figure()
        if figure is not None:
            bar = figure.colorbar(image, ax=ax, pad=0.02, fraction=0.05)
            bar.ax.tick_params(labelsize=7.5)
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g} %"))


def _note_left_out(shown: Sequence[Any], given: Any) -> str:
    return "" if len(shown) == len(given) else f" (the {len(shown)} largest of {len(given)})"
