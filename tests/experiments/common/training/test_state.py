"""One step against a loop written by hand; evaluation counts every example once; the loss's formula."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common.training import state as states
from experiments.common.training.config import Fit
from experiments.common.training.state import Sums, TrainState, classification, make_evaluate, make_runner, make_step


def _apply(variables, x, train=False):
    return x @ variables["params"]["w"]


@pytest.fixture
def problem(rng):
    data = {
        "inputs": jnp.asarray(rng.normal(size=(23, 5)).astype(np.float32)),
        "labels": jnp.asarray(rng.integers(0, 3, 23).astype(np.int32)),
    }
    return {"params": {"w": jnp.asarray(rng.normal(size=(5, 3)).astype(np.float32))}}, data


def _softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _start(params, tx, key=0):
    return TrainState(params, {}, tx.init(params), jnp.int32(0), jax.random.key(key), Sums.zero())


def _own(tree):
    return jax.tree.map(jnp.array, tree)


def test_steps_are_those_of_a_loop_by_hand(problem) -> None:
    params, data = problem
    order = np.arange(20, dtype=np.int32).reshape(4, 5)[::-1]
    tx = optax.sgd(0.1)
    run = make_runner(make_step(classification(_apply, lambda x: x), tx, Fit()))
    end = run(_start(_own(params), tx), data, jnp.asarray(order), None, 7)
    w = np.asarray(params["params"]["w"], np.float64)
    x, y = np.asarray(data["inputs"], np.float64), np.asarray(data["labels"])
    loss = 0.0
    for i in range(7):
        rows = order[i % 4]
        p = _softmax(x[rows] @ w)
        loss -= np.log(p[np.arange(5), y[rows]]).sum()
        w = w - 0.1 * x[rows].T @ (p - np.eye(3)[y[rows]]) / 5
    np.testing.assert_allclose(end.params["params"]["w"], w, rtol=2e-5, atol=1e-6)
    assert int(end.step) == 7
    assert int(end.sums.seen) == 35
    np.testing.assert_allclose(float(end.sums.loss), loss, rtol=1e-5)


def test_the_scan_and_the_loop_do_the_same(problem, monkeypatch) -> None:
    params, data = problem
    task = classification(_apply, lambda x: x, lambda key, x: x + 0.1 * jax.random.normal(key, x.shape))
    tx = optax.sgd(0.1, momentum=0.9)  # two compilations: Adam would make steps of what rounding left of a gradient
    order = jnp.arange(20, dtype=jnp.int32).reshape(4, 5)
    step = make_step(task, tx, Fit())
    loop = make_runner(step)(_start(_own(params), tx), data, order, None, 6)
    monkeypatch.setattr(states.jax, "default_backend", lambda: "gpu")
    scan = make_runner(step)(_start(_own(params), tx), data, order, None, 6)
    for a, b in zip(jax.tree.leaves(loop.params), jax.tree.leaves(scan.params), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)
    assert int(scan.step) == 6


def test_every_step_draws_anew_and_the_same_again(problem) -> None:
    params, data = problem
    seen = []

    def augment(key, x):
        jax.debug.callback(lambda k: seen.append(tuple(np.asarray(k).tolist())), jax.random.key_data(key))
        return x

    tx = optax.sgd(0.0)
    step = jax.jit(make_step(classification(_apply, lambda x: x, augment), tx, Fit()))
    for _ in range(2):
        state = _start(params, tx, key=5)
        for _ in range(3):
            state = step(state, data, jnp.zeros((1, 2), jnp.int32), None)
        jax.block_until_ready(state)
    jax.effects_barrier()
    assert len(set(seen[:3])) == 3
    assert seen[:3] == seen[3:]


def test_augmentation_can_be_switched_off(problem) -> None:
    params, data = problem
    task = classification(_apply, lambda x: x, lambda key, x: x * 0)
    with_, without = (task.loss(params, {}, data, jax.random.key(0), Fit(augment=on), None)[0] for on in (True, False))
    assert float(with_) == pytest.approx(np.log(3))
    assert float(without) != pytest.approx(np.log(3))


@pytest.mark.parametrize("n", [1, 5, 10, 23])
def test_evaluation_counts_every_example_once(problem, n) -> None:
    params, data = problem
    data = {k: v[:n] for k, v in data.items()}
    figures = make_evaluate(classification(_apply, lambda x: x), 5)(params, {}, data)
    logits = np.asarray(data["inputs"]) @ np.asarray(params["params"]["w"])
    y = np.asarray(data["labels"])
    assert figures["accuracy"] == np.mean(logits.argmax(-1) == y)
    np.testing.assert_allclose(figures["loss"], -np.log(_softmax(logits)[np.arange(n), y]).mean(), rtol=1e-5)


def test_label_smoothing_and_distillation_have_their_formulas(problem) -> None:
    params, data = problem
    teacher = {"params": {"w": -params["params"]["w"]}}
    fit = Fit(label_smoothing=0.1, distill=0.3, temperature=2.0)
    value = classification(_apply, lambda x: x).loss(params, {}, data, jax.random.key(0), fit, (teacher, {}))[0]
    z = np.asarray(data["inputs"], np.float64) @ np.asarray(params["params"]["w"], np.float64)
    target = 0.9 * np.eye(3)[np.asarray(data["labels"])] + 0.1 / 3
    ce = -(target * np.log(_softmax(z))).sum(-1).mean()
    p, q = _softmax(-z / 2), _softmax(z / 2)
    kl = (p * (np.log(p) - np.log(q))).sum(-1).mean()
    assert float(value) == pytest.approx(0.7 * ce + 0.3 * 4 * kl, rel=1e-4)


def test_the_teacher_gets_no_gradient(problem) -> None:
    params, data = problem
    task = classification(_apply, lambda x: x)

    def loss(teacher):
        return task.loss(params, {}, data, jax.random.key(0), Fit(distill=1.0), (teacher, {}))[0]

    assert not np.any(jax.grad(loss)(params)["params"]["w"])


def test_all_finite_sees_one_bad_value() -> None:
    good = {"a": jnp.ones(3), "b": (jnp.zeros(()),)}
    assert states.all_finite(good)
    assert not states.all_finite(good | {"a": jnp.array([1.0, jnp.nan, 1.0])})
