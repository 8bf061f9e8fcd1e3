"""JSON as headers hold it: compact and sorted when written; strict and of a bounded size when read."""

import json
import math
from typing import Any, NoReturn

from compressx.formats.base import fail

MAX_HEADER = 1 << 24  # bytes of JSON
MAX_VALUES = 1 << 20  # in the JSON of a header; parsed, each takes up to 200 bytes
MAX_NESTING = 64  # of lists and objects in it
MAX_DIGITS = 128  # of a number in it


def to_json(value: Any, ascii: bool = True) -> str:
    """Compact JSON with sorted keys; what is not ASCII is escaped, unless asked otherwise.

    Raises:
      ValueError: the value has no JSON form.
    """
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=ascii)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"cannot be written as JSON: {error}") from None


def from_json(text: str, entry: str) -> Any:
    """Strict JSON of a bounded size: no NaN, no key twice, no number, nesting or list without end."""
    if len(text) > MAX_HEADER or text.count(",") + text.count("[") + text.count("{") > MAX_VALUES:
        fail(entry, f"takes more than {MAX_HEADER} characters or holds more than {MAX_VALUES} values")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out = dict(pairs)
        if len(out) != len(pairs):
            raise ValueError("a key occurs twice")
        return out

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    def short(digits: str) -> str:
        if len(digits) > MAX_DIGITS:
            raise ValueError(f"{digits[:20]}... has {len(digits)} digits")
        return digits

    def finite(digits: str) -> float:
        value = float(short(digits))
        if not math.isfinite(value):
            raise ValueError(f"{digits[:20]} is not a finite number")
        return value

    try:
        value = json.loads(
            text,
            object_pairs_hook=unique,
            parse_constant=constant,
            parse_float=finite,
            parse_int=lambda digits: int(short(digits)),
        )
    except (ValueError, RecursionError) as error:
        fail(entry, f"is not valid JSON: {error}")
    level = [value]
    for _ in range(MAX_NESTING):
        inside = (n.values() if isinstance(n, dict) else n for n in level if isinstance(n, dict | list))
        level = [child for children in inside for child in children]
        if not level:
            return value
    fail(entry, f"is nested more than {MAX_NESTING} deep")
