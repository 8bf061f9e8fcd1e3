"""Sensitivity: what the loss becomes when one layer alone is pruned, at each of several rates.

The groups of every leaf are ranked once; a density is then only a number, so that all layers and all rates are one
compiled program. `allocate.by_sensitivity` shares out a budget by the result.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx.axes import DEFAULTS, Axes, parse
from compressx.constraints.base import check_density, count
from compressx.constraints.select import energy, squares
from compressx.tree import paths

Scores = Callable[[Array], Array]


class Row(NamedTuple):
    """One layer at one rate, everything else dense.

    Attributes:
      path: of the leaf.
      density: asked for.
      kept: groups kept, exactly.
      groups: groups in all.
      weights: weights kept, `kept / groups` of the leaf's.
      value: the loss, or whatever `measure` returns.
      change: value minus that of the dense network.

    Example:
      >>> from compressx.budget.sensitivity import Row
      >>> row = Row("dense", density=0.5, kept=2, groups=4, weights=6, value=1.2, change=0.2)
      >>> row._replace(density=0.25).density
      0.25
    """

    path: str
    density: float
    kept: int
    groups: int
    weights: int
    value: float
    change: float


def _energy(*axes: int) -> Scores:
    def score(w: Array) -> Array:
        held = {a % w.ndim for a in axes}
        return squares(w, tuple(a for a in range(w.ndim) if a not in held), keepdims=True)

    return score


# the groups that go together -> energy of each, with the leaf's axes (1 where a group spans the axis)
STRUCTURES: dict[str, Scores] = {
    "weights": energy,
    "filters": _energy(-1),
    "channels": _energy(-2),
    "columns": lambda w: _energy(*range(w.ndim - 1))(w),
}


def _ranks(w: Array, score: Scores) -> Array:
    """The place of every group by falling energy, int32 of the scores' shape; ties go to the lower index."""
    energy = score(w)
    order = jnp.argsort(-energy.reshape(-1), stable=True)
    place = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    return place.reshape(energy.shape)


def _layout(path: str, w: Any, structure: str | Scores, words: str | None) -> Axes | None:
    """The axes of a leaf, where they are not Flax's."""
    said = parse(words)
    try:
        if said is not None:
            said.fits(w.shape)
        elif structure in STRUCTURES and structure != "weights" and w.ndim > 2 and w.ndim not in DEFAULTS:
            raise ValueError(f'{structure} of {w.ndim} axes: say in `axes` what they are, for example "stack in out"')
    except ValueError as error:
        raise ValueError(f"{path} {tuple(w.shape)}: {error}") from None
    return said


def _slices(w: Array, layout: Axes | None) -> Array:
    """The leaf in the layout of constraints behind an axis of slices, one where it is no stack."""
    if layout is None:
        return w[None]
    return layout.to(w) if layout.stacked else layout.to(w)[None]


def _back(mask: Array, layout: Axes | None, shape: tuple[int, ...]) -> Array:
    if layout is None:
        return mask[0]
    return layout.back(mask if layout.stacked else mask[0], shape)


