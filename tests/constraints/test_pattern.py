import itertools
import json

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressx as cx
from compressx import constraints
from compressx.constraints import (
    connectivity,
    from_spec,
    library,
    pattern,
    pattern_connectivity,
    select_library,
    violations,
)
from compressx.constraints.pattern import assign
from compressx.constraints.select import energy
from tests.constraints.test_contract import mostly_slow

CENTRE = 4


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def kernels(w):
    """[cin, cout, taps], written apart from the view."""
    w = np.asarray(w)
    kh, kw, cin, cout = w.shape
    return np.array([[w[:, :, i, o].reshape(kh * kw) for o in range(cout)] for i in range(cin)])


def projected(constraint, w):
    return np.asarray(constraint.project(w, constraint.init(w)))


# --- libraries


def test_enumerations_have_the_papers_sizes_and_ranks():
    everything = library.enumerate_masks()
    natural = library.enumerate_masks(natural=True)
    assert everything.shape == (126, 9) and natural.shape == (56, 9)
    assert natural[:, CENTRE].all() and (everything.sum(1) == 4).all()
    # ranks of the papers' code: lexicographic by the five pruned taps, from 1
    pruned = [set(z) for z in itertools.combinations(range(9), 5)]
    for rank, kept in zip((3, 12, 65, 120, 1, 14, 44, 53, 125, 6, 126, 10), library.NAMED["group"], strict=True):
        assert pruned[rank - 1] == set(range(9)) - set(kept)
        assert np.flatnonzero(everything[126 - rank]).tolist() == list(kept)


def test_named_libraries():
    assert {n: len(p) for n, p in library.NAMED.items()} == {"scp": 4, "elog": 8, "group": 12}
    plus = {1, 3, 4, 5, 7}
    assert {frozenset(p) for p in library.NAMED["scp"]} == {frozenset(plus - {a}) for a in plus - {CENTRE}}
    assert all(CENTRE in p for p in library.NAMED["elog"])
    assert [CENTRE in p for p in library.NAMED["group"]].count(False) == 3


def test_interpolated_scp_masks_converge_to_the_elog_ratio(rng):
    masks = library.to_masks(library.NAMED["scp"], 4, (3, 3))
    n = 8
    product = masks[rng.integers(0, 4, (200_000, n))].prod(axis=1).mean(axis=0)
    assert product[CENTRE] == 1
    np.testing.assert_allclose(product[[1, 3, 5, 7]], 0.75**n, rtol=0.05)
    assert not product[[0, 2, 6, 8]].any()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": (1, 1)}, r"1x1 kernel has no patterns.*connectivity"),
        ({"entries": 9}, "1..8"),
        ({"kernel": (2, 2), "entries": 2}, "has none"),
        ({"library": "all", "kernel": (5, 5)}, "12650.*select_library"),
        ({"library": "elog", "kernel": (5, 5)}, "3x3"),
        ({"library": "gauss"}, "unknown library"),
        ({"k": 57}, "56 patterns"),
        ({"library": "free", "k": 3}, "leave out"),
        ({"library": [[0, 1, 2, 9]]}, "0..8"),
        ({"library": [[0, 1, 2]]}, "4 different taps"),
        ({"library": [[0, 1, 2, 3], [3, 2, 1, 0]]}, "twice"),
        ({"library": []}, "empty"),
        ({"scope": "layer"}, "scope"),
        ({"aligned": "filter"}, "aligned"),
        ({"shrink": 0.5}, "needs k"),
        ({"k": 8, "shrink": 1.5}, r"\(0, 1\)"),
        ({"k": 8, "shrink": [12, 24, 8]}, "descend"),
        ({"k": 8, "shrink": [24, 12]}, "end in k=8"),
    ],
)
def test_impossible_arguments_say_why(arguments, message):
    with pytest.raises(ValueError, match=message):
        pattern(**arguments)


def test_leaves_that_do_not_fit_are_named():
    params = {"a": normal(3, 3, 2, 2), "b": normal(1, 1, 2, 2), "c": normal(4, 5)}
    for path, text in (("b", r"b \(1, 1, 2, 2\).*connectivity"), ("c", r"c \(4, 5\)")):
        with pytest.raises(ValueError, match=text):
            cx.resolve([(path, pattern("scp"))], params)
    with pytest.raises(ValueError, match="kernel view"):
        cx.resolve([("c", connectivity(0.5))], params)


