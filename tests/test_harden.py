"""Hardening ends inside every set, uses ADMM's choices, and refuses what is not inside."""

import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx


def test_hardened_weights_lie_in_every_set(rng: np.random.Generator) -> None:
    p = {"w": jnp.asarray(rng.standard_normal((8, 6)), jnp.float32), "b": jnp.ones(6)}
    rules = [("w", cx.unstructured(0.2) & cx.filters(0.5) & cx.n_of_m(2, 4, axis=0))]
    hard = cx.harden(p, rules, fresh=True).params
    cx.check(hard, rules, cx.structures(hard, rules))
    np.testing.assert_array_equal(hard["b"], p["b"])
    assert int(jnp.any(hard["w"] != 0, 0).sum()) <= 3


def test_a_violation_names_leaf_and_count() -> None:
    rules = [("w", cx.unstructured(keep=2))]
    with pytest.raises(cx.ConstraintViolation, match=r"w: 2 entries outside unstructured\(keep=2, scope=leaf\)"):
        cx.check({"w": jnp.ones(4)}, rules, {"w": ()})


def test_two_sets_that_fix_the_same_thing_do_not_intersect() -> None:
    levels = cx.unstructured(0.5)._replace(stage=cx.LEVEL)
    with pytest.raises(ValueError, match="cannot be intersected: both fix the levels"):
        _ = levels & levels
