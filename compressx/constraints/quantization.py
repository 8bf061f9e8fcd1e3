"""Quantization: sets whose kept weights lie on a few levels, symmetric about zero, with a fitted scale or codebook.

A weight is a sign, an index k and a level: `w = sign * level(k)`; zeros are no level but stay exactly 0, so that a mask
made by pruning survives. Fitted scales are rounded to so few mantissa bits that `scale * level` is an exact product in
the leaf's dtype: a weight on a level divides back to its integer, bit for bit, and projections are idempotent by
construction. (With 8-bit levels a float32 leaf has a scale of 17 bits, a bfloat16 leaf one that is a power of two.)

Source: sign-symmetric levels without a zero level for kept weights, scale by alternating least squares: G. Yuan et al.,
"An Ultra-Efficient Memristor-Based DNN Framework with Structured Weight Pruning and Quantization Using ADMM", 2019.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax

from compressx.constraints.base import LEVEL, Constraint, factory
from compressx.constraints.floats import bits as bits_of
from compressx.constraints.floats import exponent, least, lift, negative, nonzero, scale, smallest, wide

FLOAT8 = {"float8_e4m3": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
_GRIDS = ("uniform", "power_of_two", "cells", "codebook", *FLOAT8)
_ITERATIONS = 10  # of alternating least squares, on all weights
_LLOYD = 40  # of k-means, on the sorted sample
_SAMPLE = 2**18  # weights of a leaf that k-means sorts


@dataclass(frozen=True)
class Levels:
    """Which levels a weight may take. An index k of 0 is the pruned weight; k = 1..top are levels, ascending.

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
    """

    bits: int
    grid: str = "uniform"
    per: str | int = "tensor"
    zero_level: bool = False
    cell_bits: int = 2

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

    @property
    def top(self) -> int:
        """The largest index: how many magnitudes there are."""
        if self.grid in FLOAT8:
            return len(magnitudes(self.grid))
        return 2**self.bits - 1 if self.grid == "cells" else 2 ** (self.bits - 1) - 1

    @property
    def viewed(self) -> bool:
        """Whether what shares a scale is no column of the stored matrix, but one of `columns`."""
        return self.per not in ("tensor", "channel")

    @property
    def by_column(self) -> "Levels":
        """The levels of `columns(w)`: a scale for each."""
        return replace(self, per="channel")


@cache
def magnitudes(grid: str) -> np.ndarray:
    """The positive finite numbers of an 8-bit float, ascending: float32."""
    every = np.arange(1, 128, dtype=np.uint8).view(FLOAT8[grid]).astype(np.float32)
    return every[np.isfinite(every)]


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


def levels_of(spec: Mapping[str, Any]) -> Levels:
    """The `Levels` that a `quantize` constraint's spec describes."""
    return Levels(spec["bits"], spec["grid"], spec["per"], spec["zero_level"], spec["cell_bits"])


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
    tune: bool = True,
) -> Constraint:
    """Every non-zero weight on one of a few levels, symmetric about zero; zeros stay zeros.

        argmin_z ||z - w||_2  s.t.  z_i in {-l, +l : l a level} where w_i != 0, z_i = 0 where w_i = 0

    for the scale (or codebook) in the structure: each weight goes to the nearest level of its sign; a tie goes to the
    smaller magnitude. `init` and `refresh` choose the scale by search over where the largest weight may lie (on a
    sample), then alternating least squares on all: k_i = nearest index of w_i / s, s = <w, l(k)> / <l(k), l(k)>.
    A codebook is found by k-means on the magnitudes, zeros left out: 40 Lloyd steps from evenly spaced centres (on
    2**18 evenly drawn weights of a larger leaf), then two on all weights; a leaf that already has no more distinct
    magnitudes than levels keeps them.

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
      tune: whether retraining may move the scale or codebook; False freezes the weights.

    Returns:
      A LEVEL constraint; its structure is the scale, float32 `[]` or `[units]` (outputs, rows, or groups times
      outputs), or the codebook in the leaf's dtype, `[levels]` or `[levels, units]`, ascending.

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
    levels = Levels(bits, grid, per, zero_level, cell_bits)

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


@partial(jax.jit, static_argnames="levels")  # the compiler fuses a codebook's many comparisons into one pass
def encode(w: Array, structure: Array, levels: Levels) -> Array:
    """The signed index of the level nearest to every weight: int32 of w's shape in -top..top, 0 for zeros.

    For the grids "uniform" and "cells" a weight on a level is exactly `scale * index`.
    """
    if levels.viewed:
        return from_columns(encode(columns(w, levels), structure, levels.by_column), w.shape, levels)
    if levels.grid == "codebook":
        k = _codebook_index(w, structure.astype(wide(w).dtype), levels.zero_level)
    else:
        # both lifted to where the scale is about 1: neither may be a denormal in the division
        step = structure.astype(wide(w).dtype)
        top = exponent(step, ())
        k = _index(jnp.abs(lift(w, -_spread(top, w.ndim))) / _spread(lift(step, -top), w.ndim), levels)
    return jnp.where(nonzero(w), jnp.where(negative(w), -k, k), 0)


@partial(jax.jit, static_argnames=("levels", "dtype"))
def decode(codes: Array, structure: Array, levels: Levels, dtype: Any = jnp.float32) -> Array:
    """The weights that signed indices stand for; inverse of `encode` on levels. Index 0 gives exactly +0."""
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
        top = exponent(structure, ())
        magnitude = _level(k, levels, structure.dtype) * _spread(lift(structure, -top), codes.ndim)
        magnitude = scale(magnitude, _spread(top, codes.ndim))
    signed = jnp.where(codes < 0, -magnitude, magnitude)
    return jnp.where(codes == 0, jnp.zeros((), dtype), signed.astype(dtype))


@partial(jax.jit, static_argnames="levels")
def fit(w: Array, levels: Levels) -> Array:
    """The scale or codebook chosen for w, see `quantize`; 1 where w is all zero."""
    if levels.viewed:
        _check_rank(w, levels)
        return fit(columns(w, levels), levels.by_column)
    _check_dtype(w, levels)
    magnitude = jnp.abs(wide(w)).reshape(-1, w.shape[-1] if w.ndim else 1)
    if levels.grid == "codebook":
        groups = magnitude.reshape(-1, 1) if levels.per == "tensor" else magnitude
        found = _positive(jax.vmap(partial(_k_means, count=levels.top), in_axes=1, out_axes=1)(groups), w.dtype)
        return found[..., 0] if levels.per == "tensor" else found
    return _least_squares(magnitude, levels, w.dtype).reshape(_scale_shape(w, levels))


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
            means = _means(x.reshape(-1), k.reshape(-1) - 1, wide(before))
        else:
            means = jax.vmap(_means, in_axes=(1, 1, 1), out_axes=1)(x, k - 1, wide(before))
        return _positive(means, before.dtype)
    level, axes = _level(k, levels, x.dtype), _axes(levels)
    s = before.reshape(1, -1)
    top = exponent(s, 0, keepdims=True)
    x = lift(x, -top)  # to where the scale is about 1
    # twice, the second time from the rounded value: weights already on a line return their scale exactly
    for _ in range(2):
        s = _exact(_improve(x, level, lift(s, -top), axes), top, levels, w.dtype)
    return s.reshape(before.shape)


def _positive(codebook: Array, dtype: Any) -> Array:
    """A codebook in the leaf's dtype, with the smallest number in place of entries that are not above 0 there."""
    held = codebook.astype(dtype)
    return jnp.where(nonzero(held) & ~negative(held), held, jnp.asarray(smallest(dtype), dtype))


