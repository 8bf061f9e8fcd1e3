"""Operations and patterns of a compressed classifier, against counts by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx
from compressx._harden import project, structures
from configs import families
from experiments.cnn import measures as cnn_measures
from experiments.cnn import plots as pattern_plots
from experiments.cnn import task as cnn
from experiments.common import models
from experiments.common.driver import Options
from experiments.common.report import metrics
from experiments.common.report.summary import read_summary
from experiments.common.training import Weights
from experiments.sweep import task as sweep

SHAPE = (8, 8, 1)
PLACES = {"c1": 64, "c2": 64, "f1": 1, "f2": 1}  # SAME convolutions of 8x8 images; pooling comes after both


def _network(rules):
    model = models.build("digits_cnn", classes=10)
    params = model.init(jax.random.key(0), jnp.zeros((1, *SHAPE)))
    structure = structures(params, rules)
    return model, params, Weights(project(params, rules, structure), {}, structure)


def test_operations_are_those_of_loops_over_blocks_and_weights() -> None:
    rules = [
        ("params/c2/kernel", compressx.unify_and_prune((3, 4), 0.5, 0.25)),
        ("params/f1/kernel", compressx.unstructured(keep=1000)),
    ]
    model, _, result = _network(rules)
    got = cnn_measures.operations(model, result, rules, SHAPE)
    w = np.asarray(result.params["params"]["c2"]["kernel"]).reshape(144, 32)
    multiplications = additions = 0
    for row in range(0, 144, 3):
        for column in range(0, 32, 4):
            block = w[row : row + 3, column : column + 4]
            if np.ptp(np.abs(block)) == 0:
                multiplications += 3 if block.any() else 0  # of the inputs, which are fewer than the outputs
                additions += 12 if block.any() else 0
            else:
                multiplications, additions = multiplications + 12, additions + 12
    dense = {"c1": 144, "c2": 4608, "f1": 32768, "f2": 640}
    each = {name: (n, n) for name, n in dense.items()} | {"c2": (multiplications, additions), "f1": (1000, 1000)}
    want = {f"params/{n}/kernel": [a * PLACES[n], b * PLACES[n], dense[n] * PLACES[n]] for n, (a, b) in each.items()}
    assert got["layers"] == want
    assert 0 < multiplications < additions < 4608
    totals = [sum(column) for column in zip(*want.values(), strict=True)]
    assert [got["multiplications"], got["additions"], got["dense"]] == totals
    assert got["rate"] == totals[2] / totals[0]


def test_patterns_of_a_network_and_of_a_split() -> None:
    both = compressx.pattern("natural", k=4) & compressx.connectivity(0.5)
    rules = [("params/c2/kernel", both), ("params/f1/kernel", compressx.unstructured(keep=1000))]
    _, before, result = _network(rules)
    (one,) = cnn_measures.patterns(before, result, rules)
    assert one["name"] == "params/c2/kernel"
    assert len(one["dense"]["masks"]) == 56 and sum(one["dense"]["counts"]) == 512
    assert len(one["final"]["masks"]) == 4 and sum(one["final"]["counts"]) == 256
    assert one["final"]["coverage"]["4"] == 1 and all(4 in taps for taps in one["final"]["masks"])
    assert sum(one["shapes"]["params/c2/kernel"].values()) == pytest.approx(1)
    assert 0 <= one["changed"] < 1
    wide = [("params/c1/kernel", compressx.pattern([[0, 1], [3, 4]], entries=2))]
    _, before, result = _network(wide)
    (other,) = cnn_measures.patterns(before, result, wide)
    assert other["published"] is None and other["shapes"] == {}
    assert len(other["dense"]["masks"]) == 36


def test_the_library_is_drawn(tmp_path) -> None:
    path = pattern_plots.library(tmp_path / "a.png", [[0, 1, 3, 4], [4, 5, 7, 8]], [3, 1])
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    with pytest.raises(ValueError, match="no mask to draw"):
        pattern_plots.library(tmp_path / "b.png", [], [])


@pytest.mark.slow
def test_a_run_records_its_extraction(tmp_path) -> None:
    settings = families.get_config("digits_families_tiny").unlock()
    extracted = {"kind": "pattern", "library": "natural", "k": 4, "shrink": 0.5}
    stage = settings.base.plan.stages[0]
    stage["rules"] = (("params/c2/kernel", extracted),)
    stage["admm"]["refresh_every"] = 1
    config = sweep.read(settings).base
    summary = cnn.train_and_evaluate(config, Options(tmp_path))
    assert read_summary(tmp_path / "summary.json") == summary
    sizes = metrics.leaf_series(metrics.read_metrics(tmp_path / "metrics.jsonl"), "library_size")["params/c2/kernel"]
    assert 56 > sizes.values[0] >= sizes.values[-1] >= 4 and list(sizes.values) == sorted(sizes.values, reverse=True)
    (used,) = summary["cnn"]["patterns"]
    assert len(used["final"]["masks"]) == sizes.values[-1]
    assert summary["cnn"]["operations"]["rate"] > 1
    assert (tmp_path / "library.png").exists()
