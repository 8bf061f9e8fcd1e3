"""The GRU against NumPy loops, flax's cell and autodiff through a plain loop; streaming; the paper's count."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import rules
from compressx.tree import paths
from experiments.common import models
from experiments.common.models import gru


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def _loop(params, x, reset):
    """The module's formulas, a sequence and a step after the other, in float64."""
    out = np.asarray(x, np.float64)
    for name in sorted(k for k in params if k.startswith("gru")):
        p = {k: np.asarray(v, np.float64) for k, v in params[name].items()}
        states = np.zeros((*out.shape[:2], p["uz"].shape[0]))
        for n in range(out.shape[0]):
            h = np.zeros(p["uz"].shape[0])
            for t in range(out.shape[1]):
                z = _sigmoid(out[n, t] @ p["wz"] + h @ p["uz"] + p["bz"])
                r = _sigmoid(out[n, t] @ p["wr"] + h @ p["ur"] + p["br"])
                if reset == "before":
                    c = np.tanh(out[n, t] @ p["wh"] + (r * h) @ p["uh"] + p["bh"])
                else:
                    c = np.tanh(out[n, t] @ p["wh"] + r * (h @ p["uh"] + p["bu"]) + p["bh"])
                h = states[n, t] = z * h + (1 - z) * c
        out = states
    return out @ np.asarray(params["output"]["kernel"], np.float64) + np.asarray(params["output"]["bias"], np.float64)


def _made(reset, rng, **more):
    model = models.build("gru", classes=5, hidden=6, layers=2, reset=reset, **more)
    x = jnp.asarray(rng.normal(size=(3, 7, 4)), jnp.float32)
    variables = model.init(jax.random.key(0), x[:1])
    filled = jax.tree.map(lambda w: w + jnp.asarray(rng.normal(size=w.shape) * 0.3, jnp.float32), variables)
    return model, filled, x


@pytest.mark.parametrize("reset", ["before", "after"])
def test_it_is_the_formulas(reset, rng) -> None:
    model, variables, x = _made(reset, rng)
    np.testing.assert_allclose(model.apply(variables, x), _loop(variables["params"], x, reset), atol=2e-5)


def test_reset_after_is_flax_cell(rng) -> None:
    model, variables, x = _made("after", rng)
    p = variables["params"]["gru_0"]
    cell = nn.GRUCell(features=6)
    theirs = {f"i{n}": {"kernel": p[f"w{g}"], "bias": p[f"b{g}"]} for n, g in (("r", "r"), ("z", "z"), ("n", "h"))}
    theirs |= {f"h{n}": {"kernel": p[f"u{g}"]} for n, g in (("r", "r"), ("z", "z"), ("n", "h"))}
    theirs["hn"]["bias"] = p["bu"]
    want = nn.RNN(cell).apply({"params": {"cell": theirs}}, x)
    layer = gru.GRULayer(6, "after")
    ones = jnp.ones((3, 6))
    have = layer.apply({"params": p}, jnp.swapaxes(x, 0, 1), jnp.zeros((3, 6)), ones)
    np.testing.assert_allclose(jnp.swapaxes(have, 0, 1), want, atol=1e-5)


@pytest.mark.parametrize("reset", ["before", "after"])
def test_the_gradient_is_that_of_a_plain_loop(reset, rng) -> None:
    t, n, m = 5, 2, 4
    shapes = [(t, n, 3 * m), (n, m), *([(m, 2 * m), (m, m)] if reset == "before" else [(m, 3 * m), (m,)])]
    args = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    mask = jnp.asarray(rng.integers(0, 2, (n, m)) / 0.5, jnp.float32)
    weight = jnp.asarray(rng.normal(size=(t, n, m)), jnp.float32)
    ours, plain = (
        (gru.reset_before, gru._before) if reset == "before" else (gru.reset_after, gru._after)
    )
    have = jax.jit(jax.grad(lambda *a: jnp.sum(ours(*a, mask) * weight), argnums=(0, 1, 2, 3)))(*args)
    want = jax.jit(jax.grad(lambda *a: jnp.sum(plain(*a, mask)[0] * weight), argnums=(0, 1, 2, 3)))(*args)
    for a, b in zip(have, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_pieces_with_carried_state_are_the_whole(rng) -> None:
    model, variables, x = _made("before", rng)
    want = model.apply(variables, x)
    state = model.start(3)
    parts = []
    for a, b in ((0, 1), (1, 4), (4, 7)):
        logits, state = model.apply(variables, x[:, a:b], state, method="stream")
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), want, atol=1e-6)


def test_what_comes_later_changes_nothing_before(rng) -> None:
    model, variables, x = _made("before", rng)
    a, b = (model.apply(variables, y) for y in (x, x.at[:, 5:].set(9.0)))
    np.testing.assert_array_equal(a[:, :5], b[:, :5])
    assert not np.allclose(a[:, 5:], b[:, 5:])


def test_dropout_drops_the_same_units_over_a_sequence(rng) -> None:
    model, variables, x = _made("before", rng, dropout=0.5)
    a, b, c = (model.apply(variables, x, train=True, rngs={"dropout": jax.random.key(k)}) for k in (1, 1, 2))
    np.testing.assert_array_equal(a, b)
    assert not np.allclose(a, c)
    ones = jnp.ones((3, 6))
    h = gru.GRULayer(6).apply(
        {"params": variables["params"]["gru_0"]}, jnp.swapaxes(x, 0, 1), jnp.zeros((3, 6)), ones.at[:, 2].set(0.0)
    )
    assert np.all(np.asarray(h)[:, :, 2] == 0)  # a dropped unit's candidate is 0 at every step
    assert np.all(np.asarray(h)[1:, :, 3] != 0)


def test_the_papers_twelve_matrices() -> None:
    model = models.build("gru", classes=48)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 1, 39))))
    bound = rules.resolve(((gru.MATRICES, _any()),), shapes)
    sizes = {p: leaf.size for p, leaf in zip(paths(shapes), jax.tree.leaves(shapes), strict=True)}
    counted = {p: sizes[p] for b in bound for p in b.paths}
    assert len(counted) == 12
    assert sum(counted.values()) == 9_556_992
    assert sorted(set(counted.values())) == [39 * 1024, 1024 * 1024]


def _any():
    from compressx import constraints

    return constraints.from_spec({"kind": "unstructured", "density": 0.5})


@pytest.mark.parametrize(
    ("options", "words"), [({"reset": "never"}, "reset"), ({"hidden": 0}, "hidden=0"), ({"dropout": 1.0}, "dropout")]
)
def test_impossible_options(options, words) -> None:
    model = models.build("gru", classes=3, **options)
    with pytest.raises(ValueError, match=words):
        model.init(jax.random.key(0), jnp.zeros((1, 1, 4)))
