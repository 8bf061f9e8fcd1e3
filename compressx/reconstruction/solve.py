"""The layer solver: weights of any set whose outputs are nearest to those of a target, by a Gram matrix of the inputs.

Several candidates are made and the best is kept, so that the result is never worse than a projection that is refitted:

    projection      nearest to the target in the Euclidean metric, then refitted
    metric          nearest in the diagonal metric of H, then refitted
    admm            scaled ADMM (`iterate`), then refitted; for an intersection with one Z, a Z for each set, or both
    rounding        of levels: row by row, the error made up for by later rows, then coordinate descent
    library         of pattern sets: ADMM again, with the library that a solution with free patterns uses most
    exact           whole filters alone, whose columns do not meet in the objective: those of largest w_j' H w_j stay
"""

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx.axes import Axes, guessed, over_stack, parse
from compressx.capture.matrix import Gram
from compressx.constraints import from_spec, programs
from compressx.constraints.base import LEVEL, SUPPORT, TIE, Constraint
from compressx.reconstruction.compiled import admm_program, levels_program, refit_program
from compressx.reconstruction.iterate import Coordinates, Leaves
from compressx.reconstruction.levels import in_turn, levels_in
from compressx.reconstruction.problem import (
    Factored,
    Layout,
    Matrices,
    Scaled,
    layout_of,
    quadratic,
    without_statistics,
)
from compressx.reconstruction.settings import Settings

_MOST_LEVELS = 255  # magnitudes that rounding row by row compares with each weight
_OUTSIDE = 1e-6  # weight of a leaf without statistics, as a share of the error of one with them
DEFAULT = Settings()


class Solution(NamedTuple):
    """What the solver found.

    Attributes:
      w: the leaf, shaped and stored like the given one (of a joint set the tuple of leaves), exactly in the set.
      structure: of each of `constraint.sets`, as in `Hardened`.
      error: tr (W - A)' H (W - A) / tr A' H A, H undamped; of a joint set the mean over the leaves.
      errors: of every leaf.
      iterations: of ADMM; of the run that is kept, or of the first where none is.
      residual: |W - Z| / |W| at its end.
      kept: which candidate it is.
      tried: the error of every candidate, by name.

    Example:
      >>> gram = Gram(np.eye(3)[None], 100, np.zeros((1, 3)))
      >>> found = solve(jnp.asarray([[1.0], [-3.0], [2.0]]), gram, compressx.unstructured(keep=2))
      >>> found.w.ravel().tolist(), round(found.error, 4)
      ([0.0, -3.0, 2.0], 0.0714)
    """

    w: Any
    structure: tuple[Any, ...]
    error: float
    errors: tuple[float, ...]
    iterations: int
    residual: float
    kept: str
    tried: dict[str, float]


class TooFewRows(UserWarning):
    """H comes from fewer rows than it has inputs, so that it says nothing of some directions.

    Example:
      >>> import warnings
      >>> gram = Gram(np.eye(3)[None], 2, np.zeros((1, 3)))
      >>> with warnings.catch_warnings(record=True) as said:
      ...     warnings.simplefilter("always")
      ...     found = solve(jnp.ones((3, 1)), gram, compressx.unstructured(keep=2), name="dense")
      >>> str(said[0].message)[:42], said[0].category is TooFewRows
      ('dense: H of 3 inputs comes from 2 rows, so', True)
    """


