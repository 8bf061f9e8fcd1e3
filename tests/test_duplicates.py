"""Drivers repeat little of one another: what several of them need is `experiments/common`."""

import ast
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = 6  # equal lines in a row that are counted as one
ALLOWED = 10  # of these, over all pairs of drivers


def lines(source: str, docstrings: bool) -> list[str]:
    """The lines of a file that count, spaces folded: no comments, imports, blank lines or lone brackets."""
    left_out: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            left_out.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        named = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if named and not docstrings and ast.get_docstring(node) is not None:
            left_out.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    folded = ((n, " ".join(line.split())) for n, line in enumerate(source.splitlines(), 1) if n not in left_out)
    return [line for _, line in folded if re.search(r"\w", line) and not line.startswith("#")]


def places(files: dict[tuple[str, str], list[str]]) -> Iterator[tuple[str, str, str]]:
    """The first line of every longest run of at least `SHARED` lines that two drivers have, with their files.

    Args:
      files: (driver, file) -> its lines.
    """
    runs: dict[tuple[str, ...], list[tuple[str, str, int]]] = {}
    for (driver, file), text in files.items():
        for i in range(len(text) - SHARED + 1):
            runs.setdefault(tuple(text[i : i + SHARED]), []).append((driver, file, i))
    for run, where in runs.items():
        for (a, p, i), (b, q, j) in itertools.combinations(where, 2):
            begun = i and j and files[a, p][i - 1] == files[b, q][j - 1]
            if a != b and not begun:
                yield p, q, run[0]


def drivers() -> dict[str, list[Path]]:
    """The files of every driver: its package and its configurations. The template is there to be copied."""
    packages = [p.parent for p in sorted((ROOT / "experiments").glob("*/__main__.py")) if p.parent.name != "template"]
    found = {p.name: [*sorted(p.rglob("*.py")), ROOT / "configs" / f"{p.name}.py"] for p in packages}
    return {name: [f for f in files if f.is_file()] for name, files in found.items()}


@pytest.mark.parametrize("docstrings", [True, False])
def test_two_drivers_share_six_equal_lines_in_few_places(docstrings: bool) -> None:
    found = drivers()
    assert len(found) >= 8
    read = {
        (d, str(p.relative_to(ROOT))): lines(p.read_text(), docstrings) for d, files in found.items() for p in files
    }
    shared = [f"{p} ~ {q}: {line}" for p, q, line in places(read)]
    assert len(shared) <= ALLOWED, "\n".join(shared)


def test_a_place_is_found_once_and_what_does_not_count_parts_nothing() -> None:
    body = [f"x{n} = {n}" for n in range(8)]
    one = "import os\n" + "\n".join(body)
    other = "y = 0\n" + "\n# a comment\n\nimport sys\n".join(body) + "\nz = 1\n"

    def first_lines(a: str, b: str, docstrings: bool = True) -> list[str]:
        files = {("a", "a.py"): lines(a, docstrings), ("b", "b.py"): lines(b, docstrings)}
        return [line for _, _, line in places(files)]

    assert first_lines(one, other) == ["x0 = 0"]
    assert first_lines("\n".join(body[:5]), other) == []
    said = '"""The same words."""\n' + "\n".join(body[:5])
    assert len(first_lines(said, said)) == 1
    assert first_lines(said, said, docstrings=False) == []
