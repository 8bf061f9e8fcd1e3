"""What became of every operation of a network that has parameters: where it runs, and why.

A line is a convolution, a product with a matrix of weights (also inside a loop or a branch), a lookup of rows, a
scaling or shift that is part of none of these, or another operation that reads variables. Every variable that meets the
network's input is named in a line.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import extend

from compressx.compaction.primitives import ELEMENTWISE
from compressx.formats.base import Packed
from compressx.kernels import graph
from compressx.kernels.schedule import Loads, Plan
from compressx.trace import Op, Program, flatten, scan_parts

PRODUCTS = frozenset(("dot_general", "ragged_dot_general"))
_MOVES = frozenset("broadcast_in_dim reshape transpose squeeze convert_element_type copy expand_dims".split())
_DENSE = "XLA runs it: only convolutions have kernels in a compiled network"

Source = frozenset[int] | None  # the leaves that a value is computed from; None: it depends on the network's input


class LayerReport(NamedTuple):
    """What became of one operation with parameters.

    Attributes:
      path: the leaf of its weight, the largest one where it is computed from several, or None for constants.
      shape: of the weight, as the operation reads it.
      image: shape of what it reads beside the weight.
      density: share of the weight that is not zero.
      macs: multiply-adds with those, of convolutions and products; in a loop of known length, of all its steps.
      plan: how it is run natively, or None.
      on: what it runs on: `native/<instruction set>`, `pallas/<gpu, tpu or interpret>`, `xla`, or `constant` where it
        depends on no input and is computed once.
      loads: natively, its vector loads in an inference (`schedule.loads` of all output vectors).
      kind: `convolution`, `product`, `lookup`, `elementwise` (a scaling or shift that no convolution took in, such as
        a layer normalisation), or the name of another operation.
      why: one sentence on why it runs there.
      packed: whether it runs from the packed arrays of its weight.
      others: the other leaves that are part of it: bias, batch normalisation.

    Example:
      >>> f = compressx.compile(lambda variables, x: x @ variables["kernel"], {"kernel": jnp.eye(2)}, path="xla")
      >>> (line,) = f.layers(jnp.zeros((1, 2)))
      >>> line.path, line.kind, line.on, line.macs, line.why
      ('kernel', 'product', 'xla', 2, 'XLA runs it: only convolutions have kernels in a compiled network')
    """

    path: str | None
    shape: tuple[int, ...]
    image: tuple[int, ...]
    density: float
    macs: int
    plan: Plan | None
    on: str = "xla"
    loads: Loads | None = None
    kind: str = "convolution"
    why: str = ""
    packed: bool = False
    others: tuple[str, ...] = ()


class Lines:
    """The lines of a network, collected step by step.

    Args:
      program: of the network.
      known: its values that depend on no input.
      packed: leaves as a file holds them, by path.
    """

    def __init__(self, program: Program, known: Mapping[int, Any], packed: Mapping[str, Packed]):
        self.program, self.known, self.packed = program, known, packed
        self.lines: list[LayerReport] = []
        self.sources = _sources(program, [frozenset((i,)) for i in range(len(program.paths))], program.inputs)
        self._here = _Walk(self, program, self.sources, "", 1)
        for op in program.ops:
            if all(v in known for v in op.inputs):
                self._here.once(op)

    def convolution(self, s: graph.Conv, image: tuple[int, ...], output: tuple[int, ...]) -> LayerReport:
        """The line of a fused convolution, still without where it runs."""
        path, others = self.names(self.sources[s.kernel], *(self.sources[v] for v in s.folded))
        live = int(np.count_nonzero(s.w))
        places = math.prod(output) // output[-1]
        return LayerReport(path, s.w.shape, image, live / s.w.size, live * places, None, others=others)

    def other(self, op: Op) -> None:
        """Adds the lines of an operation that is left to XLA."""
        self._here.read(op)

    def names(self, kernel: Source, *more: Source) -> tuple[str | None, tuple[str, ...]]:
        """The path of a weight computed from these leaves, and those of the others."""
        held = sorted(kernel or ())
        size = lambda leaf: math.prod(self.program.shapes[leaf])
        first = max(held, key=size) if held else None  # of equal ones the first
        rest = [*held, *sorted(frozenset().union(*(s or () for s in more)))]
        others = dict.fromkeys(self.program.paths[i] for i in rest if i != first)
        return None if first is None else self.program.paths[first], tuple(others)

    def stored(self, path: str | None) -> str:
        """What is added to a reason where a weight is packed and the packed arrays are not used; mostly nothing."""
        held = self.packed.get(path or "")
        return "" if held is None or held.format == "dense" else f"; its packed form ({held.format}) is expanded"

    def density(self, leaves: Source) -> float:
        """Share of these leaves together that is not zero; 1 where there are none."""
        arrays = [np.asarray(self.known[i]) for i in leaves or ()]
        size = sum(a.size for a in arrays)
        return sum(int(np.count_nonzero(a)) for a in arrays) / size if size else 1.0


class _Walk:
    """Reads the operations of a program, or of a loop's body within it, in order."""

    def __init__(self, lines: Lines, program: Program, sources: dict[int, Source], within: str, steps: int):
        self.lines, self.program, self.sources = lines, program, sources
        self.within, self.steps = within, steps
        self.owner: dict[int, int] = {}  # value -> the line that it is still part of

    def once(self, op: Op) -> None:
        """A convolution or product of weights alone."""
        if op.primitive.name == "conv_general_dilated" or op.primitive.name in PRODUCTS:
            if any(self.sources[v] for v in op.inputs):
                if self.within:
                    self._weighted(op, "xla", f"XLA runs it: {self.within}")
                else:
                    self._weighted(op, "constant", "it depends on no input: it is computed once")

    def read(self, op: Op) -> None:
        """Any operation that depends on the input."""
        name = op.primitive.name
        weights = frozenset[int]().union(*(self.sources[v] or () for v in op.inputs))
        if name == "conv_general_dilated":
            fixed = {v for v, source in self.sources.items() if source is not None}
            self._weighted(op, "xla", f"XLA runs it: {self.within or graph.unfit(op, fixed, self.program)}")
        elif not weights:
            self._pass_on(op)
        elif name in PRODUCTS:
            self._weighted(op, "xla", f"XLA runs it: {self.within}" if self.within else _DENSE)
        elif name in ELEMENTWISE:
            self._elementwise(op, weights)
        elif name in ("gather", "dynamic_slice") and self.sources[op.inputs[0]]:
            self._plain(op, "lookup", op.inputs[0], "rows are looked up, nothing is multiplied")
        else:
            before = len(self.lines.lines)
            self._inside(op)
            named = {path for line in self.lines.lines[before:] for path in (line.path, *line.others)}
            if any(self.lines.program.paths[i] not in named for i in weights):  # such as the state a loop begins with
                self._plain(op, name, self._largest(op), "only convolutions have kernels in a compiled network")

    def _weighted(self, op: Op, on: str, why: str) -> None:
        """A convolution or product: the weight is the operand that depends on variables alone, the right one of two."""
        right, left = op.inputs[1], op.inputs[0]
        swap = op.primitive.name in PRODUCTS and not self.sources[right]
        kernel, image = (left, right) if swap else (right, left)
        shapes, leaves = self.program.shapes, self.sources[kernel]
        path, others = self.lines.names(leaves, self.sources[image])
        if self.program is self.lines.program and kernel in self.lines.known:
            weight = np.asarray(self.lines.known[kernel])
            density = np.count_nonzero(weight) / weight.size if weight.size else 1.0
        else:
            density = self.lines.density(leaves)
        macs = round(density * math.prod(shapes[kernel]) * _places(op, shapes, swap) * self.steps)
        kind = "product" if op.primitive.name in PRODUCTS else "convolution"
        why += self.lines.stored(path)
        line = LayerReport(path, shapes[kernel], shapes[image], density, macs, None, on, None, kind, why, False, others)
        self.owner[op.outputs[0]] = len(self.lines.lines)
        self.lines.lines.append(line)

    def _plain(self, op: Op, kind: str, value: int, why: str) -> None:
        leaves = [self.sources[v] for v in op.inputs]
        path, others = self.lines.names(self.sources[value], *leaves)
        image = next((self.program.shapes[v] for v in op.inputs if self.sources[v] is None), ())
        why = f"XLA runs it: {self.within or why}{self.lines.stored(path)}"
        density = self.lines.density(self.sources[value])
        shape = self.program.shapes[value]
        self.owner |= dict.fromkeys(op.outputs, len(self.lines.lines))
        self.lines.lines.append(
            LayerReport(path, shape, image, density, 0, None, "xla", None, kind, why, False, others)
        )

    def _elementwise(self, op: Op, weights: frozenset[int]) -> None:
        """A shift right after a product of its module is its bias; what else a module scales and shifts is one line."""
        lines, names = self.lines.lines, [self.lines.program.paths[i] for i in sorted(weights)]
        held = self._held(op)
        if held is not None:
            line = lines[held]
            bias = op.primitive.name in ("add", "add_any", "sub") and line.kind in ("product", "convolution")
            if (bias or line.kind == "elementwise") and set(map(_module, names)) == {_module(line.path or "")}:
                others = (n for n in (*line.others, *names) if n != line.path)
                lines[held] = line._replace(others=tuple(dict.fromkeys(others)))
                self.owner[op.outputs[0]] = held
                return
        self._plain(op, "elementwise", self._largest(op), "no convolution takes it in")

    def _largest(self, op: Op) -> int:
        """The largest operand that variables alone make."""
        return max((v for v in op.inputs if self.sources[v]), key=lambda v: math.prod(self.program.shapes[v]))

    def _held(self, op: Op) -> int | None:
        """The last line that an operand is still part of."""
        return max((self.owner[v] for v in op.inputs if v in self.owner), default=None)

    def _pass_on(self, op: Op) -> None:
        """Without parameters: moves leave a value part of its line, arithmetic leaves it part of a normalisation."""
        held = self._held(op)
        if held is not None and op.primitive.name in _MOVES:
            self.owner[op.outputs[0]] = held
        elif held is not None and op.primitive.name in ELEMENTWISE and self.lines.lines[held].kind == "elementwise":
            self.owner[op.outputs[0]] = held
        elif op.primitive.name not in ELEMENTWISE | _MOVES:
            self._inside(op)

    def _inside(self, op: Op) -> None:
        """Reads what lies inside of a loop, a branch or a call."""
        steps = self.steps * int(op.params.get("length", 1))
        for inner, sources in _bodies(op, [self.sources[v] for v in op.inputs], self.program.shapes):
            within = f"it is inside of {op.primitive.name}, which XLA runs whole"
            walk = _Walk(self.lines, inner, sources, within, steps)
            for one in inner.ops:
                if any(sources[v] is None for v in one.inputs):
                    walk.read(one)
                else:
                    walk.once(one)


