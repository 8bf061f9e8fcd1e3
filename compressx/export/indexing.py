"""Gathers, scatters and slices whose positions are computed.

A gather is Slice where its positions are constant and adjacent, Gather along one axis after the other where they form a
grid, and GatherND otherwise. XLA moves a window that reaches beyond an axis back into it; so do these.
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.lax import GatherScatterMode

from compressx.export.graph import Call, Graph, Rule, Unsupported, boolean, onnx_type, static

Label = tuple[str, int]  # ("index", axis of the indices) or ("window", axis of the operand)


def _last(shape: Sequence[Any], sizes: Sequence[Any], axes: Sequence[int]) -> list[Any]:
    """The last position along each axis at which a window of these sizes still fits."""
    return [shape[a] - sizes[a] for a in axes]


def _clipped(g: Graph, ids: str, last: Sequence[Any]) -> str:
    return g.node("Min", g.node("Max", ids, g.ints(0)), g.dims(last))


def _inside(g: Graph, ids: str, last: Sequence[Any]) -> str:
    """Whether each window lies inside: truth values in the shape of the indices without their last axis."""
    fits = g.node("And", g.node("GreaterOrEqual", ids, g.ints(0)), g.node("LessOrEqual", ids, g.dims(last)))
    return str(
        g.node(
            "Cast",
            g.node("ReduceMin", g.node("Cast", fits, to=onnx_type("int32")), g.ints(-1), keepdims=0),
            to=onnx_type("bool"),
        )
    )


def _windows(g: Graph, ids: str, rank: int, sizes: Sequence[int]) -> str:
    """The positions of every entry of the windows: `[..., k]` becomes `[..., *sizes, k]`."""
    if set(sizes) == {1}:
        return g.unsqueeze(ids, range(rank - 1, rank - 1 + len(sizes)))
    if not static(sizes):
        raise Unsupported(f"an index of windows of {tuple(sizes)}, which depend on the batch,")
    grid = np.moveaxis(np.indices(tuple(sizes), np.int64), 0, -1)
    ids = g.unsqueeze(ids, list(range(rank - 1, rank - 1 + len(sizes))))
    return g.node("Add", ids, g.constant(grid))


def _gather(g: Graph, call: Call) -> str:
    numbers, sizes, shape = call.params["dimension_numbers"], list(call.params["slice_sizes"]), list(call.shapes[0])
    indexed, batched = list(numbers.start_index_map), list(numbers.operand_batching_dims)
    x, ids = g.read(call, 0), g.array(call, 1)
    short = [i for i in range(len(shape)) if i not in indexed and i not in batched and sizes[i] != shape[i]]
    if short:  # these windows begin at 0
        x = g.slice(x, g.ints(*[0] * len(short)), g.dims([sizes[i] for i in short]), short)
    last = _last(shape, sizes, indexed)
    fills = GatherScatterMode.from_any(call.params["mode"]) == GatherScatterMode.FILL_OR_DROP
    if ids is not None and static(last):
        bound = np.clip(ids.astype(np.int64), 0, np.array(last, np.int64))
        fills = fills and bool(np.any(bound != ids))
        ids = bound
    else:
        ids = None
    if ids is not None and ids.ndim == 1 and not fills:
        ends = g.dims([int(start) + sizes[a] for start, a in zip(ids, indexed, strict=True)])
        return g.squeeze(g.slice(x, g.constant(ids), ends, indexed), sorted(numbers.collapsed_slice_dims))
    along = None if ids is None or batched else _grid(ids, [sizes[a] for a in indexed])
    labels: list[Label]
    if along is not None:
        labels = [("window", i) for i in range(len(shape))]
        for axis, (which, positions) in zip(indexed, along, strict=True):
            x = g.node("Gather", x, g.constant(positions), axis=axis)
            labels[axis] = ("index", which)
        named = g.constant(ids)
    else:
        named = g.constant(ids) if ids is not None else _clipped(g, _positions(g, call), last)
        x, labels = _points(g, x, named, call, sizes)
    out = _arranged(g, x, labels, call)
    if not fills:
        return out
    raw = g.constant(np.array(g.array(call, 1), np.int64)) if ids is not None else _positions(g, call)
    inside = g.unsqueeze(_inside(g, raw, last), list(numbers.offset_dims))
    return g.node("Where", inside, out, _filler(g, call))


def _positions(g: Graph, call: Call) -> str:
    """The indices, int64."""
    return g.cast(g.read(call, 1), call.dtypes[1], np.int64)


def _grid(ids: np.ndarray, sizes: Sequence[Any]) -> list[tuple[int, np.ndarray]] | None:
    """Constant indices of an open grid (`x[:, ::2, ::2]`): for each, along which of their axes it runs, and how."""
    if any(n != 1 for n in sizes) or ids.ndim - 1 != ids.shape[-1] or 0 in ids.shape:
        return None
    found = []
    for k in range(ids.shape[-1]):
        along = np.moveaxis(ids[..., k], k, 0).reshape(ids.shape[k], -1)
        if np.any(along != along[:, :1]):
            return None
        found.append((k, along[:, 0]))
    return found


def _points(g: Graph, x: str, ids: str, call: Call, sizes: Sequence[Any]) -> tuple[str, list[Label]]:
    """The windows at these positions, and what each of their axes is."""
    numbers, rank, index_rank = call.params["dimension_numbers"], len(call.shapes[0]), len(call.shapes[1])
    indexed, batched = list(numbers.start_index_map), list(numbers.operand_batching_dims)
    led = list(numbers.start_indices_batching_dims)
    rest = [i for i in range(rank) if i not in indexed and i not in batched]
    others = [i for i in range(index_rank - 1) if i not in led]
    if len(indexed) == 1 and sizes[indexed[0]] == 1 and not batched:
        (axis,) = indexed
        x = g.node("Gather", x, g.squeeze(ids, [index_rank - 1]), axis=axis)
        labels: list[Label] = [("window", i) for i in range(axis)] + [("index", i) for i in others]
        labels += [("window", i) for i in range(axis + 1, rank)]
        if axis not in numbers.collapsed_slice_dims:
            x, labels = g.unsqueeze(x, [len(labels)]), [*labels, ("window", axis)]
        return x, labels
    x, ids = g.transpose(x, [*batched, *indexed, *rest]), g.transpose(ids, [*led, *others, index_rank - 1])
    ids = _windows(g, ids, index_rank, [sizes[a] for a in indexed])
    x = g.node("GatherND", x, ids, batch_dims=len(batched))
    labels = [("index", i) for i in (*led, *others)] + [("window", i) for i in (*indexed, *rest)]
    gone = [i for i, label in enumerate(labels) if label[0] == "window" and label[1] in numbers.collapsed_slice_dims]
    return g.squeeze(x, gone), [label for i, label in enumerate(labels) if i not in gone]


def _arranged(g: Graph, x: str, labels: list[Label], call: Call) -> str:
    """The axes in the order of the output: windows at `offset_dims`, indices at the others."""
    numbers = call.params["dimension_numbers"]
    windows = iter(sorted(label for label in labels if label[0] == "window"))
    indices = iter(sorted(label for label in labels if label[0] == "index"))
    wanted = [next(windows if i in numbers.offset_dims else indices) for i in range(len(labels))]
    return g.transpose(x, [labels.index(label) for label in wanted])


def _filler(g: Graph, call: Call) -> str:
    value, dtype = call.params["fill_value"], jnp.dtype(call.out_dtypes[0])
    if value is None:
        if boolean(dtype):
            value = True
        elif jnp.issubdtype(dtype, jnp.integer):
            value = jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.unsignedinteger) else jnp.iinfo(dtype).min
        else:
            value = np.nan
    return g.like(value, dtype)


def _scatter(reduction: str) -> Rule:
    def make(g: Graph, call: Call) -> str:
        numbers, shape, updates = call.params["dimension_numbers"], list(call.shapes[0]), list(call.shapes[2])
        indexed, batched = list(numbers.scatter_dims_to_operand_dims), list(numbers.operand_batching_dims)
        inserted, led = numbers.inserted_window_dims, list(numbers.scatter_indices_batching_dims)
        kept = [i for i in range(len(shape)) if i not in inserted and i not in batched]
        places = dict(zip(kept, numbers.update_window_dims, strict=True))
        sizes = [updates[places[i]] if i in places else 1 for i in range(len(shape))]
        others = [i for i in range(len(updates)) if i not in numbers.update_window_dims]
        # Updates in the order: axes of the indices, windows of the indexed axes, other axes of the operand.
        rest = [i for i in kept if i not in indexed]
        u = g.transpose(
            g.read(call, 2), [*others, *(places[i] for i in indexed if i in places), *map(places.get, rest)]
        )
        u = g.unsqueeze(u, [len(others) + i for i, axis in enumerate(indexed) if axis not in places])
        ids, last = g.cast(g.read(call, 1), call.dtypes[1], np.int64), _last(shape, sizes, indexed)
        drops = GatherScatterMode.from_any(call.params["mode"]) != GatherScatterMode.CLIP
        constant = g.array(call, 1)
        if constant is not None and static(last):
            drops = drops and bool(np.any((constant < 0) | (constant > np.array(last))))
        if not drops:
            ids = _clipped(g, ids, last)
        lead_ids = len(others)
        for axis, along in zip(reversed(batched), reversed(led), strict=True):
            count = g.node("Range", g.like(0, np.int64), g.squeeze(g.dim(shape[axis]), [0]), g.like(1, np.int64))
            count = g.unsqueeze(count, [i for i in range(lead_ids + 1) if i != along])
            count = g.node("Expand", count, g.dims([*call.shapes[1][:-1], 1]))
            ids = g.node("Concat", count, ids, axis=lead_ids)
        if call.name == "scatter-sub":
            u = g.node("Neg", u)
        moved = _Moved([*batched, *indexed], [1] * len(batched) + [sizes[a] for a in indexed], shape)
        if batched:
            u = g.unsqueeze(u, [lead_ids + i for i in range(len(batched))])
        limits = _last(shape, sizes, batched + indexed) if drops else None
        if batched and drops:
            limits = [shape[a] - 1 for a in batched] + last
        return moved.written(g, g.read(call, 0), ids, lead_ids + 1, u, limits, [sizes[i] for i in rest], reduction)

    return make


class _Moved:
    """Windows written into an operand along some of its axes, which come first for ScatterND."""

    def __init__(self, axes: list[int], sizes: list[Any], shape: list[Any]) -> None:
        self.axes, self.sizes, self.shape = axes, sizes, shape
        self.rest = [i for i in range(len(shape)) if i not in axes]

    def written(
        self, g: Graph, x: str, ids: str, rank: int, updates: str, last: Any, rest: Sequence[Any], reduction: str
    ) -> str:
        """x with the updates written; where `last` is given, windows that reach beyond it are dropped."""
        if list(rest) != [self.shape[i] for i in self.rest]:
            raise Unsupported("a scatter of windows that are shorter than an axis without an index")
        order, number = [*self.axes, *self.rest], len(self.axes)
        x = g.transpose(x, order)
        if last is not None:  # they go to room behind the end, which is cut off again
            if not static(self.sizes):
                raise Unsupported(f"a scatter of windows of {tuple(self.sizes)}, which depend on the batch,")
            room = np.array([0] * len(order) + self.sizes + [0] * len(self.rest), np.int64)
            x = g.node("Pad", x, g.constant(room))
            inside = g.unsqueeze(_inside(g, ids, last), [rank - 1])
            ids = g.node("Where", inside, ids, g.dims([self.shape[a] for a in self.axes]))
        x = g.node("ScatterND", x, _windows(g, ids, rank, self.sizes), updates, reduction=reduction)
        if last is not None:
            ends = g.dims([self.shape[a] for a in self.axes])
            x = g.slice(x, g.ints(*[0] * number), ends, list(range(number)))
        return g.transpose(x, np.argsort(order))


def _starts(g: Graph, call: Call, first: int, axes: Sequence[int]) -> str:
    """The scalar operands from `first` on, those of these axes, as one vector."""
    numbers = [g.cast(g.read(call, first + a), call.dtypes[first + a], np.int64) for a in axes]
    parts = [g.unsqueeze(n, [0]) for n in numbers]
    return parts[0] if len(parts) == 1 else g.node("Concat", *parts, axis=0)


def _dynamic_slice(g: Graph, call: Call) -> str:
    sizes, shape = call.params["slice_sizes"], call.shapes[0]
    axes = [i for i in range(len(shape)) if sizes[i] != shape[i]]
    if not axes:
        return g.read(call, 0)
    starts = _clipped(g, _starts(g, call, 1, axes), _last(shape, sizes, axes))
    return g.slice(g.read(call, 0), starts, g.node("Add", starts, g.dims([sizes[a] for a in axes])), axes)


def _dynamic_update_slice(g: Graph, call: Call) -> str:
    shape, sizes = list(call.shapes[0]), list(call.shapes[1])
    axes = [i for i in range(len(shape)) if sizes[i] != shape[i]]
    if not axes:
        return g.read(call, 1)
    starts = _clipped(g, _starts(g, call, 2, axes), _last(shape, sizes, axes))
    moved = _Moved(axes, [sizes[a] for a in axes], shape)
    updates = g.transpose(g.read(call, 1), [*axes, *moved.rest])
    rest = [sizes[i] for i in moved.rest]
    return moved.written(g, g.read(call, 0), starts, 1, updates, None, rest, "none")


TABLE: dict[str, Rule] = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "gather": _gather,
    "scatter": _scatter("none"),
    "scatter-add": _scatter("add"),
    "scatter-max": _scatter("max"),
    "scatter-min": _scatter("min"),
    "scatter-mul": _scatter("mul"),
    "scatter-sub": _scatter("add"),
}

EXACT = frozenset(TABLE) - {"scatter-add", "scatter-mul", "scatter-sub"}
