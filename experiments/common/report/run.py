"""The standard plots of a training run, from its metrics and its weights, with captions: what every driver shows."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.common.report import format as fmt
from experiments.common.report import metrics, plots, weight_plots
from experiments.common.report.html import Picture


def standard_pictures(
    folder: str | os.PathLike[str],
    records: Sequence[Mapping[str, Any]],
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
    *,
    metric: str = "accuracy",
    metric_curves: Mapping[str, str] | None = None,
    loss_curves: Mapping[str, str] | None = None,
) -> list[Picture]:
    """Draws the standard plots for which there are data, and says with each what it shows.

    Over steps: the metric and the loss, the residuals, rho. By layer: histograms, kept weights, masks. A mask is where
    the compressed weight is not zero.

    Args:
      folder: where the PNGs go (made if needed); their names are `training`, `residuals`, `rho`, `histograms`, `kept`
        and `masks`.
      records: from `metrics.read_metrics`.
      before: weights of the constrained leaves by path before compression (the dense network's), or None.
      after: the same leaves after it, zeros where pruned, or None.
      metric: the metric's name.
      metric_curves: label -> dotted key of a record; `{metric: metric}` by default.
      loss_curves: label -> dotted key of a record; `{"loss": "loss"}` by default.

    Returns:
      The pictures in the order of the report.
    """
    folder = Path(folder)
    out: list[Picture] = []
    phases = metrics.phases(records)
    score = _curves(records, metric_curves or {metric: metric})
    loss = _curves(records, loss_curves or {"loss": "loss"})
    if score or loss:
        path = plots.training(
            folder / "training.png", score, loss, phases, name=metric, percent=fmt.is_fraction(metric)
        )
        out.append(Picture(path, "Training", f"{metric} and loss over steps; the phases are shaded."))
    primal, dual = _residuals(records, "primal"), _residuals(records, "dual")
    if primal or dual:
        path = plots.residuals(folder / "residuals.png", primal, dual, phases)
        text = "How far the weights are from their sets (primal) and how far the sets' points still move (dual)."
        out.append(Picture(path, "ADMM residuals", f"{text} Both near zero: hardening will change little."))
    rho = metrics.leaf_series(records, "rho")
    if rho:
        path = plots.rho(folder / "rho.png", rho, phases)
        out.append(Picture(path, "Penalty", "rho, the strength with which ADMM moves the weights into their sets."))
    if before and after:
        path = weight_plots.weight_histograms(folder / "histograms.png", before, after)
        text = "Non-zero weights of the dense and of the compressed network on one scale, counts logarithmic."
        out.append(Picture(path, "Weights before and after", f"{text} Zeros are counted below each panel."))
    if after:
        kept = {leaf: np.asarray(w) != 0 for leaf, w in after.items()}
        counts = [int(np.count_nonzero(mask)) for mask in kept.values()]
        path = weight_plots.kept_weights(folder / "kept.png", list(kept), counts, [m.size for m in kept.values()])
        out.append(Picture(path, "Kept weights", "What is left of every constrained layer; logarithmic scale."))
        path = weight_plots.masks(folder / "masks.png", {leaf: mask for leaf, mask in kept.items() if mask.size})
        text = "Blue is kept, white is zero; rows are positions (kernel row, kernel column, input channel), columns"
        out.append(Picture(path, "Masks", f"{text} are filters. Panels are stretched to one size."))
    return out


def _curves(records: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> dict[str, metrics.Series]:
    found = {label: metrics.series(records, key) for label, key in keys.items()}
    return {label: curve for label, curve in found.items() if curve.steps.size}


def _residuals(records: Sequence[Mapping[str, Any]], key: str) -> dict[str, metrics.Series]:
    """The residual of every leaf, of one that lies in several sets a curve for each of them."""
    split = []
    for record in records:
        leaves, sets = record.get(key), record.get(f"{key}_by_set")
        if isinstance(leaves, Mapping) and isinstance(sets, Mapping):
            alone = {n: v for n, v in leaves.items() if not any(s.startswith(f"{n} ") for s in sets)}
            record = {**record, key: alone | {s.replace("/kernel ", " "): v for s, v in sets.items()}}
        split.append(record)
    return metrics.leaf_series(split, key)
