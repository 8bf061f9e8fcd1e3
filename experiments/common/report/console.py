"""The headline and the per-layer table on the console, with rich."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.common.report import headline
from experiments.common.report import layers as layer_table
from experiments.common.report.layers import Layer
from experiments.common.report.summary import check_summary

_MOODS = {"": "", "main": "bold cyan", "good": "green", "bad": "bold red"}


def layers_table(layers: Sequence[Layer], title: str | None = None) -> Table:
    """The per-layer table, narrow enough for 80 columns: each constraint stands below its layer.

    The last row is the sum where there is more than one layer; what is not constrained is one row in a long table.
    """
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        header_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
    )
    table.collapse_padding, table.padding = True, (0, 1, 0, 0)
    table.add_column("layer", overflow="fold", min_width=12)
    for name in ("shape", "kept", "density", "packed", "rate"):
        table.add_column(name, justify="right", no_wrap=True)
    for layer in layer_table.brief(layers):
        _add(table, layer, "")
    if len(layers) > 1:
        table.add_section()
        _add(table, layer_table.total(layers), "bold")
    return table


def _add(table: Table, layer: Layer, style: str) -> None:
    _, shape, _, kept, of, density, _, packed, rate = layer_table.cells(layer)
    name = Text(layer.path, style)
    if layer.constraint:
        name.append(f"\n{layer.constraint}", "dim")
    table.add_row(name, *(Text(cell, style) for cell in (shape, f"{kept}/{of}", density, packed, rate)))


def headline_table(summary: Mapping[str, Any]) -> Table:
    """The headline figures of a summary, with the paper's where it has one; a stand-in is called one."""
    summary = check_summary(summary)
    data = summary["dataset"]
    name = f"{summary['driver']} / {summary['variant']}, seed {summary['seed']}"
    if data["name"]:
        name += f", {data['name']}" + (" (stand-in)" if data["stand_in"] else "")
    table = Table(title=Text(name), title_justify="left", show_header=False)
    table.add_column("figure")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("note", style="dim")
    for _, tiles in headline.groups(summary):
        for tile in tiles:
            table.add_row(Text(tile.name), Text(tile.value, _MOODS[tile.mood]), Text(tile.note))
        table.add_section()
    if summary["paper"]["value"] is not None:
        quantity, theirs, ours, gap = headline.paper(summary)
        table.add_row(Text(f"paper: {quantity}"), Text(theirs), Text(f"this run {ours}, difference {gap}"))
    return table


def print_report(summary: Mapping[str, Any], layers: Sequence[Layer] = (), console: Console | None = None) -> None:
    """Prints the headline and, if given, the per-layer table."""
    console = console or Console()
    console.print(headline_table(summary))
    if layers:
        console.print(layers_table(layers, "Layers"))
