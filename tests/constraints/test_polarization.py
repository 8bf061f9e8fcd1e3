"""Polarization: one sign a fragment, in every order, after pruning, through ADMM, retraining and quantization."""

import functools
import itertools
from fractions import Fraction
from typing import Any

import chex
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
from compressx._harden import check, project, structures
from compressx._retrain import find_state as retrain_state
from compressx.constraints.polarization import (
    Polarity,
    compact,
    flipped_share,
    mixed_fragments,
    polarity,
    required,
)
from experiments.common.training.refreshes import changes, watch_refreshes

ORDERS = {"W": "chw", "H": "cwh", "C": "hwc"}  # slowest axis first
orders = pytest.mark.parametrize("order", list(ORDERS))


def normal(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def filters_in_order(w: np.ndarray, order: str) -> list[np.ndarray]:
    """The kept weights of every filter, one after the other, by plain loops over the axes."""
    size = dict(zip("hwc", w.shape[:3], strict=True))
    walk = []
    for at in itertools.product(*(range(size[a]) for a in ORDERS[order])):
        index = dict(zip(ORDERS[order], at, strict=True))
        row = w[index["h"], index["w"], index["c"]]
        if np.any(row != 0):
            walk.append(row)
    return list(np.asarray(walk).T) if walk else [np.zeros(0) for _ in range(w.shape[-1])]


def polarized(w: np.ndarray, size: int, order: str, rule: str) -> list[list[np.ndarray]]:
    """The definition: every filter's fragments, wrong signs set to 0."""
    out = []
    for row in filters_in_order(w, order):
        pieces = [row[i : i + size] for i in range(0, row.size, size)]
        done = []
        for p in pieces:
            p64 = p.astype(np.float64)
            score = p64.sum() if rule == "sum" else (np.maximum(p64, 0) ** 2).sum() - (np.minimum(p64, 0) ** 2).sum()
            done.append(np.where(p >= 0, p, 0) if score >= 0 else np.where(p <= 0, p, 0))
        out.append(done)
    return out


@orders
@pytest.mark.parametrize("size", [1, 4, 7, 8, 16, 128])
@pytest.mark.parametrize("rule", ["sum", "energy"])
def test_projection_is_the_definition(order: str, size: int, rule: str) -> None:
    w = normal((3, 2, 4, 5)).at[1, 1, 2].set(0).at[0, :, 3].set(0)  # some rows are pruned away
    c = cx.polarize(size, order=order, rule=rule)
    z = np.asarray(c.project(w, c.init(w)))
    got = filters_in_order(np.where(np.asarray(w).any(-1, keepdims=True), z + 0.0, 0), order)
    wanted = polarized(np.asarray(w), size, order, rule)
    for f, pieces in enumerate(wanted):
        # rows that polarizing empties would drop out of the walk, so compare on the rows of w
        walk = np.concatenate(pieces)
        assert np.count_nonzero(walk) == np.count_nonzero(z[..., f])
        np.testing.assert_array_equal(walk[walk != 0], np.asarray(got[f])[np.asarray(got[f]) != 0])


@orders
def test_fragments_view_and_its_inverse(order: str) -> None:
    w = normal((3, 2, 4, 5))
    view = views.fragments(5, order)
    x = view.to(w)
    assert x.shape == (5, 5, 5)
    rows = np.asarray(filters_in_order(np.asarray(w), order)).T
    np.testing.assert_array_equal(np.asarray(x).reshape(25, 5)[:24], rows)
    assert not np.asarray(x).reshape(25, 5)[24].any()
    np.testing.assert_array_equal(view.back(x, w.shape), w)
    np.testing.assert_array_equal(compact(w, polarity(w, 5, order), 5), x)


def test_the_three_orders_are_three_nestings() -> None:
    rows = np.arange(12).reshape(2, 3, 2)  # row of the GEMM view at (i, j, c)
    assert list(views.position_order((2, 3, 2, 7), "C")) == list(range(12))
    assert list(views.position_order((2, 3, 2, 7), "W"))[:6] == [rows[i, j, 0] for i in range(2) for j in range(3)]
    assert list(views.position_order((2, 3, 2, 7), "H"))[:6] == [rows[i, j, 0] for j in range(3) for i in range(2)]
    for order in ORDERS:
        assert list(views.position_order((5, 7), order)) == list(range(5))


@functools.cache
def chosen(size: int, order: str, rule: str) -> Any:
    c = cx.polarize(size, order=order, rule=rule)

    def run(w: jax.Array) -> Any:
        s = c.init(w)
        z = c.project(w, s)
        return s, z, c.project(z, s), mixed_fragments(z, s, size), required(s, size).reshape(w.shape)

    return jax.jit(run)


@given(
    values=hnp.arrays(np.float32, (2, 1, 3, 2), elements=st.floats(-2, 2, width=16, allow_subnormal=False)),
    powers=st.just(0) | hnp.arrays(int, (2, 1, 3, 1), elements=st.integers(-105, 120)),
    size=st.integers(1, 7),
    order=st.sampled_from(list(ORDERS)),
    rule=st.sampled_from(["sum", "energy"]),
    dtype=st.sampled_from([np.float32, ml_dtypes.bfloat16]),
)
def test_invariants(values: np.ndarray, powers: Any, size: int, order: str, rule: str, dtype: Any) -> None:
    held = np.ldexp(values, powers).astype(dtype)
    s, projected, again, mixed, below = jax.device_get(chosen(size, order, rule)(held))
    assert projected.dtype == again.dtype == held.dtype
    w, z = held.astype(np.float64), projected.astype(np.float64)
    assert mixed == 0
    np.testing.assert_array_equal(again.astype(np.float64), z)
    assert np.all((z == w) | (z == 0))  # right signs are untouched
    # no point of the cone is nearer
    for t in (0.0, 0.5, 1.0):
        assert np.sum((np.where(below, -t, t) * np.abs(w) - w) ** 2) >= np.sum((z - w) ** 2)
    assert sorted(s.order) == list(range(6))
    if (z == w).all():  # w lies in the set: then any order and any signs that say so are right
        return
    rows = w.reshape(6, 2)[s.order]
    kept = rows.any(axis=1)
    assert list(kept) == sorted(kept, reverse=True)  # pruned rows come last
    for (fragment, f), negative in np.ndenumerate(s.negative):
        terms = [Fraction(v) for v in rows[fragment * size : (fragment + 1) * size, f]]
        terms = terms if rule == "sum" else [v * abs(v) for v in terms]
        # float32 rounds a term once when it is squared and at each addition, by 2**-24 of what is there
        if abs(sum(terms)) > Fraction(len(terms), 2**23) * sum(map(abs, terms)):
            assert negative == (sum(terms) < 0)


@pytest.mark.parametrize("rule", ["sum", "energy"])
def test_energy_rule_is_the_best_of_all_signs(rule: str) -> None:
    losses = []
    for seed in range(20):
        w = normal((6, 2), seed)
        c = cx.polarize(3, order="C", rule=rule)
        s = c.init(w)
        loss = float(jnp.sum(jnp.square(c.project(w, s) - w)))
        best = min(
            float(jnp.sum(jnp.square(c.project(w, Polarity(s.order, jnp.asarray(signs).reshape(2, 2))) - w)))
            for signs in itertools.product([False, True], repeat=4)
        )
        losses.append(loss - best)
    assert min(losses) >= -1e-6
    if rule == "energy":
        assert max(losses) <= 1e-6
    else:
        assert max(losses) > 1e-3  # the paper's rule is not the nearest point


def test_signs_of_ties_and_zeros_are_positive() -> None:
    w = jnp.asarray([[1.0, 0.0], [-1.0, 0.0]])
    for rule in ("sum", "energy"):
        s = polarity(w, 2, "C", rule)
        assert not bool(jnp.any(s.negative))


def test_rows_that_are_pruned_leave_their_fragments() -> None:
    w = jnp.asarray([[1.0], [0.0], [2.0], [0.0], [-5.0], [-1.0]])
    s = polarity(w, 2, "C")
    assert list(np.asarray(s.order)) == [0, 2, 4, 5, 1, 3]
    np.testing.assert_array_equal(s.negative[:, 0], [False, True, False])
    np.testing.assert_array_equal(cx.polarize(2, order="C").project(w, s), w)  # nothing is lost: (1, 2) and (-5, -1)


def test_the_flipped_share_counts_fragments_that_hold_a_weight() -> None:
    a = polarity(jnp.asarray([[1.0, 1.0], [1.0, 1.0], [1.0, 1.0], [1.0, -1.0]]), 2, "C")
    b = polarity(jnp.asarray([[-1.0, 1.0], [-1.0, 1.0], [1.0, 1.0], [1.0, 1.0]]), 2, "C")
    # of the four fragments three hold a weight, and the flipped one is among them
    kept = jnp.asarray([[-1.0, 1.0], [-1.0, 1.0], [1.0, 0.0], [1.0, 0.0]])
    assert float(flipped_share(kept, a, b, 2)) == pytest.approx(1 / 3)
    assert float(flipped_share(kept.at[:2, 0].set(0), a, b, 2)) == 0.0
    assert float(flipped_share(kept, a, a, 2)) == 0.0


def test_watched_refreshes_say_which_share_of_signs_changed() -> None:
    rules = [("w", cx.columns(0.5) & cx.polarize(4)), ("v", cx.unstructured(0.5)), ("b", None)]
    every = {"rho": 0.5, "every": 2, "refresh_every": 3}
    tx = optax.chain(watch_refreshes(cx.admm(rules, **every), rules, 3), optax.sgd(0.5))
    plain = optax.chain(cx.admm(rules, **every), optax.sgd(0.5))
    params = {"w": normal((2, 2, 4, 5)), "v": normal((4, 4), 1), "b": normal((5,), 2)}
    state, other, same = tx.init(params), plain.init(params), params
    signs = lambda s: np.asarray(required(find_state(s).structure["w"][1], 4))
    assert changes(state) == {}
    seen, now = [], signs(state)
    for i in range(30):
        grad = jax.tree.map(lambda p, i=i: p - normal(p.shape, 10 + i), params)
        updates, state = jax.jit(tx.update)(grad, state, params)
        theirs, other = jax.jit(plain.update)(grad, other, same)
        chex.assert_trees_all_equal(updates, theirs)
        params, same = optax.apply_updates(params, updates), optax.apply_updates(same, theirs)
        if (i + 1) % 6 == 0:
            polar = find_state(state).structure["w"][1]
            order, z = np.asarray(polar.order), np.asarray(find_state(state).z[1]["w"]).reshape(16, 5)
            before, now = now, signs(state)
            total = flipped = 0
            for f in range(5):
                for start in range(0, 16, 4):
                    rows = order[start : start + 4]
                    if np.any(z[rows, f]):
                        total, flipped = total + 1, flipped + int(np.any(before[rows, f] != now[rows, f]))
            seen.append(flipped / total)
        if seen:
            assert changes(state) == {"w": pytest.approx(seen[-1])}
    assert any(seen)



def quadratic(target: jax.Array) -> Any:
    return lambda p: {"w": p["w"] - target}


@pytest.mark.parametrize(("order", "size"), [("W", 4), ("H", 8), ("C", 16)])
def test_forms_pipeline_keeps_every_fragment_single_signed(order: str, size: int) -> None:
    """Prune, polarize by ADMM with refreshed signs, harden, retrain, quantize: the invariant holds at each step."""
    prune = cx.filters(0.5) & cx.columns(0.5)
    target = normal((3, 3, 4, 8), 1)
    params = cx.harden({"w": target}, [("w", prune)], fresh=True).params
    both = [("w", prune & cx.polarize(size, order=order))]
    tx = optax.chain(cx.admm(both, rho=1.0, every=4, refresh_every=2), optax.sgd(0.2), cx.retrain([("w", prune)]))
    state = tx.init(params)
    grad = quadratic(target)

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(grad(params), state, params)
        return optax.apply_updates(params, updates), state

    residuals = []
    for i in range(60):
        params, state = step(params, state)
        if (i + 1) % 4 == 0:
            residuals.append(float(find_state(state).primal["w"][-1]))
    assert residuals[-1] < 0.7 * residuals[0]
    assert np.count_nonzero(np.any(np.asarray(params["w"]).reshape(36, 8) != 0, axis=1)) == 18

    hard = cx.harden(params, both, find_state(state)).params
    structure = structures(params, both, find_state(state))
    polarity_of = structure["w"][-1]
    assert int(mixed_fragments(hard["w"], polarity_of, size)) == 0
    kept_rows = set(np.flatnonzero(np.any(np.asarray(params["w"]).reshape(36, 8) != 0, axis=1)))
    assert set(np.asarray(polarity_of.order)[:18]) == kept_rows

    rt = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(0.1, momentum=0.9), cx.retrain(both, structure))
    rs, free = rt.init(hard), hard
    update = jax.jit(lambda p, s: rt.update(grad(p), s, p))
    for _ in range(20):
        updates, rs = update(free, rs)
        free = optax.apply_updates(free, updates)
        assert int(mixed_fragments(free["w"], polarity_of, size)) == 0
    check(free, both, structure)

    # the fragments stay those of polarizing: a row that it emptied keeps its place
    levels = cx.quantize(8, grid="cells")
    final = [("w", prune & cx.polarize(size, order=order) & levels)]
    chosen = {"w": (*structure["w"], levels.init(free["w"]))}
    quantized = project(free, final, chosen)
    check(quantized, final, chosen)
    assert int(mixed_fragments(quantized["w"], polarity_of, size)) == 0
    np.testing.assert_array_equal(quantized["w"] != 0, free["w"] != 0)
    qt = optax.chain(optax.sgd(0.1), cx.retrain(final, chosen))
    qs = qt.init(quantized)
    update = jax.jit(lambda p, s: qt.update(grad(p), s, p))
    for _ in range(5):
        updates, qs = update(quantized, qs)
        quantized = cx.retract(optax.apply_updates(quantized, updates), final, retrain_state(qs)).params
    assert int(mixed_fragments(quantized["w"], polarity_of, size)) == 0
    check(quantized, final, {"w": (*structure["w"], levels.init(quantized["w"]))})


