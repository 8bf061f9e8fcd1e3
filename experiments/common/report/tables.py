"""`python -m experiments.common.report.tables`: the tables of README.md, from summaries.

Every `docs/results/**/summary.json` is read; a row is one driver, variant and data set (and whatever else the table
groups by), or an entry of a list in it; mean and sample standard deviation over its seeds. `docs/results/tables.toml`
declares the tables (`report.declared` says how), and each replaces what stands between its markers in the document.
The site's page of results has its tables in the same way, but only where the site is built: `docs/_ext/results.py`.
"""

from __future__ import annotations

import argparse
import fnmatch
import re
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.common.report import _json, markdown
from experiments.common.report import format as fmt
from experiments.common.report.declared import Column, Goal, Table, TableError, read_tables
from experiments.common.report.summary import SummaryError, lookup, read_summary, run_of

DOCUMENT = "README.md"
RESULTS = "docs/results"
DECLARATIONS = "docs/results/tables.toml"


class Result(NamedTuple):
    """A summary and the file it came from."""

    path: Path
    summary: Mapping[str, Any]


def read_results(folder: Path) -> list[Result]:
    """Every `summary.json` below a folder, in the order of the paths.

    Raises:
      SummaryError: one of them breaks the schema.
    """
    return [Result(path, read_summary(path)) for path in sorted(folder.rglob("summary.json"))]


def render(table: Table, results: Sequence[Result]) -> str:
    """A table as markdown, with what was run below it.

    Raises:
      TableError: two summaries of a row have the same seed, so that they are not repetitions.
    """
    groups: dict[tuple[Any, ...], list[Result]] = {}
    for result in results:
        summary = result.summary
        if _shows(table, summary):
            for at, entry in _entries(table, result):
                key = _identity(table, entry.summary) if table.merges else (*_identity(table, entry.summary), *at)
                groups.setdefault(key, []).append(entry)
    rows = [sorted(group, key=lambda r: r.summary["seed"]) for _, group in sorted(groups.items(), key=_natural)]
    for row in rows:
        _distinct_seeds(table, row)
    open_goals = [goal for goal in table.goals if not any(_matches(goal, row[0].summary) for row in rows)]
    if not rows and not open_goals:
        return "No results yet."
    variants = [row[0].summary["variant"] for row in rows]
    cells = [[_cell(column, row, table, variants) for column in table.columns] for row in rows]
    cells += [[_open_cell(column, goal) for column in table.columns] for goal in open_goals]
    numeric = [not column.key.startswith(":") and column.format != "text" for column in table.columns]
    lines = [markdown.table([markdown.text(column.title) for column in table.columns], cells, numeric)]
    if any("±" in cell for line in cells for cell in line):
        lines.append("± is the sample standard deviation over the seeds." + (_JUDGED if table.goals else ""))
    if rows:
        items = "\n".join(dict.fromkeys(_provenance(part, table) for row in rows for part in _by_variant(row)))
        lines.append(f"<details><summary>Commands, dates and machines</summary>\n\n{items}\n\n</details>")
    return "\n\n".join(lines)


def update(root: Path, *, check: bool = False) -> bool:
    """Rewrites README's tables; running it twice changes nothing the second time.

    Args:
      root: the repository.
      check: only look, write nothing.

    Returns:
      Whether it changed, or would.

    Raises:
      TableError, SummaryError, MarkerError: nothing is written then.
    """
    path = root / DOCUMENT
    if not path.exists():
        raise TableError(f"{root} holds no {DOCUMENT}; run this in the repository or give --root")
    old = path.read_bytes().decode("utf-8")
    new = filled(root, old, str(path))
    if new != old and not check:
        _json.write_atomic(path, new.encode())
    return new != old


