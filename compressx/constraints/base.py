"""The `Constraint` type: a set of weights, known by its projection, and the algebra of such sets.

A method of this toolkit is "train a network whose weights lie in a set". A `Constraint` is that set as a tuple of pure
functions, as an optax transform is. `a & b` is the intersection; ADMM gives each of its parts a Z and a U of its own.
"""

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.constraints.floats import differ, nonzero

# The order in which the parts of an intersection are projected. Every set keeps its points when weights are zeroed
# (SUPPORT), then when wrong signs are zeroed (SIGN), then when live magnitudes are tied (TIE) or put on levels (LEVEL):
# so one pass in this order ends inside all of them.
SUPPORT, SIGN, TIE, LEVEL = range(4)
_STAGES = ("support", "sign", "tied magnitudes", "levels")
MAX_SETS = 32  # of an intersection; a set of each family is fewer


P = ParamSpec("P")


class Constraint(NamedTuple):
    """A set of weights, as a tuple of pure functions of a leaf `w`; all of them jit and vmap.

    Attributes:
      spec: JSON-able description, `{"kind": name, argument: value, ...}`; `constraints.from_spec` rebuilds the set.
      init: `init(w) -> structure`, the structure of the set (fragment signs, pattern library, block sizes, a scale),
        chosen for w; a pytree, `()` where nothing is open.
      project: `project(w, structure) -> w`, the nearest point of the set; idempotent, bit for bit.
      refresh: `refresh(w, structure) -> structure`, the open part chosen anew during training.
      freeze: `freeze(w, structure) -> active`, the convex part of the set around a feasible w in which retraining moves
        (the active set; of a support: the fixed support): a pytree (a mask, signs, ties, levels).
      retract: `retract(w, active) -> w`, the nearest point of that part.
      stage: SUPPORT, SIGN, TIE or LEVEL, the place in an intersection.
      parts: the sets of an intersection, in stage order; `()` for a single set.
      joint: True where `w` is a tuple of leaves (all that one rule matches) and not one leaf.
      refuses: `refuses(other) -> reason`, why this set cannot be intersected with another one; None where it can.
      leaf: where a set over a single leaf applies to every leaf of a tuple (see `intersection`), that set; else None.
      changed: `changed(w, before, after) -> share`, how much of the structure a refresh changed for a w of the set,
        float32 [] in 0..1; None for a set that has no such figure.
      settle: `settle(w, structure) -> structure`, at hardening, for w as the earlier sets leave it: what follows from
        their zeros is formed anew where it has changed, the rest is kept; None where nothing follows from them.
      moved: `moved(w, active) -> structure`, what is open after retraining has moved to w (a scale follows its
        weights); None where retraining moves nothing of it.
      made: the `factory` whose call the spec is.
      slice: where this is a set on every slice of a stacked leaf (see `compressx.axes`), the set on one; else None.

    Example:
      >>> constraint = compressx.unstructured(keep=2)
      >>> w = jnp.asarray([[1.0, -5.0], [4.0, 0.5]])
      >>> print(constraint.project(w, constraint.init(w)))
      [[ 0. -5.]
       [ 4.  0.]]
    """

    spec: Mapping[str, Any]
    init: Callable[[Any], Any]
    project: Callable[[Any, Any], Any]
    refresh: Callable[[Any, Any], Any]
    freeze: Callable[[Any, Any], Any]
    retract: Callable[[Any, Any], Any]
    stage: int = SUPPORT
    parts: tuple["Constraint", ...] = ()
    joint: bool = False
    refuses: Callable[["Constraint"], str | None] = lambda other: None
    leaf: "Constraint | None" = None
    changed: Callable[[Any, Any, Any], Array] | None = None
    settle: Callable[[Any, Any], Any] | None = None
    moved: Callable[[Any, Any], Any] | None = None
    made: Callable[..., "Constraint"] | None = None
    slice: "Constraint | None" = None

    def __reduce__(self) -> tuple[Callable[..., "Constraint"], tuple[Any, ...]]:
        """Pickled is the call that made the set: its functions are closures, which do not pickle."""
        if self.slice is not None:
            raise TypeError(f"{self} over a stack is bound to its leaf; pickle the set of the rule instead")
        if self.parts:
            return intersection, self.parts
        if self.leaf is not None:
            return _on_every_leaf, (self.leaf,)
        if self.made is None:
            raise TypeError(f"{self} was not made by a function that is marked @factory, and cannot be pickled")
        return _call, (self.made, {k: v for k, v in self.spec.items() if k != "kind"})

    def __and__(self, other: "Constraint") -> "Constraint":
        return intersection(self, other)

    @property
    def sets(self) -> tuple["Constraint", ...]:
        """The single sets: the parts of an intersection, or this one."""
        return self.parts or (self,)

    def each(self, structure: Any) -> list[tuple["Constraint", Any]]:
        """Every single set with its structure.

        Args:
          structure: as `init` returns it, of a single set also in a tuple of one, as in `Hardened`; None: not known.

        Raises:
          ValueError: there are more or fewer structures than sets.
        """
        if structure is None:
            return [(one, None) for one in self.sets]
        if not self.parts and not (type(structure) is tuple and len(structure) == 1):
            return [(self, structure)]
        if type(structure) is not tuple or len(structure) != len(self.sets):
            found = len(structure) if type(structure) is tuple else type(structure).__name__
            raise ValueError(f"{self} needs a tuple of structures, one for each of {len(self.sets)} sets, got {found}")
        return list(zip(self.sets, structure, strict=True))

    def __str__(self) -> str:
        if self.parts:
            return " & ".join(str(p) for p in self.parts)
        arguments = ", ".join(f"{k}={_brief(v)}" for k, v in self.spec.items() if k != "kind" and v is not None)
        return f"{self.spec['kind']}({arguments})"


