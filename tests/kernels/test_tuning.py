"""The tuner: its candidates all compute the same, its choices are stable, its cache survives anything."""

import json
import os

import numpy as np
import pytest

from compressx import kernels
from compressx.kernels import native, pattern_conv, plans, schedule, tuning
from compressx.kernels.grid import to_planes, valid
from compressx.kernels.schedule import Geometry, Plan

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
    found = plans.candidates(s, GEOMETRY, g)
    assert {p.order for p in found} == {"kernels", "chunks", "runs"}
    for plan in found:
        t = schedule.stream(s, GEOMETRY, g, plan)
        assert np.sort(t.weight[t.weight != 0]).tobytes() == np.sort(w[w != 0]).tobytes()
        assert plans.predict(s, GEOMETRY, g, plan) > 0


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
    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path))
    file = tmp_path / "tuning" / "plans.json"
    plan = tuning.tuned(s, GEOMETRY, g, budget=3)
    monkeypatch.setattr(tuning, "search", None)
    assert tuning.tuned(s, GEOMETRY, g, budget=3) == plan
    monkeypatch.undo()
    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path))
    for text in ("", "[1]", "{", file.read_text().replace(plan.order, "else")):
        file.write_text(text)
        assert tuning.tuned(s, GEOMETRY, g, budget=3) in plans.candidates(s, GEOMETRY, g)
    file.unlink()
    file.mkdir()
    (file.parent / ".unfinished-of-a-killed-process").mkdir()
    os.utime(file.parent / ".unfinished-of-a-killed-process", (0, 0))
    plan = tuning.tuned(s, GEOMETRY, g, budget=3)
    assert list(plan) in json.loads(file.read_text()).values() and list(file.parent.iterdir()) == [file]
    monkeypatch.setenv("COMPRESSX_CACHE", str(file))  # cannot be a folder
    assert tuning.tuned(s, GEOMETRY, g, budget=3) in plans.candidates(s, GEOMETRY, g)


def test_counted_work():
    s = schedule.from_weight(np.ones((3, 3, 4, 8), np.float32))
    assert schedule.counts(s, GEOMETRY, 6, 5) == {"macs_dense": 9 * 4 * 8 * 30, "macs": 9 * 4 * 8 * 30, "kernels": 32}


def walk(t, x, base, step, width):
    """A tile of the native loops, vector by vector: its sums, and the loads of inputs and of sums that it makes."""
    count = {"inputs": 0, "sums": 0}
    cout = len(t.order)
    sums = np.zeros((cout, width, x.shape[-1]), np.float64)
    flat = x.reshape(-1, x.shape[-1])

    def load(at):
        count["inputs"] += 1
        return flat[at].astype(np.float64)

    blocks = -(-cout // t.filters)
    if t.taps:
        visit_start, kernel_start = t.starts[: blocks + 1], t.starts[blocks + 1 :]
        for block in range(blocks):
            kernel = kernel_start[block]
            for visit in t.visits[visit_start[block] : visit_start[block + 1]]:
                at = base + int(visit >> 16) * step
                held = [[load(at + o + f) for f in range(width)] for o in t.offsets[visit >> 8 & 255]]
                for _ in range((visit & 255) + 1):
                    count["sums"] += width
                    for e, inputs in enumerate(held):
                        sums[block * t.filters + t.members[kernel]] += t.weight[kernel, e] * np.array(inputs)
                    kernel += 1
    else:
        longest, value = schedule.LONGEST, 0
        for item in range(t.groups * cout):
            count["sums"] += width
            for k in range(longest):
                for run in range(t.starts[item * longest + k], t.starts[item * longest + k + 1]):
                    held = [load(base + t.places[run] + i) for i in range(width + k)]
                    for n in range(k + 1):
                        sums[item % cout] += t.weight[value] * np.array(held[n : n + width])
                        value += 1
    return sums, count


@pytest.mark.parametrize("pattern", [False, True])
def test_loads_are_those_of_the_loops(pattern):
    rng = np.random.default_rng(1)
    w = rng.standard_normal((3, 3, 5, 9), dtype=np.float32) * (rng.random((5, 9)) < 0.6)
    if pattern:
        w.reshape(9, -1)[[0, 2, 6, 8]] = 0
    s, image = schedule.from_weight(w), rng.standard_normal((1, 7, 6, 5)).astype(np.float32)
    g = pattern_conv.layer_grid(GEOMETRY, (1, 7, 6), 4)
    x = to_planes(image, g)
    expected = to_planes(kernels.reference(image, w, GEOMETRY).astype(np.float32), g)[:, g.margin : -g.margin]
    slots = {"kernels": len(s.place) * s.patterns.shape[1], "runs": np.count_nonzero(w)}
    given = [Plan("kernels", 4, 4, 3), Plan("kernels", 4, 9, 2), Plan("runs", 3, 9, 4, 2), Plan("runs", 1, 9, 4, 5)]
    for plan in given:
        t = schedule.stream(s, GEOMETRY, g, plan)
        found = schedule.loads(t, plan.width)
        for j in (0, 2):
            sums, count = walk(t, x, g.margin + j, g.plane, plan.width)
            inside = (valid(g)[j : j + plan.width, None] >> np.arange(4) & 1)[None] != 0
            np.testing.assert_allclose(sums * inside, expected[t.order, j : j + plan.width], atol=1e-4)
            assert count["inputs"] == pytest.approx(found.filter * plan.width)
            assert count["sums"] == found.sums * plan.width
        assert found.filter <= found.kernel <= found.none
        if plan.order == "runs":
            assert found.none == slots["runs"]
            assert found.filter == found.kernel and (found.kernel < found.none) == (plan.taps > 1)
        else:
            # a visit is a (block, channel, pattern)
            triples = {(int(p) // plan.filters, int(c), int(k)) for p, c, k in zip(*s[1:4], strict=True)}
            parts = -(-s.patterns.shape[1] // schedule.WIDEST)
            width = -(-s.patterns.shape[1] // parts)
            assert found.filter == len(triples) * parts * width and found.none >= slots["kernels"]
