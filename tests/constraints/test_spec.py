"""Arguments from a spec: the declared types and no others, and nothing made that a leaf has not allowed."""

import tracemalloc
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressx.constraints import KINDS, coupled_filters, from_spec, intersection, network_structure, unstructured
from compressx.constraints.base import MAX_SETS
from compressx.constraints.spec import check_types, fits
from tests.formats.hostile import SPECS

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
)


def _is(value: Any, hint: str) -> bool:
    """The types that factories declare, one by one."""
    if hint == "int":
        return type(value) is int and abs(value) < 2**63
    if hint == "float | None":
        return value is None or _is(value, "int") or (type(value) is float and bool(np.isfinite(value)))
    if hint == "float | Sequence[int] | None":
        return _is(value, "float | None") or _is(value, "Sequence[int]")
    if hint in ("Sequence[int]", "tuple[int, int]"):
        whole = hint[0] == "S" or (isinstance(value, list) and len(value) == 2)
        return type(value) is list and whole and all(_is(v, "int") for v in value)
    if hint == "Sequence[Sequence[int]]":
        return type(value) is list and all(_is(v, "Sequence[int]") for v in value)
    return hint == "Any" or type(value) is {"str": str, "bool": bool, "Mapping[str, Any]": dict}[hint]


HINTS = {
    "int": int,
    "float | None": float | None,
    "str": str,
    "bool": bool,
    "tuple[int, int]": tuple[int, int],
    "Sequence[int]": Sequence[int],
    "Sequence[Sequence[int]]": Sequence[Sequence[int]],
    "float | Sequence[int] | None": float | Sequence[int] | None,
    "Mapping[str, Any]": Mapping[str, Any],
    "Any": Any,
}


@pytest.mark.parametrize("hint", HINTS)
@given(value=values)
def test_a_value_fits_a_type_as_a_list_of_cases_says(hint: str, value: Any) -> None:
    assert fits(value, HINTS[hint]) == _is(value, hint)


def test_numpy_numbers_and_tuples_are_numbers_and_lists() -> None:
    check_types("x", KINDS["block"], {"block": (np.int64(2), 2), "density": np.float32(0.5)})
    with pytest.raises(ValueError, match="keep=.*True.* is not of the type int"):
        check_types("x", KINDS["block"], {"keep": np.bool_(True)})


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_argument_of_every_set_is_refused_in_another_type(kind: str) -> None:
    spec = next(s for s in SPECS if s["kind"] == kind)
    again = from_spec(spec)
    assert from_spec(again.spec).spec == again.spec
    for name, value in spec.items():
        for wrong in ({}, object(), [[[]]], 1j, float("nan"), 2**63, -(10**400), "x", True, None):
            if type(wrong) is type(value) or name == "kind":
                continue
            try:
                made = from_spec({**spec, name: wrong})
            except ValueError:
                continue
            assert wrong is None, f"{kind}({name}={wrong!r}) is {made}"


def test_an_intersection_from_a_spec_is_one_of_few_single_sets() -> None:
    one = dict(unstructured(0.5).spec)
    assert len(from_spec({"kind": "all", "parts": [one] * MAX_SETS}).parts) == MAX_SETS
    for parts in ([], [one] * (MAX_SETS + 1), [{"kind": "all", "parts": [one]}], [3], {"0": one}, None):
        with pytest.raises(ValueError, match="intersection"):
            from_spec({"kind": "all", "parts": parts})
    with pytest.raises(ValueError, match="33 sets; at most 32"):
        intersection(*[unstructured(0.5)] * 33)


MEMBER = {"makes": 0, "makes_units": [[0, 1 << 40]], "reads": None, "reads_units": None, "columns": None}


@pytest.mark.parametrize(
    "make",
    [
        lambda: coupled_filters([(0, [(0, 1 << 40)])], 0.5),
        lambda: coupled_filters([(0, [(0, 4), (-1, 1 << 40)])], 0.5),
        lambda: network_structure([MEMBER], [[0, 1 << 40, 3]]),
        lambda: network_structure([MEMBER], [[0, 1 << 40, 3]], selection="random"),
    ],
)
def test_runs_are_made_when_they_fit_the_leaves_and_not_before(make: Any) -> None:
    tracemalloc.start()
    constraint = make()
    for use in (lambda w: constraint.project(w, ()), lambda w: constraint.freeze(w, ())):
        with pytest.raises(ValueError, match="1099511627.* channels on axis 0"):
            use((jnp.ones((8, 8)),))
    assert tracemalloc.get_traced_memory()[1] < 1 << 22
    tracemalloc.stop()


@pytest.mark.parametrize(
    ("members", "text"),
    [
        ([(0, [(0, 4), (4, 0)])], "a run must be"),
        ([(0, [(-2, 4)])], "a run must be"),
        ([(0, [(0, 4), (6, 2)])], r"missing are 4\.\.5"),
        ([(0, [(-1, 4)])], "missing are all"),
    ],
)
def test_runs_that_are_none_are_refused(members: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        coupled_filters(members, 0.5)


def test_members_of_other_types_are_refused() -> None:
    for key, value in (("makes", "0"), ("makes", 1.0), ("makes_units", [["0", 4]]), ("columns", True)):
        with pytest.raises(ValueError, match=f"member 0: {key}=.* is not of the type"):
            network_structure([{**MEMBER, "makes_units": [[0, 4]], key: value}], [[0, 4, 2]])


def test_a_structure_of_the_same_numbers_is_the_same_set() -> None:
    members = [{"makes": 1, "makes_units": [[0, 5], [-1, 1], [5, 2]], "reads": 0, "reads_units": [[5, 2], [-1, 2]]}]
    members[0]["columns"] = 2
    w = (jax.random.normal(jax.random.key(0), (4, 8)),)
    constraint = network_structure(members, [[0, 5, 2], [5, 2, 1]])
    z = np.asarray(constraint.project(w, ())[0])
    again = np.asarray(from_spec(constraint.spec).project(w, ())[0])
    assert z.tobytes() == again.tobytes()
    columns = z.any(axis=0)
    assert columns[:5].sum() <= 2 and columns[6:].sum() <= 1 and z.any(axis=1).sum() <= 2
