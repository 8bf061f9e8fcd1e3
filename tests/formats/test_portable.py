"""Rules as a file of their own: what is written comes back, and what is not understood is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import compressx as cx
from compressx import schedules
from compressx.constraints import KINDS, from_spec
from compressx.formats import CompressedFileError, portable
from tests.formats.hostile import SPECS


@st.composite
def rule_lists(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Rules of any family, joined or alone, with patterns of any characters."""
    made = []
    for _ in range(draw(st.integers(1, 5))):
        pattern = re.escape(draw(st.text(min_size=1, max_size=12))) + draw(st.sampled_from(["", ".*", r"/(a|b)\d+"]))
        spec = draw(st.sampled_from([None, *SPECS]))
        density = draw(st.floats(0.01, 1))
        both = cx.unstructured(density) & cx.quantize(draw(st.integers(2, 8)))
        made.append((pattern, draw(st.sampled_from([both, spec and from_spec(spec)]))))
    return made


positive = st.floats(1e-12, 1e12)
rhos = st.one_of(positive, st.lists(st.tuples(st.sampled_from([".*", "a/b"]), positive), min_size=1, max_size=3))
planned = st.none() | st.fixed_dictionaries(
    {}, optional={"rho": rhos, "every": st.integers(1, 10**9), "refresh_every": st.none() | st.integers(1, 99)}
)


def test_rules_of_every_family_are_drawn() -> None:
    assert {s["kind"] for s in SPECS} >= set(KINDS)


def _specs(rules: Any) -> list[Any]:
    return [(pattern, None if c is None else c.spec) for pattern, c in rules]


@given(rules=rule_lists(), schedule=planned)
def test_rules_come_back_as_they_were(tmp_path_factory: Any, rules: Any, schedule: Any) -> None:
    path = tmp_path_factory.mktemp("rules") / "rules.json"
    cx.write_rules(path, rules, schedule)
    found = cx.read_rules(path)
    assert _specs(found.rules) == _specs(rules) and found.schedule == schedule
    first = path.read_bytes()
    cx.write_rules(path, *found)
    assert path.read_bytes() == first


def test_rules_of_a_file_train_as_those_that_were_written(tmp_path: Path) -> None:
    params = {"a": {"kernel": jax.random.normal(jax.random.key(0), (16, 8)), "bias": jnp.zeros(8)}}
    rules = [(".*/bias", None), (".*/kernel", cx.unstructured(0.25) & cx.quantize(4))]
    cx.write_rules(tmp_path / "r", zip(*zip(*rules, strict=True), strict=True), {"rho": 0.1, "every": 2})
    found = cx.read_rules(tmp_path / "r")

    def trained(rules: Any, schedule: Any) -> Any:
        tx = optax.chain(cx.admm(rules, **schedule), optax.sgd(0.1))
        p, s = params, tx.init(params)
        for _ in range(4):
            updates, s = tx.update(p, s, p)
            p = optax.apply_updates(p, updates)
        return cx.harden(p, rules, s).params

    a, b = trained(rules, {"rho": 0.1, "every": 2}), trained(found.rules, found.schedule)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), a, b))


