"""The generated table of docs/support.md is that of the code: what packs, compiles and compacts."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _support() -> ModuleType:
    path = ROOT / "docs" / "_ext" / "support.py"
    spec = importlib.util.spec_from_file_location("support", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_a_row_for_every_set_and_some_are_made_anew() -> None:
    support = _support()
    lines = support.PAGE.read_text().splitlines()
    assert [n for n in support.SETS if not any(line.startswith(f"| `{n}` |") for line in lines)] == []
    for name in ("n_of_m(2, 4)", "filters(0.25)", "quantize(4)"):
        assert support.row(name) in lines, "run `python docs/_ext/support.py`"


@pytest.mark.slow
def test_the_page_holds_the_table_that_the_code_makes() -> None:
    support = _support()
    text = support.PAGE.read_text()
    assert support.page(text) == text, "run `python docs/_ext/support.py`"
