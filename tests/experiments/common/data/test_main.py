"""`python -m experiments.common.data` says of every data set whether it is here, and changes nothing."""

import sys
from pathlib import Path

import pytest

from experiments.common import data
from experiments.common.data import __main__ as command


def _lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, str]:
    monkeypatch.setattr(sys, "argv", ["data", *arguments])
    command.main()
    told = [line for line in capsys.readouterr().out.splitlines() if not line.startswith(" ")]
    return {line.split()[2]: line for line in told}


def test_every_data_set_has_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMPRESSX_DATA", raising=False)
    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path / "cache"))
    lines = _lines(monkeypatch, capsys)
    assert lines.keys() == data.DATASETS.keys()
    assert lines["digits"].startswith("ok") and lines["mnist"].startswith("absent")
    assert not (tmp_path / "cache").exists()


def test_data_in_the_given_folder_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("COMPRESSX_DATA", raising=False)
    for files in data.DATASETS["mnist"].splits.values():
        for f in files:
            (tmp_path / f.path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / f.path).write_bytes(b"")
    found = _lines(monkeypatch, capsys, f"--data_dir={tmp_path}")["mnist"]
    assert found.startswith("ok") and str(tmp_path) in found
    assert "absent" in _lines(monkeypatch, capsys, "--data_dir=/no/such")["mnist"]