def _brief(value: Any) -> str:
    """A parameter in words; of a long list (a library, the groups of a network) only its length."""
    words = str(value)
    return f"[{len(value)} entries]" if isinstance(value, (list, tuple)) and len(words) > 80 else words


def tree_where(mask: Any, w: Any) -> Any:
    """`w` where the mask is true and exactly 0 elsewhere, over a leaf or a tuple of leaves."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros((), x.dtype)), mask, w)


def factory(make: Callable[P, Constraint]) -> Callable[P, Constraint]:
    """A function that makes constraints whose `spec` is its call: `{"kind": its name, **its arguments}`.

    Arguments are those of the call with the defaults that were left out, as JSON has them (tuples and arrays as lists);
    so `constraints.from_spec` can make the same set again, and a saved file, a table or a plot can name it.

    Args:
      make: a function that returns a constraint; the names of its arguments become keys of the spec.

    Returns:
      The function, whose constraints have that spec, pickle, and can be saved.

    Example:
      >>> @factory
      ... def even_rows(step: int = 2) -> Constraint:
      ...     return support(lambda w: jnp.arange(w.shape[0])[:, None] % step == 0)
      >>> even_rows().spec
      {'kind': 'even_rows', 'step': 2}
    """
    signature = inspect.signature(make)

    @functools.wraps(make)
    def called(*args: P.args, **kwargs: P.kwargs) -> Constraint:
        made = make(*args, **kwargs)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        spec = {"kind": make.__name__, **{k: _plain(v) for k, v in bound.arguments.items()}}
        return made._replace(spec=spec, made=called)

    return called


def _call(make: Callable[..., Constraint], arguments: Mapping[str, Any]) -> Constraint:
    return make(**arguments)


def _plain(value: Any) -> Any:
    """An argument as JSON has it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, list | tuple) else value


