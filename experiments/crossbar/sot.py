"""Evaluates models on a SOT-MRAM engine: accuracy by bit planes, sub-arrays, operations, latency and energy."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from compressx.crossbar import layers, network, sot_mram
from compressx.crossbar.design import Design
from compressx.crossbar.mapping import Layer
from compressx.crossbar.sot_mram import Engine, Operands
from experiments.crossbar.models import Scene, Subject, cut, live_weights

WRITE_FACTORS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
WIDTHS = (8, 7, 6, 5, 4)
INPUT_WIDTHS = (8, 6, 4, 3, 2)


class Placed(NamedTuple):
    """A model on the grid; `operands` and `input_scales` by module path."""

    subject: Subject
    grid: network.Grid
    layers: list[Layer]
    operands: dict[str, Operands]
    input_scales: dict[str, float]


def place(subject: Subject, scene: Scene, hardware: Any, bits: int = 0) -> Placed:
    """Puts a model's weights on levels of the width that they were trained on, or else rounds them to `bits`."""
    one = scene.prepare(jnp.asarray(scene.calibration[:1]))
    found = network.find_layers(scene.apply, subject.variables, one, train=False)
    trained = {p: h for p, h in subject.held.items() if h.bits and not bits}
    rounded = bits or hardware.weight_bits
    width = {x.name: trained[x.name].magnitude + 1 if x.name in trained else rounded for x in found}
    levels = {p: network.levels_of(Operands(w_bits=b)) for p, b in width.items()}
    scales = {p: h.scale for p, h in trained.items() if h.scale is not None}
    grid = network.on_grid(subject.variables, levels, scales)
    seen = _inputs(scene, grid.variables)
    operands, input_scales = {}, {}
    for path, x in seen.items():
        signed = bool(x.min() < 0)
        operands[path] = Operands(hardware.input_bits, width[path], signed)
        input_scales[path] = (float(np.abs(x).max()) or 1.0) / operands[path].input_range[1]
    return Placed(subject, grid, found, operands, input_scales)


def _inputs(scene: Scene, variables: Any) -> dict[str, np.ndarray]:
    images = scene.prepare(jnp.asarray(scene.calibration))
    _, seen = layers.calibrate(scene.apply, Design(inputs="sign_planes"), variables, images, train=False)
    return {path: np.asarray(x) for path, x in seen.items()}


def scores(subject: Subject, scene: Scene, hardware: Any) -> dict[str, Any]:
    """Accuracy of a model in float and through the engine."""
    return _scores(place(subject, scene, hardware), scene, hardware, network.make_scorer(scene.apply, scene.prepare))


def _batched(scene: Scene, hardware: Any) -> Any:
    return network.batches(*cut(scene, hardware.images), hardware.batch)


def _scores(p: Placed, scene: Scene, hardware: Any, score: network.Scorer) -> dict[str, Any]:
    batched = _batched(scene, hardware)
    deployed = network.deploy_network(p.grid, p.operands, p.input_scales, groups=_groups(p))
    return {
        "float": network.accuracy(score, {}, p.subject.variables, batched),
        "on_levels": network.accuracy(score, {}, p.grid.variables, batched),
        "hardware": network.accuracy(score, deployed, p.grid.variables, batched),
    }


def _groups(p: Placed) -> dict[str, int]:
    return {layer.name: layer.kept.shape[0] for layer in p.layers}


def measure(
    subjects: Sequence[Subject], main: str, scene: Scene, hardware: Any, variation: Any, seed: int
) -> dict[str, Any]:
    """Everything about all models, as plain numbers for the summary; a digital engine has no variation to draw."""
    del variation, seed
    engine, score = Engine(), network.make_scorer(scene.apply, scene.prepare)
    models, chosen = {}, None
    for s in subjects:
        p = place(s, scene, hardware)
        chosen = p if s.name == main else chosen
        live = live_weights(scene, p.grid.variables, list(p.operands))
        models[s.name] = {
            **_cost(p, engine),
            "nonzero_weights": sum(int(layer.kept.sum()) for layer in p.layers),
            "live_weights": None if live is None else sum(live.values()),
            **_scores(p, scene, hardware, score),
        }
    assert chosen is not None
    x_bits, w_bits = _bits(chosen)
    return {
        "models": models,
        "images": len(cut(scene, hardware.images)[0]),
        "layers": [work.row() for work in sot_mram.network(chosen.layers, engine, x_bits, w_bits).layers],
        "rounded": _rounded(subjects, scene, hardware, score),
        "inputs": _inputs_on_fewer_bits(chosen.subject, scene, hardware, score),
        "write_sensitivity": _writes(chosen, engine),
        "assumptions": list(sot_mram.assumptions(engine)),
    }


def _bits(p: Placed) -> tuple[dict[str, int], dict[str, int]]:
    return {n: o.x_bits for n, o in p.operands.items()}, {n: o.w_bits for n, o in p.operands.items()}


def _cost(p: Placed, engine: Engine) -> dict[str, Any]:
    report = sot_mram.network(p.layers, engine, *_bits(p))
    return {
        "weights": sum(work.weights for work in report.layers),
        "weight_bits": max(o.w_bits for o in p.operands.values()),
        "trained_bits": next((h.bits for h in p.subject.held.values() if h.bits), None),
        "input_bits": max(o.x_bits for o in p.operands.values()),
        "subarrays": report.subarrays,
        "ands": report.ands,
        "writes": sum(work.writes for work in report.layers),
        "ms": report.ms,
        "fps": report.fps,
        "dynamic_uj": report.dynamic_uj,
        "uj": report.uj,
        "programming_uj": report.programming_uj,
    }


def _writes(p: Placed, engine: Engine) -> list[dict[str, float]]:
    """Latency and energy with writes so many times as long and as costly."""
    rows = []
    for factor in WRITE_FACTORS:
        slow = replace(engine, write_ns=engine.write_ns * factor, write_nj=engine.write_nj * factor)
        found = sot_mram.network(p.layers, slow, *_bits(p))
        rows.append({"factor": factor, "write_ns": slow.write_ns, "ms": found.ms, "uj": found.uj, "fps": found.fps})
    return rows


def _rounded(
    subjects: Sequence[Subject], scene: Scene, hardware: Any, score: network.Scorer
) -> dict[str, list[dict[str, Any]]]:
    """Models that were not trained on levels, merely rounded to each width: accuracy and cost of the engine."""
    out = {}
    for s in subjects:
        if s.quantized:
            continue
        rows = []
        for bits in WIDTHS:
            p = place(s, scene, hardware, bits)
            found = sot_mram.network(p.layers, Engine(), *_bits(p))
            batched = _batched(scene, hardware)
            rounded = network.accuracy(score, {}, p.grid.variables, batched)
            rows.append({"bits": bits, "on_levels": rounded, "ms": found.ms, "uj": found.uj})
        out[s.name] = rows
    return out


def _inputs_on_fewer_bits(
    subject: Subject, scene: Scene, hardware: Any, score: network.Scorer
) -> list[dict[str, Any]]:
    """The main model with its activations on fewer bits, without training: they cost as much as those of weights."""
    rows = []
    for bits in INPUT_WIDTHS:
        p = place(subject, scene, replace(hardware, input_bits=bits))
        found = sot_mram.network(p.layers, Engine(), *_bits(p))
        deployed = network.deploy_network(p.grid, p.operands, p.input_scales, groups=_groups(p))
        accuracy = network.accuracy(score, deployed, p.grid.variables, _batched(scene, hardware))
        rows.append({"bits": bits, "hardware": accuracy, "ms": found.ms, "uj": found.uj})
    return rows
