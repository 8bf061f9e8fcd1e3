"""Dense formulations of packed layers, right for NaN and infinities too.

A packed layer has neither weights where some were pruned nor inputs beyond the image. A dense formulation multiplies by
zeros there, which adds nothing to a sum until the other factor is NaN or infinite: 0 * NaN is NaN. So where a result is
not finite it is computed again, from the weights that are not zero and the elements of the image alone.

    y = exact.linear(jnp.matmul, x, w)          # as x @ w, zeros of w left out
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from compressx.kernels.schedule import Geometry

Multiply = Callable[[Array, Array], Array]


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 3))
def linear(multiply: Multiply, x: Array, w: Array, groups: int = 1) -> Array:
    """`multiply(x, w)` from the weights that are not zero.

    Costs a pass over the result, and four products where it is not finite (under `vmap`: always). The derivatives are
    those of `multiply`.

    Args:
      multiply: bilinear, a sum over the last axis of x and the last but one of w (and what it slides over).
      x: `[..., channels]`.
      w: `[..., channels / groups, outputs]`.
      groups: of channels.
    """
    return checked(multiply(x, w), multiply, x, lambda: w, groups)


@functools.partial(linear.defjvp, symbolic_zeros=True)
def _linear_jvp(multiply: Multiply, groups: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, w), (dx, dw) = primals, tangents
    y = linear(multiply, x, w, groups)
    parts = [] if isinstance(dx, SymbolicZero) else [multiply(dx, w)]
    parts += [] if isinstance(dw, SymbolicZero) else [multiply(x, dw)]
    return y, sum(parts[1:], parts[0]) if parts else jnp.zeros_like(y)


@functools.cache
def dense_conv(geometry: Geometry, precision: lax.Precision | None = None) -> Multiply:
    """XLA's convolution of NHWC images with HWIO weights."""
    return lambda x, w: lax.conv_general_dilated(
        x,
        w,
        geometry.strides,
        geometry.pads,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=geometry.groups,
        precision=precision,
    )


@np.errstate(invalid="ignore")
def reference(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The definition, in NumPy: `x @ w` from the weights that are not zero."""
    if np.isfinite(x).all():
        return np.asarray(x @ w)  # zeros times what is finite add nothing
    y = np.zeros((*x.shape[:-1], w.shape[1]))
    for c in range(len(w)):
        y += np.where(w[c] != 0, x[..., c : c + 1] * w[c], 0)
    return y


def checked(y: Array, multiply: Multiply, x: Array, w: Callable[[], Array], groups: int = 1) -> Array:
    """`y` where it is finite; else what `linear(multiply, x, w(), groups)` is."""
    return lax.cond(finite(y), lambda: y, lambda: without_zeros(multiply, x, w(), groups))


def finite(y: Array) -> Array:
    """True if no element is NaN or infinite."""
    return jnp.max(jnp.abs(y), initial=0) < jnp.inf


def without_zeros(multiply: Multiply, x: Array, w: Array, groups: int = 1) -> Array:
    """The sums of `linear` for any x and w: the finite terms, and where there are others what those make of it."""
    odd_x, odd_w = (jnp.where(jnp.isinf(v), jnp.sign(v), 0) for v in (x, w))
    even_x, sign_w = jnp.where(jnp.isfinite(x), jnp.sign(x), 0), jnp.where(jnp.isnan(w), 0, jnp.sign(w))
    # how many terms are +inf less how many are -inf, how many are either, and how many are NaN
    infinite = [(odd_x, sign_w), (even_x, odd_w)]
    balance = _stacked(multiply, groups, infinite)
    number = _stacked(multiply, groups, [(jnp.abs(a), jnp.abs(b)) for a, b in infinite])
    undefined = [(jnp.isnan(x), _nonzero(w)), (x == 0, jnp.isinf(w)), (jnp.ones_like(x), jnp.isnan(w))]
    nan = _stacked(multiply, groups, undefined) > 0
    plus, minus = number + balance > 0, number - balance > 0
    y = multiply(jnp.where(jnp.isfinite(x), x, 0), jnp.where(jnp.isfinite(w), w, 0))
    y = jnp.where(plus, jnp.inf, jnp.where(minus, -jnp.inf, y))
    return jnp.where(nan | plus & minus, jnp.nan, y)


def _nonzero(w: Array) -> Array:
    """Where a weight is not zero; by its bits, for XLA takes denormal numbers for zeros."""
    return lax.bitcast_convert_type(w, f"uint{8 * w.dtype.itemsize}") << 1 != 0


def _stacked(multiply: Multiply, groups: int, pairs: list[tuple[Array, Array]]) -> Array:
    """`sum_i multiply(x_i, w_i)` as one product, in float32."""
    xs = [x.astype(jnp.float32).reshape(*x.shape[:-1], groups, -1) for x, _ in pairs]
    x = jnp.stack(xs, axis=-2).reshape(*pairs[0][0].shape[:-1], -1)
    return multiply(x, jnp.concatenate([w.astype(jnp.float32) for _, w in pairs], axis=-2))