def _module(path: str) -> str:
    """The path without the leaf's own name, and without the collection of a flax module."""
    head = path.rpartition("/")[0]
    first, _, rest = head.partition("/")
    return rest if first in ("params", "batch_stats") else head


def _places(op: Op, shapes: Sequence[tuple[int, ...]], swap: bool) -> float:
    """How often each number of a weight is multiplied."""
    image, kernel = (shapes[v] for v in (op.inputs[::-1] if swap else op.inputs[:2]))
    out = math.prod(shapes[op.outputs[0]])
    if op.primitive.name == "conv_general_dilated":
        numbers = op.params["dimension_numbers"]
        if set(op.params["lhs_dilation"]) != {1}:  # zeros between the rows and columns of the image are not counted
            return math.prod(image) / max(1, image[numbers.lhs_spec[1]])
        return out / max(1, kernel[numbers.rhs_spec[0]])
    if op.primitive.name != "dot_general":
        return math.prod(image[:-1]) / max(1, kernel[0])
    (summed, _), (batch, _) = op.params["dimension_numbers"]
    if swap:
        (_, summed), (_, batch) = op.params["dimension_numbers"]
    return math.prod(n for a, n in enumerate(image) if a not in summed and a not in batch)


def _sources(program: Program, given: Sequence[Source], inputs: Sequence[int] = ()) -> dict[int, Source]:
    """What each value of a program is computed from, its first arguments being computed from `given`."""
    sources: dict[int, Source] = dict(enumerate(given))
    sources |= dict.fromkeys(inputs, None) | dict.fromkeys(program.constants, frozenset())
    for op in program.ops:
        sources |= dict.fromkeys(op.outputs, _union([sources[v] for v in op.inputs]))
    return sources


