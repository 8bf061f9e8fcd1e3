"""Cost of a mapped network on a chip: copies of layers, frames per second, latency, energy and throughput.

A layer's product takes `sweeps` cycles (input cycles x groups of active rows, fewer with zero skipping). As in ISAAC,
layers work as a pipeline, and layers with many uses are copied until no copy can speed the slowest one:

    t_l = ceil(uses_l * frames / copies_l) * sweeps_l * cycle,   frames per second = frames / max_l t_l,
    copies = argmin max_l t_l   s.t.  sum_l copies_l * arrays_l <= arrays of the chip(s)

With one frame at a time a network so small that every product has a copy of its own gains nothing from arrays that are
left over; with several frames in flight it does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from typing import Any

import numpy as np

from compressx.crossbar.chips import Chip
from compressx.crossbar.design import Design
from compressx.crossbar.mapping import Mapped
from compressx.crossbar.scaling import fitted


@dataclass(frozen=True)
class Stage:
    """A layer in the pipeline.

    Attributes:
      name: of the layer; arrays: of one copy; copies; uses: products for one inference.
      sweeps: cycles of a product (mean, with skipping).
      ns: time for the frames in flight.
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
      design, chip: what it runs on, its parts fitted to the design (`scaling.fitted`).
      chips: how many of them hold one copy of all layers.
      stages: the layers, those without a weight left out.
      operations: 2 x multiply-accumulates of the dense network for one inference, products of two activations among
        them.
      assumptions: everything that was assumed, in words.
      mapped: the layers as they were placed.
      frames: how many pass a stage together.
      signed: layers whose inputs come in two planes, positive and negative.

    Example:
      >>> from compressx import crossbar
      >>> design, layer = crossbar.isaac(), crossbar.dense_layer("w", np.ones((256, 16)))
      >>> plan = crossbar.plan([crossbar.map_layer(layer, design)], design, crossbar.isaac_chip())
      >>> plan.arrays, plan.bottleneck.ns, round(plan.fps)
      (2, 1600.0, 625000)
    """

    design: Design
    chip: Chip
    chips: int
    stages: tuple[Stage, ...]
    operations: int
    assumptions: tuple[str, ...]
    mapped: tuple[Mapped, ...] = ()
    frames: int = 1
    signed: tuple[str, ...] = ()

    @property
    def arrays(self) -> int:
        """Arrays of one copy of each layer."""
        return sum(s.arrays for s in self.stages)

    @property
    def bottleneck(self) -> Stage:
        """The slowest layer."""
        return max(self.stages, key=lambda s: s.ns)

    @property
    def fps(self) -> float:
        """Inferences per second, pipeline full."""
        return self.frames * 1e9 / self.bottleneck.ns

    @property
    def latency_us(self) -> float:
        """The frames in flight, layer after layer without overlap: an upper bound, since ISAAC's layers overlap."""
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
    frames: int = 1,
    signed: Sequence[str] = (),
) -> Plan:
    """Spreads a mapped network over a chip and balances its layers.

    Args:
      mapped: the layers (`mapping.map_network`, with the same design).
      design: gives input cycles and groups.
      chip: gives times, power and area; for a design that its tables do not hold, its parts are scaled.
      sweeps: cycles of a product by layer name, from `zero_skip.measure(...).mean_slowest`; others take all cycles.
      pooled: names of layers followed by pooling (more pipeline stages).
      chips: how many; None: as few as hold one copy of each layer.
      frames: inferences that pass a stage together; 1 is ISAAC's pipeline.
      signed: names of layers with negative inputs, fed as two planes one after the other (a design with two's
        complement inputs needs no second plane, and ignores this).

    Returns:
      A `Plan`: copies of each layer, and from them frames per second, latency, power and energy.

    Raises:
      ValueError: nothing is mapped, the chips or frames are too few, `sweeps` names a layer that is not there, or no
        rule leads from the chip's parts to the design.

    Source: copies of layers and pipeline as in A. Shafiee et al., "ISAAC", 2016; the search for the copies is our own.

    Example:
      >>> from compressx import crossbar
      >>> design = crossbar.isaac()
      >>> conv = crossbar.conv_layer("conv", np.ones((3, 3, 3, 8)), (8, 8))
      >>> top = crossbar.dense_layer("top", np.ones((8, 10)))
      >>> plan = crossbar.plan(crossbar.map_network([conv, top], design), design, crossbar.isaac_chip())
      >>> {s.name: (s.copies, s.ns) for s in plan.stages}  # the convolution has 64 pixels, and a copy for each
      {'conv': (64, 1600.0), 'top': (1, 1600.0)}
    """
    chip = fitted(chip, design)
    layers = [m for m in mapped if m.arrays]
    if not layers:
        raise ValueError("no layer holds a weight: nothing to place")
    for what, names in (("sweeps", sweeps or ()), ("pooled", pooled), ("signed", signed)):
        unknown = sorted(set(names) - {m.name for m in mapped})
        if unknown:
            raise ValueError(f"{what} names {', '.join(unknown)}; layers are {', '.join(m.name for m in mapped)}")
    if frames < 1:
        raise ValueError(f"frames={frames}: at least one passes a stage")
    least = ceil(sum(m.arrays for m in layers) / chip.total_arrays)
    chips = least if chips is None else chips
    if chips < least:
        raise ValueError(f"chips={chips}: one copy of each layer needs {least} of {chip.name}")
    if design.inputs == "twos_complement":
        signed = ()
    cycles = [_sweeps(m, design, sweeps, signed) for m in layers]
    copies = balance([m.uses * frames for m in layers], [m.arrays for m in layers], cycles, chips * chip.total_arrays)
    stages = tuple(
        Stage(
            name=m.name,
            arrays=m.arrays,
            copies=r,
            uses=m.uses,
            sweeps=c,
            ns=ceil(m.uses * frames / r) * c * chip.cycle_ns,
            fill_ns=(chip.overhead_stages + chip.pooling_stages * (m.name in pooled))
            * (chip.cycle_ns * _planes(m, design, signed) * _groups(m, design)),
        )
        for m, c, r in zip(layers, cycles, copies, strict=True)
    )
    operations = 2 * sum(m.rows * m.cols * m.groups * m.uses for m in mapped)
    told = (*assumptions(design, chip, bool(sweeps), frames), *_dynamic(mapped, operations))
    return Plan(design, chip, chips, stages, operations, told, tuple(layers), frames, tuple(signed))


