"""Plots: they are written, decode, show something, are the same twice; the numbers in them are right."""

import numpy as np
import pytest
from matplotlib.image import imread

from experiments.common.report import plots, run, style, weight_plots
from experiments.common.report.metrics import Phase

STEPS = np.arange(0, 1001, 50)
PHASES = [Phase("dense", 0, 300), Phase("admm", 300, 700), Phase("harden", 700, 700), Phase("retrain", 700, 1000)]
LEAVES = [f"params/Block_{i}/Conv_0/kernel" for i in range(20)]


def curve(scale=1.0):
    return STEPS, scale * np.exp(-STEPS / 300)


def masks():
    rng = np.random.default_rng(0)
    return {"params/Conv_0/kernel": rng.random((3, 3, 4, 8)) < 0.3, "big": rng.random((600, 310)) < 0.01}


CALLS = {
    "lines": lambda p: plots.lines(p, {"a": curve()}, title="t", ylabel="y", logx=False, phases=PHASES),
    "lines_log": lambda p: plots.lines(p, {"a": (STEPS[1:], STEPS[1:])}, title="t", ylabel="y", logx=True, logy=True),
    "training": lambda p: plots.training(p, {"test": curve()}, {"train": curve(), "test": curve(2)}, PHASES),
    "training_no_loss": lambda p: plots.training(p, {"test": curve()}, {}, PHASES),
    "training_diverged": lambda p: plots.training(
        p, {}, {"train": (STEPS, np.where(STEPS < 500, 1.0, np.nan))}, PHASES
    ),
    "residuals": lambda p: plots.residuals(p, {"a": curve(), "_b$": curve(0)}, {"a": curve(), "_b$": curve(2)}, PHASES),
    "residuals_many": lambda p: plots.residuals(p, {leaf: curve() for leaf in LEAVES}, {}, []),
    "rho": lambda p: plots.rho(p, dict.fromkeys(LEAVES, (STEPS, 1.0 + STEPS // 500)), PHASES),
    "one_point": lambda p: plots.lines(p, {"a": ([5], [1.0])}, title="t", ylabel="y", phases=[Phase("dense", 5, 5)]),
    "histograms": lambda p: weight_plots.weight_histograms(
        p, {k: np.linspace(-1, 1, m.size) for k, m in masks().items()}, {k: 1.0 * m for k, m in masks().items()}
    ),
    "histogram_all_zero": lambda p: weight_plots.weight_histograms(p, {"a": np.zeros(9)}, {"a": np.zeros(9)}),
    "kept": lambda p: weight_plots.kept_weights(p, ["a", "b", "c"], [3, 0, 0], [1000, 10, 0]),
    "masks": lambda p: weight_plots.masks(p, masks()),
    "mask_empty_and_full": lambda p: weight_plots.masks(p, {"a": np.zeros((300, 9), bool), "b": np.ones((1, 1), bool)}),
    "mask_of_a_vector": lambda p: weight_plots.masks(p, {"bias": np.ones(7, bool)}),
    "rate": lambda p: plots.metric_against_rate(
        p,
        {"ADMM": ([246, 85], [[0.99, 0.98, 0.991], [0.992, 0.993, np.nan]]), "one-shot": ([85], [[0.97]])},
        controls={"dense, same budget": [0.993, 0.994]},
        paper={"paper": (85, 0.992)},
    ),
    "bars": lambda p: plots.bars(p, ["a", "b"], [1.0, 2.5], title="t", xlabel="x"),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(style, "DPI", 50)  # a quarter of the size, for speed


@pytest.mark.parametrize("name", CALLS)
def test_every_plot_is_written_and_shows_something(tmp_path, name):
    path = tmp_path / "plots" / f"{name}.png"
    assert CALLS[name](path) == path
    image = imread(path)
    assert image.shape[1] == 350 and image.shape[0] > 80
    assert np.unique(image[..., :3].reshape(-1, 3), axis=0).shape[0] > 8
    assert np.all(image[:2, :2, :3] == 1)  # a light background


def test_the_same_data_give_the_same_bytes(tmp_path):
    for name in ("residuals", "masks"):
        assert CALLS[name](tmp_path / "a.png").read_bytes() == CALLS[name](tmp_path / "b.png").read_bytes()


BAD = {
    "no curve": lambda p: plots.lines(p, {}, title="t", ylabel="y"),
    "the curve 'a'": lambda p: plots.lines(p, {"a": ([1, 2], [1.0])}, title="t", ylabel="y"),
    "the curve 'b'": lambda p: plots.lines(p, {"b": ([], [])}, title="t", ylabel="y"),
    "no curve to draw": lambda p: plots.training(p, {}, {}, PHASES),
    "same leaves": lambda p: weight_plots.weight_histograms(p, {"a": np.ones(3)}, {"b": np.ones(3)}),
    "a holds 1 weights that are not finite": lambda p: weight_plots.weight_histograms(
        p, {"a": np.array([1.0, np.nan])}, {"a": np.ones(2)}
    ),
    "as many names": lambda p: weight_plots.kept_weights(p, ["a"], [1, 2], [3]),
    "no mask": lambda p: weight_plots.masks(p, {}),
    "the mask of w is float64": lambda p: weight_plots.masks(p, {"w": np.ones((2, 2))}),
    "no method": lambda p: plots.metric_against_rate(p, {}),
    "ADMM has rates": lambda p: plots.metric_against_rate(p, {"ADMM": ([1, 2], [[0.5]])}),
    "bars need": lambda p: plots.bars(p, ["a"], [np.nan], title="t", xlabel="x"),
}


@pytest.mark.parametrize("message", BAD)
def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path, message):
    with pytest.raises(ValueError, match=message):
        BAD[message](tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize("shape", [(1, 1), (5, 7), (600, 310), (513, 2), (7, 1000)])
@pytest.mark.parametrize("pixels", [4, 256])
def test_block_density_is_the_mean_of_each_block(shape, pixels):
    mask = np.random.default_rng(0).random(shape) < 0.2
    density, (rows, columns) = weight_plots.block_density(mask, pixels)
    assert max(density.shape) <= pixels
    for i in range(density.shape[0]):
        for j in range(density.shape[1]):
            block = mask[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
            assert density[i, j] == pytest.approx(block.mean())
    assert density.shape == (-(-shape[0] // rows), -(-shape[1] // columns))


def test_gemm_view_of_a_conv_mask_has_the_filters_as_columns(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(weight_plots, "_mask", lambda ax, leaf, mask: seen.append(mask))
    mask = np.zeros((3, 3, 2, 4), bool)
    mask[1, 2, 0, 3] = True
    weight_plots.masks(tmp_path / "m.png", {"w": mask})
    assert seen[0].shape == (18, 4)
    assert np.argwhere(seen[0]).tolist() == [[(1 * 3 + 2) * 2 + 0, 3]]


def test_of_more_methods_than_colours_each_has_a_look_of_its_own_and_bars(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_axes", lambda ax, *rest: drawn.update(ax=ax))
    rates = np.array([2.0, 4.0])
    methods = {f"method {i}": (rates, np.array([[0.9, 0.92], [0.8 - 0.01 * i, np.nan]])) for i in range(28)}
    assert plots.metric_against_rate(tmp_path / "many.png", methods).exists()
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in drawn["ax"].lines}
    assert len(looks) == len(drawn["ax"].lines) == 28  # and no dots
    first = drawn["ax"].containers[0].lines[2][0].get_segments()
    deviation = np.std([0.9, 0.92], ddof=1)
    np.testing.assert_allclose(first[0], [[2, 0.91 - deviation], [2, 0.91 + deviation]])
    np.testing.assert_allclose(first[1], [[4, 0.8], [4, 0.8]])  # a single seed has none


def test_rates_are_drawn_with_mean_and_sample_deviation(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_axes", lambda ax, *rest: drawn.update(ax=ax))
    CALLS["rate"](tmp_path / "rate.png")
    line = next(line for line in drawn["ax"].lines if str(line.get_label()).startswith("ADMM"))
    assert line.get_label() == "ADMM (2 to 3 seeds)"
    np.testing.assert_array_equal(line.get_xdata(), [85, 246])
    np.testing.assert_allclose(line.get_ydata(), [(0.992 + 0.993) / 2, (0.99 + 0.98 + 0.991) / 3])
    band = drawn["ax"].collections[0].get_paths()[0].vertices
    expected = np.std([0.99, 0.98, 0.991], ddof=1)
    at = band[np.isclose(band[:, 0], 246)][:, 1]
    assert (at.max() - at.min()) / 2 == pytest.approx(expected)
    assert drawn["ax"].get_xscale() == "log"


def test_names_of_narrow_phases_do_not_overlap(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "_axes", lambda ax, *rest: drawn.update(ax=ax))
    steps = np.arange(0, 2000)
    phases = [Phase(f"a_long_name_{i}", 1000 + 10 * i, 1009 + 10 * i) for i in range(6)]
    plots.lines(tmp_path / "x.png", {"a": (steps, steps)}, title="t", ylabel="y", phases=phases)
    boxes = [text.get_window_extent() for text in drawn["ax"].texts]
    assert [text.get_text() for text in drawn["ax"].texts] == [phase.name for phase in phases]
    boxes.append(drawn["ax"].title.get_window_extent())
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_palette_and_names():
    assert len(set(style.COLOURS)) == len(style.COLOURS) == len(style.MARKERS)
    assert style.short_name("params/Conv_0/kernel") == "Conv_0"
    assert style.short_name("params/Dense_0/bias") == "Dense_0/bias"
    assert len(style.short_name("x" * 100)) == 34
    assert not style.short_name("_private").startswith("_")
    assert style.short_name("a\nb\x00") == "a?b?"


def test_standard_pictures_of_a_run(tmp_path, pictures):
    names = ["training.png", "residuals.png", "rho.png", "histograms.png", "kept.png", "masks.png"]
    assert [picture.source.name for picture in pictures] == names
    assert all(picture.title and picture.caption for picture in pictures)
    assert all(imread(picture.source).shape[1] == 1400 for picture in pictures)  # 7 inches, twice the 700 px shown
    assert run.standard_pictures(tmp_path, []) == []
    only = run.standard_pictures(tmp_path, [{"step": 0, "phase": "dense", "loss": 1.0}])
    assert [picture.source.name for picture in only] == ["training.png"]
    assert [path.name for path in tmp_path.iterdir()] == ["training.png"]


def test_residuals_of_a_leaf_in_several_sets_are_drawn_set_by_set(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(plots, "residuals", lambda path, primal, dual, phases: drawn.update(primal=primal) or path)
    sets = {"a/kernel filters": 0.3, "a/kernel polarize": 0.5}
    records = [
        {"step": 0, "phase": "prune", "primal": {"a/kernel": 0.7, "a/kernel2": 0.1}},
        {"step": 9, "phase": "polarize", "primal": {"a/kernel": 0.5, "a/kernel2": 0.2}, "primal_by_set": sets},
    ]
    run.standard_pictures(tmp_path, records)
    got = {name: list(zip(c.steps.tolist(), c.values.tolist(), strict=True)) for name, c in drawn["primal"].items()}
    assert got == {
        "a/kernel": [(0, 0.7)],
        "a/kernel2": [(0, 0.1), (9, 0.2)],
        "a filters": [(9, 0.3)],
        "a polarize": [(9, 0.5)],
    }
