"""Every docstring that promises a number of weights, or how near it comes, is held to it."""

import math
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx.budget import allocate
from compressx.constraints.bsp import strip_sizes
from compressx.constraints.crossbar_prune import kept as crossbar_kept

# Every density is a program of its own: few of them, and a quarter of the usual examples.
densities = st.sampled_from([0.04, 0.1, 0.21, 1 / 3, 0.5, 0.78, 1.0])
few = hypothesis.settings(max_examples=hypothesis.settings().max_examples // 4)
seeds = st.integers(0, 2**32 - 1)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def hard(constraint: cx.Constraint, w: Any) -> Any:
    return jax.tree.map(np.asarray, constraint.project(w, constraint.init(w)))


def half_up(x: float) -> int:
    return math.floor(x + 0.5)


@few
@hypothesis.given(seed=seeds, density=densities)
def test_single_weights_and_groups_are_exact_counts(seed: int, density: float) -> None:
    w = normal(seed, 3, 3, 5, 8)
    counts = {
        "unstructured": (w.size, lambda z: np.count_nonzero(z)),
        "filters": (8, lambda z: int((z != 0).any((0, 1, 2)).sum())),
        "columns": (45, lambda z: int((z != 0).any(-1).sum())),
        "channels": (5, lambda z: int((z != 0).any((0, 1, 3)).sum())),
        "connectivity": (40, lambda z: int((z != 0).any((0, 1)).sum())),
    }
    for kind, (total, number) in counts.items():
        if half_up(density * total):
            assert number(hard(cx.constraints.KINDS[kind](density), w)) == half_up(density * total)
    if half_up(density * 18):
        tiles = np.pad(w.reshape(45, 8), ((0, 0), (0, 1)))  # blocks of 8 x 3: six down, three across
        z = hard(cx.block((8, 3), density), w).reshape(45, 8)
        z = np.pad(z, ((0, 3), (0, 1))).reshape(6, 8, 3, 3)
        assert int((z != 0).any((1, 3)).sum()) == half_up(density * 18) and tiles.size
    if half_up(density * 5):
        z = hard(cx.connectivity(density, balance="filter"), w)
        assert ((z != 0).any((0, 1)).sum(0) == half_up(density * 5)).all()


@few
@hypothesis.given(
    seed=seeds, columns=densities, rows=densities, strips=st.sampled_from([1, 3]), blocks=st.sampled_from([1, 2])
)
def test_bsp_keeps_as_many_lines_in_every_tile(
    seed: int, columns: float, rows: float, strips: int, blocks: int
) -> None:
    w = normal(seed, 24, 17)
    sizes = strip_sizes(24, blocks)
    if not min(half_up(columns * n) for n in sizes):
        return
    z = hard(cx.bsp_columns(columns, strips=strips, blocks=blocks), w)
    outs, ins = np.cumsum([0, *strip_sizes(17, strips)]), np.cumsum([0, *sizes])
    for a, b in zip(outs, outs[1:], strict=False):
        for c, d in zip(ins, ins[1:], strict=False):
            assert int((z[c:d, a:b] != 0).any(1).sum()) == half_up(columns * (d - c))
    if half_up(rows * 17):
        z = hard(cx.bsp_rows(rows, strips=strips), w)
        ins = np.cumsum([0, *strip_sizes(24, strips)])
        for c, d in zip(ins, ins[1:], strict=False):
            assert int((z[c:d] != 0).any(0).sum()) == half_up(rows * 17)


@few
@hypothesis.given(seed=seeds, density=densities, bank=st.sampled_from([1, 4, 9]), length=st.sampled_from([3, 20, 33]))
def test_blocks_and_banks_of_a_row(seed: int, density: float, bank: int, length: int) -> None:
    w = normal(seed, 4, length)
    z = hard(cx.block_max(bank), w)
    assert (np.count_nonzero(z, axis=1) == math.ceil(length / bank)).all()
    if half_up(density * bank):
        z = hard(cx.bank_balanced(density, bank), w)
        want = length // bank * half_up(density * bank)
        want += max(1, half_up(density * (length % bank))) if length % bank else 0
        assert (np.count_nonzero(z, axis=1) == want).all()


@few
@hypothesis.given(seed=seeds, density=densities, size=st.sampled_from([1, 2, 5]), length=st.sampled_from([6, 17, 40]))
def test_balanced_blocks_have_no_place_above_its_number(seed: int, density: float, size: int, length: int) -> None:
    room = math.floor(density * length / size)
    if room < 1 or room * size > -(-length // size):
        return
    z = hard(cx.balanced_block_max(density, size=size), normal(seed, 5, length))
    live = np.pad(z != 0, ((0, 0), (0, -length % size))).reshape(5, -1, size)
    assert live.sum(2).max() <= 1 and live.sum(1).max() <= room


@few
@hypothesis.given(seed=seeds, unify=densities, prune=st.sampled_from([0.0, 0.1, 0.3, 0.55]))
def test_shares_of_unified_and_pruned_blocks(seed: int, unify: float, prune: float) -> None:
    w = normal(seed, 12, 10)
    blocks = lambda z: z.reshape(4, 3, 5, 2).transpose(0, 2, 1, 3).reshape(20, 6)
    even = lambda z: int((np.ptp(np.abs(blocks(z)), axis=1) == 0).sum())
    empty = lambda z: int((blocks(z) == 0).all(1).sum())
    if half_up(unify * 20):
        assert even(hard(cx.unify((3, 2), unify), w)) == half_up(unify * 20)
    if prune > 0:
        assert empty(hard(cx.prune_blocks((3, 2), prune), w)) == half_up(prune * 20)
    if unify + prune <= 1 and half_up(unify * 20) + half_up(prune * 20):
        z = hard(cx.unify_and_prune((3, 2), unify, prune), w)
        pruned = half_up(prune * 20)
        assert empty(z) == pruned and even(z) == pruned + min(half_up(unify * 20), 20 - pruned)


@few
@hypothesis.given(seed=seeds, density=densities, columns=densities)
def test_coupled_and_whole_networks_keep_exact_numbers(seed: int, density: float, columns: float) -> None:
    w = (normal(seed, 3, 3, 4, 6), normal(seed + 1, 6, 5))
    if not half_up(density * 6) or not half_up(columns * 36):
        return
    z = hard(cx.coupled_filters([(3, [(0, 6)]), (0, [(0, 6)])], density), w)
    live = [(z[0] != 0).any((0, 1, 2)), (z[1] != 0).any(1)]
    assert (live[0] == live[1]).all() and live[0].sum() == half_up(density * 6)
    member = {"makes": 3, "makes_units": [[0, 6]], "reads": None, "reads_units": None, "columns": half_up(columns * 36)}
    reader = {"makes": None, "makes_units": None, "reads": 0, "reads_units": [[0, 6]], "columns": None}
    for selection in ("energy", "random"):
        c = cx.network_structure([member, reader], [[0, 6, half_up(density * 6)]], selection=selection, seed=seed % 100)
        z = hard(c, w)
        assert (z[0] != 0).any((0, 1, 2)).sum() == (z[1] != 0).any(1).sum() == half_up(density * 6)
        assert (z[0] != 0).any(-1).sum() == half_up(columns * 36)


@few
@hypothesis.given(seed=seeds, filters=densities, columns=densities)
def test_crossbars_are_filled(seed: int, filters: float, columns: float) -> None:
    w = normal(seed, 3, 3, 4, 9)
    if not half_up(filters * 9) or not half_up(columns * 36):
        return
    p, f = crossbar_kept(w.shape, filters, columns, 8, 8, 2)
    z = hard(cx.crossbar_aware(filters, columns, rows=8, cols=8, cells_per_weight=2), w)
    assert ((z != 0).any((0, 1, 2)).sum(), (z != 0).any(-1).sum()) == (f, p)
    assert f == min(9, math.ceil(half_up(filters * 9) / 4) * 4)
    assert p == min(36, math.ceil(half_up(columns * 36) / 8) * 8)


DARB = [(100, 64, 0.1), (100, 256, 0.03), (120, 200, 0.02), (150, 512, 0.05), (300, 100, 0.3), (100, 256, 0.5)]


@pytest.mark.parametrize(
    ("rows", "length", "density", "assignment"),
    [
        pytest.param(*shape, how, marks=[] if shape[2] in (0.02, 0.03, 0.5) or how == "adaptive" else pytest.mark.slow)
        for shape in DARB
        for how in ("adaptive", "permuted", "inverse", "uniform")
        if how == "adaptive" or shape[:2] == (100, 256)  # one shape for the controls
    ],
)
def test_a_hundred_rows_of_darb_are_within_a_percent(rows: int, length: int, density: float, assignment: str) -> None:
    darb = cx.darb(density, assignment=assignment)
    run = jax.jit(lambda w: darb.project(w, darb.init(w)))
    for seed in range(10):
        rng = np.random.default_rng(seed)
        w = rng.standard_normal((rows, length)) * np.exp(rng.choice([0, 1, 3]) * rng.standard_normal((rows, 1)))
        if seed % 5 == 4:
            w *= rng.random((rows, 1)) < 0.7  # rows without a weight
        z = np.asarray(run(jnp.asarray(w, jnp.float32)))
        # what stays is a block's largest weight, and a row without any has none to keep: blocks are what is counted
        full = np.count_nonzero(z[np.any(w != 0, axis=1)])
        if (w != 0).any(1).all():
            assert abs(full / (density * w.size) - 1) <= 0.01, (seed, full)
        assert full <= 1.01 * density * w.size


shapes = st.dictionaries(
    st.text("abc", min_size=1, max_size=3),
    st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple),
    min_size=1,
    max_size=6,
)


@hypothesis.given(leaf_shapes=shapes, density=st.floats(0.02, 1.0))
def test_shares_of_a_network_sum_to_its_budget(leaf_shapes: dict[str, tuple[int, ...]], density: float) -> None:
    sizes = {n: math.prod(s) for n, s in leaf_shapes.items()}
    budget = half_up(density * sum(sizes.values()))
    try:
        kept = allocate.erk(leaf_shapes, density)
    except ValueError:
        assert budget < len(sizes)
    else:
        assert sum(kept.values()) == budget and all(1 <= kept[n] <= sizes[n] for n in sizes)
    try:
        kept = allocate.uniform(leaf_shapes, density)
    except ValueError:
        assert any(half_up(density * n) == 0 for n in sizes.values())
    else:
        assert kept == {n: half_up(density * size) for n, size in sizes.items()}


@hypothesis.given(leaf_shapes=shapes, budget=st.integers(1, 20_000), data=st.data())
def test_budgets_of_bytes_and_operations_hold_and_are_used(
    leaf_shapes: dict[str, tuple[int, ...]], budget: int, data: st.DataObject
) -> None:
    sizes = {n: math.prod(s) for n, s in leaf_shapes.items()}
    whole = sum(sizes.values())
    try:
        kept = allocate.by_bytes(leaf_shapes, budget)
    except ValueError:
        assert budget < 4 * len(sizes) + math.ceil(whole / 8)
    else:
        spent = 4 * sum(kept.values()) + math.ceil(whole / 8)
        assert spent <= budget and (spent + 4 > budget or sum(kept.values()) == whole)
    positions = {n: data.draw(st.integers(1, 50)) for n in sizes}
    try:
        kept = allocate.by_flops(leaf_shapes, positions, budget)
    except ValueError:
        assert sum(positions.values()) > budget
    else:
        assert sum(kept[n] * positions[n] for n in sizes) <= budget
        assert all(1 <= kept[n] <= sizes[n] for n in sizes)