def _union(parts: Sequence[Source]) -> Source:
    return None if any(p is None for p in parts) else frozenset().union(*(p for p in parts if p is not None))


def _bodies(
    op: Op, given: list[Source], shapes: Sequence[tuple[int, ...]]
) -> Iterator[tuple[Program, dict[int, Source]]]:
    """The programs inside of an operation, and what their values are computed from."""
    p, name = op.params, op.primitive.name
    if name == "scan":
        outside = [shapes[v] for v in op.inputs], [shapes[v] for v in op.outputs]
        fixed, moving = scan_parts(flatten(p["jaxpr"]), *outside)
        yield _settled(p["jaxpr"], given[:fixed], given[fixed : fixed + moving], given[fixed + moving :])
    elif name == "while":
        first, second = p["cond_nconsts"], p["body_nconsts"]
        carry = given[first + second :]
        body, sources = _settled(p["body_jaxpr"], given[first : first + second], carry, [])
        test = flatten(p["cond_jaxpr"])
        yield test, _sources(test, [*given[:first], *(sources[v] for v in body.inputs[second:])])
        yield body, sources
    else:
        given = given[1:] if name == "cond" else given
        for value in p.values():
            for jaxpr in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(jaxpr, extend.core.ClosedJaxpr) and len(jaxpr.jaxpr.invars) == len(given):
                    inner = flatten(jaxpr)
                    yield inner, _sources(inner, given)


def _settled(
    jaxpr: Any, consts: list[Source], carry: list[Source], rest: list[Source]
) -> tuple[Program, dict[int, Source]]:
    """A loop's body: what it carries depends on the input as soon as one step makes it so."""
    inner = flatten(jaxpr)
    while True:
        sources = _sources(inner, [*consts, *carry, *rest])
        after = [_union([a, sources[v]]) for a, v in zip(carry, inner.outputs, strict=False)]
        if after == carry:
            return inner, sources
        carry = after
