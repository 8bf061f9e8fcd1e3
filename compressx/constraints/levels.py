"""The levels that a quantized weight may take: what they are, the nearest one to a weight, the weight of one.

A weight on a level is a signed integer, its code, and what a scale or a codebook makes of it. Zeros are no level but
stay exactly 0, so that a mask made by pruning survives.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from compressx.constraints.codebook import nearest_entry, spread
from compressx.constraints.floats import exponent, lift, negative, nonzero, scale, wide

FLOAT8 = {"float8_e4m3": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
_GRIDS = ("uniform", "power_of_two", "cells", "codebook", *FLOAT8)


@dataclass(frozen=True)
class Levels:
    """Which levels a weight may take. A code of 0 is the pruned weight; k = 1..top are levels of a sign, ascending.

    Attributes:
      bits: bits of a stored weight: one of sign and bits - 1 of index; with grid "cells" all are bits of magnitude.
      grid: "uniform" k * scale; "power_of_two" 2**(k - 1) * scale; "cells" as uniform, magnitudes cut into cells of
        `cell_bits`, the sign kept elsewhere; "codebook" codebook[k - 1]; "float8_e4m3" and "float8_e5m2" the k-th
        positive finite number of that type times the scale.
      per: "tensor" has one scale or codebook, "channel" one for every output channel (the last axis), "row" one for
        what every input sends out (a row of the matrix `[fan-in, cout]`), a number g one for every g consecutive inputs
        of an output.
      zero_level: whether kept weights may be rounded to 0.
      cell_bits: bits a crossbar cell holds ("cells" only).
      symmetric: whether both signs have as many levels. Else ("uniform" only) the codes are the 2**bits integers from
        `low` on, low in -(2**bits - 2)..-1 beside the scale: -low is what others call the zero point.
    """

    bits: int
    grid: str = "uniform"
    per: str | int = "tensor"
    zero_level: bool = False
    cell_bits: int = 2
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.grid not in _GRIDS:
            raise ValueError(f"grid must be one of {', '.join(_GRIDS)}, got {self.grid!r}")
        size = isinstance(self.per, int) and not isinstance(self.per, bool) and self.per > 0
        if not size and self.per not in ("tensor", "channel", "row"):
            raise ValueError(f'per must be "tensor", "channel", "row" or a number of inputs, got {self.per!r}')
        allowed = {"uniform": (2, 16), "power_of_two": (2, 6), "cells": (1, 16), "codebook": (2, 8)}
        low, high = allowed.get(self.grid, (8, 8))
        if not low <= self.bits <= high:
            raise ValueError(f"bits must be in {low}..{high} for the grid {self.grid!r}, got {self.bits}")
        if self.grid == "cells" and (self.cell_bits < 1 or self.bits % self.cell_bits):
            raise ValueError(f"bits={self.bits} is not a multiple of cell_bits={self.cell_bits}: cells hold whole bits")
        if not self.symmetric and self.grid != "uniform":
            raise ValueError(f'symmetric=False is for the grid "uniform", got the grid {self.grid!r}')

    @property
    def top(self) -> int:
        """The largest magnitude of a code: how many levels a sign has, or may have."""
        if self.grid in FLOAT8:
            return len(magnitudes(self.grid))
        if not self.symmetric:
            return 2**self.bits - 2  # one level at least is left to the other sign
        return 2**self.bits - 1 if self.grid == "cells" else 2 ** (self.bits - 1) - 1

    @property
    def viewed(self) -> bool:
        """Whether what shares a scale is no column of the stored matrix, but one of `columns`."""
        return self.per not in ("tensor", "channel")

    @property
    def by_column(self) -> "Levels":
        """The levels of `columns(w)`: a scale for each."""
        return replace(self, per="channel")

    @property
    def significant(self) -> int:
        """Bits of precision that a level has, in units of the scale."""
        if self.grid in FLOAT8:
            return int(jnp.finfo(FLOAT8[self.grid]).nmant) + 1
        return self.top.bit_length() if self.grid in ("uniform", "cells") else 1


def levels_of(spec: Mapping[str, Any]) -> Levels:
    """The `Levels` that a `quantize` constraint's spec describes."""
    both = spec.get("symmetric", True)  # absent in files of 0.2 and before
    return Levels(spec["bits"], spec["grid"], spec["per"], spec["zero_level"], spec["cell_bits"], both)


