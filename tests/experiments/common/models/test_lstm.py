"""The LSTM against NumPy and flax's cell; its gradient against the plain recurrence's; carried state; counts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.constraints import block_max, darb
from experiments.common import models
from experiments.common.models.lstm import LanguageModel, lstm, lstm_reference

T, B, H, IN = 5, 3, 4, 6


@pytest.fixture
def problem(rng):
    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(np.float32))

    return draw(T, B, 4 * H), draw(H, 4 * H) * 0.5, (draw(B, H), draw(B, H))


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))


def _by_hand(x, u, h, c):
    out = []
    for t in range(len(x)):
        a = x[t] + h @ u
        i, f, g, o = a[:, :H], a[:, H : 2 * H], a[:, 2 * H : 3 * H], a[:, 3 * H :]
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(g)
        h = _sigmoid(o) * np.tanh(c)
        out.append(h)
    return np.stack(out), h, c


def test_the_recurrence_is_the_one_written_by_hand(problem) -> None:
    x, u, carry = problem
    y, (h, c) = jax.jit(lstm)(x, u, carry)
    want = _by_hand(*(np.asarray(a, np.float64) for a in (x, u, *carry)))
    for ours, theirs in zip((y, h, c), want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_the_gradient_is_that_of_the_plain_recurrence(problem) -> None:
    x, u, carry = problem
    weight = jnp.cos(jnp.arange(T * B * H, dtype=jnp.float32)).reshape(T, B, H)

    def of(function):
        def loss(x, u, carry):
            y, (h, c) = function(x, u, carry)
            return jnp.sum(y * weight) + jnp.sum(jnp.sin(h)) + jnp.sum(c * c)

        return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, u, carry)

    for ours, theirs in zip(jax.tree.leaves(of(lstm)), jax.tree.leaves(of(lstm_reference)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


def test_a_layer_is_flaxs_cell(rng) -> None:
    """Flax keeps a matrix for each gate; joined in our order they give the same output."""
    x = jnp.asarray(rng.normal(size=(B, T, IN)).astype(np.float32))
    net = LanguageModel(classes=7, hidden=H, embedding=IN, layers=1)
    params = jax.jit(net.init)(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]["lstm_0"]
    w, u, b = params["input"]["kernel"], params["recurrent"]["kernel"], params["bias"]
    cell = nn.OptimizedLSTMCell(H)
    names = ("i", "f", "g", "o")
    theirs = {f"i{n}": {"kernel": w[:, k * H : (k + 1) * H]} for k, n in enumerate(names)}
    theirs |= {
        f"h{n}": {"kernel": u[:, k * H : (k + 1) * H], "bias": b[k * H : (k + 1) * H]} for k, n in enumerate(names)
    }
    want = nn.RNN(cell).apply({"params": {"cell": theirs}}, x)
    zeros = jnp.zeros((B, H), jnp.float32)
    y, _ = lstm(x.transpose(1, 0, 2) @ w + b[None, None], u, (zeros, zeros))
    np.testing.assert_allclose(y.transpose(1, 0, 2), want, rtol=2e-5, atol=2e-6)


def test_a_text_read_in_pieces_is_the_text_read_at_once() -> None:
    net = models.build("lstm_lm", classes=11, hidden=H)
    words = jax.random.randint(jax.random.key(0), (2, 8), 0, 11)
    variables = net.init(jax.random.key(1), words)
    whole, end = net.apply(variables, words)
    first, carry = net.apply(variables, words[:, :3])
    second, last = net.apply(variables, words[:, 3:], carry)
    np.testing.assert_allclose(jnp.concatenate([first, second], 1), whole, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(end), jax.tree.leaves(last), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    # a word sees what is before it and nothing after
    changed, _ = net.apply(variables, words.at[:, 5].add(1) % 11)
    assert bool((changed[:, :5] == whole[:, :5]).all())
    assert not bool((changed[:, 5] == whole[:, 5]).any())


def test_dropout_is_drawn_in_training_alone_and_off_the_recurrence() -> None:
    net = LanguageModel(classes=7, hidden=H, dropout=0.5)
    words = jnp.zeros((2, 3), jnp.int32)
    variables = net.init(jax.random.key(0), words)
    still, _ = net.apply(variables, words)
    a, b, again = (net.apply(variables, words, None, True, rngs={"dropout": jax.random.key(k)})[0] for k in (1, 2, 1))
    assert bool((a == again).all()) and not bool((a == b).all()) and not bool((a == still).all())
    # with every input dropped and no bias, nothing but the recurrence could carry h on: the state stays exactly its own
    kept = LanguageModel(classes=7, hidden=H, dropout=0.999)
    one = jnp.ones((2, H), jnp.float32)
    carry = ((one, one), (one, one))
    x, u = jnp.zeros((3, 2, 4 * H), jnp.float32), variables["params"]["lstm_0"]["recurrent"]["kernel"]
    bias = variables["params"]["lstm_0"]["bias"]
    _, end = kept.apply(variables, words, carry, True, rngs={"dropout": jax.random.key(3)})
    _, want = lstm(x + bias[None, None], u, carry[0])
    np.testing.assert_allclose(end[0][0], want[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("hidden", "matrices"), [(1500, 36_000_000), (200, 640_000)])
def test_the_published_sizes(hidden, matrices) -> None:
    net = models.build("lstm_lm", classes=10_000, hidden=hidden)
    shapes = jax.eval_shape(net.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    kernels = [shapes[f"lstm_{i}"][k]["kernel"] for i in (0, 1) for k in ("input", "recurrent")]
    assert sum(k.size for k in kernels) == matrices
    assert all(k.shape == (hidden, 4 * hidden) for k in kernels)  # a row: what an input sends to all four gates
    assert shapes["softmax"]["kernel"].size == shapes["embedding"]["embedding"].size == 10_000 * hidden


def test_rows_join_the_gates_as_the_constraints_do(rng) -> None:
    """One leaf `[in, 4H]` is cut like four leaves of one gate each under scope="rule"."""
    w = jnp.asarray(rng.normal(size=(IN, 4 * H)).astype(np.float32))
    leaves = tuple(w[:, k * H : (k + 1) * H] for k in range(4))
    for joined, apart in (
        (block_max(3), block_max(3, scope="rule")),
        (darb(0.3, allowed=(1, 2, 4, 8)), darb(0.3, allowed=(1, 2, 4, 8), scope="rule")),
    ):
        z = joined.project(w, joined.init(w))
        parts = apart.project(leaves, apart.init(leaves))
        assert bool((jnp.concatenate(parts, axis=1) == z).all())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"hidden": 0}, "hidden=0 is impossible"),
        ({"layers": 0}, "layers=0 is impossible"),
        ({"dropout": 1.0}, r"dropout=1.0 is impossible; it must be in \[0, 1\)"),
        ({"scale": 0.0}, "scale=0.0 is impossible"),
        ({"depth": 2}, "no option depth; its options are dropout, embedding, hidden, layers, scale"),
    ],
)
def test_impossible_options_are_named(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        models.build("lstm_lm", classes=5, **options)
