"""Floating-point numbers by their bits, where arithmetic fails them: at both ends of their range.

XLA may take numbers below the smallest normal one (denormals) for 0 in comparisons and sums; on CPUs it does. A file
keeps them, and what a file holds is what counts: here they are weights like others. So whether a weight is 0, negative
or changed is read from its bits; and what is to be squared or averaged is first multiplied by a power of two, which
rounds nothing, so that every result has the bits it would have without, where nothing leaves the range.

All functions take any floating dtype, and calculate in float32 (float64 for float64).
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax


def wide(x: Array) -> Array:
    """The same numbers in the dtype that is calculated with: float64 as it is, any other as float32."""
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def bits(x: Array) -> Array:
    """Unsigned integers ordered as |x| is (NaN above all); 0 for +0 and -0 and nothing else."""
    x = wide(x)
    whole = lax.bitcast_convert_type(x, jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32)
    return whole & (jnp.iinfo(whole.dtype).max >> 1)


def nonzero(x: Array) -> Array:
    """Whether each number is other than 0."""
    return bits(x) != 0


def negative(x: Array) -> Array:
    """Whether each number is below 0; -0 is not."""
    return jnp.signbit(wide(x)) & nonzero(x)


def differ(a: Array, b: Array) -> Array:
    """Whether the numbers of two arrays are others; +0 and -0 are the same, and so are two NaN of the same bits."""
    return (bits(a) != bits(b)) | (negative(a) != negative(b))


def exponent(x: Array, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Array:
    """The e with 2**(e - 1) <= max|x| < 2**e, over all of x or along axes: int32. For zeros the least that occurs."""
    peak = jnp.max(bits(x), axis=axis, keepdims=keepdims, initial=0)
    info, smallest = jnp.finfo(wide(x).dtype), least(wide(x).dtype)
    first = int(info.minexp)  # of the smallest normal number
    field = (peak >> int(info.nmant)).astype(jnp.int32)
    # a denormal is an integer times the smallest number; as a float it shows how long that integer is
    as_float = lax.bitcast_convert_type(peak.astype(info.dtype), peak.dtype)
    length = (as_float >> int(info.nmant)).astype(jnp.int32) + first
    return jnp.where(field > 0, field + first, jnp.where(peak > 0, length + smallest, smallest))


@jax.custom_jvp
def lift(x: Array, n: Array) -> Array:
    """x * 2**n, exactly; what falls below the normal numbers may be 0. Cheap: for what is summed afterwards.

    Args:
      x: any floating dtype.
      n: int32 in -250..250, of x's rank or a scalar.

    Returns:
      float32 (float64 for float64); infinite where the product is out of range.
    """
    x = wide(x)
    info = jnp.finfo(x.dtype)
    whole, tiny = bits(x), 1 << int(info.nmant)
    # a denormal is an integer times the smallest number; as that integer it takes part in arithmetic
    integer = whole.astype(x.dtype)
    magnitude = jnp.where(whole < tiny, _times(integer, n + least(x.dtype)), _times(jnp.abs(x), n))
    return jnp.where(jnp.signbit(x), -magnitude, magnitude)


@lift.defjvp
def _lift_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, n), (dx, _) = primals, tangents
    return lift(x, n), _times(wide(dx), n)


@jax.custom_jvp
def scale(x: Array, n: Array) -> Array:
    """`lift`, and what falls below the normal numbers is rounded to the nearest denormal (ties to even)."""
    near, smallest = lift(x, n), least(wide(x).dtype)
    # below the normal numbers the bits are an integer: how many times the smallest number there is
    times = jnp.rint(jnp.abs(lift(x, n - smallest)))
    small = times <= 2.0 ** int(jnp.finfo(near.dtype).nmant)
    whole = jnp.where(small, times, 0.0).astype(jnp.int64 if near.dtype == jnp.float64 else jnp.int32)
    denormal = lax.bitcast_convert_type(whole, near.dtype)
    return jnp.where(small, jnp.where(jnp.signbit(wide(x)), -denormal, denormal), near)


@scale.defjvp
def _scale_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    (x, n), (dx, _) = primals, tangents
    return scale(x, n), _times(wide(dx), n)


def least(dtype: jax.typing.DTypeLike) -> int:
    """The n for which 2**n is the smallest number above 0 that the dtype has, denormals included."""
    info = jnp.finfo(dtype)
    return int(info.minexp) - int(info.nmant)


def smallest(dtype: jax.typing.DTypeLike) -> float:
    """The smallest number above 0 of the dtype that arithmetic does not take for 0."""
    return 2.0 ** max(least(dtype), int(jnp.finfo(wide(jnp.zeros((), dtype)).dtype).minexp))


def _times(x: Array, n: Array) -> Array:
    """x * 2**n by two products, between which nothing leaves the range that does not leave it in the end."""
    half = n >> 1
    return x * _two_to(half, x.dtype) * _two_to(n - half, x.dtype)


def _two_to(n: Array, dtype: np.dtype) -> Array:
    """2**n as a normal number, the nearest there is."""
    info = jnp.finfo(dtype)
    field = jnp.clip(n, int(info.minexp), int(info.maxexp) - 1) + (int(info.maxexp) - 1)
    whole = field.astype(jnp.uint64 if dtype == jnp.float64 else jnp.uint32) << int(info.nmant)
    return lax.bitcast_convert_type(whole, dtype)
