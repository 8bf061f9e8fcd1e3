"""What the cases rest on: an open case fails in one way only, and one file names the API."""

import ast
import subprocess
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp

_FOLDER = Path(__file__).parent

_CASES = """
from tests.cases.marks import open_case

@open_case(raises=ValueError, match="3 of 4")
def test_as_expected():
    raise ValueError("kept 3 of 4")

@open_case(raises=ValueError, match="3 of 4")
def test_mended():
    pass

@open_case(raises=ValueError, match="3 of 4")
def test_another_text():
    raise ValueError("kept 2 of 4")

@open_case(raises=ValueError, match="3 of 4")
def test_another_type():
    raise KeyError("kept 3 of 4")

@open_case(raises=ValueError, match="3 of 4")
def test_a_subtype():
    raise UnicodeError("kept 3 of 4")

@open_case(raises=AssertionError, match="3 of 4")
def test_an_assertion():
    assert 3 == 4, "kept 3 of 4"
"""


def test_an_open_case_fails_in_the_way_it_names_or_the_suite_fails(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(_CASES)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", str(tmp_path)]
    done = subprocess.run(command, cwd=_FOLDER.parent.parent, capture_output=True, text=True, timeout=300)
    ended = {line.split("::")[1].split()[0]: line.split()[0] for line in done.stdout.splitlines() if "::test_" in line}
    assert ended == {
        "test_as_expected": "XFAIL",
        "test_mended": "FAILED",
        "test_another_text": "FAILED",
        "test_another_type": "FAILED",
        "test_a_subtype": "FAILED",
        "test_an_assertion": "XFAIL",
    }, done.stdout + done.stderr


def test_only_the_adapter_imports_compressx() -> None:
    found = {}
    for file in sorted(_FOLDER.glob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        modules = [name.name for node in nodes if isinstance(node, ast.Import) for name in node.names]
        modules += [str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)]
        found[file.name] = any(module.split(".")[0] == "compressx" for module in modules)
    assert [name for name, imports in found.items() if imports] == ["api.py"]


def test_cases_run_under_the_promotions_and_warnings_of_a_user() -> None:
    assert (jnp.ones((2, 3)) + jnp.arange(3)).shape == (2, 3)
    with warnings.catch_warnings(record=True) as said:  # with the filters of this test
        warnings.warn("any", stacklevel=1)
    assert [str(w.message) for w in said] == ["any"]
