"""Overlap, anchors, targets, loss, decoding and suppression, against loops in plain Python."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common.models import yolov3
from experiments.pneumonia import detection
from experiments.pneumonia.detection import anchors, augment, boxes, heads, loss, nms, targets

GEOMETRY = heads.Geometry((64, 96), tuple((8.0 + 6 * k, 10.0 + 5 * k) for k in reversed(range(9))))


def _iou(a, b) -> float:
    w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h
    return w * h / union if union > 0 else 0.0


def _corners(rng, n, size=60.0):
    start = rng.uniform(0, size, (n, 2))
    return np.concatenate([start, start + rng.uniform(1, size, (n, 2))], 1).astype(np.float32)


def _raw(rng, n, classes=1):
    shapes = [(n, h, w, 3 * (5 + classes)) for h, w in GEOMETRY.grids]
    return [rng.normal(0, 1, s).astype(np.float32) for s in shapes]


def test_iou_is_the_loop(rng) -> None:
    a, b = _corners(rng, 7), _corners(rng, 5)
    want = [[_iou(p, q) for q in b] for p in a]
    np.testing.assert_allclose(jax.jit(boxes.iou)(a, b), want, atol=1e-6)


def test_iou_of_what_has_no_area_is_0() -> None:
    empty = jnp.zeros((1, 4))
    assert float(boxes.iou(empty, empty)[0, 0]) == 0.0


def test_corners_and_sides_are_inverse(rng) -> None:
    xywh = jnp.asarray(rng.uniform(1, 9, (6, 4)).astype(np.float32))
    np.testing.assert_allclose(boxes.sides(boxes.corners(xywh)), xywh, atol=1e-6)


def test_anchors_find_separate_sizes(rng) -> None:
    centres = np.array([[10, 20], [60, 30], [25, 90]], float)
    sizes = np.concatenate([c * rng.uniform(0.95, 1.05, (40, 2)) for c in centres])
    found = anchors.kmeans_anchors(sizes, 3)
    np.testing.assert_allclose(found.sizes, centres[[2, 1, 0]], rtol=0.06)
    assert found.mean_iou == pytest.approx(anchors.size_iou(sizes, found.sizes).max(1).mean())


def test_anchors_are_better_than_random_ones(rng) -> None:
    sizes = rng.lognormal(3, 0.5, (200, 2))
    chance = max(anchors.size_iou(sizes, sizes[rng.choice(200, 9, False)]).max(1).mean() for _ in range(20))
    assert anchors.kmeans_anchors(sizes, 9).mean_iou > chance


def test_anchors_of_too_few_sizes_and_of_bad_ones() -> None:
    assert anchors.kmeans_anchors([[4.0, 8.0]] * 3, 9).sizes.shape == (9, 2)
    with pytest.raises(ValueError, match="box 1 has the size"):
        anchors.kmeans_anchors([[4.0, 8.0], [0.0, 3.0]], 2)


def test_decoding_is_the_formula(rng) -> None:
    raw_heads = _raw(rng, 2)
    got = heads.decode([jnp.asarray(h) for h in raw_heads], GEOMETRY)
    assert got.boxes.shape == (2, GEOMETRY.number, 4)
    place = 0
    for k, (head, stride) in enumerate(zip(raw_heads, yolov3.STRIDES, strict=True)):
        _, rows, columns, _ = head.shape
        for y in range(rows):
            for x in range(columns):
                for a in range(3):
                    t = head[1, y, x, 6 * a : 6 * a + 6].astype(float)
                    w, h = (s * math.exp(v) for s, v in zip(GEOMETRY.anchors[3 * k + a], t[2:4], strict=True))
                    cx, cy = ((1 / (1 + math.exp(-v)) + c) * stride for v, c in zip(t[:2], (x, y), strict=True))
                    want = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
                    if (x + y + a) % 3 == 0:
                        np.testing.assert_allclose(got.boxes[1, place], want, rtol=1e-4, atol=1e-3)
                        assert float(got.objectness[1, place]) == pytest.approx(t[4], abs=1e-6)
                    place += 1
    assert place == GEOMETRY.number


def test_decoding_refuses_heads_of_another_size(rng) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        heads.decode([jnp.zeros((1, 1, 1, 18))] * 3, GEOMETRY)


def _assign_loop(xywh, count):
    """box index by predicted place, by the rule in words."""
    owner = {}
    for k in range(count):
        x, y, w, h = (float(v) for v in xywh[k])
        fits = []
        for aw, ah in GEOMETRY.anchors:
            shared = min(w, aw) * min(h, ah)
            fits.append(shared / (w * h + aw * ah - shared))
        best = fits.index(max(fits))
        head = best // 3
        stride, columns = GEOMETRY.strides[head], GEOMETRY.grids[head][1]
        column, row = int((x + w / 2) // stride), int((y + h / 2) // stride)
        start = sum(3 * r * c for r, c in GEOMETRY.grids[:head])
        owner[start + 3 * (row * columns + column) + best % 3] = k
    return owner


def test_every_box_has_the_cell_of_its_centre_and_the_best_anchor(rng) -> None:
    assign = jax.jit(lambda b, k, c: targets.assign(b, k, c, GEOMETRY))
    for _ in range(12):
        size = rng.uniform(6, 50, (5, 2))
        xywh = np.concatenate([rng.uniform(0, np.array([96, 64]) - size), size], 1).astype(np.float32)
        count = int(rng.integers(0, 6))
        got = assign(xywh, np.zeros(5, np.int32), np.int32(count))
        want = _assign_loop(xywh, count)
        assert {int(i): int(got.owner[i]) for i in np.flatnonzero(np.asarray(got.owner) >= 0)} == want
        cell, stride, anchor = GEOMETRY.cells()
        for place, k in want.items():  # decoding the targets gives the box back
            centre = (np.asarray(got.offset[place]) + cell[place]) * stride[place]
            side = anchor[place] * np.exp(np.asarray(got.size[place]))
            np.testing.assert_allclose(centre, xywh[k, :2] + xywh[k, 2:] / 2, atol=1e-3)
            np.testing.assert_allclose(side, xywh[k, 2:], rtol=1e-4)
            assert float(got.weight[place]) == pytest.approx(2 - xywh[k, 2] * xywh[k, 3] / (64 * 96), abs=1e-5)


def test_of_two_boxes_at_one_place_the_later_has_it() -> None:
    box = np.array([[10, 10, 20, 20], [10, 10, 20, 20]], np.float32)
    got = targets.assign(jnp.asarray(box), jnp.zeros(2, jnp.int32), jnp.int32(2), GEOMETRY)
    assert np.asarray(got.owner).max() == 1 and (np.asarray(got.owner) >= 0).sum() == 1


def _bce(t, p) -> float:
    return -(p * math.log(1 / (1 + math.exp(-t))) + (1 - p) * math.log(1 - 1 / (1 + math.exp(-t))))


def test_the_loss_is_the_loop_with_the_ignore_rule(rng) -> None:
    raw_heads = _raw(rng, 2)
    xywh = np.array([[[20, 12, 22, 18], [50, 30, 30, 30]], [[4, 4, 40, 50], [0, 0, 0, 0]]], np.float32)
    count = np.array([2, 1], np.int32)
    kinds = jnp.zeros((2, 2), jnp.int32)
    run = jax.jit(lambda h, b, c, ignore: loss.yolo_loss(h, b, kinds, c, GEOMETRY, ignore=ignore))
    found = heads.decode([jnp.asarray(h) for h in raw_heads], GEOMETRY)
    for ignore in (0.3, 0.7):
        for i in range(2):
            owner, total, spared = _assign_loop(xywh[i], count[i]), 0.0, 0
            cell, stride, anchor = GEOMETRY.cells()
            for p in range(GEOMETRY.number):
                raw, objectness = np.asarray(found.raw[i, p], float), float(found.objectness[i, p])
                if p in owner:
                    b = xywh[i, owner[p]].astype(float)
                    offset = (b[:2] + b[2:] / 2) / stride[p] - cell[p]
                    extent = np.log(b[2:] / anchor[p])
                    weight = 2 - b[2] * b[3] / (64 * 96)
                    place = sum(_bce(t, o) for t, o in zip(raw[:2], offset, strict=True))
                    total += weight * (place + 0.5 * ((raw[2:] - extent) ** 2).sum())
                    total += _bce(objectness, 1.0) + _bce(float(found.classes[i, p, 0]), 1.0)
                    continue
                real = [[b[0], b[1], b[0] + b[2], b[1] + b[3]] for b in xywh[i, : count[i]]]
                if max(_iou(np.asarray(found.boxes[i, p], float), r) for r in real) > ignore:
                    spared += 1
                else:
                    total += _bce(objectness, 0.0)
            assert float(run(raw_heads, xywh, count, ignore)[i]) == pytest.approx(total, rel=2e-4)
            assert spared > 0 or ignore > 0.5


def test_an_image_without_boxes_has_a_finite_loss_and_gradient(rng) -> None:
    raw_heads = [jnp.asarray(h) for h in _raw(rng, 1)]
    none = jnp.zeros((1, 1, 4)), jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    value, gradient = jax.jit(jax.value_and_grad(lambda h: loss.yolo_loss(h, *none, GEOMETRY).sum()))(raw_heads)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in gradient)


def _nms_loop(box, kinds, threshold):
    kept = []
    for i in range(len(box)):
        if all(kinds[j] != kinds[i] or _iou(box[i], box[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


def test_suppression_is_the_greedy_loop(rng) -> None:
    run = jax.jit(lambda b, k, v: nms.suppress(b, k, v, 0.4))
    for _ in range(10):
        box, kinds = _corners(rng, 12, 30.0), rng.integers(0, 2, 12).astype(np.int32)
        valid = np.arange(12) < rng.integers(0, 13)
        got = np.flatnonzero(run(box, kinds, valid))
        assert got.tolist() == _nms_loop(box[valid], kinds, 0.4)


def test_detections_are_sorted_inside_the_image_and_above_the_least(rng) -> None:
    found = heads.decode([jnp.asarray(h) for h in _raw(rng, 3)], GEOMETRY)
    got = jax.jit(lambda d: nms.non_maximum_suppression(d, GEOMETRY.size, least=0.3, most=20))(found)
    for i in range(3):
        n = int(got.valid[i].sum())
        assert n and got.valid[i][:n].all() and (np.diff(got.scores[i][:n]) <= 0).all()
        assert (got.scores[i][:n] >= 0.3).all() and (got.scores[i][n:] == 0).all()
        assert (got.boxes[i][:n, :2] >= 0).all()
        assert (np.asarray(got.boxes[i])[:n, 2:] <= np.array([96, 64])).all()


def test_views_move_a_bright_box_with_its_pixels() -> None:
    n = 16
    images = np.zeros((n, 64, 64, 1), np.uint8)
    images[:, 20:36, 24:34] = 200
    box = np.tile(np.array([[[24, 20, 10, 16], [0, 0, 0, 0]]], np.float32), (n, 1, 1))
    view = jax.jit(lambda k: augment.random_view(k, images, box, np.ones(n, np.int32), contrast=0.0))
    got, moved, count = view(jax.random.key(3))
    assert (np.asarray(count) == 1).all() and len({tuple(b) for b in np.asarray(moved)[:, 0].round(2).tolist()}) == n
    for image, (x, y, w, h) in zip(np.asarray(got)[..., 0], np.asarray(moved)[:, 0], strict=True):
        rows, columns = np.flatnonzero((image > 100).any(1)), np.flatnonzero((image > 100).any(0))
        seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
        np.testing.assert_allclose([x, y, x + w, y + h], seen, atol=1.01)


def test_views_drop_a_box_that_leaves() -> None:
    images = np.full((8, 64, 64, 1), 9, np.uint8)
    box = np.tile(np.array([[[0, 30, 4, 4], [30, 30, 12, 12]]], np.float32), (8, 1, 1))
    got = augment.random_view(jax.random.key(0), images, box, np.full(8, 2, np.int32), zoom=0.01, shift=0.3, flip=False)
    count, moved = np.asarray(got[2]), np.asarray(got[1])
    assert set(count.tolist()) == {1, 2}
    one = np.flatnonzero(count == 1)
    assert (moved[one, 0, 2] > 10).all() and (moved[one, 1] == 0).all()  # the second box has moved up


def test_the_package_lists_its_parts() -> None:
    assert detection.iou is boxes.iou and detection.assign is targets.assign
