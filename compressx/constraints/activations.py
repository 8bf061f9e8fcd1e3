"""Activations on a few integers times a scale, as a crossbar or an integer product reads them, and their gradient."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from compressx.constraints.codebook import spread


def quantize_activations(x: Array, bits: int, scale: Array | float, signed: bool = False) -> Array:
    """Activations on integers times a scale, clipped to their range, with the straight-through gradient.

        y = scale * clip(round(x / scale), low, high),   low, high = 0, 2**bits - 1   (signed: -+(2**(bits-1) - 1))
        dy/dx = 1 inside the range, 0 beyond it;   dy/dscale = low or high beyond the range, 0 inside

    Args:
      x: activations, any shape, float.
      bits: 1..16 (signed: 2..16).
      scale: positive step, `[]` or one per channel of the last axis; it may be trained.
      signed: symmetric range with a sign, for inputs that are not behind a ReLU.

    Returns:
      An array like x; exactly `scale * activation_codes(...)`, and NaN where x is. Ties are rounded towards 0.

    Source: Y. Bengio, N. Leonard, A. Courville, "Estimating or Propagating Gradients Through Stochastic Neurons", 2013;
    gradient of the clipping bound as in J. Choi et al., "PACT", 2018.

    Example:
      >>> x = jnp.asarray([-1.0, 0.3, 0.8, 9.0])
      >>> print(compressx.quantize_activations(x, 2, scale=0.5))
      [0.  0.5 1.  1.5]
    """
    _check_activation(bits, signed)
    return _activations(x, jnp.asarray(scale, x.dtype), bits, signed)


def activation_codes(x: Array, bits: int, scale: Array | float, signed: bool = False) -> Array:
    """The integers (int32) that `quantize_activations` multiplies with its scale: what a crossbar is fed with.

    NaN has no integer: its code is 0.
    """
    low, high = _check_activation(bits, signed)
    ratio = jnp.clip(x / spread(jnp.asarray(scale, x.dtype), x.ndim), low, high)
    k = jnp.ceil(jnp.abs(ratio) - 0.5).astype(jnp.int32)
    return jnp.where(ratio < 0, -k, k)


def _check_activation(bits: int, signed: bool) -> tuple[int, int]:
    if not (2 if signed else 1) <= bits <= 16:
        raise ValueError(f"bits must be in {2 if signed else 1}..16 for signed={signed} activations, got {bits}")
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _activations(x: Array, scale: Array, bits: int, signed: bool) -> Array:
    y = activation_codes(x, bits, scale, signed).astype(x.dtype) * spread(scale, x.ndim)
    return jnp.where(jnp.isnan(x), x, y)


@_activations.defjvp
def _activations_jvp(bits: int, signed: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, scale), (dx, dscale) = primals, tangents
    low, high = _check_activation(bits, signed)
    s, ds = spread(scale, x.ndim), spread(dscale, x.ndim)
    beyond = jnp.where(x > high * s, high * ds, jnp.where(x < low * s, low * ds, jnp.zeros_like(ds)))
    inside = (x <= high * s) & (x >= low * s)
    return _activations(x, scale, bits, signed), jnp.where(inside, dx, beyond)


__all__ = ["activation_codes", "quantize_activations"]
