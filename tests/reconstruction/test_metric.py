"""Projection in a diagonal metric against enumerations and weighted means written out."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx.capture.matrix import Gram
from compressx.reconstruction import solve
from compressx.reconstruction.metric import project_in_metric


@pytest.fixture
def pair() -> tuple[jnp.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.standard_normal((4, 3)), jnp.float32), rng.uniform(0.01, 4.0, (4, 3)).astype(np.float32)


def cost(z: np.ndarray, w: np.ndarray, d: np.ndarray) -> float:
    return float(np.sum(d * np.square(np.asarray(z, np.float64) - np.asarray(w, np.float64))))


def test_supports_are_the_best_of_all(pair) -> None:
    w, d = pair
    z, structure = project_in_metric(cx.columns(keep=2), w, d)
    every = [np.isin(np.arange(4), rows)[:, None] * np.asarray(w) for rows in itertools.combinations(range(4), 2)]
    assert cost(z, w, d) == pytest.approx(min(cost(m, w, d) for m in every))
    cx.check(cx.Hardened({"w": z}, {"w": structure}), [("w", cx.columns(keep=2))])
    np.testing.assert_array_equal(z[np.asarray(z) != 0], np.asarray(w)[np.asarray(z) != 0])


def test_signs_are_the_best_of_all(pair) -> None:
    w, d = pair
    constraint = cx.polarize(2, rule="energy")
    z, structure = project_in_metric(constraint, w, d)
    cx.check(cx.Hardened({"w": z}, {"w": structure}), [("w", constraint)])
    x, e = np.asarray(w).reshape(2, 2, 3), d.reshape(2, 2, 3)
    lost = [np.sum(e * np.square(np.minimum(s * x, 0)), axis=1) for s in (1, -1)]
    assert cost(z, w, d) == pytest.approx(float(np.minimum(*lost).sum()))


def test_tied_magnitudes_are_weighted_means(pair) -> None:
    w, d = pair
    constraint = cx.unify((2, 1), 1.0)
    z, structure = project_in_metric(constraint, w, d)
    x, e = np.abs(np.asarray(w)).reshape(2, 2, 3), d.reshape(2, 2, 3)
    mean = (x * e).sum(1) / e.sum(1)
    np.testing.assert_allclose(np.abs(np.asarray(z)).reshape(2, 2, 3), np.repeat(mean[:, None], 2, 1), rtol=1e-6)
    cx.check(cx.Hardened({"w": z}, {"w": structure}), [("w", constraint)])


@pytest.mark.parametrize("per", ["tensor", "channel"])
def test_scales_of_levels_are_weighted(pair, per: str) -> None:
    w, d = pair
    constraint = cx.quantize(3, per=per)
    z, structure = project_in_metric(constraint, w, d)
    plain = constraint.project(w, constraint.init(w))
    assert cost(z, w, d) <= cost(plain, w, d)
    cx.check(cx.Hardened({"w": z}, {"w": structure}), [("w", constraint)])
    # nothing is gained by any other scale near this one
    for factor in (0.98, 1.02):
        other = constraint.project(w, structure[0] * factor)
        assert cost(z, w, d) <= cost(other, w, d) * (1 + 1e-3)


def test_an_even_metric_is_the_projection_itself(pair) -> None:
    w, _ = pair
    for constraint in (cx.unstructured(0.5), cx.n_of_m(2, 4) & cx.columns(0.75)):
        z, _ = project_in_metric(constraint, w, jnp.ones(()))
        np.testing.assert_array_equal(z, constraint.project(w, constraint.init(w)))


def test_what_does_not_fit_is_said(pair) -> None:
    w, _ = pair
    with pytest.raises(ValueError, match="does not broadcast"):
        project_in_metric(cx.filters(0.5), w, jnp.ones((4, 2)))
    with pytest.raises(ValueError, match="one plain leaf"):
        project_in_metric(cx.unstructured(0.5, scope="rule"), w, jnp.ones(()))


def test_asymmetric_levels_are_refused_by_name() -> None:
    part = cx.quantize(4, symmetric=False)
    w = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    gram = Gram(np.eye(8)[None], 100, np.zeros((1, 8)))
    with pytest.raises(ValueError, match="symmetric=False.* cannot be reconstructed"):
        solve(w, gram, part)
