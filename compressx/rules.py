"""Rules: which constraint applies to which leaf, by path; checked against the tree.

Rules are an ordered sequence of pairs `(pattern, constraint)`, or triples with what the axes of the leaf are (`axes`).
A pattern is a regular expression that must match the whole path of a leaf (`params/conv1/kernel`); the first rule that
matches wins; a constraint of None leaves the leaf free. A rule that matches no leaf is an error that lists the paths.
Any pytree works: Linen and Haiku dictionaries, `nnx.split` state, Equinox modules, dataclasses, lists.
"""

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compressx.axes import DEFAULTS, Axes, guessed, over_stack, parse
from compressx.constraints import programs
from compressx.constraints.base import Constraint, KeepsAll
from compressx.tree import paths

Rules = Iterable[tuple[Any, ...]]  # (pattern, constraint or None) or (pattern, constraint or None, axes)


class Bound(NamedTuple):
    """A constraint and the leaves it applies to (one leaf, or all leaves of the rule where the constraint is joint).

    Attributes:
      name: the leaf's path; for a joint constraint the rule's pattern.
      paths: paths of the leaves.
      indices: their positions among `jax.tree.leaves(params)`.
      constraint: the set, over the stack where the axes name one.
      axes: what the axes of the leaves are, as the rule says; None: Flax's layout.
      shapes: of the leaves as they are stored.

    Example:
      >>> params = {"a": {"kernel": jnp.ones((4, 2))}, "b": {"kernel": jnp.ones((2, 2))}}
      >>> [b.name for b in compressx.resolve([("a/kernel", compressx.filters(0.5))], params)]
      ['a/kernel']
    """

    name: str
    paths: tuple[str, ...]
    indices: tuple[int, ...]
    constraint: Constraint
    axes: Axes | None = None
    shapes: tuple[tuple[int, ...], ...] = ()

    def take(self, leaves: Sequence[Any]) -> Any:
        """The constraint's argument: the leaf in its layout, or the tuple of leaves."""
        held = [leaves[i] for i in self.indices]
        if self.axes is not None:
            held = [self.axes.to(x) if hasattr(x, "transpose") else _like(self.axes, x) for x in held]
        return tuple(held) if self.constraint.joint else held[0]

    def choose(self, w: Any) -> tuple[Any, ...]:
        """The structure of each of the sets, chosen for w as the sets before it leave it: a tuple over the sets."""
        return programs.choose(self.constraint, w)

    def project(self, w: Any, structures: tuple[Any, ...]) -> Any:
        """The weights projected onto one set after the other, with a structure for each."""
        return programs.project(self.constraint, w, structures)

    def freeze(self, w: Any, structures: tuple[Any, ...]) -> Any:
        """The active set around a w that lies in the sets with these structures."""
        return programs.freeze(self.constraint, w, structures)

    def retract(self, w: Any, active: Any) -> Any:
        """The nearest point of the active set."""
        return programs.retract(self.constraint, w, active)

    def violations(self, w: Any, structures: tuple[Any, ...]) -> Array:
        """How many entries of w a projection would change: int32 []."""
        return programs.violations(self.constraint, w, structures)

    def put(self, leaves: list[Any], value: Any) -> None:
        """Writes a value shaped like `take`'s answer back into a list of leaves."""
        for k, (i, v) in enumerate(zip(self.indices, value if self.constraint.joint else (value,), strict=True)):
            leaves[i] = v if self.axes is None else self.axes.back(v, self.shapes[k])


def _like(axes: Axes, x: Any) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf in a constraint's layout, for a `jax.ShapeDtypeStruct`."""
    return jax.eval_shape(axes.to, x)


def pairs(rules: Rules) -> tuple[Any, ...]:
    """Rules as a tuple, which an iterator (a `zip`) is only once; checked to be (pattern, constraint) or with axes.

    Raises:
      ValueError: an entry is something else, which the text says.
    """
    made = tuple(rules.items() if isinstance(rules, Mapping) else rules)
    for number, entry in enumerate(made):
        pair = tuple(entry) if isinstance(entry, list | tuple) and not isinstance(entry, Constraint) else ()
        if len(pair) not in (2, 3) or not isinstance(pair[0], str):
            raise ValueError(f"rule {number}: a rule is (pattern, constraint) or with axes as a third, got {entry!r}")
        if pair[1] is not None and not isinstance(pair[1], Constraint):
            called = getattr(pair[1], "__name__", None)
            hint = f"; {called} makes one when it is called: {called}(...)" if callable(pair[1]) and called else ""
            raise ValueError(f"rule {number}: {pair[0]!r} needs a constraint (or None), got {pair[1]!r}{hint}")
        try:
            parse(pair[2] if len(pair) == 3 else None)
        except ValueError as error:
            raise ValueError(f"rule {number}: {pair[0]!r}: {error}") from None
    return tuple(map(tuple, made))


