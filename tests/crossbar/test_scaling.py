"""Costs that follow the design: the law of converters through both published ones, and energies that add up."""

import numpy as np
import pytest

from compressx.crossbar import chips, cost, mapping
from compressx.crossbar.energy import layer_energy
from compressx.crossbar.presets import forms, isaac, prime_like, puma_like
from compressx.crossbar.scaling import adc_law, fitted


def test_the_law_passes_through_both_published_converters():
    energy, area = adc_law(4)
    assert energy == pytest.approx((15.2 / 32 / 2.1) / (16 / 8 / 1.2)) and area == pytest.approx(0.0091 / 32 / 0.0012)
    assert adc_law(8) == pytest.approx((1, 1))
    laws = np.array([adc_law(b) for b in range(1, 15)])
    assert (np.diff(laws, axis=0) > 0).all()


def _plan(design, chip, layers=None):
    layers = layers or [mapping.dense_layer("fc", np.ones((2048, 10)))]
    return cost.plan(mapping.map_network(layers, design), design, chip)


def test_a_wider_converter_costs_more_and_a_narrower_one_less():
    plans = [_plan(isaac().but(adc_bits=b), chips.isaac_chip()) for b in (4, 6, 8, 12)]
    for a, b in zip(plans, plans[1:], strict=False):
        assert a.watts < b.watts and a.mm2 < b.mm2 and a.array_mj < b.array_mj
    assert plans[2].chip == chips.isaac_chip() and any("scaled by the rules" in line for line in plans[0].assumptions)
    assert any("extrapolation" in line for line in plans[3].assumptions)


def test_larger_arrays_take_their_power_and_area():
    small, large = isaac(), isaac().but(rows=512, cols=512, active_rows=512)
    ratio = cost.peak_gops(large, chips.isaac_chip()) / cost.peak_gops(small, chips.isaac_chip())
    a, b = _plan(small, chips.isaac_chip()), _plan(large, chips.isaac_chip())
    part = lambda plan, kind: sum(p.mw for p in plan.chip.parts if p.kind == kind)
    assert ratio == pytest.approx(16)
    assert part(b, "adc") == pytest.approx(4 * part(a, "adc"))
    assert part(b, "array") == pytest.approx(16 * part(a, "array"))
    assert b.watts > 4 * a.watts and b.mm2 > a.mm2


def test_what_no_rule_leads_to_is_refused():
    with pytest.raises(ValueError, match="no rule for another DAC"):
        fitted(chips.isaac_chip(), isaac().but(dac_bits=2, inputs="unsigned"))
    with pytest.raises(ValueError, match="not told apart"):
        fitted(chips.puma_chip(), puma_like().but(adc_bits=6))
    for make, chip in ((isaac, "isaac"), (forms, "forms"), (puma_like, "puma"), (prime_like, "prime_like")):
        assert fitted(chips.CHIPS[chip](), make()) == chips.CHIPS[chip]()


def test_a_full_array_takes_its_share_of_the_chip():
    """A layer that fills 4 arrays, on both chips: the parts of their MCUs and the tiles' digital units, while busy."""
    for design, chip in ((isaac(), chips.isaac_chip()), (forms(8), chips.forms_chip())):
        filters = 2 * 128 // design.columns_per_weight
        plan = _plan(design, chip, [mapping.dense_layer("fc", np.ones((256, filters)))])
        (row,) = layer_energy(plan)
        busy_ns = 4 * plan.stages[0].sweeps * chip.cycle_ns
        wanted = (chip.mcu_mw / chip.arrays + chip.digital_mw / chip.arrays / chip.mcus) * busy_ns / 1e3
        assert row["nJ"] == pytest.approx(wanted)
        assert row["nJ"] - row["digital"] == pytest.approx(plan.array_mj * 1e6)
        assert row["conversions"] == 2 * 2 * 128 * plan.stages[0].sweeps


def test_pruned_columns_are_not_converted_and_skipped_cycles_not_counted():
    w = np.ones((128, 32))
    w[:, 16:] = 0
    design, chip = forms(8), chips.forms_chip()
    mapped = mapping.map_network([mapping.dense_layer("fc", w)], design)
    (full,) = layer_energy(cost.plan(mapped, design, chip))
    assert full["conversions"] == 16 * 4 * 256 and full["cell reads"] == 128 * 64 * 16
    (half,) = layer_energy(cost.plan(mapped, design, chip, sweeps={"fc": 128.0}))
    assert half["nJ"] == pytest.approx(full["nJ"] / 2)
