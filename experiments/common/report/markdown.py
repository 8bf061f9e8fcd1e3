"""Markdown: text and code made safe for a table cell, and generated blocks kept between markers in a document.

A block begins with a line `<!-- results:NAME -->` and ends with a line `<!-- /results -->`; what stands between is
replaced. Markers inside fenced code are text.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

_BEGIN = re.compile(r"<!-- results:(\S+) -->\s*")
_END = re.compile(r"<!-- /results -->\s*")
_FENCE = re.compile(r" {0,3}(```|~~~)")


class MarkerError(ValueError):
    """The markers of a document do not pair up or name no table; the message gives file and line."""


def text(value: str) -> str:
    """Plain text for a paragraph or a table cell: nothing in it is markup."""
    flat = " ".join(value.split())
    return re.sub(r"([\\|`*_\[\]~])", r"\\\1", flat).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(value: str) -> str:
    """A code span, also for a table cell; the fence is longer than any run of backticks inside."""
    flat = " ".join(value.split()).replace("|", "\\|")
    fence = "`" * (max((len(run) for run in re.findall(r"`+", flat)), default=0) + 1)
    pad = " " if flat.startswith("`") or flat.endswith("`") else ""
    return f"{fence}{pad}{flat}{pad}{fence}" if flat else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[bool]) -> str:
    """A GitHub table; the cells are markdown already."""
    rule = ["---:" if is_number else "---" for is_number in numeric]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def replace_blocks(document: str, blocks: Mapping[str, str], where: str) -> tuple[str, set[str]]:
    """Puts each block between its markers.

    Args:
      document: markdown.
      blocks: block by name.
      where: the file's name, for messages.

    Returns:
      The new document and the names that occurred in it.

    Raises:
      MarkerError: a marker names no block, is not closed, or closes nothing.
    """
    out: list[str] = []
    used: set[str] = set()
    opened: tuple[str, int] | None = None
    fence: str | None = None
    for number, line in enumerate(document.splitlines(keepends=True), start=1):
        mark = _FENCE.match(line)
        if opened is None and mark and fence in (None, mark[1]):
            fence = None if fence else mark[1]
        begin, end = (None, None) if fence else (_BEGIN.fullmatch(line), _END.fullmatch(line))
        if begin:
            if opened:
                raise MarkerError(f"{where}, line {number}: results:{opened[0]} of line {opened[1]} is not closed yet")
            if begin[1] not in blocks:
                known = ", ".join(sorted(blocks)) or "none"
                raise MarkerError(f"{where}, line {number}: no table is named {begin[1]!r}; declared are {known}")
            opened = begin[1], number
            used.add(begin[1])
            out.append(line if line.endswith("\n") else line + "\n")
            out.append(f"{blocks[begin[1]]}\n")
        elif end:
            if not opened:
                raise MarkerError(f"{where}, line {number}: a block is closed that was not opened")
            opened = None
            out.append(line)
        elif not opened:
            out.append(line)
    if opened:
        raise MarkerError(f"{where}, line {opened[1]}: results:{opened[0]} is not closed by <!-- /results -->")
    return "".join(out), used
