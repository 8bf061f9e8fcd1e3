"""Published methods against loops that follow their derivation, and on inputs on which all of them agree."""

import numpy as np
import pytest

from compressx.reconstruction import baselines
from compressx.reconstruction.baselines import Amount

HALF, TWO_OF_FOUR = Amount(0.5), Amount(None, 2, 4)


@pytest.fixture
def layer() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 8)) @ rng.standard_normal((8, 8))
    return rng.standard_normal((8, 5)), x.T @ x / 200


def cost(w: np.ndarray, a: np.ndarray, h: np.ndarray) -> float:
    return float(np.einsum("pf,pf->", w - a, h @ (w - a)))


def surgeon(w: np.ndarray, h: np.ndarray, order: list[int], rounded) -> np.ndarray:
    """Optimal Brain Surgeon, row by row: the inverse of what is left of H is formed anew for every row."""
    w = w.copy()
    for k, i in enumerate(order):
        left = order[k:]
        inverse = np.linalg.inv(h[np.ix_(left, left)])
        new = rounded(w[i], i)
        change = (w[i] - new) / inverse[0, 0]
        for a, j in enumerate(left):
            w[j] = w[j] - inverse[a, 0] * change
        w[i] = new
    return w


@pytest.mark.parametrize("sort", [False, True])
def test_gptq_is_the_surgeon_on_levels(layer, sort: bool) -> None:
    w, h = layer
    order = sorted(range(8), key=lambda i: -h[i, i]) if sort else list(range(8))

    def nearest(row: np.ndarray, _: int) -> np.ndarray:
        return np.round(row * 2) / 2

    found = baselines.gptq(w, h, nearest, sort=sort)
    np.testing.assert_allclose(found, surgeon(w, baselines.damped(h, 0.01), order, nearest), atol=1e-9)
    assert cost(found, w, h) < cost(np.round(w * 2) / 2, w, h)


@pytest.mark.parametrize(("amount", "block"), [(HALF, 128), (HALF, 4), (TWO_OF_FOUR, 128), (TWO_OF_FOUR, 4)])
def test_sparsegpt_is_the_surgeon_on_its_support(layer, amount: Amount, block: int) -> None:
    w, h = layer
    found = baselines.sparsegpt(w, h, amount, block=block)
    mask = found != 0
    assert mask.sum() == 20
    same = surgeon(w, baselines.damped(h, 0.01), list(range(8)), lambda row, i: np.where(mask[i], row, 0.0))
    np.testing.assert_allclose(found, same, atol=1e-9)
    if amount is TWO_OF_FOUR:
        assert (mask.reshape(2, 4, 5).sum(1) == 2).all()
    # the first group's mask is chosen before anything has moved
    inverse = np.linalg.inv(baselines.damped(h, 0.01))
    if block == 128 and amount is HALF:
        scores = [w[i] ** 2 / np.linalg.inv(baselines.damped(h, 0.01)[i:, i:])[0, 0] for i in range(8)]
        np.testing.assert_array_equal(mask, np.array(scores) >= np.sort(np.ravel(scores))[20])
    assert np.isfinite(inverse).all()


@pytest.mark.parametrize("method", [baselines.sparsegpt, baselines.l_admm, baselines.alps])
@pytest.mark.parametrize("amount", [HALF, TWO_OF_FOUR])
def test_without_correlations_every_method_keeps_the_largest(method, amount: Amount) -> None:
    rng = np.random.default_rng(1)
    w, h = rng.standard_normal((8, 5)), np.eye(8) * 3.0
    nearest = np.where(amount.kept(np.abs(w)), w, 0.0)
    found = method(w, h, amount)
    assert (found != 0).sum() == 20
    assert cost(found, w, h) < 1.02 * cost(nearest, w, h)  # ADMM may exchange two weights that are almost equal


@pytest.mark.parametrize("method", [baselines.l_admm, baselines.alps])
@pytest.mark.parametrize("amount", [HALF, TWO_OF_FOUR])
def test_iterations_end_below_magnitude_with_a_refit(method, amount: Amount) -> None:
    better = 0
    for seed in range(6):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((200, 16)) @ rng.standard_normal((16, 16))
        w, h = rng.standard_normal((16, 5)), x.T @ x / 200
        mask = amount.kept(np.abs(w))
        magnitude = baselines.conjugate(h, w, np.where(mask, w, 0.0), mask, 50)
        found = method(w, h, amount)
        assert (found != 0).sum() == 40
        better += cost(found, w, h) < cost(magnitude, w, h)
    assert better >= 5


def test_conjugate_gradients_solve_the_normal_equations(layer) -> None:
    w, h = layer
    mask = HALF.kept(np.abs(w))
    found = baselines.conjugate(h, w, np.where(mask, w, 0.0), mask, 40)
    for j in range(5):
        kept = np.flatnonzero(mask[:, j])
        right = np.linalg.solve(h[np.ix_(kept, kept)], (h @ w[:, j])[kept])
        np.testing.assert_allclose(found[kept, j], right, atol=1e-6)


def test_wanda_compares_within_an_output_and_changes_nothing(layer) -> None:
    w, h = layer
    found = baselines.wanda(w, h, HALF)
    for j in range(5):
        scores = [abs(w[i, j]) * h[i, i] ** 0.5 for i in range(8)]
        kept = sorted(range(8), key=lambda i: -scores[i])[:4]
        np.testing.assert_array_equal(np.flatnonzero(found[:, j]), sorted(kept))
        np.testing.assert_array_equal(found[kept, j], w[kept, j])


def test_awq_is_no_worse_than_rounding(layer) -> None:
    w, h = layer
    h = h * np.outer(scale := np.linspace(0.1, 3.0, 8), scale)

    def quantize(m: np.ndarray) -> np.ndarray:
        step = np.abs(m).max() / 3
        return np.round(m / step) * step

    assert cost(baselines.awq(w, h, quantize), w, h) <= cost(quantize(w), w, h)
