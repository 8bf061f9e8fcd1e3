"""Losses against loops and closed forms, REINFORCE against the exact expectation, counts, norms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.entity_linking.linking import learning, model
from experiments.entity_linking.linking.learning import Learning
from experiments.entity_linking.linking.model import Linker
from tests.experiments.entity_linking.linking import toy

KNOWN = toy.knowledge()
FACTS = model.facts_of(KNOWN)


def _scores(shape=(2, 5, 4), seed=0):
    rng = np.random.default_rng(seed)
    mask = rng.random(shape) < 0.7
    mask[..., 0] = True
    scores = np.where(mask, rng.normal(0, 0.02, shape), model.LOW).astype(np.float32)
    gold = np.array([[int(rng.choice(np.flatnonzero(m))) for m in row] for row in mask], np.int32)
    gold[0, 2] = -1
    return scores, gold, mask


def _margin_loop(scores, gold, mask, margin):
    out = np.zeros(gold.shape)
    for place in np.ndindex(gold.shape):
        y, s = gold[place], scores[place].astype(float)
        if y >= 0:
            others = [i for i in np.flatnonzero(mask[place]) if i != y]
            out[place] = sum(max(0.0, margin - s[y] + s[i]) for i in others) / mask[place].sum()
    return out


def test_multi_margin_equals_its_sum() -> None:
    scores, gold, mask = _scores()
    found = learning.multi_margin(*map(jnp.asarray, (scores, gold, mask)), 0.01)
    np.testing.assert_allclose(found, _margin_loop(scores, gold, mask, 0.01), rtol=1e-5, atol=1e-8)
    assert (np.asarray(found) > 0).any()


def test_multi_margin_gradient_counts_the_candidates_inside_the_margin() -> None:
    scores, gold, mask = _scores()
    gradient = jax.grad(lambda s: jnp.sum(learning.multi_margin(s, jnp.asarray(gold), jnp.asarray(mask), 0.01)))(scores)
    want = np.zeros(scores.shape)
    for place in np.ndindex(gold.shape):
        y, n = gold[place], mask[place].sum()
        inside = [i for i in np.flatnonzero(mask[place]) if i != y and 0.01 - scores[place][y] + scores[place][i] > 0]
        if y >= 0:
            want[place][inside] = 1 / n
            want[place][y] = -len(inside) / n
    np.testing.assert_allclose(gradient, want, rtol=1e-6)


def test_returns_are_the_mean_reward_discounted_by_what_comes_after_in_the_same_document() -> None:
    document = np.array([[0, 0, 0, 1, 1, -1], [0, 1, 2, 2, 2, 2]], np.int32)
    reward = -np.random.default_rng(0).integers(0, 2, document.shape).astype(np.float32)
    want = np.zeros(document.shape)
    for r, row in enumerate(document):
        for d in set(row.tolist()) - {-1}:
            at = np.flatnonzero(row == d)
            for k, t in enumerate(at):
                want[r, t] = 0.9 ** (len(at) - 1 - k) * reward[r, at].mean()
    found = learning.returns(jnp.asarray(reward), jnp.asarray(document), 0.9)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("baseline", learning.BASELINES)
def test_reinforce_gradient_is_the_exact_expectation_on_a_toy_document(baseline) -> None:
    linker = Linker(features=("prior", "entities"), hidden=3, dropout=0.0)
    learns = Learning(method="reinforce", baseline=baseline)
    params = toy.weights(linker, KNOWN, 3)
    mentions = [
        dict(m, candidates=[2 + 2 * t, 3 + 2 * t], log_prior=[-0.5, -0.9], gold=t % 2)
        for t, m in enumerate(toy.document(9, 2, KNOWN))
    ]
    batch = toy.batch([[mentions]], 2, most=2)

    def surrogate(inner, choice):
        log_p = jax.nn.log_softmax(model.path_scores(linker, inner, FACTS, batch, choice).scores)
        log_p = jnp.take_along_axis(log_p, choice[..., None], -1)[0, :, 0]
        wrong = jnp.mean((choice != batch["gold"]).astype(jnp.float32))
        weight = 0.9 ** jnp.arange(1, -1, -1).astype(jnp.float32) * -wrong
        return -jnp.sum(log_p * weight), jnp.exp(jnp.sum(log_p))

    def part(tree):
        pairs = (("hidden", "kernel"), ("entities", "score"))
        return np.concatenate([np.ravel(tree["params"][k][n]) for k, n in pairs])

    paths = [jnp.asarray([c], jnp.int32) for c in itertools.product(range(2), repeat=2)]
    each = jax.jit(jax.value_and_grad(surrogate, has_aux=True))
    exact = 0.0
    for path in paths:
        (_, p), gradient = each(params, path)
        exact = exact + float(p) * part(gradient)

    def one(key):
        return jax.grad(lambda p: learning.loss_and_decisions(linker, learns, p, FACTS, batch, key)[0])(params)

    drawn = jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 8192))
    mean, spread = (part(jax.tree.map(lambda w, f=f: f(np.asarray(w), 0), drawn)) for f in (np.mean, np.std))
    error = spread / np.sqrt(8192)
    assert (np.abs(exact) > 15 * error).sum() >= 3  # the draws are many enough to tell
    assert (np.abs(mean - exact) < 5 * error + 1e-6).all()


def test_scheduled_sampling_goes_from_gold_to_the_linkers_own_decisions() -> None:
    scores, gold, _ = _scores()
    own = jnp.argmax(scores[:, 0], -1)
    for share, want in ((0.0, gold[:, 0]), (1.0, own)):
        pick = learning.scheduled(jnp.asarray(gold), share, jax.random.key(0))
        np.testing.assert_array_equal(pick(jnp.asarray(scores[:, 0]), jnp.int32(0)), want)


def test_sampling_never_leaves_the_candidates() -> None:
    scores = jnp.asarray([[0.0, model.LOW, 0.0], [model.LOW] * 3], jnp.float32)
    pick = learning.sample(jax.random.key(1))
    drawn = np.stack([pick(scores, jnp.int32(t)) for t in range(40)])
    assert set(drawn[:, 0]) == {0, 2}
    assert set(drawn[:, 1]) == {-1}


def test_teacher_forcing_and_own_decisions_train_on_different_contexts() -> None:
    linker = Linker(features=("prior", "entities"), hidden=3, dropout=0.0)
    params = toy.weights(linker, KNOWN, 1)
    batch = toy.batch([[toy.document(4, 6, KNOWN)]], 6)
    losses = {}
    for share in (0.0, 1.0):
        learns = Learning(own_decisions=share, margin=1.0)
        run = jax.jit(lambda p, k, learns=learns: learning.loss_and_decisions(linker, learns, p, FACTS, batch, k)[0])
        losses[share] = float(run(params, jax.random.key(0)))
    scores = np.asarray(
        jax.jit(model.path_scores, static_argnums=0)(linker, params, FACTS, batch, batch["gold"]).scores
    )
    gold, mask = np.asarray(batch["gold"]), np.asarray(batch["mask"])
    want = _margin_loop(scores, gold, mask, 1.0).sum() / (gold >= 0).sum()
    assert losses[0.0] == pytest.approx(want, rel=1e-4)
    assert losses[0.0] != losses[1.0]


def test_norms_are_limited_in_the_scoring_network_alone() -> None:
    linker = Linker(hidden=5)
    params = jax.tree.map(lambda w: 10 * w, toy.weights(linker, KNOWN))
    after = jax.jit(learning.limit_norms)(params, 4.0)["params"]
    for name in ("hidden", "out"):
        for k, w in params["params"][name].items():
            want = np.asarray(w) * min(1.0, 4.0 / np.linalg.norm(w))
            np.testing.assert_allclose(after[name][k], want, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (after["vectors"], params["params"]["vectors"])), strict=True):
        np.testing.assert_array_equal(a, b)


def test_score_counts_a_gold_outside_the_candidates_as_wrong_and_reads_no_padding() -> None:
    linker = Linker(features=("prior",), hidden=3, dropout=0.0)
    params = toy.weights(linker, KNOWN)
    mentions = toy.document(7, 4, KNOWN)
    batch = toy.batch([[mentions], [mentions]], 6)
    batch["gold"] = batch["gold"].at[:, 0].set(-1)
    batch["scored"] = batch["scored"].at[:, 3].set(False)
    task = learning.make_task(linker, Learning())
    carried = learning.carried(FACTS)
    sums = jax.jit(task.score)(params, carried, batch, jnp.array([True, False]))
    choice = np.asarray(jax.jit(model.rollout, static_argnums=0)(linker, params, FACTS, batch).choice)[0]
    gold = np.asarray(batch["gold"])[0]
    assert int(sums.seen) == 3
    assert int(sums.correct) == sum(choice[t] == gold[t] >= 0 for t in (1, 2))


@pytest.mark.parametrize("settings", [{"method": "sl"}, {"baseline": "mean"}, {"margin": 0.0}, {"own_decisions": 1.5}])
def test_impossible_learning_is_refused(settings) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Learning(**settings)
