"""`summary.json`: the figures of a run, with the same keys in every driver, checked on the way out and in.

Units: `metric` in the metric's own unit (accuracies and error rates are fractions of 1), `rate` is dense over
compressed (85.0 means 85 times fewer), `bytes` and `violations` are counts, `latency_ms` milliseconds, `seconds`
the wall time of the run. `paper.quantity` is a dotted key of the summary (`"metric.compressed"`) or, where no key
says it, plain words; `paper.value` is the published value in the same unit.

The driver's own block stands under the driver's name. By convention it holds a dict `run` made by
`experiments.common.report.environment.run_record` (command, date, machine, versions), which tables and pages print.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.common.report import _json

_MAX_BYTES = 64 * 2**20


class SummaryError(ValueError):
    """A summary breaks the schema; the message lists every fault with its key."""


# A leaf of the schema is a tuple of the kinds allowed; a dict is a section. Every leaf but the first three and the
# dataset's and metric's names may be null.
_TEXT, _INT, _COUNT, _NUMBER, _SIZE, _BOOL = "text", "an int", "a count", "a number", "a number >= 0", "true or false"
SCHEMA: dict[str, Any] = {
    "driver": (_TEXT,),
    "variant": (_TEXT,),
    "seed": (_INT,),
    "dataset": {
        "name": (_TEXT, None),
        "source": (_TEXT, None),
        "train": (_COUNT, None),
        "test": (_COUNT, None),
        "stand_in": (_BOOL, None),
    },
    "metric": {
        "name": (_TEXT, None),
        "higher_is_better": (_BOOL, None),
        "dense": (_NUMBER, None),
        "dense_same_budget": (_NUMBER, None),
        "one_shot": (_NUMBER, None),
        "hardened": (_NUMBER, None),
        "compressed": (_NUMBER, None),
    },
    "rate": {"constrained_weights": (_SIZE, None), "all_weights": (_SIZE, None), "bytes": (_SIZE, None)},
    "bytes": {"dense": (_COUNT, None), "packed": (_COUNT, None)},
    "residual": {"primal": (_SIZE, None), "dual": (_SIZE, None)},
    "violations": (_COUNT, None),
    "latency_ms": {"dense": (_SIZE, None), "compressed": (_SIZE, None)},
    "seconds": (_SIZE, None),
    "paper": {"quantity": (_TEXT, None), "value": (_NUMBER, None)},
}


def make_summary(**fields: Any) -> dict[str, Any]:
    """Builds a checked summary from its top-level keys, all of them, and the driver's own block under its name.

    NumPy and JAX scalars become plain numbers. A whole section that does not apply may be given as None: its keys
    are then all null, so that every summary has the same keys.

    Args:
      **fields: the keys of `SCHEMA`, and optionally `<driver>={...}`.

    Returns:
      A plain dict in the order of the schema.

    Raises:
      SummaryError: keys are missing or unknown, a value has the wrong kind, or a number is NaN or infinite.
    """
    given = {
        key: dict.fromkeys(SCHEMA[key]) if value is None and isinstance(SCHEMA.get(key), dict) else value
        for key, value in fields.items()
    }
    return check_summary(given)


def own_summary(driver: str, variant: str, block: Mapping[str, Any], seed: int = 0) -> dict[str, Any]:
    """A summary of the driver's own block alone, every shared figure null: what a benchmark has to say.

    In the tables a number measured many times is `{"median": .., "low": .., "high": ..}`.
    """
    empty = {key: None for key in SCHEMA if key not in ("driver", "variant", "seed")}
    return make_summary(driver=driver, variant=variant, seed=seed, **empty, **{driver: block})


def check_summary(summary: Mapping[str, Any], where: str = "summary") -> dict[str, Any]:
    """Checks a summary against the schema and returns it as a plain dict in the schema's order.

    Raises:
      SummaryError: lists every fault with its key.
    """
    if not isinstance(summary, Mapping):
        raise SummaryError(f"{where} is {summary!r:.80}; an object with the keys {', '.join(SCHEMA)} is needed")
    try:
        data = _json.plain(summary, where)
    except (TypeError, ValueError) as error:
        raise SummaryError(str(error)) from None
    driver = data.get("driver")
    faults: list[str] = []
    if isinstance(driver, str) and (not re.fullmatch(r"[a-z][a-z0-9_]*", driver) or driver in SCHEMA):
        faults.append(f"driver is {driver!r}; a name of lower-case letters, digits and _ that is no key is needed")
    blocks = {driver} if isinstance(driver, str) and driver in data and driver not in SCHEMA else set()
    _check(data, SCHEMA, "", faults, extra=blocks)
    for block in blocks:
        if not isinstance(data[block], dict):
            faults.append(f"{block} (the driver's own block) is {data[block]!r}; an object is needed")
    if faults:
        raise SummaryError(f"{where}: " + "; ".join(faults))
    ordered = {
        key: {name: data[key][name] for name in rule} if isinstance(rule, dict) else data[key]
        for key, rule in SCHEMA.items()
    }
    return ordered | {block: data[block] for block in blocks}


def write_summary(path: str | os.PathLike[str], summary: Mapping[str, Any]) -> Path:
    """Checks a summary and writes it, indented, replacing the file in one step.

    Raises:
      SummaryError: it breaks the schema; nothing is written.
    """
    text = json.dumps(check_summary(summary), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
    return _json.write_atomic(path, text.encode())


def read_summary(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads and checks a summary; the file is not trusted.

    Raises:
      SummaryError: missing, oversized, not strict JSON, or against the schema; the message names the file.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise SummaryError(f"{path} has {path.stat().st_size} bytes; a summary has at most {_MAX_BYTES}")
        data = _json.loads(path.read_bytes())
    except FileNotFoundError:
        raise SummaryError(f"{path} does not exist; a finished run writes it into its workdir") from None
    except SummaryError:
        raise
    except ValueError as error:
        raise SummaryError(f"{path} is not a summary: {error}") from None
    return check_summary(data, str(path))


def lookup(summary: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key (`"metric.compressed"`, `"cnn.run.command"`), or None where there is none."""
    value: Any = summary
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def run_of(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The `run` record in the driver's own block (command, date, machine, versions), or an empty dict."""
    run = lookup(summary, f"{summary.get('driver')}.run")
    return dict(run) if isinstance(run, Mapping) else {}


def _check(data: Any, rules: Mapping[str, Any], prefix: str, faults: list[str], extra: set[str]) -> None:
    if not isinstance(data, dict):
        faults.append(f"{prefix or 'summary'} is {data!r}; an object with the keys {', '.join(rules)} is needed")
        return
    dot = f"{prefix}." if prefix else ""
    faults += [f"{dot}{key} is missing" for key in rules if key not in data]
    faults += [f"{dot}{key} is unknown" for key in data if key not in rules and key not in extra]
    for key, rule in rules.items():
        if key not in data:
            continue
        if isinstance(rule, dict):
            _check(data[key], rule, f"{dot}{key}", faults, set())
        elif not any(_is(data[key], kind) for kind in rule):
            wanted = " or ".join("null" if kind is None else kind for kind in rule)
            faults.append(f"{dot}{key} is {data[key]!r}; {wanted} is needed")


def _is(value: Any, kind: str | None) -> bool:
    if kind is None:
        return value is None
    if kind == _BOOL:
        return isinstance(value, bool)
    if kind == _TEXT:
        return isinstance(value, str) and value != ""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    if kind in (_INT, _COUNT) and not isinstance(value, int):
        return False
    return kind in (_INT, _NUMBER) or value >= 0
