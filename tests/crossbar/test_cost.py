"""Cost: the papers' totals from their parts, exact balance against brute force, and factors that multiply up."""

import itertools
from math import ceil

import numpy as np
import pytest

from compressx.crossbar import chips, cost, mapping
from compressx.crossbar.presets import forms, isaac, puma_like


def test_forms_totals():
    chip = chips.forms_chip()
    assert chip.mcus_mw == pytest.approx(280.05, abs=1e-6)
    assert chip.tile_mw == pytest.approx(333.1, abs=1e-6)
    assert chip.tiles * chip.tile_mw == pytest.approx(55960.8, abs=1e-3)
    assert chip.mw == pytest.approx(66360.8, abs=1e-3)
    assert chip.mcus * chip.mcu_mm2 == pytest.approx(0.152, abs=5e-4)
    assert chip.cycle_ns == pytest.approx(15.24, abs=0.005)


def test_isaac_totals():
    chip = chips.isaac_chip()
    assert chip.mcus_mw == pytest.approx(288.96, abs=1e-6)
    assert chip.tile_mw == pytest.approx(329.81, abs=1e-6)
    assert chip.mw == pytest.approx(65808.08, abs=1e-3)
    assert chip.mm2 == pytest.approx(85.09, rel=2e-3)


def test_isaac_efficiency():
    """627.5 GOPS/W is 41288 GOPS over the printed 65.8 W."""
    gops = cost.peak_gops(isaac(), chips.isaac_chip())
    assert gops == pytest.approx(41288, abs=1)
    assert gops / 65.8 == pytest.approx(627.5, abs=0.05)
    assert gops / (chips.isaac_chip().mw / 1e3) == pytest.approx(627.5, abs=0.15)


@pytest.mark.parametrize(("fragment", "per_area", "per_watt"), [(8, 0.39, 0.41), (16, 0.78, 0.81)])
def test_forms_polarization_only_from_first_principles(fragment, per_area, per_watt):
    design = forms(fragment, weight_bits=16)
    ratio = cost.peak_gops(design, chips.forms_chip()) / cost.peak_gops(isaac(), chips.isaac_chip())
    assert ratio / (89.15 / 85.09) == pytest.approx(per_area, abs=0.006)
    assert ratio / (66360.8 / 65808.08) == pytest.approx(per_watt, abs=0.006)


def test_inconsistencies_are_recomputed():
    found = {i.where: i for i in chips.known_inconsistencies()}
    assert len(found) == 11 and "0.402" in found["table IV, area of FORMS' tile"].recomputed
    assert "289.32 mW" in found["table III, ISAAC's arrays"].recomputed
    assert "+0.84 %" in found["text, chip power against ISAAC"].recomputed
    assert "+4.77 %" in found["text, chip area against ISAAC"].recomputed
    assert "1.50x, 1.93x" in found["headline ratios"].recomputed
    assert "1.36x, 1.04x" in found["headline ratios"].recomputed


def test_every_part_has_a_source():
    for make in chips.CHIPS.values():
        assert all("20" in part.source and part.mw > 0 for part in make().parts)
        assert len(make().rows()) == len(make().parts)


@pytest.mark.parametrize("seed", range(6))
def test_balance_is_optimal(seed):
    rng = np.random.default_rng(seed)
    uses, arrays = rng.integers(1, 9, 3), rng.integers(1, 4, 3)
    cycles = rng.choice([1.0, 2.0, 3.5], 3)
    budget = int(arrays.sum() + rng.integers(0, 12))
    time = lambda copies: max(ceil(u / r) * c for u, r, c in zip(uses, copies, cycles, strict=True))
    cost_of = lambda copies: sum(r * a for r, a in zip(copies, arrays, strict=True))
    feasible = [r for r in itertools.product(range(1, 10), repeat=3) if cost_of(r) <= budget]
    best = min(map(time, feasible))
    found = cost.balance([int(u) for u in uses], [int(a) for a in arrays], list(cycles), budget)
    assert cost_of(found) <= budget and time(found) == best
    assert cost_of(found) == min(cost_of(r) for r in feasible if time(r) == best)


def _layers():
    return [
        mapping.conv_layer("conv", np.ones((3, 3, 16, 32)), (8, 8)),
        mapping.dense_layer("fc", np.ones((2048, 10))),
    ]


def test_plan_by_hand():
    design, chip = isaac(), chips.isaac_chip()
    found = cost.plan(mapping.map_network(_layers(), design), design, chip)
    conv, fc = found.stages
    # 144 rows, 32 filters of 8 cells: 2 x 2 arrays; 16 x 1 arrays for 2048 x 10
    assert (conv.arrays, fc.arrays, found.chips) == (4, 16, 1)
    assert conv.copies == 64 and found.bottleneck.ns == 16 * 100  # room for a copy per pixel: one product a frame
    assert found.fps == pytest.approx(1e9 / 1600)
    assert conv.fill_ns == 6 * 100
    assert found.latency_us == pytest.approx(2 * 2.2)  # twice 22 stages of 100 ns
    assert found.chip_mj == pytest.approx(65808.08 * 1600e-9)
    assert found.array_mj == pytest.approx(24.08 / 8 * (4 * 64 + 16) * 1600e-9)
    assert found.operations == 2 * (64 * 144 * 32 + 2048 * 10)
    assert any("22 for 16 bits" in line for line in found.assumptions)
    assert len(found.rows()) == 2


