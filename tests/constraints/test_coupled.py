"""Coupled filters: the projection is the brute-force nearest point, and groups of a network give rules that fit it."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressx import harden
from compressx.compaction import channels, compact, coupled_rules, groups
from compressx.constraints.coupled import coupled_filters, expand, runs

# four units; the second leaf has units 1, 2 and one index outside the group, the third is a vector
MEMBERS = [(3, [(0, 4)]), (1, [(1, 2), (-1, 1)]), (0, [(2, 2), (0, 2)])]
SHAPES = [(2, 1, 2, 4), (3, 3), (4,)]


@given(st.lists(st.integers(-1, 6), max_size=20))
def test_runs_give_the_index_back(units: list[int]) -> None:
    assert expand(runs(np.array(units, int))).tolist() == units


@pytest.mark.parametrize("keep", [1, 2, 3, 4])
def test_the_projection_is_the_nearest_of_all_choices(keep, rng) -> None:
    leaves = tuple(jnp.asarray(rng.normal(size=s), jnp.float32) for s in SHAPES)
    constraint = coupled_filters(MEMBERS, keep=keep)
    got = constraint.project(leaves, ())
    best = np.inf
    for chosen in itertools.combinations(range(4), keep):
        distance = 0.0
        for w, (axis, run) in zip(leaves, MEMBERS, strict=True):
            out = [i for i, u in enumerate(expand(run)) if u >= 0 and u not in chosen]
            distance += float((np.take(np.asarray(w), out, axis) ** 2).sum())
        best = min(best, distance)
    moved = sum(float(((a - b) ** 2).sum()) for a, b in zip(got, leaves, strict=True))
    assert moved == pytest.approx(best, rel=1e-5, abs=1e-7)
    for a, b in zip(constraint.project(got, ()), got, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(got[1][:, 2], leaves[1][:, 2])  # outside the group


def test_members_that_do_not_fit_are_refused(rng) -> None:
    leaves = tuple(jnp.zeros(s) for s in SHAPES)
    with pytest.raises(ValueError, match="missing are \\[1\\]"):
        coupled_filters([(0, [(0, 1), (2, 1)])], 0.5)
    with pytest.raises(ValueError, match="3 members and the rule takes 2 leaves"):
        coupled_filters(MEMBERS, 0.5).project(leaves[:2], ())
    with pytest.raises(ValueError, match=r"4 channels on axis 3 does not fit shape \(2, 4\)"):
        coupled_filters(MEMBERS, 0.5).project((jnp.zeros((2, 4)), *leaves[1:]), ())


def test_columns_are_chosen_within_the_kept_filters(rng) -> None:
    leaves = (jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), jnp.asarray(rng.normal(size=(2, 4)), jnp.float32))
    got = coupled_filters([(1, [(0, 4)])] * 2, 0.5, column_density=0.5).project(leaves, ())
    alive = [np.asarray(w != 0) for w in got]
    assert alive[0].any(0).sum() == 2
    np.testing.assert_array_equal(alive[0].any(0), alive[1].any(0))
    assert [a.any(1).sum() for a in alive] == [3, 1]
    filters = alive[0].any(0)
    energy = (np.asarray(leaves[0])[:, filters] ** 2).sum(1)
    np.testing.assert_array_equal(np.flatnonzero(alive[0].any(1)), np.sort(np.argsort(-energy)[:3]))


class _Residual(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.Conv(6, (3, 3), name="a")(x))
        y = nn.relu(nn.Conv(4, (3, 3), name="b")(x))
        x = x + nn.Conv(6, (3, 3), name="c")(y)
        return nn.Dense(3, name="d")(nn.relu(x).mean((1, 2)))


def test_hardened_residual_networks_compact_to_the_density(rng) -> None:
    model, one = _Residual(), jnp.zeros((1, 5, 5, 2))
    spec = jax.eval_shape(model.init, jax.random.key(0), one)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s.shape), jnp.float32), spec)
    found = groups(channels(model, variables, one))
    assert [g.size for g in found] == [6, 4]
    hard = harden(variables, coupled_rules(found, 0.5, vectors=True), fresh=True).params
    small = compact(model, hard, one)
    assert small.variables["params"]["a"]["kernel"].shape == (3, 3, 2, 3)
    assert small.variables["params"]["b"]["kernel"].shape == (3, 3, 3, 2)
    assert small.variables["params"]["c"]["kernel"].shape == (3, 3, 2, 3)
    x = jnp.asarray(rng.normal(size=(2, 5, 5, 2)), jnp.float32)
    np.testing.assert_allclose(small.apply(small.variables, x), model.apply(hard, x), rtol=1e-5, atol=1e-4)
    assert len(coupled_rules(found, {1: 0.5})) == 1
    with pytest.raises(ValueError, match="vectors have no columns"):
        coupled_rules(found, 0.5, 0.5, vectors=True)