def _axes(levels: Levels) -> tuple[int, ...]:
    """The axes of the GEMM view that share a scale."""
    return (0, 1) if levels.per == "tensor" else (0,)


def _scale_shape(w: Array, levels: Levels) -> tuple[int, ...]:
    return () if levels.per == "tensor" else (w.shape[-1],)


def _spread(scale: Array, ndim: int) -> Array:
    """A scale of shape [] or [cout], ready to broadcast against a weight."""
    return scale if scale.ndim == 0 else scale.reshape((1,) * (ndim - 1) + scale.shape)


def _check_rank(w: Array, levels: Levels) -> None:
    if w.ndim < 2:
        raise ValueError(f'per={levels.per!r} needs a weight of at least 2 axes, got shape {w.shape}; use "tensor"')


def _check_dtype(w: Array, levels: Levels) -> None:
    held = jnp.finfo(w.dtype).nmant + 1
    need = _significant(levels)
    if need > held:
        raise ValueError(f"{w.dtype} has {held} bits of precision, too few for the {levels.top} levels of {levels}")
    if levels.grid == "power_of_two" and w.dtype == jnp.float16 and levels.top > 8:
        raise ValueError(f"float16 has too few exponents for {levels.top} powers of two; use at most 4 bits")
    if levels.grid in FLOAT8 and w.dtype == jnp.float16:
        raise ValueError(f"float16 has too few exponents for {levels.grid} times a scale; use float32 or bfloat16")


