"""One self-contained HTML page per run: no script, no network, every text escaped, light and dark.

A driver fills a `Page`; what only it knows goes into `sections`, pairs of a title and content. Content is plain text
(escaped, a paragraph), a `Picture`, a `Table`, a sequence of these, or `Html` for markup the driver vouches for.
"""

from __future__ import annotations

import base64
import html
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.report import _json, headline
from experiments.common.report import format as fmt
from experiments.common.report import layers as layer_table
from experiments.common.report._css import CSS
from experiments.common.report.layers import Layer
from experiments.common.report.summary import check_summary, run_of


class Picture(NamedTuple):
    """A PNG file (or its bytes) with a title and a caption."""

    source: str | os.PathLike[str] | bytes
    title: str
    caption: str = ""


class Table(NamedTuple):
    """A table of texts: a header, rows of the same length, and which columns are numbers (right-aligned)."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numeric: Sequence[bool] = ()


class Html(NamedTuple):
    """Markup that goes into the page as it is: only what the program itself wrote, its texts escaped."""

    markup: str


Content = str | Picture | Table | Html | Sequence["str | Picture | Table | Html"]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What a report shows.

    Attributes:
      summary: a checked summary; its driver block's `run` gives command, date, machine and versions.
      config: the run's configuration, nested dicts.
      layers: rows of the per-layer table.
      pictures: the plots, in order.
      first: a driver's own sections, `(title, content)`, shown right after the headline.
      sections: likewise, shown after the plots.
      badge: a word that must not be missed, such as SIMULATED; stands beside the title.
      notice: the sentence that explains it.
      links: files beside the page, `(name, relative path)`.
    """

    summary: Mapping[str, Any]
    config: Mapping[str, Any]
    layers: Sequence[Layer] = ()
    pictures: Sequence[Picture] = ()
    first: Sequence[tuple[str, Content]] = ()
    sections: Sequence[tuple[str, Content]] = ()
    badge: str = ""
    notice: str = ""
    links: Sequence[tuple[str, str]] = field(default_factory=tuple)


def write_report(path: str | os.PathLike[str], page: Page) -> Path:
    """Renders the page and writes it in one step.

    Raises:
      SummaryError: the summary breaks the schema.
      ValueError: a picture is no PNG, or a table's rows differ in length.
    """
    return _json.write_atomic(path, render(page).encode())


def render(page: Page) -> str:
    """The page as one HTML text; see `write_report`."""
    summary = check_summary(page.summary)
    run = run_of(summary)
    sections: list[tuple[str, str]] = [("Headline", _headline(summary))]
    sections += [(name, _content(content)) for name, content in page.first]
    if summary["paper"]["value"] is not None:
        sections.append(("Against the paper", _paper(summary)))
    if page.layers:
        sections.append(("Layers", _layers(page.layers)))
    if page.pictures:
        sections.append(("Plots", _content(list(page.pictures))))
    sections += [(title, _content(content)) for title, content in page.sections]
    sections.append(("Reproduce", _reproduce(run)))
    sections.append(("Configuration", _configuration(page.config)))
    sections.append(("Environment", _environment(run)))
    title = f"{summary['driver']} / {summary['variant']}, seed {summary['seed']}"
    body = "\n".join(
        f'<section id="s{i}"><h2>{_text(name)}</h2>\n{markup}\n</section>' for i, (name, markup) in enumerate(sections)
    )
    links = "".join(f'<a href="#s{i}">{_text(name)}</a>' for i, (name, _) in enumerate(sections))
    files = ", ".join(f'<a href="{_text(_relative(where))}">{_text(name)}</a>' for name, where in page.links)
    badge = f' <span class="badge">{_text(page.badge)}</span>' if page.badge else ""
    notice = f"<p>{_text(page.notice)}</p>\n" if page.notice else ""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{_text(title)} – compressx</title>
