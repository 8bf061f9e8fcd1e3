"""The challenge's score, average precision and the decision per image, against brute force and scikit-learn."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from experiments.pneumonia.detection import precision as ap
from experiments.pneumonia.detection import score, screening
from experiments.pneumonia.detection.score import Found

NONE = np.zeros((0, 4))
BOX = np.array([[0.0, 0.0, 10.0, 10.0]])


def _found(boxes=NONE, scores=(), truth=NONE) -> Found:
    return Found(np.asarray(boxes, float), np.asarray(scores, float), np.asarray(truth, float))


def test_a_negative_image_without_predictions_does_not_count() -> None:
    got = score.challenge_score([_found(), _found(BOX, [0.9], BOX)])
    assert (got.value, got.images) == (1.0, 1) and np.isnan(got.each[0])
    assert np.isnan(score.challenge_score([_found()]).value)


def test_any_prediction_on_a_negative_image_scores_0() -> None:
    got = score.challenge_score([_found(BOX, [0.01]), _found(BOX, [0.9], BOX)])
    assert (got.value, got.images) == (0.5, 2)


def test_a_positive_image_without_predictions_scores_0() -> None:
    assert score.challenge_score([_found(truth=BOX)]).value == 0.0


def test_the_second_box_on_one_truth_is_a_false_positive() -> None:
    assert score.challenge_score([_found(np.concatenate([BOX, BOX]), [0.9, 0.8], BOX)]).value == 0.5


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_predictions_below_the_confidence_are_left_out(confidence) -> None:
    far = np.array([[50.0, 50, 60, 60]])
    got = score.challenge_score([_found(np.concatenate([BOX, far]), [0.99, 0.6], BOX)], confidence)
    assert got.value == (0.5 if confidence < 0.6 else 1.0)


def test_an_overlap_of_exactly_the_threshold_is_a_hit() -> None:
    half = np.array([[0.0, 0.0, 10.0, 5.0]])  # IoU exactly 0.5 with BOX
    hits = [t for t in score.THRESHOLDS if t <= 0.5]
    assert score.overlaps(half, BOX)[0, 0] == 0.5
    assert score.challenge_score([_found(half, [1.0], BOX)]).value == len(hits) / 8


def test_more_than_one_true_box() -> None:
    truth = np.array([[0.0, 0, 10, 10], [20, 20, 30, 30], [40, 40, 50, 50]])
    got = score.challenge_score([_found(truth[[1, 0]], [0.4, 0.8], truth)])
    assert got.value == pytest.approx(2 / 3)


def test_a_box_goes_to_the_more_confident_prediction() -> None:
    near = np.array([[0.0, 0, 10, 8]])
    both = np.concatenate([near, BOX])  # the exact one is less confident, and finds its box taken
    assert score.challenge_score([_found(both, [0.9, 0.5], BOX)]).value == pytest.approx(0.5)


def test_the_thresholds_are_the_sheets() -> None:
    assert score.THRESHOLDS == (0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75)


def _brute_image(boxes, scores, truth):
    """Straight from the words: Python lists, one threshold at a time."""
    if not len(boxes) and not len(truth):
        return None
    total = 0.0
    for t in [0.4, 0.45, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75]:
        free, tp = list(range(len(truth))), 0
        for i in sorted(range(len(boxes)), key=lambda i: -scores[i]):
            overlaps = {}
            for j in free:
                w = min(boxes[i][2], truth[j][2]) - max(boxes[i][0], truth[j][0])
                h = min(boxes[i][3], truth[j][3]) - max(boxes[i][1], truth[j][1])
                shared = max(w, 0) * max(h, 0)
                area = sum((b[2] - b[0]) * (b[3] - b[1]) for b in (boxes[i], truth[j]))
                overlaps[j] = shared / (area - shared)
            if overlaps and max(overlaps.values()) >= t:
                free.remove(max(overlaps, key=overlaps.get))
                tp += 1
        total += tp / (tp + (len(boxes) - tp) + (len(truth) - tp))
    return total / 8


def _random_images(rng, n=25):
    out = []
    for _ in range(n):
        truth = [[x, y, x + w, y + h] for x, y, w, h in rng.integers(1, 12, (rng.integers(0, 4), 4)).tolist()]
        near = [b for b in truth if rng.uniform() < 0.8]
        moved = [[v + int(d) for v, d in zip(b, rng.integers(0, 2, 4), strict=True)] for b in near]
        extra = [[x, y, x + w, y + h] for x, y, w, h in rng.integers(1, 12, (rng.integers(0, 3), 4)).tolist()]
        boxes = moved + extra
        scores = rng.permutation(len(boxes)) / 10 + 0.05
        out.append(Found(np.array(boxes, float).reshape(-1, 4), scores, np.array(truth, float).reshape(-1, 4)))
    return out


def test_the_score_is_the_brute_one(rng) -> None:
    images = _random_images(rng)
    want = [_brute_image(i.boxes.tolist(), i.scores.tolist(), i.truth.tolist()) for i in images]
    counted = [v for v in want if v is not None]
    got = score.challenge_score(images)
    assert got.value == pytest.approx(np.mean(counted)) and got.images == len(counted) < len(images)


def _best_of_every_confidence(images) -> tuple[float, float]:
    """(score, confidence) of the best, the highest confidence of equal ones, by trying them one at a time."""
    found = (-1.0, 0.0)
    for confidence in sorted({s for i in images for s in i.scores.tolist()} | {2.0}):
        each = []
        for image in images:
            above = [k for k, s in enumerate(image.scores) if s >= confidence]
            each.append(_brute_image(image.boxes[above].tolist(), image.scores[above].tolist(), image.truth.tolist()))
        counted = [v for v in each if v is not None]
        value = float(np.mean(counted)) if counted else -1.0
        found = max(found, (round(value, 12), confidence))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_the_confidence_chosen_is_the_best_of_all_scores(seed) -> None:
    images = _random_images(np.random.default_rng(seed), 8)
    confidence, value = score.choose_threshold(images)
    want, at = _best_of_every_confidence(images)
    assert value == pytest.approx(want) and score.challenge_score(images, confidence).value == value
    assert confidence == at if at < 2 else confidence > max(i.scores.max(initial=0) for i in images)


def test_many_weak_boxes_do_not_hide_the_best_confidence(rng) -> None:
    """A thousand boxes of no worth and thirty of some: quantiles of all scores would fall among the former."""
    far, images = np.array([80.0, 80, 90, 90]), []
    for _ in range(30):
        moved = BOX[0] * rng.uniform(0.3, 1.6)
        scores = np.concatenate([[rng.uniform(0.1, 0.9)], rng.uniform(0, 0.02, 30)])
        images.append(_found(np.stack([moved, *[far] * 30]), scores, BOX if rng.uniform() < 0.6 else NONE))
    confidence, value = score.choose_threshold(images)
    every = np.unique(np.concatenate([i.scores for i in images]))
    assert value == pytest.approx(max(score.challenge_score(images, s).value for s in every[every > 0.02]))
    assert confidence > 0.02


def test_the_confidence_of_images_without_predictions() -> None:
    assert score.choose_threshold([_found(truth=BOX)]) == (1.0, 0.0)
    confidence, value = score.choose_threshold([_found()])
    assert confidence == 1.0 and np.isnan(value)


def _brute_ap(images, t):
    """Precision and recall at every confidence; the area from the definition, with recalls as a staircase."""
    total = sum(len(i.truth) for i in images)
    points = []
    for confidence in sorted({s for i in images for s in i.scores.tolist()}, reverse=True):
        tp = fp = 0
        for i in images:
            keep = i.scores >= confidence
            order = np.argsort(-i.scores[keep])
            hits = score.match(score.overlaps(i.boxes[keep][order], i.truth), t) if keep.any() else np.zeros(0, bool)
            tp, fp = tp + int(hits.sum()), fp + int((~hits).sum())
        points.append((tp / total, tp / (tp + fp)))
    area, before = 0.0, 0.0
    for recall in sorted({r for r, _ in points}):
        area += (recall - before) * max(p for r, p in points if r >= recall)
        before = recall
    return area


def test_average_precision_is_the_area(rng) -> None:
    images = [i._replace(scores=i.scores + 0.0001 * k) for k, i in enumerate(_random_images(rng))]  # no equal scores
    for t in (0.4, 0.5, 0.75):
        assert ap.average_precision(images, t) == pytest.approx(_brute_ap(images, t))
    each = [_brute_ap(images, t) for t in score.THRESHOLDS]
    assert ap.mean_average_precision(images) == pytest.approx(np.mean(each))


def test_average_precision_at_its_ends() -> None:
    assert ap.average_precision([_found(BOX, [0.5], BOX), _found()]) == 1.0
    assert ap.average_precision([_found(truth=BOX)]) == 0.0
    assert np.isnan(ap.average_precision([_found(BOX, [0.5])]))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5)), min_size=4, max_size=40))
def test_auc_is_scikit_learns_and_the_pairwise_count(rows) -> None:
    y, s = np.array([r[0] for r in rows], int), np.array([r[1] for r in rows], float)
    if y.min() == y.max():
        assert np.isnan(screening.auc(y, s))
        return
    pairs = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(s[y == 1], s[y == 0])]
    assert screening.auc(y, s) == pytest.approx(np.mean(pairs)) == pytest.approx(roc_auc_score(y, s))


ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=4, max_size=30)


@given(ROWS, st.sampled_from([0.0, 0.5, 0.8, 1.0]))
def test_sensitivity_is_the_best_over_all_thresholds(rows, specificity) -> None:
    y, s = np.array([r[0] for r in rows], int), np.array([r[1] for r in rows], float)
    if y.min() == y.max():
        with pytest.raises(ValueError, match="positives and negatives"):
            screening.sensitivity_at(y, s, specificity)
        return
    got = screening.sensitivity_at(y, s, specificity)
    tried = [(np.mean(s[y == 1] >= t), np.mean(s[y == 0] < t)) for t in [-1, *range(8), 99]]
    assert got.sensitivity == pytest.approx(max(a for a, b in tried if b >= specificity))
    assert got.specificity >= specificity
    assert np.mean(s[y == 1] >= got.threshold) == got.sensitivity


def test_the_interval_covers_as_often_as_it_says(rng) -> None:
    true = 0.7602499389065233  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    inside = 0
    for k in range(60):
        y = np.repeat([0, 1], 60)
        s = rng.normal(y.astype(float), 1)
        i = screening.auc_interval(y, s, resamples=120, seed=k)
        inside += i.low <= true <= i.high
    assert 50 <= inside <= 60


def test_patients_are_drawn_whole() -> None:
    y, s = np.array([0, 1] * 10), np.arange(20.0)
    tied = screening.auc_interval(np.tile(y, 4), np.tile(s, 4), np.tile(np.arange(20), 4), resamples=200)
    alone = screening.auc_interval(np.tile(y, 4), np.tile(s, 4), resamples=200)
    assert tied.value == alone.value and tied.high - tied.low > 1.5 * (alone.high - alone.low)


def test_reliability_counts(rng) -> None:
    p, y = rng.uniform(0, 1, 500), rng.integers(0, 2, 500)
    got = screening.reliability(y, p, 5)
    for k in range(5):
        mine = [i for i in range(500) if k / 5 <= p[i] < (k + 1) / 5]
        assert got.count[k] == len(mine)
        assert got.observed[k] == pytest.approx(np.mean([y[i] for i in mine]))
    gaps = np.abs(got.predicted - got.observed)
    assert got.error == pytest.approx((gaps * got.count).sum() / 500)
    assert screening.reliability([1, 0], [1.0, 0.0]).error == 0.0


def test_bad_labels_and_probabilities_are_named() -> None:
    with pytest.raises(ValueError, match="labels must be 0 or 1"):
        screening.auc([0, 2], [0.1, 0.2])
    with pytest.raises(ValueError, match="must lie in 0..1"):
        screening.reliability([0, 1], [0.1, 1.2])


def test_the_bootstrap_draws_whole_patients() -> None:
    groups, seen = np.array([7, 3, 7, 3, 5]), []

    def figure(rows) -> float:
        seen.append(sorted(rows.tolist()))
        return float(len(rows))

    got = screening.bootstrap(figure, groups, resamples=50)
    assert got.value == 5 and seen[-1] == [0, 1, 2, 3, 4] and got.resamples == 50
    assert got.low >= 3 and got.high <= 6  # three patients of two, two and one images
    for rows in seen:
        counts = np.bincount(rows, minlength=5)
        assert counts[0] == counts[2] and counts[1] == counts[3] and counts[0] + counts[1] + counts[4] == 3