def solve(
    w0: Any,
    gram: Gram | Factored,
    constraint: Constraint,
    *,
    axes: str | Axes | None = None,
    target: Any = None,
    structure: tuple[Any, ...] | None = None,
    settings: Settings = DEFAULT,
    name: str = "the leaf",
) -> Solution:
    """Weights of a set whose outputs are nearest to those of a target, on the inputs of a Gram matrix.

        minimise over W in S   1/2 tr (W - A)' H (W - A)

    Never worse, in the reported error, than the projection of the target with a refit. The same input gives the same
    bits; programs are compiled once for each set and shape.

    Args:
      w0: the leaf as it is stored, float of any precision.
      gram: statistics of its inputs, `capture.Gram`; or what `Factored` made of them, which several calls can share.
      constraint: any set over one leaf, intersections included.
      axes: what the axes of the leaf are, as in a rule.
      target: A, `[G, P, F]`; None: the leaf itself.
      structure: the structure of each set, which then stays; None: chosen with the weights.
      settings: see `Settings`.
      name: of the leaf, for errors and warnings.

    Returns:
      A `Solution`; its w satisfies the constraint exactly.

    Raises:
      ValueError: H, the leaf or the target hold NaN or infinity or do not fit each other; the constraint is over
        several leaves, or cannot apply to this one.

    Warns:
      TooFewRows: H comes from fewer rows than it has inputs.

    Source: the problem: E. Frantar, S. P. Singh, D. Alistarh, "Optimal Brain Compression", 2022; ADMM on it: X. Meng et
    al., "ALPS", 2024. With any constraint: ours.

    Example:
      >>> rng = np.random.default_rng(0)
      >>> x, w = rng.standard_normal((100, 8)) @ rng.standard_normal((8, 8)), rng.standard_normal((8, 4))
      >>> gram = Gram((x.T @ x / 100)[None], 100, x.mean(0)[None])
      >>> found = solve(jnp.asarray(w, jnp.float32), gram, compressx.n_of_m(2, 4))
      >>> int((found.w != 0).sum()), found.error < found.tried["projection"]
      (16, True)
    """
    if constraint.joint:
        raise ValueError(f"{name}: {constraint} holds over several leaves together; use solve_joint")
    said = parse(axes)
    factored = gram if isinstance(gram, Factored) else Factored(gram, settings.damp, name)
    layout = _layout(w0, constraint, said, factored, name)
    held = constraint
    if said is not None and said.stacked and constraint.slice is None:
        held = over_stack(constraint)
    a = _target(w0, target, layout, name)
    return _Run(held, (layout,), (factored,), (a,), settings, (name,)).best(structure)


def solve_joint(
    w0: Sequence[Any],
    grams: Sequence[Gram | None],
    constraint: Constraint,
    *,
    axes: str | Axes | None = None,
    targets: Sequence[Any] | None = None,
    structure: tuple[Any, ...] | None = None,
    settings: Settings = DEFAULT,
    names: Sequence[str] | None = None,
) -> Solution:
    """`solve` for a set over several leaves together: the mean of their relative errors is made least.

    Args:
      w0: the leaves, in the order in which the rule matches them.
      grams: statistics of each; None for a leaf that is in no product (a bias, a normalisation), whose distance from
        its own value counts next to nothing.
      constraint: a joint set (`scope="rule"`), intersections included.
      axes: of every leaf, as in a rule.
      targets: A of every leaf, or None for all.
      structure, settings: as in `solve`.
      names: of the leaves.

    Returns:
      A `Solution` whose w is a tuple of leaves.

    Raises:
      ValueError: as `solve`; or no leaf has statistics.

    Example:
      >>> gram = Gram(np.eye(2)[None], 100, np.zeros((1, 2)))
      >>> w = (jnp.asarray([[3.0], [1.0]]), jnp.asarray([[5.0], [4.0]]))
      >>> found = solve_joint(w, (gram, gram), compressx.unstructured(keep=3, scope="rule"))
      >>> [x.ravel().tolist() for x in found.w]  # relative errors count: 1 / 10 is the least that can be lost
      [[3.0, 0.0], [5.0, 4.0]]
    """
    called = tuple(names or (f"leaf {i}" for i in range(len(w0))))
    if not constraint.joint:
        raise ValueError(f"{constraint} holds over one leaf; use solve for each of {', '.join(called)}")
    said = parse(axes)
    layouts, factored, held = [], [], []
    for w, gram, given, name in zip(w0, grams, targets or [None] * len(w0), called, strict=True):
        layout = layout_of(w, said, None if gram is None else gram.h.shape[0], name)
        a = _target(w, given, layout, name)
        if gram is None:
            own = without_statistics(layout, _OUTSIDE / max(float(np.sum(a * a)), 1e-30))
        else:
            _fits(gram.h.shape, layout, name)
            whole = quadratic(np.asarray(gram.h, np.float64), a)
            own = Factored(gram._replace(h=gram.h / (whole if whole > 0 else 1.0)), settings.damp, name)
        layouts.append(layout)
        factored.append(own)
        held.append(a)
    if all(gram is None for gram in grams):
        raise ValueError(f"no leaf of {constraint} has statistics of its inputs, so there is nothing to reconstruct")
    counted = tuple(i for i, gram in enumerate(grams) if gram is not None)
    run = _Run(constraint, tuple(layouts), tuple(factored), tuple(held), settings, called, counted)
    return run.best(structure)