<style>
{CSS}</style>
</head>
<body>
<main>
<header>
<h1>{_text(title)}{badge}</h1>
{notice}{_subtitle(summary, run)}
<nav>{links}</nav>
</header>
{body}
<footer>Written by compressx.{f" Files beside this page: {files}." if files else ""}</footer>
</main>
</body>
</html>
"""


def _text(value: Any) -> str:
    # A lone surrogate (an undecodable file name) has no UTF-8 form.
    return html.escape(str(value).encode("utf-8", "replace").decode())


def _cell(value: str) -> str:
    return _text(value).replace("/", "/<wbr>")  # long paths break at their slashes first


def _relative(where: str) -> str:
    if ":" in where or where.startswith(("/", "\\")):
        raise ValueError(f"the link {where!r} is not a relative path; pages link only to files beside them")
    return where


def _subtitle(summary: Mapping[str, Any], run: Mapping[str, Any]) -> str:
    data = summary["dataset"]
    parts = []
    if data["name"]:
        sizes = [f"{fmt.count(data[key])} {key}" for key in ("train", "test") if data[key] is not None]
        source = f" ({_text(data['source'])})" if data["source"] else ""
        badge = ' <span class="badge">stand-in</span>' if data["stand_in"] else ""
        parts.append(f"Data: {_text(data['name'])}{badge}{source}{': ' if sizes else ''}{_text(', '.join(sizes))}")
    if run.get("date"):
        parts.append(f"Date: {_text(run['date'])}")
    if summary["seconds"] is not None:
        parts.append(f"Took {_text(fmt.seconds(summary['seconds']))}")
    out = f"<p>{' · '.join(parts)}</p>"
    if data["stand_in"]:
        out += (
            "<p>The data are a stand-in for the paper's data set: the figures show that the method works, and do not "
            "repeat the paper's.</p>"
        )
    return out


def _headline(summary: Mapping[str, Any]) -> str:
    groups = headline.groups(summary)
    return "\n".join(
        f"<h3>{_text(name)}</h3>\n" + '<div class="tiles">' + "".join(_tile(tile) for tile in tiles) + "</div>"
        for name, tiles in groups
    )


def _tile(tile: headline.Tile) -> str:
    return (
        f'<div class="tile {tile.mood}"><div class="name">{_text(tile.name)}</div>'
        f'<div class="value">{_text(tile.value)}</div><div class="note">{_text(tile.note)}</div></div>'
    )


def _paper(summary: Mapping[str, Any]) -> str:
    quantity, theirs, ours, difference = headline.paper(summary)
    name = f"{_text(quantity)}"
    if summary["dataset"]["stand_in"]:
        name += ' <span class="badge">stand-in data</span>'
    head = "<tr><th>quantity</th><th class=n>paper</th><th class=n>this run</th><th class=n>difference</th></tr>"
    row = f"<tr><td>{name}</td>" + "".join(f"<td class=n>{_text(x)}</td>" for x in (theirs, ours, difference)) + "</tr>"
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{row}</tbody></table></div>'


def _layers(layers: Sequence[Layer]) -> str:
    rows = [layer_table.cells(layer) for layer in layers]
    last = layer_table.cells(layer_table.total(layers)) if len(layers) > 1 else None
    table = _table(Table(layer_table.HEADER, rows, layer_table.NUMERIC), last)
    if len(rows) <= 40:
        return table
    whole = dict(zip(layer_table.HEADER, last or (), strict=True))
    text = f"{len(rows)} layers; {whole['kept']} of {whole['of']} kept, {whole['packed']} in place of {whole['dense']}"
    return f"<details><summary>{_text(text)}</summary>\n{table}</details>"


def _reproduce(run: Mapping[str, Any]) -> str:
    if not run.get("command"):
        return "<p>The run recorded no command.</p>"
    return f'<pre class="wrap">{_text(run["command"])}</pre>'


def _configuration(config: Mapping[str, Any]) -> str:
    rows = [(key, value) for key, value in flatten(config)]
    if not rows:
        return "<p>Nothing is configured.</p>"
    table = _table(Table(("key", "value"), rows))
    return f"<details{' open' if len(rows) <= 40 else ''}><summary>{len(rows)} settings</summary>\n{table}</details>"


def _environment(run: Mapping[str, Any]) -> str:
    rows = []
    for key, value in flatten(run.get("machine") or {}):
        is_memory = key == "memory_bytes" and value.isdigit()
        rows.append(("memory", fmt.size(int(value))) if is_memory else (key.replace("_", " "), value))
    rows += list(flatten(run.get("versions") or {}))
    return _table(Table(("what", "value"), rows)) if rows else "<p>The run recorded no environment.</p>"


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, str]]:
    """The leaves of nested dicts as (dotted key, text)."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", fmt.text(value) if not isinstance(value, Mapping) else "{}"


def _content(content: Content) -> str:
    if isinstance(content, Html):
        return content.markup
    if isinstance(content, Picture):
        return _picture(content)
    if isinstance(content, Table):
        return _table(content)
    if isinstance(content, str):
        return f"<p>{_text(content)}</p>"
    return "\n".join(_content(item) for item in content)


def _picture(picture: Picture) -> str:
    data = picture.source if isinstance(picture.source, bytes) else Path(picture.source).read_bytes()
    if data[:8] != b"\x89PNG\r\n\x1a\n" or len(data) < 24 or data[12:16] != b"IHDR":
        raise ValueError(f"the picture {picture.title!r} is not a PNG file")
    width, height = struct.unpack(">II", data[16:24])
    shown = 700 if width >= 700 else width  # plots are drawn at twice the size at which they are shown
    return (
        f'<figure><img width="{shown}" height="{round(height * shown / max(width, 1))}" alt="{_text(picture.title)}" '
        f'src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        f"<figcaption><strong>{_text(picture.title)}.</strong> {_text(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table, last: Sequence[str] | None = None) -> str:
    numeric = list(table.numeric) or [False] * len(table.header)
    for row in [numeric, *table.rows]:
        if len(row) != len(table.header):
            raise ValueError(f"a table row has {len(row)} cells and its header {len(table.header)}: {list(row)!r:.200}")
    classes = [" class=n" if is_number else " class=w" for is_number in numeric]
    head = "".join(f"<th{' class=n' if n else ''}>{_text(h)}</th>" for h, n in zip(table.header, numeric, strict=True))

    def line(row: Sequence[str], kind: str = "") -> str:
        return f"<tr{kind}>" + "".join(f"<td{c}>{_cell(x)}</td>" for c, x in zip(classes, row, strict=True)) + "</tr>"

    body = "\n".join([line(row) for row in table.rows] + ([line(last, ' class="total"')] if last else []))
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
