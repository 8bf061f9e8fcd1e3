"""Every data test has a cache of its own and sees no data folder that it did not ask for."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Points $COMPRESSX_CACHE to an empty folder and unsets $COMPRESSX_DATA."""
    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("COMPRESSX_DATA", raising=False)
    return tmp_path / "cache"
