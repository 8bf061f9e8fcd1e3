import itertools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressx as cx
from compressx.constraints import bsp, bsp_columns, bsp_rows, columns, filters, from_spec, violations
from compressx.constraints.bsp import strip_sizes
from tests.thinning import some


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def projected(constraint, w):
    return np.asarray(jax.jit(lambda w: constraint.project(w, constraint.init(w)))(w))


def ranges(n, parts):
    """Strip boundaries as the released code cuts them: the last strip takes the remainder."""
    size = n // parts
    return [slice(i * size, (i + 1) * size if i < parts - 1 else n) for i in range(parts)]


def by_loops(w, k, strips, blocks):
    """Step 1 on the papers' matrix [Co, Ci], tile by tile; k(n) columns of n stay. Returns the papers' matrix."""
    m = np.asarray(w, np.float64).T
    z = np.zeros_like(m)
    for rows in ranges(m.shape[0], strips):
        for cols in ranges(m.shape[1], blocks):
            tile = m[rows, cols]
            order = np.argsort(-(tile**2).sum(0), kind="stable")[: k(tile.shape[1])]
            z[rows, cols][:, order] = tile[:, order]
    return z


def test_strips_take_the_remainder_last():
    assert strip_sizes(39, 4) == [9, 9, 9, 12]
    assert strip_sizes(8, 4) == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="cannot cut 3 lines into 4"):
        strip_sizes(3, 4)


@pytest.mark.parametrize(("strips", "blocks"), [(1, 1), (4, 1), (4, 3), (5, 2)])
@pytest.mark.parametrize("shape", [(12, 20), (39, 26)])
def test_both_steps_agree_with_loops(shape, strips, blocks):
    w = normal(*shape)
    expected = by_loops(w, lambda n: int(0.3 * n + 0.5), strips, blocks).T
    np.testing.assert_allclose(projected(bsp_columns(0.3, strips=strips, blocks=blocks), w), expected)
    expected = by_loops(w.T, lambda n: 2, strips, blocks)
    np.testing.assert_allclose(projected(bsp_rows(keep=2, strips=strips, blocks=blocks), w), expected)


def test_whole_matrix_steps_are_the_coarse_sets():
    w = normal(3, 3, 4, 6)
    np.testing.assert_array_equal(projected(bsp_columns(0.5, strips=1), w), projected(columns(0.5), w))
    np.testing.assert_array_equal(projected(bsp_rows(0.5), w), projected(filters(0.5), w))


def test_step_one_is_the_nearest_point():
    w = normal(4, 6)
    m = np.asarray(w, np.float64).T  # [Co, Ci] = [6, 4]
    z = projected(bsp_columns(keep=2, strips=2), w).T
    best = sum(
        min(
            (strip[:, [c for c in range(4) if c not in kept]] ** 2).sum()
            for kept in itertools.combinations(range(4), 2)
        )
        for strip in (m[:3], m[3:])
    )
    np.testing.assert_allclose(((m - z) ** 2).sum(), best, rtol=1e-6)


def test_columns_live_or_die_as_a_unit_and_survivors_are_exact():
    w = normal(30, 22)
    z = projected(bsp_columns(0.2, strips=4), w).T
    for rows in ranges(22, 4):
        alive = z[rows] != 0
        assert (alive.all(0) == alive.any(0)).all() and alive.any(0).sum() == 6
    assert len({tuple((z[rows] != 0).any(0)) for rows in ranges(22, 4)}) > 1  # strips choose apart


def test_released_count_of_survivors():
    z = projected(bsp_rows(keep=103, strips=4), normal(1024, 1024))
    assert 1 - np.count_nonzero(z) / z.size == 0.8994140625


EVERY = {
    "columns": bsp_columns(0.4, strips=3),
    "columns-balanced": bsp_columns(0.5, strips=2, blocks=3),
    "rows": bsp_rows(keep=3, strips=2),
    "rows-balanced": bsp_rows(keep=1, strips=3, blocks=2),
    "both": bsp(0.5, 0.5, column_strips=3, row_strips=2),
    "chain": bsp_columns(0.4, strips=3) & bsp_rows(0.5),
}


def rounds(constraint):
    def run(w):
        structure = constraint.init(w)
        z = constraint.project(w, structure)
        piece = constraint.freeze(z, structure)
        return z, constraint.project(z, structure), constraint.retract(z, piece), violations(constraint, z, structure)

    return jax.jit(run)


ROUNDS = {name: rounds(constraint) for name, constraint in EVERY.items()}


