"""Files and names: loading into the user's own tree, leaves named `value`, leaves that are no weights, own models.

Each case is a small input that was wrong, after a need that people have stated in public. It stands for its kind.
"""

from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from tests.cases import api
from tests.cases.support import normal, raised_by

# Loading a file into the user's own tree.
#
# Right: `load_model(path, like=tree)` (or the saved structure) that gives the leaves back in the given tree, matched by
# path, with an error for what does not fit. Integer keys come back as integers, or at least in numeric order, so that
# `nnx.merge(graphdef, loaded.params)` cannot give another network. In 0.1 `'10' < '2'`: from 11 layers on, `nnx.merge`
# and `jax.tree.unflatten` with loaded leaves permute the layers without an error (12 layers: ViT-B, BERT).
# `nnx.replace_by_pure_dict` is right, and no page says so.


class Deep(nnx.Module):
    def __init__(self, n: int):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=nnx.Rngs(i)) for i in range(n)])

    def __call__(self, x):
        for layer in self.layers:
            x = jnp.tanh(layer(x))
        return x


def test_load_into_nnx_12_layers(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    m, x = Deep(12), normal(2, 4)
    y = m(x)
    graph, p = nnx.split(m)
    api.save(path, p)
    back = nnx.merge(graph, api.load(path))
    assert float(jnp.abs(back(x) - y).max()) < 1e-6, "another network: layers come back as 0, 1, 10, 11, 2, ..."


def test_save_joint_12_layers(tmp_path: Path) -> None:
    p = [normal(4, 4, seed=i) for i in range(12)]
    rules = [(".*", api.unstructured(0.5, joint=True) & api.quantize(4))]
    api.save(tmp_path / "r.safetensors", api.harden(p, rules), rules)


# Names.
#
# Right: its name is `attn/value`; only the boxes' own `value` (nnx.Param, nn.Partitioned: an attribute key, not a
# dictionary key) is left out. In 0.1 `.*/(query|key|value)` prunes two of three in silence, and the tree cannot be
# saved.


def test_leaf_named_value() -> None:
    p = {"params": {"attn": {"query": normal(8, 8), "key": normal(8, 8, seed=1), "value": normal(8, 8, seed=2)}}}
    z = api.harden(p, [(r".*/(query|key|value)", api.unstructured(0.5))])["params"]["attn"]
    assert int((z["value"] != 0).sum()) == 32, "the rule passed `value` over in silence"


# Leaves that are no weights.
#
# Right: `harden` checks the leaves that it projects (or says "a leaf without a rule"). A typed key is stored as its
# data, or refused by name; `compact` passes it through, as `compile` and export do. float8 is stored as its bytes.


def test_inf_in_a_free_leaf() -> None:
    mask = jnp.where(jnp.tril(jnp.ones((4, 4))) > 0, 0.0, -jnp.inf)
    api.harden({"attn": {"kernel": normal(4, 4), "mask": mask}}, [(".*kernel", api.unstructured(0.5))])


def test_save_rng_key(tmp_path: Path) -> None:
    m = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1)))
    error = raised_by(lambda: api.save(tmp_path / "r.safetensors", nnx.state(m)))
    text = f"{type(error).__name__}: {str(error)[:80]} (names no leaf)"
    assert error is None or "layers/1/rngs" in str(error), text


# A model of the user's own in the file.
#
# Right: "'my_vit' is none of the models here; build it and call compile(module, saved.params)".


def test_own_model_name(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    api.save(path, {"k": normal(4, 4)}, model={"name": "my_vit", "options": {}})
    error = raised_by(lambda: api.compile_file(path), ValueError)
    assert error is None or "my_vit" in str(error), f"{error}"
