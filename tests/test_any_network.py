"""Networks, trees and inputs of other makes through the functions that take a network, which assume arrays alone."""

from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import compressx as cx
from compressx import compaction, export


def _normal(*shape: int, seed: int = 0) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def _ones(tree: Any) -> Any:
    return jax.tree.map(jnp.ones_like, tree)


def _everywhere(model: Any, variables: Any, x: Any, expected: jax.Array) -> None:
    np.testing.assert_allclose(cx.compile(model, variables)(x), expected, atol=1e-5)
    small = compaction.compact(model, variables, x)
    np.testing.assert_allclose(small.apply(small.variables, x), expected, atol=1e-5)
    assert export.stablehlo(model, variables, x.shape[1:])


@pytest.mark.parametrize("switch", ["deterministic", "train", "is_training"])
def test_a_module_whose_switch_has_no_default(switch: str) -> None:
    evaluation = switch == "deterministic"

    class Positional(nn.Module):
        @nn.compact
        def __call__(self, x: Any, deterministic: bool) -> Any:
            return nn.Dropout(0.5)(nn.Dense(4)(x), deterministic=deterministic)

    class Train(nn.Module):
        @nn.compact
        def __call__(self, x: Any, train: bool) -> Any:
            return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))

    class Keyword(nn.Module):
        @nn.compact
        def __call__(self, x: Any, *, is_training: bool = True) -> Any:
            return nn.BatchNorm(use_running_average=not is_training)(nn.Dense(4)(x))

    model: Any = {"deterministic": Positional, "train": Train, "is_training": Keyword}[switch]()
    x = _normal(2, 8)
    variables = model.init(jax.random.key(0), x, **{switch: evaluation})
    _everywhere(model, variables, x, model.apply(variables, x, **{switch: evaluation}))


def test_modules_with_keys_and_functions_among_their_leaves() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.dense, self.drop = nnx.Linear(8, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.drop(nnx.relu(self.dense(x)))

    net, x = Net(nnx.Rngs(0)), _normal(2, 8)
    net.eval()
    _everywhere(net, nnx.state(net), x, net(x))
    mlp = eqx.nn.MLP(8, 4, 16, 1, key=jax.random.key(0))
    _everywhere(lambda m, x: jax.vmap(m)(x), mlp, x, jax.vmap(mlp)(x))


def test_a_compiled_network_of_several_inputs() -> None:
    w = {"w": _normal(4, 4)}
    x = {"a": _normal(3, 4), "b": _normal(3, 4, seed=1)}
    f = lambda v, x: {"y": x["a"] @ v["w"] + x["b"]}
    g = cx.compile(f, w)
    np.testing.assert_allclose(g(x)["y"], f(w, x)["y"], atol=1e-6)
    assert g(jax.tree.map(lambda a: a[:0], x))["y"].shape == (0, 4)


def test_functions_stay_with_the_module_and_numbers_come_back(tmp_path: Path) -> None:
    key = jax.random.key(0)
    layers = [eqx.nn.Linear(4, 4, key=key), eqx.nn.Dropout(0.25), eqx.nn.Lambda(jax.nn.relu)]
    net = eqx.nn.Sequential(layers)
    rules = [("layers/0/weight", cx.unstructured(0.5), "out in")]
    hard = cx.harden(net, rules, fresh=True)
    cx.save_model(tmp_path / "m", hard, rules)
    back = cx.load_model(tmp_path / "m", like=net).params
    assert back.layers[2].fn is jax.nn.relu and back.layers[1].p == 0.25
    assert isinstance(back.layers[1].p, float)
    np.testing.assert_array_equal(back.layers[0].weight, hard.params.layers[0].weight)


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.complex64])
def test_arrays_that_nothing_computes_with_are_kept_to_the_bit(dtype: Any, tmp_path: Path) -> None:
    a = np.random.default_rng(0).normal(size=(3, 5)).astype(dtype)
    a[0, 0] = -0.0
    cx.save_model(tmp_path / "m", {"a": a, "none": a[:0]})
    back = cx.load_model(tmp_path / "m").params
    assert back["a"].dtype == a.dtype and np.asarray(back["a"]).tobytes() == a.tobytes()
    assert back["none"].shape == (0, 5)


def test_structures_of_another_set_are_refused_by_name() -> None:
    params = {"kernel": _normal(8, 8)}
    state = cx.admm([("kernel", cx.unstructured(0.5))]).init(params)
    with pytest.raises(ValueError, match="kernel: ADMM's state is of other rules"):
        cx.harden(params, [("kernel", cx.quantize(4))], state)
    hard = cx.harden(params, [("kernel", cx.polarize(fragment=4))], fresh=True)
    other = [("kernel", cx.polarize(fragment=2))]
    for use in (cx.check, lambda h, r: cx.retrain(r, h).init(h.params)):
        with pytest.raises(ValueError, match="kernel: what is given as structures is of other rules"):
            use(hard, other)