@cache
def magnitudes(grid: str) -> np.ndarray:
    """The positive finite numbers of an 8-bit float, ascending: float32."""
    every = np.arange(1, 128, dtype=np.uint8).view(FLOAT8[grid]).astype(np.float32)
    return every[np.isfinite(every)]


def table(levels: Levels) -> np.ndarray:
    """The level of every index 1..top in units of the scale, float64."""
    if levels.grid in FLOAT8:
        return magnitudes(levels.grid).astype(np.float64)
    k = np.arange(1, levels.top + 1)
    return np.asarray(2.0 ** (k - 1) if levels.grid == "power_of_two" else k, np.float64)


def columns(w: Array, levels: Levels) -> Array:
    """The weights as `[n, units]`, a scale for each column; zeros, which have no level, fill the last group."""
    m = w.reshape(-1, w.shape[-1])
    if levels.per == "row":
        return m.T
    size = min(int(levels.per), m.shape[0])
    m = jnp.pad(m, ((0, -m.shape[0] % size), (0, 0)))
    return m.reshape(-1, size, m.shape[-1]).transpose(1, 0, 2).reshape(size, -1)


def from_columns(x: Array, shape: tuple[int, ...], levels: Levels) -> Array:
    """Inverse of `columns`, for weights of this shape."""
    if levels.per == "row":
        return x.T.reshape(shape)
    m = x.reshape(x.shape[0], -1, shape[-1]).transpose(1, 0, 2).reshape(-1, shape[-1])
    return m[: math.prod(shape[:-1])].reshape(shape)


@partial(jax.jit, static_argnames="levels")  # the compiler fuses a codebook's many comparisons into one pass
def encode(w: Array, structure: Array, levels: Levels) -> Array:
    """The code of the level nearest to every weight: int32 of w's shape in -top..top, 0 for zeros.

    For the grids "uniform" and "cells" a weight on a level is exactly `scale * code`.
    """
    if levels.viewed:
        return from_columns(encode(columns(w, levels), structure, levels.by_column), w.shape, levels)
    below = negative(w)
    if levels.grid == "codebook":
        k = nearest_entry(w, structure.astype(wide(w).dtype), levels.zero_level)
    else:
        # both lifted to where the scale is about 1: neither may be a denormal in the division
        step = (structure if levels.symmetric else structure[0]).astype(wide(w).dtype)
        top = exponent(step, ())
        k = index(jnp.abs(lift(w, -spread(top, w.ndim))) / spread(lift(step, -top), w.ndim), levels)
        if not levels.symmetric:
            k = jnp.minimum(k, reach(below, spread(structure[1], w.ndim), levels))
    return jnp.where(nonzero(w), jnp.where(below, -k, k), 0)


@partial(jax.jit, static_argnames=("levels", "dtype"))
def decode(codes: Array, structure: Array, levels: Levels, dtype: Any = jnp.float32) -> Array:
    """The weights that codes stand for; inverse of `encode` on levels. A code of 0 gives exactly +0."""
    if levels.viewed:
        made = decode(columns(codes, levels), structure, levels.by_column, dtype)
        return from_columns(made, codes.shape, levels)
    codes = codes.astype(jnp.int32)
    k = jnp.abs(codes)
    if levels.grid == "codebook":
        at = jnp.maximum(k - 1, 0)
        if levels.per == "tensor":
            magnitude = structure[at]
        else:
            flat = jnp.take_along_axis(structure, at.reshape(-1, at.shape[-1]), axis=0)
            magnitude = flat.reshape(codes.shape)
    else:
        step = structure if levels.symmetric else structure[0]
        top = exponent(step, ())
        magnitude = level(k, levels, step.dtype) * spread(lift(step, -top), codes.ndim)
        magnitude = scale(magnitude, spread(top, codes.ndim))
    signed = jnp.where(codes < 0, -magnitude, magnitude)
    return jnp.where(codes == 0, jnp.zeros((), dtype), signed.astype(dtype))


