"""Cost of a mapped network on a chip: copies of layers, frames per second, latency, energy and throughput.

A layer's product takes `sweeps` cycles (input cycles x groups of active rows, fewer with zero skipping). As in ISAAC,
layers work as a pipeline, and layers with many uses are copied until no copy can speed the slowest one:

    t_l = ceil(uses_l / copies_l) * sweeps_l * cycle,   frames per second = 1 / max_l t_l,
    copies = argmin max_l t_l   s.t.  sum_l copies_l * arrays_l <= arrays of the chip(s)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np

from compressx.crossbar.chips import Chip
from compressx.crossbar.design import Design
from compressx.crossbar.mapping import Mapped


@dataclass(frozen=True)
class Stage:
    """A layer in the pipeline.

    Attributes:
      name: of the layer; arrays: of one copy; copies; uses: products for one inference.
      sweeps: cycles of a product (mean, with skipping).
      ns: time for one inference.
      fill_ns: pipeline stages besides the sweeps, passed once.
    """

    name: str
    arrays: int
    copies: int
    uses: int
    sweeps: float
    ns: float
    fill_ns: float


@dataclass(frozen=True)
class Plan:
    """A network on chips.

    Attributes:
      design, chip: what it runs on; chips: how many of them hold one copy of all layers.
      stages: the layers, those without a weight left out.
      operations: 2 x multiply-accumulates of the dense network for one inference.
      assumptions: everything that was assumed, in words.
    """

    design: Design
    chip: Chip
    chips: int
    stages: tuple[Stage, ...]
    operations: int
    assumptions: tuple[str, ...]

    @property
    def arrays(self) -> int:
        """Arrays of one copy of each layer."""
        return sum(s.arrays for s in self.stages)

    @property
    def used_arrays(self) -> int:
        """Arrays of all copies."""
        return sum(s.arrays * s.copies for s in self.stages)

    @property
    def bottleneck(self) -> Stage:
        """The slowest layer."""
        return max(self.stages, key=lambda s: s.ns)

    @property
    def fps(self) -> float:
        """Inferences per second, pipeline full."""
        return 1e9 / self.bottleneck.ns

    @property
    def latency_us(self) -> float:
        """One inference, layer after layer without overlap: an upper bound, since ISAAC's layers overlap."""
        return sum(s.ns + s.fill_ns for s in self.stages) / 1e3

    @property
    def watts(self) -> float:
        """Power with every part of the chips on."""
        return self.chips * self.chip.mw / 1e3

    @property
    def mm2(self) -> float:
        """Area of the chips."""
        return self.chips * self.chip.mm2

    @property
    def chip_mj(self) -> float:
        """Energy of an inference with every part always on: power / frames per second."""
        return self.watts / self.fps * 1e3

    @property
    def array_mj(self) -> float:
        """Energy of an inference spent in MCUs that compute: (MCU power / arrays) x array-time; no idle part counts."""
        per_array = self.chip.mcu_mw / self.chip.arrays
        busy_ns = sum(s.arrays * s.uses * s.sweeps * self.chip.cycle_ns for s in self.stages)
        return per_array * busy_ns * 1e-9

    @property
    def gops_per_watt(self) -> float:
        """Operations of the dense network a second, per watt: pruned ones count, so that networks compare."""
        return self.operations * self.fps / 1e9 / self.watts

    @property
    def gops_per_mm2(self) -> float:
        """The same per area."""
        return self.operations * self.fps / 1e9 / self.mm2

    def rows(self) -> list[dict[str, Any]]:
        """The layers as rows of a table."""
        return [
            {
                "layer": s.name,
                "arrays": s.arrays,
                "copies": s.copies,
                "uses": s.uses,
                "cycles a product": s.sweeps,
                "us": s.ns / 1e3,
            }
            for s in self.stages
        ]


def plan(
    mapped: Sequence[Mapped],
    design: Design,
    chip: Chip,
    sweeps: Mapping[str, float] | None = None,
    pooled: Sequence[str] = (),
    chips: int | None = None,
) -> Plan:
    """Spreads a mapped network over a chip and balances its layers.

    Args:
      mapped: the layers (`mapping.map_network`, with the same design).
      design: gives input cycles and groups.
      chip: gives times, power and area.
      sweeps: cycles of a product by layer name, from `zero_skip.measure(...).mean_slowest`; others take all cycles.
      pooled: names of layers followed by pooling (more pipeline stages).
      chips: how many; None: as few as hold one copy of each layer.

    Raises:
      ValueError: nothing is mapped, the chips are too few, or `sweeps` names a layer that is not there.
    """
    layers = [m for m in mapped if m.arrays]
    if not layers:
        raise ValueError("no layer holds a weight: nothing to place")
    for what, names in (("sweeps", sweeps or ()), ("pooled", pooled)):
        unknown = sorted(set(names) - {m.name for m in mapped})
        if unknown:
            raise ValueError(f"{what} names {', '.join(unknown)}; layers are {', '.join(m.name for m in mapped)}")
    least = ceil(sum(m.arrays for m in layers) / chip.total_arrays)
    chips = least if chips is None else chips
    if chips < least:
        raise ValueError(f"chips={chips}: one copy of each layer needs {least} of {chip.name}")
    cycles = [_sweeps(m, design, sweeps) for m in layers]
    copies = balance([m.uses for m in layers], [m.arrays for m in layers], cycles, chips * chip.total_arrays)
    planes = 2 if design.inputs == "sign_planes" else 1
    group_ns = chip.cycle_ns * planes
    stages = tuple(
        Stage(
            name=m.name,
            arrays=m.arrays,
            copies=r,
            uses=m.uses,
            sweeps=c,
            ns=ceil(m.uses / r) * c * chip.cycle_ns,
            fill_ns=(chip.overhead_stages + chip.pooling_stages * (m.name in pooled)) * group_ns * _groups(m, design),
        )
        for m, c, r in zip(layers, cycles, copies, strict=True)
    )
    operations = 2 * sum(m.rows * m.cols * m.groups * m.uses for m in mapped)
    return Plan(design, chip, chips, stages, operations, assumptions(design, chip, bool(sweeps)))


