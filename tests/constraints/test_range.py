"""Every set at both ends of the number range: what lies in it stays, powers of two pass through, nothing overflows."""

import functools
from collections.abc import Callable
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx.constraints.base import violations
from tests.constraints.test_contract import EXAMPLES, SPREAD, VARIANTS, mostly_slow

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": jnp.bfloat16, "float64": np.float64}
# Powers of two between which the weights below (multiples of 2**-5, below 8) and their means are normal numbers.
# float16 is calculated with in float32, where its own denormals are normal numbers too.
POWERS = {"float32": (-112, 124), "float16": (-19, 12), "bfloat16": (-112, 124), "float64": (-1000, 1020)}
# within these the scale of levels has all the bits that it has elsewhere
LEVEL_POWERS = {"float32": (-100, 60), "float16": (-1, 3), "bfloat16": (-100, 60), "float64": (-900, 900)}


def weights(kind: str, seed: int, shapes: tuple[tuple[int, ...], ...]) -> list[np.ndarray]:
    """Leaves below 8 whose numbers every dtype holds (of 7 bits), or of any size."""
    rng = np.random.default_rng(seed)
    out = []
    for shape in shapes:
        if kind == "integers":  # many zeros and ties
            w = rng.integers(-4, 5, shape).astype(np.float64)
        else:
            w = np.ldexp(np.rint(np.clip(rng.standard_normal(shape), -3, 3) * 32), -5)
        if kind == "sparse":
            w = w * (rng.random(shape) < rng.choice([0.05, 0.2, 0.5]))
        out.append(w)
    return out


def ends(seed: int, shapes: tuple[tuple[int, ...], ...], dtype: Any) -> list[np.ndarray]:
    """Leaves that mix zeros, numbers whose means are just normal, ones and numbers near the largest."""
    rng, info = np.random.default_rng(seed), jnp.finfo(dtype)
    some = [0.0, 256 * float(info.tiny), 768 * float(info.tiny), 1.0, 1.5, float(info.max) / 8, float(info.max) / 4]
    chosen = rng.choice(some, size=rng.integers(2, len(some) + 1), replace=False)
    return [rng.choice(chosen, s) * rng.choice([-1.0, 1.0], s) for s in shapes]


@functools.cache
def rounds(name: str) -> Callable[..., Any]:
    constraint = EXAMPLES[name][0]

    def run(w: Any) -> dict[str, Any]:
        structure = constraint.init(w)
        z = constraint.project(w, structure)
        piece = constraint.freeze(z, structure)
        floating = [x for x in jax.tree.leaves(structure) if jnp.issubdtype(x.dtype, jnp.floating)]
        return {
            "z": z,
            "again": constraint.project(z, structure),
            "outside": violations(constraint, z, structure),
            "back": constraint.retract(z, piece),
            "finite": [jnp.all(jnp.isfinite(x)) for x in (*floating, *jax.tree.leaves(z))],
            "anew": violations(constraint, z, constraint.init(z)),
        }

    return jax.jit(run)


def run(name: str, leaves: list[np.ndarray], dtype: Any) -> tuple[list[np.ndarray], dict[str, Any]]:
    constraint = EXAMPLES[name][0]
    held = [w.astype(dtype) for w in leaves]
    with jax.enable_x64(dtype == np.float64):
        return held, jax.device_get(rounds(name)(tuple(held) if constraint.joint else held[0]))


def same(a: Any, b: Any) -> None:
    """The same numbers, denormals among them: by NumPy, which tells them from 0."""
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x).astype(np.float64), np.asarray(y).astype(np.float64))


def shapes_of(name: str) -> tuple[tuple[int, ...], ...]:
    constraint, shape = EXAMPLES[name]
    return shape if constraint.joint else (shape,)  # type: ignore[return-value]


def check_invariants(name: str, held: list[np.ndarray], got: dict[str, Any]) -> None:
    """What holds for any finite weights."""
    constraint = EXAMPLES[name][0]
    assert all(got["finite"])
    assert got["outside"] == 0
    same(got["again"], got["z"])
    same(got["back"], got["z"])
    if constraint.stage in (cx.SUPPORT, cx.SIGN):  # projections that only make zeros
        for w, z in zip(held, jax.tree.leaves(got["z"]), strict=True):
            assert (w.astype(np.float64)[z != 0] == z.astype(np.float64)[z != 0]).all()


# in float32, and of these two in every dtype
QUICK = (*SPREAD, "unstructured", "pattern_connectivity", "crossbar_aware", "quantize codebook", "unify")
WHOLE = ("filters", "quantize")


def is_quick(name: str, dtype: str) -> bool:
    return name in WHOLE or (dtype == "float32" and name in QUICK)


TABLE = [
    pytest.param(name, dtype, marks=[] if is_quick(name, dtype) else pytest.mark.slow)
    for name in EXAMPLES
    for dtype in DTYPES
]
# by their scope pytest runs the tests of a row one after another, while its program is held
table = pytest.mark.parametrize(("name", "dtype"), TABLE, scope="module")