def index(x: Array, levels: Levels) -> Array:
    """Index of the level nearest to x = |w| / scale >= 0, int32; ties go to the smaller magnitude."""
    if levels.grid in FLOAT8:
        held = magnitudes(levels.grid)
        middle = np.concatenate([held[:1] / 2, (held[:-1] + held[1:]) / 2])  # each exact in float32
        k = jnp.searchsorted(jnp.asarray(middle, x.dtype), x, side="left", method="scan_unrolled").astype(jnp.int32)
    elif levels.grid == "power_of_two":
        fraction, power = jnp.frexp(jnp.minimum(x, 2.0**levels.top))  # x = fraction * 2**power, fraction in [1/2, 1)
        k = jnp.maximum(power + (fraction > 0.75).astype(jnp.int32), (x > 0.5).astype(jnp.int32))
    else:
        k = jnp.ceil(jnp.minimum(x, float(levels.top)) - 0.5).astype(jnp.int32)
    return jnp.clip(k, 0 if levels.zero_level else 1, levels.top)


def reach(below: Array, low: Array, levels: Levels) -> Array:
    """The largest index on a weight's side of 0 where the codes begin at `low`: int32.

    Args:
      below: bool, whether the weight is negative.
      low: the smallest code, an integer of any dtype.
      levels: asymmetric ones.
    """
    return jnp.where(below, -low, low + (2**levels.bits - 1)).astype(jnp.int32)


def unwrapped(codes: np.ndarray, low: np.ndarray, levels: Levels) -> np.ndarray:
    """Codes of asymmetric levels from codes modulo 2**bits; those that are none already stay as they are."""
    return codes - np.where(codes > low + (2**levels.bits - 1), 2**levels.bits, 0).astype(codes.dtype)


def level(k: Array, levels: Levels, dtype: Any) -> Array:
    """The level of index k in units of the scale; 0 for index 0."""
    if levels.grid in FLOAT8:
        return jnp.asarray(np.concatenate([[0], magnitudes(levels.grid)]), dtype)[k]
    if levels.grid == "power_of_two":
        return jnp.where(k > 0, jnp.ldexp(jnp.ones((), dtype), k - 1), jnp.zeros((), dtype))
    return k.astype(dtype)


def check_fits(w: Array, levels: Levels) -> None:
    """Raises ValueError where a leaf has no rows that could share a scale, or its dtype no room for the levels."""
    if levels.viewed and w.ndim < 2:
        raise ValueError(f'per={levels.per!r} needs a weight of at least 2 axes, got shape {w.shape}; use "tensor"')
    held = jnp.finfo(w.dtype).nmant + 1
    if levels.significant > held:
        raise ValueError(f"{w.dtype} has {held} bits of precision, too few for the {levels.top} levels of {levels}")
    if levels.grid == "power_of_two" and w.dtype == jnp.float16 and levels.top > 8:
        raise ValueError(f"float16 has too few exponents for {levels.top} powers of two; use at most 4 bits")
    if levels.grid in FLOAT8 and w.dtype == jnp.float16:
        raise ValueError(f"float16 has too few exponents for {levels.grid} times a scale; use float32 or bfloat16")


__all__ = [
    "FLOAT8",
    "Levels",
    "check_fits",
    "columns",
    "decode",
    "encode",
    "from_columns",
    "index",
    "level",
    "levels_of",
    "magnitudes",
    "reach",
    "table",
    "unwrapped",
]
