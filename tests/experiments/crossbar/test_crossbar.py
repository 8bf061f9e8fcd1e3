"""The crossbar driver from its config to its files, on the data set that needs no download."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import formats
from compressx.constraints import from_spec
from compressx.crossbar import layers, network
from compressx.rules import resolve
from configs import crossbar as configs
from experiments.common import models
from experiments.common.driver import Options
from experiments.common.report.summary import check_summary, read_summary
from experiments.common.training import ConfigError, Weights, phases
from experiments.crossbar import config as crossbar_config
from experiments.crossbar import forms as crossbar_forms
from experiments.crossbar import sot as crossbar_sot
from experiments.crossbar import task as crossbar
from experiments.crossbar.config import Hardware, plan_phases
from experiments.crossbar.models import Scene, live_weights, make_subject
from tests.thinning import some

SHAPES = {"digits": (8, 8, 1), "mnist": (28, 28, 1), "cifar10_subset": (32, 32, 3)}
FILES = (
    *("config.json", "metrics.jsonl", "compressed.safetensors", "rules.json", "report.html", "summary.json"),
    "checkpoints",
)
PLOTS = (
    *("mapping", "occupancy", "cycles", "saturation", "variation", "fps", "tile_mw", "tile_mm2"),
    *("training", "residuals", "masks"),
)


def _config(variant="digits_tiny", **changes):
    settings = configs.get_config(variant).unlock()
    for key, value in changes.items():
        *path, last = key.split("__")
        target = settings
        for part in path:
            target = target[part]
        target[last] = value
    return crossbar_config.read(settings)


def _short():
    """The tiny run with a model for each kind of engine, no more: every model is a few programs to compile.

    Its last model is polarized and quantized by one ADMM; by one after the other, in the slow tests.
    """
    settings = configs.get_config("digits_tiny").unlock()
    last = configs.tiny({**settings.to_dict(), "branches": [configs.DIGITS.at_once("full_8", 8)]})["branches"][0]
    settings.branches = (*(b for b in settings.branches if b["name"] == "pruned"), last)
    settings.variation.update({"models": ("full_8",), "sweep": ()})
    settings.noise_aware.start = ""
    settings.one_shot = False
    return crossbar_config.read(settings)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A finished short run: its folder and its summary. Tests do not change it."""
    folder = tmp_path_factory.mktemp("crossbar") / "run"
    return folder, crossbar.run(_short(), Options(folder, command="python -m experiments.crossbar"))


def test_it_leaves_everything_behind(done):
    folder, summary = done
    assert all((folder / name).exists() for name in (*FILES, *(f"{p}.png" for p in PLOTS)))
    assert check_summary(summary) == read_summary(folder / "summary.json")
    page = (folder / "report.html").read_text()
    assert "Factors of the frame rate" in page and "Inconsistencies of the paper" in page
    assert "Energy of an inference by layer" in page
    spent = summary["crossbar"]["engines"]["energy"]["layers"]
    assert all(row["nJ"] > 0 and row["conversions"] > 0 for row in spent)


def test_models_lie_in_their_sets_and_on_the_engine_as_on_paper(done):
    _, s = done
    assert s["violations"] == 0
    found = s["crossbar"]["models"]
    assert set(found) == {"dense", "pruned", "full_8"}
    assert s["metric"]["compressed"] == found["full_8"]["hardware"]
    assert found["full_8"]["single_signed"] == 1.0 and found["full_8"]["signs"] == "polarized"
    for name in ("dense", "pruned"):
        assert found[name]["signs"] == "differential_digital"
    assert all(m["proven_share"] == 1.0 for m in found.values())  # flipped columns never clip
    assert found["full_8"]["on_levels"] == found["full_8"]["float"]  # trained on the levels, nothing to round
    # c1 9 x 16, c2 144 x 32, f1 512 x 64, f2 64 x 10: four cells a weight, twice that in pairs
    assert found["dense"]["arrays"] == 1 + 4 + 16 + 1 and found["full_8"]["arrays"] == 4


