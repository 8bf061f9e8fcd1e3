"""The tiny run that several tests share."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

_FILE = Path(__file__).with_name("tiny_run.py")


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module `tiny_run`: a job, a plan with every kind of phase, and `run`."""
    spec = importlib.util.spec_from_file_location("tiny_run", _FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def finished(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """The folder and the outcome of the tiny run, never interrupted; tests only read it."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, tiny.run(folder)
