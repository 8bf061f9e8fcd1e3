"""One look for every plot: colour-blind safe, light background, readable at 700 pixels wide.

Figures are made without pyplot: no global state, no window, nothing to close.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap, ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from experiments.common.report.metrics import Phase

PathLike = str | os.PathLike[str]

# Okabe and Ito, "Color Universal Design" (2008), without the yellow, which vanishes on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
BLUE, RED, GREEN, GREY, PALE = COLOURS[0], COLOURS[1], COLOURS[2], "#6b7280", "#cbd5e1"
ROW = 12.5  # points between two rows of phase names
WIDTH = 7.0  # inches; shown 700 px wide, a point of type is 1.4 px
DPI = 200

# The phases of a run keep their colour in every plot; others take the spare ones in turn.
_PHASE_COLOURS = {"dense": "#e5e7eb", "admm": "#dbeafe", "harden": "#ffedd5", "retrain": "#dcfce7"}
_SPARE_PHASE_COLOURS = ("#fae8ff", "#fef9c3", "#e0f2fe", "#fee2e2")

_RC: Any = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same picture on every machine
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#4b5563",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d1d5db",
    "grid.linewidth": 0.6,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "text.parse_math": False,  # leaf names are text, whatever they contain
}


@contextmanager
def figure(path: PathLike, height: float, width: float = WIDTH) -> Iterator[Figure]:
    """A figure in the common style, written as a PNG to `path` when the block ends without an error.

    The same data give the same bytes: no date and no version is stored in the file.

    Args:
      path: where the PNG goes; the folder is made if needed.
      height: inches.
      width: inches.
    """
    with matplotlib.rc_context(dict(_RC)):
        fig = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
        FigureCanvasAgg(fig)
        yield fig
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(target, format="png", dpi=DPI, metadata={"Software": None})


def shade_phases(axes: Sequence[Axes], phases: Sequence[Phase]) -> None:
    """Shades the phases behind the curves and writes their names above the first axes, in as many rows as they need.

    A phase of one step is drawn as a line. Each band reaches to the first step of the next phase. The axes keep to the
    steps that have data; phases outside are left out.
    """
    if not phases:
        return
    colours = _phase_colours(phases)
    first = min(float(ax.dataLim.x0) for ax in axes)
    last = max(float(ax.dataLim.x1) for ax in axes)
    margin = 0.01 * (last - first) or 0.5
    low, high = first - margin, last + margin
    for ax in axes:
        for i, phase in enumerate(phases):
            end = phases[i + 1].first if i + 1 < len(phases) else phase.last
            if end > phase.first:
                ax.axvspan(phase.first, end, color=colours[phase.name], linewidth=0, zorder=0)
            if i:
                ax.axvline(phase.first, color=GREY, linewidth=0.8, linestyle=(0, (3, 2)), zorder=1)
        ax.set_xlim(low, high)
    _name_phases(axes[0], phases, first, last)


def log_scale(ax: Axes, which: Literal["x", "y"]) -> None:
    """Makes an axis logarithmic, its decades written in plain characters (10⁻³): names are never parsed as formulas."""
    (ax.set_xscale if which == "x" else ax.set_yscale)("log")
    axis = ax.xaxis if which == "x" else ax.yaxis
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power(value)))
    axis.set_minor_formatter(NullFormatter())


def colour_of(index: int, number: int) -> Any:
    """The colour of curve `index` of `number`: the palette, or a sequential map where there are more curves."""
    if number <= len(COLOURS):
        return COLOURS[index]
    return matplotlib.colormaps["viridis"](0.92 * index / (number - 1))


def mask_colours() -> Colormap:
    """White for nothing kept; anything kept, however little, is clearly blue and darkens with the density."""
    colours = matplotlib.colormaps["Blues"](np.linspace(0.4, 1.0, 256))
    return ListedColormap(colours, name="mask", under="white")


def short_name(path: str) -> str:
    """A leaf path for a legend: without the leading `params/` and the trailing `/kernel`, shortened in the middle."""
    name = "".join(c if c.isprintable() else "?" for c in path.removeprefix("params/").removesuffix("/kernel")) or path
    name = f" {name}" if name.startswith("_") else name  # matplotlib hides labels that begin with an underscore
    return name if len(name) <= 34 else f"{name[:14]}…{name[-19:]}"


def _power(value: float) -> str:
    """10000 -> "10⁴", 1 -> "1", 0.01 -> "0.01"."""
    exponent = math.log10(value) if value > 0 else 0.5
    if abs(exponent - round(exponent)) > 1e-9 or -3 <= round(exponent) <= 3:
        return f"{value:,.10g}"
    return "10" + str(round(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _phase_colours(phases: Sequence[Phase]) -> Mapping[str, str]:
    colours: dict[str, str] = {}
    for phase in phases:
        if phase.name in colours:
            continue
        known = next((c for kind, c in _PHASE_COLOURS.items() if phase.name.startswith(kind)), None)  # also "admm2"
        spare = sum(colour in _SPARE_PHASE_COLOURS for colour in colours.values())
        colours[phase.name] = known or _SPARE_PHASE_COLOURS[spare % len(_SPARE_PHASE_COLOURS)]
    return colours


def _name_phases(ax: Axes, phases: Sequence[Phase], first: float, last: float) -> None:
    figure = ax.get_figure(root=True)
    if figure is None:
        return
    figure.draw_without_rendering()  # settles the layout, so that the widths of the names are known
    left, right = ax.get_window_extent().x0, ax.get_window_extent().x1
    ends: list[float] = []  # how far each row of names is taken, in pixels
    for i, phase in enumerate(phases):
        stop = phases[i + 1].first if i + 1 < len(phases) else phase.last
        start, end = max(float(phase.first), first), min(float(stop), last)
        if start > end or (start == end and phase.first < stop):
            continue
        name = ax.annotate(
            phase.name,
            ((start + end) / 2, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0.0, 4.0),
            textcoords="offset points",
            ha="center",
            va="bottom",
            fontsize=9,
            color="#374151",
        )
        name.set_in_layout(False)
        box = name.get_window_extent()
        shift = max(0.0, left - box.x0) - max(0.0, box.x1 - right)  # a name at the edge is drawn inwards
        row = next((r for r, taken in enumerate(ends) if box.x0 + shift > taken + 0.03 * DPI), len(ends))
        ends[row : row + 1] = [box.x1 + shift]
        name.set_position((shift * 72 / DPI, 4.0 + ROW * row))
    ax.set_title(ax.get_title(loc="left"), pad=8 + ROW * len(ends))
