"""The console shows the same figures, escapes rich's markup and fits 80 columns."""

import io

from rich.console import Console

from compressx.report import console
from compressx.report.layers import Layer


def _print(summary, layers, width=80):
    out = io.StringIO()
    console.print_report(summary, layers, Console(file=out, width=width, force_terminal=False))
    return out.getvalue()


def test_the_report_fits_and_shows_the_figures(sample):
    _, after = sample.weights()
    text = _print(sample.summary(), sample.layers(after))
    assert max(len(line) for line in text.splitlines()) <= 80
    for words in ("digits (stand-in)", "99.21 %", "−0.04 points", "85.2×", "violations", "params/Conv_1/kernel",
                  "5×5×20×50", "2,500/25,000", "14.6 KiB", "all layers", "5,210/430,510", "+0.2"):  # fmt: skip
        assert words in text, words


def test_markup_in_names_is_text(sample):
    text = _print(sample.summary(variant="[red]x[/nonsense]"), [Layer("[b]w", (2,), "[/]c", 1, 2, 8, None)], width=120)
    assert "[red]x[/nonsense]" in text and "[b]w" in text and "[/]c" in text
    assert "all layers" not in text