def _layout(w0: Any, constraint: Constraint, axes: Axes | None, factored: Factored, name: str) -> Layout:
    if axes is None and (why := guessed(constraint, tuple(w0.shape))) is not None:
        raise ValueError(f"{name} {tuple(w0.shape)}: {why}")
    layout = layout_of(w0, axes, factored.h.shape[0], name)
    _fits(factored.h.shape, layout, name)
    return layout


def _fits(shape: tuple[int, ...], layout: Layout, name: str) -> None:
    view = layout.view
    if shape != (view.groups, view.rows, view.rows):
        raise ValueError(
            f"{name}: the leaf {layout.shape} is {view.groups} matrices of {view.rows} inputs, H has shape {shape}"
        )


def _target(w0: Any, target: Any, layout: Layout, name: str) -> Matrices:
    if not jnp.issubdtype(w0.dtype, jnp.floating):
        raise ValueError(f"{name}: only floating-point leaves can be constrained, got {w0.dtype}")
    own = np.asarray(layout.view.to(jnp.asarray(w0)), np.float64)
    a = own if target is None else np.asarray(target, np.float64)
    if a.shape != own.shape:
        raise ValueError(f"{name}: the target must be [groups, inputs, outputs] = {own.shape}, got {a.shape}")
    if not np.isfinite(a).all():
        raise ValueError(f"{name}: {'the leaf' if target is None else 'the target'} holds NaN or infinity")
    return a