def support(
    select: Callable[[Any], Any],
    alive: Callable[[Any], Any] | None = None,
    *,
    joint: bool = False,
) -> Constraint:
    """A set of weights whose non-zeros lie in one of certain supports.

        project(w) = argmin ||z - w||_2  subject to  supp(z) in the family,  hence  z = w * select(w).

    This is how a new sparsity constraint is made: one function from a weight to the mask of what stays, in a `factory`.

    Args:
      select: `select(w) -> mask`, the admissible support of largest energy; boolean, of w's shape.
      alive: `alive(w) -> mask`, the positions where a feasible w may move in retraining; by default its non-zeros. Sets
        that keep whole groups give the groups with any non-zero, so that a kept weight that is 0 may move again.
      joint: whether w is a tuple of leaves.

    Returns:
      The constraint; its active set is the mask, kept exactly by retraining.

    Example:
      >>> even = compressx.support(lambda w: jnp.broadcast_to(jnp.arange(w.shape[0])[:, None] % 2 == 0, w.shape))
      >>> print(even.project(jnp.ones((3, 2)), ()))
      [[1. 1.]
       [0. 0.]
       [1. 1.]]
    """
    keep = alive or (lambda w: jax.tree.map(nonzero, w))
    return Constraint(
        spec={"kind": "support"},
        init=lambda w: (),
        project=lambda w, _: tree_where(select(w), w),
        refresh=lambda w, structure: structure,
        freeze=lambda w, _: keep(w),
        retract=lambda w, active: tree_where(active, w),
        stage=SUPPORT,
        joint=joint,
    )


