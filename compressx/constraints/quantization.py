"""Quantization: sets whose kept weights lie on a few levels with a fitted scale or codebook.

A weight is a sign, an index k and a level: `w = sign * level(k)`; zeros are no level but stay exactly 0, so that a mask
made by pruning survives. A weight on a level divides back to its index, bit for bit, and projections are idempotent by
construction: see `scales`. What the levels are: `levels`; how a codebook is found: `codebook`.

Source: sign-symmetric levels without a zero level for kept weights, scale by alternating least squares: G. Yuan et al.,
"An Ultra-Efficient Memristor-Based DNN Framework with Structured Weight Pruning and Quantization Using ADMM", 2019.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from compressx.constraints.base import LEVEL, Constraint, factory
from compressx.constraints.codebook import k_means, means
from compressx.constraints.floats import exponent, lift, negative, nonzero, smallest, wide
from compressx.constraints.levels import Levels, check_fits, columns, decode, encode, level
from compressx.constraints.scales import affine_least_squares, exact, improve, least_squares, shared_axes


class FixedLevels(NamedTuple):
    """The active set around a quantized weight: every signed index, and the scale or codebook it started from."""

    codes: Array
    structure: Array


@factory
def quantize(
    bits: int,
    *,
    grid: str = "uniform",
    per: str | int = "tensor",
    zero_level: bool = False,
    cell_bits: int = 2,
    symmetric: bool = True,
    tune: bool = True,
) -> Constraint:
    """Every non-zero weight on one of a few levels, by default symmetric about zero; zeros stay zeros.

        argmin_z ||z - w||_2  s.t.  z_i in {-l, +l : l a level} where w_i != 0, z_i = 0 where w_i = 0

    for the scale (or codebook) in the structure: each weight goes to the nearest level of its sign; a tie goes to the
    smaller magnitude. `init` and `refresh` choose the scale by search over where the largest weight may lie (on a
    sample), then alternating least squares on all: k_i = nearest index of w_i / s, s = <w, l(k)> / <l(k), l(k)>.
    A codebook is found by k-means on the magnitudes, zeros left out: 40 Lloyd steps from evenly spaced centres (on
    2**18 evenly drawn weights of a larger leaf), then two on all weights; a leaf that already has no more distinct
    magnitudes than levels keeps them.

    Asymmetric levels are s * q for the 2**bits integers q from `low` on; -low is the zero point, so that 0 is one of
    them. Both signs have a level at least. Scale and zero point are chosen together: the best of the searched ones, and
    of zero points beside it.

    Retraining keeps every index and sign: the scale alone is trained, in steps of the bits that it has (2**-17 of
    itself for 8 bits in float32), or the codebook's entries, each the mean of its weights.

    Args:
      bits: bits per weight, the sign among them (2..16; "power_of_two" 2..6; "codebook" 2..8; "float8_..." 8); with
        "cells" bits of the magnitude alone (1..16, a multiple of `cell_bits`).
      grid: "uniform", "power_of_two", "cells", "codebook", "float8_e4m3" or "float8_e5m2", see `Levels`.
      per: what shares a scale: "tensor", "channel" (an output), "row" (what an input sends out), or a number g, usually
        32 to 128: g consecutive inputs of an output.
      zero_level: also allow 0 for weights that were not 0.
      cell_bits: bits of a crossbar cell.
      symmetric: False gives more levels to the sign that needs them, for the grid "uniform".
      tune: whether retraining may move the scale or codebook; False freezes the weights.

    Returns:
      A LEVEL constraint; its structure is the scale, float32 `[]` or `[units]` (outputs, rows, or groups times
      outputs); for asymmetric levels the scale and `low`, `[2]` or `[2, units]`; or the codebook in the leaf's dtype,
      `[levels]` or `[levels, units]`, ascending.

    Raises:
      ValueError: an argument is out of range; at init, a leaf's dtype has too few bits for the levels.

    Source: scale: S. Ye et al., "Progressive DNN Compression: A Key to Achieve Ultra-High Weight Pruning and
    Quantization Rates using ADMM", 2019; codebook: S. Han, H. Mao, W. Dally, "Deep Compression", 2016.

    Example:
      >>> w = jnp.asarray([[0.9, -2.1, 0.0, 3.0]])
      >>> constraint = compressx.quantize(3)  # levels 1, 2, 3 times a scale
      >>> scale = constraint.init(w)
      >>> print(jnp.round(constraint.project(w, scale) / scale))
      [[ 1. -2.  0.  3.]]
    """
    levels = Levels(bits, grid, per, zero_level, cell_bits, symmetric)

    def freeze(w: Array, structure: Array) -> FixedLevels:
        small = next(d for d in (jnp.int8, jnp.int16, jnp.int32) if levels.top <= jnp.iinfo(d).max)
        return FixedLevels(encode(w, structure, levels).astype(small), structure)

    def tuned(w: Array, active: FixedLevels) -> Array:
        return refit(w, active, levels) if tune else active.structure

    def retract(w: Array, active: FixedLevels) -> Array:
        return decode(active.codes, tuned(w, active), levels, w.dtype)

    def moved(w: Array, active: FixedLevels) -> Array:
        structure = tuned(w, active)
        return jnp.sort(structure, axis=0) if grid == "codebook" else structure  # entries may have passed each other

    return Constraint(
        spec={"kind": "quantize"},
        init=lambda w: fit(w, levels),
        project=lambda w, s: decode(encode(w, s, levels), s, levels, w.dtype),
        refresh=lambda w, _: fit(w, levels),
        freeze=freeze,
        retract=retract,
        stage=LEVEL,
        moved=moved,
    )


@partial(jax.jit, static_argnames="levels")
def fit(w: Array, levels: Levels) -> Array:
    """The scale or codebook chosen for w, see `quantize`; a scale of 1 where w is all zero."""
    check_fits(w, levels)
    if levels.viewed:
        return fit(columns(w, levels), levels.by_column)
    signed = wide(w).reshape(-1, w.shape[-1] if w.ndim else 1)
    shape = () if levels.per == "tensor" else (w.shape[-1],)
    if levels.grid == "codebook":
        groups = jnp.abs(signed).reshape(-1, 1) if levels.per == "tensor" else jnp.abs(signed)
        found = _positive(jax.vmap(partial(k_means, count=levels.top), in_axes=1, out_axes=1)(groups), w.dtype)
        return found[..., 0] if levels.per == "tensor" else found
    if not levels.symmetric:
        return affine_least_squares(signed, levels, w.dtype).reshape(2, *shape)
    return least_squares(jnp.abs(signed), levels, w.dtype).reshape(shape)


@partial(jax.jit, static_argnames="levels")
def refit(w: Array, active: FixedLevels, levels: Levels) -> Array:
    """The scale or codebook nearest to w for fixed indices: least squares for a scale, means for a codebook."""
    if levels.viewed:
        return refit(columns(w, levels), FixedLevels(columns(active.codes, levels), active.structure), levels.by_column)
    codes = active.codes.astype(jnp.int32).reshape(-1, w.shape[-1] if w.ndim else 1)
    x = wide(w).reshape(codes.shape)
    x = jnp.where(codes < 0, -x, x)
    k = jnp.abs(codes)
    before = active.structure
    if levels.grid == "codebook":
        if levels.per == "tensor":
            found = means(x.reshape(-1), k.reshape(-1) - 1, wide(before))
        else:
            found = jax.vmap(means, in_axes=(1, 1, 1), out_axes=1)(x, k - 1, wide(before))
        return _positive(found, before.dtype)
    if not levels.symmetric:
        before = before[0]
    at, axes = level(k, levels, x.dtype), shared_axes(levels)
    s = before.reshape(1, -1)
    top = exponent(s, 0, keepdims=True)
    x = lift(x, -top)  # to where the scale is about 1
    # twice, the second time from the rounded value: weights already on a line return their scale exactly
    for _ in range(2):
        s = exact(improve(x, at, lift(s, -top), axes), top, levels, w.dtype)
    s = s.reshape(before.shape)
    return s if levels.symmetric else active.structure.at[0].set(s)


def _positive(codebook: Array, dtype: Any) -> Array:
    """A codebook in the leaf's dtype, with the smallest number in place of entries that are not above 0 there."""
    held = codebook.astype(dtype)
    return jnp.where(nonzero(held) & ~negative(held), held, jnp.asarray(smallest(dtype), dtype))


__all__ = ["FixedLevels", "fit", "quantize", "refit"]
