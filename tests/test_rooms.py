"""The rooms of the code, as docs/architecture.md lists them: every import points downwards, and none in a circle.

A room may import the rooms that stand below it in the table, and the files of its own room. Imports inside functions
count as much as those at the top of a file.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOPS = ("compressx", "experiments", "configs")


def name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name(p): p for top in TOPS for p in sorted((ROOT / top).rglob("*.py"))}


def imports(module: str) -> Iterator[str]:
    """Every module of ours that a module imports, at its top or inside a function."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for a in node.names:
                full = f"{node.module}.{a.name}"
                yield full if full in MODULES else node.module


EDGES = {m: sorted(set(imports(m)) - {m}) for m in MODULES}


def rooms() -> list[list[str]]:
    """The floors of the table, from the top: each the rooms that share it, packages with a dot at their end."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    blocks = text[text.index("## Map of the code") :].split("\n\n")
    rows = next(block for block in blocks if block.startswith("| where")).splitlines()[2:]
    paths = [re.findall(r"`([^`]+)`", row.split("|")[1]) for row in rows]
    return [[f"{p.strip('/').replace('/', '.')}." if p.endswith("/") else name(ROOT / p) for p in row] for row in paths]


FLOORS = rooms()


def room(module: str) -> tuple[int, str]:
    """The number of the floor and the room of a module."""
    listed = [(n, r) for n, floor in enumerate(FLOORS) for r in floor]
    found = [(n, r) for n, r in listed if module == r or (r.endswith(".") and f"{module}.".startswith(r))]
    assert len(found) == 1, f"{module} is in {found or 'no room'} of the table in docs/architecture.md"
    return found[0]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_downwards(module: str) -> None:
    floor, own = room(module)
    for target in EDGES[module]:
        below, other = room(target)
        assert other == own or below > floor, f"{module} imports {target}: {own} does not stand above {other}"


def test_no_module_imports_itself_through_others() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, "a circle: " + " -> ".join((*way[way.index(module) :], module))
        if module not in done:
            for target in EDGES[module]:
                visit(target, (*way, module))
            done.add(module)

    for module in sorted(MODULES):
        visit(module, ())


def test_the_library_knows_no_experiment() -> None:
    wrong = [(m, t) for m in MODULES if m.startswith("compressx") for t in EDGES[m] if not t.startswith("compressx")]
    assert not wrong
