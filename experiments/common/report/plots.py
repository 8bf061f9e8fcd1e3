"""Curves of a run and of a sweep: plain arrays and a path in, a PNG written, the path back.

Curves are `Series` (steps, values), as `report.metrics` gives them, or any pair of equal-length arrays.
Nothing to draw is an error that names the plot, never an empty picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from experiments.common.report import style
from experiments.common.report.metrics import Phase
from experiments.common.report.style import PathLike

Curve = tuple[Any, Any]


def lines(
    path: PathLike,
    curves: Mapping[str, Curve],
    *,
    title: str,
    ylabel: str,
    xlabel: str = "step",
    logx: bool = False,
    logy: bool = False,
    percent: bool = False,
    steps: bool = False,
    phases: Sequence[Phase] = (),
) -> Path:
    """Curves over steps (or anything else) in one panel; with `steps` each value holds until the next."""
    _need(curves, path)
    with style.figure(path, 3.6) as fig:
        ax = fig.add_subplot()
        dropped = _draw(ax, curves, log=logy, marks=not phases, steps=steps)
        _axes(ax, ylabel, xlabel, percent)
        if logx:
            style.log_scale(ax, "x")
        ax.set_title(title + _note_zeros(dropped))
        style.shade_phases([ax], phases)
    return Path(path)


def training(
    path: PathLike,
    metric: Mapping[str, Curve],
    loss: Mapping[str, Curve],
    phases: Sequence[Phase],
    *,
    name: str = "accuracy",
    percent: bool = True,
) -> Path:
    """The metric and the loss over steps in two panels, with the phases shaded and named.

    Args:
      path: the PNG.
      metric: curves by name, for example `{"train": ..., "test": ...}`; fractions of 1 if `percent`.
      loss: curves by name; drawn on a log scale where all are positive.
      phases: from `metrics.phases`.
      name: of the metric.
      percent: whether the metric is a fraction shown in per cent.
    """
    _need({**{f"metric {k}": v for k, v in metric.items()}, **{f"loss {k}": v for k, v in loss.items()}}, path)
    panels = [(m, y, p) for m, y, p in ((metric, name, percent), (loss, "loss", False)) if m]
    with style.figure(path, 0.6 + 2.6 * len(panels)) as fig:
        axes = fig.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for ax, (curves, ylabel, as_percent) in zip(axes, panels, strict=True):
            positive = all(np.all(np.asarray(y)[np.isfinite(y)] > 0) for _, y in curves.values())
            _draw(ax, curves, log=ylabel == "loss" and positive, marks=False)
            _axes(ax, ylabel, "step" if ax is axes[-1] else "", as_percent)
        axes[0].set_title(" and ".join(y for _, y, _ in panels).capitalize() + " over steps")
        fig.align_ylabels()
        style.shade_phases(axes.tolist(), phases)
    return Path(path)


def residuals(
    path: PathLike, primal: Mapping[str, Curve], dual: Mapping[str, Curve], phases: Sequence[Phase] = ()
) -> Path:
    """Both residuals of every leaf, or of each set of one, over steps, log scale; exact zeros are only counted."""
    _need({**{f"primal {k}": v for k, v in primal.items()}, **{f"dual {k}": v for k, v in dual.items()}}, path)
    both = [(name, curves) for name, curves in (("primal residual", primal), ("dual residual", dual)) if curves]
    with style.figure(path, 0.9 + 2.5 * len(both)) as fig:
        axes = fig.subplots(len(both), 1, sharex=True, squeeze=False)[:, 0]
        dropped = 0
        for ax, (name, curves) in zip(axes, both, strict=True):
            dropped += _draw(ax, curves, log=True, marks=False, legend=ax is axes[0])
            _axes(ax, name, "step" if ax is axes[-1] else "", False)
        axes[0].set_title("Residuals per leaf and set" + _note_zeros(dropped))
        fig.align_ylabels()
        style.shade_phases(axes.tolist(), phases)
    return Path(path)


def rho(path: PathLike, curves: Mapping[str, Curve], phases: Sequence[Phase] = ()) -> Path:
    """The penalty rho over steps, log scale; leaves that share one schedule are drawn once."""
    shared: dict[str, Curve] = {}
    for name, curve in curves.items():
        twin = next((k for k, v in shared.items() if _same(v, curve)), None)
        if twin is None:
            shared[name] = curve
    if len(shared) == 1 and len(curves) > 1:
        shared = {f"all {len(curves)} leaves": next(iter(shared.values()))}
    title = "Penalty rho over steps" if len(shared) == len(curves) or len(shared) == 1 else "Distinct rho over steps"
    return lines(path, shared, title=title, ylabel="rho", logy=True, steps=True, phases=phases)


def metric_against_rate(
    path: PathLike,
    methods: Mapping[str, tuple[Any, Any]],
    *,
    controls: Mapping[str, Any] | None = None,
    paper: Mapping[str, tuple[float, float]] | None = None,
    name: str = "accuracy",
    percent: bool = True,
    xlabel: str = "compression (dense weights / kept weights, log scale)",
    title: str | None = None,
) -> Path:
    """The metric against the compression rate for several methods: mean, sample standard deviation, every seed a dot.

    Of more methods than `style.COLOURS` the deviations are bars, and the seeds are left out.

    Args:
      path: the PNG.
      methods: by name, `(rates [r], values [r, seeds])`; a missing run is NaN in `values`.
      controls: by name, values `[seeds]` of a dense network, drawn as a level with its spread.
      paper: published points by name, `(rate, value)`.
      name: of the metric.
      percent: whether it is a fraction shown in per cent.
      xlabel: of the rate.
      title: or None for one made from the metric's name.
    """
    if not methods:
        raise ValueError(f"{path}: no method to draw")
    ticks: set[float] = set()
    crowded = len(methods) > len(style.COLOURS)
    with style.figure(path, 5.4 if crowded else 4.3) as fig:
        ax = fig.add_subplot()
        for i, (label, (given, values)) in enumerate(methods.items()):
            given, values = np.asarray(given, np.float64), np.asarray(values, np.float64)
            ticks.update(_method(ax, i, label, given, values, path, crowded))
        for i, (label, values) in enumerate((controls or {}).items()):
            level = np.asarray(values, np.float64).ravel()
            mean, spread = float(level.mean()), float(level.std(ddof=1)) if level.size > 1 else 0.0
            ax.axhline(mean, color=style.GREY, linewidth=1.4, linestyle=("--", ":", "-.")[i % 3], label=label)
            ax.axhspan(mean - spread, mean + spread, color=style.GREY, alpha=0.13, linewidth=0)
        for label, (at, value) in (paper or {}).items():
            ax.plot(at, value, "*", color="black", markersize=11, linestyle="none", label=label)
            ticks.add(float(at))
        ax.set_xscale("log")
        _rate_ticks(ax, sorted(ticks))
        _axes(ax, name, xlabel, percent)
        if crowded:  # it would cover the curves
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
        else:
            ax.legend(loc="best", frameon=True, framealpha=0.9, edgecolor="none")
        ax.set_title(title or f"{name.capitalize()} against compression")
    return Path(path)


def bars(path: PathLike, names: Sequence[str], values: Sequence[float], *, title: str, xlabel: str) -> Path:
    """Plain horizontal bars with the numbers beside them, for a driver's own quantities."""
    if not names or len(names) != len(values) or not np.all(np.isfinite(values)):
        raise ValueError(f"{path}: bars need as many finite values as names, at least one")
    with style.figure(path, 1.0 + 0.34 * len(names)) as fig:
        ax = fig.add_subplot()
        drawn = ax.barh(np.arange(len(names)), values, color=style.BLUE, height=0.62)
        ax.bar_label(drawn, [f" {value:,.4g}" for value in values], fontsize=9)
        ax.set_yticks(np.arange(len(names)), [style.short_name(name) for name in names])
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.margins(x=0.15)
        ax.grid(axis="y", visible=False)
        ax.set_xlabel(xlabel)
        ax.set_title(title)
    return Path(path)


