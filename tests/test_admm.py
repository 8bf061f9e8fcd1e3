"""The ADMM transform: its arithmetic against NumPy, and its behaviour inside optax's combinators."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressx as cx
from compressx._admm_state import by_set

RULES = [("w", cx.unstructured(keep=3) & cx.filters(keep=2))]


def params() -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    return {
        "w": jnp.asarray(rng.standard_normal((4, 3)), jnp.float32),
        "b": jnp.asarray(rng.standard_normal(3), jnp.float32),
    }


def top(v: np.ndarray, k: int) -> np.ndarray:
    order = np.argsort(-np.abs(v).reshape(-1), kind="stable")
    z = np.zeros(v.size, v.dtype)
    z[order[:k]] = v.reshape(-1)[order[:k]]
    return z.reshape(v.shape)


def best_filters(v: np.ndarray, k: int) -> np.ndarray:
    keep = np.argsort(-np.square(v).sum(0), kind="stable")[:k]
    z = np.zeros_like(v)
    z[:, keep] = v[:, keep]
    return z


@pytest.mark.parametrize("rescale", [True, False])
def test_two_sets_follow_the_extended_admm_written_in_numpy(rescale: bool) -> None:
    schedule = cx.schedules.staged(0.5, 2.0, every=1, maximum=1.5)
    tx = optax.chain(cx.admm(RULES, rho=schedule, every=2, rescale_dual=rescale), optax.sgd(0.1))
    p = params()
    state = tx.init(p)
    w, b, rho = np.asarray(p["w"]), np.asarray(p["b"]), 0.5
    project = [lambda v: top(v, 3), lambda v: best_filters(v, 2)]
    z, u = [f(w) for f in project], [np.zeros_like(w), np.zeros_like(w)]
    for step in range(1, 8):
        gradient = {"w": jnp.sin(p["w"]), "b": p["b"]}
        updates, state = jax.jit(tx.update)(gradient, state, p)
        if step % 2 == 0:
            before = [x.copy() for x in z]
            z = [f(w + x) for f, x in zip(project, u, strict=True)]
            u = [x + w - y for x, y in zip(u, z, strict=True)]
            primal = [np.linalg.norm(w - y) / np.linalg.norm(w) for y in z]
            dual = [np.linalg.norm(y - o) / np.linalg.norm(w) for y, o in zip(z, before, strict=True)]
            new = min(rho * 2, 1.5)
            u = [x * (rho / new) if rescale else x for x in u]
            rho = new
            got = cx.find_admm_state(state)
            np.testing.assert_allclose(got.primal["w"], primal, rtol=1e-5)
            np.testing.assert_allclose(got.dual["w"], dual, rtol=1e-5, atol=1e-7)
            told = by_set(jax.device_get(got.primal), jax.device_get(got.dual), RULES)
            assert list(told["primal_by_set"]) == ["w unstructured", "w filters"]
            np.testing.assert_allclose(list(told["primal_by_set"].values()), primal, rtol=1e-5)
            np.testing.assert_allclose(list(told["dual_by_set"].values()), dual, rtol=1e-5, atol=1e-7)
        pull = rho * sum(w - y + x for y, x in zip(z, u, strict=True))
        w, b = w - 0.1 * (np.sin(w) + pull), b - 0.1 * b
        p = optax.apply_updates(p, updates)
        np.testing.assert_allclose(p["w"], w, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(p["b"], b, rtol=2e-5)


def test_residuals_by_set_name_what_lies_in_several_sets() -> None:
    two = cx.filters(0.5) & cx.filters(0.2)
    joint = cx.unstructured(0.5, scope="rule") & cx.quantize(4)
    rules = [("a", None), ("a.*", two), ("(b|c)", joint), (".*", cx.filters(0.5))]
    primal = {"ab": np.array([1.0, 2.0]), "(b|c)": np.array([3.0, 4.0]), "d": np.array([5.0])}
    dual = {n: 10 * v for n, v in primal.items()}
    wanted = {"ab filters": 1.0, "ab filters 2": 2.0, "(b|c) unstructured": 3.0, "(b|c) quantize": 4.0}
    tens = {n: 10 * v for n, v in wanted.items()}
    assert by_set(primal, dual, rules) == {"primal_by_set": wanted, "dual_by_set": tens}
    assert by_set({"d": np.array([5.0])}, {"d": np.array([5.0])}, rules) == {}


def test_least_squares_reaches_the_best_support() -> None:
    """min ||x - t||^2 over 2-sparse x is t's two largest entries: ADMM must end there."""
    target = jnp.array([3.0, -0.5, 2.0, 1.0])
    tx = optax.chain(cx.admm([("x", cx.unstructured(keep=2))], rho=1.0, every=20), optax.sgd(0.2))
    p = {"x": jnp.array([0.1, 3.0, 0.1, 0.1])}
    state = tx.init(p)

    @jax.jit
    def step(p: Any, s: Any) -> Any:
        updates, s = tx.update({"x": p["x"] - target}, s, p)
        return optax.apply_updates(p, updates), s

    for _ in range(1000):
        p, state = step(p, state)
    hard = cx.harden(p, [("x", cx.unstructured(keep=2))], fresh=True).params["x"]
    np.testing.assert_allclose(hard, [3, 0, 2, 0], atol=1e-2)


