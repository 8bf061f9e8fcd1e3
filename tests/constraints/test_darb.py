import itertools
import json
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize
import scipy.stats

import compressx as cx
from compressx.constraints import (
    balanced_block_max,
    bank_balanced,
    block_max,
    darb,
    from_spec,
    unstructured,
    violations,
)
from compressx.constraints.darb import row_density, row_sensitivity
from tests.thinning import some


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def uneven(rows, length, seed=0):
    """A matrix whose rows have widely different scales, so that magnitude pruning leaves different densities."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(rows, 1)))
    return jnp.asarray(rng.normal(size=(rows, length)) * scale, jnp.float32)


def jitted(constraint):
    return jax.jit(lambda w: constraint.project(w, constraint.init(w)))


def projected(constraint, w):
    return np.asarray(jitted(constraint)(w))


def by_loops(rows, size_of):
    """One weight a block, the first of the largest, by loops; rows first."""
    z = np.zeros_like(rows)
    for r, row in enumerate(rows):
        size = size_of(r)
        for start in range(0, len(row), size):
            best = start + int(np.argmax(np.abs(row[start : start + size])))
            z[r, best] = row[best]
    return z


# --- block max


@pytest.mark.parametrize("size", [1, 2, 4, 7, 16, 40])
@pytest.mark.parametrize("shape", [(5, 30), (3, 3, 4, 30)])
def test_block_max_keeps_the_largest_of_every_block(shape, size):
    w = normal(*shape)
    m = np.asarray(w).reshape(-1, 30)
    outputs = projected(block_max(size), w).reshape(-1, 30)
    np.testing.assert_array_equal(outputs, by_loops(m, lambda r: size))
    assert (np.count_nonzero(outputs, axis=1) == math.ceil(30 / size)).all()
    inputs = projected(block_max(size, axis="inputs"), w).reshape(-1, 30)
    np.testing.assert_array_equal(inputs, by_loops(m.T.copy(), lambda r: size).T)


def test_block_max_is_the_nearest_point():
    w = normal(2, 5)
    m = np.asarray(w, np.float64)
    z = projected(block_max(3), w)
    best = sum(
        (row**2).sum() - max(row[i] ** 2 + row[j] ** 2 for i, j in itertools.product(range(3), range(3, 5)))
        for row in m
    )
    np.testing.assert_allclose(((m - z) ** 2).sum(), best, rtol=1e-6)


def test_a_ragged_tail_raises_the_density():
    z = projected(block_max(14), normal(4, 1024))
    assert (np.count_nonzero(z, axis=1) == 74).all()


def test_kept_energy_lies_between_random_places_and_irregular_pruning(rng):
    w = np.asarray(normal(64, 256))
    size = 8
    kept = (projected(block_max(size), jnp.asarray(w)) ** 2).sum()
    irregular = (projected(unstructured(1 / size), jnp.asarray(w)) ** 2).sum()
    chance = (w.reshape(64, -1, size)[..., 0] ** 2).sum()
    assert 3 * chance < kept < irregular


# --- DARB


def test_darb_block_sizes_follow_the_row_densities():
    w = uneven(300, 256)
    constraint = darb(0.1)
    places = np.asarray(constraint.init(w))
    sizes = np.array(constraint.spec["allowed"])[places]
    share = np.asarray(row_density(w, 0.1))
    assert scipy.stats.spearmanr(sizes, 1 / np.maximum(share, 0.5 / 256)).statistic > 0.95
    z = projected(constraint, w)
    np.testing.assert_array_equal(z, by_loops(np.asarray(w), lambda r: sizes[r]))
    assert abs(np.count_nonzero(z) / (0.1 * w.size) - 1) < 0.01


def test_adaptive_sizes_keep_more_than_the_controls():
    w = uneven(200, 128)
    energy, sizes = {}, {}
    for assignment in ("adaptive", "permuted", "inverse", "uniform"):
        constraint = darb(0.1, assignment=assignment)
        sizes[assignment] = np.asarray(constraint.init(w))
        energy[assignment] = (projected(constraint, w) ** 2).sum()
    assert energy["adaptive"] > max(energy["permuted"], energy["uniform"]) > energy["inverse"]
    for other in ("permuted", "inverse"):
        np.testing.assert_array_equal(np.sort(sizes[other]), np.sort(sizes["adaptive"]))
        assert (sizes[other] != sizes["adaptive"]).any()
    assert len(np.unique(sizes["uniform"])) <= 2


def test_row_density_is_the_share_magnitude_pruning_leaves():
    w = uneven(20, 30)
    mask = np.abs(np.asarray(w)) >= np.sort(np.abs(np.asarray(w)).reshape(-1))[-120]
    np.testing.assert_allclose(row_density(w, 0.2), mask.mean(1), rtol=1e-6)
    np.testing.assert_allclose(row_density(w, 0.2, "inputs"), mask.mean(0), rtol=1e-6)
    np.testing.assert_allclose(row_density((w, w), 0.2), mask.mean(1), rtol=1e-6)


def test_refresh_chooses_the_sizes_anew():
    constraint = darb(0.1)
    first, second = uneven(50, 64), uneven(50, 64, seed=1)
    np.testing.assert_array_equal(constraint.refresh(second, constraint.init(first)), constraint.init(second))


def test_sizes_learnt_in_admm_are_those_it_is_hardened_with():
    params = {"w": uneven(60, 64)}
    rules = [("w", darb(0.1))]
    tx = optax.chain(cx.admm(rules, rho=0.1, every=1, refresh_every=2), optax.sgd(0.1))
    state = tx.init(params)
    moved = {"w": uneven(60, 64, seed=1)}
    step = jax.jit(lambda p, s: tx.update(jax.tree.map(jnp.zeros_like, p), s, p)[1])
    for _ in range(2):
        state = step(moved, state)
    found = cx.find_admm_state(state)
    sizes = np.array(rules[0][1].spec["allowed"])[np.asarray(found.structure["w"][0])]
    hard = cx.harden(moved, rules, found).params
    np.testing.assert_array_equal(hard["w"], by_loops(np.asarray(moved["w"]), lambda r: sizes[r]))
    assert (np.asarray(found.structure["w"][0]) != np.asarray(rules[0][1].init(params["w"]))).any()


def test_row_sensitivity_prunes_one_group_at_a_time():
    w = uneven(20, 16)
    density, lost = row_sensitivity(lambda z: jnp.sum(jnp.square(z - w)), w, 0.25, groups=4)
    share = np.asarray(row_density(w, 0.25))
    order = np.argsort(share, kind="stable").reshape(4, 5)
    np.testing.assert_allclose(density, share[order].mean(1), rtol=1e-6)
    small = np.sort(np.asarray(w) ** 2, axis=1)[:, :12].sum(1)
    np.testing.assert_allclose(lost, small[order].sum(1), rtol=1e-5)
    with pytest.raises(ValueError, match="20 rows"):
        row_sensitivity(jnp.sum, w, 0.25, groups=21)


# --- balanced block max and banks


@pytest.mark.parametrize(("density", "kept"), [(0.125, 512), (0.0625, 256), (0.05, 200)])
def test_balanced_block_max_has_the_papers_counts(density, kept):
    z = projected(balanced_block_max(density), normal(3, 4096))
    for row in z.reshape(3, 512, 8):
        assert (row != 0).sum(1).max() == 1
        assert np.count_nonzero(row) == kept and ((row != 0).sum(0) == kept // 8).all()


def test_balanced_block_max_is_the_greedy_choice_and_near_the_best():
    for seed in range(5):
        w = np.asarray(normal(2, 46, seed=seed))
        z = projected(balanced_block_max(0.17, size=4), jnp.asarray(w))  # 12 blocks (the last of 2), 1 or 2 a place
        room = math.floor(0.17 * 46 / 4)
        for row, got in zip(w, z, strict=True):
            blocks, places, chosen = set(), [0] * 4, np.zeros(46, np.float32)
            for i in sorted(range(46), key=lambda i: (-abs(row[i]), i)):
                if i // 4 not in blocks and places[i % 4] < room:
                    blocks.add(i // 4)
                    places[i % 4] += 1
                    chosen[i] = row[i]
            np.testing.assert_array_equal(got, chosen)
            energy = np.zeros((12, 4 * room))
            for i in range(46):
                energy[i // 4, (i % 4) * room : (i % 4 + 1) * room] = row[i] ** 2
            best = energy[scipy.optimize.linear_sum_assignment(energy, maximize=True)].sum()
            assert 0.9 * best < (got**2).sum() <= best * (1 + 1e-6)


def test_bank_balanced_keeps_as_many_in_every_bank():
    w = normal(6, 70)
    z = projected(bank_balanced(0.25, 16), w)
    for start, stop, k in [(0, 16, 4), (16, 32, 4), (32, 48, 4), (48, 64, 4), (64, 70, 2)]:
        for row, got in zip(np.asarray(w)[:, start:stop], z[:, start:stop], strict=True):
            assert set(np.flatnonzero(got)) == set(np.argsort(-np.abs(row))[:k])
    assert np.count_nonzero(projected(bank_balanced(0.125, 8), normal(2, 9))) == 4  # a tail of one keeps it


# --- all of them

EVERY = {
    "block_max": block_max(3),
    "block_max-inputs": block_max(4, axis="inputs"),
    "darb": darb(0.3, allowed=(1, 2, 4, 8)),
    "darb-inputs": darb(0.4, axis="inputs", assignment="permuted"),
    "balanced": balanced_block_max(0.5, size=2),
    "banks": bank_balanced(0.5, 4, axis="inputs"),
}


def rounds(constraint):
    def run(w):
        structure = constraint.init(w)
        z = constraint.project(w, structure)
        piece = constraint.freeze(z, structure)
        return z, constraint.project(z, structure), constraint.retract(z, piece), violations(constraint, z, structure)

    return jax.jit(run)


ROUNDS = {name: rounds(constraint) for name, constraint in EVERY.items()}


@pytest.mark.parametrize("name", EVERY)
@hypothesis.given(
    values=st.lists(st.sampled_from([0.0, 0.0, 2.0**-100, 1.0, -1.0, 2.0, 1e6]), min_size=77, max_size=77)
)
def test_projection_is_idempotent_and_feasible_bit_for_bit(name, values):
    w = np.array(values, np.float32).reshape(11, 7)
    z, again, held, outside = map(np.asarray, ROUNDS[name](jnp.asarray(w)))
    np.testing.assert_array_equal(again, z)
    np.testing.assert_array_equal(held, z)
    assert outside == 0 and (z[z != 0] == w[z != 0]).all()


@pytest.mark.parametrize("name", some(("block_max-inputs", "darb-inputs"), EVERY))
def test_jit_vmap_and_specs_agree(name):
    constraint = EVERY[name]
    again = from_spec(json.loads(json.dumps(dict(constraint.spec))))
    ws = normal(2, 11, 7)
    eager = np.stack([constraint.project(w, constraint.init(w)) for w in ws])
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda w: again.project(w, again.init(w))))(ws), eager)
    assert again.spec == constraint.spec


def test_gates_together_form_one_row():
    params = [normal(5, 6), normal(5, 9, seed=1)]
    hard = cx.harden(params, [(".*", block_max(4, scope="rule"))], fresh=True).params
    expected = by_loops(np.concatenate(params, axis=1), lambda r: 4)
    np.testing.assert_array_equal(np.concatenate(hard, axis=1), expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: block_max(0), "size=0"),
        (lambda: block_max(2, axis="rows"), "outputs"),
        (lambda: darb(0.1, allowed=(4, 2)), "ascend"),
        (lambda: darb(0.1, assignment="random"), "adaptive"),
        (lambda: darb(1.5), r"\(0, 1\]"),
        (lambda: bank_balanced(0.01, 8), "keeps none"),
        (lambda: bank_balanced(0.5, 0), "bank=0"),
        (lambda: cx.resolve([("w", darb(0.01, allowed=(1, 2, 4)))], {"w": normal(8, 8)}), r"w \(8, 8\).*add larger"),
        (lambda: cx.resolve([("w", balanced_block_max(0.3))], {"w": normal(8, 64)}), "number of blocks"),
        (lambda: cx.resolve([("w", block_max(2))], {"w": normal(8)}), "2 axes"),
    ],
)
def test_impossible_arguments_say_why(make, message):
    with pytest.raises(ValueError, match=message):
        make()
