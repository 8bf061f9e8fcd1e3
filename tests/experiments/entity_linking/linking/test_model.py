"""The linker against its slow reference, its scan against all mentions together, padding, buffers, leaks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.entity_linking.linking import belief, model
from experiments.entity_linking.linking.model import Linker
from tests.experiments.entity_linking.linking import reference, toy
from tests.thinning import some

KNOWN = toy.knowledge()
FACTS = model.facts_of(KNOWN)
DOCUMENTS = [toy.document(1, 5, KNOWN), toy.document(2, 3, KNOWN), toy.document(3, 1, KNOWN), toy.document(4, 6, KNOWN)]
ROWS = [[DOCUMENTS[0], DOCUMENTS[1]], [DOCUMENTS[3], DOCUMENTS[2]]]
WHOLE = toy.batch(ROWS, 9)
BATCH = {k: x for k, x in WHOLE.items() if k not in ("gold", "scored")}  # what a decision may see
PLACES = [(0, 0, 0), (0, 5, 1), (1, 0, 3), (1, 6, 2)]  # row, first slot, document
SMALL = {"hidden": 7, "dropout": 0.0, "channels": 3}
ROLL, PATH = (jax.jit(f, static_argnums=0) for f in (model.rollout, model.path_scores))

LINKERS = {
    "soft_hard": Linker(keep_tokens=3, keep_entities=2, keep_words=4, **SMALL),
    "mean": Linker(attention="mean", keep_soft=3, **SMALL),
    "soft": Linker(attention="soft", **SMALL),  # its 100 are more than there are: everything is kept
    "one_hop": Linker(features=("local", "prior", "entities", "types"), **SMALL),
    "cnn": Linker(local="cnn", keep_entities=2, features=("words", "local"), **SMALL),
    "local_only": Linker(features=("prior", "local"), keep_tokens=2, **SMALL),
}


def _slow(linker, params, decisions=None):
    """Reference results by document."""
    p = jax.tree.map(lambda w: np.asarray(w, float), params["params"])
    return [
        reference.link(linker, p, toy.tables(KNOWN), d, None if decisions is None else decisions[i])
        for i, d in enumerate(DOCUMENTS)
    ]


def _compare(scores, slow):
    for row, start, number in PLACES:
        for t, want in enumerate(slow[number][1]):
            np.testing.assert_allclose(scores[row, start + t, : len(want)], want, rtol=2e-4, atol=2e-5)
            assert (scores[row, start + t, len(want) :] == model.LOW).all()


@pytest.mark.parametrize("name", some(("soft_hard", "cnn", "one_hop"), LINKERS))
def test_scan_and_path_equal_the_reference(name) -> None:
    linker = LINKERS[name]
    params = toy.weights(linker, KNOWN)
    found = ROLL(linker, params, FACTS, BATCH)
    slow = _slow(linker, params)
    _compare(np.asarray(found.scores), slow)
    for row, start, number in PLACES:
        assert found.choice[row, start : start + len(DOCUMENTS[number])].tolist() == slow[number][0]

    rng = np.random.default_rng(5)
    decisions = [[int(rng.integers(0, len(m["candidates"]))) if m["candidates"] else -1 for m in d] for d in DOCUMENTS]
    given = np.full(BATCH["document"].shape, -1, np.int32)
    for row, start, number in PLACES:
        given[row, start : start + len(decisions[number])] = decisions[number]
    chosen = PATH(linker, params, FACTS, BATCH, jnp.asarray(given))
    _compare(np.asarray(chosen.scores), _slow(linker, params, decisions))
    same = PATH(linker, params, FACTS, BATCH, found.choice).scores
    np.testing.assert_allclose(same, found.scores, rtol=1e-5, atol=1e-6)


def test_context_holds_every_choice_once_and_grows_by_at_most_one_entity_and_its_inlinks() -> None:
    linker = LINKERS["soft"]
    params = toy.weights(linker, KNOWN)
    first = jnp.where(BATCH["mask"][..., 0], 0, -1).astype(jnp.int32)
    path = PATH(linker, params, FACTS, BATCH, first)
    slow = _slow(linker, params, [[0 if m["candidates"] else -1 for m in d] for d in DOCUMENTS])
    most = KNOWN.inlinks.shape[1]
    for row, start, number in PLACES:
        for t, (entities, words) in enumerate(slow[number][2]):
            if DOCUMENTS[number][t]["candidates"]:
                assert (path.contexts["entities"].weight[row, start + t] > 0).sum() == entities <= 1 + t
                assert (path.contexts["words"].weight[row, start + t] > 0).sum() == words <= 1 + most * t


def test_padding_and_neighbours_in_a_row_change_nothing() -> None:
    linker = LINKERS["soft_hard"]
    params = toy.weights(linker, KNOWN)
    packed = ROLL(linker, params, FACTS, BATCH)
    width = max(len(m["candidates"]) for m in DOCUMENTS[0])
    alone = toy.batch([[DOCUMENTS[0]]], 5, most=width, context=max(len(m["context"]) for m in DOCUMENTS[0]))
    found = ROLL(linker, params, FACTS, {k: x for k, x in alone.items() if k in BATCH})
    np.testing.assert_array_equal(found.choice[0], packed.choice[0, :5])
    np.testing.assert_allclose(found.scores[0], packed.scores[0, :5, :width], rtol=1e-5, atol=1e-6)


def test_candidates_in_another_order_get_the_same_scores() -> None:
    linker = LINKERS["soft_hard"]
    params = toy.weights(linker, KNOWN)
    order = np.random.default_rng(0).permutation(4)
    moved = {k: x[..., order] if k in ("candidates", "mask", "log_prior") else x for k, x in BATCH.items()}
    a, b = (ROLL(linker, params, FACTS, x) for x in (BATCH, moved))
    np.testing.assert_allclose(np.asarray(a.scores)[..., order], b.scores, rtol=1e-5, atol=1e-6)
    chosen = [np.asarray(model._chosen(x["candidates"], y.choice)) for x, y in ((BATCH, a), (moved, b))]
    np.testing.assert_array_equal(*chosen)


def test_inference_touches_every_mention_once_and_reads_no_gold() -> None:
    linker = LINKERS["soft_hard"]
    params, asked = toy.weights(linker, KNOWN), []

    def pick(scores, slot):
        asked.append(slot)
        return model.argmax(scores, slot)

    assert not {"gold", "scored"} & set(BATCH)
    program = jax.make_jaxpr(lambda p, b: model.rollout(linker, p, FACTS, b, pick))(params, BATCH)
    scans = [e for e in program.jaxpr.eqns if e.primitive.name in ("scan", "while")]
    assert [e.params["length"] for e in scans] == [9]
    assert len(asked) == 1  # traced once: in the body of that scan


def test_belief_propagation_equals_the_reference() -> None:
    linker = Linker(features=("belief", "prior", "types"), iterations=3, keep_tokens=3, **SMALL)
    params = toy.weights(linker, KNOWN)
    p = jax.tree.map(lambda w: np.asarray(w, float), params["params"])
    scores = np.asarray(jax.jit(lambda p, b: belief.global_scores(linker, p, FACTS, b))(params, BATCH))
    _compare(scores, [(None, reference.belief(linker, p, toy.tables(KNOWN), d)) for d in DOCUMENTS])


def test_vectors_as_facts_and_as_weights_are_the_same_linker() -> None:
    linker = LINKERS["local_only"]
    params = toy.weights(linker, KNOWN)
    light = {"params": {k: v for k, v in params["params"].items() if k != "vectors"}}
    a = ROLL(linker, params, FACTS, BATCH).scores
    b = ROLL(linker, light, model.facts_of(KNOWN, vectors=True), BATCH).scores
    np.testing.assert_array_equal(a, b)
    names = set(model.init(linker, KNOWN, jax.random.key(0), vectors=False)["params"])
    assert names == {"hidden", "out", "local"}


@pytest.mark.parametrize(("train", "moved"), [(False, False), (True, True)])
def test_the_loss_moves_vectors_only_where_asked(train, moved) -> None:
    linker = Linker(features=("entities", "prior"), train_vectors=train, **SMALL)
    params = toy.weights(linker, KNOWN)

    def loss(p):
        scores = model.path_scores(linker, p, FACTS, BATCH, WHOLE["gold"]).scores
        return jnp.sum(jnp.where(BATCH["mask"], scores, 0.0) ** 2)

    gradient = jax.jit(jax.grad(loss))(params)["params"]
    assert bool(jnp.any(gradient["vectors"]["entities"] != 0)) == moved
    assert bool(jnp.any(gradient["entities"]["attend"] != 0))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"features": ("prior", "prior")}, "features=.* each once"),
        ({"features": ("belief", "words")}, "decides all mentions together"),
        ({"attention": "hard"}, "attention='hard' .* soft_hard"),
        ({"keep_words": 0}, "keep_words=0"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
    ],
)
def test_impossible_linkers_are_refused(settings, words) -> None:
    with pytest.raises(ValueError, match=words):
        Linker(**settings)
