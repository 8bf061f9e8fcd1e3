"""Unification against brute force: magnitudes, signs, selections; equality to the bit through ADMM and retraining."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import compressx as cx
from compressx import views
from compressx._admm_state import find_state
from compressx._harden import check, structures
from compressx.constraints.unification import FREE, PRUNED, UNIFIED, assign


def normal(shape: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def cut(w: np.ndarray, block: tuple[int, ...]) -> list[np.ndarray]:
    """The members of every block, by loops; blocks in the order of their index."""
    if len(block) == 2:
        x, step = w.reshape(-1, w.shape[-1]), block
    else:  # [cin, taps, cout] in the paper, stored taps first
        x, step = w.reshape(-1, *w.shape[-2:]), (block[1], block[0], block[2])
    starts = itertools.product(*(range(0, n, b) for n, b in zip(x.shape, step, strict=True)))
    return [x[tuple(slice(i, i + b) for i, b in zip(at, step, strict=True))].ravel() for at in starts]


def unified(v: np.ndarray) -> bool:
    return bool(np.ptp(np.abs(v)) == 0)


SHAPES = [((6, 9), (2, 3)), ((7, 8), (4, 3)), ((3, 3, 4, 5), (4, 1)), ((3, 3, 4, 5), (1, 4)), ((3, 3, 5, 6), (2, 9, 2))]
shapes = pytest.mark.parametrize(("shape", "block"), SHAPES)


@shapes
def test_one_block_goes_to_the_nearest_single_magnitude(shape: tuple[int, ...], block: tuple[int, ...]) -> None:
    w = normal(shape)
    z = jax.jit(cx.unify(block, 1.0).project)(w, ())
    for v, got in zip(cut(np.asarray(w, np.float64), block), cut(np.asarray(z), block), strict=True):
        np.testing.assert_allclose(got, np.sign(v) * np.mean(np.abs(v)), rtol=1e-5)
        assert unified(got)
        cost = np.sum((np.float64(got) - v) ** 2)
        np.testing.assert_allclose(cost, v.size * np.var(np.abs(v)), rtol=1e-4, atol=1e-9)


def test_no_other_signs_and_magnitude_are_nearer() -> None:
    v = np.asarray([[0.3, -1.0, 0.1, -0.05]])
    z = np.asarray(cx.unify((1, 4), 1.0).project(jnp.asarray(v, jnp.float32), ()), np.float64)
    best = np.sum((z - v) ** 2)
    for signs in itertools.product([-1, 1], repeat=4):
        for a in np.linspace(0, 2, 201):
            assert np.sum((a * np.asarray(signs) - v) ** 2) >= best - 1e-7


def test_zeros_take_the_positive_sign_or_stay() -> None:
    w = jnp.asarray([[0.0, -2.0, 1.0, -0.0]])
    np.testing.assert_array_equal(cx.unify((1, 4), 1.0).project(w, ()), [[0.75, -0.75, 0.75, 0.75]])
    np.testing.assert_array_equal(cx.unify((1, 4), 1.0, zeros="keep").project(w, ()), [[0.0, -1.5, 1.5, 0.0]])


@shapes
@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.8])
def test_the_cheapest_blocks_are_unified_and_the_rest_untouched(
    shape: tuple[int, ...], block: tuple[int, ...], fraction: float
) -> None:
    w = normal(shape, 3)
    z = jax.jit(cx.unify(block, fraction).project)(w, ())
    before, after = cut(np.asarray(w, np.float64), block), cut(np.asarray(z), block)
    number = int(np.floor(fraction * len(before) + 0.5))
    # a block of a single weight is unified as it is, and costs nothing
    costs = [v.size * np.var(np.abs(v)) for v in before]
    chosen = sorted(range(len(costs)), key=lambda i: costs[i])[:number]
    for i, (v, got) in enumerate(zip(before, after, strict=True)):
        if i in chosen:
            assert unified(got)
        else:
            np.testing.assert_array_equal(got, np.float32(v))


@pytest.mark.parametrize(("shape", "block"), SHAPES[:4])
@pytest.mark.parametrize("fraction", [0.2, 0.6])
def test_pruning_blocks_is_block_sparsity_with_the_same_masks(shape: Any, block: Any, fraction: float) -> None:
    w = normal(shape, 5).at[0].set(0)  # ties among zero blocks
    total = len(cut(np.asarray(w), block))
    kept = total - int(np.floor(fraction * total + 0.5))
    wanted = cx.block(block, keep=kept).project(w, ())
    np.testing.assert_array_equal(cx.prune_blocks(block, fraction).project(w, ()), wanted)
    np.testing.assert_array_equal(cx.unify_and_prune(block, 0.0, fraction).project(w, ()), wanted)


def brute_force(unify: np.ndarray, prune: np.ndarray, to_unify: int, to_prune: int) -> float:
    every = range(unify.size)
    return min(
        prune[list(p)].sum() + unify[list(u)].sum()
        for p in itertools.combinations(every, to_prune)
        for u in itertools.combinations([i for i in every if i not in p], to_unify)
    )


@given(
    prune=hnp.arrays(np.float32, 7, elements=st.floats(0, 4, width=16)),
    part=hnp.arrays(np.float32, 7, elements=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0])),
    to_unify=st.integers(0, 3),
    to_prune=st.integers(0, 4),
)
def test_assignment_is_the_best_of_all(prune: np.ndarray, part: np.ndarray, to_unify: int, to_prune: int) -> None:
    unify = prune * part  # unifying never costs more than pruning
    kind = assign(unify, prune, to_unify, to_prune)
    assert (kind == UNIFIED).sum() == to_unify and (kind == PRUNED).sum() == to_prune
    got = unify[kind == UNIFIED].astype(np.float64).sum() + prune[kind == PRUNED].astype(np.float64).sum()
    best = brute_force(unify.astype(np.float64), prune.astype(np.float64), to_unify, to_prune)
    np.testing.assert_allclose(got, best, rtol=1e-12, atol=1e-15)


def test_greedy_can_be_beaten_and_exact_is_never_worse() -> None:
    better = 0
    for seed in range(20):
        w = normal((6, 8), seed) * jnp.exp(normal((6, 1), seed + 50))
        loss = {}
        for selection in ("greedy", "exact"):
            _, project, _, _ = jitted((2, 2), 0.4, 0.3, selection)
            z = project(w, ())
            np.testing.assert_array_equal(project(z, ()), z)
            pieces = cut(np.asarray(z), (2, 2))
            assert sum(not np.any(p) for p in pieces) == 4 and sum(unified(p) for p in pieces) == 4 + 5
            loss[selection] = float(jnp.sum(jnp.square(z - w)))
        assert loss["exact"] <= loss["greedy"] * (1 + 1e-6)
        better += loss["exact"] < loss["greedy"] * (1 - 1e-4)
    assert better > 0


@functools.cache
def jitted(block: Any, unified: float, pruned: float, selection: str, zeros: str = "tie") -> tuple[Any, ...]:
    """A constraint and its functions, compiled once for all examples."""
    c = cx.unify_and_prune(block, unified, pruned, selection=selection, zeros=zeros)
    return c, jax.jit(c.project), jax.jit(c.freeze), jax.jit(c.retract)


@given(
    values=hnp.arrays(
        np.float32,
        (5, 4),
        elements=st.one_of(
            st.sampled_from([0.0, 1.0, -1.0, 1e-25, 2.0]), st.floats(-3, 3, width=16, allow_subnormal=False)
        ),
    ),
    case=st.sampled_from(
        [
            ((2, 2), (0.5, 0.0), "greedy", "tie", np.float32),
            ((1, 3), (0.5, 0.3), "exact", "tie", np.float32),
            ((5, 1), (0.25, 0.75), "greedy", "keep", np.float32),
            ((1, 2, 2), (0.5, 0.3), "exact", "keep", ml_dtypes.bfloat16),
            ((4, 1, 4), (1.0, 0.0), "greedy", "tie", ml_dtypes.bfloat16),
        ]
    ),
)
def test_invariants(values: np.ndarray, case: Any) -> None:
    block, fractions, selection, zeros, dtype = case
    _, project, freeze, retract = jitted(block, *fractions, selection, zeros)
    w = jnp.asarray(values.astype(dtype))
    z = project(w, ())
    assert z.dtype == w.dtype
    np.testing.assert_array_equal(project(z, ()), z)
    pieces = [p.astype(np.float32) for p in cut(np.asarray(z), block)]
    number = len(pieces)
    to_prune = int(np.floor(fractions[1] * number + 0.5))
    to_tie = min(number, to_prune + int(np.floor(fractions[0] * number + 0.5)))
    assert sum(not np.any(p) for p in pieces) >= to_prune
    left = [p[p != 0] if zeros == "keep" else p for p in pieces]
    assert sum(p.size == 0 or unified(p) for p in left) >= to_tie
    assert bool(jnp.all(z * w >= 0))
    if zeros == "keep":
        assert bool(jnp.all((w != 0) | (z == 0)))
    piece = freeze(z, ())
    np.testing.assert_array_equal(retract(z, piece), z)
    inside = retract(z + 0.25, piece)
    np.testing.assert_array_equal(retract(inside, piece), inside)


def test_retraction_is_the_mean_of_the_signed_weights_or_zero() -> None:
    c = cx.unify_and_prune((1, 4), 1 / 3, 1 / 3)
    z = jnp.asarray([[2.0, -2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, -3.0, 0.0, 5.0]])
    piece = c.freeze(z, ())
    v = jnp.asarray([[1.0, -2.0, -1.0, 4.0], [9.0, 9.0, 9.0, 9.0], [7.0, 7.0, -7.0, 7.0]])
    np.testing.assert_array_equal(c.retract(v, piece), [[1.5, -1.5, 1.5, 1.5], [0, 0, 0, 0], [7.0, 7.0, -7.0, 7.0]])
    np.testing.assert_array_equal(c.retract(-v, piece)[0], [0, 0, 0, 0])


@pytest.mark.parametrize(
    ("constraint", "dtype"),
    [
        (cx.unify((4, 1), 0.5), jnp.bfloat16),
        (cx.unify_and_prune((2, 9, 2), 0.4, 0.3), jnp.float32),
        (cx.prune_blocks((4, 4), 0.5) & cx.unify((4, 1), 0.8, zeros="keep"), jnp.float32),
    ],
    ids=["unify bfloat16", "both", "two sets"],
)
def test_admm_harden_retrain_keeps_blocks_equal_to_the_bit(constraint: cx.Constraint, dtype: Any) -> None:
    target = normal((3, 3, 4, 6), 1).astype(dtype)
    rules = [("w", constraint)]
    tx = optax.chain(cx.admm(rules, rho=1.0, every=4), optax.sgd(0.2))
    params: Any = {"w": target}
    state = tx.init(params)

    def gradient(p: Any) -> Any:
        return {"w": p["w"] - target}

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(gradient(params), state, params)
        return optax.apply_updates(params, updates), state

    residuals = []
    for i in range(48):
        params, state = step(params, state)
        if i % 4 == 3:
            residuals.append(float(jnp.max(find_state(state).primal["w"])))
    assert residuals[-1] < residuals[0]
    hard = cx.harden(params, rules, find_state(state)).params

    def tied(w: Any) -> list[list[int]]:
        out = []
        for part in constraint.sets:
            pieces = cut(np.asarray(w, np.float32), tuple(part.spec["block"]))
            out.append([i for i, p in enumerate(pieces) if not p[p != 0].size or unified(p[p != 0])])
        return out

    before = tied(hard["w"])
    rt = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9, nesterov=True), cx.retrain(rules))
    rs, free = rt.init(hard), hard
    update = jax.jit(lambda p, s: rt.update({"w": p["w"] - normal((3, 3, 4, 6), 2).astype(dtype)}, s, p))
    for _ in range(25):
        updates, rs = update(free, rs)
        free = optax.apply_updates(free, updates)
    assert not np.array_equal(free["w"], hard["w"])
    for old, new in zip(before, tied(free["w"]), strict=True):
        assert set(old) <= set(new)  # max|w| - min|w| == 0 in every tied block, after 25 steps of params + update
    check(free, rules, structures(free, rules))


def test_tiles_view_is_a_bijection() -> None:
    for shape, block in SHAPES:
        w = normal(shape)
        view = views.tiles(block)
        assert view.back(view.to(w), shape).shape == shape
        np.testing.assert_array_equal(view.back(view.to(w), shape), w)
        marked = view.back(jnp.broadcast_to(views.in_tiles(shape, block), view.to(w).shape), shape)
        assert bool(jnp.all(marked))
        assert int(jnp.sum(jnp.broadcast_to(views.in_tiles(shape, block), view.to(w).shape))) == w.size


def test_jit_and_vmap_equal_the_eager_loop() -> None:
    for c in (cx.unify((2, 2), 0.4), cx.unify_and_prune((2, 2), 0.4, 0.3, selection="exact")):
        ws = jnp.stack([normal((5, 7), s) for s in range(3)])
        wanted = jnp.stack([c.project(w, ()) for w in ws])
        # sums run in another order: a mean may differ in its last bit
        np.testing.assert_allclose(jax.vmap(lambda w, c=c: c.project(w, ()))(ws), wanted, rtol=1e-6)
        np.testing.assert_allclose(jax.jit(lambda w, c=c: c.project(w, ()))(ws[0]), wanted[0], rtol=1e-6)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: cx.unify((2, 2), 0.0), r"fraction must be in \(0, 1\], got 0.0"),
        (lambda: cx.prune_blocks((2, 2), 1.0), r"fraction must be in \(0, 1\), got 1.0"),
        (lambda: cx.unify_and_prune((2, 2), 0.6, 0.6), "at most 1, got 0.6"),
        (lambda: cx.unify_and_prune((2, 2), 0.3, 0.3, selection="best"), '"greedy" or "exact"'),
        (lambda: cx.unify((2, 2), 0.3, zeros="drop"), '"tie" or "keep"'),
        (lambda: cx.unify((2,), 0.3), "two or three extents"),
        (lambda: cx.resolve([("w", cx.unify((4, 4), 0.1))], {"w": jnp.ones((4, 4))}), "none would be unified"),
    ],
)
def test_bad_arguments_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_free_is_what_is_left() -> None:
    assert (FREE, UNIFIED, PRUNED) == (0, 1, 2)
    kind = assign(np.asarray([0.0, 1.0, 2.0, 3.0]), np.asarray([5.0, 1.5, 9.0, 9.0]), 1, 1)
    np.testing.assert_array_equal(kind, [UNIFIED, PRUNED, FREE, FREE])