def _untrained(spec):
    """A network hardened into one set for all layers, and what it is measured on."""
    model, rng = models.build("digits_cnn", classes=10, width=0.25), np.random.default_rng(0)
    images = rng.uniform(0, 1, (4, 8, 8, 1)).astype(np.float32)
    params = model.init(jax.random.key(0), jnp.asarray(images))
    rules = ((r"params/.*/kernel", from_spec(spec)), (r".*", None))
    hardened = phases.harden(Weights(params, {}, {}), rules)
    scene = Scene(model.apply, lambda x: x, images, images, np.zeros(4, np.int32), None)
    return make_subject("it", jax.device_get(hardened), rules, {}), scene


def _on_hardware(scene, arrays, placed):
    """What the network gives on its arrays, in one program."""

    def run(arrays, variables, images):
        with layers.hardware(arrays):
            return scene.apply(variables, images)

    return np.asarray(jax.jit(run)(arrays, placed.grid.variables, scene.images))


@pytest.mark.parametrize(
    ("spec", "forms_bits", "sot_bits"),
    [
        pytest.param({"grid": "cells", "bits": 6}, 6, 7, marks=pytest.mark.slow),
        pytest.param({"grid": "uniform", "bits": 6}, 6, 6, marks=pytest.mark.slow),  # five bits of magnitude: 3 cells
        ({"grid": "uniform", "bits": 7, "per": "channel"}, 6, 7),
        ({"grid": "power_of_two", "bits": 4}, 8, 8),  # 1, 2, .. 64
    ],
)
def test_trained_levels_reach_the_engine_unchanged(spec, forms_bits, sot_bits):
    subject, scene = _untrained({"kind": "quantize", **spec})
    for place, hardware in ((crossbar_forms.place, Hardware()), (crossbar_sot.place, Hardware("sot", input_bits=8))):
        placed = place(subject, scene, hardware)
        jax.tree.map(np.testing.assert_array_equal, placed.grid.variables["params"], subject.variables["params"])
        for path in ("c1", "c2", "f1", "f2"):
            assert subject.held[path].bits == spec["bits"]
            (scale,) = subject.weights.structure[f"params/{path}/kernel"]
            np.testing.assert_array_equal(placed.grid.scales[path], scale)
        if place is crossbar_forms.place:
            assert {d.weight_bits for d in placed.designs.values()} == {forms_bits}
            arrays = placed.deploy("flip", True)
        else:
            assert {o.w_bits for o in placed.operands.values()} == {sot_bits}
            arrays = network.deploy_network(placed.grid, placed.operands, placed.input_scales)
        got = _on_hardware(scene, arrays, placed)
        plain = np.asarray(jax.jit(scene.apply)(subject.variables, scene.images))
        np.testing.assert_allclose(got, plain, atol=0.05 * np.abs(plain).max())


@pytest.mark.parametrize("fragment", some([1], [1, 64, 2, 32, 128]))
def test_fragments_of_any_size_that_divides_an_array_run_without_clipping(fragment):
    subject, scene = _untrained({"kind": "polarize", "fragment": fragment})
    placed = crossbar_forms.place(subject, scene, Hardware())
    assert {(d.active_rows, d.signs) for d in placed.designs.values()} == {(fragment, "polarized")}
    assert all(d.adc.bits == d.lossless_bits for d in placed.designs.values())
    deployed = placed.deploy("flip", True)
    assert network.proven_share(deployed) == 1.0
    got = _on_hardware(scene, deployed, placed)
    np.testing.assert_allclose(got, jax.jit(scene.apply)(placed.grid.variables, scene.images), atol=1e-3)