def sensitivity(
    measure: Callable[[Any], Array],
    params: Any,
    leaves: Sequence[str],
    densities: Sequence[float],
    structure: str | Scores = "weights",
    at_once: int | None = None,
    axes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Prunes one leaf at a time by magnitude to each density, and measures the network.

        value[l, d] = measure(params with leaf l keeping its count(d) groups of largest energy)

    Args:
      measure: `measure(params) -> scalar`, pure: the loss (or minus the accuracy) on some batches.
      params: pytree of arrays.
      leaves: paths of the leaves to prune, one at a time.
      densities: shares of groups to keep, in (0, 1].
      structure: "weights", "filters", "channels", "columns", or `scores(w) -> energies`, with w's axes, 1 where a group
        spans the axis.
      at_once: how many (leaf, density) pairs are measured in one vmapped call; all densities of a leaf where None. The
        whole is one compiled program for any value; fewer together need less memory, and are faster on a CPU.
      axes: path -> what the axes of that leaf are, as in a rule (`axes_of` gives them); else Flax's layout. Groups are
        those of the leaf in the layout of constraints, and every slice of a stack keeps as many, each its own.

    Returns:
      A row per leaf and density, in the order given.

    Raises:
      ValueError: a path that is not in params, an unknown structure, a density out of range or that keeps nothing;
        axes that do not fit a leaf, or none for a leaf of which the structure needs to know them.

    Source: pruning one layer at a time as in S. Han et al., "Learning both Weights and Connections for Efficient Neural
    Networks", 2015, figure 6; H. Li et al., "Pruning Filters for Efficient ConvNets", 2017, section 3.2.

    Example:
      >>> from compressx.budget.sensitivity import sensitivity
      >>> loss = lambda p: jnp.sum((p["w"] - 1.0) ** 2)
      >>> rows = sensitivity(loss, {"w": jnp.ones((2, 2))}, ["w"], densities=[1.0, 0.5])
      >>> [(r.kept, r.change) for r in rows]
      [(4, 0.0), (2, 2.0)]
    """
    if isinstance(structure, str) and structure not in STRUCTURES:
        raise ValueError(f"structure must be one of {', '.join(STRUCTURES)} or a function, got {structure!r}")
    score = STRUCTURES[structure] if isinstance(structure, str) else structure
    values, treedef = jax.tree.flatten(params)
    places = {name: i for i, name in enumerate(paths(params))}
    absent = [p for p in leaves if p not in places]
    if absent or not leaves or not densities:
        what = f"no leaf {', '.join(absent)}" if absent else "give at least one leaf and one density"
        raise ValueError(f"{what}; the paths are {', '.join(places)}")
    for d in densities:
        check_density(d)
    chosen = [places[p] for p in leaves]
    layouts = [_layout(p, values[places[p]], structure, (axes or {}).get(p)) for p in leaves]
    slices = [jax.eval_shape(partial(_slices, layout=a), values[i]) for i, a in zip(chosen, layouts, strict=True)]
    sizes = [math.prod(jax.eval_shape(jax.vmap(score), x).shape[1:]) for x in slices]
    pairs = [(n, count(d, size, None, f"groups of {leaves[n]}")) for n, size in enumerate(sizes) for d in densities]

    @jax.jit
    def run(values: list[Array], which: Array, kept: Array) -> tuple[Array, Array]:
        each = [_slices(values[i], a) for i, a in zip(chosen, layouts, strict=True)]
        rank = [jax.vmap(partial(_ranks, score=score))(x) for x in each]

        def pruned(pair: tuple[Array, Array]) -> Array:
            layer, k = pair
            out = list(values)
            for n, (i, r) in enumerate(zip(chosen, rank, strict=True)):
                mask = jnp.broadcast_to(r < jnp.where(layer == n, k, sizes[n]), slices[n].shape)
                out[i] = jnp.where(_back(mask, layouts[n], values[i].shape), values[i], jnp.zeros((), values[i].dtype))
            return jnp.asarray(measure(jax.tree.unflatten(treedef, out)))

        dense = measure(jax.tree.unflatten(treedef, values))
        return dense, jax.lax.map(pruned, (which, kept), batch_size=at_once or len(densities))

    which, kept = (jnp.asarray(x, jnp.int32) for x in zip(*pairs, strict=True))
    dense, found = jax.device_get(run(values, which, kept))
    if np.shape(dense) != ():
        raise ValueError(f"measure must return one number, got shape {np.shape(dense)}")
    rows = []
    for (n, k), d, value in zip(pairs, list(densities) * len(leaves), found, strict=True):
        weights = values[chosen[n]].size // sizes[n] * k  # of all slices
        rows.append(Row(leaves[n], d, k, sizes[n], weights, float(value), float(value) - float(dense)))
    return rows
