"""Rules bind constraints to leaves by path, on any kind of tree, and say what is wrong."""

from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import compressx as cx
from compressx.rules import table
from compressx.tree import check_finite, paths


def tree() -> dict[str, Any]:
    return {"a": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}, "b": {"kernel": jnp.ones((6, 2))}}


def test_first_match_wins_and_none_leaves_free() -> None:
    half, tenth = cx.unstructured(0.5), cx.unstructured(0.1)
    bound = cx.resolve([("a/kernel", half), (".*/bias", None), (".*", tenth)], tree())
    assert {b.name: b.constraint for b in bound} == {"a/kernel": half, "b/kernel": tenth}


def test_a_rule_that_matches_nothing_lists_the_paths() -> None:
    with pytest.raises(ValueError, match=r"(?s)rule 1: 'c/kernel' matches nothing.*a/bias\n  a/kernel\n  b/kernel"):
        cx.resolve([(".*", None), ("c/kernel", cx.unstructured(0.5))], tree())


def test_a_rule_whose_leaves_are_all_taken_says_by_which() -> None:
    with pytest.raises(ValueError, match=r"only leaves that earlier rules took \('\.\*'\)"):
        cx.resolve([(".*", cx.unstructured(0.5)), ("a/kernel", cx.unstructured(0.1))], tree())


def test_patterns_match_the_whole_path() -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        cx.resolve([("kernel", cx.unstructured(0.5))], tree())


def test_a_bad_pattern_is_named() -> None:
    with pytest.raises(ValueError, match=r"'\*' is not a regular expression"):
        cx.resolve([("*", cx.unstructured(0.5))], tree())


def test_a_constraint_that_does_not_fit_names_leaf_shape_and_reason() -> None:
    with pytest.raises(ValueError, match=r"a/bias \(6,\): filters.* does not fit: .*at least 2 axes"):
        cx.resolve([("a/bias", cx.filters(0.5))], tree())


def test_integer_leaves_are_refused() -> None:
    with pytest.raises(ValueError, match="n: only floating-point leaves"):
        cx.resolve([("n", cx.unstructured(0.5))], {"n": jnp.ones(3, jnp.int32)})


def test_not_a_number_names_the_leaf() -> None:
    bad = tree()
    bad["a"]["bias"] = bad["a"]["bias"].at[2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"a/bias \(6,\): 1 weight values are NaN or infinite"):
        check_finite(bad)
    cx.harden(bad, [("a/kernel", cx.unstructured(0.5))])  # a leaf without a rule may be a mask with infinities
    bad["a"]["kernel"] = bad["a"]["kernel"].at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="a/kernel .*: 1 weight values are NaN"):
        cx.harden(bad, [("a/kernel", cx.unstructured(0.5))])


def test_table_has_a_row_for_every_leaf() -> None:
    rows = table(cx.resolve([(".*kernel", cx.unstructured(0.5, scope="rule"))], tree()), tree())
    assert [r["path"] for r in rows] == ["a/bias", "a/kernel", "b/kernel"]
    assert [r["constraint"] is None for r in rows] == [True, False, False]


@jax.tree_util.register_dataclass
@dataclass
class Layer:  # what an Equinox module is to jax: a registered dataclass
    weight: jax.Array
    bias: jax.Array


@jax.tree_util.register_dataclass
@dataclass
class Net:
    first: Layer
    second: Layer


def linen() -> Any:
    return nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 4)))


def split() -> Any:
    return nnx.split(nnx.Linear(4, 3, rngs=nnx.Rngs(0)))[1]


TREES: dict[str, tuple[Any, str]] = {
    "linen": (linen, "params/kernel"),
    "nnx.split": (split, "kernel"),
    "dataclass": (
        lambda: Net(Layer(jnp.ones((4, 3)), jnp.ones(3)), Layer(jnp.ones((3, 2)), jnp.ones(2))),
        "first/weight",
    ),
    "dict": (tree, "a/kernel"),
    "haiku": (lambda: {"net/~/linear": {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}}, "net/~/linear/w"),
    "list": (lambda: [jnp.ones((4, 3)), [jnp.ones(3)]], "0"),
    "tuple": (lambda: (jnp.ones(3), jnp.ones((4, 3))), "1"),
}


@pytest.mark.parametrize(("make", "path"), list(TREES.values()), ids=list(TREES))
def test_every_kind_of_tree_trains_under_admm_and_keeps_its_zeros(make: Any, path: str) -> None:
    params = make()
    assert path in paths(params)
    rules = [(path, cx.unstructured(0.5))]
    index = paths(params).index(path)

    @jax.jit
    def step(params: Any, state: Any, tx: Any = None) -> Any:
        gradient = jax.tree.map(lambda w: 0.1 * w + jnp.arange(w.size, dtype=w.dtype).reshape(w.shape) * 1e-2, params)
        updates, state = transform.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    transform = optax.chain(cx.admm(rules, rho=0.1, every=3), optax.sgd(0.1))
    state = transform.init(params)
    for _ in range(7):
        params, state = step(params, state)
    assert int(cx.find_admm_state(state).updates) == 2
    hard = cx.harden(params, rules, fresh=True).params
    size = jax.tree.leaves(hard)[index].size
    assert int(jnp.count_nonzero(jax.tree.leaves(hard)[index])) == size // 2
    transform = optax.chain(optax.sgd(0.1, momentum=0.9), cx.retrain(rules))
    step = jax.jit(step.__wrapped__)
    after, state = step(hard, transform.init(hard))
    np.testing.assert_array_equal(jax.tree.leaves(after)[index] != 0, jax.tree.leaves(hard)[index] != 0)
    assert jax.tree.structure(after) == jax.tree.structure(make())
