"""The reference: one directive, a reader of our docstrings, and a check that no public name is missing.

    .. names:: compressx admm AdmmState     these names of a module
    .. names:: compressx.formats            all public names of a module that stand nowhere as `compressx.NAME`

Docstrings are plain text with Google-style sections: an indented block is a formula or a program, backticks are code.
"""

import importlib
import inspect
import re
from collections.abc import Callable
from typing import Any

import api
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import logging
from sphinx.util.docutils import SphinxDirective

_SECTION = re.compile(r"(Args|Returns|Raises|Attributes|Yields|Example|Examples|References):\s*$")
_COLUMNS = re.compile(r"\S {3,}\S")  # two columns, aligned with spaces
_CODE = re.compile(r"(`[^`]*`|\*\*\w[^*]*\*\*|(?<!\w)\*[A-Za-z][\w ]*\*(?!\w))")


class Names(SphinxDirective):
    """Documents names of a module."""

    required_arguments = 1
    optional_arguments = 1
    final_argument_whitespace = True

    def run(self) -> list[nodes.Node]:
        module, *chosen = " ".join(self.arguments).split()
        if chosen:
            return self.parse_text_to_nodes(_directives(module, chosen), allow_section_headings=True)
        elsewhere = {id(getattr(importlib.import_module("compressx"), n)): n for n in api.names("compressx")}
        text = ""
        for part in api.modules(module):
            held = importlib.import_module(part)
            listed = api.names(part)
            twice = [n for n in listed if elsewhere.get(id(getattr(held, n, None))) == n]
            if part != module:
                text += f"{part}\n{'-' * len(part)}\n\n.. automodule:: {part}\n\n"
            if twice:
                text += "Also here: " + ", ".join(f":py:obj:`compressx.{n}`" for n in twice) + ".\n\n"
            text += _directives(part, [n for n in listed if n not in twice])
        return self.parse_text_to_nodes(text, allow_section_headings=True)


def _directives(module: str, names: list[str]) -> str:
    held = importlib.import_module(module)
    text = ""
    for name in names:
        value = getattr(held, name)
        if inspect.isclass(value):
            text += f".. autoclass:: {module}.{name}\n   :members:\n\n"
        elif callable(value) and not isinstance(value, tuple):
            text += f".. autofunction:: {module}.{name}\n\n"
        else:
            long = "   :no-value:\n" if len(repr(value)) > 60 else ""
            text += f".. autodata:: {module}.{name}\n{long}\n"
    return text


def _escaped(line: str) -> str:
    """A line of prose whose stars, bars and underscores are themselves."""
    parts = _CODE.split(line)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"([\\*|])", r"\\\1", parts[i])
        parts[i] = re.sub(r"(?<=[\w|\]])_(?=\W|$)", r"\\_", parts[i])
    return "".join(parts)


def _literal(block: list[str]) -> list[str]:
    """A literal block of some lines."""
    least = min(len(line) - len(line.lstrip()) for line in block if line.strip())
    return [".. code-block:: text", "", *(f"    {line[least:]}".rstrip() for line in block), ""]


def marked_up(lines: list[str]) -> list[str]:
    """A docstring as reStructuredText, its sections as they were (napoleon reads them)."""
    out: list[str] = []
    section = bullet = False
    at = 0
    while at < len(lines):
        line = lines[at]
        if line[:1].strip():
            section, bullet = bool(_SECTION.fullmatch(line)), line.startswith(("* ", "- "))
        if not section and not bullet and line[:1] == " ":
            size = _extent(lines[at:], lambda x: x[:1] == " ")
            out += ["", *_literal(lines[at : at + size])]
        elif line[:1].strip() and (size := _extent(lines[at:], lambda x: bool(_COLUMNS.search(x)))) > 1:
            out += ["", *_literal(lines[at : at + size])]
        else:
            size = 1
            if line.startswith("Source: "):
                line = line.replace("Source:", "**Source:**", 1)
            code = line.lstrip().startswith((">>>", "...")) or _SECTION.fullmatch(line)
            out.append(line if code else _escaped(line))
        at += size
    return out


def _extent(lines: list[str], belongs: Callable[[str], bool]) -> int:
    """How many lines from the first on belong to one block; empty lines inside it do."""
    size = 0
    for number, line in enumerate(lines, 1):
        if belongs(line):
            size = number
        elif line.strip():
            break
    return size


def _docstring(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    if what == "data" and not isinstance(obj, type):
        kept = [] if lines[:1] == (inspect.getdoc(type(obj)) or "").splitlines()[:1] else lines
        lines[:] = kept
    lines[:] = marked_up(lines)


def _skip(app: Sphinx, what: str, name: str, obj: Any, skip: bool, options: Any) -> bool | None:
    """Leaves out the fields of named tuples, which the section Attributes describes."""
    return True if type(obj).__name__ == "_tuplegetter" else None


def _nothing_is_missing(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Warns, which ends the build, where a public name has no entry in the reference."""
    entries = set(env.domains["py"].objects)  # type: ignore[attr-defined]
    top = importlib.import_module("compressx")
    known = {id(getattr(top, n)) for n in api.names("compressx") if f"compressx.{n}" in entries}
    missing = [
        f"{module}.{name}"
        for module, name in api.public()
        if f"{module}.{name}" not in entries and id(getattr(importlib.import_module(module), name)) not in known
    ]
    if missing:
        logging.getLogger(__name__).warning("the reference lacks %s; see docs/reference", ", ".join(missing))
    return []


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the extension."""
    app.add_directive("names", Names)
    app.connect("autodoc-process-docstring", _docstring, priority=100)
    app.connect("autodoc-skip-member", _skip)
    app.connect("env-updated", _nothing_is_missing)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
