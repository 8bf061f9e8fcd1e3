"""The lines of README on the trees of five libraries: equal leaves, gradients and state give equal bits in each."""

import functools
import re
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze

import compressx as cx
from compressx.tree import paths

LAYERS = 11  # more than ten: names of numbers sort otherwise than numbers
WEIGHTS = [np.asarray(jax.random.normal(jax.random.key(i), (4, 4)), np.float32) for i in range(LAYERS)]
GRADIENTS = [np.asarray(jax.random.normal(jax.random.key(100 + i), (4, 4)), np.float32) for i in range(LAYERS)]


class Layer(eqx.Module):
    """A module with a function among its leaves."""

    weight: Any
    activation: Callable[..., Any] = jax.nn.relu


def _nnx(leaves: list[Any]) -> Any:
    class Net(nnx.Module):
        def __init__(self) -> None:
            self.layers = nnx.List([nnx.Param(jnp.asarray(w)) for w in leaves])

    return nnx.state(Net())


TREES: dict[str, Callable[[list[Any]], Any]] = {
    "list": lambda leaves: [jnp.asarray(w) for w in leaves],
    "dict": lambda leaves: {f"w{i:02}": jnp.asarray(w) for i, w in enumerate(leaves)},
    "linen": lambda leaves: {"params": {f"Dense_{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(leaves)}},
    "frozen": lambda leaves: freeze({f"Dense_{i}": {"kernel": jnp.asarray(w)} for i, w in enumerate(leaves)}),
    "haiku": lambda leaves: {f"net/~/linear_{i}": {"w": jnp.asarray(w)} for i, w in enumerate(leaves)},
    "nnx": _nnx,
    "equinox": lambda leaves: [Layer(jnp.asarray(w)) for w in leaves],
    "integers": lambda leaves: {i: (jnp.asarray(w),) for i, w in enumerate(leaves)},
}


SETS = [cx.unstructured(0.5) & cx.quantize(4), cx.polarize(fragment=2), cx.bsp(0.5, 0.5)]


def _numbers(tree: Any) -> list[int]:
    """The layer that each array's name speaks of."""
    found = [n for n, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True) if hasattr(leaf, "dtype")]
    return [int(re.findall(r"\d+", n)[0]) for n in found]


def _in_order(tree: Any) -> list[np.ndarray]:
    """The leaves by the number of their layer, whatever order the tree has."""
    arrays = [np.asarray(leaf) for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype")]
    return [a for _, a in sorted(zip(_numbers(tree), arrays, strict=True), key=lambda pair: pair[0])]


def _flow(tree: Any, gradients: Any, constraint: cx.Constraint) -> list[list[np.ndarray]]:
    rules = [(".*(w|weight|kernel|[0-9])", constraint)]
    trained = eqx.filter(tree, eqx.is_array)
    tx = optax.chain(cx.admm(rules, rho=0.1, every=1), optax.adam(1e-2))
    state, update = tx.init(trained), jax.jit(tx.update)
    for _ in range(2):
        updates, state = update(gradients, state, trained)
        trained = optax.apply_updates(trained, updates)
    hard = cx.harden(trained, rules, state)
    tx = optax.chain(optax.adam(1e-2), cx.retrain(rules, hard))
    updates, state = tx.update(gradients, tx.init(hard.params), hard.params)
    done = cx.retract(optax.apply_updates(hard.params, updates), rules, state)
    cx.check(done, rules)
    return [_in_order(t) for t in (trained, hard.params, done.params)]


@functools.cache
def _in_a_list(number: int) -> list[list[np.ndarray]]:
    return _flow(TREES["list"](WEIGHTS), TREES["list"](GRADIENTS), SETS[number])


QUICK = ("nnx", "equinox")


@pytest.mark.parametrize("number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in TREES])
def test_admm_hardening_and_retraining_give_the_same_bits_in_every_tree(name: str, number: int) -> None:
    gradients = eqx.filter(TREES[name](GRADIENTS), eqx.is_array)
    found = _flow(TREES[name](WEIGHTS), gradients, SETS[number])
    assert [len(x) for x in found] == [LAYERS] * 3
    for a, b in zip(sum(found, []), sum(_in_a_list(number), []), strict=True):
        np.testing.assert_array_equal(a, b)
