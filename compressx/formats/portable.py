"""Rules as a file of their own: JSON that a person can read and change, apart from any weights.

    {"version": 1,
     "rules": [{"pattern": "params/.*/kernel", "constraint": {"kind": "unstructured", "density": 0.1}, "axes": null}],
     "schedule": {"rho": 0.001, "every": 500, "refresh_every": null}}

A constraint is its spec, or null for leaves that stay free. The schedule holds arguments of `admm` by their names, each
of which may be missing; it is null where nothing is said of it.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from compressx.axes import parse
from compressx.constraints import from_spec
from compressx.constraints.spec import brief, fits
from compressx.formats import container
from compressx.formats.base import CompressedFileError, fail
from compressx.rules import Rules, pairs

VERSION = 1
MAX_RULES = 8192
MAX_PATTERN = 1 << 16  # characters


class RulesFile(NamedTuple):
    """What a file of rules holds.

    Attributes:
      rules: (pattern, constraint), or with axes; None as a constraint leaves a leaf free.
      schedule: keyword arguments of `admm` ("rho", "every", "refresh_every"), those that the file names; or None.

    Example:
      >>> compressx.write_rules("rules.json", [(".*/kernel", compressx.n_of_m(2, 4))], {"rho": 1e-3})
      >>> held = compressx.read_rules("rules.json")
      >>> held.rules[0][0], held.schedule
      ('.*/kernel', {'rho': 0.001})
    """

    rules: tuple[tuple[Any, ...], ...]
    schedule: dict[str, Any] | None


def write_rules(path: str | os.PathLike[str], rules: Rules, schedule: Mapping[str, Any] | None = None) -> None:
    """Writes rules to a JSON file in one step; what was there before survives any failure.

    Args:
      path: the file, usually `rules.json`; its folder must exist.
      rules: pairs (pattern, constraint).
      schedule: arguments of `admm`: "rho" (a number, or pairs of a pattern and a number), "every", "refresh_every".

    Raises:
      ValueError: what could not be read back, such as a constraint that is not in `constraints.KINDS`, a pattern that
        is no regular expression, or a rho that is a schedule.
      OSError: the file cannot be written.

    Example:
      >>> import tempfile, pathlib
      >>> from compressx import read_rules, unstructured, write_rules
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "rules.json"
      >>> write_rules(path, [(".*kernel", unstructured(0.1))], {"every": 500})
      >>> read_rules(path).schedule
      {'every': 500}
    """
    listed = [
        {
            "pattern": pattern,
            "constraint": None if c is None else dict(c.spec),
            "axes": str(parse(axes[0])) if axes and axes[0] is not None else None,
        }
        for pattern, c, *axes in pairs(rules)
    ]
    content = {"version": VERSION, "rules": listed, "schedule": None if schedule is None else dict(schedule)}
    try:
        container.to_json(content)
    except ValueError as error:
        raise ValueError(f"{error}; a schedule of rho is a function: write rho as a number, or leave it out") from None
    text = json.dumps(content, indent=1) + "\n"
    try:
        _parse(text)
    except CompressedFileError as error:
        raise ValueError(f"these rules could not be read back: {error}") from None
    container.replace(Path(path), text.encode())


def read_rules(path: str | os.PathLike[str]) -> RulesFile:
    """Reads rules from a JSON file, believing nothing of it; inverse of `write_rules`.

    Its size and the number of its values and rules are bounded, and nothing in it is executed. Its patterns are regular
    expressions, which Python matches: one that is made to backtrack may take long where it is used.

    Args:
      path: a file that `write_rules` or a person wrote, or anything else.

    Returns:
      The rules, and the schedule or None.

    Example:
      >>> import tempfile, pathlib
      >>> from compressx import read_rules, filters, write_rules
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "rules.json"
      >>> write_rules(path, [("head/kernel", filters(0.5))])
      >>> [(pattern, str(constraint)) for pattern, constraint in read_rules(path).rules]
      [('head/kernel', 'filters(density=0.5)')]

    Raises:
      CompressedFileError: it is not understood; the text begins with the file and the entry.
      OSError: the file cannot be opened or read.
    """
    target = Path(path)
    try:
        try:
            text = container.read_bytes(target, container.MAX_HEADER).decode()
        except UnicodeDecodeError as error:
            fail("file", f"is not UTF-8 text: {error.reason} at byte {error.start}")
        return _parse(text)
    except CompressedFileError as error:
        raise CompressedFileError(f"{target}: {error}") from None


def _parse(text: str) -> RulesFile:
    content = _object(container.from_json(text, "file"), "file", ("version", "rules"), ("schedule",))
    version, listed = content["version"], content["rules"]
    if type(version) is not int or version != VERSION:
        fail("version", f"{brief(version)} cannot be read by this release, which reads {VERSION}")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_RULES:
        fail("rules", f"is not a list of 1 to {MAX_RULES} rules")
    rules = tuple(_rule(about, f"rules[{number}]") for number, about in enumerate(listed))
    return RulesFile(rules, _schedule(content.get("schedule")))


def _object(value: Any, entry: str, needed: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, Any]:
    """A JSON object with the keys it needs, and no others than the optional ones."""
    if not isinstance(value, dict):
        fail(entry, f"{brief(value)} is not a JSON object; compressx.write_rules writes such files")
    for key in needed:
        if key not in value:
            fail(entry, f"has no {key!r}")
    for key in value:
        if key not in (*needed, *optional):
            fail(entry, f"{brief(key)} is not understood; it may hold {', '.join((*needed, *optional))}")
    return value


def _axes(value: Any, entry: str) -> tuple[str, ...]:
    """The axes of a rule as its third entry; none where nothing is said of them."""
    if value is None:
        return ()
    try:
        if not isinstance(value, str):
            raise ValueError("are not a text of words")
        return (str(parse(value)),)
    except ValueError as error:
        fail(entry, f"{brief(value)}: {error}")


def _rule(about: Any, entry: str) -> tuple[Any, ...]:
    about = _object(about, entry, ("pattern", "constraint"), ("axes",))
    axes = _axes(about.get("axes"), f"{entry}/axes")
    pattern, spec = _pattern(about["pattern"], f"{entry}/pattern"), about["constraint"]
    if spec is None:
        return pattern, None, *axes
    if not isinstance(spec, dict):
        fail(f"{entry}/constraint", f"{brief(spec)} is not the spec of a constraint, or null")
    try:
        return pattern, from_spec(spec), *axes
    except Exception as error:  # a hostile spec may upset a factory in any way
        fail(f"{entry}/constraint", f"{brief(spec)} is refused: {str(error)[:300] or type(error).__name__}")


def _pattern(value: Any, entry: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_PATTERN:
        fail(entry, f"{brief(value)} is not text of 1 to {MAX_PATTERN} characters")
    try:
        re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        fail(entry, f"{brief(value)} is not a regular expression: {error}")
    return value


def _schedule(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    given = dict(_object(value, "schedule", (), ("rho", "every", "refresh_every")))
    for key in given.keys() & {"every", "refresh_every"}:
        number: Any = given[key]
        if not (fits(number, int) and number >= 1) and not (key == "refresh_every" and number is None):
            fail(f"schedule/{key}", f"{brief(number)} is impossible; it must be an integer of at least 1")
    rho = given.get("rho")
    if isinstance(rho, list):
        if not rho or not all(isinstance(p, list) and len(p) == 2 for p in rho):
            fail("schedule/rho", f"{brief(rho)} is not a list of pairs of a pattern and a number")
        given["rho"] = [(_pattern(p, f"schedule/rho[{i}]"), _rho(r)) for i, (p, r) in enumerate(rho)]
    elif "rho" in given:
        given["rho"] = _rho(rho)
    return given


def _rho(value: Any) -> float:
    if not fits(value, float) or value <= 0:
        fail("schedule/rho", f"{brief(value)} is impossible; it must be positive, or pairs of a pattern and that")
    return float(value)