class _Run:
    """One problem: its candidates, and which of them is best."""

    def __init__(
        self,
        constraint: Constraint,
        layouts: tuple[Layout, ...],
        factored: tuple[Factored, ...],
        targets: tuple[Matrices, ...],
        settings: Settings,
        names: tuple[str, ...],
        counted: tuple[int, ...] = (0,),
    ) -> None:
        self.constraint, self.sets, self.layouts, self.factored = constraint, constraint.sets, layouts, factored
        self.targets, self.settings, self.counted = targets, settings, counted
        self.on = Coordinates(self.sets, layouts)
        self.levels = self.sets[-1].stage == LEVEL
        if self.levels:
            levels_in(self.sets[-1])  # refuses asymmetric ones
        tied = any(part.stage == TIE for part in self.sets)
        self.problems: tuple[Scaled, ...] = tuple(f.uniform if tied else f.row_scaled for f in factored)
        self.aims: Leaves = tuple(jnp.asarray(a, jnp.float32) for a in targets)
        self.tried: dict[str, float] = {}
        self.ends: dict[str, tuple[int, float]] = {}
        self.held: list[tuple[float, str, Any, tuple[Any, ...]]] = []
        for f, layout, name in zip(factored, layouts, names, strict=True):
            if f.rows < layout.view.rows:
                warnings.warn(
                    f"{name}: H of {layout.view.rows} inputs comes from {f.rows} rows, so it says nothing of "
                    f"{layout.view.rows - f.rows} or more directions; give more examples",
                    TooFewRows,
                    stacklevel=4,
                )

    def best(self, structure: tuple[Any, ...] | None) -> Solution:
        given = None if structure is None else tuple(s for _, s in self.constraint.each(structure))
        own = self.on.leaves(self.aims, dtypes=True)
        euclidean = given if given is not None else programs.choose(self.constraint, own)
        self.add("projection", programs.project(self.constraint, own, euclidean), euclidean)
        s = tuple(p.s for p in self.problems)
        scaled: Leaves = jax.tree.map(jnp.multiply, self.aims, s)
        start, first = self.chosen(self.on, scaled, given)
        if not any(part.stage == TIE for part in self.sets):
            self.add("metric", self.unscaled(start, first), first)
        for each in self.ways():
            self.iterate("admm each" if each else "admm", scaled, start, first, each=each, chosen=given is not None)
        if self.levels:
            self.in_turn({"rounding": euclidean, "rounding again": min(self.held, key=lambda h: h[0])[3]})
        library = self.library(scaled) if given is None else None
        if library is not None:
            start, _ = self.chosen(self.on, scaled, library)
            self.iterate("library", scaled, start, library, each=False, chosen=False)
        if self.constraint.spec["kind"] == "filters" and self.constraint.slice is None:
            self.add("exact", *self.filters())
        if not self.held:
            raise ValueError(f"no projection onto {self.constraint} lies in it, so nothing can be reconstructed")
        error, kept, w, structure = min(self.held, key=lambda h: h[0])
        stored = [o.axes.back(x, o.shape) if o.said else x for o, x in zip(self.layouts, self.tuple_of(w), strict=True)]
        return Solution(
            tuple(stored) if self.constraint.joint else stored[0],
            structure,
            error,
            self.errors(w),
            *self.ends.get(kept.split(" + ")[0], next(iter(self.ends.values()))),
            kept,
            dict(self.tried),
        )

    def in_turn(self, structures: dict[str, tuple[Any, ...]]) -> None:
        """Rounding row by row on the support of the best point so far, with the levels of some structures."""
        part, (*others,) = self.sets[-1], self.sets[:-1]
        plain = not self.constraint.joint and part.slice is None and all(p.stage == SUPPORT for p in others)
        if not plain or levels_in(part).top > _MOST_LEVELS:
            return
        best = min(self.held, key=lambda h: h[0])
        w = np.asarray(self.on.matrices(best[2])[0], np.float64)
        for name, structure in structures.items():
            own = (*best[3][:-1], structure[-1])
            found = in_turn(part, self.layouts[0], self.factored[0].damped, self.targets[0], w, own[-1])
            leaf = self.on.leaves([jnp.asarray(found, jnp.float32)], dtypes=True)
            self.add(name, programs.project(self.constraint, leaf, own), own)

    def iterate(self, name: str, scaled: Leaves, start: Leaves, structure: Any, *, each: bool, chosen: bool) -> None:
        """A run of ADMM from a point of the sets, and what the refit makes of its end."""
        program = admm_program(self.sets, self.layouts, self.settings, each, chosen)
        found = program(self.problems, scaled, start, structure)
        self.ends[name] = int(found.iterations), float(found.residual)
        self.add(name, self.unscaled(found.z, found.structure), found.structure)

    def ways(self) -> tuple[bool, ...]:
        """Whether each run of ADMM has a Z for every set."""
        if len(self.sets) == 1:
            return (False,)
        best = (False,) if self.levels else (False, True)
        return {"chain": (False,), "each": (True,), "best": best}[self.settings.intersections]

    def tuple_of(self, w: Any) -> tuple[Any, ...]:
        return tuple(w) if self.constraint.joint else (w,)

    def errors(self, w: Any) -> tuple[float, ...]:
        matrices = [o.matrices(x) for o, x in zip(self.layouts, self.tuple_of(w), strict=True)]
        return tuple(f.error(m, a) for f, m, a in zip(self.factored, matrices, self.targets, strict=True))

    def chosen(self, on: Coordinates, scaled: Leaves, given: tuple[Any, ...] | None) -> tuple[Leaves, tuple[Any, ...]]:
        """The scaled point of some sets nearest to the target, in the diagonal metric, and the structures."""
        s = tuple(p.s for p in self.problems)
        structure: list[Any] = []
        for k, part in enumerate(on.sets):
            made = programs.programs(part)
            w = on.seen(part, scaled, s)
            structure.append(made.init(w) if given is None else given[k])
            out = on.matrices(made.project(w, structure[-1]))
            scaled = jax.tree.map(jnp.multiply, out, s) if part.stage == LEVEL else out
        return scaled, tuple(structure)

    def library(self, scaled: Leaves) -> tuple[Any, ...] | None:
        """Structures whose pattern library is the one that a solution with free patterns uses most; None without one.

        The library that the dense weights use most is another: patterns are free to move only while they are chosen.
        """
        freed = tuple(_with_free_patterns(part) for part in self.sets)
        if all(a is b for a, b in zip(freed, self.sets, strict=True)):
            return None
        s = tuple(p.s for p in self.problems)
        start, first = self.chosen(Coordinates(freed, self.layouts), scaled, None)
        found = admm_program(freed, self.layouts, self.settings, False, False)(self.problems, scaled, start, first)
        return tuple(
            held if part is other else programs.programs(part).init(self.on.seen(part, found.z, s))
            for part, other, held in zip(self.sets, freed, found.structure, strict=True)
        )

    def unscaled(self, m: Leaves, structure: tuple[Any, ...]) -> Any:
        """A scaled point as the constraint takes it, in the precision of the leaves and exactly in the set."""
        w = self.on.leaves([x / p.s for x, p in zip(m, self.problems, strict=True)], dtypes=True)
        return programs.project(self.constraint, w, structure)

    def filters(self) -> tuple[Any, tuple[Any, ...]]:
        """Whole filters by w_j' H w_j: the projection of a square root of H times the weights, which keeps columns."""
        (f,), (a,) = self.factored, self.targets
        values, vectors = np.linalg.eigh(f.h)
        root = np.sqrt(np.maximum(values, 0.0))[..., None] * (vectors.transpose(0, 2, 1) @ a)
        top = np.abs(root).max()
        energy = jnp.asarray(root / (top if top > 0 else 1.0), jnp.float32)
        rotated = programs.project(self.constraint, self.on.leaves([energy]), ((),))
        stays = jnp.any(self.on.matrices(rotated)[0] != 0, axis=1, keepdims=True)
        kept = self.on.leaves([jnp.where(stays, self.aims[0], 0.0)], dtypes=True)
        return programs.project(self.constraint, kept, ((),)), ((),)

    def add(self, name: str, w: Any, structure: tuple[Any, ...]) -> None:
        """A feasible point, and what the refit makes of it."""
        self.keep(name, w, structure)
        if self.levels:
            damped = tuple(jnp.asarray(f.damped, jnp.float32) for f in self.factored)
            if self.settings.sweeps:
                program = levels_program(self.sets, self.layouts, self.settings.sweeps)
                self.keep(f"{name} + descent", *program(damped, self.aims, w, structure))
            return
        program = refit_program(self.sets, self.layouts, self.settings.refit_steps)
        scaled = jax.tree.map(jnp.multiply, self.aims, tuple(p.s for p in self.problems))
        found = program(self.problems, scaled, w, structure)
        self.keep(f"{name} + refit", self.on.leaves(found, dtypes=True), structure)

    def keep(self, name: str, w: Any, structure: tuple[Any, ...]) -> None:
        w = programs.project(self.constraint, w, structure)  # changes nothing where w lies in the set to the bit
        if int(programs.violations(self.constraint, w, structure)):
            return
        each = self.errors(w)
        error = float(np.mean([each[i] for i in self.counted]))
        if not np.isfinite(error):
            return
        self.tried[name] = error
        self.held.append((error, name, w, structure))


def _with_free_patterns(part: Constraint) -> Constraint:
    """A set of patterns without a library to choose, where it chooses one; any other set as it is."""
    spec = part.spec
    chooses = spec["kind"] in ("pattern", "pattern_connectivity") and spec["k"] is not None
    if not chooses or spec["shrink"] is not None or part.slice is not None or part.made is None:
        return part
    return from_spec({**spec, "library": "free", "k": None})