def filled(root: Path, document: str, where: str) -> str:
    """A document with every table between its markers.

    Args:
      root: the repository.
      document: markdown.
      where: the document's name, for messages.

    Returns:
      The new document.

    Raises:
      TableError, SummaryError, MarkerError: a declaration, a summary or a marker is wrong.
    """
    results = read_results(root / RESULTS)
    blocks = {table.name: render(table, results) for table in read_tables(root / DECLARATIONS)}
    return markdown.replace_blocks(document, blocks, where)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; 0 done, 1 `--check` found a document that is not up to date, 2 an error."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.common.report.tables", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a document would change")
    parser.add_argument("--root", type=Path, default=Path("."), help="the repository (default: this folder)")
    options = parser.parse_args(argv)
    try:
        changed = update(options.root, check=options.check)
    except (TableError, SummaryError, markdown.MarkerError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if not changed:
        print("tables are up to date")
    else:
        print(f"{DOCUMENT}: {'not up to date; run `make tables`' if options.check else 'updated'}")
    return 1 if changed and options.check else 0


_JUDGED = " Goals are judged on the mean."
_UNMEASURED = "not measured"


def _identity(table: Table, summary: Mapping[str, Any]) -> tuple[Any, ...]:
    data = summary["dataset"]
    more = (_hashable(lookup(summary, key)) for key in table.group_by)
    variant = () if table.merges else (summary["variant"],)
    return summary["driver"], *variant, *more, data["name"], data["stand_in"]


def _entries(table: Table, result: Result) -> list[tuple[tuple[Any, ...], Result]]:
    """The rows of a summary: itself, or with each entry of the table's list as `row`, by place and by what names it."""
    if table.rows is None:
        return [((), result)]
    entries = lookup(result.summary, table.rows)
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise TableError(f"table {table.name}: {table.rows} in {result.path} is no list of rows")
    names = [repr([v for v in entry.values() if isinstance(v, str)]) for entry in entries]
    rows = [Result(result.path, {**result.summary, "row": entry}) for entry in entries]
    return [((k, names[k]), row) for k, row in enumerate(rows)]


def _hashable(value: Any) -> Any:
    return value if value is None or isinstance(value, (str, int, float)) else repr(value)


def _natural(item: tuple[tuple[Any, ...], Any]) -> list[Any]:
    """A sort key in which x9 comes before x10 and numbers are numbers."""
    out: list[Any] = []
    for part in item[0]:
        if isinstance(part, str):
            chunks = re.split(r"(\d+)", part)
            out.append((2, [(int(c), "") if c.isdigit() else (-1, c) for c in chunks]))
        else:
            out.append((0, 0) if part is None else (1, part))
    return out


def _distinct_seeds(table: Table, row: Sequence[Result]) -> None:
    seeds: dict[int, Path] = {}
    for result in row:
        seed = result.summary["seed"]
        if seed in seeds:
            raise TableError(
                f"table {table.name}: {seeds[seed]} and {result.path} are both seed {seed} of one row, so they are no "
                "repetitions: remove one, or name the key that tells them apart in group_by"
            )
        seeds[seed] = result.path


def _cell(column: Column, row: Sequence[Result], table: Table, variants: Sequence[str]) -> str:
    first = row[0].summary
    data = first["dataset"]
    if column.key == ":variant":
        label = markdown.code(first["variant"])
        shows_data = any(other.key == ":dataset" for other in table.columns)
        if not shows_data and (data["stand_in"] or variants.count(first["variant"]) > 1 and data["name"]):
            label += f" ({_dataset(data)})"
        return label
    if column.key == ":system":
        return markdown.text(_system(table, first) or fmt.ABSENT)
    if column.key == ":dataset":
        return _dataset(data)
    if column.key == ":seeds":
        return str(len(row))
    if column.key == ":violations":
        known = [r.summary["violations"] for r in row if r.summary["violations"] is not None]
        return fmt.count(sum(known)) if known else fmt.ABSENT
    if column.key == ":paper":
        return markdown.text(_paper(first))
    if column.key == ":goal":
        goals = [goal for goal in table.goals if _matches(goal, first)]
        return "; ".join(f"{_words(goal, first)}: {_verdict(goal, row)}" for goal in goals) or fmt.ABSENT
    write = fmt.FORMATS[column.format] if column.format else fmt.for_key(column.key, first["metric"]["name"])
    values = [lookup(result.summary, column.key) for result in row]
    if column.format != "text":  # a list of numbers: one a seed
        values = [v for value in values for v in (value if _numbers(value) else [value])]
    return markdown.text(_aggregate(values, column, write))


def _numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in value)


def _aggregate(values: Sequence[Any], column: Column, write: Any) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return fmt.ABSENT
    partly = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    if len(known) == 1 and isinstance(known[0], Mapping) and {"median", "low", "high"} <= known[0].keys():
        return f"{write(known[0]['median'])} [{write(known[0]['low'])}, {write(known[0]['high'])}]"
    if any(isinstance(value, (str, bool, list, dict)) for value in known):
        return ", ".join(dict.fromkeys(fmt.text(value) for value in known)) + partly
    same = len(set(known)) == 1
    if len(known) == 1 or (same and not column.key.startswith("metric.")):
        return f"{write(known[0])}{partly}"
    return fmt.spread(write, statistics.fmean(known), statistics.stdev(known)) + partly