def test_state_holds_two_copies_of_constrained_leaves_only() -> None:
    state = cx.admm([("w", cx.unstructured(0.5))], rho=1.0, every=2).init(params())
    arrays = [x for x in jax.tree.leaves(state) if x.ndim == 2]
    assert [x.shape for x in arrays] == [(4, 3)] * 2
    assert sum(x.size for x in jax.tree.leaves(state)) <= 2 * 12 + 5


def test_state_keeps_the_leaf_dtype() -> None:
    p = {"w": params()["w"].astype(jnp.bfloat16)}
    tx = cx.admm([("w", cx.unstructured(0.5))], rho=0.1, every=1)
    _, state = tx.update(p, tx.init(p), p)
    assert state.z[0]["w"].dtype == state.u[0]["w"].dtype == jnp.bfloat16


def run(tx: optax.GradientTransformationExtraArgs, steps: int = 6, **extra: Any) -> Any:
    p = params()
    state = tx.init(p)
    update = jax.jit(lambda g, s, p: tx.update(g, s, p, **extra))
    for _ in range(steps):
        updates, state = update(jax.tree.map(jnp.sin, p), state, p)
        p = optax.apply_updates(p, updates)
    return p, state


def plain() -> optax.GradientTransformationExtraArgs:
    return optax.chain(cx.admm(RULES, rho=0.3, every=2), optax.sgd(0.1, momentum=0.9))


def test_extra_arguments_are_ignored() -> None:
    chex.assert_trees_all_equal(run(plain(), value=jnp.float32(1.0))[0], run(plain())[0])


def test_multi_steps_counts_whole_steps() -> None:
    p, state = run(optax.MultiSteps(plain(), every_k_schedule=2), steps=12)
    chex.assert_trees_all_close(p, run(optax.with_extra_args_support(plain()), steps=6)[0], atol=0.2)
    assert int(cx.find_admm_state(state).step) == 6


def test_partition_gives_each_label_its_own() -> None:
    tx = optax.partition({"c": plain(), "f": optax.sgd(0.1, momentum=0.9)}, {"w": "c", "b": "f"})
    chex.assert_trees_all_close(run(tx)[0], run(plain())[0], rtol=1e-5, atol=1e-6)


def test_inject_hyperparams_moves_rho_between_steps() -> None:
    tx = optax.inject_hyperparams(lambda rho: cx.admm(RULES, rho=rho, every=2))(
        rho=lambda step: 0.1 * (step.astype(jnp.float32) + 1)
    )
    _, state = run(optax.chain(tx, optax.sgd(0.1)), steps=3)
    assert float(cx.find_admm_state(state).rho["w"]) == pytest.approx(0.3, rel=1e-5)


def test_vmap_over_seeds_equals_the_loop() -> None:
    tx = plain()
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params())
    state = jax.vmap(tx.init)(many)
    for _ in range(4):
        updates, state = jax.jit(jax.vmap(tx.update))(jax.tree.map(jnp.sin, many), state, many)
        many = optax.apply_updates(many, updates)
    for i, scale in enumerate((1, 2)):
        p = jax.tree.map(lambda x, scale=scale: scale * x, params())
        s = tx.init(p)
        for _ in range(4):
            updates, s = jax.jit(tx.update)(jax.tree.map(jnp.sin, p), s, p)
            p = optax.apply_updates(p, updates)
        chex.assert_trees_all_close(jax.tree.map(lambda x, i=i: x[i], many), p, rtol=1e-5, atol=1e-6)


def test_rho_per_leaf_by_pattern() -> None:
    rules = [("w", cx.unstructured(0.5)), ("b", cx.unstructured(0.4))]
    state = cx.admm(rules, rho=[("b", 0.2), (".*", cx.schedules.staged(0.1))], every=1).init(params())
    assert {k: float(v) for k, v in state.rho.items()} == pytest.approx({"w": 0.1, "b": 0.2})
    with pytest.raises(ValueError, match="no rho given for w"):
        cx.admm(rules, rho=[("b", 0.2)], every=1).init(params())


def test_joint_constraint_gives_z_and_u_per_leaf() -> None:
    rule = [(".*", cx.unstructured(0.3, scope="rule"))]
    p, state = run(optax.chain(cx.admm(rule, rho=0.5, every=1), optax.sgd(0.1)))
    z = cx.find_admm_state(state).z[0]
    assert sum(int(jnp.count_nonzero(v)) for v in jax.tree.leaves(z)) == 5  # floor(0.3 * 15 + 1/2)
    assert jax.tree.map(jnp.shape, z) == jax.tree.map(jnp.shape, p)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="every must be at least 1, got 0"):
        cx.admm(RULES, every=0)
    with pytest.raises(ValueError, match="rho must be finite and not negative, got -1"):
        cx.admm(RULES, rho=-1.0).init(params())
    with pytest.raises(ValueError, match="admm needs the parameters"):
        cx.admm(RULES).update(params(), cx.admm(RULES).init(params()))
    with pytest.raises(ValueError, match="expected one AdmmState"):
        cx.find_admm_state(optax.sgd(0.1).init(params()))
