"""How numbers are written, in one place, so that tables, pages and the console agree.

Every function takes None and returns an en dash for it: an absent number is shown as absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

ABSENT = "–"

# Metrics that are fractions of 1 and read as per cent; others (loss, perplexity, ...) are plain numbers.
_FRACTIONS = ("accuracy", "error_rate", "precision", "recall", "f1", "map", "map50", "map75", "top1", "top5")


def is_fraction(metric: str | None) -> bool:
    """Whether a metric of this name is a fraction of 1, shown in per cent: its name ends in one of `_FRACTIONS`."""
    name = (metric or "").lower().replace("-", "_").replace(" ", "_").replace("@", "_")
    return any(name == end or name.endswith(f"_{end}") for end in _FRACTIONS)


def percent(value: float | None, digits: int = 2) -> str:
    """0.9921 -> "99.21 %"."""
    return ABSENT if value is None else f"{100 * value:.{digits}f} %"


def rate(value: float | None) -> str:
    """85.23 -> "85.2×"; "246×" from 100 on."""
    return ABSENT if value is None else f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f}×"


def count(value: float | None) -> str:
    """430500 -> "430,500"; a mean that is no whole number keeps one digit."""
    if value is None:
        return ABSENT
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def size(value: float | None) -> str:
    """Bytes: 1722000 -> "1.64 MiB", with the exact number below 1 KiB."""
    if value is None:
        return ABSENT
    number, unit = float(value), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if number < 1024:
            break
        number, unit = number / 1024, larger
    return f"{number:,.0f} B" if unit == "B" else f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"


def milliseconds(value: float | None) -> str:
    """1.5 -> "1.500 ms"; four significant digits."""
    return ABSENT if value is None else f"{value:,.{3 if value < 10 else 2 if value < 100 else 1}f} ms"


def seconds(value: float | None) -> str:
    """75 -> "1 min 15 s"; below a minute one digit after the point."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def number(value: float | None) -> str:
    """Four significant digits, thousands grouped: 12345.6 -> "12,350", 0.00123 -> "0.00123"."""
    if value is None:
        return ABSENT
    if isinstance(value, int) or (float(value).is_integer() and abs(value) < 1e15):
        return f"{value:,.0f}"
    if 1e3 <= abs(value) < 1e15:
        return f"{float(f'{value:.4g}'):,.0f}"
    return f"{value:.4g}"


def text(value: Any) -> str:
    """Anything else as text; true and false as yes and no, names one after the other."""
    if value is None:
        return ABSENT
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, str) for v in value):
        return ", ".join(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def metric(name: str | None) -> Callable[[float | None], str]:
    """How the values of a metric of this name are written: per cent for a fraction, a number for anything else."""
    return percent if is_fraction(name) else number


def for_key(key: str, metric_name: str | None = None) -> Callable[[Any], str]:
    """How the value under a summary's dotted key is written, by the key's section."""
    section = key.partition(".")[0]
    if section == "metric":
        return metric(metric_name)
    by_section = {"rate": rate, "bytes": size, "latency_ms": milliseconds, "seconds": seconds, "violations": count}
    return by_section.get(section, number)


def spread(write: Callable[[Any], str], mean: float, deviation: float) -> str:
    """ "99.21 ± 0.03 %": the unit once where both have the same."""
    middle, around = write(mean), write(deviation)
    for unit in (" %", "×", " ms", " s"):
        if middle.endswith(unit) and around.endswith(unit):
            return f"{middle.removesuffix(unit)} ± {around}"
    return f"{middle} ± {around}"


# The formats a table's column can name; without a name the key decides (`for_key`).
FORMATS: Mapping[str, Callable[[Any], str]] = {
    "percent": percent,
    "rate": rate,
    "count": count,
    "size": size,
    "milliseconds": milliseconds,
    "seconds": seconds,
    "number": number,
    "text": text,
}
