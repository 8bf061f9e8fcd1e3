"""The scale of quantized weights, and where their codes begin: least squares, rounded so that every product is exact.

A scale has so few mantissa bits that `scale * level` is an exact product in the leaf's dtype: a weight on a level
divides back to its code, bit for bit. (With 8-bit levels a float32 leaf has a scale of 17 bits, a bfloat16 leaf one
that is a power of two.)
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.constraints.floats import exponent, least, lift, scale, smallest
from compressx.constraints.levels import Levels, index, level, reach, table

_ITERATIONS = 10  # of alternating least squares, on all weights
_POLISH = 3  # likewise, on the sample, for each beginning of the codes


def shared_axes(levels: Levels) -> tuple[int, ...]:
    """The axes of the matrix `[n, outputs]` that share a scale."""
    return (0, 1) if levels.per == "tensor" else (0,)


def exact(s: Array, top: Array, levels: Levels, dtype: Any) -> Array:
    """The scale s * 2**top, rounded so that its products with all levels are exact in the leaf's dtype.

    Its mantissa is short, it is a normal number, a multiple of the leaf's smallest, and its largest product is finite.
    """
    s = lax.reduce_precision(s, jnp.finfo(s.dtype).nexp, _bits(levels, dtype))
    above = jnp.minimum(top - least(dtype), 100)  # 2**above of the smallest numbers are 2**top, or a mantissa holds all
    times = jnp.maximum(jnp.rint(lift(s, above)), 1.0)
    whole = scale(jnp.where(times < 2.0 ** (jnp.finfo(s.dtype).nmant + 1), lift(times, -above), s), top)
    largest = float(2.0 ** np.floor(np.log2(float(jnp.finfo(dtype).max) / table(levels)[-1]) - 1))
    return jnp.where(s > 0, jnp.clip(whole, smallest(dtype), largest), smallest(dtype))


def _bits(levels: Levels, dtype: Any) -> int:
    """Mantissa bits that a scale may have: those of the leaf less those of the largest integer; 0 is a power of two."""
    held = jnp.finfo(dtype).nmant
    if levels.grid == "power_of_two":  # exact with any scale; a few bits are left out for the rounding of sums
        return min(held, jnp.finfo(jnp.float32).nmant - 7)
    return max(0, held - levels.significant)


def improve(x: Array, at: Array, s: Array, axes: tuple[int, ...]) -> Array:
    """argmin_s ||x - s * at||, written as a correction of s, which is exact where nothing is to be corrected."""
    energy = jnp.sum(jnp.square(at), axis=axes, keepdims=True)
    step = jnp.sum((x - s * at) * at, axis=axes, keepdims=True)
    return s + jnp.where(energy > 0, step / jnp.where(energy > 0, energy, 1.0), 0.0)


def least_squares(magnitude: Array, levels: Levels, dtype: Any) -> Array:
    """The scale of magnitudes `[n, cout]`, `[1, 1]` or `[1, cout]`: the best of many starts, then least squares."""
    axes = shared_axes(levels)
    power = exponent(magnitude, axes, keepdims=True)
    x = lift(magnitude, -power)  # about 1, so that no square leaves the range
    top = jnp.max(x, axis=axes, keepdims=True, initial=0.0)

    # The largest weight may lie on any level or beyond the last. For weights that lie on levels already, one is exact.
    held = table(levels)
    parts = np.concatenate([held[::-1][:256], held[-1] * np.geomspace(1.05, 8, 32)])
    starts = top[None] / jnp.asarray(parts, x.dtype)[:, None, None]

    def error(s: Array, sample: Array) -> Array:
        near = level(index(sample / s, levels), levels, x.dtype) * s
        return jnp.sum(jnp.where(sample == 0, 0.0, jnp.square(sample - near)), axis=axes, keepdims=True)

    def step(_: int, s: Array) -> Array:
        at = level(index(x / s, levels), levels, x.dtype)
        return improve(x, jnp.where(x == 0, 0.0, at), s, axes)

    def best(starts: Array, sample: Array) -> Array:
        errors = lax.map(lambda s: error(s, sample), starts)
        return jnp.take_along_axis(starts, jnp.argmin(errors, axis=0)[None], axis=0)[0]

    s = best(jnp.where(starts > 0, starts, 1.0), _sample(x, levels))
    s = lax.fori_loop(0, _ITERATIONS, step, s)
    spare = _bits(levels, dtype)
    if spare < 8:  # the rounding of the scale is coarse: whether up or down is better depends on the weights
        s = best(_rounded(s, spare), x)
    return jnp.where(top > 0, exact(s, power, levels, dtype), 1.0)


def _sample(x: Array, levels: Levels) -> Array:
    """Some of the weights, in which starts are compared."""
    some = x[:, :: max(1, x.shape[1] // 2**12)] if levels.per == "tensor" else x
    return some[:: max(1, x.shape[0] // max(256 if levels.per == "channel" else 16, 2**16 // some.shape[1]))]


def _rounded(s: Array, spare: int) -> Array:
    """A scale in so few mantissa bits: as it is rounded, and one step to each side, along a new first axis."""
    widths = jnp.asarray([1, 1 - 2.0 ** -(spare + 1), 1 + 2.0 ** -(spare + 1)], s.dtype)
    return lax.reduce_precision(s[None] * widths[:, None, None], jnp.finfo(s.dtype).nexp, spare)


def affine_least_squares(w: Array, levels: Levels, dtype: Any) -> Array:
    """The scale and the smallest code of weights `[n, cout]`, `[2, 1, 1]` or `[2, 1, cout]`, for asymmetric levels.

    As `least_squares`, each scale with three beginnings of the codes: they reach all that is negative, all that is
    positive, or leave the same share of both out. The best is then compared with its neighbours.
    """
    axes, span = shared_axes(levels), 2**levels.bits - 1
    power = exponent(w, axes, keepdims=True)
    x = lift(w, -power)
    down, up = (jnp.max(jnp.maximum(side, 0.0), axis=axes, keepdims=True, initial=0.0) for side in (-x, x))
    top = jnp.maximum(down, up)

    def lows(s: Array) -> Array:
        """Three beginnings of the codes for each of many scales, along a new first axis."""
        n, p = down[None] / s, up[None] / s
        both = jnp.where(n + p > 0, n / jnp.where(n + p > 0, n + p, 1.0), 0.5)
        found = jnp.stack([-jnp.rint(n), jnp.rint(p) - span, -jnp.rint(span * both)])
        return jnp.clip(found, 1 - span, -1)

    def codes(x: Array, s: Array, low: Array) -> Array:
        below = x < 0
        k = jnp.minimum(index(jnp.abs(x) / s, levels), reach(below, low, levels)).astype(x.dtype)
        return jnp.where(x == 0, 0.0, jnp.where(below, -k, k))

    def error(x: Array, s: Array, low: Array) -> Array:
        return jnp.sum(jnp.square(x - s * codes(x, s, low)), axis=axes, keepdims=True)

    def best(x: Array, s: Array, low: Array, times: int = 0) -> tuple[Array, Array]:
        """The best of many pairs, each scale first moved by so many steps of alternating least squares."""

        def one(each: tuple[Array, Array]) -> tuple[Array, Array]:
            s = fitted(x, *each, times)
            return s, error(x, s, each[1])

        s, errors = lax.map(one, (s, low))
        first = jnp.argmin(errors, axis=0)[None]
        return jnp.take_along_axis(s, first, axis=0)[0], jnp.take_along_axis(low, first, axis=0)[0]

    def fitted(x: Array, s: Array, low: Array, times: int) -> Array:
        return lax.fori_loop(0, times, lambda _, s: improve(x, codes(x, s, low), s, axes), s) if times else s

    def with_lows(s: Array) -> tuple[Array, Array]:
        low = lows(s)
        return jnp.broadcast_to(s[None], low.shape).reshape(-1, *s.shape[1:]), low.reshape(-1, *s.shape[1:])

    def starts(parts: np.ndarray) -> Array:
        found = top[None] / jnp.asarray(parts, x.dtype)[:, None, None]
        return jnp.where(found > 0, found, 1.0)

    # For weights that lie on levels already, one of the first is exact, with codes that reach all that is negative.
    held, some = table(levels), _sample(x, levels)
    on_level = starts(held[::-1][:256])
    free, begin = with_lows(starts(held[-1] * np.geomspace(0.25, 8, 64)))
    s, low = best(some, jnp.concatenate([on_level, free]), jnp.concatenate([lows(on_level)[0], begin]))
    beside = jnp.clip(low[None] + jnp.asarray([0, -1, 1, -2, 2], x.dtype)[:, None, None], 1 - span, -1)
    s, low = best(some, jnp.broadcast_to(s[None], beside.shape), beside, _POLISH)
    s = fitted(x, s, low, _ITERATIONS)
    spare = _bits(levels, dtype)
    if spare < 8:
        around = _rounded(s, spare)
        more, begin = with_lows(around)
        s, low = best(x, jnp.concatenate([around, more]), jnp.concatenate([jnp.stack([low] * 3), begin]))
    return jnp.stack([jnp.where(top > 0, exact(s, power, levels, dtype), 1.0), low.astype(x.dtype)])


__all__ = ["affine_least_squares", "exact", "improve", "least_squares", "shared_axes"]