@pytest.mark.parametrize(
    ("spec", "engine", "words"),
    [
        ({"kind": "quantize", "bits": 4, "grid": "codebook"}, "forms", "a codebook's levels are not multiples"),
        ({"kind": "quantize", "bits": 8, "grid": "cells"}, "sot", "of 8 bits; the engine 'sot' stores up to 7"),
        ({"kind": "quantize", "bits": 6, "grid": "power_of_two"}, "forms", "magnitudes of 31 bits"),
        ({"kind": "polarize", "fragment": 5}, "forms", "fragments of 5 rows do not divide the 128 rows"),
    ],
)
def test_sets_that_no_engine_holds_are_refused_before_training(spec, engine, words, tmp_path):
    settings = configs.get_config("digits_tiny").unlock()
    settings.branches = ({"name": "x", "rules": ((r"params/.*/kernel", spec),)},)
    settings.main, settings.variation.models, settings.noise_aware.start = "x", (), ""
    settings.hardware.engine, settings.hardware.input_bits = engine, 8
    with pytest.raises(ConfigError, match=words):
        crossbar.run(crossbar_config.read(settings), Options(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_live_weights_are_those_on_a_path_from_input_to_output():
    model, rng = models.build("digits_cnn", classes=10), np.random.default_rng(0)
    images = rng.uniform(0, 1, (2, 8, 8, 1)).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.asarray(images))
    v = jax.tree.map(lambda w: rng.uniform(0.5, 1, w.shape).astype(np.float32), shapes)
    p = v["params"]
    for leaf in (p["c2"]["kernel"][..., 3], p["c2"]["bias"][3:4], p["f2"]["kernel"][5], p["c2"]["kernel"][:, :, 7]):
        leaf[...] = 0  # an empty filter of c2, a filter of f1 and a channel of c1 that nobody reads
    scene = Scene(model.apply, lambda x: x, images, images, np.zeros(2), None)
    live = live_weights(scene, v, ["c1", "c2", "f1", "f2"])
    c1, c2, f1, f2 = (p[n]["kernel"] for n in ("c1", "c2", "f1", "f2"))
    per_channel = f1.shape[0] // c2.shape[-1]
    assert live == {
        "c1": c1.size - c1[..., 7].size,
        "c2": np.count_nonzero(c2),
        "f1": (f1.shape[0] - per_channel) * (f1.shape[1] - 1),
        "f2": f2.size - f2.shape[1],
    }


def test_sign_changes_of_each_refresh_are_recorded_and_drawn(done):
    folder, _ = done
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    found = {r["phase"]: r["changed"] for r in records if "changed" in r}
    assert set(found) == {"admm_full_8"}  # the only phase that chooses signs anew
    assert set(found["admm_full_8"]) == {f"params/{n}/kernel" for n in ("c1", "c2", "f1", "f2")}
    assert all(0 <= v <= 1 for v in found["admm_full_8"].values())
    assert (folder / "sign_changes.png").exists() and "Sign changes" in (folder / "report.html").read_text()


def test_live_weights_are_reported_beside_the_kept_ones(done):
    folder, s = done
    for model in s["crossbar"]["models"].values():
        assert 0 < model["live_weights"] <= model["weights"]
    rows = s["crossbar"]["layers"]
    assert sum(r["live weights"] for r in rows) == s["crossbar"]["models"]["full_8"]["live_weights"]
    assert "Live ones lie on a path" in (folder / "report.html").read_text()


def test_reduction_and_frame_rates_are_products_of_their_factors(done):
    _, s = done
    r = s["crossbar"]["reduction"]
    assert r["product"] == pytest.approx(r["prune"] * r["bits"] * r["signs"]) and (r["bits"], r["signs"]) == (4, 2)
    assert r["measured"] == r["baseline_arrays"] / r["arrays"]
    engines = s["crossbar"]["engines"]
    rows = engines["rows"]
    for row in rows.values():
        for key in ("against_base", "against_peer"):
            f = row[key]
            assert f["fps"] == pytest.approx(np.prod([v for k, v in f.items() if k != "fps"]))
    base = rows[engines["base"]]
    assert base["against_base"]["fps"] == 1 and base["watts"] == pytest.approx(65.80808)
    skipping = rows["FORMS-8, compressed"]["against_base"]["skipping"]
    assert skipping > 1 == rows["FORMS-8, compressed, no skipping"]["against_base"]["skipping"]
    assert rows["FORMS-8, compressed"]["fps"] > rows["FORMS-8, compressed, no skipping"]["fps"]


def test_cycles_grow_with_the_fragment(done):
    _, s = done
    sizes = s["crossbar"]["skipping"]
    for layer in ("c2", "f1"):  # their 128 rows are whole fragments at every size
        means = [sizes[m]["layers"][layer]["mean"] for m in ("4", "8", "16", "128")]
        assert means == sorted(means) and 0 < means[0] < means[-1] <= 16
    assert all(s["saved"] == pytest.approx(1 - s["mean"] / 16) for s in sizes.values())
    assert all(sum(v["histogram"]) > 0 and len(v["histogram"]) == 17 for v in sizes.values())


def test_variation_has_an_interval(done):
    _, s = done
    found = s["crossbar"]["models"]["full_8"]["variation"]
    assert found["main"] == found["sweep"][0] and (found["main"]["sigma"], found["main"]["devices"]) == (0.1, 3)
    assert found["main"]["low"] <= found["main"]["mean"] <= found["main"]["high"]


@pytest.mark.slow
def test_a_fragment_whose_parts_are_not_published_has_accuracy_and_arrays_but_no_cost(tmp_path):
    settings = configs.get_config("digits_fragments_tiny").unlock()
    settings.branches = tuple(b for b in settings.branches if b["name"] in ("pruned", "full_4", "full_32"))
    settings.main = "full_32"
    s = crossbar.run(crossbar_config.read(settings), Options(tmp_path))
    found = s["crossbar"]
    assert found["models"]["full_32"]["fragment"] == 32 and found["models"]["full_32"]["proven_share"] == 1.0
    assert found["engines"]["unknown"] == [32] and "FORMS-4, compressed" in found["engines"]["rows"]
    assert not any(name.startswith("FORMS-32") for name in (*found["engines"]["rows"], *found["engines"]["latency_us"]))
    assert "fragments of 32 rows are not known" in (tmp_path / "report.html").read_text()


@pytest.mark.slow
def test_all_models_of_the_variation_table(tmp_path):
    s = crossbar.run(_config(), Options(tmp_path))
    models = s["crossbar"]["models"]
    assert set(models) == {"dense", "pruned", "polarized", "signs_8", "full_8", "noise_aware"}
    assert models["noise_aware"]["single_signed"] == 1.0 and models["polarized"]["arrays"] == 1 + 2 + 8 + 1
    for name in ("dense", "polarized", "pruned", "full_8", "noise_aware"):
        assert [r["sigma"] for r in models[name]["variation"]["sweep"]] == [0.1, 0.3]
    assert s["metric"]["one_shot"] is not None


def test_evaluation_of_the_stored_model_gives_the_same(done, capsys):
    folder, summary = done
    assert formats.load_model(folder / "compressed.safetensors").model["name"] == "digits_cnn"
    assert crossbar.run(_short(), Options(folder)) == summary
    assert "is finished and left as it is" in capsys.readouterr().out
    figures = crossbar.evaluate(_short(), Options(folder))
    assert figures["metric"]["compressed"] == summary["metric"]["compressed"]
    assert (folder / "eval" / "digits-test" / "summary.json").exists()


def test_a_finished_run_can_be_taken(done, tmp_path):
    folder, summary = done
    config = _config("taken_tiny", take=str(folder), variation__models=())
    taken = crossbar.run(config, Options(tmp_path / "t"))
    ours, theirs = taken["crossbar"]["models"]["taken"], summary["crossbar"]["models"]["full_8"]
    assert ours["hardware"] == theirs["hardware"] and ours["arrays"] == theirs["arrays"]
    assert taken["crossbar"]["reduction"] == summary["crossbar"]["reduction"]
    assert taken["metric"]["dense"] is None and taken["rate"] == summary["rate"]
    with pytest.raises(ConfigError, match="name the work directory of a finished run"):
        crossbar.run(_config("taken_tiny", take=str(tmp_path / "none")), Options(tmp_path / "u"))


@pytest.mark.slow
def test_sot_mram(tmp_path, monkeypatch):
    monkeypatch.setattr(crossbar_sot, "WIDTHS", (8, 4))  # every width is programs of its own to compile
    monkeypatch.setattr(crossbar_sot, "INPUT_WIDTHS", (8, 2))
    settings = configs.get_config("digits_sot_tiny").unlock()
    settings.one_shot, settings.hardware.images = False, 1000
    summary = crossbar.run(crossbar_config.read(settings), Options(tmp_path))
    found = summary["crossbar"]
    assert found["images"] == summary["dataset"]["test"] == 50  # what there is, not what was asked for
    assert all(configs.get_config(v).hardware.images == 0 for v in configs.VARIANTS)
    assert summary["metric"]["dense"] == pytest.approx(found["models"]["dense"]["float"])  # of the same images
    assert set(found["models"]) == {"dense", "pruned", "bits_8", "bits_4"}
    dense, pruned, eight, four = (found["models"][n] for n in ("dense", "pruned", "bits_8", "bits_4"))
    assert dense["ands"] > pruned["ands"] >= eight["ands"] == 2 * four["ands"]  # energy goes with kept x bits x bits
    assert dense["uj"] > pruned["uj"] > four["uj"] and four["trained_bits"] == 4
    assert four["on_levels"] == four["float"] and summary["metric"]["compressed"] == four["hardware"]
    assert [r["ms"] for r in found["write_sensitivity"]] == sorted(r["ms"] for r in found["write_sensitivity"])
    assert [r["bits"] for r in found["rounded"]["pruned"]] == [8, 4]
    assert summary["violations"] == 0 and json.loads((tmp_path / "summary.json").read_text()) == summary
    assert [r["bits"] for r in found["inputs"]] == [8, 2]
    assert found["inputs"][0]["hardware"] == found["models"][found["main"]]["hardware"]
    assert found["inputs"][0]["uj"] > found["inputs"][1]["uj"]
    assert {"sot.png", "writes.png", "rounded.png", "inputs.png"} <= {p.name for p in tmp_path.iterdir()}


_LONG = ("mnist_lenet5_forms_orders", "cifar_resnet20_forms")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=[pytest.mark.slow] if v in _LONG else []) for v in configs.VARIANTS if v != "taken"],
)
def test_every_variant_fits_its_network(variant):
    for name in (variant, f"{variant}_tiny"):
        config = crossbar_config.read(configs.get_config(name))
        todo = plan_phases(config)
        assert len({p.name for p in todo}) == len(todo)
        if name == variant:
            model = models.build(config.model.name, classes=10, **config.model.options)
            x = jax.ShapeDtypeStruct((1, *SHAPES[config.data.name]), jnp.float32)
            params = {"params": jax.eval_shape(model.init, jax.random.key(0), x)["params"]}
            for phase in todo:
                if phase.rules is not None:
                    resolve(phase.rules, params)
        else:
            assert sum(p.fit.epochs for p in todo) <= 2 * len(todo)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"main": "full_9"}, "main='full_9' is no branch; they are pruned"),
        ({"hardware__fragment": 5}, "hardware.fragment=5 is impossible"),
        ({"hardware__weight_bits": 7}, "hardware.weight_bits=7 is impossible; it must be even"),
        ({"hardware__engine": "dram"}, "it must be forms or sot"),
        ({"variation__seeds": 1}, "at least 2 devices"),
        ({"variation__models": ("ful",)}, "variation.models names 'ful'"),
        ({"take": "a", "init_from": "b"}, "both name a run"),
        ({"rules": "r.json"}, "rules='r.json' replaces the sets of a config's only stage, and this one has 4"),
        ({"noise_aware__start": "x"}, "noise_aware.start='x' is no branch"),
    ],
)
def test_impossible_settings_are_named(changes, words):
    with pytest.raises(ConfigError, match=words):
        _config(**changes)


@pytest.mark.data
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mnist_lenet5_forms_tiny", "cifar_resnet20_forms_tiny", "cifar_resnet20_sot_tiny"])
def test_papers_networks(variant, tmp_path, data_dir):
    config = _config(variant, variation__models=())
    summary = crossbar.run(config, Options(tmp_path, str(data_dir)))
    assert summary["violations"] == 0
    if config.hardware.engine == "forms":
        rows = summary["crossbar"]["engines"]["rows"]
        assert {f"FORMS-{m}, compressed" for m in (4, 8, 16)} <= set(rows)
        assert all(m["proven_share"] == 1 for m in summary["crossbar"]["models"].values())
