"""The tuner: its candidates all compute the same, its choices are stable, its cache survives anything."""

import numpy as np
import pytest

from compressx import kernels
from compressx.kernels import native, pattern_conv, schedule, tuning
from compressx.kernels.schedule import Geometry

pytestmark = pytest.mark.skipif(not native.available(), reason="no compiler, so no native kernels")

GEOMETRY = Geometry((3, 3), (1, 1), ((1, 1), (1, 1)))


@pytest.fixture
def layer():
    rng = np.random.default_rng(0)
    w = rng.standard_normal((3, 3, 4, 8), dtype=np.float32) * (rng.random((4, 8)) < 0.5)[None, None]
    g = pattern_conv.layer_grid(GEOMETRY, (1, 6, 5), native.LANES[native.isa()])
    return w, schedule.from_weight(w), g


def test_every_order_and_candidate_streams_all_weights(layer):
    w, s, g = layer
    found = tuning.candidates(s, GEOMETRY, g)
    assert {p.order for p in found} == {"kernels", "chunks", "runs"}
    for plan in found:
        t = schedule.stream(s, GEOMETRY, g, plan)
        assert np.sort(t.weight[t.weight != 0]).tobytes() == np.sort(w[w != 0]).tobytes()
        assert tuning.predict(s, GEOMETRY, g, plan) > 0


def test_search_is_seeded_and_counts_its_evaluations(layer):
    _, s, g = layer
    for start in ("model", "random"):
        a = tuning.search(s, GEOMETRY, g, seed=3, budget=4, rounds=1, start=start)
        assert len(a.tried) == 4 and a.plan in dict(a.tried)
    again = tuning.search(s, GEOMETRY, g, seed=3, budget=4, rounds=1, start="random")
    assert [p for p, _ in again.tried] == [p for p, _ in a.tried]
    with pytest.raises(ValueError, match="budget"):
        tuning.search(s, GEOMETRY, g, budget=0)


def test_cache_keeps_plans_and_ignores_what_it_cannot_read(layer, tmp_path, monkeypatch):
    _, s, g = layer
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = tmp_path / "compressx" / "tuning.json"
    plan = tuning.tuned(s, GEOMETRY, g, budget=3)
    monkeypatch.setattr(tuning, "search", None)
    assert tuning.tuned(s, GEOMETRY, g, budget=3) == plan
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for text in ("", "[1]", "{", file.read_text().replace(plan.order, "else")):
        file.write_text(text)
        assert tuning.tuned(s, GEOMETRY, g, budget=3) in tuning.candidates(s, GEOMETRY, g)


def test_counted_work():
    s = schedule.from_weight(np.ones((3, 3, 4, 8), np.float32))
    found = schedule.counts(s, GEOMETRY, 6, 5, kernels.Plan("kernels", 3, 8, 2))
    assert found["macs"] == found["macs_dense"] == 9 * 4 * 8 * 30
    assert found["input_loads"] == 9 * 32 and found["input_loads_eliminated"] == 9 * 4