# --- the pattern projection


def brute_pattern(x, masks):
    """Nearest feasible kernel by trying every pattern, in float64."""
    x = x.astype(np.float64)
    lost = ((x[None] * ~masks) ** 2).sum(-1)
    best = int(np.argmin(lost))
    return x * masks[best], lost[best]


@pytest.mark.parametrize("name", ["natural", "all", "scp", "elog", "group", "free"])
def test_pattern_is_the_nearest_point(name):
    w = normal(3, 3, 4, 5)
    constraint = pattern(name)
    z = kernels(projected(constraint, w))
    masks = library.enumerate_masks() if name in ("all", "free") else np.asarray(constraint.init(w).masks)
    for got, x in zip(z.reshape(-1, 9), kernels(w).reshape(-1, 9), strict=True):
        np.testing.assert_array_equal(got, brute_pattern(x, masks)[0].astype(np.float32))
    assert ((z != 0).sum(-1) == 4).all()
    if name in ("natural", "scp", "elog"):
        assert (z[..., CENTRE] != 0).all()


integers = hnp.arrays(np.float32, (3, 3, 2, 3), elements=st.integers(-3, 3).map(float))
anything = hnp.arrays(
    np.float32,
    (3, 3, 2, 3),
    elements=st.floats(-(2.0**50), 2.0**50, width=32, allow_subnormal=False) | st.sampled_from([0.0, 2.0**-100]),
)


def jitted(constraint):
    return jax.jit(lambda w: constraint.project(w, constraint.init(w)))


TIES = {name: jitted(pattern(name)) for name in ("natural", "all", "group", "free")}


@pytest.mark.parametrize("name", TIES)
@hypothesis.given(w=integers)
def test_ties_go_to_the_earlier_pattern(name, w):
    masks = library.enumerate_masks() if name == "free" else np.asarray(pattern(name).init(jnp.asarray(w)).masks)
    z = kernels(TIES[name](jnp.asarray(w)))
    for got, x in zip(z.reshape(-1, 9), kernels(w).reshape(-1, 9), strict=True):
        np.testing.assert_array_equal(got, brute_pattern(x, masks)[0])


EVERY = {
    "natural8": pattern("natural", k=8),
    "all": pattern("all"),
    "free": pattern("free"),
    "channel": pattern("elog", aligned="channel"),
    "groups": pattern("elog", aligned=2),
    "connectivity": connectivity(0.4),
    "balanced": connectivity(keep=1, balance="filter"),
    "aligned": connectivity(0.5, aligned=2),
    "both": pattern_connectivity(keep=4, k=8),
    "both-balanced": pattern_connectivity(0.5, balance="filter", library="free"),
    "both-aligned": pattern_connectivity(0.5, library="scp", aligned=2),
}


def rounds(constraint):
    """Jitted: the projection, its projection, its retraction to its own piece, and its violations."""

    def run(w):
        structure = constraint.init(w)
        z = constraint.project(w, structure)
        piece = constraint.freeze(z, structure)
        return z, constraint.project(z, structure), constraint.retract(z, piece), violations(constraint, z, structure)

    return jax.jit(run)


ROUNDS = {name: rounds(constraint) for name, constraint in EVERY.items()}


@pytest.mark.parametrize("name", EVERY)
@hypothesis.settings(max_examples=25)
@hypothesis.given(w=anything)
def test_projection_is_idempotent_and_feasible_bit_for_bit(name, w):
    z, again, held, outside = map(np.asarray, ROUNDS[name](jnp.asarray(w)))
    np.testing.assert_array_equal(again, z)
    np.testing.assert_array_equal(held, z)
    assert outside == 0
    assert (z[z != 0] == w[z != 0]).all()


@pytest.mark.parametrize("name", EVERY)
def test_specs_are_the_constraint(name):
    constraint = EVERY[name]
    again = from_spec(json.loads(json.dumps(dict(constraint.spec))))
    assert again.spec == constraint.spec and constraint.spec["kind"] in str(constraint)
    assert len(str(constraint)) < 200  # a long library is only counted


