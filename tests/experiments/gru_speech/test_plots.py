"""The speech pictures: PNGs, the same bytes for the same data, and shapes that do not fit refused."""

import numpy as np
import pytest

from experiments.gru_speech import plots as speech_plots


def test_confusion(tmp_path, rng) -> None:
    table = rng.integers(0, 9, (4, 4))
    a = speech_plots.confusion(tmp_path / "a.png", table, ["x", "y", "z"], "Title")
    b = speech_plots.confusion(tmp_path / "b.png", table, ["x", "y", "z"], "Title")
    assert a.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(ValueError, match="does not fit 2 units"):
        speech_plots.confusion(tmp_path / "c.png", table, ["x", "y"], "Title")


def test_posterior(tmp_path, rng) -> None:
    p = rng.dirichlet(np.ones(3), 20)
    sound = rng.integers(-99, 99, 1800).astype(np.int16)
    path = speech_plots.posterior(
        tmp_path / "p.png", sound, 8_000, [("dense", p), ("10x", p)], ["x", "y", "z"], 0.01, [(0, 900, "x")], "Title"
    )
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    silent = speech_plots.posterior(tmp_path / "q.png", sound * 0, 8_000, [("dense", p * 0)], ["x", "y", "z"], 0.01)
    assert silent.exists()
