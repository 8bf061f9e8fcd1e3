"""Docstrings of the public names: which lack arguments, returns or an example, and whether the examples are true."""

import ast
import doctest
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressx

ROOT = Path(__file__).resolve().parent.parent


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


api = _load(ROOT / "docs" / "_ext" / "api.py")

# What is still to be written, by name. A name leaves a list when its docstring has the section; none may be added.
NO_ARGS: set[str] = set()
NO_RETURNS: set[str] = set()
NO_EXAMPLE: set[str] = set()


def _functions() -> dict[str, Any]:
    values = {name: getattr(compressx, name) for name in compressx.__all__}
    return {name: v for name, v in values.items() if inspect.isfunction(v)}


def _has(doc: str, *sections: str) -> bool:
    return any(line.rstrip() == f"{s}:" for line in doc.splitlines() for s in sections)


def _makes_a_constraint(function: Any) -> bool:
    """The first line of a factory says what it returns: the set."""
    return inspect.signature(function).return_annotation is compressx.Constraint


def test_public_classes_have_an_example() -> None:
    classes = {n: v for n in compressx.__all__ if inspect.isclass(v := getattr(compressx, n))}
    lacking = sorted(n for n, v in classes.items() if not _has(inspect.getdoc(v) or "", "Example"))
    assert not lacking, f"without Example: {lacking}"


def _without_example(module: str) -> list[str]:
    """Public functions and classes of a module, in whose docstring stands no example; nothing is imported."""
    lacking = []
    for part in api.modules(f"compressx.{module}"):
        own = api.file_of(part)
        texts = {
            node.name: ast.get_docstring(node) or ""
            for path in (sorted(own.parent.glob("*.py")) if own.name == "__init__.py" else [own])
            for node in ast.parse(path.read_text()).body
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
        }
        lacking += [n for n in api.names(part) if n in texts and ">>>" not in texts[n]]
    return lacking


# How many public names of a module have no example yet. These numbers may only fall.
STILL_WITHOUT = {
    "constraints": 1,
    "kernels": 13,
    "compaction": 20,
    "crossbar": 51,
    "budget": 7,
    "export": 3,
    "testing": 1,
    "federated": 53,
}


@pytest.mark.parametrize("module", api.MODULES)
def test_names_of_modules_without_an_example_become_fewer(module: str) -> None:
    lacking = _without_example(module)
    assert len(lacking) <= STILL_WITHOUT.get(module, 0), f"without an example: {sorted(lacking)}"


def _lacking() -> dict[str, set[str]]:
    out: dict[str, set[str]] = {"Args": set(), "Returns": set(), "Example": set()}
    for name, function in _functions().items():
        doc, signature = inspect.getdoc(function) or "", inspect.signature(function)
        if signature.parameters and not _has(doc, "Args"):
            out["Args"].add(name)
        if signature.return_annotation is not None and not _makes_a_constraint(function) and not _has(doc, "Returns"):
            out["Returns"].add(name)
        if not _has(doc, "Example"):
            out["Example"].add(name)
    return out


@pytest.mark.parametrize(
    ("section", "allowed"), [("Args", NO_ARGS), ("Returns", NO_RETURNS), ("Example", NO_EXAMPLE)]
)
def test_public_functions_have_the_sections_of_a_docstring(section: str, allowed: set[str]) -> None:
    lacking = _lacking()[section]
    assert not lacking - allowed, f"without {section}: {sorted(lacking - allowed)}"
    assert not allowed - lacking, f"no longer without {section}, take out of the list: {sorted(allowed - lacking)}"


def test_every_argument_is_described() -> None:
    for name, function in _functions().items():
        doc = inspect.getdoc(function) or ""
        if not _has(doc, "Args"):
            continue
        body = doc.split("Args:\n", 1)[1].split("\n\n")[0]
        described = {n.strip() for line in body.splitlines() if line[:3].strip() for n in line.split(":")[0].split(",")}
        arguments = set(inspect.signature(function).parameters)
        assert described == arguments, f"{name}: {sorted(described ^ arguments)}"


def test_the_first_line_of_a_docstring_is_one_sentence() -> None:
    for name in compressx.__all__:
        value = getattr(compressx, name)
        if isinstance(value, int):
            continue
        first, *rest = (inspect.getdoc(value) or "").splitlines() or [""]
        assert first.endswith((".", ":")) and (not rest or not rest[0].strip()), f"{name}: {first!r}"


def _examples() -> list[Any]:
    """The doctests of every module of the library, each with what it stands in."""
    found = []
    for path in sorted(api.PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            text = ast.get_docstring(node) if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module) else None
            if text and ">>>" in text:
                name = ".".join(path.relative_to(api.PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
                found.append(pytest.param(name, text, id=f"{name}.{getattr(node, 'name', '')}"))
    return found


@pytest.mark.parametrize(("module", "text"), _examples())
def test_examples_are_true(module: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"compressx": compressx, "jax": jax, "jnp": jnp, "np": np, "optax": optax}
    held = {**vars(importlib.import_module(module)), **names}
    example = doctest.DocTestParser().get_doctest(text, held, module, module, 0)
    said: list[str] = []
    doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not said, "".join(said)


def test_every_public_name_is_found_without_importing() -> None:
    assert [n for m, n in api.public() if m == "compressx"] == compressx.__all__
    for module in ("formats", "kernels", "compaction", "crossbar", "schedules", "views", "testing"):
        held = importlib.import_module(f"compressx.{module}")
        assert all(hasattr(held, name) for name in api.names(f"compressx.{module}")), module
    assert set(api.MODULES) >= set(compressx._MODULES)
    assert sys.modules["compressx"] is compressx


def test_every_name_of_the_library_is_in_a_page_of_the_reference() -> None:
    """As `make docs` checks it, without building: modules are listed whole, the library's own names one by one."""
    text = "\n".join(p.read_text() for p in sorted((ROOT / "docs" / "reference").glob("*.rst")))
    listed = {name for line in re.findall(r"^\.\. names:: compressx (.*)$", text, re.M) for name in line.split()}
    modules = set(api.MODULES)
    assert set(compressx.__all__) - listed - modules == set()
    assert modules <= set(re.findall(r"^\.\. names:: compressx\.(\w+)", text, re.M))
