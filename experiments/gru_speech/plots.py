"""Pictures of speech recognition: confusions, and one recording with the network's posterior over time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.common.report import style
from experiments.common.report.style import PathLike


def confusion(path: PathLike, table: np.ndarray, names: Sequence[str], title: str) -> Path:
    """How each reference unit was recognised, a row its shares; the last column are deletions, the last row insertions.

    Args:
      path: the PNG.
      table: counts `[units + 1, units + 1]` of `speech.errors.confusion`.
      names: of the units.
      title: of the picture.
    """
    if table.shape != (len(names) + 1, len(names) + 1):
        raise ValueError(f"{path}: a table {list(table.shape)} does not fit {len(names)} units and one more")
    share = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    small = len(names) > 20
    with style.figure(path, 7.4 if small else 5.0) as fig:
        ax = fig.add_subplot()
        image = ax.imshow(share, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        ax.grid(visible=False)
        size = 6.5 if small else 9.0
        ax.set_xticks(np.arange(len(names) + 1), [*names, "deleted"], rotation=90, fontsize=size)
        ax.set_yticks(np.arange(len(names) + 1), [*names, "inserted"], fontsize=size)
        ax.set_xlabel("recognised as")
        ax.set_ylabel("said")
        bar = fig.colorbar(image, ax=ax, pad=0.02, fraction=0.045)
        bar.set_label("share of the row")
        ax.set_title(title)
    return Path(path)


def posterior(
    path: PathLike,
    samples: np.ndarray,
    rate: int,
    posteriors: Sequence[tuple[str, np.ndarray]],
    names: Sequence[str],
    hop: float,
    segments: Sequence[tuple[int, int, str]] = (),
    title: str = "",
) -> Path:
    """A recording, and below it what networks believe at every frame: probability of each unit over time.

    Args:
      path: the PNG.
      samples: the recording.
      rate: samples a second.
      posteriors: pairs of a caption and probabilities `[frames, units]`.
      names: of the units; only those that reach a probability of 0.1 somewhere are shown.
      hop: seconds a frame.
      segments: what was said, by samples; written above the recording.
      title: of the picture.
    """
    shown = [k for k in range(len(names)) if any(float(p[:, k].max()) >= 0.1 for _, p in posteriors)] or [0]
    end = len(samples) / rate
    with style.figure(path, 2.0 + len(posteriors) * max(1.4, 0.115 * len(shown))) as fig:
        heights = [1.0] + [max(1.2, 0.1 * len(shown))] * len(posteriors)
        axes = fig.subplots(1 + len(posteriors), 1, sharex=True, squeeze=False, height_ratios=heights)[:, 0]
        axes[0].plot(np.arange(len(samples)) / rate, samples, color=style.GREY, linewidth=0.4)
        axes[0].set_yticks([])
        top = float(np.abs(samples.astype(np.float64)).max()) or 1.0
        axes[0].set_ylim(-1.1 * top, 1.7 * top)
        for first, after, label in segments:
            axes[0].axvline(first / rate, color=style.PALE, linewidth=0.6)
            axes[0].text((first + after) / 2 / rate, 1.35 * top, label, ha="center", va="center", fontsize=6)
        for ax, (caption, p) in zip(axes[1:], posteriors, strict=True):
            ax.imshow(
                p[:, shown].T,
                aspect="auto",
                cmap="Blues",
                vmin=0,
                vmax=1,
                interpolation="nearest",
                extent=(0.0, len(p) * hop, len(shown) - 0.5, -0.5),
            )
            ax.grid(visible=False)
            ax.set_yticks(np.arange(len(shown)), [names[k] for k in shown], fontsize=5.5 if len(shown) > 12 else 8)
            ax.set_ylabel(caption, fontsize=9)
        axes[-1].set_xlim(0, end)
        axes[-1].set_xlabel("seconds")
        axes[0].set_title(title)
    return Path(path)
