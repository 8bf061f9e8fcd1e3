"""Real combinations: every set holds after hardening and retraining, and those that cannot be combined say why."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressx as cx
from compressx._admm_state import find_state
from compressx._harden import check, structures
from compressx.constraints.polarization import mixed_fragments, polarity

SHAPE = (3, 3, 4, 8)


def normal(seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(SHAPE), jnp.float32)


COMBINATIONS = {
    "FORMS": cx.filters(0.75) & cx.columns(0.75) & cx.polarize(4) & cx.quantize(8, grid="cells"),
    "FORMS on a crossbar": cx.crossbar_aware(0.5, 0.5, rows=12, cols=8, cells_per_weight=4)
    & cx.polarize(4, order="C", rule="energy")
    & cx.quantize(4, grid="cells"),
    "pruned, quantized": cx.unstructured(0.3) & cx.quantize(4),
    "pruned, clustered": cx.unstructured(0.3) & cx.quantize(3, grid="codebook"),
    "patterns, powers of two": cx.pattern_connectivity(entries=4, density=0.5)
    & cx.quantize(4, grid="power_of_two", per="channel"),
    "unified, quantized": cx.unify((4, 2), 0.6) & cx.quantize(4),
    "unified, clustered": cx.unify((4, 1), 0.6) & cx.quantize(3, grid="codebook", per="channel"),
    "all": cx.filters(0.75) & cx.polarize(4) & cx.unify((4, 1), 0.6, zeros="keep") & cx.quantize(5),
    "unified and pruned, quantized": (
        cx.unify_and_prune((4, 2), 0.3, 0.3, selection="exact") & cx.quantize(4, grid="cells")
    ),
}


QUICK = ("FORMS", "pruned, quantized", "patterns, powers of two", "unified, quantized")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in COMBINATIONS])
def test_every_set_holds_after_admm_hardening_and_retraining(name: str) -> None:
    """All sets together by ADMM on a quadratic; then zeros, signs, ties and integers survive 10 steps of retraining."""
    constraint = COMBINATIONS[name]
    rules, target = [("w", constraint)], normal(1)
    tx = optax.chain(cx.admm(rules, rho=0.5, every=2, refresh_every=2), optax.sgd(0.2))

    @jax.jit
    def admm_step(params: Any, state: Any) -> Any:
        updates, state = tx.update({"w": params["w"] - target}, state, params)
        return optax.apply_updates(params, updates), state

    params: Any = {"w": target}
    state = tx.init(params)
    for _ in range(16):
        params, state = admm_step(params, state)
    structure = structures(params, rules, find_state(state))
    hard = cx.harden(params, rules, find_state(state)).params  # raises where a set is left
    assert 0 < int(jnp.count_nonzero(hard["w"])) <= target.size

    rt = optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(0.1, momentum=0.9), cx.retrain(rules, structure))

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        updates, state = rt.update({"w": params["w"] - normal(2)}, state, params)
        return cx.retract(optax.apply_updates(params, updates), rules, state).params, state

    free, rs = hard, rt.init(hard)
    for _ in range(10):
        free, rs = step(free, rs)
    np.testing.assert_array_equal(jnp.sign(free["w"]), jnp.sign(hard["w"]))
    assert not np.array_equal(free["w"], hard["w"])
    # the scale has moved: it is chosen anew for the last set, the other structures are those of hardening
    last = constraint.sets[-1].init(free["w"])
    check(free, rules, {"w": (*structure["w"][:-1], last)})


def test_hardening_is_the_chain_of_the_projections_in_stage_order() -> None:
    w = normal()
    parts = [cx.unstructured(0.4), cx.polarize(4), cx.unify((4, 1), 0.5, zeros="keep"), cx.quantize(4)]
    whole = parts[3] & parts[1] & parts[2] & parts[0]  # written in any order
    assert [p.spec["kind"] for p in whole.sets] == ["unstructured", "polarize", "unify", "quantize"]
    z = w
    for p in parts:
        z = p.project(z, p.init(z))
    np.testing.assert_array_equal(whole.project(w, whole.init(w)), z)


def test_signs_and_scale_are_chosen_for_what_pruning_leaves() -> None:
    w = normal(3)
    both = cx.columns(0.5) & cx.polarize(4)
    pruned = cx.columns(0.5).project(w, ())
    found, wanted = both.init(w)[1], polarity(pruned, 4)
    np.testing.assert_array_equal(found.order, wanted.order)
    np.testing.assert_array_equal(found.negative, wanted.negative)
    # in ADMM too, where the weights themselves are never exactly zero
    tx = cx.admm([("w", both)], rho=0.1, every=1, refresh_every=1)
    state = tx.init({"w": w})
    np.testing.assert_array_equal(find_state(state).structure["w"][1].order, wanted.order)
    v = normal(4)
    _, state = tx.update({"w": v}, state, {"w": v})
    again = polarity(cx.columns(0.5).project(v, ()), 4)
    np.testing.assert_array_equal(find_state(state).structure["w"][1].order, again.order)
    assert int(mixed_fragments(cx.polarize(4).project(v, again), again, 4)) == 0
    scale = (cx.unstructured(0.1) & cx.quantize(3)).init(w)[1]
    assert float(scale) > float(cx.quantize(3).init(w)) * 1.2


def test_pruning_and_quantizing_together_beats_quantizing_over_the_zeros() -> None:
    """Zeros are no level: a quantizer that sees them as weights would bring them back or spend its levels on them."""
    w = normal(5)
    both = cx.unstructured(0.2) & cx.quantize(3)
    z = both.project(w, both.init(w))
    mask = cx.unstructured(0.2).project(w, ()) != 0
    np.testing.assert_array_equal(z != 0, mask)
    wrong = cx.quantize(3).project(w, cx.quantize(3).init(w))  # scale of the dense weights
    kept = jnp.where(mask, wrong, 0.0)
    assert float(jnp.sum(jnp.square(z - w))) < float(jnp.sum(jnp.square(kept - w)))


def test_a_single_set_holds_on_every_leaf_of_a_joint_one() -> None:
    """One threshold over both leaves by sorting all magnitudes; then each leaf on a scale of its own."""
    constraint = cx.quantize(4) & cx.unstructured(keep=60, scope="rule")
    w = (normal(6), 3 * normal(7))
    magnitudes = np.concatenate([np.abs(np.asarray(x)).reshape(-1) for x in w])
    least = np.sort(magnitudes)[-60]
    z, structure = constraint.project(w, constraint.init(w)), constraint.init(w)
    assert float(structure[1][1]) > float(structure[1][0])
    for x, got, scale in zip(w, z, structure[1], strict=True):
        pruned = np.where(np.abs(x) >= least, x, np.float32(0))
        np.testing.assert_array_equal(scale, cx.quantize(4).init(jnp.asarray(pruned)))
        nearest = np.clip(np.abs(pruned) / scale, 1, 7).round() * np.sign(pruned) * scale
        np.testing.assert_array_equal(got, nearest)
    assert sum(int(np.count_nonzero(x)) for x in z) == 60


def test_what_a_joint_intersection_says_of_one_leaf() -> None:
    constraint = cx.unstructured(0.3, scope="rule") & cx.polarize(4) & cx.quantize(4)
    w = (normal(6), normal(7))
    structure = constraint.init(w)
    z = constraint.project(w, structure)
    alone, mine = cx.constraints.on_leaf(constraint, structure, 1)
    assert alone is not None and [p.spec["kind"] for p in alone.sets] == ["polarize", "quantize"] and not alone.joint
    np.testing.assert_array_equal(alone.project(z[1], mine), z[1])
    both = cx.constraints.on_leaf(cx.unstructured(0.3, scope="rule") & cx.quantize(4), (0, (1, 2)), 0)
    assert both[0] is not None and both[0].spec["kind"] == "quantize" and both[1] == 1
    assert cx.constraints.on_leaf(cx.unstructured(0.3, scope="rule"), (), 0) == (None, None)
    assert cx.constraints.on_leaf(cx.quantize(4), 3.0, 0)[1] == 3.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: cx.unstructured(0.5) & cx.unify((2, 2), 0.5),
            r'bring back weights that the other set made 0; zeros="keep"',
        ),
        (lambda: cx.polarize(4) & cx.unify((2, 2), 0.5), "bring back weights"),
        (lambda: cx.filters(0.5) & cx.unify_and_prune((2, 2), 0.5, 0.2), "bring back weights"),
        (lambda: cx.unify((2, 4), 0.5) & cx.quantize(4, per="channel"), "4 filters shares one magnitude.*per channel"),
        (lambda: cx.polarize(4) & cx.polarize(8), "both fix the sign"),
        (lambda: cx.quantize(4) & cx.quantize(8), "both fix the levels"),
        (lambda: cx.unify((2, 2), 0.5) & cx.unify((4, 1), 0.5), "both fix the tied magnitudes"),
        (lambda: cx.unify((2, 2), 0.5) & cx.unstructured(0.5, scope="rule"), "bring back weights"),
    ],
)
def test_combinations_that_cannot_be_say_why(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
