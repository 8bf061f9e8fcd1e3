"""Pictures and tables of a crossbar experiment, from its own block of the summary."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common.report import format as fmt
from experiments.common.report import metrics, plots
from experiments.common.report.html import Picture, Table
from experiments.crossbar import plots as draw

_FACTORS = ("prune", "bits", "signs", "rounding", "sweeps", "skipping", "clock", "chip", "balance")
_SENSE = (
    "prune x bits x signs x rounding: fewer array-uses (weights, each as often as it is used; columns of a magnitude; "
    "split arrays; whole arrays). sweeps x skipping x clock: time of one (groups of rows and input cycles; zero "
    "skipping; a cycle). chip: arrays at hand; balance: how evenly the layers keep them busy."
)


_LIVE = (
    "Kept weights are not zero. Live ones lie on a path from an input to an output: the others feed a filter that "
    "nobody reads, or read one that is empty, and are programmed for nothing."
)


def pictures(workdir: Path, found: Mapping[str, Any]) -> list[Picture]:
    """The plots, as PNGs in the work directory."""
    return _forms_pictures(workdir, found) if found["engine"] == "forms" else _sot_pictures(workdir, found)


def sections(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The tables."""
    return _forms_sections(found) if found["engine"] == "forms" else _sot_sections(found)


def sign_changes(workdir: Path) -> list[Picture]:
    """How many signs the refreshes of each phase changed, if there were any."""
    curves: dict[str, tuple[list[int], list[float]]] = {}
    for record in metrics.read_metrics(workdir / "metrics.jsonl"):
        if shares := record.get("changed"):
            epochs, means = curves.setdefault(record["phase"], ([], []))
            epochs.append(record["epoch"])
            means.append(sum(shares.values()) / len(shares))
    if not curves:
        return []
    path = plots.lines(
        workdir / "sign_changes.png",
        curves,
        title="Fragments whose sign the last refresh changed",
        ylabel="share of fragments, mean over layers",
        xlabel="epoch of the phase",
        percent=True,
    )
    text = "Of the fragments that hold a weight. Falling curves: the signs settle while ADMM runs."
    return [Picture(path, "Sign changes", text)]


# -- ReRAM -------------------------------------------------------------------------------------------------------------


def _forms_pictures(workdir: Path, found: Mapping[str, Any]) -> list[Picture]:
    out = []
    rows: list[Any] = found["layers"]
    names = [r["layer"] for r in rows]
    dense, kept = (sum(r[key] for r in rows) for key in ("arrays dense", "arrays"))
    path = draw.pairs(
        workdir / "mapping.png",
        names,
        {"dense": [r["arrays dense"] for r in rows], "squeezed": [r["arrays"] for r in rows]},
        title=f"Arrays of each layer: {dense} dense, {kept} compacted",
        xlabel="arrays",
        log=max(r["arrays dense"] for r in rows) > 50,
    )
    out.append(Picture(path, "Mapping", f"Model {found['main']}: pruned rows and columns are compacted."))
    path = draw.occupancy(workdir / "occupancy.png", found["occupancy"])
    text = "Every square is an array, its number the share of cells of non-zero weights in per cent."
    out.append(Picture(path, "Occupancy", text))
    sizes = {f"{m} rows: mean {s['mean']:.1f}": s["histogram"] for m, s in found["skipping"].items()}
    path = draw.cycles(workdir / "cycles.png", sizes)
    text = f"All layers, {found['skip_images']} test images. A fragment whose inputs are all zero takes no cycle."
    text += " Means: layers weighted by their inputs."
    out.append(Picture(path, "Effective input cycles", text))
    path = plots.bars(
        workdir / "saturation.png",
        names,
        [100 * r["clipped"] / max(1, r["conversions"]) for r in rows],
        title="Clipped conversions with a saturating ADC",
        xlabel="% of conversions",
    )
    text = "The paper's ADC widths at face value, without flipped columns; with them nothing clips."
    out.append(Picture(path, "Saturation", text))
    drawn = {name: m["variation"] for name, m in found["models"].items() if "variation" in m}
    if drawn:
        path = draw.variation(workdir / "variation.png", drawn)
        first = next(iter(drawn.values()))
        text = f"{first['images']} test images, {first['main']['devices']} devices at sigma {first['main']['sigma']:g}"
        others = sorted({r["devices"] for r in first["sweep"] if r is not first["main"]} - {first["main"]["devices"]})
        text += f", {others[0]} at the others." if others else "."
        out.append(Picture(path, "Device variation", f"{text} Sigma 0 is the ideal engine on the same images."))
    engines = found["engines"]["rows"]
    path = draw.pairs(
        workdir / "fps.png",
        list(engines),
        {"FPS": [r["against_base"]["fps"] for r in engines.values()]},
        title="Frames per second",
        xlabel="ratio to dense 32-bit weights in split arrays on ISAAC",
        log=True,
    )
    out.append(Picture(path, "Throughput", "One chip each, as many copies of the network as fit; factors below."))
    for what, unit in (("mw", "mW"), ("mm2", "mm²")):
        bars = {}
        for name, chip in found["chips"].items():
            parts = {p["part"]: chip["mcus"] * p[what] for p in chip["parts"]}
            bars[name.upper()] = _largest({**parts, "buffers, bus, router": chip[f"digital_{what}"]})
        title = f"{'Power' if what == 'mw' else 'Area'} of a tile"
        path = draw.breakdown(workdir / f"tile_{what}.png", bars, title=title, xlabel=unit)
        out.append(Picture(path, title, "Sums of the published parts, fragments of 8 rows; small parts are joined."))
    return out


