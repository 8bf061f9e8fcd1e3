"""Transformers compacted: heads, widths, gated units and stacked layers, against the dense network with zeros."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from compressx import harden
from compressx.compaction import (
    CompactionError,
    NothingRemoved,
    channels,
    compact,
    coupled_rules,
    dead,
    groups,
    removed,
    restore,
)
from compressx.formats import load_model, save_model
from compressx.tree import paths
from tests.compaction.transformers import LENGTH, VOCABULARY, Kind, apply, draw_kind, leaves
from tests.thinning import some

ONE = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
KINDS = {
    "attention as DenseGeneral": Kind(form="general", norm="layer"),
    "fused, grouped queries, SwiGLU in one kernel, scanned": Kind("fused", 4, 2, gated="one", layers=2, scanned=True),
    "reshaped projections, repeated keys": Kind("dense", 6, 2, repeated=True, norm=""),
    "one kernel for query, key and value": Kind("three", 3, 3, dim=3, norm="layer"),
    "heads of a kernel interleaved, scanned": Kind("interleaved", layers=3, scanned=True),
    "kernels out by in, SwiGLU": Kind("torch", gated="two"),
    "DenseGeneral, grouped queries, scanned": Kind("general", 4, 2, gated="two", layers=2, scanned=True),
}


def _tokens(rng, n=3):
    return jnp.asarray(rng.integers(0, VOCABULARY, (n, LENGTH)), jnp.int32)


def _sizes(tree):
    return {path: tuple(leaf.shape) for path, leaf in zip(paths(tree), jax.tree.leaves(tree), strict=True)}


def _expected_groups(kind):
    """(units, steps) of every group, sorted: the residual stream, and of every layer heads, width and dimensions."""
    layer = [kind.kv, kind.hidden, *([kind.dim] * 2 if kind.form == "general" else [])]
    own = [(n, kind.layers) for n in layer] if kind.scanned else [(n, 0) for n in layer] * kind.layers
    return sorted([(kind.d, 0), *own])


def _emptied(v, found, rng, even=True):
    """Leaves with some units of each group zero, in a stack others in each slice; and how large each is without them.

    Without `even` the slices lose different numbers, and the size is that of the one that loses least.
    """
    names, arrays = paths(v), [np.array(x) for x in jax.tree.leaves(v)]
    sizes = {name: list(x.shape) for name, x in zip(names, arrays, strict=True)}
    for group in found:
        n, steps = int(rng.integers(1, group.size)), group.steps or 1
        numbers = [n] * steps if even else list(rng.integers(0, group.size, steps))
        gone = [rng.permutation(group.size)[:k] for k in numbers]
        for slot in group.slots:
            held = slot.units[slot.units >= 0]
            sizes[slot.path][slot.axis] -= min(numbers) * (held.size // group.size)
            if slot.role == "in":
                continue
            for step, out in enumerate(gone):
                array = arrays[slot.leaf] if group.steps is None else arrays[slot.leaf][step]
                np.moveaxis(array, slot.axis - (group.steps is not None), 0)[np.isin(slot.units, out)] = 0
    hard = jax.tree.unflatten(jax.tree.structure(v), [jnp.asarray(x) for x in arrays])
    return hard, {name: tuple(size) for name, size in sizes.items()}


def _agree(kind, hard, small, rng):
    x = _tokens(rng)
    want = jax.jit(partial(apply, kind))(hard, x)
    got = jax.jit(small.apply)(small.variables, x)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(want).max())))


def _check(kind, rng, even=True):
    f, v = partial(apply, kind), leaves(kind, rng)
    found = groups(channels(f, v, ONE))
    assert sorted((g.size, g.steps or 0) for g in found) == _expected_groups(kind), kind
    hard, sizes = _emptied(v, found, rng, even)
    small = compact(f, hard, ONE)
    assert _sizes(small.variables) == sizes, kind
    _agree(kind, hard, small, rng)


@pytest.mark.parametrize("name", some(list(KINDS)[::2], KINDS))
def test_whatever_is_zero_is_gone_and_the_network_is_the_same(name, rng) -> None:
    _check(KINDS[name], rng)


def test_stacked_layers_that_lose_different_numbers_lose_as_many_as_the_one_that_loses_least(rng) -> None:
    _check(Kind("fused", 4, 2, gated="two", layers=3, scanned=True), rng, even=False)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(60))
def test_transformers_of_any_form_and_size(seed) -> None:
    rng = np.random.default_rng(seed)
    _check(draw_kind(rng), rng, even=bool(rng.random() < 0.7))


def test_rules_prune_every_layer_of_a_stack_by_its_own_energies(rng) -> None:
    kind = KINDS["fused, grouped queries, SwiGLU in one kernel, scanned"]
    f, v = partial(apply, kind), leaves(kind, rng)
    found = groups(channels(f, v, ONE))
    rules = coupled_rules(found, {i: 0.5 for i, g in enumerate(found) if g.steps}, vectors=True)
    hard = harden(v, rules, fresh=True).params
    layers = v["layers"]
    for step in range(kind.layers):  # by hand: the energy of a SwiGLU unit is that of its two columns
        up = np.asarray(layers["up"][step]).reshape(kind.d, 2, kind.hidden)
        best = set(np.argsort(-(up**2).sum((0, 1)))[: kind.hidden // 2])
        alive = np.asarray(hard["layers"]["up"][step]).reshape(kind.d, 2, kind.hidden).any((0, 1))
        assert set(np.flatnonzero(alive)) == best
        qkv = np.concatenate([layers["qkv"][step], layers["qkv_bias"][step][None]]) ** 2
        parts = np.split(qkv.sum(0), [8, 12])  # 4 heads of 2 for the queries, 2 and 2 for keys and values
        energy = [sum(p.reshape(2, -1)[g].sum() for p in parts) for g in range(2)]
        kept = np.asarray(hard["layers"]["qkv"][step]).any(0)[8:12].reshape(2, 2).any(1)
        assert list(np.flatnonzero(kept)) == [int(np.argmax(energy))]
    small = compact(f, hard, ONE)
    sizes = _sizes(small.variables)
    assert sizes["layers/qkv"] == (2, 6, 8) and sizes["layers/o"] == (2, 4, 6)  # one group of two queries is left
    assert sizes["layers/up"] == (2, 6, 10) and sizes["layers/down"] == (2, 5, 6)
    heavy = [sum(x.nbytes for x in jax.tree.leaves(tree["layers"])) for tree in (v, small.variables)]
    assert heavy == [4 * 2 * n for n in (6 * 16 + 16 + 48 + 120 + 60 + 18, 6 * 8 + 8 + 24 + 60 + 30 + 18)]
    _agree(kind, hard, small, rng)


def test_heads_and_their_dimensions_are_pruned_by_one_rule(rng) -> None:
    m = nn.MultiHeadDotProductAttention(num_heads=4)
    x = jnp.asarray(rng.normal(size=(2, 5, 16)), jnp.float32)
    f = lambda v, x: m.apply(v, x)
    v = jax.jit(m.init)(jax.random.key(0), x)
    found = groups(channels(f, v, x))
    assert [g.size for g in found] == [4, 4, 4]
    hard = harden(v, coupled_rules(found, 0.5, vectors=True), fresh=True).params
    small = compact(f, hard, x)
    p = small.variables["params"]
    assert {k: leaf["kernel"].shape for k, leaf in p.items()} == {
        **dict.fromkeys(("query", "key", "value"), (16, 2, 2)),
        "out": (2, 2, 16),
    }
    np.testing.assert_allclose(small.apply(small.variables, x), f(hard, x), atol=1e-5)
    heads = next(i for i, g in enumerate(found) if any(s.axis == 1 for s in g.slots))
    ((pattern, constraint),) = coupled_rules(found, {heads: 0.5})
    assert pattern == "|".join(f"params/{k}/kernel" for k in ("key", "query", "value"))
    assert str(constraint).startswith("coupled_filters")
    with pytest.raises(ValueError, match="several groups share these weights"):
        coupled_rules(found, 0.5, column_density=0.5)
    with pytest.raises(ValueError, match="density names groups"):
        coupled_rules(found, {7: 0.5})


def test_a_group_says_what_it_is(rng) -> None:
    kind = Kind("fused", 4, 2, layers=2, scanned=True)
    found = groups(channels(partial(apply, kind), leaves(kind, rng), ONE))
    assert (
        "2 units in each of 2 steps; made by layers/qkv[2] by 8; along layers/qkv_bias[1] by 8; read by "
        in "\n".join(map(str, found))
    )


_LOAD = """
import json, sys
from functools import partial
import jax, jax.numpy as jnp, numpy as np
from compressx.compaction import restore
from compressx.formats import load_model
from tests.compaction.transformers import Kind, apply, leaves
kind = Kind(**json.loads(sys.argv[2]))
like = leaves(kind, np.random.default_rng(9))
saved = load_model(sys.argv[1])
small = restore(partial(apply, kind), like, saved.params, saved.extra["removed"])
tokens = jnp.asarray(saved.extra["tokens"], jnp.int32)
print(json.dumps(np.asarray(small.apply(small.variables, tokens), float).tolist()))
"""


def test_a_compact_network_is_saved_and_runs_in_another_process(rng, tmp_path: Path) -> None:
    kind = KINDS["DenseGeneral, grouped queries, scanned"]
    f, v = partial(apply, kind), leaves(kind, rng)
    hard, _ = _emptied(v, groups(channels(f, v, ONE)), rng)
    small, tokens, path = compact(f, hard, ONE), _tokens(rng), tmp_path / "small.safetensors"
    extra = {"removed": removed(small.dead), "tokens": tokens.tolist()}
    sizes = save_model(path, small.variables, extra=extra)
    assert (
        sizes.dense
        == sum(x.nbytes for x in jax.tree.leaves(small.variables))
        < sum(x.nbytes for x in jax.tree.leaves(v))
    )
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", _LOAD, str(path), json.dumps(kind._asdict())]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    np.testing.assert_array_equal(np.array(json.loads(done.stdout), np.float32), small.apply(small.variables, tokens))
    saved = load_model(path)
    cuts = saved.extra["removed"]
    for wrong, text in (
        ({**cuts, "nothing": []}, "differ in nothing"),
        ({**cuts, "head": [[0, [[0, 99]]]]}, "head: what was removed cannot be read: more than"),
        ({**cuts, "head": [[0, [[1, 1], [0, 1]]]]}, "head: what was removed cannot be read: indices do not increase"),
        ({k: c for k, c in cuts.items() if k != "head"}, "head: is float32"),
    ):
        with pytest.raises(CompactionError, match=text):
            restore(f, v, saved.params, wrong)


def test_layers_that_pick_channels_by_index_lose_the_same_ones(rng) -> None:
    def f(v, x):
        def layer(x, w):
            y = jnp.tanh(x @ w["up"])
            return x + jnp.concatenate([y[:, 4:], y[:, :4]], -1) @ w["down"], None

        return lax.scan(layer, x, v)[0]

    v = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("up", (2, 3, 8)), ("down", (2, 8, 3)))}
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    v["up"] = v["up"].at[0, :, jnp.array([0, 1, 5])].set(0).at[1, :, jnp.array([1, 5, 6])].set(0)
    small = compact(f, v, x)
    assert small.dead.kept["up"][2].tolist() == [0, 2, 3, 4, 6, 7]  # 1 and 5 are zero in both
    np.testing.assert_allclose(small.apply(small.variables, x), f(v, x), atol=1e-5)


def test_units_of_a_recurrent_cell_go_with_its_state(rng) -> None:
    m = nn.RNN(nn.GRUCell(6))
    x = jnp.asarray(rng.normal(size=(2, 4, 3)), jnp.float32)
    v = jax.jit(m.init)(jax.random.key(0), x)
    f = lambda v, x: m.apply(v["rnn"], x)[:, -1] @ v["head"]
    v = {"rnn": v, "head": jnp.asarray(rng.normal(size=(6, 2)), jnp.float32)}
    (group,) = groups(channels(f, v, x))
    assert group.size == 6 and group.steps is None
    hard = harden(v, coupled_rules([group], 0.5, vectors=True), fresh=True).params
    small = compact(f, hard, x)
    cell = small.variables["rnn"]["params"]["cell"]
    assert small.variables["head"].shape == (3, 2) and cell["hn"]["kernel"].shape == (3, 3)
    np.testing.assert_allclose(small.apply(small.variables, x), f(hard, x), atol=1e-5)


def test_what_a_scan_compares_across_channels_is_told(rng) -> None:
    def f(v, x):
        return lax.scan(lambda x, w: (x + jax.nn.softmax(x @ w["up"]) @ w["down"], None), x, v)[0]

    v = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("up", (2, 3, 8)), ("down", (2, 8, 3)))}
    v["up"] = v["up"].at[:, :, 3].set(0)
    with pytest.warns(NothingRemoved, match=r"up\[2\]: reduce_max runs over it"):
        assert compact(f, v, jnp.ones((1, 3))).dead.kept == {}
    assert dead(f, v, jnp.ones((1, 3)), keep=("scan",)).stuck == {"up[2]": "reduce_max runs over it"}


def test_rotated_dimensions_go_in_pairs_and_a_centred_variance_keeps_the_width(rng) -> None:
    def f(v, x):
        q, k = (x @ v[n] for n in "qk")
        angle = jnp.arange(4.0)[:, None] / jnp.arange(1.0, 4.0)[None]
        turn = lambda y: jnp.concatenate(
            [
                y[..., :3] * jnp.cos(angle)[None] - y[..., 3:] * jnp.sin(angle)[None],
                y[..., 3:] * jnp.cos(angle)[None] + y[..., :3] * jnp.sin(angle)[None],
            ],
            -1,
        )
        y = jax.nn.softmax(jnp.einsum("btd,bsd->bts", turn(q), turn(k))) @ (x @ v["v"])
        return ((y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-3)) @ v["o"]

    shapes = {"q": (5, 6), "k": (5, 6), "v": (5, 8), "o": (8, 2)}
    v = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(2, 4, 5)), jnp.float32)
    pairs, _ = groups(channels(f, v, x))
    assert pairs.size == 3 and [s.units.tolist() for s in pairs.slots] == [[0, 1, 2, 0, 1, 2]] * 2
    hard = {n: leaf.at[:, jnp.array([1, 4])].set(0) if n in "qk" else leaf for n, leaf in v.items()}
    hard["v"], hard["o"] = hard["v"].at[:, 3].set(0), hard["o"].at[3].set(0)
    small = compact(f, hard, x)
    assert _sizes(small.variables) == {"k": (5, 4), "o": (8, 2), "q": (5, 4), "v": (5, 8)}
    np.testing.assert_allclose(small.apply(small.variables, x), f(hard, x), atol=1e-5)