def intersection(*constraints: Constraint) -> Constraint:
    """The weights that lie in all of the sets: `a & b`.

    In ADMM each set has its own Z and U (the extended ADMM of PatDNN and of the SOT-MRAM engine). To harden, the sets
    are projected once in the order support, sign, ties, levels, whatever the order they are written in, each support
    set on what the earlier ones left; the result lies in all of them. The structure of a set (signs, a scale) is chosen
    for the weights as the earlier sets leave them. Where the nearest point of the intersection has a closed form, the
    constraint for it is a factory of its own and is to be preferred.

    Beside a set over several leaves together (`scope="rule"`, ...) a set over a single leaf applies to
    each of them, with a structure (a scale, signs) for each: `unstructured(0.1, scope="rule") & quantize(4)`.

    Args:
      constraints: the sets, in any order; intersections are taken apart.

    Raises:
      ValueError: two sets both fix the signs, ties or levels, one refuses the other, or there are too many.

    Source: a Z and a U for each set: W. Niu et al., "PatDNN", 2020 (extended ADMM).

    Example:
      >>> both = compressx.unstructured(density=0.5) & compressx.quantize(2)  # the same as intersection(a, b)
      >>> w = jnp.asarray([[1.0, -5.0, 2.0, 4.0]])
      >>> print(both.project(w, both.init(w)))
      [[ 0.  -4.5  0.   4.5]]
    """
    parts = sorted((p for c in constraints for p in c.sets), key=lambda p: p.stage)
    if len(parts) > MAX_SETS:
        raise ValueError(f"an intersection of {len(parts)} sets; at most {MAX_SETS} can be intersected")
    for stage in (SIGN, TIE, LEVEL):
        clash = [str(p) for p in parts if p.stage == stage]
        if len(clash) > 1:
            raise ValueError(
                f"{' and '.join(clash)} cannot be intersected: both fix the {_STAGES[stage]} of a weight, and no "
                "weight but 0 is sure to satisfy both; give each leaf one of them"
            )
    for p in parts:
        for other in parts:
            reason = p.refuses(other) if other is not p else None
            if reason:
                raise ValueError(f"{p} and {other} cannot be intersected: {reason}")
    if any(p.joint for p in parts):
        parts = [p if p.joint else _on_every_leaf(p) for p in parts]
    sets = tuple(parts)

    def init(w: Any) -> tuple[Any, ...]:
        return _each(sets, w, lambda p, v, _: p.init(v))

    def refresh(w: Any, each: Any) -> tuple[Any, ...]:
        return _each(sets, w, lambda p, v, k: p.refresh(v, each[k]))

    def chain(step: Callable[[Constraint, Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def run(w: Any, each: Any) -> Any:
            for part, e in zip(sets, each, strict=True):
                w = step(part, w, e)
            return w

        return run

    return Constraint(
        spec={"kind": "all", "parts": [dict(p.spec) for p in sets]},
        init=init,
        project=chain(lambda p, w, s: p.project(w, s)),
        refresh=refresh,
        freeze=lambda w, each: tuple(p.freeze(w, s) for p, s in zip(sets, each, strict=True)),
        retract=chain(lambda p, w, active: p.retract(w, active)),
        stage=sets[-1].stage,
        parts=sets,
        joint=sets[0].joint,
    )


def _on_every_leaf(single: Constraint) -> Constraint:
    """A set over a single leaf, over a tuple of leaves: structures, active sets and weights are tuples."""

    def each(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda w, *more: tuple(function(*leaf) for leaf in zip(w, *more, strict=True))

    return single._replace(
        init=each(single.init),
        project=each(single.project),
        refresh=each(single.refresh),
        freeze=each(single.freeze),
        retract=each(single.retract),
        joint=True,
        leaf=single,
        settle=each(single.settle) if single.settle else None,
        moved=each(single.moved) if single.moved else None,
    )


def on_leaf(constraint: Constraint, structure: Any, number: int) -> tuple[Constraint | None, Any]:
    """What a constraint says of one of its leaves alone, and the structure that belongs to it.

    Args:
      constraint: over a single leaf, which is returned as it is; or over several together, of whose sets only those
        remain that apply to each leaf by itself (None where there is no such set).
      structure: that of the set, as `Constraint.each` takes it.
      number: which leaf of the tuple.

    Returns:
      The constraint on that leaf and its structure.

    Example:
      >>> constraint = compressx.unstructured(0.5, scope="rule") & compressx.quantize(4)
      >>> w = (jnp.ones((2, 2)), 2 * jnp.ones((2, 2)))
      >>> one, scale = compressx.on_leaf(constraint, constraint.init(w), 1)
      >>> str(one).split("(")[0]
      'quantize'
    """
    if not constraint.joint:
        return constraint, structure
    found = [(p.leaf, s[number]) for p, s in constraint.each(structure) if p.leaf is not None]
    if not found:
        return None, None
    if len(found) == 1:
        return found[0]
    return intersection(*(c for c, _ in found)), tuple(s for _, s in found)


def _each(sets: Sequence[Constraint], w: Any, choose: Callable[[Constraint, Any, int], Any]) -> tuple[Any, ...]:
    """The structure of every set, chosen for w as the sets before it leave it."""
    structure = []
    for k, part in enumerate(sets):
        structure.append(choose(part, w, k))
        if k + 1 < len(sets):
            w = part.project(w, structure[-1])
    return tuple(structure)


def first_that_holds(project: Callable[[Any, Any], Any], w: Any, choice: Any, *others: Callable[[], Any]) -> Any:
    """Of some structures the first with which w lies in the set; `choice` where there is none.

    A weight that was hardened lies in a set for some structure; chosen by its energies alone another one may be found,
    whose projection would take kept weights away.

    Args:
      project: `project(w, structure)`, as in `Constraint`.
      w: a weight, or a tuple of them.
      choice: the structure for weights that lie in no such set.
      others: functions that make further ones; each is called where all before it fail.
    """
    found, held = choice, _holds(project, w, choice)
    for other in others:

        def attempt(other: Callable[[], Any] = other, found: Any = found) -> tuple[Any, Array]:
            structure = other()
            fits = _holds(project, w, structure)
            return jax.tree.map(lambda a, b: jnp.where(fits, a, b), structure, found), fits

        found, held = lax.cond(held, lambda found=found, held=held: (found, held), attempt)
    return found


def _holds(project: Callable[[Any, Any], Any], w: Any, structure: Any) -> Array:
    """Whether w lies in the set with this structure."""
    changed = jax.tree.map(lambda a, b: jnp.any(differ(a, b)), project(w, structure), w)
    return ~functools.reduce(jnp.logical_or, jax.tree.leaves(changed))


def violations(constraint: Constraint, w: Any, structure: Any) -> Array:
    """How many entries of w a projection would change: 0 exactly where w lies in every set (int32).

    Args:
      constraint: over a leaf, or over a tuple of leaves.
      w: the leaf or the tuple of leaves.
      structure: that of the set, as `Constraint.each` takes it.

    Returns:
      int32 `[]`.

    Example:
      >>> int(compressx.violations(compressx.unstructured(keep=1), jnp.asarray([[1.0, 2.0, 3.0]]), ()))
      2
    """
    total = jnp.zeros((), jnp.int32)
    for part, s in constraint.each(structure):
        changed = jax.tree.map(lambda a, b: jnp.sum(differ(a, b), dtype=jnp.int32), part.project(w, s), w)
        total = total + sum(jax.tree.leaves(changed), jnp.zeros((), jnp.int32))
    return total


class KeepsAll(UserWarning):
    """A density below 1 that leaves every group of a leaf: there are too few to leave one out."""


def count(density: float | None, n: int, keep: int | None = None, what: str = "weights", *, quiet: bool = False) -> int:
    """The exact number to keep of n: `keep` as given, or `floor(density * n + 1/2)`.

    A density below 1 that keeps all of them is a warning, `KeepsAll`, unless `quiet`.

    Args:
      density: share kept, in (0, 1], or None.
      n: how many there are.
      keep: how many are kept, or None.
      what: what is counted, for the text of an error.
      quiet: say nothing where all are kept.

    Returns:
      An integer in 1..n.

    Raises:
      ValueError: both or neither are given, the density is not in (0, 1], keep is not in 1..n, or nothing would stay.

    Example:
      >>> compressx.count(0.25, 10), compressx.count(None, 10, keep=4)
      (3, 4)
    """
    if (density is None) == (keep is None):
        raise ValueError(f"give exactly one of density and keep, got density={density}, keep={keep}")
    if keep is not None:
        if not 1 <= keep <= n:
            raise ValueError(f"keep={keep} is impossible for {n} {what}; it must lie in 1..{n}")
        return keep
    assert density is not None
    check_density(density)
    k = math.floor(density * n + 0.5)
    if k == 0 and n:
        raise ValueError(
            f"density={density} of {n} {what} keeps none of them; raise the density, give keep=, or leave this leaf out"
        )
    if k == n and density < 1 and n and not quiet:
        warnings.warn(f"density={density} of {n} {what} keeps all of them", KeepsAll, stacklevel=2)
    return k


def check_amount(density: float | None, keep: int | None, of: str = "") -> None:
    """Raises ValueError unless exactly one of a density and a count is given; `of` is the thing counted in their names.

    Args:
      density: `density`, or `<of>_density`.
      keep: `keep`, or `keep_<of>s`.
      of: "row", "column", "filter" or nothing.
    """
    if (density is None) == (keep is None):
        share, number = (f"{of}_density", f"keep_{of}s") if of else ("density", "keep")
        raise ValueError(f"give exactly one of {share} and {number}, got {share}={density}, {number}={keep}")
    if density is not None:
        check_density(density, f"{of}_density" if of else "density")


def check_choice(name: str, value: Any, allowed: Sequence[str]) -> None:
    """Raises ValueError unless an argument has one of its values."""
    if value not in allowed:
        *first, last = (f'"{a}"' for a in allowed)
        raise ValueError(f"{name} must be {', '.join(first)} or {last}, got {value!r}")


SCOPES = ("leaf", "rule")
AXES = ("outputs", "inputs")


def check_density(density: float, name: str = "density") -> None:
    """Raises ValueError unless 0 < density <= 1."""
    if not 0 < density <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {density}")