def _largest(parts: Mapping[str, float], keep: int = 6) -> dict[str, float]:
    order = sorted(parts, key=lambda k: -parts[k])
    small = sum(parts[k] for k in order[keep:])
    return {k: parts[k] for k in order[:keep]} | ({"others": small} if small else {})


def _forms_sections(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    models = found["models"]
    head: tuple[str, ...] = (
        "model",
        "fragment",
        "order",
        "single-signed",
        "float",
        "on levels",
        "engine",
        "saturating",
        "same images",
    )
    accuracy = Table(
        head,
        [
            (
                name,
                fmt.text(m["fragment"]),
                fmt.text(m["order"]),
                fmt.percent(m["single_signed"], 0),
                *(fmt.percent(m[k]) for k in ("float", "on_levels", "hardware", "saturating_few", "hardware_few")),
            )
            for name, m in models.items()
        ],
        (False, *[True] * 8),
    )
    first = next(iter(models.values()))
    note = (
        f"Engine: {found['images']} test images, flipped columns, no conversion clips (proven before running, for all "
        f"inputs). Saturating: {first['few_images']} images, every conversion simulated; beside it the engine on the "
        "same ones. Models whose fragments are not polarized run on positive and negative columns."
    )
    out: list[tuple[str, Any]] = [("Accuracy through the engine", [note, accuracy])]
    drawn = {name: m["variation"] for name, m in models.items() if "variation" in m}
    if drawn:
        rows: list[Any] = [
            (
                name,
                f"{r['sigma']:g}",
                str(r["devices"]),
                fmt.percent(v["ideal"]),
                fmt.percent(r["mean"]),
                f"{fmt.percent(r['low'])} to {fmt.percent(r['high'])}",
                f"{round(100 * (v['ideal'] - r['mean']), 2) + 0.0:.2f}",
            )
            for name, v in drawn.items()
            for r in v["sweep"]
        ]
        head = ("model", "sigma", "devices", "ideal", "mean", "95 % interval of the mean", "points lost")
        out.append(("Device variation", Table(head, rows, (False, *[True] * 6))))
    out.append(("Reduction of arrays", _reduction(found["reduction"])))
    rows = [
        (name, *(fmt.text(m[k]) for k in ("weights", "live_weights", "arrays")), fmt.percent(m["utilisation"], 1))
        for name, m in models.items()
    ]
    head = ("model", "kept weights", "live", "arrays", "utilisation")
    out.append(("Weights", [_LIVE, Table(head, rows, (False, *[True] * 4))]))
    keys = ("matrix", "kept rows", "kept columns", "weights", "live weights", "uses", "arrays dense", "arrays")
    body: list[Any] = [
        (
            r["layer"],
            *(fmt.text(r[k]) for k in keys),
            fmt.percent(r["utilisation"], 1),
            fmt.text(r["frees whole arrays"]),
            fmt.percent(r["clipped"] / max(1, r["conversions"]), 3),
        )
        for r in found["layers"]
    ]
    head = ("layer", *keys, "utilisation", "fills whole arrays", "clipped if saturating")
    out.append(("Mapping", Table(head, body, (False, *[True] * 11))))
    out.append(("Zero skipping", _skips(found)))
    out += _engine_tables(found["engines"])
    rows = [(i["where"], i["stated"], i["recomputed"], i["treatment"]) for i in found["inconsistencies"]]
    text = "Where the paper's own numbers contradict each other, and what is done here."
    out.append(("Inconsistencies of the paper", [text, Table(("where", "stated", "recomputed", "here"), rows)]))
    out.append(("Assumptions of the cost model", _lines(found["engines"]["assumptions"])))
    return out


def _reduction(r: Mapping[str, float]) -> list[str | Table]:
    text = (
        "From a dense network of 32-bit weights in positive and negative arrays. Weights x bits x signs is how the "
        "paper counts; whole arrays are what a chip has."
    )
    head: tuple[str, ...] = ("prune", "bits", "signs", "product", "whole arrays before", "after", "in whole arrays")
    names = ("prune", "bits", "signs", "product")
    row = [fmt.rate(r[k]) for k in names] + [fmt.count(r["baseline_arrays"]), fmt.count(r["arrays"])]
    return [text, Table(head, [(*row, fmt.rate(r["measured"]))], [True] * 7)]


def _skips(found: Mapping[str, Any]) -> list[str | Table]:
    sizes = found["skipping"]
    layers = list(next(iter(sizes.values()))["layers"])
    cells = lambda each: [x for s in each for x in (f"{s['mean']:.2f}", fmt.percent(s["saved"], 1))]
    rows: list[Any] = [
        ("all", *cells(sizes.values())),
        *((n, *cells(s["layers"][n] for s in sizes.values())) for n in layers),
    ]
    head: tuple[str, ...] = ("layer", *(x for m in sizes for x in (f"{m} rows: mean cycles", "saved")))
    text = (
        "Effective input cycles on real activations. All-zero fragments count 0 cycles; outputs do not change. In the "
        "mean over all, layers are weighted by their inputs (rows x uses)."
    )
    return [text, Table(head, rows, (False, *[True] * (2 * len(sizes))))]


def _engine_tables(engines: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[Any] = [
        (
            name,
            fmt.count(r["arrays"]),
            str(r["chips"]),
            f"{r['mm2']:.1f}",
            f"{r['watts']:.1f}",
            fmt.number(float(f"{r['fps']:.4g}")),
            f"{1e3 * r['chip_mj']:.4g}",
            f"{r['gops_per_watt']:.4g}",
            f"{r['gops_per_mm2']:.4g}",
            fmt.rate(r["against_base"]["fps"]),
        )
        for name, r in engines["rows"].items()
    ]
    head: tuple[str, ...] = (
        "engine",
        "arrays",
        "chips",
        "mm²",
        "W",
        "FPS",
        "µJ a frame",
        "GOPS/W",
        "GOPS/mm²",
        "FPS ratio",
    )
    text = "Operations are those of the dense network. The ratio is against the first row."
    if engines["unknown"]:
        sizes = ", ".join(str(m) for m in engines["unknown"])
        text += f" Area, power and speed of FORMS with fragments of {sizes} rows are not known: no part is published."
    out: list[tuple[str, Any]] = [("Engines", [text, Table(head, rows, (False, *[True] * 9))])]
    for key, title in (("against_base", engines["base"]), ("against_peer", engines["peer"])):
        rows = [
            (name, fmt.rate(r[key]["fps"]), *(f"{r[key][f]:.3g}" for f in _FACTORS))
            for name, r in engines["rows"].items()
        ]
        table = Table(("engine", "FPS ratio", *_FACTORS), rows, (False, *[True] * (len(_FACTORS) + 1)))
        out.append((f"Factors of the frame rate, against {title}", [_SENSE, table]))
    rows = [
        (n, *(f"{p[k]:.4g}" for k in ("gops", "gops_per_watt", "gops_per_mm2", "power_ratio", "area_ratio")))
        for n, p in engines["peak"].items()
    ]
    head = ("engine", "GOPS", "GOPS/W", "GOPS/mm²", "GOPS/W against ISAAC", "GOPS/mm² against ISAAC")
    rows_us = [(name, f"{us:.4g}") for name, us in engines["latency_us"].items()]
    latency = Table(("engine, one frame at a time", "latency, upper bound, µs"), rows_us, (False, True))
    out.append(("Peak, 16-bit weights and inputs", Table(head, rows, (False, *[True] * 5))))
    out.append(("Latency", latency))
    spent = engines["energy"]
    out.append((f"Energy of an inference by layer, {spent['engine']}", _energy(spent["layers"])))
    return out


def _energy(layers: Sequence[Mapping[str, Any]]) -> list[str | Table]:
    """Energies by layer and component, with a last row for the network, and the events behind them."""
    events = ("conversions", "row drives", "cell reads")
    parts = [key for key in layers[0] if key not in ("layer", *events, "nJ")]
    total = {key: sum(row[key] for row in layers) for key in ("nJ", *parts, *events)}
    rows = [
        (str(row["layer"]), *(f"{row[k]:.4g}" for k in ("nJ", *parts)), *(fmt.count(row[k]) for k in events))
        for row in [*layers, {"layer": "all", **total}]
    ]
    text = (
        "Counted from conversions, row drives and cell reads of the layers as they lie in the arrays; idle parts and "
        "links take nothing here. In nJ."
    )
    return [text, Table(("layer", "energy", *parts, *events), rows, (False, *[True] * (1 + len(parts) + 3)))]


# -- SOT-MRAM ----------------------------------------------------------------------------------------------------------


def _sot_pictures(workdir: Path, found: Mapping[str, Any]) -> list[Picture]:
    models = found["models"]
    values = {"energy (µJ)": [m["uj"] for m in models.values()], "latency (ms)": [m["ms"] for m in models.values()]}
    path = draw.pairs(
        workdir / "sot.png", list(models), values, title="Energy and latency of an inference", xlabel="µJ, ms", log=True
    )
    out = [Picture(path, "SOT-MRAM engine", "Writes of activations and leakage are included.")]
    rows: list[Any] = found["write_sensitivity"]
    at = [r["write_ns"] for r in rows]
    curves = {"latency, ms": (at, [r["ms"] for r in rows]), "energy, µJ": (at, [r["uj"] for r in rows])}
    path = plots.lines(
        workdir / "writes.png",
        curves,
        title="Sensitivity to the time and energy of writes",
        ylabel="ms, µJ",
        xlabel="ns a write",
        logx=True,
        logy=True,
    )
    out.append(Picture(path, "Writes", f"Model {found['main']}; time and energy of a write grow together."))
    curves = {n: ([r["bits"] for r in rows], [r["on_levels"] for r in rows]) for n, rows in found["rounded"].items()}
    if curves:
        path = plots.lines(
            workdir / "rounded.png",
            curves,
            title="Weights merely rounded to fewer bits",
            ylabel="accuracy",
            xlabel="bits of a weight",
            percent=True,
        )
        out.append(Picture(path, "Rounding", "Models that were not trained on levels, without any retraining."))
    rows = found["inputs"]
    curves = {found["main"]: ([r["bits"] for r in rows], [r["hardware"] for r in rows])}
    path = plots.lines(
        workdir / "inputs.png",
        curves,
        title="Activations on fewer bits",
        ylabel="accuracy",
        xlabel="bits of an activation",
        percent=True,
    )
    out.append(Picture(path, "Activations", f"Model {found['main']} through the engine, without any retraining."))
    return out


def _sot_sections(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    models = found["models"]
    dense = next(iter(models.values()))
    rows: list[Any] = [
        (
            name,
            fmt.count(m["weights"]),
            fmt.text(m["live_weights"]),
            f"{m['weight_bits']}" + ("" if m["trained_bits"] else " (rounded)"),
            *(fmt.percent(m[k]) for k in ("float", "hardware")),
            fmt.count(m["subarrays"]),
            fmt.count(m["ands"]),
            fmt.count(m["writes"]),
            f"{m['ms']:.4g}",
            f"{m['uj']:.4g}",
            f"{m['fps']:.4g}",
            fmt.rate(dense["uj"] / m["uj"]),
        )
        for name, m in models.items()
    ]
    head: tuple[str, ...] = (
        "model",
        "weights",
        "live",
        "bits",
        "float",
        "engine",
        "sub-arrays",
        "ANDs",
        "writes",
        "ms",
        "µJ",
        "FPS",
        "energy",
    )
    text = f"{found['images']} test images through bit planes, AND and population count, exactly; "
    text += f"{dense['input_bits']}-bit inputs. Models of any row, the dense one too, see the same images."
    text += f" Weights are those of kept rows and columns. {_LIVE}"
    out: list[tuple[str, Any]] = [("SOT-MRAM engine", [text, Table(head, rows, (False, *[True] * 12))])]
    keys = list(found["layers"][0])
    body: list[Any] = [
        tuple(f"{r[k]:.4g}" if isinstance(r[k], float) else fmt.text(r[k]) for k in keys) for r in found["layers"]
    ]
    out.append(("Layers of the main model", Table(keys, body, (False, *[True] * (len(keys) - 1)))))
    body = [tuple(f"{v:.4g}" for v in r.values()) for r in found["write_sensitivity"]]
    head = ("factor", "write, ns", "ms", "µJ", "FPS")
    out.append(("Sensitivity to writes", Table(head, body, [True] * 5)))
    body = [
        (n, str(r["bits"]), fmt.percent(r["on_levels"]), f"{r['ms']:.4g}", f"{r['uj']:.4g}")
        for n, rows in found["rounded"].items()
        for r in rows
    ]
    head = ("model", "bits", "accuracy", "ms", "µJ")
    out.append(("Rounding without training", Table(head, body, (False, *[True] * 4))))
    body = [(str(r["bits"]), fmt.percent(r["hardware"]), f"{r['ms']:.4g}", f"{r['uj']:.4g}") for r in found["inputs"]]
    out.append(("Activations on fewer bits", Table(("bits", "accuracy", "ms", "µJ"), body, [True] * 4)))
    text = "The body of the paper this engine is named after was not available: no figure here is a result of it."
    return [*out, ("Assumptions", [text, *_lines(found["assumptions"])])]


def _lines(lines: Sequence[str]) -> list[str]:
    return [f"{i}. {line}." for i, line in enumerate(lines, start=1)]