@mostly_slow(("channel",), tuple(EVERY))
def test_jit_vmap_and_specs_agree(name):
    constraint = EVERY[name]
    again = from_spec(json.loads(json.dumps(dict(constraint.spec))))
    ws = normal(2, 3, 3, 4, 5)
    eager = np.stack([projected(constraint, w) for w in ws])
    np.testing.assert_array_equal(eager, np.stack([projected(again, w) for w in ws]))
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda w: constraint.project(w, constraint.init(w))))(ws), eager)


def test_chunked_search_agrees_with_the_search_at_once(monkeypatch):
    w = normal(3, 3, 7, 11)
    whole = projected(pattern("all"), w)
    monkeypatch.setattr(library, "_CHUNK", 126 * 10)
    np.testing.assert_array_equal(projected(pattern("all"), w), whole)


def test_all_zero_kernels_are_never_assigned():
    w = normal(3, 3, 3, 4).at[:, :, 1, 2].set(0.0).at[:, :, 0, 0].set(0.0)
    constraint = pattern("elog")
    structure = constraint.init(w)
    ids = np.asarray(assign(w, structure))
    assert ids[1, 2] == ids[0, 0] == -1 and (ids >= 0).sum() == 10
    assert int(library.histogram(w, np.asarray(structure.masks)).sum()) == 10
    z = constraint.project(w, structure)
    piece = kernels(constraint.freeze(z, structure))
    assert not piece[1, 2].any() and (piece.sum(-1)[ids >= 0] == 4).all()


def test_a_kept_zero_may_move_again_but_a_pruned_one_may_not():
    w = np.zeros((3, 3, 1, 1), np.float32)
    w[1, 1], w[1, 2], w[2, 1] = 1, 2, 3  # covered by {4, 5, 7, 8}, tap 8 is zero
    constraint = pattern([[4, 5, 7, 8]])
    piece = np.asarray(constraint.freeze(jnp.asarray(w), constraint.init(jnp.asarray(w))))
    assert np.flatnonzero(piece.reshape(9)).tolist() == [4, 5, 7, 8]


def test_low_precision_leaves_keep_their_dtype():
    w = normal(3, 3, 4, 4).astype(jnp.bfloat16)
    constraint = pattern_connectivity(0.5, library="elog")
    z = constraint.project(w, constraint.init(w))
    assert z.dtype == jnp.bfloat16 and int((z != 0).sum()) == 4 * 8


# --- choosing a library


def naive_natural(w):
    """PatDNN's rule by loops: the centre and the three largest of the others."""
    names = []
    for x in kernels(w).reshape(-1, 9):
        others = sorted((t for t in range(9) if t != CENTRE), key=lambda t: (-abs(x[t]), t))
        names.append(tuple(sorted([CENTRE, *others[:3]])))
    return names


def test_the_k_most_frequent_natural_patterns_are_chosen():
    w = normal(3, 3, 20, 20)
    names = naive_natural(w)
    masks = library.enumerate_masks(natural=True)
    counts = np.asarray(library.histogram(w, masks))
    listed = [names.count(tuple(p)) for p in library.to_taps(masks)]
    assert counts.tolist() == listed and counts.sum() == 400
    expected = sorted(set(names), key=lambda p: (-names.count(p), p))[:8]
    structure = pattern("natural", k=8).init(w)
    assert [tuple(p) for p in library.to_taps(structure.masks)] == expected
    assert [tuple(p) for p in select_library({"c": w}, "c", 8)] == expected
    assert library.coverage(counts, 56) == 1 and library.coverage(counts, 8) == sum(sorted(listed)[-8:]) / 400
    assert 0 < library.entropy(counts) <= np.log2(56)
    assert library.entropy([5, 0]) == 0 and library.entropy([3, 3, 3, 3]) == 2


