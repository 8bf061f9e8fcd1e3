"""The matrices of a leaf: rows and columns as a loop finds them, for every layout, and exact inverses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.axes import Axes
from compressx.capture.matrix import matrix_view

LAYOUTS = [
    ((3, 4), None, 1),
    ((3, 2, 4, 6), None, 1),
    ((3, 3, 2, 8), None, 4),
    ((3, 3, 1, 6), "taps taps in out", 6),
    ((3, 3, 6, 1), "taps taps out out", 6),
    ((5, 2, 4), "in out out", 1),
    ((2, 4, 5), "in in out", 1),
    ((7, 3), "out in", 1),
    ((6, 2, 3, 3), "out in taps taps", 2),
    ((2, 4, 6), "stack in out", 1),
    ((2, 3, 4, 6), "stack taps in out", 3),
    ((5,), "out", 1),
]


@pytest.mark.parametrize(("shape", "axes", "groups"), LAYOUTS)
def test_back_is_the_exact_inverse(shape: tuple[int, ...], axes: str | None, groups: int) -> None:
    w = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    view = matrix_view(shape, axes, groups)
    m = jax.jit(view.to)(w)
    assert m.shape == (view.groups, view.rows, view.columns)
    np.testing.assert_array_equal(jax.jit(view.back)(m), w)


@pytest.mark.parametrize(("shape", "axes", "groups"), LAYOUTS)
def test_entries_are_where_a_loop_puts_them(shape: tuple[int, ...], axes: str | None, groups: int) -> None:
    words = axes.split() if axes else list({2: ("in", "out"), 4: ("taps", "taps", "in", "out")}[len(shape)])
    view = matrix_view(shape, axes, groups)
    got = np.asarray(view.to(jnp.arange(np.prod(shape)).reshape(shape)))
    for flat, index in enumerate(np.ndindex(*shape)):
        at = dict.fromkeys(("stack", "taps", "in", "out"), 0)
        size = dict.fromkeys(at, 1)
        for i, n, word in zip(index, shape, words, strict=True):
            at[word], size[word] = at[word] * n + i, size[word] * n
        per = size["out"] // groups
        row = at["taps"] * size["in"] + at["in"]
        assert got[at["stack"] * groups + at["out"] // per, row, at["out"] % per] == flat


@pytest.mark.parametrize(
    ("shape", "axes", "groups", "text"),
    [
        ((2, 3, 4), None, 1, "say what they are"),
        ((3, 4), None, 3, "do not divide"),
        ((3, 4), "in in", 1, "no outputs"),
        ((3, 4), "in out out", 1, "3 words"),
    ],
)
def test_refused_by_name(shape: tuple[int, ...], axes: str | None, groups: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        matrix_view(shape, axes, groups)


def test_axes_of_a_rule_are_taken_as_they_are() -> None:
    assert matrix_view((4, 3), Axes(("out", "in"))).rows == 3
