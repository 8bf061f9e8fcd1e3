"""Golden figures: what the library computes for fixed inputs is what it computed when the figures were made."""

import copy
import json

import jax
import numpy as np
import pytest

from tests.golden import adapter, cases, figures, make

# Of every set, format, network and driver `make test` looks at a figure; at another dtype, option or grid of the same,
# at the costly intersections and at codes inside further formats, `make test-all` does.
SLOW = (
    *(f"drivers/{n}" for n in ("gru_speech", "language_model")),
    *(f"networks/{n}" for n in ("mobilenet_v2", "vgg16")),
    *(f"files/{n}-coded" for n in ("csr16", "coo-delta", "bspc", "block-max", "bank-balanced", "compact")),
    *(f"files/{n}" for n in ("bit-planes-complement", "digits quantized")),
    *(f"sets/pattern {n}" for n in ("bfloat16", "list 5x5", "aligned channel")),
    *(f"sets/{n}" for n in ("pattern_connectivity balanced", "connectivity balanced")),
    *(f"sets/darb {n}" for n in ("inputs", "inverse", "uniform")),
    *(f"sets/polarize {n}" for n in ("H", "bfloat16")),
    *(f"sets/quantize {n}" for n in ("bfloat16", "8 bits channel", "powers channel", "codebook channel")),
    *(f"sets/unify {n}" for n in ("bfloat16", "cubes", "keep")),
    "sets/unify_and_prune exact",
    *(f"sets/{n} & polarize & quantize" for n in ("filters", "pattern network")),
    *(f"sets/{n} & quantize" for n in ("unstructured global", "bsp gates")),
    "sets/unstructured & unify keep & polarize",
)
on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="the figures are those of a CPU")


@on_cpu
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in make.names()])
def test_a_figure_is_what_it_was(name: str) -> None:
    found = make.differences(name)
    assert not found, "\n".join(["where a change was meant, tests/golden/README.md says what to do", *found])


def test_every_figure_has_a_case() -> None:
    assert set(SLOW) <= set(make.names())
    for group, (table, _) in make.GROUPS.items():
        assert list(make.stored(group)) == list(table)
    held = {p.name for p in figures.stored_file("x").parent.iterdir()}
    assert held == {figures.stored_file(name).name for name in cases.FILES}


def test_every_set_has_a_figure() -> None:
    specs = [part for case in cases.SETS.values() for part in case.spec.get("parts", [case.spec])]
    assert {s["kind"] for s in specs} == adapter.kinds()


def test_every_format_has_a_file() -> None:
    found = {leaf["format"] for figure in make.stored("files").values() for leaf in figure["leaves"].values()}
    assert found == adapter.format_names()
    assert all(not figure["violations"] for figure in make.stored("files").values())


def test_inputs_are_drawn_as_they_were() -> None:
    """If NumPy drew other numbers, every figure would differ, and none of them would be to blame."""
    drawn = figures.draw("inputs", (3,)), figures.uniform("inputs", (2,)), figures.even(figures.draw("inputs", (3,)))
    expected = (
        [-0.18125142503945993, 0.17267664377601724, -0.16718459478260436],
        [0.8532133636191296, 0.31897583493062887],
        [-0.125, 0.125, -0.125],
    )
    for a, b in zip(drawn, expected, strict=True):
        assert a.tolist() == b
    many = figures.draw("inputs", (100_000,))
    assert abs(many.mean()) < 0.01 and abs(many.var() - 1) < 0.01


def test_each_change_of_a_figure_is_a_line() -> None:
    old = json.loads(json.dumps(make.stored("sets")["unify"]))
    assert not list(make.compare("unify", old, old))
    new = copy.deepcopy(old)
    new["any"]["project"]["nonzeros"] += 1
    del new["any"]["freeze"]
    new["more"] = {}
    z = old["any"]["project"]["nonzeros"]
    assert list(make.compare("unify", old, new)) == [
        f"unify/any/project/nonzeros: {z} -> {z + 1}",
        "unify/any/freeze: gone",
        "unify/more: new",
    ]


@on_cpu
def test_the_script_says_what_differs_and_writes_what_it_is_told_to(tmp_path, monkeypatch, capsys) -> None:
    right = (make.FOLDER / "sets.json").read_text()
    wrong = right.replace('"nonzeros": 108', '"nonzeros": 109', 1)
    name = next(n for n, f in json.loads(wrong).items() if f != json.loads(right)[n])
    (tmp_path / "sets.json").write_text(wrong)
    monkeypatch.setattr(make, "FOLDER", tmp_path)
    assert len(make.differences(f"sets/{name}")) == 1
    assert make.main(["--only", f"sets/{name}"]) == 0
    assert "109 -> 108" in capsys.readouterr().out
    assert (tmp_path / "sets.json").read_text() == right


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ([1.0, 2.0], None),
        ([1.0, 2.01], None),
        ([1.0, 2.02], "differs by 0.02, more than 0.0101"),
        ([1.0, float("nan")], "differs by nan, more than 0.0101"),
        ([1.0], r"shape [2] -> [1]"),
    ],
)
def test_numbers_are_compared_within_their_tolerance(value: list[float], text: str | None) -> None:
    old = {"y": {"value": [1.0, 2.0], "within": 0.0101}}
    found = list(make.compare("f", old, {"y": {"value": value, "within": 9.0}}))
    assert found == [] if text is None else text in found[0]


def test_a_digest_sees_every_bit() -> None:
    x = np.array([1.0, 0.0, -2.0], np.float32)
    other = [np.array([1.0, -0.0, -2.0], np.float32), x.reshape(1, 3), x.view(np.int32), (x, x), x[::-1]]
    assert len({figures.bits(t)["sha256"] for t in (x, *other)}) == 6
    assert figures.bits((x, {"a": x})) == figures.bits([x, [x.copy()]])
