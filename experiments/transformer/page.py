"""The transformer driver's sections of the report."""

from collections.abc import Mapping
from typing import Any

from experiments.common.report import format as fmt
from experiments.common.report import html

Content = list[str | html.Picture | html.Table]


def sections(metric: str, block: Mapping[str, Any]) -> list[tuple[str, html.Content]]:
    """What the network is set beside, and what was removed from it.

    Args:
      metric: "accuracy" or "perplexity".
      block: the driver's own of the summary.
    """
    show = (lambda v: fmt.percent(v)) if metric == "accuracy" else (lambda v: f"{v:.3f}")
    beside = [(name, show(figures["value"]), fmt.count(figures["bytes"])) for name, figures in block["beside"].items()]
    header = ("network", metric, "bytes of its weights")
    out: list[tuple[str, html.Content]] = [("Beside", [html.Table(header, beside, (False, True, True))])]
    if block["floor"]:
        words = f"{block['floor']['name'].capitalize()}: {show(block['floor']['value'])}."
        out.append(("What any network must beat", words))
    if block["compacted"]:
        out.append(("Heads and units removed", _removed(block)))
    return out


def _removed(block: Mapping[str, Any]) -> html.Content:
    facts = block["compacted"]
    layers = [
        (f"layer {i}", f"{heads}", f"{units}")
        for i, (heads, units) in enumerate(zip(block["kept"]["heads"], block["kept"]["units"], strict=True))
    ]
    times = [
        (batch, *(f"{q[1]:.3f} ({q[0]:.3f} to {q[2]:.3f})" for q in (of["dense"], of["compacted"])))
        for batch, of in facts["latency"].items()
    ]
    sizes = facts["bytes"]
    text = (
        f"{fmt.count(sizes['dense'])} bytes of weights become {fmt.count(sizes['compacted'])}; the outputs differ by "
        f"at most {facts['largest_difference']:.1e}."
    )
    return [
        text,
        html.Table(("layer", "heads left", "units left"), layers, (False, True, True)),
        "Milliseconds on XLA, median and quartiles, the networks in turn:",
        html.Table(("batch", "dense", "compacted"), times, (True, True, True)),
    ]
