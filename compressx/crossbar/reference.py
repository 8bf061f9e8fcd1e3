"""The definition of a crossbar's matrix product: slow, in plain integers, one conversion at a time.

Everything fast in this package must equal it bit for bit.
"""

from typing import NamedTuple

import numpy as np

from compressx.crossbar.design import Design


class Result(NamedTuple):
    """What a crossbar gives.

    Attributes:
      y: int64 `[n, F]`, the product in units of 1 / (denominator of the ADC's lsb).
      clipped: conversions whose code was clipped; conversions: all of them.
    """

    y: np.ndarray
    clipped: int
    conversions: int


def reference(x: np.ndarray, w: np.ndarray, design: Design) -> Result:
    """The product of integer inputs `[n, P]` with integer weights `[P, F]`, as the engine computes it.

        y = sum_groups sign * sum_cycles 2^(v t) * sum_slices 2^(b s) * value(ADC(sum_rows digit * cell))  [- offset]

    All P rows lie on the array in order, zeros among them (no compaction). The last group may be short.
    """
    x, w = np.asarray(x, np.int64), np.asarray(w, np.int64)
    if design.inputs == "sign_planes":
        plain = design.but(inputs="unsigned")
        plus, minus = reference(np.maximum(x, 0), w, plain), reference(np.maximum(-x, 0), w, plain)
        return Result(plus.y - minus.y, plus.clipped + minus.clipped, plus.conversions + minus.conversions)
    y = np.zeros((len(x), w.shape[1]), np.int64)
    clipped = conversions = 0
    for start in range(0, len(w), design.active_rows):
        rows = slice(start, start + design.active_rows)
        for f in range(w.shape[1]):
            for sign, weight, column in _columns(w[rows, f], design):
                for n in range(len(x)):
                    for t, power in enumerate(design.cycle_weights):
                        digits = (x[n, rows] >> (design.dac_bits * t)) & (2**design.dac_bits - 1)
                        value, cut = _read(digits, column, design)
                        y[n, f] += sign * weight * power * value
                        clipped, conversions = clipped + cut, conversions + 1
    if design.signs == "offset":
        unit = x.sum(axis=1) * 2 ** (design.weight_bits - 1) * design.adc.lsb.denominator
        y -= unit[:, None]
    return Result(y, clipped, conversions)


def _columns(w: np.ndarray, design: Design) -> list[tuple[int, int, np.ndarray]]:
    """The physical columns of one filter's group of rows: (sign of the group, weight of the column, levels)."""
    sign = 1
    if design.signs == "offset":
        parts = [(1, w + 2 ** (design.weight_bits - 1))]
    elif design.signs == "polarized":
        sign, parts = (-1 if (w < 0).any() else 1), [(1, np.abs(w))]
    else:
        parts = [(1, np.maximum(w, 0)), (-1, np.maximum(-w, 0))]
    columns = []
    for side, stored in parts:
        for s in range(design.slices):
            b = design.device.cell_bits
            columns.append((side * 2 ** (b * s), (stored >> (b * s)) % 2**b))
    if design.signed_sums:  # currents of the two arrays meet before the ADC
        half = len(columns) // 2
        columns = [(columns[i][0], columns[i][1] - columns[half + i][1]) for i in range(half)]
    return [(sign, weight, levels) for weight, levels in columns]


def _read(digits: np.ndarray, levels: np.ndarray, design: Design) -> tuple[int, int]:
    """One conversion: its value in units of 1/den, and whether the code was clipped."""
    num, den, top = design.adc.lsb.numerator, design.adc.lsb.denominator, design.device.top
    flip = design.adc.encoding == "flip" and 2 * levels.sum() > top * len(levels)
    total = int((digits * (top - levels if flip else levels)).sum())
    code = (2 * total * den + num) // (2 * num)
    kept = code
    if design.adc.encoding != "ideal":
        low, high = design.adc.limits(design.signed_sums)
        kept = min(max(code, low), high)
    value = kept * num
    return (top * den * int(digits.sum()) - value if flip else value), int(kept != code)
