"""Evaluates models on ReRAM crossbars: accuracy, saturation, zero skipping, device variation, arrays and cost."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx.crossbar import aware, chips, cost, energy, layers, mapping, network, noise, presets, scaling
from compressx.crossbar.design import Design
from compressx.crossbar.layers import Deployed
from compressx.crossbar.mapping import Layer
from compressx.crossbar.zero_skip import Skipping
from experiments.crossbar.models import Scene, Subject, cut, live_weights

SIZES = (4, 8, 16, 128)  # fragments whose effective cycles are drawn; 128 is a whole array
BASE_BITS = 32  # of the weights of the network that reductions and frame rates are compared with


class Placed(NamedTuple):
    """A model on the grid, with everything that is known about its layers.

    Attributes:
      subject: the model; grid: its weights on levels; layers: as matrices, with the rows that are programmed.
      designs: by module path, flip encoding; input_scales: by module path; signed: layers with negative inputs.
      live: weights on a path from an input to an output, by module path, or None (`live_weights`).
    """

    subject: Subject
    grid: network.Grid
    layers: list[Layer]
    designs: dict[str, Design]
    input_scales: dict[str, float]
    signed: tuple[str, ...]
    live: dict[str, int] | None

    def deploy(self, encoding: str, prove: bool) -> dict[str, Deployed]:
        """Its arrays under an ADC encoding."""
        designs = {path: d.but(encoding=encoding) for path, d in self.designs.items()}
        rows = {layer.name: layer.rows for layer in self.layers if layer.rows is not None}
        groups = {layer.name: layer.kept.shape[0] for layer in self.layers}
        return network.deploy_network(self.grid, designs, self.input_scales, rows, groups, prove=prove)


def place(subject: Subject, scene: Scene, hardware: Any) -> Placed:
    """Puts a model's weights on the grid, and finds its layers, designs and input scales.

    A layer whose fragments are polarized gets FORMS' design of that size; any other the same with positive and negative
    columns. Inputs that are negative on the calibration images are fed as two planes.
    """
    one = scene.prepare(jnp.asarray(scene.calibration[:1]))
    held = {path: h.rows for path, h in subject.held.items()}
    found = network.find_layers(scene.apply, subject.variables, one, train=False)
    found = [replace(layer, rows=held.get(layer.name)) for layer in found]
    base = {layer.name: _design(subject, layer.name, hardware) for layer in found}
    scales = {p: h.scale for p, h in subject.held.items() if h.scale is not None and p in base}
    grid = network.on_grid(subject.variables, {p: network.levels_of(d) for p, d in base.items()}, scales)
    widest = next(iter(base.values())).but(inputs="sign_planes")
    images = scene.prepare(jnp.asarray(scene.calibration))
    input_scales, seen = layers.calibrate(scene.apply, widest, grid.variables, images, train=False)
    signed = tuple(p for p in base if bool(jnp.any(seen[p] < 0)))
    designs = {p: d.but(inputs="sign_planes") if p in signed else d for p, d in base.items()}
    live = live_weights(scene, grid.variables, list(base))
    return Placed(subject, grid, found, designs, input_scales, signed, live)


def _design(subject: Subject, path: str, hardware: Any) -> Design:
    held = subject.held.get(path)
    bits = held.magnitude + held.magnitude % 2 if held and held.bits else hardware.weight_bits  # cells of two
    fragment = held.fragment if held and held.fragment else hardware.fragment
    design = presets.forms(fragment, weight_bits=bits).but(input_bits=hardware.input_bits)
    return design if held and held.fragment else design.but(signs="differential_digital", name=f"pairs-{fragment}")


def targets(subject: Subject, scene: Scene, hardware: Any) -> dict[str, aware.Target]:
    """What each layer of a polarized model is trained for when training is noise-aware."""
    placed = place(subject, scene, hardware)
    out = {}
    for path, design in placed.designs.items():
        held = subject.held.get(path)
        rows = held.rows if held else None
        out[path] = aware.Target(design, placed.grid.scales[path], placed.input_scales[path], rows)
    return out


# -- measurements ------------------------------------------------------------------------------------------------------


def scores(subject: Subject, scene: Scene, hardware: Any) -> dict[str, Any]:
    """Accuracy of a model in float and through the engine."""
    placed = place(subject, scene, hardware)
    return _scores(placed, scene, hardware, network.make_scorer(scene.apply, scene.prepare))


def measure(
    subjects: Sequence[Subject], main: str, scene: Scene, hardware: Any, variation: Any, seed: int
) -> dict[str, Any]:
    """Everything about all models, as plain numbers for the summary."""
    placed = {s.name: place(s, scene, hardware) for s in subjects}
    score = network.make_scorer(scene.apply, scene.prepare)
    observe = network.make_observer(scene.apply, scene.prepare)
    models = {}
    for name, p in placed.items():
        models[name] = {**_about(p), **_scores(p, scene, hardware, score)}
        if name in variation.models:
            models[name]["variation"] = _variation(p, scene, hardware, variation, score, seed)
    chosen = placed[main]
    batched = [x for x, _ in network.batches(scene.images[: hardware.skip_images], scene.labels, 10)]
    skips = _skipping(chosen, observe, batched, SIZES)
    few = jnp.asarray(scene.images[: hardware.skip_images])
    clipped = network.saturated(observe, chosen.deploy("saturating", True), chosen.grid.variables, few)
    return {
        "models": models,
        "images": len(cut(scene, hardware.images)[0]),
        "skip_images": len(few),
        "signed_inputs": list(chosen.signed),
        "layers": _layer_rows(chosen, clipped),
        "occupancy": {layer.name: _occupancy(layer, chosen.designs[layer.name]) for layer in chosen.layers},
        "skipping": {str(m): _skip_rows(skips[m], chosen) for m in SIZES},
        "reduction": _reduction(chosen),
        "engines": _engines(placed, chosen, skips, observe, batched, hardware),
        "inconsistencies": [vars(i) for i in chips.known_inconsistencies()],
        "chips": {name: _chip(make()) for name, make in chips.CHIPS.items() if name in ("forms", "isaac")},
    }


def _scores(p: Placed, scene: Scene, hardware: Any, score: network.Scorer) -> dict[str, Any]:
    """Accuracies: float weights, weights on levels, the engine, and a saturating ADC on fewer images."""
    batched = network.batches(*cut(scene, hardware.images), hardware.batch)
    few = network.batches(*cut(scene, min(hardware.slow_images, len(scene.images))), hardware.batch)
    variables = p.grid.variables
    flip, clipping = p.deploy("flip", True), p.deploy("saturating", True)
    return {
        "float": network.accuracy(score, {}, p.subject.variables, batched),
        "on_levels": network.accuracy(score, {}, variables, batched),
        "hardware": network.accuracy(score, flip, variables, batched),
        "proven_share": network.proven_share(flip),
        "few_images": min(hardware.slow_images, len(scene.images)),
        "hardware_few": network.accuracy(score, flip, variables, few),
        "saturating_few": network.accuracy(score, clipping, variables, few),
        "saturating_proven_share": network.proven_share(clipping),
    }


def _about(p: Placed) -> dict[str, Any]:
    """Arrays, weights and what the sets are, of a model."""
    mapped = [mapping.map_layer(layer, p.designs[layer.name]) for layer in p.layers]
    cells = sum(m.cells for m in mapped)
    return {
        "fragment": p.subject.fragment,
        "order": next((h.order for h in p.subject.held.values() if h.order), None),
        "trained_bits": next((h.bits for h in p.subject.held.values() if h.bits), None),
        "signs": next(iter(p.designs.values())).signs,
        "weights": sum(m.weights for m in mapped),
        "live_weights": None if p.live is None else sum(p.live.values()),
        "arrays": sum(m.arrays for m in mapped),
        "arrays_unsqueezed": sum(m.dense_arrays for m in mapped),
        "utilisation": cells / max(1, sum(m.arrays * m.array_cells for m in mapped)),
        "single_signed": _single_signed(p),
    }


def _single_signed(p: Placed) -> float | None:
    """Share of fragments with a single sign, in polarized layers; counted afresh from the weights."""
    total = mixed = 0
    for path, held in p.subject.held.items():
        if held.fragment and held.rows is not None:
            w = np.asarray(network.kernel(p.grid.variables, path))
            w = w.reshape(-1, w.shape[-1])[held.rows]
            pad = np.pad(w, ((0, -len(w) % held.fragment), (0, 0))).reshape(-1, held.fragment, w.shape[1])
            mixed += int(((pad > 0).any(1) & (pad < 0).any(1)).sum())
            total += pad.shape[0] * pad.shape[2]
    return 1 - mixed / total if total else None


def _variation(
    p: Placed, scene: Scene, hardware: Any, config: Any, score: network.Scorer, seed: int
) -> dict[str, Any]:
    """Accuracy over devices: mean, spread and interval for every sigma, on the first images."""
    images, labels = cut(scene, min(config.images, len(scene.images)))
    batched = network.batches(images, labels, hardware.batch)
    deployed, key = p.deploy("flip", False), jax.random.key(seed)
    rows = []
    for sigma in sorted({*config.sweep, config.sigma}):
        metric = network.noisy_accuracy(score, deployed, p.grid.variables, batched, noise.Variation("lognormal", sigma))
        count = config.seeds if sigma == config.sigma else config.sweep_seeds
        found = noise.monte_carlo(metric, key, count, batch=1 if jax.default_backend() == "cpu" else 8)
        interval = {"mean": found.mean, "std": found.std, "low": found.low, "high": found.high}
        rows.append({"sigma": sigma, "devices": count, **interval})
    ideal = network.accuracy(score, deployed, p.grid.variables, batched)
    main = next(r for r in rows if r["sigma"] == config.sigma)
    return {"images": len(images), "ideal": ideal, "loss": ideal - main["mean"], "main": main, "sweep": rows}


def _skipping(
    p: Placed, observe: network.Observer, batched: list[Any], sizes: Sequence[int]
) -> dict[int, dict[str, Skipping]]:
    """Effective cycles by fragment size and layer, on the activations that the engine sees."""
    wide = {path: [d.but(active_rows=m) for m in sizes] for path, d in p.designs.items()}
    found = network.skipping(observe, p.deploy("flip", True), p.grid.variables, batched, wide)
    return {m: {path: each[i] for path, each in found.items()} for i, m in enumerate(sizes)}


def _skip_rows(skips: Mapping[str, Skipping], p: Placed) -> dict[str, Any]:
    """Of all layers: the histogram of fragments, and the mean with each layer weighted by its inputs (rows x uses).

    Weighted by fragments instead, layers would count differently at every size, and sizes would not compare.
    """
    histogram = np.sum([s.histogram for s in skips.values()], axis=0)
    full = next(iter(p.designs.values())).cycles
    rows = {layer.name: sum(len(layer.laid(g)) for g in range(len(layer.kept))) * layer.uses for layer in p.layers}
    mean = sum(rows[path] * s.mean for path, s in skips.items()) / max(1, sum(rows[path] for path in skips))
    return {
        "histogram": [int(n) for n in histogram],
        "mean": mean,
        "saved": 1 - mean / full,
        "all_zero": float(histogram[0] / histogram.sum()),
        "layers": {
            p: {"mean": s.mean, "saved": s.saved, "speedup": s.speedup, "all_zero": s.all_zero_share}
            for p, s in skips.items()
        },
    }


def _layer_rows(p: Placed, clipped: Mapping[str, tuple[int, int]]) -> list[dict[str, Any]]:
    rows = []
    for layer in p.layers:
        mapped = mapping.map_layer(layer, p.designs[layer.name])
        count, conversions = clipped[layer.name]
        held = p.subject.held.get(layer.name)
        frees = mapped.groups == 1 and mapping.frees_whole_arrays(mapped, p.designs[layer.name])
        rows.append(
            {
                **mapped.row(),
                "live weights": None if p.live is None else p.live[layer.name],
                "design": p.designs[layer.name].name,
                "fragment": held.fragment if held else None,
                "frees whole arrays": frees,
                "clipped": count,
                "conversions": conversions,
            }
        )
    return rows


def _occupancy(layer: Layer, design: Design) -> list[list[float]]:
    parts = [mapping.occupancy(layer, design, g) for g in range(min(1, layer.kept.shape[0]))]
    return [[round(float(v), 4) for v in row] for row in parts[0]]


def _reduction(p: Placed) -> dict[str, float]:
    """From a dense network of 32-bit weights in split arrays to this one: prune x bits x signs, and whole arrays."""
    r = mapping.reduction(p.layers, next(iter(p.designs.values())), BASE_BITS)
    names = ("prune", "bits", "signs", "product", "baseline_arrays", "arrays", "measured", "rounding")
    return {name: float(getattr(r, name)) for name in names}


# -- cost --------------------------------------------------------------------------------------------------------------


def _engines(
    placed: Mapping[str, Placed],
    main: Placed,
    skips: Mapping[int, Mapping[str, Skipping]],
    observe: network.Observer,
    batched: list[Any],
    hardware: Any,
) -> dict[str, Any]:
    """Area, power, energy and frames per second of the network on several engines, and ratios in factors."""
    dense = [Layer(layer.name, np.ones_like(layer.kept), layer.uses) for layer in main.layers]
    squeezed = [replace(layer, rows=None) for layer in main.layers]  # where signs bind no rows, empty ones can all go
    isaac, puma, prime = presets.isaac(), presets.puma_like(), presets.prime_like()
    chip = {name: make() for name, make in chips.CHIPS.items()}
    wide = isaac.but(name="ISAAC", weight_bits=BASE_BITS, signs="differential_digital")
    eight = {"weight_bits": hardware.weight_bits}
    flat = presets.forms(8).but(**eight)
    run = lambda found, design, c, **more: _plan(found, design, c, main.signed, hardware, **more)
    plans = {
        "ISAAC, dense, 32 bit, split": run(dense, wide, chip["isaac"]),
        "ISAAC, dense, 16 bit": run(dense, isaac, chip["isaac"]),
        "PUMA-like, dense, 16 bit": run(dense, puma, chip["puma"]),
        "PRIME-like, dense, 6-bit inputs": run(dense, prime, chip["prime_like"]),
        "FORMS-8, dense, no skipping": run(dense, flat, chip["forms"]),
        "ISAAC, compressed": run(squeezed, isaac.but(**eight), chip["isaac"]),
        "PUMA-like, compressed": run(squeezed, puma.but(**eight), chip["puma"]),
    }
    twins = {m: p for m, p in _by_fragment(placed, main).items() if m}
    unknown = [m for m in twins if m not in presets.FORMS_FRAGMENTS]
    for m, p in sorted(twins.items()):
        if m in unknown:
            continue
        found = skips[m] if p is main else _skipping(p, observe, batched, (m,))[m]
        sweeps = {path: s.mean_slowest for path, s in found.items()}
        design = presets.forms(m).but(weight_bits=next(iter(p.designs.values())).weight_bits)
        plans[f"FORMS-{m}, compressed, no skipping"] = run(p.layers, design, chip["forms"])
        plans[f"FORMS-{m}, compressed"] = run(p.layers, design, chip["forms"], sweeps=sweeps)
    base, peer = plans["ISAAC, dense, 32 bit, split"], plans["ISAAC, compressed"]
    own = f"FORMS-{main.subject.fragment}, compressed"
    own = own if own in plans else "ISAAC, compressed"
    return {
        "base": "ISAAC, dense, 32 bit, split",
        "peer": "ISAAC, compressed",
        "rows": {
            name: {
                "arrays": plan.arrays,
                "chips": plan.chips,
                "mm2": plan.mm2,
                "watts": plan.watts,
                "fps": plan.fps,
                "chip_mj": plan.chip_mj,
                "array_mj": plan.array_mj,
                "gops_per_watt": plan.gops_per_watt,
                "gops_per_mm2": plan.gops_per_mm2,
                "bottleneck": plan.bottleneck.name,
                "against_base": cost.compare(plan, base),
                "against_peer": cost.compare(plan, peer),
            }
            for name, plan in plans.items()
        },
        "latency_us": {name: run_one.latency_us for name, run_one in _single(main, skips, chip, hardware).items()},
        "energy": {"engine": own, "layers": energy.layer_energy(plans[own])},
        "peak": _peaks(chip),
        "unknown": sorted(unknown),
        "assumptions": list(dict.fromkeys(line for p in plans.values() for line in p.assumptions)),
    }


def _by_fragment(placed: Mapping[str, Placed], main: Placed) -> dict[int, Placed]:
    """A model for every fragment size: the main one for its own, else the first polarized and quantized one."""
    found: dict[int, Placed] = {}
    for p in [main, *placed.values()]:
        if p.subject.fragment and (p is main or p.subject.quantized):
            found.setdefault(p.subject.fragment, p)
    return found


def _plan(
    found: Sequence[Layer], design: Design, chip: chips.Chip, signed: tuple[str, ...], hardware: Any, **more: Any
) -> cost.Plan:
    options = {"signed": signed, "pooled": hardware.pooled, "frames": hardware.frames, **more}
    return cost.plan(mapping.map_network(found, design), design, chip, **options)


def _single(main: Placed, skips: Any, chip: Mapping[str, chips.Chip], hardware: Any) -> dict[str, cost.Plan]:
    """Latency wants one frame at a time."""
    m = main.subject.fragment
    out = {"ISAAC, compressed": presets.isaac().but(weight_bits=hardware.weight_bits)}
    squeezed = [replace(layer, rows=None) for layer in main.layers]
    plans = {n: _plan(squeezed, d, chip["isaac"], main.signed, hardware, frames=1) for n, d in out.items()}
    if m in presets.FORMS_FRAGMENTS:
        sweeps = {path: s.mean_slowest for path, s in skips[m].items()}
        design = presets.forms(m)
        plans[f"FORMS-{m}, compressed"] = _plan(
            main.layers, design, chip["forms"], main.signed, hardware, frames=1, sweeps=sweeps
        )
    return plans


def _peaks(chip: Mapping[str, chips.Chip]) -> dict[str, dict[str, float]]:
    """Peak throughput, 16-bit weights and inputs, and per area and power against ISAAC."""
    designs = {f"FORMS-{m}": (presets.forms(m).but(weight_bits=16), chip["forms"]) for m in (4, 8, 16)}
    designs |= {"ISAAC": (presets.isaac(), chip["isaac"]), "PUMA-like": (presets.puma_like(), chip["puma"])}
    base = cost.peak_gops(*designs["ISAAC"])
    area, power = base / chip["isaac"].mm2, base / chip["isaac"].mw
    out = {}
    for name, (design, made) in designs.items():
        c = scaling.fitted(made, design)
        gops = cost.peak_gops(design, c)
        out[name] = {
            "gops": gops,
            "gops_per_watt": gops / c.mw * 1e3,
            "gops_per_mm2": gops / c.mm2,
            "area_ratio": gops / c.mm2 / area,
            "power_ratio": gops / c.mw / power,
        }
    return out


def _chip(c: chips.Chip) -> dict[str, Any]:
    return {
        "parts": [{"part": p.name, "spec": p.spec, "mw": p.mw, "mm2": p.mm2, "source": p.source} for p in c.parts],
        "mcus": c.mcus,
        "mcus_mw": c.mcus_mw,
        "digital_mw": c.digital_mw,
        "digital_mm2": c.digital_mm2,
        "tile_mw": c.tile_mw,
        "tile_mm2": c.tile_mm2,
        "watts": c.mw / 1e3,
        "mm2": c.mm2,
    }
