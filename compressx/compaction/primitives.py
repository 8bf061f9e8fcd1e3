"""What each primitive does to channels: which indices of its operands and results stand for the same unit.

A *unit* is what stays or goes as one: filter 3 of a convolution, the same entry of its normalisation, channel 3 of what
it is added to, input channel 3 of whoever reads the sum. Every axis of every value carries the units of its indices, or
None where it is *fixed* (batch, space, classes: never cut). A rule joins the units of the operands and gives those of
the results; a primitive without a rule fixes everything it touches.
"""

import math
from collections.abc import Callable, Container, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from compressx.trace import Op

Axis = np.ndarray | None  # units along an axis; None: fixed; of a stacked leaf `[steps, n]`, each step's own
Axes = list[Axis]
Shape = tuple[int, ...]


class Contraction(NamedTuple):
    """Where one unit's values flow into others: a sum over an axis that both operands of an op share.

    Attributes:
      op: number of the op.
      axes: the summed axis of the left and of the right operand; None on the right of a plain sum, which has no second.
      free: the axis of each operand whose indices the sums are told apart by; None where none or several have units.
    """

    op: int
    axes: tuple[int, int | None]
    free: tuple[int | None, int | None]


class Choice(NamedTuple):
    """Of several axes that a reshape could cut, the one that it does, and what else there is.

    Attributes:
      key: names the reshape and the run of axes in it.
      units: along the axis that is taken.
      more: whether another axis is left to be taken, should this one turn out to be fixed.
    """

    key: tuple[Any, ...]
    units: np.ndarray
    more: bool


class Units:
    """Collects which units are joined, and which are fixed and why, while a program is walked."""

    def __init__(self, weights: Container[int], constants: Mapping[int, Any] | None = None) -> None:
        self.weights = weights  # values that depend on the variables alone
        self.constants = constants or {}
        self.count = 1  # unit 0 is the fixed one
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.fixed: list[tuple[np.ndarray, str]] = []
        self.roles: list[tuple[np.ndarray, str]] = []
        self.contractions: list[Contraction] = []
        self.scope: tuple[int, ...] = ()  # the ops in whose bodies the walk is
        self.passed: dict[tuple[Any, ...], int] = {}  # key of a choice -> how many axes turned out to be fixed
        self.choices: list[Choice] = []
        self._loose: list[tuple[int, int]] = []

    def fresh(self, n: int, loose: bool = False) -> np.ndarray:
        """New units; loose ones come from broadcasting or are constants, and are whatever they meet."""
        start, self.count = self.count, self.count + n
        if loose:
            self._loose.append((start, self.count))
        return np.arange(start, self.count)

    def loose(self, axis: np.ndarray) -> bool:
        return bool(axis.size) and any(a <= axis.min() and axis.max() < b for a, b in self._loose)

    def fix(self, axis: Axis, why: str) -> None:
        if axis is not None:
            self.fixed.append((axis.ravel(), why))

    def fix_all(self, axes: Axes, why: str) -> None:
        for axis in axes:
            self.fix(axis, why)

    def join(self, a: Axis, b: Axis, why: str) -> Axis:
        """The units of two axes that run along each other."""
        if a is None or b is None:
            self.fix(a, why)
            self.fix(b, why)
            return None
        self.edges.append((a.ravel(), b.ravel()))
        return b if self.loose(a) else a

    def choose(self, key: tuple[Any, ...], options: list[int], units: Callable[[int], np.ndarray]) -> int | None:
        """One of the axes that could be cut, the outermost of which nothing fixed is known; None where all are."""
        key = (*self.scope, *key)
        number = self.passed.get(key, 0)
        if number >= len(options):
            return None
        self.choices.append(Choice(key, units(options[number]).ravel(), number + 1 < len(options)))
        return options[number]

    def role(self, value: int, axis: Axis, role: str) -> None:
        """Notes that an axis of a weight makes channels ("out") or reads them ("in")."""
        if axis is not None and value in self.weights:
            self.roles.append((axis, role))

    def contract(self, op: int, ends: tuple[tuple[Axes, int, int | None], ...], why: str) -> None:
        """Joins the summed axes of two operands and records that values flow through them.

        Args:
          op: number of the op.
          ends: per operand its axes, the summed one and the free one.
          why: the reason, where one of the summed axes is fixed.
        """
        (left, a, free_a), (right, b, free_b) = ends
        if self.join(left[a], right[b], why) is not None:
            self.contractions.append(Contraction(op, (a, b), (free_a, free_b)))


