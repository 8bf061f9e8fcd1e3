"""Which products of a traced program read which leaf, and where each entry of the leaf stands in them.

Every entry of every leaf has a number, and the numbers are sent through whatever only moves values (transpositions,
reshapes, slices, concatenations, casts) to the product: there they say exactly which input each weight multiplies,
whatever happened on the way.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from compressx._axes_of import axes_in, carried_data
from compressx.axes import DEFAULTS
from compressx.capture.matrix import MatrixView, matrix_view
from compressx.capture.products import Product, kernel, product_of
from compressx.trace import Op, Program, flatten, scan_parts

Numbers = np.ndarray


class Use(NamedTuple):
    """A product that reads a leaf as X W; more than one leaf may share a product (gates joined into one kernel).

    Attributes:
      leaf: number of the leaf.
      product: see `Product`.
      source: the value that is the other operand.
      groups: the matrices of the leaf that are read, int `[steps of each loop..., B]`; a loop that does not take the
        leaf slice by slice counts as one step.
      batches: which of the product's B matrices they are; None: all.
      rows: for each of the leaf's P rows its index along C; None: they are the same.
      columns: for each of the leaf's F columns its index along the product's F; None: they are the same.
      merged: whether all of B multiply one matrix of the leaf, whose rows then are the rows of all.
    """

    leaf: int
    product: Product
    source: int
    groups: Numbers
    batches: tuple[int, ...] | None
    rows: tuple[int, ...] | None
    columns: tuple[int, ...] | None
    merged: bool


class Uses(NamedTuple):
    """All products that read leaves.

    Attributes:
      at: numbers of the enclosing loops and of the op -> uses there.
      views: leaf -> its matrices.
      axes: leaf -> words of its axes.
      refused: leaf -> why it cannot be captured; a leaf that is in neither is read by no product.
      data: values of the whole program that depend on the inputs.
    """

    at: dict[tuple[int, ...], tuple[Use, ...]]
    views: dict[int, MatrixView]
    axes: dict[int, str]
    refused: dict[int, str]
    data: frozenset[int]

    def scopes(self, leaf: int) -> list[tuple[int, ...]]:
        """Where a leaf is used, in the order of the program."""
        return sorted(scope for scope, held in self.at.items() if any(use.leaf == leaf for use in held))


def uses(program: Program) -> Uses:
    """Finds the products that read the leaves of a program."""
    shapes = [program.shapes[leaf] for leaf in range(len(program.paths))]
    starts = np.cumsum([0, *(math.prod(s) for s in shapes)])
    if starts[-1] >= 1 << 31:
        raise ValueError(f"{starts[-1]} weights: at most {1 << 31} can be followed through a program")
    numbers = {
        leaf: np.arange(starts[leaf], starts[leaf + 1], dtype=np.int32).reshape(shape)
        for leaf, shape in enumerate(shapes)
    }
    words = axes_in(program)
    walk = _Walk(shapes, starts, {leaf: words[path] for leaf, path in enumerate(program.paths) if path in words})
    data = set(program.inputs)
    walk.read(program, numbers, data, (), 0)
    found = {scope: tuple(u for u in held if u.leaf not in walk.refused) for scope, held in walk.at.items()}
    at = {scope: held for scope, held in found.items() if held}
    return Uses(at, walk.views, walk.axes, walk.refused, frozenset(data))


# What moves values and nothing else, and what changes their type or scales all of them alike.
_MOVING = frozenset(
    "broadcast_in_dim concatenate dynamic_slice gather pad reshape rev slice split squeeze transpose".split()
)
_SAME = frozenset("convert_element_type copy copy_p reduce_precision stop_gradient optimization_barrier".split())


class _Walk:
    """Sends the numbers of the leaves through a program and its loops."""

    def __init__(self, shapes: Sequence[tuple[int, ...]], starts: Numbers, words: Mapping[int, str]) -> None:
        self.shapes, self.starts, self.words = shapes, starts, words
        self.at: dict[tuple[int, ...], list[Use]] = {}
        self.views: dict[int, MatrixView] = {}
        self.axes: dict[int, str] = {}
        self.refused: dict[int, str] = {}
        self._order: dict[int, Numbers] = {}
        self._first: dict[int, tuple[Any, ...]] = {}

    def read(
        self,
        program: Program,
        numbers: dict[int, Numbers],
        data: set[int],
        scope: tuple[int, ...],
        depth: int,
        uniform: frozenset[int] = frozenset(),
    ) -> None:
        """Reads a program. `numbers` of its values, and those that depend on the network's input, grow on the way.

        The numbers of a value have one axis before its own for each of the `depth` enclosing loops: its steps, or 1.
        """
        shapes = program.shapes
        alike = set(uniform) | {v for v, c in program.constants.items() if np.size(c) == 1}
        for number, op in enumerate(program.ops):
            name, inputs = op.primitive.name, op.inputs
            from_data = [v in data for v in inputs]
            known = [v in numbers for v in inputs]
            alike_all = all(v in alike or (not d and shapes[v] == ()) for v, d in zip(inputs, from_data, strict=True))
            if alike_all and name in (*_SAME, "broadcast_in_dim", "reshape", "squeeze"):
                alike.update(op.outputs)
            if name in ("dot_general", "conv_general_dilated") and any(known):
                self._product(program, op, (*scope, number), numbers, from_data, depth)
            elif name == "scan":
                self._scan(op, program, (*scope, number), numbers, data, depth, alike)
            elif any(known) and name in _SAME:
                for source, target in zip(inputs, op.outputs, strict=True):
                    if source in numbers:
                        numbers[target] = numbers[source]
            elif any(known) and name in ("mul", "div") and _scaled(op, numbers, alike, shapes, from_data):
                held = next(v for v in inputs if v in numbers and shapes[v] == shapes[op.outputs[0]])
                numbers[op.outputs[0]] = numbers[held]
            elif any(known) and name in _MOVING and _movable(op, program, known, from_data):
                numbers.update(_move(op, program, numbers, depth))
            else:
                self._block([numbers[v] for v, k in zip(inputs, known, strict=True) if k], name, any(from_data))
            if any(from_data):
                data.update(op.outputs)

    def _block(self, held: Sequence[Numbers], name: str, meets_data: bool) -> None:
        """Notes what stands between leaves and a product, where that is an operation of more than a vector."""
        for leaf in {leaf for n in held for leaf in self._leaves(n)}:
            if sum(n > 1 for n in self.shapes[leaf]) > 1 and leaf not in self.refused:
                how = f"`{name}` with the network's values" if meets_data else f"`{name}`"
                self.refused[leaf] = f"it passes through {how}, which is neither a product nor a mere move"

    def _leaves(self, numbers: Numbers) -> list[int]:
        valid = numbers[numbers >= 0]
        if not valid.size:
            return []
        low, high = (int(np.searchsorted(self.starts, n, "right")) - 1 for n in (valid.min(), valid.max()))
        if low == high:
            return [low]
        return [int(n) for n in np.unique(np.searchsorted(self.starts, valid, "right") - 1)]

    def _product(
        self,
        program: Program,
        op: Op,
        scope: tuple[int, ...],
        numbers: dict[int, Numbers],
        from_data: Sequence[bool],
        depth: int,
    ) -> None:
        shapes = tuple(program.shapes[v] for v in (*op.inputs[:2], op.outputs[0]))
        for side in (0, 1):
            if op.inputs[side] not in numbers:
                continue
            held = numbers[op.inputs[side]]
            if not from_data[1 - side]:
                self._block([held], f"a `{op.primitive.name}` of two weights", False)
                continue
            product = product_of(op, side, shapes)
            if product is None:
                self._block([held], f"a `{op.primitive.name}` that no matrix product is", True)
                continue
            steps = held.shape[:depth]
            flat = np.stack([kernel(product, k) for k in held.reshape(-1, *held.shape[depth:])])
            whole = flat.reshape(*steps, *flat.shape[1:])
            for leaf in self._leaves(whole):
                self._use(leaf, product, op.inputs[1 - side], whole, held, scope)

    def _use(
        self, leaf: int, product: Product, source: int, whole: Numbers, held: Numbers, scope: tuple[int, ...]
    ) -> None:
        """Notes that a leaf is read by a product whose weight has the numbers `whole` `[steps..., B, C, F]`."""
        start, stop = self.starts[leaf], self.starts[leaf + 1]
        mine = (whole >= start) & (whole < stop)
        steps = tuple(range(whole.ndim - 3))
        b, c, f = (
            np.flatnonzero(mine.any((*steps, *(a for a in range(whole.ndim - 3, whole.ndim) if a != axis))))
            for axis in range(whole.ndim - 3, whole.ndim)
        )
        part = whole[..., b, :, :][..., c, :][..., f] - start
        if not mine[..., b, :, :][..., c, :][..., f].all():
            self._refuse(leaf, "its entries are no full block of the product that reads it")
            return
        grouped = product.batch if product.window else 1
        if leaf not in self.views:
            said = self.words.get(leaf) or _words(self.shapes[leaf], part, product, c, len(steps))
            try:
                self.views[leaf] = matrix_view(self.shapes[leaf], said, grouped)
            except ValueError as error:
                self._refuse(leaf, str(error))
                return
            self.axes[leaf] = said
            order = np.asarray(self.views[leaf].to(np.arange(stop - start).reshape(self.shapes[leaf])))
            self._order[leaf] = np.argsort(order.reshape(-1))
        view = self.views[leaf]
        group, row, column = np.unravel_index(self._order[leaf][part], (view.groups, view.rows, view.columns))
        g, p, n = group[..., :1, :1], row[..., :1], column[..., :1, :]
        p, n = p[(0,) * (p.ndim - 3)][:1], n[(0,) * (n.ndim - 3)][:1]
        if (group != g).any() or (row != p).any() or (column != n).any():
            self._refuse(leaf, "its axes are mixed, or it is used in ways that differ")
            return
        rows, columns, g = p.ravel(), n.ravel(), g[..., 0, 0]
        if sorted(rows) != list(range(view.rows)):
            self._refuse(leaf, f"a product reads {len(rows)} of its {view.rows} inputs, apart from the others")
            return
        merged = g.shape[-1] > 1 and bool((g == g[..., :1]).all())
        if not merged and any(len(set(one)) < len(one) for one in g.reshape(-1, g.shape[-1])):
            self._refuse(leaf, "one product uses some of its matrices more often than others")
            return
        known = self._first.setdefault(leaf, (scope, source))
        if len(columns) < view.columns:
            if known != (scope, source) and known[1] != source:
                self._refuse(leaf, "parts of its outputs have other inputs than the rest")
                return
            if known != (scope, source):
                return  # another part of the outputs, of the same inputs: they count once
        made = Use(
            leaf,
            product,
            source,
            g[..., :1] if merged else g,
            _unless_all(b, whole.shape[-3]),
            _unless_all(c[np.argsort(rows)], whole.shape[-2]),
            _unless_all(f[np.argsort(columns)], whole.shape[-1]),
            merged,
        )
        self.at.setdefault(scope, []).append(made)

    def _refuse(self, leaf: int, why: str) -> None:
        self.refused.setdefault(leaf, why)

    def _scan(
        self,
        op: Op,
        program: Program,
        scope: tuple[int, ...],
        numbers: dict[int, Numbers],
        data: set[int],
        depth: int,
        alike: set[int],
    ) -> None:
        body = flatten(op.params["jaxpr"])
        outside = [program.shapes[v] for v in op.inputs], [program.shapes[v] for v in op.outputs]
        fixed, carried = scan_parts(body, *outside)
        inner: dict[int, Numbers] = {}
        for k, (value, own) in enumerate(zip(body.inputs, op.inputs, strict=True)):
            if own not in numbers:
                continue
            held = numbers[own]
            same = fixed <= k < fixed + carried and body.outputs[k - fixed] == value
            if k >= fixed + carried:  # [loops..., steps, ...]: the steps become a loop's axis
                inner[value] = held
            elif k < fixed or same:
                inner[value] = np.expand_dims(held, depth)
            else:
                self._block([held], "a loop that changes it", False)
        moving = {value for value, own in zip(body.inputs, op.inputs, strict=True) if own in data}
        loop = list(zip(body.inputs[fixed:], body.outputs[:carried], strict=False))
        inside = carried_data(body, moving, loop)
        held_alike = {v for v, own in zip(body.inputs[:fixed], op.inputs, strict=False) if own in alike}
        self.read(body, inner, inside, scope, depth + 1, frozenset(held_alike))


def _unless_all(index: Numbers, n: int) -> tuple[int, ...] | None:
    return None if list(index) == list(range(n)) else tuple(map(int, index))


def _scaled(
    op: Op, numbers: Mapping[int, Numbers], alike: set[int], shapes: Sequence[Any], from_data: Sequence[bool]
) -> bool:
    """Whether an operation multiplies a leaf by one number."""
    out = shapes[op.outputs[0]]
    sides = [v in numbers and shapes[v] == out and v not in alike for v in op.inputs]
    other = op.inputs[1 - sides.index(True)] if sides.count(True) == 1 else None
    if other is None or any(from_data) or (op.primitive.name == "div" and not sides[0]):
        return False
    return other in alike or shapes[other] == ()


def _movable(op: Op, program: Program, known: Sequence[bool], from_data: Sequence[bool]) -> bool:
    """Whether a moving operation can be followed: its indices are constants, and the data is not in it."""
    if any(from_data):
        return False
    name = op.primitive.name
    if name == "concatenate":
        return True
    rest = op.inputs[1:]
    return known[0] and (name == "pad" or all(v in program.constants for v in rest))


def _move(op: Op, program: Program, numbers: Mapping[int, Numbers], depth: int) -> dict[int, Numbers]:
    """The numbers behind an operation that moves values, for every step of the enclosing loops."""
    first = op.primitive.name in ("dynamic_slice", "gather", "pad")
    held: list[Numbers] = []
    for k, v in enumerate(op.inputs[: 1 if first else None]):
        missing = np.full((*(1,) * depth, *program.shapes[v]), -1, np.int32)
        held.append(numbers.get(v, missing) if k or v in numbers else missing)
    steps = np.broadcast_shapes(*(n.shape[:depth] for n in held))
    flat = [np.broadcast_to(n, (*steps, *n.shape[depth:])).reshape(-1, *n.shape[depth:]) for n in held]
    rest = [np.int32(-1)] if op.primitive.name == "pad" else [program.constants[v] for v in op.inputs[1:] if first]
    params = dict(op.params)
    if params.get("fill_value") is not None:
        params["fill_value"] = -1

    def bind(*own: Any) -> list[Any]:
        made = op.primitive.bind(*own, *rest, **params)
        return list(made) if op.primitive.multiple_results else [made]

    with jax.ensure_compile_time_eval():
        each = [bind(*(n[k] for n in flat)) for k in range(len(flat[0]))]
    made = [np.stack([np.asarray(one[k]) for one in each]) for k in range(len(op.outputs))]
    return {v: m.reshape(*steps, *m.shape[1:]) for v, m in zip(op.outputs, made, strict=True)}


def _words(shape: tuple[int, ...], part: Numbers, product: Product, c: Numbers, depth: int) -> str:
    """Words for the axes of a leaf, from how its entries lie in a product: `part` is `[steps..., B, C, F]`.

    For leaves that `axes_of` does not name, as their kernels are joined on the way to the product.
    """
    at = np.unravel_index(part, shape)
    taps = math.prod(product.window[0]) if product.window else 1
    moved = {"out": depth + 2, "in": depth + 1, "stack": depth}
    words = []
    for axis, n in enumerate(shape):
        place = at[axis]
        varies = {word for word, a in moved.items() if n > 1 and (place != place.take([0], a)).any()}
        if varies == {"in"} and taps > 1 and len(c) % taps == 0:
            split = place.reshape(*place.shape[: depth + 1], taps, -1, place.shape[-1])
            varies = {"taps"} if (split == split[..., :1, :]).all() else varies
        words.append("out" if "out" in varies or (varies == {"stack"} and product.window) else next(iter(varies), ""))
    rest = "out" if "in" in words else "in"
    words = [word or ("stack" if n > 1 else rest) for word, n in zip(words, shape, strict=True)]
    if "out" not in words:
        words[-1] = "out"
    usual = DEFAULTS.get(len(shape))
    return " ".join(usual if usual and tuple(words) == usual else words)