def _dynamic(mapped: Sequence[Mapped], operations: int) -> tuple[str, ...]:
    """What is said of products of two activations, which no array computes."""
    products = [m for m in mapped if m.dynamic]
    if not products:
        return ()
    counted = sum(2 * m.rows * m.cols * m.groups * m.uses for m in products)
    line = f"{counted} of {operations} operations are products of two activations "
    line += f"({', '.join(m.name for m in products)}): digital units compute them, whose time, energy and area are "
    return (line + "not counted here",)


def _groups(m: Mapped, design: Design) -> int:
    """Groups of active rows that the fullest array of a layer is swept through."""
    return min(design.groups, ceil(max(m.kept_rows) / design.active_rows))


def _planes(m: Mapped, design: Design, signed: Sequence[str]) -> int:
    return 2 if design.inputs == "sign_planes" or m.name in signed else 1


def _sweeps(m: Mapped, design: Design, sweeps: Mapping[str, float] | None, signed: Sequence[str]) -> float:
    if sweeps and m.name in sweeps:
        return max(float(sweeps[m.name]), 1.0)  # an input of zeros still takes a cycle to be found one
    return float(design.cycles * _planes(m, design, signed) * _groups(m, design))


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
    """Giga-operations a second with all arrays full and busy: 2 x arrays x rows x weights a row / time of a product.

    Args:
      design: array size, columns of a weight and input cycles.
      chip: how many arrays, and nanoseconds of a cycle.

    Returns:
      10^9 operations a second; a multiplication and its addition are two.

    Example:
      >>> from compressx import crossbar
      >>> round(crossbar.peak_gops(crossbar.isaac(), crossbar.isaac_chip()))
      41288
    """
    weights = design.cols // design.columns_per_weight
    planes = 2 if design.inputs == "sign_planes" else 1
    ns = design.cycles * planes * design.groups * chip.cycle_ns
    return 2 * chip.total_arrays * design.rows * weights / ns


