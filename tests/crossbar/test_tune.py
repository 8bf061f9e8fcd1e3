"""The formulation is chosen by measuring, among those that can run the design, and once."""

import numpy as np
import pytest

from compressx.crossbar import arrays, tune
from compressx.crossbar.design import Adc, Design
from compressx.crossbar.program import program

SMALL = Design(rows=16, cols=64, active_rows=16, input_bits=2, weight_bits=2, adc=Adc(4))


def test_every_formulation_is_timed():
    times = tune.measure_paths(SMALL, rows=16, filters=2, batch=2, rounds=1)
    assert set(times) == {"popcount", "folded", "integer"} == set(arrays.paths_for(SMALL))
    assert all(t > 0 for t in times.values())
    assert set(arrays.paths_for(SMALL.but(active_rows=8))) == set(arrays.PATHS)
    assert "integer" not in arrays.paths_for(SMALL.but(dac_bits=8, adc=Adc(16)))


def test_off_the_cpu_the_choice_is_measured_and_kept(monkeypatch):
    asked = []

    def measured(design, *sizes):
        asked.append(design)
        return {"folded": 2.0, "integer": 1.0, "popcount": 3.0}

    monkeypatch.setattr(tune, "measure_paths", measured)
    tune.fastest_path.cache_clear()
    assert tune.pick_path(SMALL) == "popcount" and not asked
    monkeypatch.setattr(tune.jax, "default_backend", lambda: "gpu")
    assert [tune.pick_path(SMALL) for _ in range(3)] == ["integer"] * 3
    assert asked == [SMALL]
    tune.fastest_path.cache_clear()


def test_a_formulation_that_cannot_run_is_refused():
    with pytest.raises(ValueError, match="path 'table' needs at most 8 active rows"):
        program(np.ones((1, 1), int), SMALL, path="table")
