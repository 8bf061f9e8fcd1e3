"""Energy of an inference, layer by layer and component by component, counted from what the layers really do.

    energy of a component = events x energy of one,    energy of one = power of all / events of a full array in a cycle

Events follow the layer as it lies in the arrays: conversions are of columns in use, drives of rows in use, reads of
cells in kept rows and columns, each as often as the layer is used and swept. A full array that is always busy takes
exactly its share of the chip's stated power. Idle parts, links and memory outside the tiles take nothing here:
`Plan.chip_mj` has them, at full power.
"""

from math import ceil

from compressx.crossbar.cost import Plan

_PER_COLUMN, _PER_ROW = ("adc", "hold", "columns"), ("dac", "rows")


def layer_energy(plan: Plan) -> list[dict[str, float | str]]:
    """Energy of one inference by layer and component, in nJ.

    Args:
      plan: of `cost.plan`; measured skipping shortens the sweeps that are counted.

    Returns:
      A row for each layer: `layer`, `conversions`, `row drives` and `cell reads` of one inference, an entry in nJ for
      each part of the chip, `digital` (the tiles' buffers, buses and units while the layer's arrays are busy), `nJ`.

    Example:
      >>> import numpy as np
      >>> from compressx.crossbar import chips, cost, mapping, presets
      >>> layers, design = [mapping.dense_layer("fc", np.ones((128, 16)))], presets.isaac()
      >>> row, = layer_energy(cost.plan(mapping.map_network(layers, design), design, chips.isaac_chip()))
      >>> row["conversions"], round(row["ADC"], 3), round(row["nJ"], 3)  # one full array, 16 cycles of 100 ns
      (2048, 3.2, 5.497)
    """
    chip, design = plan.chip, plan.design
    rows = []
    for stage, m in zip(plan.stages, plan.mapped, strict=True):
        columns = [kept * design.columns_per_weight for kept in m.kept_cols]
        blocks = [(ceil(k / design.rows), ceil(c / design.cols)) for k, c in zip(m.kept_rows, columns, strict=True)]
        turns = stage.uses * stage.sweeps  # cycles of every array of the layer
        groups = max(1, min(design.groups, ceil(max(m.kept_rows) / design.active_rows)))
        converted = sum(down * c for (down, _), c in zip(blocks, columns, strict=True)) * turns
        # In a sweep every row is driven once a cycle of its own group of active rows.
        driven = sum(k * across for (_, across), k in zip(blocks, m.kept_rows, strict=True)) * turns / groups
        read = sum(k * c for k, c in zip(m.kept_rows, columns, strict=True)) * turns / groups
        busy = m.arrays * turns
        events = {"array": read / (design.active_rows * design.cols), "": busy}
        events |= dict.fromkeys(_PER_COLUMN, converted / design.cols)
        events |= dict.fromkeys(_PER_ROW, driven / design.active_rows)
        a_cycle = chip.cycle_ns / chip.arrays / 1e3  # nJ of a mW of an MCU's part, in one array and cycle
        parts = {p.name: p.mw * a_cycle * events[p.kind] for p in chip.parts}
        parts["digital"] = chip.digital_mw * a_cycle / chip.mcus * busy
        counts = {"conversions": round(converted), "row drives": round(driven), "cell reads": round(read)}
        rows.append({"layer": m.name, **counts, **parts, "nJ": sum(parts.values())})
    return rows