def assumptions(design: Design, chip: Chip, skipping: bool = False, frames: int = 1) -> tuple[str, ...]:
    """Everything that goes into a plan without having been measured on it."""
    return (
        f"{chip.name}: {chip.tiles} tiles x {chip.mcus} MCUs x {chip.arrays} arrays; for chip power all parts are on",
        f"one cycle of {chip.cycle_ns:.2f} ns converts all columns of an array for {design.active_rows} active rows",
        f"a product takes {design.cycles} input cycles"
        + (", fewer where zero skipping was measured (mean of the slowest array)" if skipping else ", no zero skipping")
        + f", times {design.groups} groups of rows in a full array",
        f"pipeline of {chip.overhead_stages} stages + input cycles ({chip.overhead_stages + 16} for 16 bits)",
        f"{chip.pooling_stages} more stages where a layer pools",
        "layers form a pipeline and are copied until the slowest cannot be sped up with the arrays left (ISAAC)"
        + (f", {frames} frames at a time" if frames > 1 else ""),
        "latency adds layers one after another, without overlap: an upper bound",
        "links, buffers and buses keep up with the arrays",
        "power and area are the paper's at its technology (32 nm); no scaling is done here",
        *chip.notes,
    )


def compare(a: Plan, b: Plan) -> dict[str, float]:
    """Frames per second of `a` over `b` as a product of factors, every one shown.

    The array-uses of an inference, b / a, are prune x bits x signs x rounding:
      prune: weights in kept rows and columns, each counted as often as it is used; bits: columns of a magnitude;
      signs: 2 where b has positive and negative arrays and a has not; rounding: what whole arrays gain or lose.
    The time of one is sweeps x skipping x clock:
      sweeps: cycles of an array-use without skipping; skipping: what zero skipping saves; clock: time of a cycle.
    chip: arrays at hand, a / b; balance: the rest, how much better `a` keeps its arrays busy.

    Args:
      a: the plan that is judged.
      b: the plan it is judged by.

    Returns:
      `fps`, the ratio, and each factor by name; the factors multiply to the ratio.

    Example:
      >>> from compressx import crossbar
      >>> design, chip = crossbar.isaac(), crossbar.isaac_chip()
      >>> place = lambda w: crossbar.plan([crossbar.map_layer(crossbar.dense_layer("w", w), design)], design, chip)
      >>> pruned = np.where(np.arange(256)[:, None] < 128, 1.0, 0.0) * np.ones((256, 16))
      >>> ratio = crossbar.compare(place(pruned), place(np.ones((256, 16))))
      >>> ratio["prune"], ratio["fps"]  # half of the arrays; one layer that is used once gains no time
      (2.0, 1.0)
    """
    arrays = _array_uses(b) / _array_uses(a)
    prune, columns = _kept_uses(b) / _kept_uses(a), b.design.columns_per_weight / a.design.columns_per_weight
    bits = b.design.slices / a.design.slices
    factors = {
        "prune": prune,
        "bits": bits,
        "signs": columns / bits,
        "rounding": arrays / (prune * columns),
        "sweeps": _mean_sweeps(b, False) / _mean_sweeps(a, False),
        "skipping": _saving(a) / _saving(b),
        "clock": b.chip.cycle_ns / a.chip.cycle_ns,
        "chip": (a.chips * a.chip.total_arrays) / (b.chips * b.chip.total_arrays),
    }
    ratio = a.fps / b.fps
    factors["balance"] = ratio / float(np.prod(list(factors.values())))
    return {"fps": ratio, **factors}


def _array_uses(p: Plan) -> float:
    return sum(s.arrays * s.uses for s in p.stages)


def _kept_uses(p: Plan) -> float:
    return sum(m.uses * sum(r * c for r, c in zip(m.kept_rows, m.kept_cols, strict=True)) for m in p.mapped)


def _mean_sweeps(p: Plan, skipping: bool) -> float:
    """Mean cycles of an array-use."""
    pairs = zip(p.stages, p.mapped, strict=True)
    cycles = [s.sweeps if skipping else _sweeps(m, p.design, None, p.signed) for s, m in pairs]
    return sum(s.arrays * s.uses * c for s, c in zip(p.stages, cycles, strict=True)) / _array_uses(p)


def _saving(p: Plan) -> float:
    """Cycles without over cycles with what `sweeps` said."""
    return _mean_sweeps(p, False) / _mean_sweeps(p, True)
