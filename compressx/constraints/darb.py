"""Regular blocks: the largest weight of every block (BMWM), block sizes that follow row density (DARB), and banks.

Orientation is explicit. The matrix is `[in, out]` (conv: GEMM view `[P, F]`). With axis="outputs" a *row* is one
input's fan-out and blocks run along the outputs, as in the papers' code, where the gates of a recurrent cell form one
row (scope="rule"); with axis="inputs" a row is one output's fan-in. Results depend on it.

L is the length of a row, R the number of rows. Blocks are consecutive; a ragged last block is shorter.

Source: A. Ren, T. Zhang, Y. Wang, S. Lin, P. Dong, Y. Chen, Y. Xie, Y. Wang, "DARB: A Density-Adaptive Regular-Block
Pruning for Deep Neural Networks", 2020. The paper gives no pseudocode; the rule in `darb` is our reading of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.constraints.base import (
    AXES,
    Constraint,
    check_choice,
    check_density,
    count,
    factory,
    first_that_holds,
    tree_where,
)
from compressx.constraints.floats import bits, nonzero
from compressx.constraints.gates import join, matrix_set, split
from compressx.constraints.select import top_k_mask

MAX_SIZES = 32  # block sizes that a row may choose from: each is tried on all rows
POWERS = (1, 2, 4, 8, 16, 32, 64, 128)


@factory
def block_max(size: int, *, axis: str = "outputs", scope: str = "leaf") -> Constraint:
    """At most one non-zero in every block of a row (block-max weight masking).

        argmin_z ||z - w||_2  s.t. each block of z has at most one non-zero:
        the weight of largest magnitude stays; ties go to the lower index.

    A row keeps ceil(L / size) weights: a ragged last block keeps its maximum too.

    Args:
      size: length of a block.
      axis: "outputs" or "inputs", along which blocks run.
      scope: "leaf"; or "rule", the matrices of the rule joined along their outputs (see `constraints.gates`).

    Source: A. Ren et al., "DARB: A Density-Adaptive Regular-Block Pruning for Deep Neural Networks", 2020 (block-max
    weight masking).

    Example:
      >>> w = jnp.asarray([[1.0, -5.0, 2.0, 4.0], [3.0, 0.5, -3.0, 1.0]])
      >>> print(compressx.block_max(2).project(w, ()))
      [[ 0. -5.  0.  4.]
       [ 3.  0. -3.  0.]]
    """
    check_choice("axis", axis, AXES)
    if size < 1:
        raise ValueError(f"a block needs at least 1 weight, got size={size}")

    def select(m: Array, _: Any) -> Array:
        return _orient(_largest(_orient(m, axis), size), axis)

    return matrix_set(scope, lambda m: (), select, select)


@factory
def darb(
    density: float,
    *,
    allowed: Sequence[int] = POWERS,
    axis: str = "outputs",
    scope: str = "leaf",
    assignment: str = "adaptive",
    seed: int = 0,
) -> Constraint:
    """At most one non-zero in every block of a row, with a block size for every row that follows the row's density.

        argmin_z ||z - w||_2  s.t. each block of B_r weights of row r has at most one non-zero

    The sizes are the structure, int32 `[R]`, positions in `allowed`. `init` and `refresh` choose them: the weights are
    pruned by magnitude to `density`, which leaves row r a share d_r (`row_density`); B_r is the allowed size nearest to
    c / d_r in ratio, for a common scale c that brings sum_r ceil(L / B_r) to the target density * R * L. As c grows,
    rows step to their next size (in the order of the c at which they do; equal ones by index), dense rows by many
    weights, sparse ones by few. A step that would pass the target is left out, and later ones that still fit are made;
    or one step more is made, and of the last ones those are taken back that fit; whichever ends nearer. With a hundred
    rows the total is within 1 % of its target. Hardened weights get sizes under which they stay as they are.

    Args:
      density: share of weights kept in all.
      allowed: block sizes, ascending; powers of two make the in-block index log2(B) bits.
      axis: "outputs" or "inputs", along which blocks run.
      scope: "leaf" or "rule".
      assignment: "adaptive"; or a control with as many weights: "permuted" (the same sizes, randomly permuted over the
        rows), "inverse" (dense rows get the large blocks), "uniform" (density is ignored: at most two sizes, in row
        order; the total is the nearest that these have).
      seed: of "permuted".

    Raises:
      ValueError: an impossible argument; for a leaf, a density that the allowed sizes cannot reach.

    Source: A. Ren et al., "DARB: A Density-Adaptive Regular-Block Pruning for Deep Neural Networks", 2020; the rule
    is our reading of it.

    Example:
      >>> w = jnp.asarray([[8.0, 7.0, 6.0, 5.0], [0.1, 0.2, 0.3, 0.4]])
      >>> constraint = compressx.darb(0.625, allowed=(1, 2, 4))
      >>> print(constraint.project(w, constraint.init(w)))  # blocks of 1 in the dense row, of 4 in the sparse one
      [[8.  7.  6.  5. ]
       [0.  0.  0.  0.4]]
    """
    check_choice("axis", axis, AXES)
    check_density(density)
    sizes = [int(s) for s in allowed]
    if not sizes or sizes[0] < 1 or any(a >= b for a, b in zip(sizes, sizes[1:], strict=False)):
        raise ValueError(f"allowed block sizes must be positive and ascend, got {list(allowed)}")
    if len(sizes) > MAX_SIZES:
        raise ValueError(f"at most {MAX_SIZES} block sizes can be allowed, got {len(sizes)}")
    if assignment not in ("adaptive", "permuted", "inverse", "uniform"):
        raise ValueError(f'assignment must be "adaptive", "permuted", "inverse" or "uniform", got {assignment!r}')

    def choose(m: Array) -> Array:
        x = _orient(m, axis)
        kept = jnp.sum(top_k_mask(jnp.abs(x), count(density, x.size)), axis=1, dtype=jnp.int32)
        if assignment == "uniform":
            kept = jnp.ones_like(kept)
        places = _solve(kept, x.shape[1], sizes, count(density, x.size), mixed=assignment != "uniform")
        if assignment == "permuted":
            return jax.random.permutation(jax.random.key(seed), places)
        if assignment == "inverse":
            order = jnp.argsort(places, stable=True)
            return jnp.zeros_like(places).at[order].set(jnp.sort(places)[::-1])
        return places

    def select(m: Array, places: Array) -> Array:
        x = _orient(m, axis)
        mask = jnp.zeros(x.shape, bool)
        for place, size in enumerate(sizes):
            mask = jnp.where((places == place)[:, None], _largest(x, size), mask)
        return _orient(mask, axis)

    def init(m: Array) -> Array:
        def again() -> Array:
            return _fitting(_orient(m, axis), sizes, count(density, m.size), chosen)

        chosen = choose(m)
        return first_that_holds(lambda m, s: tree_where(select(m, s), m), m, chosen, again)

    constraint = matrix_set(scope, init, select, select)
    together = constraint.joint
    return constraint._replace(refresh=lambda w, _: init(join(w, together)))


@factory
def balanced_block_max(density: float, *, size: int = 8, axis: str = "outputs", scope: str = "leaf") -> Constraint:
    """At most one non-zero in every block, and in every row at most q at each place within a block.

    q = floor(density * L / size). Weights are taken by falling magnitude while their block is free and their place
    has room; ties go to the lower index. **Not the nearest point** in general: that is an assignment problem, and this
    greedy choice keeps at least half of its energy (far more in practice). It leaves points of the set as they are.

    One step for each of the L weights of a row, all rows together: long rows take long.

    Args:
      density: share of weights kept, at most 1 / size; below it some blocks are empty.
      size: length of a block.
      axis, scope: as in `block_max`.

    Source: one weight a block as in A. Ren et al., "DARB", 2020; that every position within a block is used equally
    often is our own.

    Example:
      >>> w = jnp.asarray([[4.0, 1.0, 3.0, 2.0]])
      >>> print(compressx.balanced_block_max(0.5, size=2).project(w, ()))  # one at each position within a block
      [[4. 0. 0. 2.]]
    """
    check_choice("axis", axis, AXES)
    check_density(density)
    if size < 1:
        raise ValueError(f"a block needs at least 1 weight, got size={size}")

    def select(m: Array, _: Any) -> Array:
        x = _orient(m, axis)
        room = math.floor(density * x.shape[1] / size)
        if not 1 <= room or room * size > -(-x.shape[1] // size):
            raise ValueError(
                f"density={density} gives {room} weights at each of {size} positions in the {-(-x.shape[1] // size)} "
                f"blocks of a row of {x.shape[1]}; that must be at least 1, and in all at most the number of blocks"
            )
        return _orient(_greedy(x, size, room), axis)

    return matrix_set(scope, lambda m: (), select, lambda m, _: nonzero(m))


@factory
def bank_balanced(density: float, bank: int, *, axis: str = "outputs", scope: str = "leaf") -> Constraint:
    """At most k non-zeros in every bank of a row (bank-balanced sparsity, the baseline).

        argmin_z ||z - w||_2  s.t. each bank of z has at most k = floor(density * bank + 1/2) non-zeros:
        the k of largest magnitude stay; ties go to the lower index.

    Args:
      density: share of weights kept in every bank. A ragged last bank is rounded alike, and keeps at least one.
      bank: length of a bank.
      axis, scope: as in `block_max`.

    Source: S. Cao et al., "Efficient and Effective Sparse LSTM on FPGA with Bank-Balanced Sparsity", 2019.

    Example:
      >>> w = jnp.asarray([[1.0, -5.0, 2.0, 4.0], [3.0, 0.5, -3.0, 1.0]])
      >>> print(compressx.bank_balanced(0.5, bank=4).project(w, ()))
      [[ 0. -5.  0.  4.]
       [ 3.  0. -3.  0.]]
    """
    check_choice("axis", axis, AXES)
    if bank < 1:
        raise ValueError(f"a bank needs at least 1 weight, got bank={bank}")
    k = count(density, bank, what="weights of a bank")

    def select(m: Array, _: Any) -> Array:
        x = jnp.abs(_orient(m, axis))
        rows, length = x.shape
        whole = length // bank * bank
        parts = [top_k_mask(x[:, :whole].reshape(rows, -1, bank), k, axis=2).reshape(rows, whole)] if whole else []
        if length > whole:
            tail = max(1, math.floor(density * (length - whole) + 0.5))
            parts.append(top_k_mask(x[:, whole:], tail, axis=1))
        return _orient(jnp.concatenate(parts, axis=1), axis)

    return matrix_set(scope, lambda m: (), select, lambda m, _: nonzero(m))


def row_density(w: Any, density: float, axis: str = "outputs") -> Array:
    """Share of every row that stays when the whole matrix is pruned by magnitude to a density.

    Args:
      w: a leaf, or a tuple of leaves joined along their outputs. A mask that was retrained gives steadier densities
        than one shot: then pass those weights, and their own density.
      density: share of weights kept in all.
      axis: which lines are rows, see the module.

    Returns:
      float32 `[R]`, in 0..1.
    """
    check_choice("axis", axis, AXES)
    x = jnp.abs(_orient(join(w, isinstance(w, tuple)), axis))
    return jnp.mean(top_k_mask(x, count(density, x.size)), axis=1, dtype=jnp.float32)


def row_sensitivity(
    evaluate: Callable[[Any], Array], w: Any, density: float, groups: int = 10, axis: str = "outputs"
) -> tuple[Array, Array]:
    """What pruning costs, one group of rows of like density at a time: are dense rows the sensitive ones?

    Rows are ordered by `row_density` and cut into groups; each group in turn keeps `density` of each of its rows (the
    weights of largest magnitude) while all other rows stay dense.

    Args:
      evaluate: jax function from w to a scalar, e.g. the validation loss with this leaf in place.
      w, density, axis: as in `row_density`.
      groups: how many groups, 10 for deciles.

    Returns:
      Mean row density of each group, ascending, float32 `[groups]`, and what `evaluate` gave, `[groups]`.
    """
    together = isinstance(w, tuple)
    x = _orient(join(w, together), axis)
    rows = x.shape[0]
    if not 1 <= groups <= rows:
        raise ValueError(f"cannot cut {rows} rows into groups={groups}")
    share = row_density(w, density, axis)
    place = jnp.argsort(jnp.argsort(share, stable=True))
    group = (place * groups) // rows
    kept = top_k_mask(jnp.abs(x), count(density, x.shape[1], what="weights of a row"), axis=1)

    def one(g: Array) -> Array:
        pruned = jnp.where(kept | (group != g)[:, None], x, jnp.zeros((), x.dtype))
        return evaluate(split(_orient(pruned, axis), w, together))

    member = group[None] == jnp.arange(groups)[:, None]
    mean = jnp.sum(jnp.where(member, share[None], 0.0), axis=1) / jnp.sum(member, axis=1, dtype=jnp.float32)
    return mean, lax.map(one, jnp.arange(groups))


def _orient(m: Array, axis: str) -> Array:
    """The matrix with rows first, `[R, L]`; its own inverse."""
    return m if axis == "outputs" else m.T


def _largest(x: Array, size: int) -> Array:
    """The mask of the largest magnitude of every block of every row, the first where there are several."""
    if size == 1:
        return jnp.ones(x.shape, bool)
    rows, length = x.shape
    size = min(size, length)
    blocks = -(-length // size)
    magnitude = jnp.pad(bits(x), ((0, 0), (0, blocks * size - length)))  # a block begins with a weight
    best = jnp.argmax(magnitude.reshape(rows, blocks, size), axis=2)
    mask = best[..., None] == jnp.arange(size)[None, None]
    return mask.reshape(rows, blocks * size)[:, :length]


def _solve(kept: Array, length: int, sizes: Sequence[int], target: int, mixed: bool) -> Array:
    """Indices in `sizes` of the block size of every row: B_r near c / d_r, with sum_r ceil(L / B_r) near the target.

    With `mixed` steps that pass the target are left out or taken back, see `darb`; else the order of steps is kept.
    """
    rows = kept.shape[0]
    weights = np.array([-(-length // s) for s in sizes], np.int32)
    if not rows * weights[-1] <= target <= rows * weights[0]:
        raise ValueError(
            f"{target} of {rows * length} weights cannot be kept with block sizes {list(sizes)}: they keep between "
            f"{rows * weights[-1]} and {rows * weights[0]}; add larger or smaller sizes, or change the density"
        )
    # As c grows, row r goes from size s to the next where c / d_r passes their geometric mean. These steps are finitely
    # many: in the order of their c, each saves some weights, and those up to the target are made.
    steps = np.sqrt(np.array(sizes[:-1], np.float64) * np.array(sizes[1:], np.float64)).astype(np.float32)
    scale = (
        jnp.maximum(kept.astype(jnp.float32), 0.5)[:, None] * jnp.asarray(steps)[None]
    )  # an empty row: half a weight
    order = jnp.argsort(scale.reshape(-1), stable=True)
    grain = jnp.asarray(weights[:-1] - weights[1:])
    saved = jnp.cumsum(grain[order % max(1, len(steps))], dtype=jnp.int32)
    after = rows * int(weights[0]) - jnp.concatenate([jnp.zeros(1, jnp.int32), saved])
    place = jnp.zeros(order.shape, jnp.int32).at[order].set(jnp.arange(order.size, dtype=jnp.int32))
    place = place.reshape(scale.shape)
    if not mixed or not len(steps):
        made = place < jnp.argmin(jnp.abs(after - target))
        return jnp.sum(made, axis=1, dtype=jnp.int32)
    most = jnp.argmin(jnp.where(after >= target, after, after[0] + 1)).astype(jnp.int32)  # then the total is too small
    down, over = _fill(place, place < most, grain, after[most] - target)
    past = jnp.minimum(jnp.sum(after >= target, dtype=jnp.int32), order.size)
    left, under = _fill(-place[:, ::-1], place[:, ::-1] >= past, grain[::-1], target - after[past])
    return jnp.sum(jnp.where(over <= under, down, ~left[:, ::-1]), axis=1, dtype=jnp.int32)


def _fill(place: Array, made: Array, grain: Array, room: Array) -> tuple[Array, Array]:
    """Makes more steps, each in its place in the order, where it saves no more than the room that is then left.

    Args:
      place: int32 `[R, S]`, positions in the order of the S steps of each row, which rise within a row.
      made: bool `[R, S]`, which are made; in each row those before others.
      grain: int32 `[S]`, what a step saves.
      room: int32 [], what may be saved.

    Returns:
      Which steps are made, and the room that is left.
    """
    order = jnp.argsort(place.reshape(-1))

    def round(_: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        # all that fit are made in turn, up to the first for which too little is left: it does not fit from then on, so
        # there are no more rounds than there are kinds of steps
        made, room = state
        able = made | ((grain <= room)[None] & (room > 0))
        able = ~made & (lax.cummin(able.astype(jnp.int32), axis=1) > 0)
        saved = jnp.cumsum(jnp.where(able, grain[None], 0).reshape(-1)[order], dtype=jnp.int32)
        taken = able.reshape(-1)[order] & (saved <= room)
        room = room - jnp.max(jnp.where(taken, saved, 0))
        return made | jnp.zeros_like(taken).at[order].set(taken).reshape(made.shape), room

    return lax.fori_loop(0, grain.size, round, (made, room))


def _fitting(x: Array, sizes: Sequence[int], target: int, choice: Array) -> Array:
    """Positions of the largest sizes under which the rows of x stay as they are, where they keep at most the target.

    Or more, but by less than any step would save, as `_solve` may have to. Where they keep more than that: `choice`.
    """
    live, (rows, length) = nonzero(x), x.shape
    places = jnp.full(rows, -1, jnp.int32)
    for place, size in enumerate(sizes):
        parts = jnp.pad(live, ((0, 0), (0, -length % size))).reshape(rows, -1, size)
        fits = jnp.all(jnp.sum(parts, axis=2, dtype=jnp.int32) <= 1, axis=1)
        places = jnp.where(fits, place, places)
    weights = np.array([-(-length // s) for s in sizes], np.int32)
    steps = np.append(weights[:-1] - weights[1:], 0)
    least = jnp.min(jnp.asarray(np.where(steps > 0, steps, np.iinfo(np.int32).max))[places])
    held = jnp.all(places >= 0) & (jnp.sum(jnp.asarray(weights)[places]) - target < least)
    return jnp.where(held, places, choice)


def _greedy(x: Array, size: int, room: int) -> Array:
    """Weights by falling magnitude, while their block is free and fewer than `room` of the row are at their place."""
    rows, length = x.shape
    line = jnp.arange(rows)
    magnitude = bits(x)
    order = jnp.argsort(magnitude, axis=1, stable=True, descending=True)

    def step(state: tuple[Array, Array], index: Array) -> tuple[tuple[Array, Array], Array]:
        free, used = state
        block, place = index // size, index % size
        takes = free[line, block] & (used[line, place] < room) & (magnitude[line, index] > 0)
        free = free.at[line, block].min(~takes)
        return (free, used.at[line, place].add(takes.astype(jnp.int32))), takes

    start = (jnp.ones((rows, -(-length // size)), bool), jnp.zeros((rows, size), jnp.int32))
    _, takes = lax.scan(step, start, order.T)
    return jnp.zeros(x.shape, bool).at[line[:, None], order].set(takes.T)
