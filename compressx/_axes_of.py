"""What the axes of a network's leaves are, read off the traced program: which ones its products sum over.

A leaf's axes are followed through whatever only moves values (transpositions, reshapes, slices, casts, elementwise
arithmetic with constants) to the product, convolution or lookup that reads them. There an axis that is summed over is
an input, one that stays is an output, one that is paired with a batch axis or cut slice by slice is a stack. Shapes
decide nothing: a `DenseGeneral` kernel and stacked dense kernels of one shape get different words.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from compressx.axes import DEFAULTS, parse
from compressx.compaction.primitives import ELEMENTWISE
from compressx.rules import Rules, pairs, resolve
from compressx.trace import Op, Program, flatten, scan_parts, trace
from compressx.tree import paths


class _Factor(NamedTuple):
    """A part of an axis: the axes of the leaf that it may come from, and its extent."""

    axes: frozenset[int]
    size: int


_View = tuple[tuple[_Factor, ...], ...]  # for each axis of a value its factors, the slowest first
_Views = dict[int, _View]  # leaf -> its view
_MOVING = frozenset(("broadcast_in_dim", "dynamic_slice", "reshape", "rev", "slice", "squeeze", "transpose"))


def axes_of(model: Any, variables: Any, x: Any) -> dict[str, str]:
    """Says what the axes of a network's weights are, by tracing the network: words of `compressx.axes` for each leaf.

    Args:
      model: a Linen or NNX module, or any `f(variables, x)`.
      variables: its pytree of arrays or `jax.ShapeDtypeStruct`; leaves that are neither are passed on as they are.
      x: inputs, a pytree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      path of a leaf -> its axes. Leaves that no product reads (biases, scales) are absent, and so are those that the
      network uses in two ways that differ (an embedding that is also the output layer) or behind an operation that
      mixes their axes.

    Example:
      >>> w = {"query": jnp.ones((8, 2, 4)), "experts": jnp.ones((2, 4, 8))}
      >>> def network(w, x):
      ...     heads = jnp.einsum("btd,dhk->bthk", x, w["query"])
      ...     return jnp.einsum("bthk,hkd->bthd", heads, w["experts"])
      >>> compressx.axes_of(network, w, jnp.ones((1, 3, 8)))
      {'experts': 'stack in out', 'query': 'in out out'}
    """
    return axes_in(trace(model, variables, x))


def axes_in(program: Program) -> dict[str, str]:
    """`axes_of` for a network that has been traced."""
    shapes = [program.shapes[leaf] for leaf in range(len(program.paths))]
    views: dict[int, _Views] = {
        leaf: {leaf: tuple((_Factor(frozenset((axis,)), n),) for axis, n in enumerate(shape))}
        for leaf, shape in enumerate(shapes)
    }
    walk = _Walk()
    walk.read(program, views, set(program.inputs))
    said = {}
    for leaf, uses in walk.found.items():
        words = {_words(use, shapes[leaf]) for use in uses}
        if len(words) == 1 and (one := words.pop()) is not None:
            said[program.paths[leaf]] = " ".join(one)
    return dict(sorted(said.items()))


def with_axes(rules: Rules, params: Any, axes: Mapping[str, str]) -> tuple[Any, ...]:
    """Rules that say the axes of their leaves, a rule for each layout that a pattern matches.

    Args:
      rules: as for `resolve`; a rule that says its axes keeps them.
      params: the tree that the rules are for.
      axes: path -> axes, as `axes_of` gives them for this tree.

    Returns:
      The rules as triples. Leaves whose axes are Flax's (`in out`, `taps taps in out`) or unknown have none.

    Raises:
      ValueError: a path is not in the tree, or leaves of one joint constraint differ in their axes.

    Example:
      >>> params = {"dense": jnp.ones((8, 4)), "query": jnp.ones((8, 2, 4))}
      >>> rules = compressx.with_axes([(".*", compressx.filters(0.5))], params, {"query": "in out out"})
      >>> [(pattern, axes) for pattern, _, axes in rules]
      [('dense', None), ('query', 'in out out')]
    """
    names = paths(params)
    unknown = sorted(set(axes) - set(names))
    if unknown:
        raise ValueError(f"axes of {unknown[0]!r}: the tree has no such leaf; its paths are {', '.join(names)}")
    leaves = dict(zip(names, jax.tree.leaves(params), strict=True))
    given: dict[str, str | None] = {}
    for name, words in axes.items():
        said = parse(words)
        usual = said is not None and said.words == DEFAULTS.get(np.ndim(leaves[name]))
        given[name] = None if usual else words
    made: list[tuple[Any, ...]] = []
    before: list[tuple[Any, ...]] = []
    for rule in pairs(rules):
        pattern, constraint, *said_here = rule
        compiled = re.compile(pattern)
        free = [n for n in names if compiled.fullmatch(n) and not any(re.fullmatch(b[0], n) for b in before)]
        before.append(rule)
        layouts = dict.fromkeys(given.get(n) for n in free)
        if constraint is None or (said_here and said_here[0] is not None) or not free:
            made.append((pattern, constraint, said_here[0] if said_here else None))
        elif len(layouts) == 1:
            made.append((pattern, constraint, *layouts))
        elif constraint.joint:
            raise ValueError(
                f"{pattern!r}: {constraint} holds over leaves together, whose axes differ: "
                + ", ".join(f"{n} {given.get(n) or 'as in Flax'}" for n in free)
            )
        else:
            for layout in layouts:
                mine = [re.escape(n) for n in free if given.get(n) == layout]
                made.append(("|".join(mine), constraint, layout))
    resolve(made, params)
    return tuple(made)


def _words(use: dict[int, str], shape: tuple[int, ...]) -> tuple[str, ...] | None:
    """A word for each axis, or None where an axis is two things."""
    if "?" in use.values() or not {"in", "out"} & set(use.values()):
        return None
    # an axis that never reached the product was cut away slice by slice; one of extent 1 is lost in a reshape
    rest = "out" if "in" in use.values() else "in"
    return tuple(use.get(axis, "stack" if n > 1 else rest) for axis, n in enumerate(shape))


class _Walk:
    """Follows leaves through a program and its inner ones.

    Attributes:
      found: leaf -> what each operation that reads it makes of its axes.
      settled: leaf -> words of axes that are gone before the product is reached: taken slice by slice, or summed over
        in the product with another weight.
    """

    def __init__(self) -> None:
        self.found: dict[int, list[dict[int, str]]] = {}
        self.settled: dict[int, dict[int, str]] = {}

    def read(self, program: Program, views: dict[int, _Views], data: set[int]) -> None:
        """Reads a program; `views` of its values and those that depend on the network's input grow on the way."""
        shapes = program.shapes
        for op in program.ops:
            name, held = op.primitive.name, [views.get(v, {}) for v in op.inputs]
            from_data = [v in data for v in op.inputs]
            if name in ("dot_general", "ragged_dot_general"):
                made = self._product(op.params, held, from_data, [shapes[v] for v in op.inputs], shapes[op.outputs[0]])
                views[op.outputs[0]] = made
            elif name == "conv_general_dilated" and not from_data[1]:
                out, inner, *taps = op.params["dimension_numbers"].rhs_spec
                self._note(held[1], {out: "out", inner: "in"} | dict.fromkeys(taps, "taps"))
            elif name == "gather" and from_data == [False, True] and len(shapes[op.inputs[0]]) == 2:
                looked = op.params["dimension_numbers"].start_index_map  # as the product with a one-hot row
                self._note(held[0], {a: "in" if a in looked else "out" for a in (0, 1)})
            elif name in ("cond", "scan", "while"):
                self._inside(op, program, views, data)
            elif name in _MOVING and not from_data[0]:
                moved = {leaf: _moved(op, view, shapes[op.outputs[0]]) for leaf, view in held[0].items()}
                views[op.outputs[0]] = {leaf: view for leaf, view in moved.items() if view is not None}
            elif name in ELEMENTWISE and not any(from_data):
                same = [shapes[v] == shapes[op.outputs[0]] for v in op.inputs]
                views[op.outputs[0]] = {
                    k: v for own, fits in zip(held, same, strict=True) if fits for k, v in own.items()
                }
            if any(from_data):
                data.update(op.outputs)

    def _note(self, held: _Views, words: Mapping[int, str]) -> None:
        for leaf, view in held.items():
            use = dict(self.settled.get(leaf, {}))
            for axis, factors in enumerate(view):
                for own in frozenset().union(*(f.axes for f in factors)):
                    use[own] = words[axis] if use.get(own, words[axis]) == words[axis] else "?"
            self.found.setdefault(leaf, []).append(use)

    def _settle(self, leaf: int, factors: Sequence[_Factor], word: str) -> None:
        known = self.settled.setdefault(leaf, {})
        for axis in frozenset().union(*(f.axes for f in factors)):
            known[axis] = word if known.get(axis, word) == word else "?"

    def _product(
        self, params: dict[str, Any], held: Sequence[_Views], from_data: Sequence[bool], shapes: Any, out: Any
    ) -> _Views:
        """Notes a product. That of two weights is a weight, which shows each of them along the axes that it keeps."""
        groups: Sequence[int] = ()
        if "ragged_dot_dimension_numbers" in params:
            numbers = params["ragged_dot_dimension_numbers"]
            (summed, batch), groups = numbers.dot_dimension_numbers, numbers.rhs_group_dimensions
        else:
            summed, batch = params["dimension_numbers"]
        alone, views, start = not any(from_data[:2]) and not groups, {}, len(batch[0])
        for side in (0, 1):
            stacked = {*batch[side], *(groups if side else ())}
            free = [a for a in range(len(shapes[side])) if a not in stacked and a not in summed[side]]
            # of two weights (LoRA) the left one takes the input, and the sum is over its outputs
            inner, outer = ("out", "in") if alone and side == 0 else ("in", "out")
            if not from_data[side]:
                words = (
                    dict.fromkeys(stacked, "stack") | dict.fromkeys(summed[side], inner) | dict.fromkeys(free, outer)
                )
                self._note(held[side], words)
            for leaf, view in held[side].items() if alone else ():
                kept: list[tuple[_Factor, ...]] = [(_Factor(frozenset(), n),) for n in out]
                for axis in summed[side]:
                    self._settle(leaf, view[axis], inner)
                for to, a in [*enumerate(batch[side]), *enumerate(free, start)]:
                    kept[to] = view[a]
                views[leaf] = tuple(kept)
            start += len(free)
        return views

    def _inside(self, op: Op, program: Program, views: dict[int, _Views], data: set[int]) -> None:
        """Reads the bodies of a loop or a choice; a scan takes the first axis slice by slice."""
        name, p, given = op.primitive.name, op.params, list(op.inputs)
        fixed = carried = whole = len(given)
        if name == "scan":
            bodies = [flatten(p["jaxpr"])]
            outside = [program.shapes[v] for v in op.inputs], [program.shapes[v] for v in op.outputs]
            fixed, carried = scan_parts(bodies[0], *outside)
            whole = fixed + carried
        elif name == "while":
            bodies, given, fixed = [flatten(p["body_jaxpr"])], given[p["cond_nconsts"] :], p["body_nconsts"]
        else:
            bodies, given = [flatten(branch) for branch in p["branches"]], given[1:]
        for body in bodies:
            inner = {}
            for number, (value, own) in enumerate(zip(body.inputs, given, strict=True)):
                held = views.get(own, {})
                if number >= whole:
                    for leaf, view in held.items():
                        self._settle(leaf, view[0], "stack")
                inner[value] = {leaf: view[1:] if number >= whole else view for leaf, view in held.items()}
            moving = {value for value, own in zip(body.inputs, given, strict=True) if own in data}
            loop = list(zip(body.inputs[fixed:], body.outputs[:carried], strict=False))
            self.read(body, inner, carried_data(body, moving, loop))


