"""Levels on the layer-wise problem: coordinate descent over the levels of the weights, least squares for their scale.

A row of W (one input, all outputs) is moved at a time: w_i <- the level nearest to w_i - (H_i. (W - A)) / H_ii. Then,
for fixed levels, W is linear in the scales (or the entries of a codebook), which conjugate gradients find in H.

Source: coordinate descent on levels: K. Behdin et al., "QuantEase", 2023; alternating with the scale, and for any
grid, sign cone and support: ours.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.constraints.base import LEVEL, SIGN, TIE, Constraint
from compressx.constraints.levels import Levels, columns, from_columns, levels_of, magnitudes
from compressx.reconstruction.baselines import gptq
from compressx.reconstruction.iterate import Coordinates, Leaves
from compressx.reconstruction.problem import Layout, Matrices

_SCALE_STEPS = 20  # of conjugate gradients on the scales
_LEAST = 0.1  # a scale keeps at least this share of itself in one round, so that none changes its sign


def level_set(sets: tuple[Constraint, ...]) -> Constraint | None:
    """The set of levels among single sets, or None."""
    return next((part for part in sets if part.stage == LEVEL), None)


def levels_in(part: Constraint) -> Levels:
    """The `Levels` of a set of levels, over a leaf, a stack or every leaf of a tuple.

    Raises:
      ValueError: they are asymmetric, for which nothing here is built.
    """
    single = part.slice or part.leaf or part
    levels = levels_of((single.slice or single).spec)
    if not levels.symmetric:
        raise ValueError(
            "quantize(symmetric=False) cannot be reconstructed, nor projected in a metric; take symmetric levels, or "
            "train towards these with admm"
        )
    return levels


def table(levels: Levels) -> np.ndarray:
    """The positive levels in units of the scale, float32 `[top]`."""
    if levels.grid.startswith("float8"):
        return magnitudes(levels.grid)
    k = np.arange(1, levels.top + 1)
    return np.asarray(2.0 ** (k - 1) if levels.grid == "power_of_two" else k, np.float32)


def units(shape: tuple[int, ...], levels: Levels) -> np.ndarray:
    """Which scale or codebook each weight of a leaf (in a constraint's layout) has: int32 of the leaf's shape."""
    if levels.per == "tensor":
        return np.zeros(shape, np.int32)
    if levels.per == "channel":
        return np.broadcast_to(np.arange(shape[-1], dtype=np.int32), shape)
    width = columns(jnp.zeros(shape), levels).shape
    each = jnp.broadcast_to(jnp.arange(width[1], dtype=jnp.int32), width)
    return np.asarray(from_columns(each, shape, levels))


def in_turn(part: Constraint, layout: Layout, h: Matrices, a: Matrices, w: Matrices, structure: Any) -> Matrices:
    """The target rounded row by row, the error of each made up for by the rows after it, those of large H_ii first.

    A start for the descent that serves badly conditioned H better than the nearest levels do. Where w is 0 it stays 0.

    Args:
      part: a set of levels over one plain leaf.
      layout: of the leaf.
      h: damped H, `[G, P, P]`.
      a: target, `[G, P, F]`.
      w: a feasible point, alike.
      structure: the scale or codebook.

    Returns:
      `[G, P, F]`, on the levels of the structure up to rounding.

    Source: E. Frantar, S. Ashkboos, T. Hoefler, D. Alistarh, "GPTQ", 2022.
    """
    levels = levels_in(part)
    shape = jax.eval_shape(layout.leaf, jax.ShapeDtypeStruct(_extent(layout), jnp.float32)).shape
    ids = np.asarray(layout.matrices(jnp.asarray(units(shape, levels))))
    held = np.asarray(structure, np.float64)
    if levels.grid == "codebook":
        book = np.moveaxis(held, 0, -1).reshape(-1, levels.top)
    else:
        book = held.reshape(-1, 1) * table(levels)[None]
    out = np.empty_like(a)
    for g in range(len(a)):

        def nearest(values: Matrices, row: int, g: int = g) -> Matrices:
            own = book[ids[g, row]]
            k = (np.abs(values)[:, None] > (own[:, :-1] + own[:, 1:]) / 2).sum(1)
            level = own[np.arange(len(values)), k]
            if levels.zero_level:
                level = np.where(np.abs(values) * 2 > own[:, 0], level, 0.0)
            zero = (w[g, row] == 0) & ~(levels.zero_level & (a[g, row] != 0))
            return np.where(zero, 0.0, np.where(values < 0, -level, level))

        out[g] = gptq(a[g], h[g], nearest, damp=0.0)
    return out


def descend(
    sets: tuple[Constraint, ...], layouts: tuple[Layout, ...], sweeps: int
) -> Callable[[tuple[Array, ...], Leaves, Any, tuple[Any, ...]], tuple[Any, tuple[Any, ...]]]:
    """The compiled rounds `(damped H, targets, w, structure) -> (w, structure)`, unscaled.

    Args:
      sets: single sets in stage order, the last one of levels.
      layouts: of the leaves.
      sweeps: rounds.

    Returns:
      A function of the damped H of every leaf, the targets, a feasible w as the constraint takes it and its structures.
      Supports stay; where magnitudes are tied, the levels stay too and the scale alone is fitted.
    """
    on = Coordinates(sets, layouts)
    levels, part = levels_in(sets[-1]), sets[-1]
    tied = any(p.stage == TIE for p in sets)
    signed = any(p.stage == SIGN for p in sets)
    even = levels.grid in ("uniform", "cells")
    alone = len(sets) == 1
    stacked = part.slice is not None or (part.leaf is not None and part.leaf.slice is not None)

    def unit_of(layout: Layout) -> np.ndarray:
        """Of every weight, in a constraint's layout; each slice of a stack has units of its own."""
        shape = jax.eval_shape(layout.leaf, jax.ShapeDtypeStruct(_extent(layout), jnp.float32)).shape
        if not stacked:
            return units(shape, levels)
        one = units(shape[1:], levels)
        count = int(one.max()) + 1
        return np.stack([one + k * count for k in range(shape[0])])

    held = [unit_of(o) for o in layouts]

    def books(structure: Any) -> list[Array]:
        """Of every leaf the positive levels of each unit, `[units, top]`, float32; of even ones the first alone."""
        out = []
        for each in structure if part.joint else (structure,):
            if levels.grid == "codebook":
                book = jnp.moveaxis(each, 1 if stacked else 0, -1).reshape(-1, levels.top)
                out.append(book.astype(jnp.float32))
            else:
                steps = each.astype(jnp.float32).reshape(-1, 1)
                out.append(steps if even else steps * jnp.asarray(table(levels))[None])
        return out

    def nearest(t: Array, free: Array, book: Array) -> Array:
        """The level nearest to t `[G, F]` in the books `[G, F, top]`; 0 where `free` is, and of its sign if signed."""
        magnitude = jnp.abs(t)
        if signed:
            magnitude = jnp.where(jnp.sign(t) == jnp.sign(free), magnitude, 0.0)
        least = book[..., 0]
        if even:
            level = jnp.clip(jnp.ceil(magnitude / least - 0.5), 1.0, float(levels.top)) * least
        else:
            middle = (book[..., :-1] + book[..., 1:]) / 2
            k = jnp.sum(magnitude[..., None] > middle, axis=-1, dtype=jnp.int32)
            level = jnp.take_along_axis(book, k[..., None], axis=-1)[..., 0]
        if levels.zero_level:
            level = jnp.where(magnitude * 2 > least, level, 0.0)
        sign = jnp.sign(free) if signed else jnp.where(t < 0, -1.0, 1.0)
        return jnp.where(free == 0, 0.0, sign * level)

    def sweep(h: Array, a: Array, w: Array, ids: Array, book: Array) -> Array:
        free = a if alone else w  # beside a set of supports or signs, what is 0 stays 0

        def row(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            w, d = carry
            now = w[:, i]
            force = jnp.einsum("gp,gpf->gf", h[:, i], d, precision=lax.Precision.HIGHEST)
            t = now - force / h[:, i, i][:, None]
            new = nearest(t, free[:, i], book[ids[:, i]])
            return w.at[:, i].set(new), d.at[:, i].add(new - now)

        return lax.fori_loop(0, w.shape[1], row, (w, w - a))[0]

    def rescale(h: Array, a: Array, w: Array, ids: Array, number: int) -> Array:
        """The factors of the units, `[number]`, that bring w nearest to a in H: normal equations in the factors."""
        flat = ids.reshape(-1)

        def spread(phi: Array) -> Array:
            return w * phi[flat].reshape(w.shape)

        def gather(g: Array) -> Array:
            return jax.ops.segment_sum((w * g).reshape(-1), flat, number)

        def times(phi: Array) -> Array:
            return gather(jnp.matmul(h, spread(phi), precision=lax.Precision.HIGHEST))

        weight = gather(w * jnp.einsum("gpp->gp", h)[..., None])
        weight = jnp.where(weight > 0, weight, 1.0)
        start = jnp.ones(number, jnp.float32)
        wanted = gather(jnp.matmul(h, a, precision=lax.Precision.HIGHEST)) - times(start)
        moved, _ = jax.scipy.sparse.linalg.cg(times, wanted, M=lambda r: r / weight, maxiter=_SCALE_STEPS, tol=1e-6)
        return jnp.maximum(start + moved, _LEAST)

    def run(h: tuple[Array, ...], targets: Leaves, w: Any, structure: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
        ids = [o.matrices(jnp.asarray(u)) for o, u in zip(layouts, held, strict=True)]

        def one(_: int, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            w, own = carry
            m = list(on.matrices(w))
            each = books(own)
            if not tied:
                m = [sweep(*x) for x in zip(h, targets, m, ids, each, strict=True)]
                w = part.project(on.leaves(m, dtypes=True), own)
                m = list(on.matrices(w))
            out = []
            for x, a, y, i, book in zip(h, targets, m, ids, each, strict=True):
                if levels.grid == "codebook":
                    flat = book[i]
                    place = jnp.sum(jnp.abs(y)[..., None] > (flat[..., :-1] + flat[..., 1:]) / 2, axis=-1)
                    at, number = i * levels.top + place.astype(jnp.int32), book.size
                else:
                    at, number = i, book.shape[0]
                out.append(y * rescale(x, a, y, at, number)[at])
            aim = on.leaves(out, dtypes=True)
            active = part.freeze(w, own)
            own = part.moved(aim, active) if part.moved else own
            return part.retract(aim, active), own

        w, own = lax.fori_loop(0, sweeps, one, (w, structure[-1]))
        return w, (*structure[:-1], own)

    return jax.jit(run)


def _extent(layout: Layout) -> tuple[int, int, int]:
    view = layout.view
    return view.groups, view.rows, view.columns