def resolve(rules: Rules, params: Any) -> tuple[Bound, ...]:
    """Binds rules to the leaves of a tree, and checks that every constraint fits its leaves.

    Args:
      rules: ordered pairs (pattern, constraint or None); functions that take rules take any iterable of them.
      params: any pytree of arrays (or of `jax.ShapeDtypeStruct`).

    Returns:
      One `Bound` per constrained leaf (per rule for joint constraints), in rule order, then leaf order.

    Raises:
      ValueError: a rule matches no leaf (the text lists the paths), a pattern is no regular expression, or a constraint
        cannot apply to a leaf (the text names the leaf, its shape and why).

    Example:
      >>> params = {"conv": {"kernel": jnp.ones((3, 3, 2, 4))}, "dense": {"kernel": jnp.ones((8, 2))}}
      >>> rules = [("dense/.*", None), (".*/kernel", compressx.filters(0.5))]
      >>> [(b.name, str(b.constraint)) for b in compressx.resolve(rules, params)]
      [('conv/kernel', 'filters(density=0.5)')]
    """
    rules = pairs(rules)
    leaves = jax.tree.leaves(params)
    names = paths(params)
    taken: dict[int, int] = {}
    found: list[list[int]] = []
    for number, (pattern, *_) in enumerate(rules):
        try:
            compiled = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rule {number}: {pattern!r} is not a regular expression: {error}") from None
        found.append([i for i, name in enumerate(names) if compiled.fullmatch(name)])
    for number, matches in enumerate(found):
        for i in matches:
            taken.setdefault(i, number)
    bound: list[Bound] = []
    for number, (pattern, constraint, *said) in enumerate(rules):
        mine = [i for i in found[number] if taken[i] == number]
        if not mine:
            why = "matches nothing"
            if found[number]:
                first = sorted({rules[taken[i]][0] for i in found[number]})
                why = f"matches only leaves that earlier rules took ({', '.join(map(repr, first))})"
            listing = "\n  ".join(names) or "(no leaves)"
            raise ValueError(f"rule {number}: {pattern!r} {why}. Patterns match the whole path; paths:\n  {listing}")
        if constraint is None:
            continue
        axes = parse(said[0] if said else None)
        groups = [(pattern, mine)] if constraint.joint else [(names[i], [i]) for i in mine]
        for name, group in groups:
            bound.append(bind(name, [names[i] for i in group], group, leaves, constraint, axes))
    for b in bound:
        _check(b, leaves)
    return tuple(bound)


def bind(
    name: str,
    paths: Sequence[str],
    indices: Sequence[int],
    leaves: Sequence[Any],
    constraint: Constraint,
    axes: Axes | None,
) -> Bound:
    """A constraint on some leaves of a tree, whose axes are as said.

    Raises:
      ValueError: the axes do not fit a leaf, or nobody has said what they are; the text names the leaf.
    """
    shapes = [tuple(getattr(leaves[i], "shape", ())) for i in indices]
    for path, shape in zip(paths, shapes, strict=True):
        try:
            if axes is not None:
                axes.fits(shape)
            elif (why := guessed(constraint, shape)) is not None:
                raise ValueError(why)
        except ValueError as error:
            raise ValueError(f"{path} {shape}: {error}") from None
    held = over_stack(constraint) if axes is not None and axes.stacked else constraint
    return Bound(name, tuple(paths), tuple(indices), held, axes, tuple(shapes))


def _check(b: Bound, leaves: Sequence[Any]) -> None:
    def run(w: Any) -> Any:
        return b.project(w, b.choose(w))

    for path, leaf in zip(b.paths, (leaves[i] for i in b.indices), strict=True):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
            raise ValueError(f"{path}: only floating-point leaves can be constrained, got {dtype or type(leaf)}")
        if not leaf.size:
            raise ValueError(
                f"{path} {tuple(leaf.shape)}: it has no weights, so {b.constraint} holds nothing there; leave it out "
                f"by a rule ({re.escape(path)!r}, None) before this one"
            )
    shapes = ", ".join(f"{p} {shape}" for p, shape in zip(b.paths, b.shapes, strict=True))
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always", KeepsAll)
            jax.eval_shape(run, b.take(leaves))
    except (ValueError, TypeError, LookupError, ArithmeticError) as error:
        raise ValueError(f"{shapes}: {b.constraint} does not fit: {error}") from None
    for warning in said:
        named = issubclass(warning.category, KeepsAll)
        text = f"{shapes}: {b.constraint}: {warning.message}" if named else str(warning.message)
        warnings.warn(text, warning.category, stacklevel=3)


def table(bound: Sequence[Bound], params: Any) -> list[dict[str, Any]]:
    """Rows (path, shape, constraint, axes) for every leaf of the tree, to be logged when a run starts."""
    by_index = {i: b for b in bound for i in b.indices}
    rows = []
    for i, (name, leaf) in enumerate(zip(paths(params), jax.tree.leaves(params), strict=True)):
        held = by_index.get(i)
        axes = str(held.axes or " ".join(DEFAULTS.get(leaf.ndim, ("?",) * leaf.ndim))) if held else None
        rows.append({"path": name, "shape": list(leaf.shape), "constraint": str(held.constraint) if held else None})
        rows[-1]["axes"] = axes
    return rows
