"""The settings of conftest.py hold: a suite that silently lost them would pass too easily."""

import os
import subprocess
import sys
import warnings
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest


def test_two_devices_are_forced() -> None:
    assert jax.device_count() >= 2 or jax.default_backend() != "cpu"


@pytest.mark.skipif(os.environ.get("COMPRESSX_TEST_OPTIMIZE") == "1", reason="programs are compiled as for users")
def test_programs_are_compiled_quickly() -> None:
    flags = os.environ["XLA_FLAGS"]
    assert "--xla_backend_optimization_level=" in flags
    assert ("xla_cpu_use_fusion_emitters" in flags) == (version("jaxlib") < "0.11")  # the two stacks that are pinned


def test_a_flag_that_xla_does_not_know_is_left_out(pytestconfig: pytest.Config) -> None:
    """Which flags those are is said by XLA itself: it ends the process."""
    (settings,) = (p for p in pytestconfig.pluginmanager.get_plugins() if hasattr(p, "_known"))
    for flag in ("xla_cpu_use_fusion_emitters", "xla_no_such_flag"):
        environment = os.environ | {"XLA_FLAGS": f"--{flag}=false", "JAX_PLATFORMS": "cpu"}
        command = [sys.executable, "-c", "import jax; jax.devices()"]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert settings._known(flag) == (ended.returncode == 0), ended.stderr
        assert ended.returncode == 0 or "Unknown flag" in ended.stderr
    assert settings._known("xla_backend_optimization_level") and not settings._known("xla_no_such_flag")


def test_our_promotions_are_strict_in_eager_and_traced_code() -> None:
    def mixes(x: jax.Array) -> jax.Array:
        return x + jnp.arange(3, dtype=jnp.int32)

    for f in (mixes, jax.jit(mixes), jax.grad(lambda x: mixes(x).sum())):
        with pytest.raises(jax.dtypes.TypePromotionError):
            f(jnp.ones(3))


def test_our_code_is_strict_inside_an_optax_chain_and_optax_itself_is_spared() -> None:
    def sloppy(updates: jax.Array, state: optax.EmptyState, params: jax.Array) -> tuple[jax.Array, optax.EmptyState]:
        return updates * jnp.ones(3, jnp.int32), state

    params = jnp.ones(3)
    good = optax.MultiSteps(optax.adam(optax.cosine_decay_schedule(1e-3, 10)), 2)
    state = good.init(params)
    for _ in range(2):
        updates, state = jax.jit(good.update)(params, state, params)
    assert np.all(np.asarray(updates) < 0)

    bad = optax.chain(optax.GradientTransformation(lambda p: optax.EmptyState(), sloppy), optax.adam(1e-3))
    with pytest.raises(jax.dtypes.TypePromotionError):
        bad.update(params, bad.init(params), params)


def test_ranks_are_not_promoted() -> None:
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.ones((3, 3)) + jnp.ones(3)


def test_warnings_are_errors() -> None:
    with pytest.raises(UserWarning, match="any"):
        warnings.warn("any", stacklevel=1)


def test_rng_is_the_same_in_every_test(rng: np.random.Generator) -> None:
    assert rng.integers(1 << 30) == np.random.default_rng(0).integers(1 << 30)
