"""Training: gradients of None, rho from outside, rules and states that do not belong together, jax's own modes.

Each case is a small input that was wrong, after a need that people have stated in public. It stands for its kind.
"""

import pickle
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from tests.cases import api
from tests.cases.support import normal, raised_by


def _params() -> Any:
    return {"kernel": normal(8, 8)}


def _gradients() -> Any:
    return {"kernel": jnp.ones((8, 8))}


RULES = [("kernel", api.unstructured(0.5))]


# A gradient of None moves every index.
#
# Right: the penalty and the mask go to the leaf that the rule names (None stays None), or an error that names the leaf.


def test_none_gradient_admm() -> None:
    p = {"a": normal(4, 4), "b": normal(4, 4, seed=1), "c": normal(4, 4, seed=2)}
    g = {"a": None, "b": jnp.zeros((4, 4)), "c": jnp.zeros((4, 4))}  # a is frozen: its gradient is None
    tx = api.admm([("b", api.unstructured(0.5))], rho=1.0, every=1)
    s = tx.init(p)
    u, _ = tx.update(g, s, p)
    assert float(jnp.abs(u["b"]).sum()) > 0 and float(jnp.abs(u["c"]).sum()) == 0, "b's penalty landed on c"


# rho from outside (`optax.inject_hyperparams`, optax schedules).
#
# Right: `rescale_dual=True` keeps rho * U when rho is injected as it does for the built-in schedules
# (`rho.staged(1, 10, every=4)`: 3.05 -> 3.50; injected: 3.05 -> 35.0). rho = 0 gives penalty 0, not NaN. A callable
# given as `rho` or `every` works, or a ValueError says what a schedule is here.


def test_injected_rho_keeps_dual() -> None:
    p, g = _params(), _gradients()
    tx = optax.inject_hyperparams(lambda rho: api.admm(RULES, rho=rho, every=1))(rho=1.0)
    s = tx.init(p)
    for _ in range(3):
        _, s = tx.update(g, s, p)
    before = api.dual(s.inner_state, "kernel") * api.rho(s.inner_state)["kernel"]
    fixed = api.admm(RULES, rho=1.0, every=1)
    fixed.update(g, s.inner_state, p)  # the same update, rho still 1
    s.hyperparams["rho"] = jnp.asarray(10.0)
    _, s = tx.update(g, s, p)
    got = float(jnp.linalg.norm(api.dual(s.inner_state, "kernel") * api.rho(s.inner_state)["kernel"]))
    kept = float(jnp.linalg.norm(before))
    assert got < 3 * kept, f"||rho U|| went from {kept:.2f} to {got:.2f} when rho went from 1 to 10 (rescale_dual=True)"


def test_injected_rho_from_zero() -> None:
    p, g = _params(), _gradients()
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    tx = optax.inject_hyperparams(lambda rho: api.admm(RULES, rho=rho, every=1))(rho=schedule)
    s = tx.init(p)
    for _ in range(3):
        u, s = tx.update(g, s, p)
    assert bool(jnp.isfinite(u["kernel"]).all()), "updates are NaN"


def test_rho_optax_schedule() -> None:
    p, g = _params(), _gradients()
    seen = []

    def train() -> None:
        tx = api.admm(RULES, rho=optax.linear_schedule(1e-3, 1e-1, 10), every=1)
        s = tx.init(p)
        for _ in range(3):
            _, s = tx.update(g, s, p)
            seen.append(float(api.rho(s)["kernel"]))

    error = raised_by(train)
    if error is not None:
        assert "rho" in str(error), f"{type(error).__name__}: {error}"
    else:
        assert seen[0] < seen[1] < seen[2], f"rho stays at {seen}"


# Rules and states that do not belong together.
#
# Right: rules are made a tuple once (or refused). A state of other rules is refused with the names that differ.
# `harden` and `save_model` accept names that differ by the prefix `params/`, or say so (the text of 0.1, "take them
# from harden.structures", is where they came from).


def test_rules_once() -> None:
    rules = zip(["kernel"], [api.unstructured(0.5)])  # noqa: B905  (an iterator that is read once is what is tried)
    try:
        s = api.admm(rules, every=1).init(_params())
    except (TypeError, ValueError):
        return  # refused by name: right too
    assert list(api.rho(s)) == ["kernel"], "a zip constrains nothing, in silence"


def _variables() -> Any:
    return {"params": {"d": {"kernel": normal(8, 8)}}, "batch_stats": {"mean": jnp.zeros(8)}}


def test_harden_variables_with_state_of_params() -> None:
    v, rules = _variables(), [(".*kernel", api.quantize(4))]
    s = api.admm(rules, every=1).init(v["params"])
    error = raised_by(lambda: api.harden(v, rules, s))
    named = "params/" in str(error) and not isinstance(error, KeyError)
    assert error is None or named, f"{type(error).__name__}: {error}"


def test_save_variables_with_structures_of_params(tmp_path: Path) -> None:
    v, rules = _variables(), [(".*kernel", api.quantize(4))]
    hard = api.harden(v["params"], rules)
    chosen = api.structures(hard, rules)
    api.save(tmp_path / "r.safetensors", {**v, "params": hard}, rules, chosen)


def test_changed_rules() -> None:
    p, g = _params(), _gradients()
    s = api.admm([("kernel", api.unstructured(0.5) & api.quantize(4))], every=1).init(p)
    new = api.admm([("kernel", api.unstructured(0.5))], every=1)
    error = raised_by(lambda: new.update(g, s, p))
    assert error is not None, "no error"
    assert "rule" in str(error) or "state" in str(error), f"{type(error).__name__}: {error}"


# jax's own modes, jit around a compiled network, donation, pickling.
#
# Right: they work. `compile` specialises under `jax.ensure_compile_time_eval()`. `retrain(rules, structures)` copies
# what it is given (as `admm.init` takes care to). Constraints pickle through their spec (`__reduce__` with
# `from_spec`). Several inputs for `compile`, or an error that says one array.


def test_disable_jit() -> None:
    with jax.disable_jit():
        api.harden(_params(), RULES)


def test_debug_infs() -> None:
    p = _params()
    with jax.debug_infs(True):
        api.admm(RULES).init(p)


def test_compile_inside_jit() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return nn.BatchNorm(use_running_average=True)(nn.Conv(4, (3, 3))(x))

    x = normal(1, 6, 6, 3)
    f = api.compile(Block(), Block().init(jax.random.key(0), x))
    jax.jit(lambda x: f(x))(x)


def test_donated_structures() -> None:
    p, g, rules = _params(), _gradients(), [("kernel", api.quantize(4))]
    hard = api.harden(p, rules)
    chosen = api.structures(hard, rules)
    tx = api.retrain(rules, chosen)
    s = tx.init(hard)
    jax.jit(lambda p, s: tx.update(g, s, p), donate_argnums=1)(hard, s)
    api.check(api.harden(hard, rules), rules, chosen)


def test_pickle_constraint() -> None:
    rules = pickle.loads(pickle.dumps(RULES))
    p = _params()
    assert bool((api.harden(p, rules)["kernel"] == api.harden(p, RULES)["kernel"]).all())
