"""Seams: fusion, structures between phases, NaN, reports, the ends of the number range, odd arrays.

Some 90,000 ordinary cases of projections, ADMM, formats, compaction and resume were exact against oracles of another
make; what was wrong lay between the parts. Each case is a small input that was wrong, and stands for its kind.
"""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.cases import api
from tests.cases.support import normal

needs_native = pytest.mark.skipif(not api.native_available(), reason="no compiler, so no native kernels")


# Fusion: what the graph of a network folds into a convolution must be the same function.


def test_fusion_minimum_after_an_addition() -> None:
    """`min(relu(conv) + x, 6)` is not `relu6(conv) + x`: the addition stands between the two."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            return jnp.minimum(nn.relu(nn.Conv(3, (1, 1))(x)) + x, 6.0)

    x = jnp.full((1, 4, 4, 3), 5.0)
    v = jax.tree.map(lambda a: jnp.full_like(a, 0.5), Network().init(jax.random.key(0), x))
    got = float(api.compile(Network(), v)(x)[0, 0, 0, 0])
    right = float(Network().apply(v, x)[0, 0, 0, 0])
    assert got == right, f"compiled {got}, right {right}"


# Structures between phases: choosing anew from hardened weights may choose another set.


def _kept_by_nothing(constraint: Any, shape: tuple[int, ...]) -> None:
    rules = [("k", constraint)]
    hard = api.harden({"k": normal(*shape)}, rules)
    try:
        tx = api.retrain(rules)
        s = tx.init(hard)
    except api.ConstraintViolation:
        return  # refusing by name is right too
    u, s = tx.update(jax.tree.map(jnp.zeros_like, hard), s, hard)  # a step of nothing
    before, after = (int((a != 0).sum()) for a in (hard["k"], optax.apply_updates(hard, u)["k"]))
    assert before == after, f"{before} weights, {after} after a step of nothing"


def test_structures_pattern_aligned() -> None:
    _kept_by_nothing(api.pattern([[1, 3, 4, 5], [0, 1, 3, 4], [4, 5, 7, 8]], aligned=4), (3, 3, 8, 16))


def test_structures_pattern_and_unstructured() -> None:
    _kept_by_nothing(api.pattern(k=8) & api.unstructured(0.2), (3, 3, 8, 16))


def test_structures_saved(tmp_path: Path) -> None:
    """What saving writes, verify accepts; or saving refuses."""
    rules, path = [("k", api.pattern(k=8) & api.unstructured(0.2))], tmp_path / "saved.safetensors"
    hard = api.harden({"k": normal(3, 3, 8, 16)}, rules)
    try:
        api.save(path, hard, rules)
    except api.ConstraintViolation:
        return
    assert api.verify(path), "verify refuses what was saved"


# NaN: a broken weight or sensor must be seen.


class Relu(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.relu(nn.Conv(4, (3, 3))(x))


@needs_native
def test_nan_in_the_input() -> None:
    x = jnp.ones((1, 8, 8, 3))
    v = Relu().init(jax.random.key(0), x)
    x = x.at[0, 3, 3, 0].set(jnp.nan)
    got = int(jnp.isnan(api.compile(Relu(), v)(x)).sum())
    assert got == 36, f"{got} NaN, right 36"


@needs_native
def test_nan_in_a_weight() -> None:
    x = jnp.ones((1, 8, 8, 3))
    v = Relu().init(jax.random.key(0), x)
    v["params"]["Conv_0"]["kernel"] = v["params"]["Conv_0"]["kernel"].at[0, 0, 0, 0].set(jnp.nan)
    got = int(jnp.isnan(api.compile(Relu(), v)(x)).sum())
    assert got >= 49, f"{got} NaN, right 49 or more"


# Reports: every convolution has a line.


def test_report_of_every_convolution() -> None:
    class Network(nn.Module):
        inner: nn.Module

        @nn.compact
        def __call__(self, x, train=False):
            return self.inner(x)

    x, lost = jnp.ones((1, 8, 8, 3)), []
    for m in (nn.Conv(8, (3, 3), kernel_dilation=2), nn.ConvTranspose(8, (3, 3), strides=(2, 2))):
        f = api.compile(Network(m), Network(m).init(jax.random.key(0), x))
        f(x)
        lines = api.layer_lines(f, x)
        if len(lines) != 1 or "xla" not in lines[0].lower():
            lost.append(type(m).__name__)
    assert not lost, f"no line for {lost}, which stay with XLA"


# The ends of the number range.


def test_range_of_energies_below() -> None:
    w = jnp.zeros((4, 4)).at[:, 3].set(1e-20)
    tried = ((api.filters(keep=1), w), (api.columns(keep=1), w.T), (api.channels(keep=1), w.T))
    lost = [api.kind(c) for c, x in tried if not bool((api.project(c, x) == x).all())]
    assert not lost, f"a point of the set is set to 0 by {lost}"


def test_range_of_energies_above() -> None:
    w = jnp.full((4, 4), 2e19).at[:, 3].set(3e19)
    z = api.project(api.filters(keep=1), w)
    assert bool((z[:, 3] != 0).all()), "the smaller filter is kept: the squares are infinite"


def test_range_in_the_frozen_blocks() -> None:
    c = api.prune_blocks((2, 2), 0.5)
    z = api.project(c, jnp.ones((16, 16)) * 1e-24)
    kept, frozen = int((z != 0).sum()), int((api.retract_to_frozen(c, z) != 0).sum())
    assert frozen == kept > 0, f"{kept} weights, {frozen} in the frozen blocks"


def test_denormals_are_weights_of_a_file(tmp_path: Path) -> None:
    """A file's bits are what is verified: 15 denormals beside one weight are 15 too many."""
    w = np.full((4, 4), 1e-40, np.float32)
    w[0, 0] = 1
    path = tmp_path / "denormal.safetensors"
    try:
        api.save(path, {"k": w}, [("k", api.unstructured(keep=1))])
    except api.ConstraintViolation:
        return
    assert not api.verify(path), "verify says ok"