def test_skipping_shortens_and_more_chips_hold_more():
    design, chip = forms(8), chips.forms_chip()
    mapped = mapping.map_network(_layers(), design)
    full = cost.plan(mapped, design, chip)
    assert full.stages[1].sweeps == 16 * 16 and full.stages[1].fill_ns == pytest.approx(6 * 16 * chip.cycle_ns)
    half = cost.plan(mapped, design, chip, sweeps={"conv": 128.0, "fc": 128.0}, pooled=("conv",))
    assert half.fps == pytest.approx(2 * full.fps)
    assert half.stages[0].fill_ns == pytest.approx(10 * 16 * chip.cycle_ns)
    small = chips.Chip("small", chip.parts, 1.0, 1.0, 10.0, tiles=1, mcus=1, arrays=2)
    many = cost.plan(mapped, design, small)
    assert many.chips == ceil(many.arrays / 2) and many.watts == pytest.approx(many.chips * small.mw / 1e3)


def test_factors_multiply_to_the_ratio():
    a, b = forms(8), isaac()
    pa = cost.plan(mapping.map_network(_layers(), a), a, chips.forms_chip())
    pb = cost.plan(mapping.map_network(_layers(), b), b, chips.isaac_chip())
    found = cost.compare(pa, pb)
    assert found["fps"] == pytest.approx(pa.fps / pb.fps)
    assert found["fps"] == pytest.approx(np.prod([v for k, v in found.items() if k != "fps"]))
    assert found["clock"] == pytest.approx(100 / chips.forms_chip().cycle_ns)
    assert found["sweeps"] == pytest.approx(16 / 256) and found["skipping"] == 1
    assert (found["prune"], found["bits"], found["signs"]) == (1, 2, 1)  # 16 bits with an offset against 8
    skipped = cost.plan(mapping.map_network(_layers(), a), a, chips.forms_chip(), sweeps={"conv": 64.0, "fc": 64.0})
    more = cost.compare(skipped, pb)
    assert more["skipping"] == pytest.approx(4) and more["fps"] == pytest.approx(4 * found["fps"])
    assert more["fps"] == pytest.approx(np.prod([v for k, v in more.items() if k != "fps"]))


def test_frames_in_flight_let_a_small_network_fill_the_chip():
    design, chip = isaac(), chips.isaac_chip()
    mapped = mapping.map_network(_layers(), design)
    one, many = cost.plan(mapped, design, chip), cost.plan(mapped, design, chip, frames=256)
    work = sum(s.arrays * s.uses for s in one.stages) * 1600  # array-time of a frame
    bound = 1e9 * chip.total_arrays / work
    assert one.fps < 0.1 * bound and 0.8 * bound < many.fps <= bound
    assert sum(s.arrays * s.copies for s in many.stages) <= chip.total_arrays
    assert many.array_mj == pytest.approx(one.array_mj)


def test_signed_inputs_take_two_passes_but_not_in_twos_complement():
    design = forms(8)
    mapped = mapping.map_network(_layers(), design)
    plain = cost.plan(mapped, design, chips.forms_chip())
    signed = cost.plan(mapped, design, chips.forms_chip(), signed=("conv",))
    assert signed.stages[0].sweeps == 2 * plain.stages[0].sweeps and signed.stages[1] == plain.stages[1]
    assert cost.compare(signed, plain)["sweeps"] < 1
    wide = mapping.map_network(_layers(), isaac())
    both = [cost.plan(wide, isaac(), chips.isaac_chip(), signed=s) for s in ((), ("conv",))]
    assert both[0].stages == both[1].stages


def test_puma_totals():
    chip = chips.puma_chip()
    assert chip.mw == pytest.approx(62500) and chip.mm2 == pytest.approx(90.6) and chip.tile_mw == pytest.approx(373.8)
    assert cost.peak_gops(puma_like(), chip) == pytest.approx(52310, rel=1e-6)


def test_refuses():
    design, chip = forms(8), chips.forms_chip()
    mapped = mapping.map_network(_layers(), design)
    with pytest.raises(ValueError, match="sweeps names conv9; layers are conv, fc"):
        cost.plan(mapped, design, chip, sweeps={"conv9": 1.0})
    with pytest.raises(ValueError, match="needs 1 of FORMS"):
        cost.plan(mapped, design, chip, chips=0)
    with pytest.raises(ValueError, match="no layer holds a weight"):
        cost.plan(mapping.map_network([mapping.dense_layer("z", np.zeros((2, 2)))], design), design, chip)
    with pytest.raises(ValueError, match="there are 2"):
        cost.balance([1, 1], [2, 2], [1.0, 1.0], 2)
