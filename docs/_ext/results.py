"""Tables and the picture of results, made from `docs/results` whenever the site is built.

A page keeps an empty block for each table, as README keeps a full one; `experiments.common.report.tables` fills both.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from sphinx.application import Sphinx

from experiments.common.report import tables

BLOCK = "<!-- results:"
PICTURES = {"light": ("#222222", "#cccccc"), "dark": ("#dddddd", "#444444")}  # text and grid


def _fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Puts each table into its block."""
    if BLOCK not in source[0]:
        return
    source[0] = tables.filled(Path(app.srcdir).parent, source[0], f"{page}.md")


def _draw(app: Sphinx) -> None:
    """Draws what accuracy each run gave up for how many times fewer bytes, once for each colour of the page."""
    folder = Path(app.srcdir) / "_static" / "made"
    folder.mkdir(parents=True, exist_ok=True)
    points = tradeoffs(tables.read_results(Path(app.srcdir).parent / tables.RESULTS))
    for name, (ink, grid) in PICTURES.items():
        colours = {"text.color": ink, "axes.labelcolor": ink, "axes.edgecolor": grid, "grid.color": grid}
        with plt.rc_context({**colours, "xtick.color": ink, "ytick.color": ink, "svg.hashsalt": "", "font.size": 11}):
            figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
            for driver in sorted({driver for driver, *_ in points}):
                xy = [(rate, lost) for of, rate, lost in points if of == driver]
                axes.scatter(*zip(*xy, strict=True), s=18, alpha=0.8, label=f"{driver} ({len(xy)})")
            axes.set(xscale="log", xlabel="times fewer bytes in the file (log)", ylabel="percentage points lost")
            axes.set_yscale("symlog", linthresh=1)
            axes.grid(alpha=0.5)
            figure.legend(frameon=False, loc="outside right upper")
            figure.savefig(folder / f"tradeoff_{name}.svg", transparent=True, metadata={"Date": None})
            plt.close(figure)


def tradeoffs(results: list[tables.Result]) -> list[tuple[str, float, float]]:
    """Driver, times fewer bytes and percentage points lost against the dense network, of every run that has them.

    Runs whose metric is no share (perplexity) have no percentage points, and are left out; so are tiny ones.
    """
    out = []
    for result in results:
        summary = result.summary
        metric, rate = summary["metric"], summary["rate"]["bytes"]
        dense, compressed = metric["dense"], metric["compressed"]
        if dense is None or compressed is None or rate is None or not 0 <= dense <= 1:
            continue
        better = 1 if metric["higher_is_better"] else -1
        out.append((summary["driver"], rate, 100 * better * (dense - compressed)))
    return out


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the extension."""
    app.connect("builder-inited", _draw)
    app.connect("source-read", _fill)
    app.add_js_file("sort.js", loading_method="defer")
    return {"parallel_read_safe": True, "parallel_write_safe": True}
