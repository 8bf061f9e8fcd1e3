"""How a result table is declared: a small plain structure, read from TOML and checked.

[[table]]
name = "mnist_unstructured"              # <!-- results:mnist_unstructured --> ... <!-- /results -->
driver = "cnn"                           # left out: every driver
variant = "mnist_lenet5_unstructured*"   # a shell pattern; left out: every variant
rows_named = { "cnn/mnist_*" = "LeNet-5" }  # DRIVER/VARIANT patterns and what the column `system` calls them; only
                                         # what one of them matches is a row; left out: all
having = "cnn.density"                   # a dotted key that a summary must have; left out: none
group_by = ["cnn.density"]               # more keys that tell rows apart; left out: none
rows = "sweep.rows"                      # a list in each summary: a row an entry, shown as row.KEY; left out: none.
                                         # With group_by = ["row.KEY", ...], entries that agree in those keys are one
                                         # row, whatever their place in the list and the variant of their run
columns = ["variant", "seeds", "rate", "compressed", { title = "area", key = "cnn.area", format = "number" }]

[[table.goal]]                           # a row that no summary fills is shown as not measured
where = { variant = "mnist_lenet5_unstructured_85x" }
conditions = [{ key = "metric.compressed", at_least = 0.992 }, { key = "rate.constrained_weights", at_least = 85 }]
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.report import format as fmt


class TableError(ValueError):
    """A table cannot be built; the message names the declaration or the summaries."""


class Column(NamedTuple):
    """A column: its title, the dotted key it shows, and the name of a format, or None to go by the key."""

    title: str
    key: str
    format: str | None = None


# The columns a table can name. A key beginning with ":" is worked out from the row and not looked up.
COLUMNS: Mapping[str, Column] = {
    "system": Column("system", ":system"),
    "driver": Column("driver", "driver", "text"),
    "variant": Column("variant", ":variant"),
    "dataset": Column("data", ":dataset"),
    "seeds": Column("seeds", ":seeds"),
    "dense": Column("dense", "metric.dense"),
    "dense_same_budget": Column("dense, same budget", "metric.dense_same_budget"),
    "one_shot": Column("one-shot", "metric.one_shot"),
    "hardened": Column("hardened only", "metric.hardened"),
    "compressed": Column("compressed", "metric.compressed"),
    "metric": Column("metric", "metric.name", "text"),
    "rate": Column("compression ratio, pruned layers", "rate.constrained_weights"),
    "rate_all": Column("fewer weights", "rate.all_weights"),
    "rate_bytes": Column("fewer bytes", "rate.bytes"),
    "bytes_dense": Column("dense size", "bytes.dense"),
    "bytes": Column("packed size", "bytes.packed"),
    "latency_dense": Column("dense latency", "latency_ms.dense"),
    "latency": Column("latency", "latency_ms.compressed"),
    "violations": Column("violations", ":violations"),
    "primal": Column("primal residual", "residual.primal"),
    "dual": Column("dual residual", "residual.dual"),
    "seconds": Column("time", "seconds"),
    "paper": Column("paper", ":paper"),
    "goal": Column("goal", ":goal"),
}


class Condition(NamedTuple):
    """The mean under `key` is at least, or at most, `value`."""

    key: str
    at_least: bool
    value: float


class Goal(NamedTuple):
    """Conditions on the rows that `where` picks: patterns or numbers by dotted key."""

    where: Mapping[str, Any]
    conditions: Sequence[Condition]


@dataclass(frozen=True, kw_only=True)
class Table:
    """One declared table; see the head of this file."""

    name: str
    columns: Sequence[Column]
    driver: str | None = None
    variant: str = "*"
    having: str | None = None
    rows_named: Mapping[str, str] = field(default_factory=dict)
    group_by: Sequence[str] = ()
    rows: str | None = None
    goals: Sequence[Goal] = field(default_factory=tuple)

    @property
    def merges(self) -> bool:
        """Whether entries of several variants are one row: those that agree in the `row.` keys of `group_by`."""
        return any(key.startswith("row.") for key in self.group_by)


def read_tables(path: Path) -> list[Table]:
    """The tables declared in a TOML file.

    Raises:
      TableError: the file is missing, not TOML, or holds an unknown key, column, format or an incomplete goal.
    """
    try:
        declared = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TableError(f"{path} does not exist; declare the tables there") from None
    except ValueError as error:
        raise TableError(f"{path}: {error}") from None
    _keys(declared, {"table"}, str(path))
    tables = [_table(entry, f"{path}, table {i}") for i, entry in enumerate(declared.get("table", []), start=1)]
    names = [table.name for table in tables]
    if len(set(names)) != len(names):
        raise TableError(f"{path}: two tables are named {next(n for n in names if names.count(n) > 1)!r}")
    return tables


def _keys(entry: Any, allowed: set[str], where: str) -> None:
    if not isinstance(entry, dict):
        raise TableError(f"{where}: {entry!r} is no table with the keys {', '.join(sorted(allowed))}")
    unknown = sorted(set(entry) - allowed)
    if unknown:
        raise TableError(f"{where}: {unknown[0]!r} is unknown; the keys are {', '.join(sorted(allowed))}")


def _table(entry: Any, where: str) -> Table:
    _keys(entry, {"name", "driver", "variant", "having", "rows_named", "group_by", "rows", "columns", "goal"}, where)
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"\S+", name):
        raise TableError(f"{where}: name is {name!r}; a word is needed")
    where = f"{where} ({name})"
    for key in ("driver", "variant", "having", "rows"):
        if not isinstance(entry.get(key, ""), str):
            raise TableError(f"{where}: {key} is {entry[key]!r}; text is needed")
    group_by, columns = entry.get("group_by", []), entry.get("columns")
    if not isinstance(group_by, list) or not all(isinstance(key, str) for key in group_by):
        raise TableError(f"{where}: group_by is {group_by!r}; a list of dotted keys is needed")
    if entry.get("rows") is None and any(key.startswith("row.") for key in group_by):
        raise TableError(f"{where}: group_by is {group_by!r}, and there are no rows; name the list of entries in rows")
    if not isinstance(columns, list) or not columns:
        raise TableError(f"{where}: columns is {columns!r}; a list is needed, of {', '.join(COLUMNS)} or title and key")
    named = entry.get("rows_named", {})
    if not isinstance(named, dict) or not all(isinstance(label, str) for label in named.values()):
        raise TableError(f"{where}: rows_named is {named!r}; patterns DRIVER/VARIANT with a name each are needed")
    goals = entry.get("goal", [])
    if not isinstance(goals, list):
        raise TableError(f"{where}: goal is {goals!r}; write [[table.goal]]")
    return Table(
        name=name,
        driver=entry.get("driver"),
        variant=entry.get("variant", "*"),
        having=entry.get("having"),
        rows_named=named,
        group_by=tuple(group_by),
        rows=entry.get("rows"),
        columns=tuple(_column(column, where) for column in columns),
        goals=tuple(_goal(goal, f"{where}, goal {i}") for i, goal in enumerate(goals, start=1)),
    )


def _column(entry: Any, where: str) -> Column:
    if isinstance(entry, str):
        if entry not in COLUMNS:
            raise TableError(f"{where}: no column is named {entry!r}; the names are {', '.join(COLUMNS)}")
        return COLUMNS[entry]
    _keys(entry, {"title", "key", "format"}, where)
    if (
        not isinstance(entry.get("title"), str)
        or not isinstance(entry.get("key"), str)
        or entry["key"][:1] in ("", ":")
    ):
        raise TableError(f"{where}: the column {entry!r} needs a title and a dotted key")
    if entry.get("format", "text") not in fmt.FORMATS:
        raise TableError(
            f"{where}: the format {entry['format']!r} is unknown; the formats are {', '.join(fmt.FORMATS)}"
        )
    return Column(entry["title"], entry["key"], entry.get("format"))


def _goal(entry: Any, where: str) -> Goal:
    _keys(entry, {"where", "conditions"}, where)
    picks, conditions = entry.get("where"), entry.get("conditions")
    if not isinstance(picks, dict) or not picks:
        raise TableError(f"{where}: where is {picks!r}; dotted keys with a pattern or a number are needed")
    if not isinstance(conditions, list) or not conditions:
        raise TableError(f"{where}: conditions is {conditions!r}; a list of {{ key, at_least | at_most }} is needed")
    return Goal(_flat(picks), tuple(_condition(condition, where) for condition in conditions))


def _condition(entry: Any, where: str) -> Condition:
    _keys(entry, {"key", "at_least", "at_most"}, where)
    bounds = [(key, entry[key]) for key in ("at_least", "at_most") if key in entry]
    if not isinstance(entry.get("key"), str) or len(bounds) != 1 or isinstance(bounds[0][1], (bool, str)):
        raise TableError(f"{where}: the condition {entry!r} needs a key and one number, at_least or at_most")
    if not isinstance(bounds[0][1], (int, float)):
        raise TableError(f"{where}: {bounds[0][0]} is {bounds[0][1]!r}; a number is needed")
    return Condition(entry["key"], bounds[0][0] == "at_least", bounds[0][1])


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """TOML reads `cnn.density = 1` as nested tables; both spellings become the dotted key."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return out