def test_darb_reaches_its_rate() -> None:
    """A hundred rows are within 1 % of the density asked for."""
    worst = 0.0
    for seed in range(6):
        r = np.random.default_rng(seed)
        w = r.standard_normal((100, 256)) * np.exp(r.standard_normal((100, 1)))
        z = np.asarray(api.harden({"k": jnp.asarray(w, jnp.float32)}, [("k", api.darb(0.03))])["k"])
        worst = max(worst, abs((z != 0).mean() / 0.03 - 1))
    assert worst <= 0.01, f"{100 * worst:.1f} % off"


# Arrays of other kinds.


def test_big_endian_leaf(tmp_path: Path) -> None:
    w, path = np.arange(6, dtype=">f4").reshape(2, 3), tmp_path / "big.safetensors"
    try:
        api.save(path, {"w": w})
    except ValueError:
        return
    assert (np.asarray(api.load(path)["w"]) == w).all()


def test_empty_leaves() -> None:
    bad = []
    for c in (
        api.block((2, 2), 0.5),
        api.bsp(0.5, 0.5),
        api.darb(0.5),
        api.bank_balanced(0.5, bank=4),
        api.polarize(2),
        api.quantize(4),
    ):
        try:
            api.harden({"layer7": jnp.zeros((4, 0))}, [("layer7", c)])
        except ValueError as e:
            if "layer7" not in str(e):
                bad.append((api.kind(c), str(e)[:60]))
        except Exception as e:
            bad.append((api.kind(c), f"{type(e).__name__}: {e}"[:60]))
    assert not bad, f"{bad}"


def test_compaction_of_stack_and_tile() -> None:
    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            y = nn.Conv(8, (3, 3))(x)
            y = jnp.stack([y, 2 * y]).sum(0)
            return nn.Dense(4)(jnp.tile(nn.Conv(8, (3, 3))(nn.relu(y)).mean((1, 2)), (1, 2)))

    x = normal(1, 8, 8, 3)
    v = Network().init(jax.random.key(0), x)
    hard = api.harden(v, [(r".*Conv_0/kernel", api.filters(0.5))])
    small = api.compact(Network(), hard, x)
    assert small.variables["params"]["Conv_0"]["kernel"].shape[-1] == 4
    assert np.allclose(small.apply(small.variables, x), Network().apply(hard, x), atol=1e-5)
