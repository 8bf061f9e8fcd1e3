"""The console shows the same figures, escapes rich's markup and fits 80 columns."""

import io

from rich.console import Console

from experiments.common.report import console
from experiments.common.report.layers import Layer


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


def test_a_long_table_sums_up_what_is_not_constrained(sample):
    of = "unstructured(density=0.5)"
    held = [Layer(f"params/conv_{i}/kernel", (3, 3, 4, 4), of, 72, 144, 576, 400) for i in range(30)]
    free = [Layer(f"params/bn_{i}/scale", (4,), None, 4, 4, 16, 16) for i in range(30)]
    text = _print(sample.summary(), held + free)
    assert "conv_29" in text and "bn_3" not in text and "30 leaves without a" in text
    assert "2,280/4,440" in text
    assert "bn_3" in _print(sample.summary(), held[:10] + free[:10])


def test_a_small_network_has_a_layer_that_gains_beside_it_and_the_bytes_of_its_file(sample):
    block = {"latency": {"layer": {"dense": 20.0, "compressed": 4.0}}, "file_bytes": 51200}
    words = " ".join(_print(sample.summary(cnn=block), [], width=200).split())
    assert "a layer of VGG-16" in words and "5.0× as fast, at 8.1× fewer weights" in words
    assert "the file has 50.0 KiB" in words
    reason = {"latency": {"layer": {"reason": "no compiler"}}}
    assert "VGG" not in _print(sample.summary(cnn=reason), [], width=200)
