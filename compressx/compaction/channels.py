"""Which channels of a network belong together, found from its traced program."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np
from scipy import sparse

from compressx.compaction.primitives import LABELS, MANY, Axes, Axis, Contraction, Shape, Units
from compressx.trace import Function, Op, Program, flatten, scan_parts, settled, trace

_LABELLINGS = 16  # at most, until no reshape takes an axis that something else fixes


class CompactionError(ValueError):
    """A network, or its variables, that cannot be analysed or compacted; the text names the operation or the leaf.

    Example:
      >>> try:
      ...     compressx.compaction.dead(lambda v, x: x @ v["a"], {"a": jnp.ones((2, 3))}, jnp.zeros((0, 2)))
      ... except compressx.compaction.CompactionError as error:
      ...     print(error)
      inputs of shape (0, 2) hold nothing: give those of a batch of 1
    """


class Scope(NamedTuple):
    """A program, or the body of a scan within one, with the units of its values.

    Attributes:
      program: the operations; of a body, the values that it is given are its inputs.
      axes: per value, per axis: the unit of every index, or None where the axis is fixed. Units that are joined have
        one number; 0 is the fixed one. Of a stacked leaf (`Channels`) the units of every step, `[steps, n]`.
      contractions: where values flow from one unit to others.
      inner: number of a scan's op -> its body, once where every step has the same units, else once for each step.

    Example:
      >>> two = lambda v, x: x @ v["a"] @ v["b"]
      >>> variables = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
      >>> found = compressx.compaction.channels(two, variables, jnp.ones((1, 2)))
      >>> len(found.scope.contractions), dict(found.scope.inner)
      (1, {})
    """

    program: Program
    axes: tuple[tuple[Axis, ...], ...]
    contractions: tuple[Contraction, ...]
    inner: Mapping[int, tuple["Scope", ...]]


class Channels(NamedTuple):
    """The units of a program.

    A leaf that only scans read, a slice in each step, is stacked: `[steps, ...]`, layers under `nn.scan`. What a slice
    makes for itself alone has units of its own in each.

    Attributes:
      program: the traced network.
      axes: as in `scope`.
      units: number of units.
      roles: (leaf, axis) -> "out", "in" or "along".
      reasons: (leaf, axis) -> the operation that keeps the axis, or a part of it, from being cut.
      weights: values that depend on the variables alone.
      scope: the program with the units of all its values.

    Example:
      >>> two = lambda v, x: x @ v["a"] @ v["b"]
      >>> variables = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
      >>> found = compressx.compaction.channels(two, variables, jnp.ones((1, 2)))
      >>> {(found.program.paths[leaf], axis): role for (leaf, axis), role in found.roles.items()}
      {('a', 0): 'in', ('a', 1): 'out', ('b', 0): 'in', ('b', 1): 'out'}
    """

    program: Program
    axes: tuple[tuple[Axis, ...], ...]
    units: int
    roles: dict[tuple[int, int], str]
    reasons: dict[tuple[int, int], str]
    weights: frozenset[int]
    scope: Scope

    @property
    def contractions(self) -> tuple[Contraction, ...]:
        """Where values flow from one unit to others, outside of scans."""
        return self.scope.contractions


def channels(model: nn.Module | Function, variables: Any, x: Any, keep: Sequence[str] = ()) -> Channels:
    """Finds the units of a network: which indices of which axes must be cut together.

    Channels are followed through the traced program: convolutions and matrix products make them on the output axis of
    a weight and read them on the input axis of the next; what is added or multiplied elementwise is joined;
    concatenation, slices, padding and reshapes map them, and a scan carries them from step to step. An axis that a
    reshape splits is cut along one of its factors: a projection to `heads * head_dim` by whole heads. Outputs and
    inputs of the network are fixed, and so is what depends on no variable.

    Args:
      model: a flax module (in evaluation mode, see `trace.function_of`), or any `f(variables, x)`.
      variables: pytree of arrays or shapes.
      x: inputs, arrays or shapes.
      keep: names of primitives without a rule (such as `while`) whose operands may be left whole.

    Returns:
      `Channels`: units, and of which axes they are the indices; `groups` sorts them.

    Raises:
      CompactionError: channels pass through a primitive that has no rule and is not in `keep`.

    Source: coupled channels read from a program rather than typed by hand: G. Fang et al., "DepGraph: Towards Any
    Structural Pruning", 2023; the rules of propagation are our own.

    Example:
      >>> two = lambda v, x: x @ v["a"] @ v["b"]
      >>> variables = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
      >>> found = compressx.compaction.channels(two, variables, jnp.ones((1, 2)))
      >>> found.reasons  # both ends of the network are fixed
      {(0, 0): 'dot_general sums over an axis that cannot be cut', (1, 1): "they are the network's output"}
    """
    program = settled(trace(model, variables, x))
    leaves = len(program.paths)
    weights = _reached(program, set(range(leaves)), alone=True)
    stacked = _stacked(program)
    passed: dict[tuple[Any, ...], int] = {}
    bodies: dict[int, Program] = {}
    for _ in range(_LABELLINGS):
        u = Units(weights, program.constants)
        u.passed = passed
        blocks: list[tuple[int, int, int]] = []  # first unit, leaf, axis
        given: dict[int, Axes] = {}
        for value in range(leaves):
            given[value] = []
            for a, n in enumerate(program.shapes[value]):
                blocks.append((u.count, value, a))
                steps = stacked.get(value)
                given[value].append(u.fresh(n) if steps is None else None if a == 0 else _rows(u, steps, n))
        blocks.append((u.count, leaves, 0))  # where the leaves' units end
        given |= {value: [None] * len(program.shapes[value]) for value in program.inputs}
        own = set(range(leaves))
        labelled = _Walk(u, keep, bodies).label(program, given, own, own)
        for v in program.outputs:
            u.fix_all(labelled.axes[v], "they are the network's output")
        joined = _components(u)
        wrong = [c.key for c in u.choices if c.more and not joined[c.units].any()]
        if not wrong:
            break
        for key in set(wrong):
            passed[key] = passed.get(key, 0) + 1
    scope = labelled.numbered(joined)
    return Channels(
        program,
        scope.axes,
        int(joined.max()) + 1,
        _roles(u, blocks, leaves),
        _reasons(u, blocks, leaves, joined, scope),
        frozenset(weights),
        scope,
    )


def _rows(u: Units, steps: int, n: int) -> np.ndarray:
    return u.fresh(steps * n).reshape(steps, n)


def _reached(program: Program, start: set[int], *, alone: bool) -> set[int]:
    """The values that depend on some, or with `alone` on nothing but those and constants."""
    found = start | set(program.constants) if alone else set(start)
    for op in program.ops:
        if (all if alone else any)(v in found for v in op.inputs):
            found |= set(op.outputs)
    return found


def _stacked(program: Program) -> dict[int, int]:
    """Leaf -> steps, for leaves that nothing but scans over axis 0 reads, also where they are cast on the way."""
    readers, found = program.readers(), {}

    def steps(value: int) -> set[int]:
        lengths = set()
        for number, operand in readers.get(value, ()):
            op = program.ops[number] if number >= 0 else None
            if op is not None and op.primitive.name == "scan":
                fixed, carried = parts_of(op, program, flatten(op.params["jaxpr"]))
                lengths.add(int(op.params["length"]) if operand >= fixed + carried else 0)
            elif op is not None and op.primitive.name in ("convert_element_type", "copy", "stop_gradient"):
                lengths |= steps(op.outputs[0])
            else:
                lengths.add(0)
        return lengths

    for leaf in range(len(program.paths)):
        lengths = steps(leaf)
        if len(lengths) == 1 and max(lengths) > 1:
            found[leaf] = lengths.pop()
    return found


def parts_of(op: Op, program: Program, body: Program) -> tuple[int, int]:
    """How many operands of a scan in a program are the same in every step, and how many it carries."""
    return scan_parts(body, [program.shapes[v] for v in op.inputs], [program.shapes[v] for v in op.outputs])


class _Labels(NamedTuple):
    """A scope before its units have their numbers."""

    program: Program
    axes: dict[int, Axes]
    contractions: list[Contraction]
    inner: dict[int, list["_Labels"]]

    def numbered(self, joined: np.ndarray) -> Scope:
        axes = (self.axes.get(v, [None] * len(s)) for v, s in enumerate(self.program.shapes))
        return Scope(
            self.program,
            tuple(tuple(None if x is None else joined[x] for x in each) for each in axes),
            tuple(self.contractions),
            {number: tuple(b.numbered(joined) for b in bodies) for number, bodies in self.inner.items()},
        )


class _Walk:
    """Labels programs, and the bodies of their scans; what is joined is collected in `u`."""

    def __init__(self, u: Units, keep: Sequence[str], bodies: dict[int, Program]) -> None:
        self.u, self.keep, self.bodies = u, keep, bodies

    def label(self, program: Program, given: Mapping[int, Axes], variables: set[int], weights: set[int]) -> _Labels:
        """Labels a program.

        Args:
          program: of the network, or a body.
          given: axes of its leaves and inputs.
          variables: which of those depend on the variables: only these have channels.
          weights: which of them depend on nothing else.
        """
        u = self.u
        before = u.weights, u.constants, u.contractions
        u.weights = _reached(program, weights, alone=True)
        u.constants, u.contractions = program.constants, []
        touched = _reached(program, variables, alone=False)
        axes = dict(given)
        inner: dict[int, list[_Labels]] = {}
        for value in program.constants:
            axes[value] = [u.fresh(n, loose=True) for n in program.shapes[value]]
        try:
            for number, op in enumerate(program.ops):
                results = self._op(number, op, program, axes, touched, inner)
                for v, found in zip(op.outputs, results, strict=True):
                    rank = len(program.shapes[v])
                    axes[v] = found if len(found) == rank else [None] * rank
            return _Labels(program, axes, u.contractions, inner)
        finally:
            u.weights, u.constants, u.contractions = before

    def _op(
        self,
        number: int,
        op: Op,
        program: Program,
        axes: dict[int, Axes],
        touched: set[int],
        inner: dict[int, list[_Labels]],
    ) -> list[Axes]:
        u, name = self.u, op.primitive.name
        ins = [axes[v] for v in op.inputs]
        shapes, outs = ([program.shapes[v] for v in values] for values in (op.inputs, op.outputs))
        if name in LABELS:
            given = LABELS[name](u, number, op, ins, shapes, outs[0])
            return list(given) if name in MANY else [given] * len(outs)
        free = any(units is not None for v in op.inputs if v in touched for units in axes[v])
        if name == "scan" and free:
            try:
                return self._scan(number, op, ins, shapes, outs, touched, inner)
            except CompactionError:
                if name not in self.keep:
                    raise
        if free and name not in self.keep:
            raise CompactionError(
                f"channels pass through the operation {name!r} (operands {', '.join(map(str, shapes))}), and no rule "
                f"says what it does to them; keep=({name!r},) leaves whole whatever meets it"
            )
        for operand in ins:
            u.fix_all(operand, f"they pass through {name}")
        return [[None] * len(shape) for shape in outs]

    def _scan(
        self,
        number: int,
        op: Op,
        ins: list[Axes],
        shapes: list[Shape],
        outs: list[Shape],
        touched: set[int],
        inner: dict[int, list[_Labels]],
    ) -> list[Axes]:
        """The channels of a scan's body in every step; what is carried has the same ones before and after."""
        u = self.u
        if id(op.params["jaxpr"]) not in self.bodies:
            self.bodies[id(op.params["jaxpr"])] = settled(flatten(op.params["jaxpr"]))
        body = self.bodies[id(op.params["jaxpr"])]
        fixed, carried = scan_parts(body, shapes, outs)
        over = fixed + carried
        for x in ins[over:]:
            if x[0] is not None:
                u.fix(x[0], "scan runs along it")
        layered = any(x is not None and x.ndim == 2 for each in ins[over:] for x in each)
        outer = list(zip(body.inputs, op.inputs, strict=True))
        variables = {v for v, given in outer if given in touched} | set(body.inputs[fixed:over])
        weights = {v for v, given in (*outer[:fixed], *outer[over:]) if given in u.weights}
        scope, u.scope = u.scope, (*u.scope, number)
        try:
            made = []
            for step in range(int(op.params["length"]) if layered else 1):
                slices = [[x if x is None or x.ndim == 1 else x[step] for x in each[1:]] for each in ins[over:]]
                given = dict(zip(body.inputs, (*map(list, ins[:over]), *slices), strict=True))
                made.append(self.label(body, given, variables, weights))
        finally:
            u.scope = scope
        inner[number] = made
        carry = [list(x) for x in ins[fixed:over]]
        stacked: list[Axes] = [[] for _ in outs[carried:]]
        for labels in made:
            results = [labels.axes[v] for v in body.outputs]
            carry = [
                [u.join(a, b, "scan carries it") for a, b in zip(x, y, strict=True)]
                for x, y in zip(carry, results[:carried], strict=True)
            ]
            for k, found in enumerate(results[carried:]):
                before = stacked[k] or list(found)
                stacked[k] = [u.join(a, b, "scan stacks it") for a, b in zip(before, found, strict=True)]
        return carry + [[None, *x] for x in stacked]


