"""Padding, buckets, the order of training; the bucketed loss equals the padded one, gradient included."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.common import models
from experiments.common.training import Fit
from experiments.gru_speech.speech import batches, tasks
from experiments.gru_speech.speech.features import FrontEnd
from tests.thinning import some

UNITS = 3
COUNTS = (5, 9, 16, 12)
TOKENS = ([0], [1, 1], [2, 0], [])


def test_frame_labels_are_those_of_the_frames_middle() -> None:
    front = FrontEnd()  # at 8000 Hz: windows of 200, hops of 80; middles at 100, 180, 260, ...
    segments = [(0, 181, "a"), (181, 300, "q"), (340, 500, "b")]
    labels = batches.frame_labels(segments, {"a": 0, "b": 1, "q": -1}, 5, 8_000, front)
    assert labels.tolist() == [0, 0, -1, 1, 1]
    assert labels.dtype == np.int32


@given(st.lists(st.integers(5, 90), min_size=4, max_size=40), st.integers(1, 4), st.integers(1, 5), st.integers(0, 9))
def test_every_epoch_has_like_lengths_and_leaves_out_only_the_rest(frames, batch, buckets, epoch) -> None:
    frames, batch = np.array(frames), min(batch, len(frames))
    sizes = batches.lengths(frames, buckets)
    assert len(sizes) <= buckets
    assert sizes[-1] >= frames.max()
    assert all(s % 8 == 0 for s in sizes)
    order = batches.order(frames, batch, sizes)
    rows = order(7, epoch)
    assert rows.shape == (len(frames) // batch, batch)
    assert len(np.unique(rows)) == rows.size  # nobody twice
    np.testing.assert_array_equal(rows, order(7, epoch))
    home = np.searchsorted(sizes, frames)
    mixed = [row for row in rows if len(np.unique(home[row])) > 1]
    assert len(mixed) <= len(sizes) - 1  # only where what a bucket left over joined the next


@pytest.fixture(scope="module")
def made():
    rng = np.random.default_rng(5)
    features = [rng.normal(size=(n, 4)).astype(np.float32) for n in COUNTS]
    labels = [rng.integers(-1, UNITS, n).astype(np.int32) for n in COUNTS]
    data = batches.pad(features, labels, TOKENS)
    return {k: jnp.asarray(v) for k, v in data.items()}


def test_padding(made) -> None:
    assert made["inputs"].shape == (4, 16, 4)
    assert made["tokens"].tolist() == [[1, 0], [2, 2], [3, 1], [0, 0]]
    assert np.all(np.asarray(made["inputs"][0, 5:]) == 0)
    assert np.all(np.asarray(made["labels"][0, 5:]) == -1)


@pytest.mark.parametrize("kind", some(["ctc"], ["frames", "ctc"]))
def test_bucketed_losses_and_gradients_are_the_padded_ones(made, kind) -> None:
    make, outputs = (tasks.frames, UNITS) if kind == "frames" else (tasks.ctc, UNITS + 1)
    model = models.build("gru", classes=outputs, hidden=5, layers=1, dropout=0.0)
    params = model.init(jax.random.key(0), made["inputs"][:1])
    few = {k: v[jnp.array([0, 1])] for k, v in made.items()}  # at most 9 frames: the second of the lengths 8, 16, 24
    few["inputs"] = jnp.pad(few["inputs"], ((0, 0), (0, 8), (0, 0)), constant_values=7.0)
    few["labels"] = jnp.pad(few["labels"], ((0, 0), (0, 8)), constant_values=-1)
    fit, found = Fit(label_smoothing=0.1 if kind == "frames" else 0.0), []
    for sizes in ((8, 16, 24), (24,)):
        task = make(model.apply, sizes)

        def loss(p, task=task):
            return task.loss(p, {}, few, jax.random.key(1), fit, None)

        value = jax.jit(jax.value_and_grad(loss, has_aux=True))
        scored = jax.jit(task.score)(params, {}, few, jnp.array([True, False]))
        found.append((value(params), scored))
    for a, b in zip(jax.tree.leaves(found[0]), jax.tree.leaves(found[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    (total, (_, sums)), gradient = found[0][0]
    want, plain = jax.jit(jax.value_and_grad(lambda p: _plain(model, p, few, kind, fit)))(params)
    for a, b in zip(jax.tree.leaves(gradient), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(total, want, rtol=1e-5)
    assert int(sums.seen) == (int((few["labels"] >= 0).sum()) if kind == "frames" else 2)


def _plain(model, params, batch, kind, fit):
    """The mean loss without buckets, utterance by utterance."""
    logits = model.apply(params, batch["inputs"])
    if kind == "ctc":
        each = []
        for i in range(len(batch["frames"])):
            t, n = COUNTS[i], len(TOKENS[i])
            args = jnp.zeros((1, t)), batch["tokens"][i : i + 1, :n], jnp.zeros((1, n))
            each.append(optax.ctc_loss(logits[i : i + 1, :t], *args)[0])
        return sum(each) / len(each)
    known = batch["labels"] >= 0
    target = optax.smooth_labels(jax.nn.one_hot(jnp.where(known, batch["labels"], 0), UNITS), fit.label_smoothing)
    each = -jnp.sum(target * jax.nn.log_softmax(logits), axis=-1)
    return jnp.sum(jnp.where(known, each, 0.0)) / jnp.sum(known, dtype=jnp.float32)


def test_whole_strings_are_compared() -> None:
    tokens = jnp.array([[1, 2, 0], [1, 1, 0], [1, 2, 0], [0, 0, 0], [1, 2, 2]], jnp.int32)
    batch = {"tokens": tokens, "token_count": jnp.array([2, 2, 2, 0, 3], jnp.int32)}
    paths = [[1, 1, 0, 2, 2], [1, 0, 0, 1, 0], [1, 2, 1, 2, 1], [0, 0, 0, 0, 0], [1, 2, 2, 2, 0]]
    same = tasks._strings_match(jnp.array(paths, jnp.int32), batch)
    assert same.tolist() == [True, True, False, True, False]
