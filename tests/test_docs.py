"""Docstrings of the public names: which lack arguments, returns or an example, and whether the examples are true."""

import ast
import doctest
import functools
import importlib.util
import re
import signal
import sys
from collections.abc import Iterator
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

Definition = ast.FunctionDef | ast.ClassDef

MODULES = ("compressx", *(f"compressx.{name}" for name in api.MODULES))
# Functions that give one of these say in their first line what it is.
NAMED_BY_THEIR_FUNCTION = {"Constraint", "View", "RhoSchedule"}


def _has(doc: str, *sections: str) -> bool:
    return any(line.rstrip() == f"{s}:" for line in doc.splitlines() for s in sections)


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(api.file_of(module).read_text())


def _definition(module: str, name: str) -> Definition | None:
    """The function or class of that name in a module's text; None for anything else."""
    return next((n for n in _tree(module).body if isinstance(n, Definition) and n.name == name), None)


@functools.cache
def _imported(module: str) -> dict[str, tuple[str, str]]:
    """Name -> the module it comes from and its name there, of what a module imports."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.ImportFrom) and node.module is not None
        for alias in node.names
    }


@functools.cache
def _definitions(module: str) -> dict[str, Definition]:
    """Public functions and classes of a module, or of a package's modules, each from where it is defined.

    Nothing is imported, so that modules count whose dependencies are not installed.
    """
    found: dict[str, Definition] = {}
    for part in [module] if module == "compressx" else api.modules(module):
        homes = _imported(part)
        for name in api.names(part):
            home, original = homes.get(name, (part, name))
            node = _definition(home, original)
            if node is None and home.startswith("compressx."):  # a package hands on what a module of it defines
                home, original = _imported(home).get(original, (home, original))
                node = _definition(home, original)
            if node is not None:
                found[f"{part}.{name}"] = node
    return found


def _text(node: Definition) -> str:
    return ast.get_docstring(node) or ""


def _arguments(node: ast.FunctionDef) -> set[str]:
    a = node.args
    more = [arg for arg in (a.vararg, a.kwarg) if arg is not None]
    return {arg.arg for arg in (*a.posonlyargs, *a.args, *a.kwonlyargs, *more)}


def _fields(node: ast.ClassDef) -> set[str]:
    """The fields of a record: annotated names of the class itself."""
    named = {n.target.id for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    return {name for name in named if not name.startswith("_")}


def _described(doc: str, section: str) -> set[str]:
    """The names that a section describes."""
    body = doc.split(f"{section}:\n", 1)[1].split("\n\n")[0]
    heads = [line.split(":")[0] for line in body.splitlines() if line[:3].strip()]
    return {name.strip() for head in heads for name in head.split(",")}


def test_every_public_function_and_class_is_read() -> None:
    whole = {f"compressx.{n}" for n in compressx.__all__ if callable(getattr(compressx, n))}
    assert whole == set(_definitions("compressx"))


@pytest.mark.parametrize("module", MODULES)
def test_public_names_have_an_example(module: str) -> None:
    lacking = [name for name, node in _definitions(module).items() if ">>>" not in _text(node)]
    assert not lacking, f"without an example: {sorted(lacking)}"


@pytest.mark.parametrize("module", MODULES)
def test_public_functions_describe_their_arguments_and_results(module: str) -> None:
    for name, node in _definitions(module).items():
        if not isinstance(node, ast.FunctionDef):
            continue
        arguments, doc = _arguments(node), _text(node)
        result = "None" if node.returns is None else ast.unparse(node.returns)
        assert not arguments or _has(doc, "Args"), f"{name}: no Args"
        assert not arguments or _described(doc, "Args") == arguments, f"{name}: Args are not {sorted(arguments)}"
        assert result in {"None", *NAMED_BY_THEIR_FUNCTION} or _has(doc, "Returns"), f"{name}: no Returns"


@pytest.mark.parametrize("module", MODULES)
def test_public_records_describe_their_fields(module: str) -> None:
    for name, node in _definitions(module).items():
        fields = _fields(node) if isinstance(node, ast.ClassDef) else set()
        if fields:
            assert _has(_text(node), "Attributes"), f"{name}: no Attributes"
            assert _described(_text(node), "Attributes") == fields, f"{name}: Attributes are not {sorted(fields)}"


def test_every_set_names_its_source() -> None:
    found = _definitions("compressx")
    lacking = [k for k in compressx.constraints.KINDS if not re.search("^Source", _text(found[f"compressx.{k}"]), re.M)]
    assert not lacking, f"say whose set it is, or that it is our own: {lacking}"


@pytest.mark.parametrize("module", MODULES)
def test_the_first_line_of_a_docstring_is_one_sentence(module: str) -> None:
    for name, node in _definitions(module).items():
        first, *rest = _text(node).splitlines() or [""]
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


# Packages of extras that the examples of a module need, by the beginning of its name.
NEEDED = {
    "compressx.export": ("onnx", "flatbuffers"),
    "compressx.federated": ("cryptography",),
    "compressx.federated.flower": ("cryptography", "flwr"),
}


@pytest.fixture
def signals() -> Iterator[None]:
    """Flower's server takes signals over and does not give them back."""
    held = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT)}
    yield
    for number, handler in held.items():
        signal.signal(number, handler)


# Flower's command line imports what click deprecates.
@pytest.mark.filterwarnings("ignore:'click.utils:DeprecationWarning")
@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize(("module", "text"), _examples())
def test_examples_are_true(module: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for start, packages in NEEDED.items():
        for package in packages if module.startswith(start) else ():
            pytest.importorskip(package, reason="needs an extra")
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
    assert modules <= set(re.findall(r"^\.\. names:: compressx\.([\w.]+)", text, re.M))