def _groups(m: Mapped, design: Design) -> int:
    """Groups of active rows that the fullest array of a layer is swept through."""
    return min(design.groups, ceil(max(m.kept_rows) / design.active_rows))


def _sweeps(m: Mapped, design: Design, sweeps: Mapping[str, float] | None) -> float:
    if sweeps and m.name in sweeps:
        return max(float(sweeps[m.name]), 1.0)  # an input of zeros still takes a cycle to be found one
    return float(design.cycles * (2 if design.inputs == "sign_planes" else 1) * _groups(m, design))


def balance(uses: Sequence[int], arrays: Sequence[int], cycles: Sequence[float], budget: int) -> list[int]:
    """Copies of each layer that make the slowest as fast as the budget of arrays allows; exact.

        argmin_r max_l ceil(uses_l / r_l) * cycles_l   s.t.   sum_l r_l arrays_l <= budget,  r_l >= 1

    The optimum is one of the times q * cycles_l; for a time, the fewest copies are known. Among optimal answers it is
    the one with the fewest copies.
    """

    def fewest(limit: float) -> list[int] | None:
        copies = []
        for u, c in zip(uses, cycles, strict=True):
            turns = floor(limit / c + 1e-9)
            if turns < 1:
                return None
            copies.append(ceil(u / turns))
        return copies if sum(r * a for r, a in zip(copies, arrays, strict=True)) <= budget else None

    times = np.unique(np.concatenate([c * np.arange(1, u + 1) for u, c in zip(uses, cycles, strict=True)]))
    low, high = 0, len(times) - 1
    if fewest(times[high]) is None:
        raise ValueError(f"one copy of each layer takes {sum(arrays)} arrays, there are {budget}")
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fewest(times[middle]) is not None else (middle + 1, high)
    found = fewest(times[low])
    assert found is not None
    return found


def peak_gops(design: Design, chip: Chip) -> float:
    """Giga-operations a second with all arrays full and busy: 2 x arrays x rows x weights a row / time of a product."""
    weights = design.cols // design.columns_per_weight
    planes = 2 if design.inputs == "sign_planes" else 1
    ns = design.cycles * planes * design.groups * chip.cycle_ns
    return 2 * chip.total_arrays * design.rows * weights / ns


def assumptions(design: Design, chip: Chip, skipping: bool = False) -> tuple[str, ...]:
    """Everything that goes into a plan without having been measured on it."""
    return (
        f"{chip.name}: {chip.tiles} tiles x {chip.mcus} MCUs x {chip.arrays} arrays; for chip power all parts are on",
        f"one cycle of {chip.cycle_ns:.2f} ns converts all columns of an array for {design.active_rows} active rows",
        f"a product takes {design.cycles} input cycles"
        + (", fewer where zero skipping was measured (mean of the slowest array)" if skipping else ", no zero skipping")
        + f", times {design.groups} groups of rows in a full array",
        f"pipeline of {chip.overhead_stages} stages + input cycles ({chip.overhead_stages + 16} for 16 bits)",
        f"{chip.pooling_stages} more stages where a layer pools",
        "layers form a pipeline and are copied until the slowest cannot be sped up with the arrays left (ISAAC)",
        "latency adds layers one after another, without overlap: an upper bound",
        "links, buffers and buses keep up with the arrays",
        "power and area are the paper's at its technology (32 nm); no scaling is done here",
        *chip.notes,
    )


def compare(a: Plan, b: Plan) -> dict[str, float]:
    """Frames per second of `a` over `b` as a product of factors, every one shown.

    arrays: array-uses of an inference, b / a (pruning x bits x signs); chip: arrays at hand, a / b; cycles: mean cycles
    of an array-use, b / a (sweeps and skipping); clock: cycle times, b / a; balance: the rest, how much better `a`
    fills its arrays.
    """
    work = lambda p: sum(s.arrays * s.uses * s.sweeps for s in p.stages) / sum(s.arrays * s.uses for s in p.stages)
    area = lambda p: sum(s.arrays * s.uses for s in p.stages)
    factors = {
        "arrays": area(b) / area(a),
        "chip": (a.chips * a.chip.total_arrays) / (b.chips * b.chip.total_arrays),
        "cycles": work(b) / work(a),
        "clock": b.chip.cycle_ns / a.chip.cycle_ns,
    }
    ratio = a.fps / b.fps
    factors["balance"] = ratio / float(np.prod(list(factors.values())))
    return {"fps": ratio, **factors}
