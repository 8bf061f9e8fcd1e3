"""Distillation inside the active sets: what moves, what does not, and that it helps."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx.reconstruction import distill
from experiments.common.models.layers import BatchNorm


class Net(nn.Module):
    """Two layers with a batch normalisation between them."""

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.relu(BatchNorm()(nn.Dense(6, name="one")(x)))
        return nn.Dense(6, name="two")(x)


RULES = [("params/.*/kernel", cx.unstructured(0.4))]


def test_it_stays_in_the_sets_and_comes_nearer() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 6)), jnp.float32)
    v = Net().init(jax.random.key(0), x)
    hard = cx.harden(v, RULES, fresh=True)
    for loss in ("divergence", "squares"):
        done, about = distill(Net(), v, hard, RULES, [x[:32], x[32:]], steps=30, lr=0.01, loss=loss)
        assert about.after < 0.8 * about.before and about.trained == 6
        cx.check(done, RULES)
        kernel, before = (w.params["params"]["one"]["kernel"] for w in (done, hard))
        np.testing.assert_array_equal(kernel != 0, before != 0)
        jax.tree.map(np.testing.assert_array_equal, done.params["batch_stats"], hard.params["batch_stats"])
    again, _ = distill(Net(), v, hard, RULES, [x[:32], x[32:]], steps=30, lr=0.01, loss="squares")
    jax.tree.map(np.testing.assert_array_equal, done, again)
    seen: list[Any] = []

    def augment(key: Any, x: Any) -> Any:
        seen.append(key)
        return -x

    distill(Net(), v, hard, RULES, [x], steps=2, augment=augment)
    assert len(seen) == 2


def test_bad_arguments_are_named() -> None:
    network, v = lambda v, x: x @ v["w"], {"w": jnp.ones((2, 2))}
    rules = [("w", cx.unstructured(0.5))]
    hard = cx.harden(v, rules, fresh=True)
    for more, text in (({"loss": "no"}, "loss must be one of"), ({"steps": 0}, "steps=0"), ({}, "no batch")):
        with pytest.raises(ValueError, match=text):
            distill(network, v, hard, rules, [], **more)