def reaches_border(size: int, out: int, taps: int, stride: int, before: int, dilation: int) -> list[bool]:
    """For each tap along one axis, whether it reads padding at any output position."""
    return [before > k * dilation or (out - 1) * stride + k * dilation - before >= size for k in range(taps)]


Label = Callable[[Units, int, Op, list[Axes], list[Shape], Shape], Any]  # the axes of the result, or of each result


def _elementwise(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    axes: Axes = []
    name = op.primitive.name
    for a, n in enumerate(out):
        found: list[Axis] = []
        for units, shape in zip(ins, shapes, strict=True):
            if not shape:
                continue
            if shape[a] == n:
                found.append(units[a])
            else:  # one value for all: it stays one
                u.fix(units[a], f"{name} repeats it")
        joined = found[0]
        for other in found[1:]:
            joined = u.join(joined, other, f"{name} meets an axis that cannot be cut")
        axes.append(joined)
    return axes


def _broadcast(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    # an extent that is free (the batch's, when a program is exported) is never cut
    axes: Axes = [u.fresh(n, loose=True) if isinstance(n, int) else None for n in out]
    for a, to in enumerate(op.params["broadcast_dimensions"]):
        if shapes[0][a] == out[to]:
            axes[to] = ins[0][a]
        else:
            u.fix(ins[0][a], "broadcast_in_dim repeats it")
    return axes


def _reshape(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    """An axis that is split, or merged with others, can be cut along one of its factors: heads of a fused projection.

    The outermost factor is taken (the head, not its dimensions); where that one turns out to be fixed (query, key and
    value of one kernel, taken apart) the network is labelled again with the next (`Units.choose`).
    """
    if op.params.get("dimensions") is not None:
        return _fixed(u, number, op, ins, shapes, out)
    axes: Axes = [None] * len(out)
    for run, (mine, theirs) in enumerate(_factors(shapes[0], out)):
        named = {a: units for a in mine if (units := ins[0][a]) is not None}
        for a, units in list(named.items()):  # what was broadcast keeps its extent, and another axis may still be cut
            if len(named) > 1 and u.loose(units):
                u.fix(units, "reshape merges it with another axis")
                del named[a]
        if not named or (0 in out and not theirs):  # an axis of one that is left out of nothing
            continue
        sizes = [shapes[0][a] for a in mine]
        if sizes == [out[a] for a in theirs]:
            for a, to in zip(mine, theirs, strict=True):
                axes[to] = ins[0][a]
            continue
        if 0 in sizes or math.prod(sizes) != math.prod(out[a] for a in theirs):
            for units in named.values():
                u.fix(units, "reshape merges it with an axis of nothing")
            continue
        taken: int | None = next(iter(named))
        if len(named) > 1:
            taken = u.choose((number, run, "merged"), list(named), named.__getitem__)
            for a, units in named.items():
                if a != taken:
                    u.fix(units, "reshape merges two axes that could be cut")
        if taken is None:
            continue
        column = np.expand_dims(named[taken], [i for i, a in enumerate(mine) if a != taken])
        grid = np.broadcast_to(column, sizes).reshape([out[a] for a in theirs])
        place = _varies(grid)
        if place is None:
            options = [i for i, n in enumerate(grid.shape) if n > 1]
            place = u.choose((number, run, "split"), options, partial(_first, grid))
        if place is None:
            u.fix(named[taken], "reshape splits it")
            continue
        lines = _lines(grid, place)
        if (lines != lines[:, :1]).any():  # what shares an index of that axis stays or goes as one
            u.edges.append((np.repeat(lines[:, 0], lines.shape[1] - 1), lines[:, 1:].ravel()))
        axes[theirs[place]] = _first(grid, place)
    return axes


def _lines(grid: np.ndarray, axis: int) -> np.ndarray:
    """The grid as `[n, rest]`, n along an axis."""
    return np.moveaxis(grid, axis, 0).reshape(grid.shape[axis], -1)


def _first(grid: np.ndarray, axis: int) -> np.ndarray:
    """The grid's first entry at every index of an axis."""
    return _lines(grid, axis)[:, 0]


def _varies(grid: np.ndarray) -> int | None:
    """The only axis along which the grid varies; the last axis that can stand for it where several can."""
    for place in sorted(range(grid.ndim), key=lambda a: (grid.shape[a] > 1, a), reverse=True):
        lines = _lines(grid, place)
        if (lines == lines[:, :1]).all():
            return place
    return None


def _factors(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of old and new axes with equal products; around an axis of nothing, those that stay."""
    runs: list[tuple[list[int], list[int]]] = []
    if 0 in old:
        shorter = min(len(old), len(new))
        end = next((k for k in range(shorter) if old[-1 - k] != new[-1 - k]), shorter)
        start = next((k for k in range(shorter - end) if old[k] != new[k]), shorter - end)
        runs = [([k], [k]) for k in range(start)]
        runs += [(list(range(start, len(old) - end)), list(range(start, len(new) - end)))]
        return runs + [([len(old) - k], [len(new) - k]) for k in range(end, 0, -1)]
    i = j = 0
    while i < len(old) and j < len(new):
        mine, theirs = [i], [j]
        while math.prod(old[a] for a in mine) != math.prod(new[a] for a in theirs):
            if math.prod(old[a] for a in mine) < math.prod(new[a] for a in theirs):
                mine.append(mine[-1] + 1)
            else:
                theirs.append(theirs[-1] + 1)
        i, j = mine[-1] + 1, theirs[-1] + 1
        runs.append((mine, theirs))
    return runs


def _transpose(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    return [ins[0][a] for a in op.params["permutation"]]


def _squeeze(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    dropped = {a % len(shapes[0]) for a in op.params["dimensions"]}
    for a in dropped:
        u.fix(ins[0][a], "squeeze drops its axis")
    return [units for a, units in enumerate(ins[0]) if a not in dropped]


def _rev(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    turned = op.params["dimensions"]
    return [x[::-1] if x is not None and a in turned else x for a, x in enumerate(ins[0])]


def _slice(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    p = op.params
    strides = p["strides"] or (1,) * len(out)
    axes: Axes = []
    for units, start, limit, stride in zip(ins[0], p["start_indices"], p["limit_indices"], strides, strict=True):
        axes.append(units if units is None else units[start:limit:stride])
    return axes


def _dynamic_slice(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    picks = picked(op, shapes[0], u.constants)
    axes: Axes = []
    for a, (units, size, n) in enumerate(zip(ins[0], out, shapes[0], strict=True)):
        if size == n:
            axes.append(units)
        elif picks is not None:
            axes.append(units if units is None else units[picks[a]])
        else:
            u.fix(units, "dynamic_slice takes a part of it")
            axes.append(None)
    return axes


def _dynamic_update_slice(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    axes: Axes = []
    for units, new, n, size in zip(ins[0], ins[1], shapes[0], shapes[1], strict=True):
        if size == n:
            axes.append(u.join(units, new, "dynamic_update_slice meets an axis that cannot be cut"))
        else:
            u.fix(units, "dynamic_update_slice writes into a part of it")
            u.fix(new, "dynamic_update_slice writes it into a part of another axis")
            axes.append(None)
    return axes


def _gather(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    numbers, picks = op.params["dimension_numbers"], picked(op, shapes[0], u.constants)
    u.fix_all(ins[1], "they are the indices of gather")
    axes: Axes = [None] * len(out)
    dropped = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
    rest = [a for a in range(len(shapes[0])) if a not in dropped]
    for to, a in zip(numbers.offset_dims, rest, strict=True):
        if picks is not None and a in picks:
            units = ins[0][a]
            axes[to] = units if units is None else units[picks[a]]
        elif op.params["slice_sizes"][a] == shapes[0][a] and (picks is not None or a not in numbers.start_index_map):
            axes[to] = ins[0][a]
            u.role(op.inputs[0], ins[0][a], "out")  # the width of a table of embeddings
        else:
            u.fix(ins[0][a], "gather takes a part of it")
    for a in dropped:
        units = ins[0][a]
        if picks is not None and a in picks:
            axes[a] = units if units is None else units[picks[a]]
        else:
            u.fix(units, "gather picks from it")
    return axes


def picked(op: Op, shape: Shape, constants: Mapping[int, Any]) -> dict[int, np.ndarray] | None:
    """Axis -> indices, where a `gather` or `dynamic_slice` takes constant ones along axes; None where it does not."""
    sizes = op.params["slice_sizes"]
    cut = [a for a, (size, n) in enumerate(zip(sizes, shape, strict=True)) if size != n]
    if not all(v in constants for v in op.inputs[1:]) or not all(isinstance(shape[a], int) for a in cut):
        return None
    if op.primitive.name == "dynamic_slice":
        starts = [int(np.asarray(constants[v])) for v in op.inputs[1:]]
        return {a: np.arange(sizes[a]) + min(max(starts[a], 0), shape[a] - sizes[a]) for a in cut}
    numbers, ids = op.params["dimension_numbers"], np.asarray(constants[op.inputs[1]]).astype(np.int64)
    axes = list(numbers.start_index_map)
    if ids.ndim == 1 and not numbers.collapsed_slice_dims and not numbers.operand_batching_dims:
        # one window, which slices are where the batch is free
        if any(at for a, at in zip(axes, ids, strict=True) if a not in cut) or not set(cut) <= set(axes):
            return None
        picks = {a: at + np.arange(sizes[a]) for a, at in zip(axes, ids, strict=True) if a in cut}
    elif ids.ndim == 2 and axes == list(numbers.collapsed_slice_dims) and len(axes) == 1 and set(cut) <= set(axes):
        # points along one axis, which stays where it is
        if not isinstance(shape[axes[0]], int) or axes[0] in numbers.offset_dims:
            return None
        picks = {axes[0]: ids[:, 0]}
    else:
        return None
    return picks if all(((at >= 0) & (at < shape[a])).all() for a, at in picks.items()) else None


def _pad(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    axes: Axes = []
    for units, (low, high, interior) in zip(ins[0], op.params["padding_config"], strict=True):
        if units is not None and (interior or low < 0 or high < 0):
            u.fix(units, "pad cuts or spreads it")
            units = None
        axes.append(units if units is None else np.concatenate([u.fresh(low), units, u.fresh(high)]))
    return axes


def _concatenate(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    along = op.params["dimension"]
    axes: Axes = []
    for a in range(len(out)):
        column = [x[a] for x in ins]
        if a == along:
            if all(x is None for x in column):
                axes.append(None)
            else:  # a fixed part stays whole beside parts that may be cut
                parts = [x if x is not None else u.fresh(s[a]) for x, s in zip(column, shapes, strict=True)]
                for x, part in zip(column, parts, strict=True):
                    if x is None:
                        u.fix(part, "it stands for an axis that cannot be cut")
                axes.append(np.concatenate([p for p in parts if p is not None]))
        else:
            joined = column[0]
            for other in column[1:]:
                joined = u.join(joined, other, "concatenate meets an axis that cannot be cut")
            axes.append(joined)
    return axes


def _split(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> list[Axes]:
    along, sizes = op.params["axis"], op.params["sizes"]
    starts = np.cumsum([0, *sizes])
    return [
        [x if x is None or a != along else x[start : start + n] for a, x in enumerate(ins[0])]
        for start, n in zip(starts, sizes, strict=False)
    ]


def _stack(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    axes = list(ins[0])
    for other in ins[1:]:
        axes = [u.join(x, y, "stack meets an axis that cannot be cut") for x, y in zip(axes, other, strict=True)]
    axes.insert(op.params["axis"], None)
    return axes


def _unstack(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    along = op.params["axis"]
    u.fix(ins[0][along], "unstack takes it apart")
    return [x for a, x in enumerate(ins[0]) if a != along]


def _tile(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    return [None if x is None else np.tile(x, n) for x, n in zip(ins[0], op.params["reps"], strict=True)]


def _sort(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    axes = list(ins[0])
    for other in ins[1:]:
        axes = [u.join(x, y, "sort meets an axis that cannot be cut") for x, y in zip(axes, other, strict=True)]
    along = op.params["dimension"]
    for x in (axes[along], *(other[along] for other in ins)):
        u.fix(x, "sort orders along it")
    axes[along] = None
    return axes


def _top_k(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    along = op.params.get("axis", len(shapes[0]) - 1)
    u.fix(ins[0][along], "top_k picks from it")
    return [None if a == along else x for a, x in enumerate(ins[0])]


def _same(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> list[Axes]:
    return ins


def _reduce(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    gone = op.params["axes"]
    for a in gone:
        units = ins[0][a]
        if op.primitive.name != "reduce_sum":
            u.fix(units, f"{op.primitive.name} runs over it")
        elif units is not None:  # zeros can be left out of a sum, of which a mean divides by a number of its own
            u.contractions.append(Contraction(number, (a, None), (None, None)))
    return [x for a, x in enumerate(ins[0]) if a not in gone]


def _window(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    p = op.params
    axes: Axes = []
    for a, units in enumerate(ins[0]):
        whole = p["window_dimensions"][a] == p["window_strides"][a] == 1 and tuple(p["padding"][a]) == (0, 0)
        if not whole or p["base_dilation"][a] != 1:
            u.fix(units, f"{op.primitive.name} slides along it")
            units = None
        axes.append(units)
    return axes


def _cumulative(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    u.fix(ins[0][op.params["axis"]], f"{op.primitive.name} runs along it")
    return [None if a == op.params["axis"] else x for a, x in enumerate(ins[0])]


def _conv(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    p = op.params
    (batch, cin, *space), (cout, kin, *taps), (out_batch, out_channel, *_) = p["dimension_numbers"]
    lhs, rhs = ins
    axes: Axes = [None] * len(out)
    if p["batch_group_count"] != 1:
        return _fixed(u, number, op, ins, shapes, out)
    for a in space:
        u.fix(lhs[a], "conv_general_dilated slides along it")
    for a in taps:
        u.fix(rhs[a], "they are the taps of a convolution")
    axes[out_batch], axes[out_channel] = lhs[batch], rhs[cout]
    groups = p["feature_group_count"]
    if groups == 1:
        u.role(op.inputs[1], rhs[cout], "out")
        u.role(op.inputs[1], rhs[kin], "in")
        ends = ((lhs, cin, None), (rhs, kin, cout))
        u.contract(number, ends, "conv_general_dilated sums over an axis that cannot be cut")
    elif groups == shapes[0][cin] == shapes[1][cout]:  # each channel has its own filter
        u.fix(rhs[kin], "it is the only input of a depthwise filter")
        axes[out_channel] = u.join(lhs[cin], rhs[cout], "a depthwise convolution meets channels that cannot be cut")
    else:
        for units in (lhs[cin], rhs[kin], rhs[cout]):
            u.fix(units, f"a convolution of {groups} groups needs its groups equal")
        axes[out_channel] = None
    return axes


def _dot(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    (summed_l, summed_r), (batch_l, batch_r) = op.params["dimension_numbers"]
    lhs, rhs = ins
    for a, b in zip(summed_l, summed_r, strict=True):
        ends = ((lhs, a, _free(lhs, summed_l)), (rhs, b, _free(rhs, summed_r)))
        u.contract(number, ends, "dot_general sums over an axis that cannot be cut")
    axes: Axes = [
        u.join(lhs[a], rhs[b], "dot_general meets an axis that cannot be cut")
        for a, b in zip(batch_l, batch_r, strict=True)
    ]
    for value, units, summed, batch in zip(op.inputs, ins, (summed_l, summed_r), (batch_l, batch_r), strict=True):
        for a, x in enumerate(units):
            if a in summed:
                u.role(value, x, "in")
            elif a not in batch:
                u.role(value, x, "out")
                axes.append(x)
    return axes


def _free(axes: Axes, summed: Sequence[int]) -> int | None:
    others = [a for a in range(len(axes)) if a not in summed]
    named = others if len(others) == 1 else [a for a in others if axes[a] is not None]
    return named[0] if len(named) == 1 else None


def _fixed(u: Units, number: int, op: Op, ins: list[Axes], shapes: list[Shape], out: Shape) -> Axes:
    for axes in ins:
        u.fix_all(axes, f"they pass through {op.primitive.name}")
    return [None] * len(out)


ELEMENTWISE = frozenset(
    "abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e cbrt ceil clamp clz conj "
    "convert_element_type copy cos cosh digamma div eq erf erf_inv erfc exp exp2 expm1 floor ge gt imag integer_pow "
    "is_finite le lgamma log log1p logistic lt max min mul name ne neg nextafter not or population_count pow real "
    "reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic shift_right_logical sign sin sinh "
    "sqrt square stop_gradient sub tan tanh xor".split()
)
REDUCTIONS = {f"reduce_{k}": "max" for k in ("max", "min", "sum", "prod", "and", "or")}
WINDOWS = frozenset(f"reduce_window_{k}" for k in ("max", "min", "sum"))
STRUCTURE = frozenset(  # move values only
    "broadcast_in_dim concatenate optimization_barrier reshape rev slice split squeeze stack tile transpose "
    "unstack".split()
)
CUMULATIVE = ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
MANY = ("split", "optimization_barrier")  # the axes of their results differ

# They number positions or write values by computed indices: the channels that meet them are fixed.
_WHOLE = ("iota", "scatter", "scatter-add", "scatter-mul", "scatter-min", "scatter-max")

LABELS: dict[str, Label] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    **dict.fromkeys(WINDOWS, _window),
    **dict.fromkeys(("argmax", "argmin"), _reduce),
    **dict.fromkeys(CUMULATIVE, _cumulative),
    **dict.fromkeys(_WHOLE, _fixed),
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "rev": _rev,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "stack": _stack,
    "unstack": _unstack,
    "tile": _tile,
    "sort": _sort,
    "top_k": _top_k,
    "optimization_barrier": _same,
    "pad": _pad,
    "concatenate": _concatenate,
    "split": _split,
    "conv_general_dilated": _conv,
    "dot_general": _dot,
}