def test_signs_follow_the_weights_only_at_refreshes() -> None:
    rules = [("w", cx.polarize(4, order="C"))]
    w = jnp.abs(normal((8, 3)))
    for refresh, negative in ((None, False), (1, True)):
        tx = cx.admm(rules, rho=1.0, every=1, refresh_every=refresh)
        state = tx.init({"w": w})
        _, state = tx.update({"w": w}, state, {"w": -w})
        assert bool(jnp.all(find_state(state).structure["w"][0].negative)) == negative


def test_jit_and_vmap_agree_with_eager() -> None:
    c = cx.polarize(4, order="H")
    ws = jnp.stack([normal((3, 3, 2, 5), s).at[s].set(0) for s in range(3)])
    run = lambda w: c.project(w, c.init(w))
    eager = jnp.stack([run(w) for w in ws])
    np.testing.assert_array_equal(jax.jit(run)(ws[0]), eager[0])
    np.testing.assert_array_equal(jax.vmap(run)(ws), eager)


@pytest.mark.parametrize(
    ("fragment", "options", "message"),
    [
        (0, {}, "at least 1 weight"),
        (4, {"order": "X"}, 'order must be "W", "H" or "C", got \'X\''),
        (4, {"rule": "max"}, 'rule must be "sum" or "energy", got \'max\''),
    ],
)
def test_bad_arguments_are_named(fragment: int, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cx.polarize(fragment, **options)


def test_a_bias_cannot_be_polarized() -> None:
    with pytest.raises(ValueError, match=r"bias \(4,\).*2 to 4 axes"):
        cx.resolve([("bias", cx.polarize(4))], {"bias": jnp.ones(4)})


PRUNED = {
    "filters and columns": cx.filters_and_columns(0.5, 0.4),
    "crossbar": cx.crossbar_aware(0.5, 0.4, rows=4, cols=4, cells_per_weight=2),
    "unstructured": cx.unstructured(0.05),
}


@pytest.mark.parametrize("name", PRUNED)
def test_hardening_forms_fragments_of_the_rows_that_are_left(name: str) -> None:
    """ADMM without refresh, and a support that has moved since its start: kept rows still precede pruned ones."""
    rng = np.random.default_rng(0)
    rules = [("w", PRUNED[name] & cx.polarize(4) & cx.quantize(4, grid="cells"))]
    dense = {"w": jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)}
    state = find_state(cx.admm(rules).init(dense))
    moved = {"w": jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32)}
    pruned = np.asarray(PRUNED[name].project(moved["w"], ())).reshape(36, 6)
    kept = np.flatnonzero(pruned.any(axis=1))
    stale = np.asarray(state.structure["w"][1].order)
    assert 4 < len(kept) < 36 and set(stale[: len(kept)]) != set(kept)
    structure = structures(moved, rules, state)["w"]
    order = np.asarray(structure[1].order)
    nested = np.asarray(views.position_order((3, 3, 4, 6), "W"))
    assert order.tolist() == [p for p in nested if p in kept] + [p for p in nested if p not in kept]
    hard = np.asarray(cx.harden(moved, rules, state).params["w"]).reshape(36, 6)[order]
    assert not hard[len(kept) :].any()
    signs = np.asarray(structure[1].negative)
    for f in range(6):
        for at in range(0, len(kept), 4):
            piece = pruned[order[at : at + 4], f]
            assert signs[at // 4, f] == (piece.sum() < 0)
            assert (hard[at : at + 4, f] * (-1 if signs[at // 4, f] else 1) >= 0).all()


def test_hardening_keeps_admms_signs_where_the_rows_are_the_same() -> None:
    rng = np.random.default_rng(1)
    rules = [("w", cx.columns(0.5) & cx.polarize(4)), ("v", cx.polarize(3))]
    start = {n: jnp.asarray(rng.normal(size=(3, 3, 4, 6)), jnp.float32) for n in "wv"}
    state = find_state(cx.admm(rules).init(start))
    opposite = jax.tree.map(jnp.negative, start)  # the same columns, and the other sign everywhere
    for settled in (structures(opposite, rules, state), jax.jit(lambda p: structures(p, rules, state))(opposite)):
        for got, held in ((settled["w"][1], state.structure["w"][1]), (settled["v"][0], state.structure["v"][0])):
            np.testing.assert_array_equal(got.order, held.order)
            np.testing.assert_array_equal(got.negative, held.negative)