def _components(u: Units) -> np.ndarray:
    """unit -> the number of its class, 0 for whatever is joined with something fixed."""
    labels = _classes(u, [(np.zeros_like(x), x) for x, _ in u.fixed] + u.edges)
    return np.where(labels == labels[0], 0, labels + 1 - (labels > labels[0])).astype(np.int64)


def _classes(u: Units, ends: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    a, b = (np.concatenate([e[side] for e in ends]) if ends else np.zeros(0, int) for side in (0, 1))
    graph = sparse.coo_matrix((np.ones(a.size, bool), (a, b)), shape=(u.count, u.count))
    labels: np.ndarray = sparse.csgraph.connected_components(graph, directed=False)[1]
    return labels


def _block(blocks: list[tuple[int, int, int]], units: np.ndarray, leaves: int) -> tuple[int, int] | None:
    """The (leaf, axis) whose units these are."""
    if not units.size:
        return None
    place = np.searchsorted([b[0] for b in blocks], units[0], side="right") - 1
    if place < 0 or blocks[place][1] >= leaves:
        return None
    return blocks[place][1:] if units.max() < blocks[place + 1][0] else None


def _roles(u: Units, blocks: list[tuple[int, int, int]], leaves: int) -> dict[tuple[int, int], str]:
    roles = dict.fromkeys((b[1:] for b in blocks if b[1] < leaves), "along")
    for units, role in u.roles:
        at = _block(blocks, units, leaves)
        if at is not None and roles[at] != "out":  # a tied table makes what it is multiplied with in the end
            roles[at] = role
    return roles


def _reasons(
    u: Units, blocks: list[tuple[int, int, int]], leaves: int, joined: np.ndarray, scope: Scope
) -> dict[tuple[int, int], str]:
    """Why axes are fixed: by what they meet themselves, or by the first that anything joined with them meets."""
    reasons: dict[tuple[int, int], str] = {}
    for units, why in u.fixed:
        at = _block(blocks, units, leaves)
        if at is not None:
            reasons.setdefault(at, why)
    classes, of_class = _classes(u, u.edges), dict[int, str]()
    for units, why in u.fixed:
        for k in np.unique(classes[units]):
            of_class.setdefault(int(k), why)
    ends = [*(b[0] for b in blocks[1:]), blocks[-1][0]]
    for (first, leaf, axis), end in zip(blocks, ends, strict=True):
        if leaf < leaves and end > first and not joined[first:end].all() and (leaf, axis) not in reasons:
            dead = np.arange(first, end)[joined[first:end] == 0]
            reasons[leaf, axis] = of_class[int(classes[dead[0]])]
        elif leaf < leaves and end == first and scope.axes[leaf][axis] is None and scope.program.shapes[leaf][axis]:
            reasons[leaf, axis] = "scan runs along it"
    return reasons