def test_what_admm_is_told_is_checked_when_it_is_made() -> None:
    rules, params = [("kernel", cx.unstructured(0.5))], {"kernel": _normal(4, 4)}
    for rho in (-1.0, float("nan"), float("inf"), "much", None, {"kernel": 1.0}, [("kernel", -1.0)], [1.0]):
        with pytest.raises(ValueError, match="rho"):
            cx.admm(rules, rho=rho)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every must be a whole number"):
        cx.admm(rules, every=lambda step: 2)  # type: ignore[arg-type]
    still = cx.admm(rules, rho=0.0, every=1)
    updates, _ = still.update(_ones(params), still.init(params), params)
    np.testing.assert_array_equal(updates["kernel"], 1.0)


@pytest.mark.parametrize("optimizer", [optax.adam(1e-2), optax.sgd(0.1), optax.inject_hyperparams(optax.sgd)(0.1)])
def test_admm_after_the_optimizer_is_told(optimizer: Any) -> None:
    rules, params = [("kernel", cx.unstructured(0.5))], {"kernel": _normal(4, 4)}
    wrong = optax.chain(optimizer, cx.admm(rules)).init(params)
    for use in (lambda: cx.harden(params, rules, wrong), lambda: cx.admm_metrics(wrong)):
        with pytest.raises(ValueError, match="admm comes after the optimizer"):
            use()
    apart = optax.chain(optax.scale_by_adam(), cx.admm(rules), optax.scale_by_learning_rate(0.1))
    for right in (optax.chain(optax.clip(1.0), cx.admm(rules), optimizer), apart):
        cx.harden(params, rules, right.init(params))


def test_seeds_are_hardened_under_vmap() -> None:
    rules = [("k", cx.unstructured(0.5) & cx.quantize(4))]
    params = {"k": _normal(3, 8, 8)}
    tx = cx.admm(rules, every=1)
    state = jax.vmap(tx.init)(params)
    _, state = jax.vmap(tx.update)(_ones(params), state, params)
    together = jax.vmap(lambda p, s: cx.harden(p, rules, s))(params, state)
    for seed in range(3):
        one = lambda tree, seed=seed: jax.tree.map(lambda x: x[seed], tree)
        alone = cx.harden(one(params), rules, one(state))
        np.testing.assert_array_equal(together.params["k"][seed], alone.params["k"])
        cx.check(one(together), rules)


_SETS = {
    "polarize": cx.polarize(fragment=4),
    "codebook": cx.quantize(3, grid="codebook"),
    "channels": cx.quantize(4, per="channel"),
    "three": cx.unstructured(0.5) & cx.polarize(fragment=4) & cx.quantize(4),
}


_QUICK = (("polarize", False), ("channels", True))


@pytest.mark.parametrize(
    ("name", "stacked"),
    [pytest.param(n, s, marks=[] if (n, s) in _QUICK else pytest.mark.slow) for n in _SETS for s in (False, True)],
)
def test_the_whole_flow_on_a_mesh_of_explicit_axes(name: str, stacked: bool) -> None:
    """ADMM, hardening, retraining and retraction give what one device gives, and keep the sharding."""
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Explicit,))
    w = _normal(2, 8, 8) if stacked else _normal(8, 8)
    sharding = NamedSharding(mesh, P("m"))
    rules = [("k", _SETS[name], "stack in out" if stacked else None)]

    def flow(params: Any) -> Any:
        tx = cx.admm(rules, rho=0.1, every=1)
        _, state = jax.jit(tx.update)(_ones(params), tx.init(params), params)
        hard = cx.harden(params, rules, state)
        tx = optax.chain(optax.sgd(1e-3), cx.retrain(rules, hard))
        updates, state = jax.jit(tx.update)(_ones(params), tx.init(hard.params), hard.params)
        return hard, cx.retract(optax.apply_updates(hard.params, updates), rules, state)

    spread = flow({"k": jax.device_put(w, sharding)})
    alone = flow({"k": w})
    assert spread[0].params["k"].sharding.is_equivalent_to(sharding, w.ndim)
    np.testing.assert_array_equal(np.asarray(spread[0].params["k"]), np.asarray(alone[0].params["k"]))
    np.testing.assert_allclose(np.asarray(spread[1].params["k"]), np.asarray(alone[1].params["k"]), rtol=1e-6)
    cx.check(spread[1], rules)


def test_statistics_that_an_nnx_file_lacks_are_named() -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first, self.norm = nnx.Linear(4, 8, rngs=rngs), nnx.BatchNorm(8, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            return self.norm(self.first(x))

    net, x = Net(nnx.Rngs(0)), jnp.ones((2, 4), jnp.float32)
    with pytest.warns(UserWarning, match="lack the running statistics norm/mean, norm/var"):
        cx.compile(net, nnx.state(net, nnx.Param))(x)
    whole = nnx.state(net, (nnx.Param, nnx.BatchStat))
    np.testing.assert_allclose(cx.compile(net, whole)(x), _evaluated(net, x), rtol=1e-5)


def _evaluated(net: Any, x: Any) -> Any:
    net.eval()
    return net(x)
