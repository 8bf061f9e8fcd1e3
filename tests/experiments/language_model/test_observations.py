"""The three observations: on matrices where they hold, on matrices where they cannot, and against loops by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.language_model import observations


def _matrix(rng, rows=48, length=96, spread=0.0):
    scale = np.exp(spread * rng.normal(size=(rows, 1)))
    return (rng.normal(size=(rows, length)) * scale).astype(np.float32)


def test_row_densities_differ_where_rows_differ_and_not_by_chance(rng) -> None:
    alike, unlike = (observations.densities(_matrix(rng, spread=s), 0.125) for s in (0.0, 0.5))
    assert alike.rows.mean() == pytest.approx(0.125) == unlike.rows.mean()
    assert 0.6 < alike.dispersion < 1.5
    assert unlike.dispersion > 5
    assert unlike.low < alike.low < alike.high < unlike.high
    # the other way round the rows of the same matrix are alike
    assert observations.densities(_matrix(rng, spread=0.5), 0.125, "inputs").dispersion < 1.6


def test_dispersion_is_one_for_weights_dealt_by_chance(rng) -> None:
    each = [observations.densities(rng.permutation(4096).reshape(64, 64).astype(np.float32), 0.25).dispersion
            for _ in range(20)]  # fmt: skip
    assert np.mean(each) == pytest.approx(1.0, abs=0.15)


def _by_hand(w, mask):
    order = np.argsort(-np.abs(w).ravel(), kind="stable")[: mask.sum()]
    best = np.zeros(w.size, bool)
    best[order] = True
    square = w.astype(np.float64).ravel() ** 2
    return square[mask.ravel()].sum() / square[best].sum(), (mask.ravel() & best).sum() / mask.sum()


@pytest.mark.parametrize("length", [96, 90])
def test_retained_by_hand(rng, length) -> None:
    w = _matrix(rng, length=length)
    got = observations.retained(w, 8)
    mask, energy, overlap, count = np.zeros(w.shape, bool), 0.0, 0.0, 0
    best = np.zeros(w.size, bool)
    best[np.argsort(-np.abs(w).ravel(), kind="stable")[: 48 * 12]] = True
    best = best.reshape(w.shape)
    for r in range(48):
        for start in range(0, length, 8):
            part = slice(start, min(start + 8, length))
            mask[r, start + int(np.argmax(np.abs(w[r, part])))] = True
            energy += float(np.mean(w[r, part].astype(np.float64) ** 2))
            overlap += float(np.mean(best[r, part]))
            count += 1
    assert got["block_max"].kept == count == got["random_place"].kept
    np.testing.assert_allclose(got["block_max"][1:], _by_hand(w, mask), rtol=1e-6)
    total = float((w.astype(np.float64) ** 2)[best].sum())
    np.testing.assert_allclose(got["random_place"][1:], (energy / total, overlap / count), rtol=1e-6)
    # the third observation: block maxima come nearest to magnitude pruning; whole tiles and rows do not
    assert got["block_max"].energy > 0.8 > got["block"].energy
    assert got["block_max"].overlap > 0.6 > got["block"].overlap
    assert got["block_max"].energy > got["row"].energy
    for kept in (got["block"].kept, got["row"].kept):
        assert kept == pytest.approx(count, rel=0.12)


def test_retained_where_the_observation_cannot_hold() -> None:
    """All large weights in a few rows: whole rows keep everything, block maxima an eighth of it."""
    w = np.full((16, 64), 1e-3, np.float32)
    w[:2] = 1.0
    got = observations.retained(jnp.asarray(w), 8)
    assert got["row"].energy == pytest.approx(1.0)
    assert got["block_max"].energy == pytest.approx(0.125, rel=1e-3)


def test_spearman() -> None:
    a = np.array([3.0, 1.0, 2.0, 9.0])
    assert observations.spearman(a, np.exp(a)) == pytest.approx(1.0)
    assert observations.spearman(a, -a) == pytest.approx(-1.0)
    assert observations.spearman([1, 1, 2, 2], [1, 2, 3, 4]) == pytest.approx(0.8944271909999159)
    assert observations.spearman(a, np.ones(4)) == 0.0