@table
@hypothesis.given(data=st.data())
def test_a_power_of_two_passes_through_the_projection(name: str, dtype: str, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["normal", "integers", "sparse"]))
    seed, power = data.draw(st.integers(0, 2**32 - 1)), data.draw(st.integers(*POWERS[dtype]))
    leaves, as_dtype = weights(kind, seed, shapes_of(name)), DTYPES[dtype]
    _, plain = run(name, leaves, as_dtype)
    moved = [np.ldexp(w, power) for w in leaves]
    held, got = run(name, moved, as_dtype)
    check_invariants(name, held, got)
    exact = all((h.astype(np.float64) == m).all() for h, m in zip(held, moved, strict=True))
    want = [np.ldexp(z.astype(np.float64), power) for z in jax.tree.leaves(plain["z"])]
    exact = exact and all((z.astype(as_dtype).astype(np.float64) == z).all() for z in want)
    low, high = LEVEL_POWERS[dtype]
    if exact and (EXAMPLES[name][0].stage != cx.LEVEL or low <= power <= high):
        same(got["z"], want)
        assert (got["anew"] == 0) == (plain["anew"] == 0)


@table
@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_weights_of_all_sizes_together_stay_finite_and_inside(name: str, dtype: str, seed: int) -> None:
    held, got = run(name, ends(seed, shapes_of(name), DTYPES[dtype]), DTYPES[dtype])
    check_invariants(name, held, got)


SUPPORTS = [n for n, (c, _) in EXAMPLES.items() if c.stage == cx.SUPPORT and not c.joint and "pattern" not in n]


@mostly_slow(set(SUPPORTS) - set(VARIANTS), SUPPORTS)
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), power=st.integers(-141, -127))
def test_denormals_are_weights_of_a_support(name: str, seed: int, power: int) -> None:
    """XLA may take them for 0 in arithmetic; what is kept is read from the bits, and is as much as of other weights."""
    leaves = weights("normal", seed, shapes_of(name))
    _, plain = run(name, leaves, np.float32)
    _, got = run(name, [np.ldexp(w, power) for w in leaves], np.float32)
    assert got["outside"] == 0
    same(got["again"], got["z"])
    for z, want in zip(jax.tree.leaves(got["z"]), jax.tree.leaves(plain["z"]), strict=True):
        moved = np.ldexp(want.astype(np.float64), power)
        if (moved.astype(np.float32) == moved).all():
            np.testing.assert_array_equal(z, moved)


@functools.cache
def admm_steps(name: str) -> Callable[..., Any]:
    constraint = EXAMPLES[name][0]
    rho = cx.schedules.residual_balancing(1e-3)
    tx = cx.admm([(".*", constraint)], rho=rho, every=1, refresh_every=2)

    def run(params: list[jax.Array]) -> Any:
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return updates, state

    return jax.jit(run)


ADMM = ("filters", "polarize", "unify & quantize", "darb")


@mostly_slow(ADMM)
@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(seed=st.integers(0, 2**32 - 1), power=st.integers(-149, 122), mixed=st.booleans())
def test_steps_of_admm_stay_finite(name: str, seed: int, power: int, mixed: bool) -> None:
    shapes = shapes_of(name)
    leaves = ends(seed, shapes, np.float32) if mixed else [np.ldexp(w, power) for w in weights("normal", seed, shapes)]
    updates, state = admm_steps(name)([w.astype(np.float32) for w in leaves])
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves((updates, state)))


def test_residuals_are_those_of_ordinary_weights_times_their_size() -> None:
    rules = [("0", cx.filters(0.5))]
    tx = cx.admm(rules, rho=1e-3, every=1)
    step = jax.jit(lambda p: tx.update(jax.tree.map(jnp.zeros_like, p), tx.init(p), p)[1].primal)
    w = weights("normal", 0, ((4, 6),))[0]
    want = np.linalg.norm(w - np.asarray(rules[0][1].project(jnp.asarray(w, jnp.float32), ()))) / np.linalg.norm(w)
    for power in (-115, -90, 0, 90, 120):
        got = step([np.ldexp(w, power).astype(np.float32)])["0"]
        np.testing.assert_allclose(got, [want], rtol=1e-5)


@pytest.mark.parametrize(
    ("grid", "dtype"),
    [
        pytest.param(grid, dtype, marks=[] if grid == "uniform" or dtype == np.float16 else pytest.mark.slow)
        for grid in ("uniform", "cells", "power_of_two", "codebook")
        for dtype in (np.float32, np.float16, jnp.bfloat16)
    ],
)
def test_small_leaves_are_quantized_as_well_as_others(grid: str, dtype: Any) -> None:
    """A float16 leaf of 1e-6 and a float32 one of 1e-37: the levels are theirs, not the smallest normal number's."""
    c = cx.quantize(4, grid=grid)
    w = np.random.default_rng(0).standard_normal((64, 32))
    power = -20 if dtype == np.float16 else -123
    run = jax.jit(lambda x: c.project(x, c.init(x)))
    errors = []
    for x in (w.astype(dtype), np.ldexp(w, power).astype(dtype)):
        z = np.asarray(run(jnp.asarray(x)))
        x = x.astype(np.float64)
        errors.append(np.linalg.norm(z.astype(np.float64) - x) / np.linalg.norm(x))
    assert errors[1] < 1.2 * errors[0] + 0.02, errors


def test_energies_rank_by_numpys_order_over_sixty_orders_of_magnitude() -> None:
    rng = np.random.default_rng(0)
    for low, high in ((-38, -20), (-16, 14), (18, 37)):
        w = rng.standard_normal((40, 30)) * 10.0 ** rng.uniform(low, high, 30)
        w = w.astype(np.float32)
        kept = np.asarray(cx.filters(keep=12).project(jnp.asarray(w), ()))
        best = np.argsort(-np.sum(np.square(w.astype(np.float64)), 0))[:12]
        assert set(np.flatnonzero(kept.any(0))) == set(best)