def _need(curves: Mapping[str, Curve], path: PathLike) -> None:
    if not curves:
        raise ValueError(f"{path}: no curve to draw")
    for name, (x, y) in curves.items():
        if np.shape(x) != np.shape(y) or np.ndim(x) != 1 or np.size(x) == 0:
            raise ValueError(f"{path}: the curve {name!r} has {np.shape(x)} steps and {np.shape(y)} values")


def _same(a: Curve, b: Curve) -> bool:
    return np.array_equal(a[0], b[0]) and np.array_equal(a[1], b[1], equal_nan=True)


def _note_zeros(dropped: int) -> str:
    return f" ({dropped:,} exact zeros not drawn)" if dropped else ""


def _draw(
    ax: Axes, curves: Mapping[str, Curve], *, log: bool, marks: bool, legend: bool = True, steps: bool = False
) -> int:
    """Draws the curves; returns how many exact zeros a log scale could not show."""
    dropped, many = 0, len(curves) > len(style.COLOURS)
    for i, (name, (x, y)) in enumerate(curves.items()):
        at, values = np.asarray(x), np.asarray(y, np.float64)
        if log:
            dropped += int(np.count_nonzero(values == 0))
            at, values = at[values != 0], values[values != 0]
        ax.plot(
            at,
            values,
            color=style.colour_of(i, len(curves)),
            linestyle="-" if many else style.DASHES[i % len(style.DASHES)],
            linewidth=1.0 if many else 1.6,
            drawstyle="steps-post" if steps else "default",
            marker=style.MARKERS[i % len(style.MARKERS)] if len(values) == 1 or (marks and len(values) <= 30) else None,
            label=style.short_name(name),
        )
    if log:
        style.log_scale(ax, "y")
    if legend and len(curves) > 1:
        if len(curves) > 16:  # first, last and a few between stand for the sequence of colours
            handles, names = ax.get_legend_handles_labels()
            picks = sorted({round(i) for i in np.linspace(0, len(names) - 1, 6)})
            keep = [handles[i] for i in picks], [names[i] for i in picks]
            ax.legend(*keep, loc="center left", bbox_to_anchor=(1.0, 0.5), title=f"6 of {len(names)}", title_fontsize=9)
        else:
            ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return dropped


