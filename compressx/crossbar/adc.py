"""The ADC in integers, as `design.Adc` defines it, and in floats for sums that noise has moved off the integers."""

import jax.numpy as jnp
from jax import Array

from compressx.crossbar.design import Design


def convert(sums: Array, design: Design) -> Array:
    """Codes of integer column sums: clip(floor((2 S den + num) / (2 num)), low, high); int32, ties go up."""
    return clip(unclipped(sums, design), design)


def unclipped(sums: Array, design: Design) -> Array:
    """The code before the clip."""
    num, den = design.adc.lsb.numerator, design.adc.lsb.denominator
    if num == 1:
        return sums * den
    if num & (num - 1) == 0:
        return (2 * den * sums + num) >> num.bit_length()  # an arithmetic shift is a floor division by 2 num
    return jnp.floor_divide(2 * den * sums + num, 2 * num)


def convert_float(sums: Array, design: Design) -> Array:
    """Codes of column sums that are no integers: clip(floor(S den / num + 1/2), low, high); int32."""
    lsb = design.adc.lsb
    codes = jnp.floor(sums * (lsb.denominator / lsb.numerator) + 0.5)
    return clip(codes.astype(jnp.int32), design)


def clip(codes: Array, design: Design) -> Array:
    """Codes inside the clip range; "ideal" has none."""
    if design.adc.encoding == "ideal":
        return codes
    return jnp.clip(codes, *design.adc.limits(design.signed_sums))
