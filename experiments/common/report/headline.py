"""The headline of a run: the figures one looks at first, in words, for the page and for the console."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from experiments.common.report import format as fmt
from experiments.common.report.summary import lookup

# Names for the summary keys that `paper.quantity` may point at, and how their values are written.
_RATES = {
    "rate.constrained_weights": "compression of the constrained weights",
    "rate.all_weights": "compression of all weights",
    "rate.bytes": "compression of the bytes",
}

# What the methods beside dense and compressed are, for those who read a report first.
_MEANINGS = {
    "dense_same_budget": "the dense network, trained as long as all phases together",
    "one_shot": "projected once without ADMM, then retrained as long",
    "hardened": "after ADMM and projection, before retraining",
}


class Tile(NamedTuple):
    """One figure: its name, its value in words, a note, and whether it is the main one, good, bad or neither."""

    name: str
    value: str
    note: str = ""
    mood: Literal["", "main", "good", "bad"] = ""


def groups(summary: Mapping[str, Any]) -> list[tuple[str, list[Tile]]]:
    """The figures of a summary in two groups, quality and cost; a figure that does not apply (null) is left out."""
    metric = summary["metric"]
    write = fmt.metric(metric["name"])
    quality = []
    for key, name in (
        ("dense", "dense"),
        ("dense_same_budget", "dense, same budget"),
        ("one_shot", "one-shot"),
        ("hardened", "hardened only"),
        ("compressed", "compressed"),
    ):
        if metric[key] is not None:
            gap = difference(metric[key], metric["dense"], metric["name"]) if key != "dense" else ""
            note = "; ".join(part for part in (gap and f"{gap} against dense", _MEANINGS.get(key, "")) if part)
            mood: Literal["", "main"] = "main" if key == "compressed" else ""
            quality.append(Tile(name, write(metric[key]), note, mood))
    direction = {True: "higher is better", False: "lower is better", None: ""}[metric["higher_is_better"]]
    name = {"auc": "ROC AUC"}.get(metric["name"] or "", (metric["name"] or "").replace("_", " "))
    title = ", ".join(part for part in (name, direction) if part)
    out = [(title[:1].upper() + title[1:] or "Quality", quality)] if quality else []
    cost = _cost(summary)
    return [*out, ("Size, speed and exactness", cost)] if cost else out


def paper(summary: Mapping[str, Any]) -> tuple[str, str, str, str]:
    """The paper's figure beside ours: (quantity, theirs, ours, difference), in words.

    Ours and the difference are absent where `paper.quantity` is no key of the summary.
    """
    quantity, value = summary["paper"]["quantity"] or "", summary["paper"]["value"]
    ours = lookup(summary, quantity)
    if isinstance(ours, bool) or not isinstance(ours, (int, float)):
        return quantity or fmt.ABSENT, fmt.number(value), fmt.ABSENT, fmt.ABSENT
    if quantity.startswith("metric."):
        name = summary["metric"]["name"]
        words = f"{name or 'metric'}, {quantity.removeprefix('metric.').replace('_', ' ')}"
        return words, fmt.metric(name)(value), fmt.metric(name)(ours), difference(ours, value, name)
    write = fmt.for_key(quantity)
    gap = f"{ours - value:+.4g}" if ours != value else "none"
    return _RATES.get(quantity, quantity), write(value), write(ours), gap.replace("-", "−")


def difference(value: float | None, reference: float | None, metric: str | None) -> str:
    """How far a metric lies from a reference: "−0.12 points" for a fraction, "+0.031" for anything else."""
    if value is None or reference is None:
        return ""
    gap = value - reference
    text = f"{100 * gap:+.2f} points" if fmt.is_fraction(metric) else f"{gap:+.4g}"
    return text.replace("-", "−")


def _cost(summary: Mapping[str, Any]) -> list[Tile]:
    rate, size, latency, residual = (summary[key] for key in ("rate", "bytes", "latency_ms", "residual"))
    tiles = []
    if rate["constrained_weights"] is not None:
        note = f"all weights {fmt.rate(rate['all_weights'])}" if rate["all_weights"] is not None else ""
        tiles.append(Tile("compression ratio, pruned layers", fmt.rate(rate["constrained_weights"]), note, "main"))
    elif rate["all_weights"] is not None:
        tiles.append(Tile("fewer weights", fmt.rate(rate["all_weights"]), "", "main"))
    if rate["bytes"] is not None:
        note = (
            f"{fmt.size(size['dense'])} to {fmt.size(size['packed'])}, indices included"
            if size["packed"] is not None
            else ""
        )
        file = lookup(summary, f"{summary['driver']}.file_bytes")
        note += f"; the file has {fmt.size(file)}" if note and isinstance(file, int) else ""
        tiles.append(Tile("fewer bytes", fmt.rate(rate["bytes"]), note))
    elif size["packed"] is not None:
        tiles.append(Tile("packed", fmt.size(size["packed"]), f"dense {fmt.size(size['dense'])}"))
    if latency["compressed"] is not None:
        ratio = latency["dense"] / latency["compressed"] if latency["dense"] and latency["compressed"] else None
        note = f"dense {fmt.milliseconds(latency['dense'])}" + (f": {ratio:.2f}× as fast" if ratio else "")
        tiles.append(Tile("latency", fmt.milliseconds(latency["compressed"]), note))
        tiles += _layer(lookup(summary, f"{summary['driver']}.latency.layer"))
    elif latency["dense"] is not None:
        tiles.append(Tile("latency, dense", fmt.milliseconds(latency["dense"]), "compressed not measured"))
    if summary["violations"] is not None:
        bad = summary["violations"] > 0
        note = "constraints broken by stored weights" if bad else "every stored weight checked"
        tiles.append(Tile("violations", fmt.count(summary["violations"]), note, "bad" if bad else "good"))
    if residual["primal"] is not None:
        note = f"dual {residual['dual']:.3g}" if residual["dual"] is not None else ""
        tiles.append(Tile("primal residual", f"{residual['primal']:.3g}", note))
    return tiles


def _layer(found: Any) -> list[Tile]:
    """A larger layer, timed beside a network that is too small to gain time: `latency.of_layer`."""
    if not isinstance(found, Mapping) or not found.get("compressed"):
        return []
    ratio = found["dense"] / found["compressed"]
    note = (
        f"dense {fmt.milliseconds(found['dense'])}: {ratio:.1f}× as fast, at 8.1× fewer weights. The network above is "
        "too small to gain: calls between its layers take longer than the layers"
    )
    return [Tile("a layer of VGG-16", fmt.milliseconds(found["compressed"]), note, "good" if ratio > 1 else "")]
