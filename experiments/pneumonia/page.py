"""The sections of the report that only `experiments.pneumonia` has."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from compressx.compaction.device import JETSON_TX2
from experiments.common.report import format as fmt
from experiments.common.report import html, plots
from experiments.pneumonia import measures as pneumonia_score
from experiments.pneumonia import plots as xrays
from experiments.pneumonia.data import Task

SHOWN = 8


def sections(
    workdir: Path,
    points: Sequence[Any],
    task: Task,
    judge: "pneumonia_score.Judge",
    networks: Mapping[str, Any],
    sizes: Mapping[str, "pneumonia_score.Size"],
    times: "pneumonia_score.Times | None",
    block: Mapping[str, Any],
) -> list[tuple[str, html.Content]]:
    """All of them: scores, score against rate, boxes, reliability, layers, device."""
    head = points[0].name
    out: list[tuple[str, html.Content]] = [("Networks", [_networks(task, block), _about(task)])]
    if len(points) > 1:
        out.append(("Score against rate", _against_rate(workdir, task, points, block)))
    if task.geometry is not None:
        out.append(("Boxes", _boxes(workdir, task, judge, networks, block, head)))
    curves = {
        name: tuple(np.array(scores["reliability"][k]) for k in ("predicted", "observed", "count"))
        for name, scores in (("dense", block["dense"]["scores"]), (head, block["points"][head]["scores"]))
    }
    picture = xrays.reliability(workdir / "reliability.png", curves)  # type: ignore[arg-type]
    text = "The probability of an image is the score of its best box." if task.geometry is not None else ""
    out.append(("Reliability", html.Picture(picture, "Reliability", f"{text} Larger dots hold more images.")))
    out.append(("What a layer costs", _layers(head, sizes["dense"], sizes[head], times)))
    out.append(("Device estimate", _device(block)))
    return out


def _write(value: float | None) -> str:
    return fmt.ABSENT if value is None else f"{value:.4f}"


def _networks(task: Task, block: Mapping[str, Any]) -> html.Table:
    keys = [task.metric, "map_50", "map_40_75", "auc", "sensitivity", "calibration_error"]
    keys = [k for k in dict.fromkeys(keys) if k in block["dense"]["scores"]]
    header = ["network", "weights", "fewer", "MACs", "bytes", "of them index", "peak activations", "one image"]
    header += [k.replace("_", " ") for k in keys]
    header[9:9] = ["minus dense", "its interval"]
    header += ["AUC interval", "masked - compacted"]
    full = block["dense"]["size"]["weights"]
    networks = [("dense", block["dense"])]
    if block["same_budget"]:
        networks.append(("dense, same budget", {"scores": block["same_budget"], "size": block["dense"]["size"]}))
    rows = []
    for name, entry in [*networks, *block["points"].items()]:
        size, scores, minus = entry["size"], entry["scores"], entry.get("minus_dense", {})
        gap = size.get("masked_minus_compacted")
        figures = [_write(scores.get(k)) for k in keys]
        figures[1:1] = [_signed(minus.get("difference")), _interval(minus.get("low"), minus.get("high"), _signed)]
        rows.append(
            [
                name,
                fmt.count(size["weights"]),
                fmt.rate(full / size["weights"]),
                fmt.count(size["macs"]),
                fmt.size(size["bytes"]),
                fmt.size(size["index_bytes"]),
                fmt.size(size["peak_activation_bytes"]),
                fmt.milliseconds(entry.get("latency_ms")),
                *figures,
                _interval(scores.get("auc_low"), scores.get("auc_high")),
                fmt.ABSENT if gap is None else f"{gap:.1e}",
            ]
        )
    return html.Table(header, rows, [False] + [True] * (len(header) - 1))


def _signed(value: float | None) -> str:
    return fmt.ABSENT if value is None else f"{value:+.4f}"


def _interval(low: float | None, high: float | None, write: Callable[[float | None], str] = _write) -> str:
    return fmt.ABSENT if low is None or high is None else f"{write(low)} to {write(high)}"


def _about(task: Task) -> str:
    text = (
        "Weights are those of the convolutions after compaction, positions that no filter uses left out; bytes are of "
        "all arrays as float32, and of the index: which positions of a kernel are used (channels need none, their "
        "arrays are smaller). One image: the fastest way measured, of the dense network and of points by ADMM. "
        "Sensitivity is that at a specificity of at least "
        f"{pneumonia_score.SPECIFICITY:g}; intervals are 95 % bootstraps over patients, differences on the same draws. "
        f"{task.info.note}."
    )
    return text[0].upper() + text[1:]


def _against_rate(workdir: Path, task: Task, points: Sequence[Any], block: Mapping[str, Any]) -> html.Content:
    methods: dict[str, tuple[list[float], list[list[float]]]] = {}
    for p in points:
        entry = block["points"][p.name]
        value = entry["scores"][task.metric]
        if value is not None:
            label = p.kind if p.method == "admm" else f"{p.kind}, {p.method.replace('_', '-')}"
            rates, values = methods.setdefault(label, ([], []))
            rates.append(entry["rate_kept"])
            values.append([value])
    if not methods:
        return "No point has a score."
    dense = block["dense"]["scores"][task.metric]
    path = plots.metric_against_rate(
        workdir / "score.png",
        {name: (np.array(r), np.array(v)) for name, (r, v) in methods.items()},
        controls={} if dense is None else {"dense": [dense]},
        name=task.metric.replace("_", " "),
        percent=False,
    )
    full, curves = block["dense"]["size"], {}
    for kind in dict.fromkeys(p.kind for p in points if p.method == "admm"):
        mine = [block["points"][p.name]["size"] for p in points if (p.kind, p.method) == (kind, "admm")]
        at = sorted([full, *mine], key=lambda size: -size["weights"])
        fewer = np.array([full["weights"] / size["weights"] for size in at])
        curves[kind] = (fewer, np.array([size["macs"] for size in at]))
    out: list[str | html.Picture] = [
        html.Picture(path, "Score against rate", "One seed a run; random is the negative control.")
    ]
    if curves:
        macs = plots.lines(
            workdir / "macs.png",
            curves,
            title="Multiply-adds against compression of the weights",
            ylabel="multiply-adds left",
            xlabel="fewer weights",
            logx=True,
            logy=True,
        )
        text = "Early layers hold few weights and most of the multiply-adds. Each line begins at the dense network."
        out.append(html.Picture(macs, "Weights are not work", text))
    sentences = [_compared(entry) for entry in block["combined_minus"]]
    return [*out, " ".join(sentences)] if sentences else out


def _compared(entry: Mapping[str, Any]) -> str:
    """One sentence: whether "combined" is better than another kind at a rate, by what its interval says."""
    names = f"{entry['rate']:g}× combined", f"{entry['than']} alone"
    low, high = entry["low"], entry["high"]
    if low is None or high is None:
        return f"At {names[0]} and {names[1]} cannot be compared."
    measured = f"(difference {_signed(entry['difference'])}, interval {_interval(low, high, _signed)})"
    if low > 0 or high < 0:
        return f"At {names[0]} is {'better' if low > 0 else 'worse'} than {names[1]} {measured}."
    return f"At {names[0]} and {names[1]} are not told apart by these test images {measured}."


def _boxes(
    workdir: Path, task: Task, judge: "pneumonia_score.Judge", networks: Mapping[str, Any], block: Any, head: str
) -> html.Content:
    """Test images with true boxes and those of both networks: positives first, then some without."""
    count = task.test["count"]
    rows = [*np.flatnonzero(count > 0)[: SHOWN - 2], *np.flatnonzero(count == 0)[:2]]
    part = {k: v[rows] for k, v in task.test.items()}
    kinds: dict[str, list[xrays.Boxes]] = {"truth": []}
    for name, scores in (("dense", block["dense"]["scores"]), (head, block["points"][head]["scores"])):
        w = networks[name]
        found = judge.found({**w.params, **w.batch_stats}, part)
        if not kinds["truth"]:
            kinds["truth"] = [xrays.Boxes(f.truth) for f in found]
        above = [f.scores >= scores["threshold"] for f in found]
        kinds[name] = [xrays.Boxes(f.boxes[a], f.scores[a]) for f, a in zip(found, above, strict=True)]
    path = xrays.boxes_on_images(workdir / "boxes.png", [image[..., 0] for image in part["inputs"]], kinds)
    text = "Test images at the network's resolution, boxes above each network's confidence."
    return html.Picture(path, "Boxes", f"{text} The first {SHOWN} are shown, six with a box and two without.")


def _layers(
    head: str, dense: "pneumonia_score.Size", small: "pneumonia_score.Size", times: "pneumonia_score.Times | None"
) -> html.Content:
    after = {c.path: c for c in small.layers}
    spent = {t.path: t for t in times.layers} if times else {}
    rows = []
    for c in dense.layers:
        s, t = after.get(c.path), spent.get(c.path)
        milliseconds = ["–"] * 3 if t is None else [fmt.milliseconds(v) for v in (t.dense, t.small, t.gathered)]
        rows.append(
            [
                c.path.removeprefix("params/").removesuffix("/kernel"),
                "×".join(map(str, c.shape)),
                "gone" if s is None else f"{s.positions} × {s.shape[-1]}",
                *(fmt.count(v) for v in (c.weights, s.weights if s else 0)),
                *(fmt.count(v) for v in (c.macs, s.macs if s else 0)),
                *(fmt.size(v) for v in (c.bytes, s.bytes if s else 0)),
                *milliseconds,
            ]
        )
    header = ["layer", "shape", "matrix left", "weights", "left", "MACs", "left", "bytes moved", "left"]
    header += ["dense", "smaller, plain", "smaller, gathered"]
    table = html.Table(header, rows, [False, False, False] + [True] * 9)
    if times is None:
        return table
    networks = [(name, times.facts["networks"][name]["milliseconds"]) for name in ("dense", head)]
    text = "; ".join(
        f"{name} " + ", ".join(f"{way} {fmt.milliseconds(value)}" for way, value in ways.items())
        for name, ways in networks
    )
    about = (
        f"One image, float32, medians of {times.facts['rounds']} interleaved rounds on this machine: {text}. Native is "
        "compressx.compile, with as many threads as there are or one; mixed gathers the layers for which that was "
        "faster alone. Layers are timed alone, so their sum is not the network's time."
    )
    return [
        about,
        table,
    ]


def _device(block: Mapping[str, Any]) -> html.Content:
    rows = []
    for name, entry in [("dense", block["dense"]), *block["points"].items()]:
        guess = entry["size"]["tx2_estimate"]
        per_watt = guess["frames"] / JETSON_TX2.watts
        rows.append([name, fmt.milliseconds(guess["milliseconds"]), f"{guess['frames']:,.0f}", f"{per_watt:,.1f}"])
    header = ("network", "at least, an image", "images/s at most", "images/s a watt at most")
    about = (
        f"An estimate, not a measurement: every layer at the published peaks of the {JETSON_TX2.name} "
        f"({JETSON_TX2.source}), whichever of arithmetic and memory takes longer, at full power."
    )
    return [about, html.Table(header, rows, (False, True, True, True))]