def _shows(table: Table, summary: Mapping[str, Any]) -> bool:
    return (
        table.driver in (None, summary["driver"])
        and fnmatch.fnmatchcase(summary["variant"], table.variant)
        and (table.having is None or lookup(summary, table.having) is not None)
        and (not table.rows_named or _system(table, summary) is not None)
    )


def _system(table: Table, summary: Mapping[str, Any]) -> str | None:
    """What `rows_named` calls the row of a summary, by the first pattern that matches."""
    name = f"{summary['driver']}/{summary['variant']}"
    return next((label for pattern, label in table.rows_named.items() if fnmatch.fnmatchcase(name, pattern)), None)


def _dataset(data: Mapping[str, Any]) -> str:
    name = markdown.text(data["name"] or fmt.ABSENT)
    return f"{name}, stand-in" if data["stand_in"] else name


def _paper(summary: Mapping[str, Any]) -> str:
    quantity, value = summary["paper"]["quantity"], summary["paper"]["value"]
    if value is None:
        return fmt.ABSENT
    if quantity is None or lookup(summary, quantity) is None:
        return f"{fmt.number(value)} ({quantity})" if quantity else fmt.number(value)
    return fmt.for_key(quantity, summary["metric"]["name"])(value)


def _matches(goal: Goal, summary: Mapping[str, Any]) -> bool:
    for key, wanted in goal.where.items():
        value = lookup(summary, key)
        if isinstance(wanted, str):
            if not isinstance(value, str) or not fnmatch.fnmatchcase(value, wanted):
                return False
        elif value != wanted:
            return False
    return True


def _verdict(goal: Goal, row: Sequence[Result]) -> str:
    for condition in goal.conditions:
        values = [lookup(result.summary, condition.key) for result in row]
        if any(isinstance(value, bool) or not isinstance(value, (int, float)) for value in values):
            return _UNMEASURED
        mean = statistics.fmean(values)
        if not (mean >= condition.value if condition.at_least else mean <= condition.value):
            return "**missed**"
    return "met"


def _words(goal: Goal, summary: Mapping[str, Any] | None) -> str:
    # Without a summary the metric's name is unknown; goals up to 1 are then taken for fractions.
    metric = summary["metric"]["name"] if summary else None
    parts = []
    for key, at_least, value in goal.conditions:
        fraction = summary is None and key.startswith("metric.") and 0 <= value <= 1
        write = fmt.percent if fraction else fmt.for_key(key, metric)
        parts.append(f"{'≥' if at_least else '≤'} {write(value).replace('.0×', '×')}")
    if len(parts) > 2:  # a list, in the order of the columns
        return markdown.text(", ".join(parts) if len(set(parts)) > 1 else f"all {parts[0]}")
    return markdown.text(" at ".join(parts))


def _open_cell(column: Column, goal: Goal) -> str:
    if column.key == ":goal":
        return f"{_words(goal, None)}: {_UNMEASURED}"
    wanted = goal.where.get("variant" if column.key == ":variant" else column.key)
    if column.key == ":variant":
        return markdown.code(str(wanted)) if wanted is not None else _UNMEASURED
    return markdown.text(str(wanted)) if wanted is not None else fmt.ABSENT


def _by_variant(row: Sequence[Result]) -> list[list[Result]]:
    parts: dict[str, list[Result]] = {}
    for result in row:
        parts.setdefault(result.summary["variant"], []).append(result)
    return list(parts.values())


def _provenance(row: Sequence[Result], table: Table) -> str:
    first = row[0].summary
    run = run_of(first)
    seeds = ", ".join(str(result.summary["seed"]) for result in row)
    parts = [markdown.code(first["variant"])]
    if "row" not in first or table.merges:  # otherwise an entry's seeds are its own affair
        parts[0] += f", seed{'s' if len(row) > 1 else ''} {seeds}"
    parts.append(markdown.code(str(run["command"])) if run.get("command") else "no command recorded")
    dates = sorted({str(run_of(result.summary).get("date") or "")[:10] for result in row} - {""})
    if dates:
        parts.append(dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}")
    machines = dict.fromkeys(_machine(run_of(result.summary)) for result in row)
    parts += [markdown.text(machine) for machine in machines if machine]
    return "- " + "; ".join(parts)


def _machine(run: Mapping[str, Any]) -> str:
    machine = run.get("machine")
    if not isinstance(machine, Mapping):
        return str(machine or "")
    cores = f"{machine['cores']} cores" if machine.get("cores") else ""
    backend = f"backend {machine['backend']}" if machine.get("backend") else ""
    return ", ".join(str(part) for part in (machine.get("processor"), cores, backend) if part)


if __name__ == "__main__":
    sys.exit(main())