def carried_data(body: Program, moving: set[int], loop: Sequence[tuple[int, int]]) -> set[int]:
    """The arguments of a loop's body that depend on the network's input in some step."""
    while True:
        reached = set(moving)
        for op in body.ops:
            if reached.intersection(op.inputs):
                reached.update(op.outputs)
        more = {before for before, after in loop if after in reached} - moving
        if not more:
            return moving
        moving = moving | more


def _moved(op: Op, view: _View, shape: tuple[int, ...]) -> _View | None:
    """The view of a value of this shape behind an operation that only moves values; None where it mixes the axes."""
    name, params = op.primitive.name, op.params
    if name == "transpose":
        return tuple(view[a] for a in params["permutation"])
    if name == "broadcast_in_dim":
        made: list[tuple[_Factor, ...]] = [(_Factor(frozenset(), n),) for n in shape]
        for own, to in zip(view, params["broadcast_dimensions"], strict=True):
            made[to] = own if _extent(own) == shape[to] else made[to]
        return tuple(made)
    if name == "squeeze":
        return tuple(own for axis, own in enumerate(view) if axis not in params["dimensions"])
    if name in ("slice", "dynamic_slice"):
        cut = [(_Factor(frozenset().union(*(f.axes for f in own)), n),) for own, n in zip(view, shape, strict=True)]
        return tuple(own if _extent(own) == n else part for own, part, n in zip(view, cut, shape, strict=True))
    return view if name == "rev" else _reshaped([f for own in view for f in own if f.size != 1], shape)


def _extent(factors: Sequence[_Factor]) -> int:
    return math.prod(f.size for f in factors)


def _reshaped(factors: Sequence[_Factor], shape: tuple[int, ...]) -> _View | None:
    """The factors in row-major order over the axes of another shape; a factor is divided where it has to be."""
    rest, made = list(reversed(factors)), []
    for n in shape:
        own: list[_Factor] = []
        while n > 1:
            factor = rest.pop()
            if factor.size > n and factor.size % n == 0:
                rest.append(factor._replace(size=factor.size // n))
                factor = factor._replace(size=n)
            if n % factor.size:
                return None
            own.append(factor)
            n //= factor.size
        made.append(tuple(own))
    return tuple(made)