@pytest.mark.parametrize("name", EVERY)
@hypothesis.given(
    values=st.lists(st.sampled_from([0.0, 0.0, 2.0**-100, 1.0, -1.0, 2.0, 1e6]), min_size=77, max_size=77)
)
def test_projection_is_idempotent_and_feasible_bit_for_bit(name, values):
    w = np.array(values, np.float32).reshape(11, 7)
    z, again, held, outside = map(np.asarray, ROUNDS[name](jnp.asarray(w)))
    np.testing.assert_array_equal(again, z)
    np.testing.assert_array_equal(held, z)
    assert outside == 0 and (z[z != 0] == w[z != 0]).all()


@pytest.mark.parametrize("name", some(("columns-balanced", "rows"), EVERY))
def test_jit_vmap_and_specs_agree(name):
    constraint = EVERY[name]
    again = from_spec(json.loads(json.dumps(dict(constraint.spec))))
    ws = normal(2, 11, 7)
    eager = np.stack([constraint.project(w, constraint.init(w)) for w in ws])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda w: again.project(w, again.init(w))))(ws), eager)
    assert again.spec == constraint.spec


def test_zero_rows_are_never_kept_for_non_zero_ones():
    w = jnp.zeros((10, 8)).at[:, 5].set(1.0).at[3, 7].set(0.5)
    z = projected(bsp_rows(keep=3), w)
    np.testing.assert_array_equal(z, w)


def test_the_joint_set_never_revives_what_step_one_removed():
    w = normal(24, 16)
    one = projected(bsp_columns(0.25, strips=4), w)
    both = projected(bsp(0.25, 0.5), w)
    assert not both[one == 0].any()
    rows = by_loops(one.T, lambda n: 8, 1, 1)  # step 2 is step 1 of the transpose
    np.testing.assert_array_equal(both, rows.astype(np.float32))


def test_the_chain_keeps_step_one_zeros_through_admm():
    params = {"w": normal(24, 16)}
    one = cx.harden(params, [("w", bsp_columns(0.25, strips=4))], fresh=True).params
    rules = [("w", bsp_rows(0.5, strips=2, chained=True))]
    tx = optax.chain(cx.admm(rules, rho=0.05, every=2), optax.sgd(0.1))
    state, params = tx.init(one), one

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: jnp.sum(jnp.square(p["w"] - 1.0)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(6):
        params, state = step(params, state)
    assert np.count_nonzero(params["w"]) == 24 * 16  # this loop does not mask, so everything has moved
    two = np.asarray(cx.harden(params, rules, cx.find_admm_state(state)).params["w"])
    assert not two[np.asarray(one["w"]) == 0].any()
    for cut in ranges(24, 2):
        assert (two[cut] != 0).any(0).sum() <= 8


def test_gates_together_rank_one_wide_matrix():
    params = {f"h{g}": {"kernel": normal(10, 6, seed=i)} for i, g in enumerate("nrz")}
    rules = [("h[nrz]/kernel", bsp_columns(keep=3, strips=3, scope="rule"))]
    hard = cx.harden(params, rules, fresh=True).params
    joined = jnp.concatenate([params[k]["kernel"] for k in ("hn", "hr", "hz")], axis=1)
    expected = projected(bsp_columns(keep=3, strips=3), joined)
    got = np.concatenate([hard[k]["kernel"] for k in ("hn", "hr", "hz")], axis=1)
    np.testing.assert_array_equal(got, expected)
    with pytest.raises(ValueError, match="same inputs"):
        cx.resolve([(".*", bsp_rows(0.5, scope="rule"))], params | {"i": normal(4, 6)})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: bsp_columns(), "exactly one"),
        (lambda: bsp_columns(0.5, keep=3), "exactly one"),
        (lambda: bsp_rows(0.0), r"\(0, 1\]"),
        (lambda: bsp_rows(0.5, strips=0), "at least 1"),
        (lambda: bsp(0.5, 0.5, scope="joined"), "scope must be"),
        (lambda: bsp(0.5), "exactly one"),
    ],
)
def test_impossible_arguments_say_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_leaves_that_are_too_small_are_named():
    with pytest.raises(ValueError, match=r"w \(8, 3\).*cannot cut 3 lines into 4"):
        cx.resolve([("w", bsp_columns(0.5))], {"w": normal(8, 3)})
    with pytest.raises(ValueError, match="keep=9 is impossible for 8"):
        cx.resolve([("w", bsp_columns(keep=9, strips=1))], {"w": normal(8, 3)})
