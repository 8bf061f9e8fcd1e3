"""The template's sections of the report."""

from collections.abc import Mapping, Sequence

from experiments.common.report import format as fmt
from experiments.common.report import html


def sections(by_class: Mapping[str, Sequence[float | None]]) -> list[tuple[str, html.Content]]:
    """The accuracy on each class, a row for each network."""
    header = ("network", *(f"class {c}" for c in range(len(next(iter(by_class.values()))))))
    rows = [(name, *(fmt.percent(a) for a in each)) for name, each in by_class.items()]
    return [("By class", html.Table(header, rows, (False, *[True] * (len(header) - 1))))]