def test_one_library_for_the_network():
    params = {"a": {"kernel": normal(3, 3, 8, 9)}, "b": {"kernel": normal(3, 3, 5, 6, seed=1)}, "p": normal(1, 1, 4, 4)}
    rule = r"[ab]/kernel"
    constraint = pattern("natural", k=8, scope="rule")
    ws = (params["a"]["kernel"], params["b"]["kernel"])
    structure = constraint.init(ws)
    assert library.to_taps(structure.masks) == select_library(params, rule, 8)
    for each, w in zip(constraint.project(ws, structure), ws, strict=True):
        np.testing.assert_array_equal(each, projected(pattern(select_library(params, rule, 8)), w))
    hard = cx.harden(params, [(rule, constraint)], fresh=True).params
    used = {tuple(np.flatnonzero(x)) for leaf in (hard["a"], hard["b"]) for x in kernels(leaf["kernel"]).reshape(-1, 9)}
    assert len(used) <= 8
    with pytest.raises(ValueError, match="p: .*1x1"):
        select_library(params, ".*", 8)
    with pytest.raises(ValueError, match="no path"):
        select_library(params, "q", 8)


def test_other_kernel_sizes_choose_from_the_masks_that_occur():
    w = normal(5, 5, 6, 7)
    chosen = select_library([w], "0", 6, "all", entries=6, kernel=(5, 5))
    top = [tuple(sorted(sorted(range(25), key=lambda t: (-abs(x[t]), t))[:6])) for x in kernels(w).reshape(-1, 25)]
    assert [tuple(p) for p in chosen] == sorted(set(top), key=lambda p: (-top.count(p), p))[:6]
    z = projected(pattern(chosen, entries=6, kernel=(5, 5)), w)
    assert (kernels(z) != 0).sum(-1).max() <= 6
    free = kernels(projected(pattern("free", entries=6, kernel=(5, 5)), w)).reshape(-1, 25)
    assert [tuple(np.flatnonzero(x)) for x in free] == top
    with pytest.raises(ValueError, match="different ones"):
        select_library([w], "0", 43, "all", entries=6, kernel=(5, 5))


@pytest.mark.parametrize(
    ("shrink", "sizes"), [(0.5, [126, 63, 31, 15, 8, 8]), ([56, 24, 12, 8], [126, 56, 24, 12, 8, 8])]
)
def test_refresh_drops_the_rarest_patterns(shrink, sizes):
    w = normal(3, 3, 30, 30)
    constraint = pattern("all", k=8, shrink=shrink)
    s = constraint.init(w)
    for size in sizes[1:]:
        used = library.use([energy(jnp.asarray(kernels(w)))], s.masks, s.live)
        counts = np.where(np.asarray(s.live), np.asarray(used), -1)
        best = np.argsort(-counts, kind="stable")[:size]
        s = jax.jit(constraint.refresh)(w, s)
        assert np.flatnonzero(s.live).tolist() == sorted(best.tolist())
    used = set(np.unique(assign(constraint.project(w, s), s)).tolist())
    assert used <= set(np.flatnonzero(s.live).tolist())


def test_extraction_inside_admm_ends_with_one_library_for_the_network():
    params = {"a": normal(3, 3, 4, 6), "b": normal(3, 3, 6, 4, seed=1)}
    rules = [(".*", pattern("all", k=8, scope="rule", shrink=[40, 12, 8]))]
    tx = optax.chain(cx.admm(rules, rho=0.1, every=2, refresh_every=2), optax.sgd(0.1))
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(16):
        params, state = step(params, state)
    found = cx.find_admm_state(state)
    assert int(found.structure[".*"][0].live.sum()) == 8
    hard = cx.harden(params, rules, found).params
    masks = {tuple(np.flatnonzero(x)) for w in hard.values() for x in kernels(w).reshape(-1, 9)}
    assert len(masks) <= 8


# --- connectivity and the joint projection


def test_connectivity_keeps_the_exact_number():
    w = normal(3, 3, 16, 24)
    alive = (kernels(projected(connectivity(1 / 3.6), w)) != 0).any(-1)
    assert alive.sum() == round(16 * 24 / 3.6)
    energy = (kernels(w).astype(np.float64) ** 2).sum(-1)
    assert energy[alive].min() > energy[~alive].max()
    balanced = (kernels(projected(connectivity(0.25, balance="filter"), w)) != 0).any(-1)
    assert (balanced.sum(0) == 4).all()
    for o in range(24):
        assert energy[balanced[:, o], o].min() > energy[~balanced[:, o], o].max()
    one = projected(connectivity(keep=7), normal(1, 1, 5, 6))
    assert (one != 0).sum() == 7


