"""How a library is used, against loops over kernels."""

import itertools

import numpy as np
import pytest

import compressx
from compressx.constraints import library, library_use


def _nearest(kernel, masks):
    """The mask with the least energy outside it, the earlier of equals; None for a kernel of zeros."""
    return None if not kernel.any() else int(np.argmin([(kernel[~m] ** 2).sum() for m in masks]))


def _kernels(w):
    return [w[:, :, i, o].ravel() for i in range(w.shape[2]) for o in range(w.shape[3])]


@pytest.fixture
def weights(rng):
    out = [rng.normal(size=(3, 3, 4, 6)).astype(np.float32) for _ in range(2)]
    out[0][:, :, 1, 2] = 0
    return out


def test_use_is_that_of_a_loop_over_kernels(weights) -> None:
    masks = library.enumerate_masks()
    live = np.arange(len(masks)) % 3 != 0
    use = library_use.use_of(weights, masks, live)
    places = np.flatnonzero(live)
    want = [_nearest(k, masks[live]) for w in weights for k in _kernels(w)]
    counts = {p: want.count(p) for p in range(len(places))}
    order = sorted(counts, key=lambda p: (-counts[p], p))
    assert use.masks == [np.flatnonzero(masks[places[p]]).tolist() for p in order]
    assert use.counts == [counts[p] for p in order]
    assert sum(use.counts) == 47  # 48 kernels, one of zeros
    assert use.coverage == {k: pytest.approx(sum(use.counts[:k]) / 47) for k in (4, 8, 12)}
    shares = [c / 47 for c in use.counts if c]
    assert use.entropy == pytest.approx(-sum(p * np.log2(p) for p in shares))


def test_shapes_and_published_masks() -> None:
    constraint = compressx.pattern("all")
    w = np.zeros((3, 3, 1, 8), np.float32)
    for f, taps in enumerate([(4, 5, 7, 8), (0, 1, 3, 4), (1, 3, 4, 5), (5, 6, 7, 8), (0, 2, 6, 8)]):
        w.reshape(9, 8)[list(taps), f] = 1  # filters 5 to 7 stay zero
    assert library_use.shape_shares(w, constraint.init(w)) == {"gaussian": 0.4, "plus": 0.2, "other": 0.4}
    assert library_use.published([[4, 5, 7, 8], [5, 6, 7, 8], [0, 2, 6, 8]]) == 2
    assert library_use.published(list(itertools.combinations(range(9), 4))) == 12


def test_changed_counts_kernels_that_live_before_and_after(weights, rng) -> None:
    after = [w + rng.normal(size=w.shape).astype(np.float32) for w in weights]
    after[1][:, :, 0, 0] = 0
    structure = compressx.pattern("elog").init(weights[0])
    masks = np.asarray(structure.masks)
    pairs = [
        (_nearest(a, masks), _nearest(b, masks))
        for x, y in zip(weights, after, strict=True)
        for a, b in zip(_kernels(x), _kernels(y), strict=True)
    ]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    assert len(both) == 46
    assert library_use.changed(weights, after, structure) == pytest.approx(np.mean([a != b for a, b in both]))
    assert library_use.changed(weights, weights, structure) == 0
