"""The page: well formed, self-contained, everything escaped, nothing missing."""

import base64
import html.parser
import re
import struct
import zlib

import pytest

from experiments.common.report.html import Html, Page, Picture, Table, _layers, render, write_report
from experiments.common.report.layers import Layer
from experiments.common.report.summary import SummaryError

VOID = {"meta", "img", "wbr", "br", "link"}
HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>&'\udce9\x00"


class Reader(html.parser.HTMLParser):
    """Checks the nesting and collects tags, texts and pictures."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes, self.texts, self.images = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "img":
            self.images.append(dict(attrs))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", "".join(self.texts))


def read(page):
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert reader.open == []
    return reader


def png(width=2, height=2):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = (b"\0" + b"\x7f" * width) * height
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_the_page_of_a_run_shows_everything_and_needs_nothing(tmp_path, sample, pictures):
    _, after = sample.weights()
    page = Page(
        summary=sample.summary(),
        config={"model": {"name": "lenet5"}, "admm": {"rho": 1e-3, "stages": [1, 10]}, "flip": False},
        layers=sample.layers(after),
        pictures=pictures,
        sections=[("Crossbar", ["Some words.", Table(("device", "area"), [("ReRAM", "1.2")], (False, True))])],
        links=[("summary.json", "summary.json")],
    )
    path = write_report(tmp_path / "report.html", page)
    text = path.read_text(encoding="utf-8")
    reader = read(text)
    shown = reader.text
    for figure in ("99.25 %", "99.31 %", "97.04 %", "98.51 %", "99.21 %", "85.2×", "40.1×", "0.702 ms", "stand-in"):
        assert figure in shown
    for words in ("cnn / mnist_lenet5_unstructured, seed 0", "2026-01-02T03:04:05Z", "2 min 31 s", "violations",
                  "python -m experiments.cnn --config=", "admm.rho", "0.001", "jax", "0.10.2", "A CPU", "8.00 GiB",
                  "Against the paper", "85.0×", "+0.2", "Crossbar", "Some words.", "params/Conv_1/kernel", "5×5×20×50",
                  "2,500", "10.00 %", "all layers"):  # fmt: skip
        assert words in shown, words
    assert len(reader.images) == len(pictures) == 6
    for image in reader.images:
        data = base64.b64decode(image["src"].removeprefix("data:image/png;base64,"), validate=True)
        width, height = struct.unpack(">II", data[16:24])
        assert (int(image["width"]), int(image["height"])) == (700, round(height * 700 / width))
        assert image["alt"]
    assert "script" not in reader.tags and "link" not in reader.tags
    for name, value in reader.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert value.startswith(("data:image/png;base64,", "#", "summary.json"))
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text and "default-src 'none'" in text
    assert {value for name, value in reader.attributes if name == "href" and value.startswith("#")} == {
        f"#{value}" for name, value in reader.attributes if name == "id"
    }


def test_hostile_text_stays_text_everywhere(sample):
    summary = sample.summary(
        variant=HOSTILE,
        dataset__name=HOSTILE,
        dataset__source=HOSTILE,
        metric__name=HOSTILE,
        paper__quantity=HOSTILE,
        cnn={"run": {"command": HOSTILE, "date": HOSTILE, "machine": {HOSTILE: HOSTILE}, "versions": {HOSTILE: 1}}},
    )
    page = Page(
        summary=summary,
        config={HOSTILE: {HOSTILE: HOSTILE, "list": [HOSTILE]}},
        layers=[Layer(HOSTILE, (1,), HOSTILE, 1, 1, 4, None)],
        pictures=[Picture(png(), HOSTILE, HOSTILE)],
        sections=[(HOSTILE, [HOSTILE, Table([HOSTILE], [[HOSTILE]])])],
        links=[(HOSTILE, "a\"b'<.json")],
    )
    reader = read(render(page))
    assert "script" not in reader.tags
    assert reader.tags.count("img") == 1
    assert not any(name.startswith("on") for name, _ in reader.attributes)
    assert (
        reader.text.count("<script>alert(1)</script>")
        + sum("<script>" in (value or "") for _, value in reader.attributes)
        >= 18
    )


def test_html_content_is_passed_through_and_nothing_else(sample):
    page = Page(summary=sample.summary(), config={}, sections=[("A", Html("<em>x</em>")), ("B", "<em>y</em>")])
    text = render(page)
    assert "<em>x</em>" in text and "<em>y</em>" not in text and "&lt;em&gt;y" in text


def test_what_does_not_apply_is_not_shown(sample):
    nothing = {"dense_same_budget": None, "one_shot": None, "hardened": None}
    summary = sample.summary(
        dataset=None, metric=sample.summary()["metric"] | nothing, rate=None, bytes=None, residual=None,
        violations=None, latency_ms=None, seconds=None, paper=None, cnn={},
    )  # fmt: skip
    shown = read(render(Page(summary=summary, config={}))).text
    for words in ("one-shot", "violations", "latency", "paper", "stand-in", "None", "Took", "Layers", "Plots"):
        assert words not in shown
    assert "The run recorded no command." in shown


def test_violations_are_shouted(sample):
    text = render(Page(summary=sample.summary(violations=3), config={}))
    assert re.search(r'class="tile bad">.*?violations.*?3', text, re.S)
    assert "tile good" not in text


def test_many_layers_are_folded_under_their_sum():
    layers = [Layer(f"layer{i}", (2, 5), None, 3, 10, 40, 12) for i in range(41)]
    assert _layers(layers[:40]).startswith('<div class="wide"><table>')
    folded = _layers(layers)
    assert folded.startswith("<details><summary>41 layers; 123 of 410 kept, ")
    assert folded.count("layer4") == 2 and folded.endswith("</details>")  # layer4 and layer40


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("pictures", [Picture(b"GIF89a", "p")], "'p' is not a PNG"),
        ("sections", [("t", Table(("a", "b"), [("1",)]))], "1 cells and its header 2"),
        ("links", [("x", "javascript:alert(1)")], "not a relative path"),
        ("links", [("x", "/etc/passwd")], "not a relative path"),
        ("summary", {}, "driver is missing"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(tmp_path, sample, field, value, message):
    fields = {"summary": sample.summary(), "config": {}} | {field: value}
    with pytest.raises((ValueError, SummaryError), match=message):
        write_report(tmp_path / "report.html", Page(**fields))
    assert not list(tmp_path.iterdir())