def test_connectivity_ties_are_exact():
    w = jnp.ones((3, 3, 4, 5))
    alive = (kernels(projected(connectivity(keep=7), w)) != 0).any(-1)
    assert np.flatnonzero(alive.reshape(-1)).tolist() == list(range(7))
    alive = (kernels(projected(connectivity(keep=2, balance="filter"), w)) != 0).any(-1)
    assert alive[:2].all() and not alive[2:].any()


@pytest.mark.parametrize("balance", ["layer", "filter"])
def test_joint_projection_is_the_nearest_point(balance):
    masks = library.to_masks(library.NAMED["elog"][2:6], 4, (3, 3))
    keep = 3 if balance == "layer" else 1
    constraint = pattern_connectivity(keep=keep, balance=balance, library=library.to_taps(masks))
    project = jitted(constraint)
    for seed in range(20):
        w = normal(3, 3, 3, 2, seed=seed)
        x = kernels(w).astype(np.float64)
        z = kernels(project(w))
        patterned = np.array([[brute_pattern(k, masks)[0] for k in row] for row in x])
        best = np.inf
        for chosen in itertools.product([False, True], repeat=6):
            live = np.array(chosen).reshape(3, 2)
            if (live.sum() if balance == "layer" else live.sum(0).max()) <= keep:
                best = min(best, ((x - patterned * live[..., None]) ** 2).sum())
        np.testing.assert_allclose(((x - z) ** 2).sum(), best, rtol=1e-6)


def test_the_order_of_scoring_matters_and_the_intersection_scores_after_the_pattern():
    joint, both = pattern_connectivity(0.3, library="scp"), pattern("scp") & connectivity(0.3)
    other = connectivity(0.3) & pattern("scp")
    w = normal(3, 3, 12, 12)
    np.testing.assert_array_equal(projected(joint, w), projected(both, w))
    assert (projected(joint, w) ** 2).sum() > (projected(other, w) ** 2).sum()
    assert from_spec(both.spec).spec == both.spec


def test_joint_rate_is_the_product_of_the_rates():
    w = normal(3, 3, 36, 40)
    z = projected(pattern_connectivity(1 / 3.6, k=8), w)
    assert (z != 0).sum() == 4 * round(36 * 40 / 3.6)
    np.testing.assert_allclose(w.size / (z != 0).sum(), 2.25 * 3.6)


# --- aligned variants


def test_channel_aligned_filters_share_one_pattern():
    w = normal(3, 3, 4, 6)
    z = kernels(projected(pattern("elog", aligned="channel"), w))
    masks = library.to_masks(library.NAMED["elog"], 4, (3, 3))
    for x, got in zip(kernels(w).astype(np.float64), z, strict=True):
        best = np.argmax((x**2).sum(0) @ masks.T)
        assert ((got != 0) == masks[best][None]).all()


@pytest.mark.parametrize("cout", [8, 10])
def test_grouped_filters_share_patterns_and_removed_channels(cout):
    w = normal(3, 3, 5, cout)
    x = kernels(w).astype(np.float64)
    order = np.argsort(-(x**2).sum((0, 2)), kind="stable")
    groups = [order[i : i + 4] for i in range(0, cout, 4)]
    constraint = pattern_connectivity(keep=2, balance="filter", library="elog", aligned=4)
    z = kernels(projected(constraint, w))
    masks = library.to_masks(library.NAMED["elog"], 4, (3, 3))
    for group in groups:
        scores = (x[:, group] ** 2).sum(1) @ masks.T
        kept = np.sort(np.argsort(-scores.max(1), kind="stable")[:2])
        assert np.flatnonzero((z[:, group] != 0).any((1, 2))).tolist() == kept.tolist()
        for i in kept:
            assert ((z[i, group] != 0) == masks[scores[i].argmax()][None]).all()


def test_kinds_are_registered():
    assert {"pattern", "connectivity", "pattern_connectivity"} <= set(constraints.KINDS)