def _axes(ax: Axes, ylabel: str, xlabel: str, percent: bool) -> None:
    ax.set_ylabel(f"{ylabel} (%)" if percent else ylabel)
    ax.set_xlabel(xlabel)
    if percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.6g}"))
    if ax.get_xscale() == "linear":
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def _method(
    ax: Axes, i: int, label: str, rates: np.ndarray, values: np.ndarray, path: PathLike, crowded: bool
) -> list[float]:
    if rates.ndim != 1 or values.ndim != 2 or len(rates) != len(values) or not len(rates) or not np.all(rates > 0):
        raise ValueError(
            f"{path}: {label} has rates {rates.shape} and values {values.shape}; positive rates [r] and values "
            "[r, seeds] are needed"
        )
    seeds = np.count_nonzero(np.isfinite(values), axis=1)
    order = [int(j) for j in np.argsort(rates, kind="stable") if seeds[j]]
    mean = np.array([np.nanmean(values[j]) for j in order])
    spread = np.array([np.nanstd(values[j], ddof=1) if seeds[j] > 1 else 0.0 for j in order])
    turn, colour = i // len(style.COLOURS), style.COLOURS[i % len(style.COLOURS)]  # no two curves have all three alike
    ax.plot(
        rates[order],
        mean,
        color=colour,
        marker=style.MARKERS[(i + turn) % len(style.MARKERS)],
        linestyle=style.DASHES[(turn if crowded else i) % len(style.DASHES)],
        label=f"{label} ({_seeds(seeds[order])})",
    )
    if crowded:
        ax.errorbar(rates[order], mean, spread, fmt="none", ecolor=colour, elinewidth=0.8, alpha=0.5)
    else:
        ax.fill_between(rates[order], mean - spread, mean + spread, color=colour, alpha=0.16, linewidth=0)
        every = np.broadcast_to(rates[:, None], values.shape)
        ax.plot(every.ravel(), values.ravel(), ".", color=colour, alpha=0.45, markersize=4, zorder=1.9)
    return [float(rates[j]) for j in order]


def _seeds(counts: np.ndarray) -> str:
    if not counts.size:
        return "no run"
    low, high = int(counts.min()), int(counts.max())
    return f"{low} seed{'' if low == 1 else 's'}" if low == high else f"{low} to {high} seeds"


def _rate_ticks(ax: Axes, ticks: Sequence[float]) -> None:
    """Ticks at the rates measured, thinned where their labels would touch; decades where there are none to keep."""
    kept: list[float] = []
    span = np.log(ticks[-1] / ticks[0]) if len(ticks) > 1 else 1.0
    for tick in ticks:
        if not kept or np.log(tick / kept[-1]) > 0.1 * span:
            kept.append(tick)
    ax.xaxis.set_major_locator(FixedLocator(kept) if kept else LogLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}×"))
    ax.xaxis.set_minor_locator(NullLocator())
