"""A file read into a tree of the reader's own, matched by path."""

import re
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import compressx as cx
from compressx.tree import paths


def trees() -> dict[str, Any]:
    class Deep(nnx.Module):
        def __init__(self, n: int):
            self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(n)])
            self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))

    leaf = lambda seed: jax.random.normal(jax.random.key(seed), (4, 4))
    return {
        "nnx": nnx.state(Deep(12)),
        "equinox": eqx.nn.MLP(4, 4, 4, 11, key=jax.random.key(0)),
        "list": [leaf(i) for i in range(14)],
        "frozen": FrozenDict({"params": {"a/b": leaf(0), "a": {"value": leaf(1)}}}),
        "numbers": {"layers": {i: {"kernel": leaf(i)} for i in range(12)}},
    }


TREES = ("nnx", "equinox", "list", "frozen", "numbers")


@pytest.mark.parametrize("name", TREES)
def test_every_tree_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    tree = trees()[name]
    arrays = eqx.filter(tree, lambda x: eqx.is_array(x) and not jnp.issubdtype(x.dtype, jax.dtypes.extended))
    matrix = [p for p, x in zip(paths(arrays), jax.tree.leaves(arrays), strict=True) if x.ndim == 2]
    rules = [("|".join(map(re.escape, matrix)), cx.unstructured(0.5) & cx.quantize(4))]
    hard = cx.harden(arrays, rules, fresh=True)
    cx.save_model(tmp_path / "m", hard, rules)
    back = cx.load_model(tmp_path / "m", like=tree)
    assert jax.tree.structure(back.params) == jax.tree.structure(tree)
    cx.check(back, back.rules)
    wanted = dict(zip(paths(hard.params), jax.tree.leaves(hard.params), strict=True))
    for path, x in zip(paths(back.params), jax.tree.leaves(back.params), strict=True):
        if path in wanted:
            np.testing.assert_array_equal(x, wanted[path])
        else:  # a function, or a key of random numbers: the reader's own
            assert any(x is own for own in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("like", "text"),
    [
        ({"a": jnp.ones(3)}, "absent none, beyond it b"),
        ({"a": jnp.ones(3), "b": jnp.ones(2), "c": jnp.ones(1)}, "absent c, beyond it none"),
        ({"a": jnp.ones(3), "b": jnp.ones(3)}, r"b is float32 \[2\] in the file, float32 \[3\] in the tree"),
        ({"a": jnp.ones(3), "b": jnp.ones(2, jnp.bfloat16)}, r"b is float32 \[2\] in the file, bfloat16 \[2\] in"),
    ],
)
def test_what_does_not_fit_is_named(like: Any, text: str, tmp_path: Path) -> None:
    cx.save_model(tmp_path / "m", {"a": jnp.ones(3), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=text):
        cx.load_model(tmp_path / "m", like=like)
