import numpy as np
import pytest

from experiments.language_model import plots as row_plots


def test_they_are_drawn_and_nothing_to_draw_is_an_error(tmp_path, rng) -> None:
    w = rng.normal(size=(16, 40)) * (rng.random((16, 40)) < 0.2)
    one = row_plots.kept_blocks(tmp_path / "a.png", {"params/x/kernel": w, "y": w.T}, {"y": np.full(16, 8)})
    two = row_plots.row_densities(tmp_path / "b.png", {"params/x/kernel": rng.random(16)}, 0.5)
    assert all(p.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and p.stat().st_size > 5000 for p in (one, two))
    with pytest.raises(ValueError, match=r"a.png: no matrix to draw"):
        row_plots.kept_blocks(tmp_path / "a.png", {"bias": np.ones(3)}, {})
    with pytest.raises(ValueError, match=r"b.png: needs the densities"):
        row_plots.row_densities(tmp_path / "b.png", {}, 0.5)
