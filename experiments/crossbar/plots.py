"""Plots of engines: arrays and what fills them, effective cycles, saturation, variation, cost. Plain numbers in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.ticker import FuncFormatter

from experiments.common.report import style
from experiments.common.report.style import PathLike


def occupancy(path: PathLike, layers: Mapping[str, Sequence[Sequence[float]]]) -> Path:
    """The arrays of each layer as squares, rows down and columns across, shaded by the share of non-zero cells.

    Args:
      path: the PNG.
      layers: by name, shares in 0..1 `[row arrays, column arrays]`; a layer without arrays has an empty grid.
    """
    grids = {name: np.asarray(g, np.float64) for name, g in layers.items() if np.size(g)}
    if not grids:
        raise ValueError(f"{path}: no layer holds an array")
    across = min(5, len(grids))
    down = -(-len(grids) // across)
    tall = max(g.shape[0] for g in grids.values())
    with style.figure(path, 0.9 + down * (0.75 + 0.16 * min(tall, 8))) as fig:
        axes = fig.subplots(down, across, squeeze=False)
        scale, colours, image = Normalize(1e-9, 1.0), style.mask_colours(), None
        for ax, (name, grid) in zip(axes.flat, grids.items(), strict=False):
            image = ax.imshow(grid, norm=scale, cmap=colours, aspect="equal" if max(grid.shape) <= 8 else "auto")
            ax.set_xticks(np.arange(-0.5, grid.shape[1]), [])
            ax.set_yticks(np.arange(-0.5, grid.shape[0]), [])
            ax.tick_params(length=0)
            ax.grid(color="white", linewidth=1.2)
            ax.set_title(f"{style.short_name(name)}\n{grid.shape[0]} × {grid.shape[1]}", fontsize=8)
            if grid.size <= 16:
                for (i, j), v in np.ndenumerate(grid):
                    colour = "white" if v > 0.45 else "black"
                    ax.text(j, i, f"{100 * v:.0f}", ha="center", va="center", fontsize=8, color=colour)
        for ax in axes.flat[len(grids) :]:
            ax.set_visible(False)
        if image is not None:
            bar = fig.colorbar(image, ax=axes, shrink=0.8)
            bar.set_label("non-zero cells (%)")
            bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}"))
    return Path(path)


def pairs(
    path: PathLike,
    names: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    *,
    title: str,
    xlabel: str,
    log: bool = False,
) -> Path:
    """Horizontal bars, one of each group beside the other for every name, with the numbers at their ends."""
    if not names or any(len(v) != len(names) for v in groups.values()):
        raise ValueError(f"{path}: bars need as many values as names, at least one")
    many, height = len(groups), 0.8 / len(groups)
    with style.figure(path, 1.1 + 0.24 * len(names) * many) as fig:
        ax = fig.add_subplot()
        for i, (label, values) in enumerate(groups.items()):
            at = np.arange(len(names)) + (i - (many - 1) / 2) * height
            drawn = ax.barh(at, values, height=0.9 * height, color=style.colour_of(i, many), label=label)
            ax.bar_label(drawn, [f" {v:,.3g}" if v < 1000 else f" {v:,.0f}" for v in values], fontsize=8)
        if log:
            style.log_scale(ax, "x")
        ax.set_yticks(np.arange(len(names)), [style.short_name(n) for n in names])
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.18)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(xlabel + (" (log scale)" if log else ""))
        ax.set_title(title)
        if many > 1:
            ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16 - 0.6 / len(names)), ncols=min(many, 3))
    return Path(path)


def cycles(path: PathLike, histograms: Mapping[str, Sequence[int]]) -> Path:
    """Share of fragments by their effective input cycles, one curve for each fragment size."""
    if not histograms:
        raise ValueError(f"{path}: no histogram to draw")
    with style.figure(path, 3.6) as fig:
        ax = fig.add_subplot()
        for i, (label, counts) in enumerate(histograms.items()):
            share = np.asarray(counts, np.float64) / max(1, int(np.sum(counts)))
            ax.plot(
                np.arange(len(share)),
                share,
                drawstyle="steps-mid",
                color=style.colour_of(i, len(histograms)),
                linestyle=style.DASHES[i % len(style.DASHES)],
                label=label,
            )
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.0f}"))
        ax.set_ylim(bottom=0)
        ax.set_xlabel("effective input cycles of a fragment")
        ax.set_ylabel("fragments (%)")
        ax.set_title("Effective input cycles on real activations")
        ax.legend(loc="best")
    return Path(path)


def variation(path: PathLike, models: Mapping[str, Mapping[str, Any]]) -> Path:
    """Accuracy against the spread of devices: mean and confidence interval of each model.

    Args:
      path: the PNG.
      models: by name, `ideal` and `sweep`: rows with `sigma`, `mean`, `low`, `high`.
    """
    if not models:
        raise ValueError(f"{path}: no model to draw")
    with style.figure(path, 3.8) as fig:
        ax = fig.add_subplot()
        for i, (label, found) in enumerate(models.items()):
            rows = found["sweep"]
            sigma = np.array([0.0, *(r["sigma"] for r in rows)])
            mean = np.array([found["ideal"], *(r["mean"] for r in rows)])
            low = np.array([found["ideal"], *(r["low"] for r in rows)])
            high = np.array([found["ideal"], *(r["high"] for r in rows)])
            colour = style.colour_of(i, len(models))
            ax.fill_between(sigma, low, high, color=colour, alpha=0.18, linewidth=0)
            marker, dash = style.MARKERS[i % len(style.MARKERS)], style.DASHES[i % len(style.DASHES)]
            ax.plot(sigma, mean, color=colour, marker=marker, linestyle=dash, label=style.short_name(label))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{100 * v:.6g}"))
        ax.set_xlabel("sigma of the log-normal programming variation")
        ax.set_ylabel("accuracy (%)")
        ax.set_title("Accuracy over devices, mean and 95 % interval")
        ax.legend(loc="best")
    return Path(path)


def breakdown(path: PathLike, bars: Mapping[str, Mapping[str, float]], *, title: str, xlabel: str) -> Path:
    """Stacked horizontal bars: what a whole is made of, parts in the same colours in all bars."""
    if not bars:
        raise ValueError(f"{path}: nothing to draw")
    parts = list(dict.fromkeys(part for bar in bars.values() for part in bar))
    with style.figure(path, 1.6 + 0.5 * len(bars)) as fig:
        ax = fig.add_subplot()
        left = np.zeros(len(bars))
        for i, part in enumerate(parts):
            values = np.array([bar.get(part, 0.0) for bar in bars.values()])
            colour = style.colour_of(i, len(parts))
            ax.barh(np.arange(len(bars)), values, left=left, height=0.6, color=colour, label=part)
            left += values
        for i, total in enumerate(left):
            ax.text(total, i, f" {total:,.4g}", va="center", fontsize=9)
        ax.set_yticks(np.arange(len(bars)), list(bars))
        ax.set_ylim(len(bars) - 0.5, -0.5)
        ax.margins(x=0.12)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(xlabel)
        ax.set_title(title)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return Path(path)
