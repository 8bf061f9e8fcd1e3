"""The step that is timed is the language model's own, from whatever format a network is stored in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import formats, kernels
from compressx.constraints import block_max, columns
from compressx.tree import paths
from experiments.common import latency
from experiments.common.models.lstm import LanguageModel
from tests.thinning import some

MODEL = LanguageModel(classes=24, hidden=16, embedding=8, layers=2, scale=0.5)


def _stored(name):
    """A network pruned to what the format holds, its leaves packed by path, and the same weights with their zeros."""
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    packed, plain = {}, {}
    for path, w in zip(paths(variables), jax.tree.leaves(variables), strict=True):
        held = "kernel" in path
        constraint = columns(0.5) if name == "bspc" else block_max(4)
        z = constraint.project(w, constraint.init(w)) if held else w
        packed[path] = formats.pack(z, format=name if held else "dense")
        plain[path.removeprefix("params/")] = np.asarray(z, np.float64)
    return variables, packed, plain


def _by_loops(plain, words):
    """Logits of a text, in NumPy."""

    def sigmoid(v):
        return 1 / (1 + np.exp(-v))

    state = [(np.zeros(16), np.zeros(16)) for _ in range(2)]
    out = []
    for word in words:
        x = plain["embedding/embedding"][word]
        for k, (h, c) in enumerate(state):
            a = x @ plain[f"lstm_{k}/input/kernel"] + h @ plain[f"lstm_{k}/recurrent/kernel"] + plain[f"lstm_{k}/bias"]
            i, f, g, o = a.reshape(4, 16)
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            x = sigmoid(o) * np.tanh(c)
            state[k] = x, c
        out.append(x @ plain["softmax/kernel"] + plain["softmax/bias"])
    return np.stack(out)


@pytest.mark.parametrize("name", some(["block-max"], ["block-max", "bspc", "csr"]))
def test_a_packed_step_is_the_network(name) -> None:
    _, packed, plain = _stored(name)
    step, carry = latency.packed_step(packed, 2), MODEL.begin(1)
    words, found = [3, 0, 23, 3, 7], []
    for word in words:
        logits, carry = step(jnp.int32(word), carry)
        found.append(np.asarray(logits))
    np.testing.assert_allclose(np.stack(found), _by_loops(plain, words), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not kernels.recurrent.available(), reason="needs a compiler")
def test_dense_is_the_faster_of_two_and_every_network_is_measured() -> None:
    variables, packed, _ = _stored("block-max")
    times, facts = latency.of_words(MODEL, variables, {"a": packed, "b": packed}, budget=0)
    assert set(times) == {"dense", "a", "b"} and facts["path"].startswith("native/") and facts["rounds"] == 5
    assert times["dense"] == min(facts[f"dense_{way}_ms"]["median"] for way in ("xla", "kernels")) > 0
    for name in ("a", "b"):
        assert 0 < facts[f"{name}_ms"]["low"] <= times[name] <= facts[f"{name}_ms"]["high"]


def test_the_fallback_is_not_timed(monkeypatch) -> None:
    monkeypatch.setattr(kernels.recurrent, "available", lambda: False)
    times, facts = latency.of_words(MODEL, None, {})
    assert times is None and "do not run here" in facts["reason"]


def test_a_layer_of_vggs_size_is_timed_dense_and_compressed(monkeypatch) -> None:
    if kernels.available():
        found = latency.of_layer(budget=0.0)
        assert found["dense"] > 0 and found["compressed"] > 0
    monkeypatch.setattr(kernels, "available", lambda: False)
    assert "do not run here" in latency.of_layer()["reason"]
