"""Numbers in words, layers, the paper's row and the run record."""

import datetime
import json

import pytest

from experiments.common.report import environment, headline
from experiments.common.report import format as fmt
from experiments.common.report.layers import Layer, cells, total


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (fmt.percent, 0.99214, "99.21 %"),
        (fmt.rate, 246.13, "246×"),
        (fmt.rate, 85.23, "85.2×"),
        (fmt.rate, 1.5, "1.50×"),
        (fmt.count, 430500, "430,500"),
        (fmt.count, 1.5, "1.5"),
        (fmt.size, 1023, "1,023 B"),
        (fmt.size, 1024, "1.00 KiB"),
        (fmt.size, 1722000, "1.64 MiB"),
        (fmt.size, 5 * 2**40, "5.00 TiB"),
        (fmt.milliseconds, 0.70234, "0.702 ms"),
        (fmt.seconds, 59.94, "59.9 s"),
        (fmt.seconds, 151.2, "2 min 31 s"),
        (fmt.seconds, 3700, "1 h 1 min"),
        (fmt.number, 0.0012345, "0.001234"),
        (fmt.number, 12345.6, "12,350"),
        (fmt.number, 3, "3"),
        (fmt.text, True, "yes"),
        (fmt.text, ["anna", "ben"], "anna, ben"),
        (fmt.text, [], "[]"),
    ],
)
def test_formats(write, value, text):
    assert write(value) == text
    assert write(None) == fmt.ABSENT


def test_which_metrics_are_fractions():
    for name in ("accuracy", "top1_accuracy", "phone_error_rate", "mAP", "hits F1", "mAP@50"):
        assert fmt.is_fraction(name) == (name != "mAP@50"), name  # "map_50" is not spelt as a known name
    assert fmt.is_fraction("map50") and not fmt.is_fraction("perplexity") and not fmt.is_fraction(None)
    assert not fmt.is_fraction("inaccuracy")


def test_spread_writes_the_unit_once():
    assert fmt.spread(fmt.percent, 0.9921, 0.0003) == "99.21 ± 0.03 %"
    assert fmt.spread(fmt.rate, 85.2, 0.1) == "85.2 ± 0.10×"
    assert fmt.spread(fmt.size, 2**20, 10) == "1.00 MiB ± 10 B"


def test_layers_and_their_sum():
    rows = [Layer("a", (2, 3), "x", 2, 6, 24, 12), Layer("b", (), None, 0, 0, 0, 0)]
    assert cells(rows[0]) == ("a", "2×3", "x", "2", "6", "33.33 %", "24 B", "12 B", "2.00×")
    assert rows[1].density is None and rows[1].rate is None
    assert total(rows)[3:] == (2, 6, 24, 12)
    assert total([*rows, Layer("c", (1,), None, 1, 1, 4, None)]).bytes_packed is None


def test_the_papers_row(sample):
    assert headline.paper(sample.summary())[1:] == ("85.0×", "85.2×", "+0.2")
    by_metric = sample.summary(paper={"quantity": "metric.compressed", "value": 0.993})
    assert headline.paper(by_metric) == ("accuracy, compressed", "99.30 %", "99.21 %", "−0.09 points")
    own = sample.summary(paper={"quantity": "cnn.area", "value": 2}, cnn={"area": 1.5})
    assert headline.paper(own) == ("cnn.area", "2", "1.5", "−0.5")
    words = sample.summary(paper={"quantity": "speed on a phone", "value": 7.5})
    assert headline.paper(words) == ("speed on a phone", "7.5", fmt.ABSENT, fmt.ABSENT)


def test_run_record_is_json_and_names_no_host():
    import socket

    moment = datetime.datetime(2026, 1, 2, 5, 4, 5, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    record = environment.run_record("python -m x", moment)
    text = json.dumps(record, allow_nan=False)
    assert record["date"] == "2026-01-02T03:04:05Z"
    assert record["machine"]["cores"] >= 1 and "jax" in record["versions"] and record["versions"]["python"]
    assert len(socket.gethostname()) < 4 or socket.gethostname() not in text
    assert environment.command("experiments.cnn", ["--a=b c", "--d"]) == "python -m experiments.cnn '--a=b c' --d"
