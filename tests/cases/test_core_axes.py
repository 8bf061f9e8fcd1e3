"""Leaves whose axes are not those of a dense or convolutional kernel: stacks, attention, shards, other libraries.

Each case is a small input that was wrong, after a need that people have stated in public. It stands for its kind.
"""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.cases import api
from tests.cases.support import normal, raised_by

# Stacked leaves `[L, in, out]`, `[E, in, out]` (scan over layers, mixtures of experts).
#
# Right: a documented way to say it (a combinator such as `each(constraint, axis=0)`, or an argument of a rule) that
# works in resolve, admm, retrain, harden, check, save/load and allocate, and gives for every slice exactly what the
# constraint alone gives for that slice. The assertions are for the leaf with that way used. Without it, at least
# nothing may be taken from a layer down to 0 weights without a word. (A user can build it in five lines with `jax.vmap`
# of the constraint's functions and `_replace`, and it works with harden; but its `spec` has no factory, so it cannot be
# saved.)


def test_stack_unstructured() -> None:
    w = normal(3, 8, 16) * jnp.array([1.0, 4.0, 16.0])[:, None, None]  # scan over layers: [L, in, out]
    rules = [(r".*kernel", api.unstructured(0.25), "stack in out")]
    z = api.harden({"layers": {"kernel": w}}, rules)["layers"]["kernel"]
    kept = [int((z[i] != 0).sum()) for i in range(3)]
    assert kept == [32, 32, 32], f"kept per layer {kept}"


def test_stack_filters() -> None:
    w = normal(3, 8, 16)
    z = api.harden({"layers": {"kernel": w}}, [(r".*kernel", api.filters(0.5), "stack in out")])["layers"]["kernel"]
    for i in range(3):
        alone = api.harden({"kernel": w[i]}, [("kernel", api.filters(0.5))])["kernel"]
        assert bool((z[i] == alone).all()), "one choice of filters for all layers"


# Attention kernels of Flax (Linen and NNX): query, key and value `[d, heads, head_dim]`, out `[heads, head_dim, d]`,
# and any `DenseGeneral`.
#
# Right: a way to say which axes are inputs and which are outputs (an argument, or a view: `in_axes=(0,)`,
# `out_axes=(1, 2)`), used by all families, formats and `per="channel"`; then the assertions hold. With the defaults
# of 0.1 `n_of_m(2, 4)` prunes across heads (no hardware can use it, and it is refused or accepted by the number of
# heads), `filters` removes the same index from every head, `channels` removes heads. Until then: documentation, or a
# warning where a leaf has 3 axes.


def _attention() -> Any:
    model = nn.MultiHeadDotProductAttention(num_heads=4)
    return model.init(jax.random.key(0), normal(1, 5, 32))


def test_attn_nm() -> None:
    rules = [(".*query/kernel", api.n_of_m(2, 4), "in out out")]
    z = api.harden(_attention(), rules)["params"]["query"]["kernel"]  # [32, 4, 8]
    groups = (z != 0).reshape(8, 4, 32).sum(1)  # along d, the axis that is summed
    assert int(groups.max()) <= 2, f"{int(groups.max())} of 4 along the summed axis"


def test_attn_filters() -> None:
    q = _attention()["params"]["query"]["kernel"]
    q = q * (1 + jnp.arange(4))[:, None]  # heads of different size
    z = api.harden({"q": q}, [("q", api.filters(0.25), "in out out")])["q"]
    live = (z != 0).any(0).reshape(-1)
    want = api.top_k_mask(jnp.sum(jnp.square(q), 0).reshape(-1), 8)
    assert bool((live == want).all()), "the 8 strongest of 32 outputs are not the ones kept"


def test_attn_blocks() -> None:
    z = api.harden({"q": normal(16, 4, 8)}, [("q", api.block((4, 4), 0.25), "in out out")])["q"]
    held = (z != 0).reshape(4, 4, 8, 4).any((1, 3))
    assert int(held.sum()) == 8, f"{int(held.sum())} of 32 blocks of the matrix [16, 32] hold weights, wanted 8"


# Sharded parameters with jax's default mesh (`jax.make_mesh` makes `Explicit` axes).
#
# Right: the same result as on one device, as with `AxisType.Auto` (which works everywhere). Wrong in 0.1: block, bsp,
# bsp_rows, darb, polarize, unify, prune_blocks, pattern, quantize(grid="codebook"). Fine: unstructured, filters,
# columns, channels, n_of_m, uniform quantize, connectivity, bank_balanced, block_max, crossbar_aware. The error is
# jax's and names neither leaf nor rule. `jax.sharding.auto_axes` around projections, or `out_sharding`, would do.


def _as_on_one_device(constraint: Any, shape: tuple[int, ...], spec: tuple[str | None, ...]) -> None:
    if jax.device_count() < 2:
        pytest.skip("needs two devices")
    mesh = jax.make_mesh((2,), ("m",))
    sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
    params = {"k": jax.device_put(normal(*shape), sharding)}
    rules = [("k", constraint)]
    tx = optax.chain(api.admm(rules, every=1), optax.adam(1e-3))
    state = tx.init(params)
    jax.jit(tx.update)(params, state, params)
    one = api.harden({"k": jnp.asarray(np.asarray(params["k"]))}, rules)["k"]
    assert bool((np.asarray(api.harden(params, rules)["k"]) == np.asarray(one)).all())


def test_explicit_block() -> None:
    _as_on_one_device(api.block((2, 2), 0.5), (8, 8), (None, "m"))


def test_explicit_bsp() -> None:
    _as_on_one_device(api.bsp(0.5, 0.5), (8, 8), (None, "m"))


def test_explicit_darb() -> None:
    _as_on_one_device(api.darb(0.5), (8, 8), ("m", None))


def test_explicit_unify() -> None:
    _as_on_one_device(api.unify((2, 2), 0.5), (8, 8), (None, "m"))


# Equinox, and any other layout `[out, in]`, OIHW.
#
# Right: the layout can be said (per rule, or an `axis` argument), or README and docstrings say that structured sets are
# for Flax's layout only. A whole Equinox module (with functions among its leaves) gives an error that names the leaf
# and says `eqx.filter`.


def test_equinox_filters() -> None:
    p = eqx.filter(eqx.nn.Linear(8, 16, key=jax.random.key(0)), eqx.is_array)  # weight [out, in]
    z = api.harden(p, [("weight", api.filters(0.5), "out in")]).weight
    outputs, inputs = int((z != 0).any(1).sum()), int((z != 0).any(0).sum())
    assert outputs == 8, f"{outputs} of 16 outputs live, {inputs} of 8 inputs"


def test_equinox_module_with_functions() -> None:
    m = eqx.nn.MLP(4, 4, 8, 2, key=jax.random.key(0))
    harden = lambda: api.harden(m, [(".*weight", api.unstructured(0.5))])
    error = raised_by(harden)
    if error is not None:
        assert "activation" in str(error), f"{type(error).__name__}: {str(error)[:90]} (names no leaf)"
        return
    hard = harden()
    assert hard.activation is m.activation and int((hard.layers[0].weight != 0).sum()) == 16, "not hardened"
