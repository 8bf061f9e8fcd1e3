"""Networks of other packages through the whole path: scales, structures, axes, nnx, compilations, compaction, export.

Sixteen networks of nine packages (dm-haiku, keras on JAX, transformers' Flax, google-tunix, gemma, equinox, penzai,
brax, mamba2-jax) with tiny configurations and random weights: ADMM in their own training idiom, harden, retrain, save,
load, compact, compile, export. Each case is a small input that was wrong, and stands for its kind. No package beyond
the project's own is needed here.
"""

import functools
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from tests.cases import api
from tests.cases.support import normal, raised_by

# A scale fitted to weights that have moved since (heads that start at zero: Haiku's ResNet, Tunix' decoders).


def _trained(start: jax.Array) -> None:
    x = normal(256, 64)
    t = x @ (0.05 * normal(64, 10, seed=1))
    rules = [("w", api.quantize(8))]
    loss = lambda p: jnp.mean((x @ p["w"] - t) ** 2)
    tx = optax.chain(api.admm(rules, rho=1e-3, every=10), optax.adam(1e-2))
    p = {"w": start}
    s = tx.init(p)

    @jax.jit
    def step(p, s):
        u, s = tx.update(jax.grad(loss)(p), s, p)
        return optax.apply_updates(p, u), s

    for _ in range(400):
        p, s = step(p, s)
    with_state = float(loss(api.harden(p, rules, api.find_admm_state(s))))
    alone = float(loss(api.harden(p, rules)))
    assert with_state <= 2 * alone + 1e-4, f"loss {with_state:.3g} with ADMM's scale, {alone:.3g} with a fitted one"


def test_scale_of_a_leaf_that_starts_at_zero() -> None:
    _trained(jnp.zeros((64, 10)))


def test_scale_of_a_leaf_that_starts_small() -> None:
    _trained(1e-3 * normal(64, 10, seed=5))


# The structure of hardened weights is not the one that hardening used.


@functools.cache
def _polarized(seed: int) -> tuple[Any, Any]:
    rules = [("k", api.unstructured(0.5) & api.polarize(4))]
    return api.harden({"k": 0.1 * normal(3, 3, 8, 8, seed=seed)}, rules), rules


def test_structures_of_hardened_weights() -> None:
    bad = []
    for seed in range(6):
        hard, rules = _polarized(seed)
        try:
            api.check(hard, rules, api.structures(hard, rules))
        except api.ConstraintViolation:
            bad.append(seed)
    assert not bad, f"structures(h) reject h itself for seeds {bad}"


def test_saved_without_structures(tmp_path: Path) -> None:
    bad = []
    for seed in range(8):
        path = tmp_path / f"s{seed}.safetensors"
        hard, rules = _polarized(seed)
        try:
            api.save(path, hard, rules)
        except api.ConstraintViolation:
            continue  # refusing is right too
        if not api.verify(path):
            bad.append(seed)
    assert not bad, f"written without a word, refused by verify: {bad}"


# Axes of layers as others store them (new arguments: write them in).


def test_axes_depthwise_multiplier_last() -> None:
    """Keras' DepthwiseConv2D, kernel [kh, kw, C, multiplier]: 16 outputs, not one."""
    k = normal(3, 3, 16, 1) * (1 + jnp.arange(16.0))[:, None]
    z = api.harden({"k": k}, [("k", api.quantize(4, per="channel"), "taps taps out out")])["k"]
    error = [float(jnp.linalg.norm((z - k)[..., c, :]) / jnp.linalg.norm(k[..., c, :])) for c in range(16)]
    assert max(error) < 0.3, (
        f"one scale for 16 channels: relative error {error[0]:.2f} in the weakest, {error[-1]:.2f} in the strongest"
    )


