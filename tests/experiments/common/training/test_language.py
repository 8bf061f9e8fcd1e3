"""Carried state through training and evaluation, exact perplexity, sampling, gradient clipping."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.common import training
from experiments.common.data import batches, text
from experiments.common.models.lstm import LanguageModel
from experiments.common.training import Fit, Weights, phases
from experiments.common.training.config import Admm, Plan, Stage
from experiments.common.training.job import epoch_order
from experiments.common.training.language import cross_entropy, language, make_perplexity, sample
from experiments.common.training.state import Sums, TrainState, make_evaluate, make_step

V, H = 13, 8
NET = LanguageModel(classes=V, hidden=H, dropout=0.3)
PLAIN = LanguageModel(classes=V, hidden=H)
read_words = jax.jit(PLAIN.apply)


@pytest.fixture(scope="module")
def params():
    return {"params": jax.jit(NET.init)(jax.random.key(5), jnp.zeros((1, 1), jnp.int32))["params"]}


def _ids(n, seed=0):
    return np.random.default_rng(seed).integers(0, V, n).astype(np.int32)


def _nats(params, ids):
    """The text read as a whole, word by word, nothing carried by hand."""
    logits, _ = read_words(params, jnp.asarray(ids[None, :-1]))
    p = np.asarray(jax.nn.log_softmax(logits[0], -1), np.float64)
    return -p[np.arange(len(ids) - 1), ids[1:]].sum()


@pytest.mark.parametrize("n", [2, 17, 33, 40])
def test_perplexity_is_that_of_the_text_read_at_once(params, n) -> None:
    ids = _ids(n)
    got = make_perplexity(NET, steps=8)(params, ids)
    assert got.places == n - 1
    np.testing.assert_allclose(got.nats, _nats(params, ids), rtol=1e-5)
    np.testing.assert_allclose(got.value, np.exp(got.nats / got.places), rtol=1e-12)


def test_evaluation_in_lanes_is_exact_within_each(params) -> None:
    ids = _ids(50)
    cut = text.windows(ids, 3, 4, whole=True)
    figures = make_evaluate(language(PLAIN), 3)(params, {}, {k: jnp.asarray(v) for k, v in cut.items()})
    each = len(cut["fresh"]) // 3 * 4
    lanes = [ids[b * each : min((b + 1) * each, 49) + 1] for b in range(3)]
    want = sum(_nats(params, lane) for lane in lanes)
    np.testing.assert_allclose(figures["loss"] * 49, want, rtol=1e-5)


def test_a_step_carries_on_and_its_gradient_stops_at_the_window(params) -> None:
    ids = _ids(41)
    data = {k: jnp.asarray(v) for k, v in text.windows(ids, 2, 5).items()}
    task, order = language(PLAIN), jnp.asarray(batches.in_order(8, 2))
    tx = optax.sgd(0.0)
    step = jax.jit(make_step(task, tx, Fit(augment=False)))
    state = TrainState(params, task.begin(2), tx.init(params), jnp.int32(0), jax.random.key(0), Sums.zero())
    for t in range(4):  # a whole epoch: the lanes' positions 0..19 and 20..39
        state = step(state, data, order, None)
        read = jnp.asarray(np.stack([ids[: 5 * t + 5], ids[20 : 20 + 5 * t + 5]]))
        _, want = read_words(params, read)
        for a, b in zip(jax.tree.leaves(state.batch_stats["carry"]), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    state = step(state, data, order, None)  # the next epoch begins anew
    _, want = read_words(params, jnp.asarray(np.stack([ids[:5], ids[20:25]])))
    np.testing.assert_allclose(state.batch_stats["carry"][0][0], want[0][0], rtol=1e-4, atol=1e-5)

    # truncated: with the carry given as numbers, the gradient is that of the window alone
    batch = {k: x[order[1]] for k, x in data.items()}
    carry = task.begin(2)
    carry = jax.tree.map(lambda x: x + 0.1, carry)
    loss = lambda p: task.loss(p, carry, batch, jax.random.key(0), Fit(augment=False), None)[0]
    ours = jax.jit(jax.grad(loss))(params)

    def alone(p):
        logits, _ = PLAIN.apply(p, batch["inputs"], carry["carry"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(jax.jit(jax.grad(alone))(params)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_the_two_losses_differ_by_the_steps_of_a_window(params) -> None:
    batch = {k: jnp.asarray(v) for k, v in text.windows(_ids(21), 2, 10).items()}
    a, b = (
        language(NET, kind).loss(params, {"carry": NET.begin(2)}, batch, jax.random.key(1), Fit(), None)[0]
        for kind in ("word", "window")
    )
    np.testing.assert_allclose(float(b), 10 * float(a), rtol=1e-6)
    with pytest.raises(ValueError, match="loss must be one of word, window"):
        language(NET, "char")


def _job(seed=3, **changes):
    ids = _ids(301)
    lanes = 4
    task = language(NET)
    init = jax.jit(NET.init)(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))
    job = training.Job(
        task=task,
        first=Weights({"params": init["params"]}, task.begin(lanes), {}),
        train=text.windows(ids, lanes, 5),
        test=text.windows(_ids(60, 1), 2, 5, whole=True),
        seed=seed,
        batch=lanes,
        eval_batch=2,
        clip=0.5,
        chunk=4,
        save_steps=7,
        save_seconds=0,
    )
    return dataclasses.replace(job, **changes)


RULES = ((r"params/lstm_\d/(input|recurrent)/kernel", {"kind": "darb", "density": 0.25}),)
PLAN = Plan(Fit(1, lr=1e-2), (Stage(RULES, Admm(2, lr=1e-2, rho=1e-1, every=5), Fit(1, lr=1e-2)),))


class _Stop(training.Display):
    """Breaks off once, as a killed run would."""

    def __init__(self, step):
        super().__init__(1, quiet=True)
        self.step = step

    def move(self, phase, step):
        if step >= self.step:
            raise KeyboardInterrupt


@pytest.mark.slow
def test_a_run_broken_off_ends_with_the_same_bits_carry_and_all(tmp_path) -> None:
    todo = phases.plan(PLAN)
    whole = training.train(_job(), todo, tmp_path / "a", training.Display(1, quiet=True))
    with pytest.raises(KeyboardInterrupt):
        training.train(_job(), todo, tmp_path / "b", _Stop(36))  # inside an epoch of ADMM
    again = training.train(_job(), todo, tmp_path / "b", training.Display(1, quiet=True))
    assert again.resumed == 29  # a multiple of 7 from the start of ADMM, at step 15
    for name in ("dense", "admm", "retrain"):
        template = training.like(_job().first, next(p for p in todo if p.name == name), _job().placement)
        a, b = (out.checkpoints.load_weights(name, template) for out in (whole, again))
        assert all(bool((x == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert whole.results["retrain"]["end"]["loss"] < whole.results["dense"]["start"]["test_loss"]


def test_texts_come_in_their_order_in_every_epoch() -> None:
    job, (phase, *_) = _job(), phases.plan(PLAN)
    order = epoch_order(phase, 0, job)
    assert order.shape == (15, 4)
    np.testing.assert_array_equal(order, epoch_order(phase, 1, job))
    ids = job.train["inputs"][order]  # [steps, lanes, words]
    np.testing.assert_array_equal(ids.transpose(1, 0, 2).reshape(-1), _ids(301)[:300])
    np.testing.assert_array_equal(job.train["fresh"][order], np.arange(15)[:, None] == np.zeros((1, 4)))


def test_the_gradient_of_the_loss_is_clipped_and_the_pull_is_not(params) -> None:
    (phase,) = [p for p in phases.plan(PLAN) if p.kind == "admm"]
    gradient = jax.tree.map(lambda w: jnp.full(w.shape, 100.0), params)
    tx = training.optimizers.of_phase("plain_sgd", phase, 20, 10, None, 2.0)
    update, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    free = training.optimizers.of_phase("plain_sgd", phase, 20, 10, None)
    clipped = jax.tree.map(lambda g: g * (2.0 / optax.tree.norm(gradient)), gradient)
    want, _ = jax.jit(free.update)(clipped, free.init(params), params)
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)
    # plain SGD on the biases, which no rule holds: the learning rate times the clipped gradient
    bias = update["params"]["softmax"]["bias"]
    size = sum(w.size for w in jax.tree.leaves(params))
    np.testing.assert_allclose(bias, -phase.fit.lr * 2.0 / np.sqrt(size), rtol=1e-4)


def test_a_sample_is_drawn_from_the_models_own_distribution(params) -> None:
    """The first word drawn after a prompt has the frequencies the model states; later ones read what was drawn."""
    prompt = [3, 1]
    drawn = sample(PLAIN, params, prompt, 6, seed=2)
    assert drawn == sample(PLAIN, params, prompt, 6, seed=2)
    assert drawn != sample(PLAIN, params, prompt, 6, seed=3)
    keys = jax.random.split(jax.random.key(2), 6)
    for i, word in enumerate(drawn):  # the whole history read again for every word
        logits, _ = read_words(params, jnp.asarray([prompt + drawn[:i]]))
        assert word == int(jax.random.categorical(keys[i], logits[0, -1]))
    never = [i for i in range(V) if i != 4]
    assert sample(PLAIN, params, prompt, 5, never=never) == [4] * 5
    with pytest.raises(ValueError, match="needs a prompt"):
        sample(PLAIN, params, [], 5)


@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_cross_entropy_and_its_gradient_are_those_of_optax(scale, rng):
    logits = jnp.asarray(scale * rng.standard_normal((7, 11)), jnp.float32)
    labels, g = jnp.asarray(rng.integers(0, 11, 7), jnp.int32), jnp.asarray(rng.standard_normal(7), jnp.float32)
    ours, back = jax.vjp(lambda x: cross_entropy(x, labels), logits)
    theirs, expected = jax.vjp(lambda x: optax.softmax_cross_entropy_with_integer_labels(x, labels), logits)
    np.testing.assert_allclose(np.asarray(ours), np.asarray(theirs), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.asarray(back(g)[0]), np.asarray(expected(g)[0]), rtol=1e-3, atol=1e-6)
