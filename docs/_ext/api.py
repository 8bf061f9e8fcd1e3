"""The public names of the library, read from its modules: what the reference must hold and `tests/test_docs.py` reads.

A module's public names are its `__all__`; without one, what its `__init__` defines or imports from its own package; of
a package that imports nothing (`budget`, `federated`), what each of its modules defines.
"""

import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[2] / "compressx"
MODULES = (
    *("constraints", "schedules", "views", "formats", "kernels", "compaction", "crossbar", "budget", "export"),
    *("testing", "federated"),
)


def file_of(module: str) -> Path:
    """Where a module's text is: `compressx.views` in `compressx/views.py`."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def names(module: str) -> list[str]:
    """The public names of one module, in its own order.

    Nothing is imported, so that modules count whose dependencies are not installed.
    """
    body = ast.parse(file_of(module).read_text()).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    found: list[str] = []
    for node in body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{module}."):
            found += [a.asname or a.name for a in node.names]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(node.name)
    return [n for n in found if not n.startswith("_")]


# Modules of a package whose functions are called by the module's name.
BESIDE = {"compressx.crossbar": ("program", "network")}


def modules(module: str) -> list[str]:
    """The module itself and those `BESIDE` it, or the modules of a package that imports nothing; each has `names`."""
    if names(module):
        return [module, *(f"{module}.{each}" for each in BESIDE.get(module, ()))]
    files = sorted(file_of(module).parent.glob("[!_]*.py"))
    return [f"{module}.{f.stem}" for f in files if names(f"{module}.{f.stem}")]


def public() -> list[tuple[str, str]]:
    """Every (module, name) that is public."""
    top = [("compressx", n) for n in names("compressx")]
    return top + [(m, n) for each in MODULES for m in modules(f"compressx.{each}") for n in names(m)]
