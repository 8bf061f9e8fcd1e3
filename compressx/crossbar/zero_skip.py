"""Zero skipping: a fragment is fed only the cycles that its largest input needs (FORMS, section IV).

    EIC(fragment) = max over its inputs of ceil(bit length / DAC bits),    effective input cycles

Bits enter lowest first, so a fragment may stop once nothing but leading zeros is left. Products do not change: what is
skipped are cycles in which every input digit is 0. **All-zero rule**: a fragment whose inputs are all 0 takes
`all_zero` cycles, 0 unless said otherwise (the zero detector fires before the first cycle); the paper does not say.
Inputs are unsigned, or sign planes, each of which is fed on its own; two's complement has no leading zeros to skip.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import ceil

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.crossbar.design import Design

_CHUNK_VALUES = 2**24


def bit_length(x: Array) -> Array:
    """Bits of non-negative int32 without leading zeros; 0 for 0."""
    return 32 - lax.clz(x.astype(jnp.int32))


def effective_cycles(x: Array, design: Design, all_zero: int = 0) -> Array:
    """Effective input cycles of every fragment: int32 `[..., k] -> [..., ceil(k / active_rows)]`.

    Args:
      x: non-negative int32 inputs in the order of the rows in use; the last fragment may be short.
      design: active rows, DAC and input bits.
      all_zero: cycles of a fragment without a bit, 0 or 1.

    Returns:
      int32 `[..., ceil(k / active_rows)]`, 0 to `design.cycles`.

    Raises:
      ValueError: the design's inputs are two's complement, or `all_zero` is neither 0 nor 1.

    Source: G. Yuan et al., "FORMS", 2021, section IV (effective input cycles).

    Example:
      >>> x = jnp.array([[1, 4, 0, 0, 0, 0, 0, 0]], jnp.int32)  # two fragments of four
      >>> compressx.crossbar.effective_cycles(x, compressx.crossbar.forms(4)).tolist()
      [[3, 0]]
    """
    if design.inputs == "twos_complement":
        raise ValueError("two's complement inputs have no leading zeros to skip; use unsigned inputs or sign planes")
    if all_zero not in (0, 1):
        raise ValueError(f"all_zero must be 0 or 1 cycles, got {all_zero}")
    k, rows = x.shape[-1], design.active_rows
    groups = ceil(k / rows)
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, groups * rows - k)])
    largest = jnp.max(padded.reshape(*x.shape[:-1], groups, rows), axis=-1)
    return jnp.maximum(-(-bit_length(largest) // design.dac_bits), all_zero)


@dataclass(frozen=True)
class Skipping:
    """Cycles of a layer on real activations.

    Attributes:
      name: of the layer.
      histogram: int64 `[cycles + 1]`, fragments (of all inputs) with each number of effective cycles.
      full: input cycles of a fragment without skipping.
      mean_slowest: mean over inputs of the cycles of the slowest array: its fragments are fed one after another, arrays
        run side by side and wait for each other.
      full_sweep: the same without skipping.
      inputs: how many inputs were measured.

    Source: G. Yuan et al., "FORMS", 2021, section IV.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar import zero_skip
      >>> found = zero_skip.measure(jnp.array([[1, 4, 0, 0, 0, 0, 0, 0]], jnp.int32), crossbar.forms(4))
      >>> found.mean, found.full, found.all_zero_share
      (1.5, 16, 0.5)
    """

    name: str
    histogram: np.ndarray
    full: int
    mean_slowest: float
    full_sweep: int
    inputs: int = 1

    @property
    def mean(self) -> float:
        """Mean effective cycles of a fragment."""
        return float((self.histogram * np.arange(len(self.histogram))).sum() / self.histogram.sum())

    @property
    def saved(self) -> float:
        """Share of input cycles saved, summed over all fragments: what energy follows."""
        return 1 - self.mean / self.full

    @property
    def speedup(self) -> float:
        """Cycles without / with skipping, where the slowest array decides: what latency follows."""
        return self.full_sweep / self.mean_slowest if self.mean_slowest else float("inf")

    @property
    def all_zero_share(self) -> float:
        """Share of fragments that take no cycle."""
        return float(self.histogram[0] / self.histogram.sum())


def measure(x: Array, design: Design, name: str = "layer", all_zero: int = 0) -> Skipping:
    """Effective cycles of a layer for activations int `[..., k]`, rows in use in order (`Programmed.drive`).

    Sign planes are measured as the hardware feeds them: both planes, one after the other.

    Args:
      x: int `[..., k]`.
      design: active rows, DAC and input bits.
      name: of the layer.
      all_zero: cycles of a fragment without a bit, 0 or 1.

    Returns:
      `Skipping`: a histogram of cycles, and what energy and latency save.

    Raises:
      ValueError: inputs are negative, and the design takes unsigned ones.

    Source: G. Yuan et al., "FORMS", 2021, section IV.

    Example:
      >>> from compressx.crossbar import forms, zero_skip
      >>> found = zero_skip.measure(jnp.array([[1, 4, 0, 0, 0, 0, 0, 0]], jnp.int32), forms(4))
      >>> found.mean, found.saved, found.speedup  # 3 cycles and none of 16 each
      (1.5, 0.90625, 10.666666666666666)
    """
    flat = x.reshape(-1, x.shape[-1]).astype(jnp.int32)
    planes = 2 if design.inputs == "sign_planes" else 1
    if planes == 1 and bool(jnp.any(flat < 0)):
        raise ValueError(f"{name}: negative inputs; skipping needs unsigned inputs or inputs='sign_planes'")
    groups = ceil(flat.shape[1] / design.active_rows)
    histogram, slowest = np.zeros(design.cycles + 1, np.int64), 0
    chunk = max(1, _CHUNK_VALUES // flat.shape[1])
    for start in range(0, len(flat), chunk):
        counted, sweep = _count(flat[start : start + chunk], design, all_zero)
        histogram += np.asarray(counted)
        slowest += int(np.asarray(sweep, np.int64).sum())
    sweep_groups = min(groups, design.groups)  # the first array is the fullest
    return Skipping(
        name, histogram, design.cycles, slowest / len(flat), planes * design.cycles * sweep_groups, len(flat)
    )


@partial(jax.jit, static_argnames=("design", "all_zero"))
def _count(flat: Array, design: Design, all_zero: int) -> tuple[Array, Array]:
    """Histogram of the fragments' cycles, and the cycles of the slowest array for each input."""
    groups = ceil(flat.shape[1] / design.active_rows)
    arrays = ceil(groups / design.groups)
    sides = [jnp.maximum(flat, 0), jnp.maximum(-flat, 0)] if design.inputs == "sign_planes" else [flat]
    cycles = jnp.stack([effective_cycles(side, design, all_zero) for side in sides])  # [planes, n, groups]
    swept = jnp.pad(jnp.sum(cycles, axis=0), ((0, 0), (0, arrays * design.groups - groups)))
    slowest = jnp.max(jnp.sum(swept.reshape(-1, arrays, design.groups), axis=2), axis=1)
    return jnp.bincount(cycles.reshape(-1), length=design.cycles + 1), slowest


def merge(parts: Sequence[Skipping]) -> Skipping:
    """One layer's measurements on several batches of inputs (and of several groups of filters), as one.

    Args:
      parts: of the same layer and design, at least one.

    Returns:
      `Skipping` of all their inputs.

    Raises:
      ValueError: there is none, or they are of different layers or designs.

    Example:
      >>> from compressx.crossbar import forms, zero_skip
      >>> one = zero_skip.measure(jnp.array([[1, 4, 0, 0]], jnp.int32), forms(4))
      >>> zero_skip.merge([one, one]).inputs
      2
    """
    if len({(p.name, p.full) for p in parts}) != 1:
        raise ValueError(f"expected measurements of one layer on one design, got {[p.name for p in parts]}")
    first, inputs = parts[0], sum(p.inputs for p in parts)
    slowest = sum(p.mean_slowest * p.inputs for p in parts) / inputs
    histogram = np.sum([p.histogram for p in parts], axis=0)
    return Skipping(first.name, histogram, first.full, slowest, max(p.full_sweep for p in parts), inputs)