def _significant(levels: Levels) -> int:
    """Bits of precision that a level has, in units of the scale."""
    if levels.grid in FLOAT8:
        return int(jnp.finfo(FLOAT8[levels.grid]).nmant) + 1
    return levels.top.bit_length() if levels.grid in ("uniform", "cells") else 1


def _index(x: Array, levels: Levels) -> Array:
    """Index of the level nearest to x = |w| / scale >= 0, int32; ties go to the smaller magnitude."""
    if levels.grid in FLOAT8:
        table = magnitudes(levels.grid)
        middle = np.concatenate([table[:1] / 2, (table[:-1] + table[1:]) / 2])  # each exact in float32
        k = jnp.searchsorted(jnp.asarray(middle, x.dtype), x, side="left", method="scan_unrolled").astype(jnp.int32)
    elif levels.grid == "power_of_two":
        fraction, power = jnp.frexp(jnp.minimum(x, 2.0**levels.top))  # x = fraction * 2**power, fraction in [1/2, 1)
        k = jnp.maximum(power + (fraction > 0.75).astype(jnp.int32), (x > 0.5).astype(jnp.int32))
    else:
        k = jnp.ceil(jnp.minimum(x, float(levels.top)) - 0.5).astype(jnp.int32)
    return jnp.clip(k, 0 if levels.zero_level else 1, levels.top)


def _level(k: Array, levels: Levels, dtype: Any) -> Array:
    """The level of index k in units of the scale; 0 for index 0."""
    if levels.grid in FLOAT8:
        return jnp.asarray(np.concatenate([[0], magnitudes(levels.grid)]), dtype)[k]
    if levels.grid == "power_of_two":
        return jnp.where(k > 0, jnp.ldexp(jnp.ones((), dtype), k - 1), jnp.zeros((), dtype))
    return k.astype(dtype)


def _table(levels: Levels) -> np.ndarray:
    if levels.grid in FLOAT8:
        return magnitudes(levels.grid).astype(np.float64)
    k = np.arange(1, levels.top + 1)
    return np.asarray(2.0 ** (k - 1) if levels.grid == "power_of_two" else k, np.float64)


def _exact(s: Array, top: Array, levels: Levels, dtype: Any) -> Array:
    """The scale s * 2**top, rounded so that its products with all levels are exact in the leaf's dtype.

    Its mantissa is short, it is a normal number, a multiple of the leaf's smallest, and its largest product is finite.
    """
    s = lax.reduce_precision(s, jnp.finfo(s.dtype).nexp, _scale_bits(levels, dtype))
    above = jnp.minimum(top - least(dtype), 100)  # 2**above of the smallest numbers are 2**top, or a mantissa holds all
    times = jnp.maximum(jnp.rint(lift(s, above)), 1.0)
    whole = scale(jnp.where(times < 2.0 ** (jnp.finfo(s.dtype).nmant + 1), lift(times, -above), s), top)
    largest = float(2.0 ** np.floor(np.log2(float(jnp.finfo(dtype).max) / _table(levels)[-1]) - 1))
    return jnp.where(s > 0, jnp.clip(whole, smallest(dtype), largest), smallest(dtype))


def _scale_bits(levels: Levels, dtype: Any) -> int:
    """Mantissa bits that a scale may have: those of the leaf less those of the largest integer; 0 is a power of two."""
    held = jnp.finfo(dtype).nmant
    if levels.grid == "power_of_two":  # exact with any scale; a few bits are left out for the rounding of sums
        return min(held, jnp.finfo(jnp.float32).nmant - 7)
    return max(0, held - _significant(levels))