RULE = {"pattern": "a", "constraint": {"kind": "unstructured", "density": 0.1}}
GOOD = {"version": 1, "rules": [RULE]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "file: is not valid JSON"),
        ('{"version": 1, "version": 1, "rules": []}', "a key occurs twice"),
        ("[" * 100_000, "file: is not valid JSON"),
        ("[" * 70 + "]" * 70, "file: is nested more than 64 deep"),
        (b"\xff\xfe", "file: is not UTF-8 text"),
        (json.dumps(GOOD).encode("utf-16"), "file: is not UTF-8 text"),
        ([], "file: [] is not a JSON object"),
        ({"rules": [RULE]}, "file: has no 'version'"),
        (GOOD | {"version": 2}, "version: 2 cannot be read"),
        (GOOD | {"version": True}, "version: True cannot be read"),
        (GOOD | {"sets": []}, "file: 'sets' is not understood; it may hold version, rules, schedule"),
        (GOOD | {"rules": []}, "rules: is not a list of 1 to 8192 rules"),
        (GOOD | {"rules": [RULE] * 8193}, "rules: is not a list of 1 to 8192 rules"),
        (GOOD | {"rules": {"a": RULE}}, "rules: is not a list"),
        (GOOD | {"rules": [RULE, {"pattern": "a"}]}, "rules[1]: has no 'constraint'"),
        (GOOD | {"rules": [["a", None]]}, "rules[0]: ['a', None] is not a JSON object"),
        (GOOD | {"rules": [RULE | {"axes": "in ouch"}]}, "rules[0]/axes: 'in ouch': axes are words out of"),
        (GOOD | {"rules": [RULE | {"pattern": 3}]}, "rules[0]/pattern: 3 is not text"),
        (GOOD | {"rules": [RULE | {"pattern": "(a"}]}, "rules[0]/pattern: '(a' is not a regular expression"),
        (GOOD | {"rules": [RULE | {"pattern": "(" * 5000}]}, "is not a regular expression"),
        (GOOD | {"rules": [RULE | {"pattern": "a{99999999999}"}]}, "is not a regular expression"),
        (GOOD | {"rules": [RULE | {"pattern": "a" * 70_000}]}, "rules[0]/pattern: 'aaa"),
        (GOOD | {"rules": [RULE | {"constraint": "unstructured"}]}, "/constraint: 'unstructured' is not the spec"),
        (GOOD | {"rules": [RULE | {"constraint": {"kind": "magic"}}]}, "unknown constraint 'magic'; known: balanced"),
        (GOOD | {"rules": [RULE | {"constraint": {"kind": "unstructured", "density": "0.1"}}]}, "density='0.1' is not"),
        (GOOD | {"rules": [RULE | {"constraint": {"kind": "filters", "density": 2}}]}, "density must be in (0, 1]"),
        (GOOD | {"schedule": {"lr": 1}}, "schedule: 'lr' is not understood; it may hold rho, every, refresh_every"),
        (GOOD | {"schedule": {"every": 0}}, "schedule/every: 0 is impossible"),
        (GOOD | {"schedule": {"every": True}}, "schedule/every: True is impossible"),
        (GOOD | {"schedule": {"every": None}}, "schedule/every: None is impossible"),
        (GOOD | {"schedule": {"refresh_every": 1.5}}, "schedule/refresh_every: 1.5 is impossible"),
        (GOOD | {"schedule": {"rho": -1}}, "schedule/rho: -1 is impossible"),
        (GOOD | {"schedule": {"rho": None}}, "schedule/rho: None is impossible"),
        (GOOD | {"schedule": {"rho": []}}, "schedule/rho: [] is not a list of pairs"),
        (GOOD | {"schedule": {"rho": [["(", 1.0]]}}, "schedule/rho[0]: '(' is not a regular expression"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    text = content if isinstance(content, bytes | str) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CompressedFileError) as caught:
        cx.read_rules(path)
    assert str(caught.value).startswith(f"{path}: ") and message in str(caught.value)
    assert len(str(caught.value)) < 1200


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)


@given(data=st.data())
def test_a_changed_file_is_read_or_refused(tmp_path_factory: Any, data: st.DataObject) -> None:
    """Any value in any entry: rules come back that can be written again, or the file is refused."""
    rules = data.draw(rule_lists())
    content: Any = {
        "version": 1,
        "rules": [{"pattern": p, "constraint": None if c is None else c.spec, "axes": None} for p, c in rules],
        "schedule": data.draw(planned),
    }
    content = json.loads(json.dumps(content))
    spots = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            spots.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(content)
    node, key = data.draw(st.sampled_from(spots))
    node[key] = data.draw(json_values)
    path = tmp_path_factory.mktemp("changed") / "r.json"
    path.write_text(json.dumps(content))
    try:
        found = cx.read_rules(path)
    except CompressedFileError:
        return
    cx.write_rules(path, *found)
    assert _specs(cx.read_rules(path).rules) == _specs(found.rules)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    @cx.factory
    def inputs(density: float) -> cx.Constraint:
        return cx.support(lambda w: jnp.ones_like(w, bool))

    path = tmp_path / "r.json"
    path.write_text("before")
    good = [("a", cx.unstructured(0.1))]
    for rules, schedule, message in (
        ([("a", inputs(0.5))], None, r"rules\[0\]/constraint: .* unknown constraint 'inputs'"),
        ([("(a", cx.unstructured(0.1))], None, r"rules\[0\]/pattern: '\(a' is not a regular expression"),
        ([], None, "rules: is not a list of 1"),
        (good, {"rho": schedules.staged(1e-3)}, "write rho as a number"),
        (good, {"rho": float("nan")}, "cannot be written as JSON"),
        (good, {"rho": 0.0}, "schedule/rho: 0.0 is impossible"),
        (good, {"every": np.int64(3)}, "cannot be written as JSON"),
        ([("a", cx.unstructured)], None, "unstructured makes one when it is called"),
    ):
        with pytest.raises(ValueError, match=message):
            cx.write_rules(path, rules, schedule)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_files_that_are_none_are_errors_of_the_system_or_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cx.read_rules(tmp_path / "absent")
    with pytest.raises(CompressedFileError, match="file: is not a regular file"):
        cx.read_rules(tmp_path)
    with pytest.raises(OSError, match="absent"):
        cx.write_rules(tmp_path / "absent" / "r.json", [("a", cx.unstructured(0.1))])


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(GOOD))
    monkeypatch.setattr(portable.container, "MAX_HEADER", 20)
    with pytest.raises(CompressedFileError, match="more than max_bytes=20"):
        cx.read_rules(path)
