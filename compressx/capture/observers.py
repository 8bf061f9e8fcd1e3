"""What is noted of the inputs of a layer: a state for each of its matrices, updated by a part of the rows at a time."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.capture.matrix import Gram


class Observer(NamedTuple):
    """A statistic of the inputs X `[B, rows, P]` of a layer.

    Attributes:
      init: `init(groups, rows)`: the state before anything was seen, a pytree of arrays `[G, ...]`, for a leaf of G
        matrices of P rows.
      update: `update(state, xs)`: the state `[B, ...]` after more rows. `xs` are the inputs in each of the networks
        that run side by side, one for `capture`; where two of them are the same array, so are the networks before it.
      result: `result(state)`: what is made of it in the end (NumPy).

    Example:
      >>> def more(most, xs):
      ...     return jnp.maximum(most, jnp.abs(xs[0]).max((1, 2)))
      >>> largest = Observer(lambda groups, rows: np.zeros(groups, np.float32), more, np.asarray)
      >>> w, x = {"a": jnp.ones((2, 3))}, [jnp.asarray([[1.0, -5.0]])]
      >>> compressx.capture.capture(lambda w, x: x @ w["a"], w, x, observer=largest)
      {'a': array([5.], dtype=float32)}
    """

    init: Callable[[int, int], Any]
    update: Callable[[Any, Sequence[Array]], Any]
    result: Callable[[Any], Any]


def _gram_init(groups: int, rows: int) -> dict[str, Any]:
    return {"h": np.zeros((groups, rows, rows)), "sum": np.zeros((groups, rows)), "rows": np.zeros(groups)}


def products(left: Array, right: Array) -> Array:
    """Sums over rows of left' right, `[B, rows, P]` and `[B, rows, F]` -> float64 `[B, P, F]`, float32 in a part."""
    dims = (((1,), (1,)), ((0,), (0,)))
    return lax.dot_general(left, right, dims, precision=lax.Precision.HIGHEST).astype(jnp.float64)


def _gram_update(state: dict[str, Any], xs: Sequence[Array]) -> dict[str, Any]:
    (x,) = xs
    return {
        "h": state["h"] + products(x, x),
        "sum": state["sum"] + x.sum(1).astype(jnp.float64),
        "rows": state["rows"] + x.shape[1],
    }


def gram_of(state: dict[str, Any]) -> Gram:
    """The `Gram` of sums over rows: `h`, `sum` and `rows`."""
    rows = np.maximum(np.asarray(state["rows"], np.float64), 1.0)
    h = np.asarray(state["h"], np.float64)
    h = (h + h.transpose(0, 2, 1)) / 2
    return Gram(h / rows[:, None, None], int(rows.min()), np.asarray(state["sum"], np.float64) / rows[:, None])


GRAM = Observer(_gram_init, _gram_update, gram_of)
"""Gram matrices, summed in float64 over parts whose products are float32; each leaf's result is a `Gram`."""


class Ranges(NamedTuple):
    """The smallest and the largest input of each matrix of a leaf, `[G]`; the zeros of padding count.

    Attributes:
      low: the smallest, float32 `[G]`.
      high: the largest, float32 `[G]`.

    Example:
      >>> w, x = {"a": jnp.ones((2, 3))}, [jnp.asarray([[1.0, -5.0]])]
      >>> found = compressx.capture.capture(lambda w, x: x @ w["a"], w, x, observer=compressx.capture.RANGES)
      >>> found["a"].low, found["a"].high
      (array([-5.], dtype=float32), array([1.], dtype=float32))
    """

    low: Any
    high: Any


def _ranges_init(groups: int, rows: int) -> Ranges:
    del rows
    return Ranges(np.full(groups, np.inf, np.float32), np.full(groups, -np.inf, np.float32))


def _ranges_update(state: Ranges, xs: Sequence[Array]) -> Ranges:
    (x,) = xs
    low, high = (v.astype(jnp.float32) for v in (x.min((1, 2)), x.max((1, 2))))
    return Ranges(jnp.minimum(state.low, low), jnp.maximum(state.high, high))


RANGES = Observer(_ranges_init, _ranges_update, lambda state: Ranges(*map(np.asarray, jax.device_get(state))))
"""The smallest and the largest input; each leaf's result is a `Ranges`."""