def _improve(x: Array, level: Array, s: Array, axes: tuple[int, ...]) -> Array:
    """argmin_s ||x - s * level||, written as a correction of s, which is exact where nothing is to be corrected."""
    energy = jnp.sum(jnp.square(level), axis=axes, keepdims=True)
    step = jnp.sum((x - s * level) * level, axis=axes, keepdims=True)
    return s + jnp.where(energy > 0, step / jnp.where(energy > 0, energy, 1.0), 0.0)


def _least_squares(magnitude: Array, levels: Levels, dtype: Any) -> Array:
    """The scale of magnitudes `[n, cout]`, `[1, 1]` or `[1, cout]`: the best of many starts, then least squares."""
    axes = _axes(levels)
    power = exponent(magnitude, axes, keepdims=True)
    x = lift(magnitude, -power)  # about 1, so that no square leaves the range
    top = jnp.max(x, axis=axes, keepdims=True, initial=0.0)

    # The largest weight may lie on any level or beyond the last. For weights that lie on levels already, one is exact.
    table = _table(levels)
    parts = np.concatenate([table[::-1][:256], table[-1] * np.geomspace(1.05, 8, 32)])
    starts = top[None] / jnp.asarray(parts, x.dtype)[:, None, None]
    sample = x[:, :: max(1, x.shape[1] // 2**12)] if levels.per == "tensor" else x
    sample = sample[:: max(1, x.shape[0] // max(256 if levels.per == "channel" else 16, 2**16 // sample.shape[1]))]

    def error(s: Array, sample: Array) -> Array:
        near = _level(_index(sample / s, levels), levels, x.dtype) * s
        return jnp.sum(jnp.where(sample == 0, 0.0, jnp.square(sample - near)), axis=axes, keepdims=True)

    def step(_: int, s: Array) -> Array:
        level = _level(_index(x / s, levels), levels, x.dtype)
        return _improve(x, jnp.where(x == 0, 0.0, level), s, axes)

    def best(starts: Array, sample: Array) -> Array:
        errors = lax.map(lambda s: error(s, sample), starts)
        return jnp.take_along_axis(starts, jnp.argmin(errors, axis=0)[None], axis=0)[0]

    s = best(jnp.where(starts > 0, starts, 1.0), sample)
    s = lax.fori_loop(0, _ITERATIONS, step, s)
    spare = _scale_bits(levels, dtype)
    if spare < 8:  # the rounding of the scale is coarse: whether up or down is better depends on the weights
        widths = jnp.asarray([1, 1 - 2.0 ** -(spare + 1), 1 + 2.0 ** -(spare + 1)], s.dtype)
        s = best(lax.reduce_precision(s[None] * widths[:, None, None], jnp.finfo(s.dtype).nexp, spare), x)
    return jnp.where(top > 0, _exact(s, power, levels, dtype), 1.0)


def _codebook_index(x: Array, codebook: Array, zero_level: bool) -> Array:
    """1 + how many midpoints of the ascending codebook lie below |x|: the nearest entry, ties to the smaller."""

    def half_way(low: Array, high: Array) -> Array:
        top = exponent(high, ())
        low, high = lift(low, -top), lift(high, -top)
        return bits_of(scale(low + (high - low) / 2, top))

    magnitude = bits_of(x)
    # between neighbouring floats the midpoint may round up to the higher entry
    middle = jnp.minimum(half_way(codebook[:-1], codebook[1:]), jnp.maximum(bits_of(codebook[1:]), 1) - 1)
    k = jnp.ones(x.shape, jnp.int32)
    for m in middle:
        k = k + (magnitude > _spread(m, x.ndim)).astype(jnp.int32)
    first = half_way(jnp.zeros_like(codebook[0]), codebook[0])
    return jnp.where(magnitude > _spread(first, x.ndim), k, 0) if zero_level else k


def _means(x: Array, at: Array, centres: Array) -> Array:
    """The mean of x over each cluster `at` (below 0: none), exact where all are equal; empty ones keep their centre."""
    size = centres.shape[0]
    at = jnp.where(at < 0, size, at)
    number = jax.ops.segment_sum(jnp.ones_like(x), at, size + 1)[:size]
    top = jax.ops.segment_max(exponent(x, ()), at, size + 1)
    top = jnp.where(number > 0, top[:size], 0)
    x = lift(x, -top[jnp.minimum(at, size - 1)])  # to about 1 in each cluster
    peak = jnp.where(number > 0, jax.ops.segment_max(x, at, size + 1)[:size], 0.0)
    below = jax.ops.segment_sum(x - peak[jnp.minimum(at, size - 1)], at, size + 1)[:size]
    return jnp.where(number > 0, scale(peak + below / jnp.maximum(number, 1.0), top), centres)


def _k_means(x: Array, count: int) -> Array:
    """`count` ascending centres of the magnitudes x `[n]`, zeros left out; all that occur, where they are that few."""

    whole = bits_of(x)
    none = jnp.asarray(jnp.iinfo(whole.dtype).max, whole.dtype)

    def next_distinct(last: Array, _: None) -> tuple[Array, Array]:
        last = jnp.min(jnp.where(whole > last, whole, none), initial=none)
        return last, last

    last, distinct = lax.scan(next_distinct, jnp.zeros((), whole.dtype), None, length=count)
    distinct = jnp.where(distinct == none, jnp.max(whole, initial=0), distinct)
    distinct = jnp.where(distinct > 0, lax.bitcast_convert_type(distinct, x.dtype), 1.0)

    def cluster() -> Array:
        power = exponent(x)
        return scale(around(lift(x, -power), lift(distinct[0], -power)), power)

    def around(x: Array, lowest: Array) -> Array:
        stride = max(1, x.size // _SAMPLE) | 1
        y = jnp.sort(x[::stride] if x.size > _SAMPLE else x)
        number = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum((y > 0).astype(jnp.int32))])
        total = jnp.concatenate([jnp.zeros(1, y.dtype), jnp.cumsum(y)])
        ends = jnp.asarray([0, y.size], jnp.int32)

        def lloyd(_: int, c: Array) -> Array:
            cut = jnp.searchsorted(y, (c[:-1] + c[1:]) / 2, side="right").astype(jnp.int32)
            cut = jnp.concatenate([ends[:1], cut, ends[1:]])
            members = jnp.diff(number[cut])
            mean = jnp.diff(total[cut]) / jnp.maximum(members, 1).astype(y.dtype)
            return jnp.sort(jnp.where(members > 0, mean, c))

        c = lowest + (jnp.max(x) - lowest) * (jnp.arange(count, dtype=x.dtype) + 0.5) / count
        c = lax.fori_loop(0, _LLOYD, lloyd, c)
        for _ in range(2):
            at = jnp.where(x > 0, _codebook_index(x, c, False) - 1, -1)
            c = jnp.sort(_means(x, at, c))
        # the last bits of a mean depend on the order of summation; nothing else should
        return lax.reduce_precision(c, jnp.finfo(c.dtype).nexp, jnp.finfo(c.dtype).nmant - 7)

    return lax.cond(jnp.any(whole > last), cluster, lambda: distinct)


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
    ratio = jnp.clip(x / _spread(jnp.asarray(scale, x.dtype), x.ndim), low, high)
    k = jnp.ceil(jnp.abs(ratio) - 0.5).astype(jnp.int32)
    return jnp.where(ratio < 0, -k, k)


def _check_activation(bits: int, signed: bool) -> tuple[int, int]:
    if not (2 if signed else 1) <= bits <= 16:
        raise ValueError(f"bits must be in {2 if signed else 1}..16 for signed={signed} activations, got {bits}")
    return (1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _activations(x: Array, scale: Array, bits: int, signed: bool) -> Array:
    y = activation_codes(x, bits, scale, signed).astype(x.dtype) * _spread(scale, x.ndim)
    return jnp.where(jnp.isnan(x), x, y)


@_activations.defjvp
def _activations_jvp(bits: int, signed: bool, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, scale), (dx, dscale) = primals, tangents
    low, high = _check_activation(bits, signed)
    s, ds = _spread(scale, x.ndim), _spread(dscale, x.ndim)
    beyond = jnp.where(x > high * s, high * ds, jnp.where(x < low * s, low * ds, jnp.zeros_like(ds)))
    inside = (x <= high * s) & (x >= low * s)
    return _activations(x, scale, bits, signed), jnp.where(inside, dx, beyond)
