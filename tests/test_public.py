"""What `import compressx` gives: one list of names, alike for Python and type checkers, loaded when asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import compressx

SOURCE = Path(compressx.__file__)


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_type_checkers_see_the_names_of_the_list() -> None:
    (block,) = [n for n in ast.parse(SOURCE.read_text()).body if isinstance(n, ast.If)]
    seen = {a.asname or a.name for n in block.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert seen == set(compressx.__all__) and len(compressx.__all__) == len(set(compressx.__all__))


def test_every_name_is_there_and_no_other() -> None:
    assert all(getattr(compressx, name) is not None for name in compressx.__all__)
    assert set(compressx.__all__) <= set(dir(compressx))
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        compressx.prune  # noqa: B018


def test_all_constraints_are_public() -> None:
    assert set(compressx.constraints.KINDS) <= set(compressx.__all__)


def test_importing_the_package_or_the_enclave_loads_no_jax() -> None:
    loaded = "print(sorted({'jax', 'flax', 'optax', 'orbax'} & set(sys.modules)))"
    assert _run(f"import sys, compressx; {loaded}") == "[]"
    enclave = "compressx.federated.trusted.main, compressx.federated.trusted.aggregator"
    assert _run(f"import sys, {enclave}; {loaded}") == "[]"


def test_the_library_loads_nothing_of_the_extras() -> None:
    extras = "{'ml_collections', 'tensorflow_datasets', 'matplotlib', 'sklearn', 'flwr', 'cryptography', 'onnx'}"
    names = "[getattr(compressx, n) for n in compressx.__all__]"
    assert _run(f"import sys, compressx; {names}; print(sorted({extras} & set(sys.modules)))") == "[]"


def test_mypy_knows_every_name(tmp_path: Path) -> None:
    pytest.importorskip("mypy", reason="needs the extra 'lint'")
    file = tmp_path / "uses.py"
    file.write_text("import compressx\n\n" + "".join(f"print(compressx.{n})\n" for n in compressx.__all__))
    root = SOURCE.parent.parent
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(root / ".mypy_cache" / "public"), str(file)]
    done = subprocess.run([*command, "--ignore-missing-imports"], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stdout