def test_density_that_leaves_everything() -> None:
    """A density below one that keeps all weights is said, not passed over."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        harden = lambda: api.harden({"layer7": normal(3, 3, 16, 1)}, [("layer7", api.filters(0.5))])["layer7"]
        error = raised_by(harden, ValueError)
        if error is not None:
            assert "layer7" in str(error), error
            return
        kept = float((harden() != 0).mean())
    told = any("layer7" in str(w.message) for w in said)
    assert told or kept <= 0.5, "filters(0.5) keeps 16 of 16 channels without a word"


def test_axes_transposed_flax_kernel() -> None:
    """GPT-2's FlaxConv1D stores `kernel` as [out, in]; with the axes said, filters prune outputs."""
    w = normal(96, 32, seed=1)
    z = api.harden({"c_attn": {"kernel": w}}, [(".*kernel", api.filters(0.5), "out in")])["c_attn"]["kernel"]
    live = int((z != 0).any(1).sum())
    assert live == 48, f"{live} of 96 outputs live"


# nnx.Optimizer's state.


def test_retract_on_an_nnx_optimizer() -> None:
    m, rules = nnx.Linear(8, 8, rngs=nnx.Rngs(0)), [(".*kernel", api.n_of_m(2, 4))]
    nnx.update(m, api.harden(nnx.state(m, nnx.Param), rules))
    opt = nnx.Optimizer(m, optax.chain(optax.adam(1e-3), api.retrain(rules)), wrt=nnx.Param)
    opt.update(m, nnx.grad(lambda m: m(jnp.ones((2, 8))).sum())(m))
    back = api.retract(nnx.state(m, nnx.Param), rules, opt.opt_state)
    kept = np.asarray(back["kernel"][...]) != 0
    assert kept.reshape(2, 4, 8).sum(1).max() <= 2 and kept.sum() == 32


# Compilation: one program for each shape and set, kept.


def _compilations(f: Callable[[], Any]) -> int:
    """Programs that f compiles, by jax's own log."""
    count = [0]

    class Count(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            count[0] += "Compiling" in record.getMessage()

    handler, log = Count(), logging.getLogger("jax")
    level = log.level
    log.addHandler(handler)
    jax.config.update("jax_log_compiles", True)
    try:
        jax.block_until_ready(jax.tree.leaves(f()))
    finally:
        jax.config.update("jax_log_compiles", False)
        log.removeHandler(handler)
        log.setLevel(level)
    return count[0]


def _equal_leaves(constraint: Any) -> None:
    jax.clear_caches()  # what other tests of this process have compiled is not counted as kept
    params = {f"l{i}": normal(64, 64, seed=i) for i in range(16)}
    rules, bad = [("l.*", constraint)], {}
    tx = api.admm(rules)
    for name, f in (("init", lambda: tx.init(params)), ("harden", lambda: api.harden(params, rules))):
        new = lambda: jax.jit(lambda x: 3 * x + len(bad))(jnp.arange(7.5))
        assert _compilations(new) > 0, "the log is silent: count in another way"
        first, second = _compilations(f), _compilations(f)
        if first > 12 or second > 0:
            bad[name] = (first, second)
    assert not bad, f"16 equal leaves: compilations in the first and second call {bad}"


def test_compile_once_unstructured() -> None:
    _equal_leaves(api.unstructured(0.2))


def test_compile_once_filters() -> None:
    _equal_leaves(api.filters(0.5))


# Compaction: what depends on no weight has no channels.


def test_compaction_of_positions() -> None:
    def decoder(v: Any, x: jax.Array) -> jax.Array:
        at = jnp.tile(jnp.arange(x.shape[1]), (x.shape[0], 1))
        h = v["embedding"][x] + v["position"][at]
        return jax.nn.relu(h @ v["up"]) @ v["down"]

    v = {
        "embedding": normal(64, 16),
        "position": normal(8, 16, seed=1),
        "up": normal(16, 32, seed=2).at[:, 16:].set(0),
        "down": normal(32, 16, seed=3),
    }
    x = jnp.ones((2, 8), jnp.int32)
    small = api.compact(decoder, v, x)
    assert small.variables["up"].shape == (16, 16)
    assert np.allclose(small.apply(small.variables, x), decoder(v, x), atol=1e-5)


# Export: integers in.


def test_export_of_token_models() -> None:
    v = {"embedding": normal(64, 16), "out": normal(16, 64, seed=1)}
    data = api.stablehlo(lambda v, x: v["embedding"][x] @ v["out"], v, jax.ShapeDtypeStruct((1, 8), jnp.int32))
    assert data, "no way to export a model of tokens"
