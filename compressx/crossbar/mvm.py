"""The crossbar's matrix product behind one call: it picks the formulation, keeps memory bounded, and has a gradient.

Straight-through backward: the gradient is that of the plain product with the programmed weights.
"""

from functools import partial
from math import ceil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx.crossbar import kernels
from compressx.crossbar.arrays import Programmed
from compressx.crossbar.cells import Cells
from compressx.crossbar.design import Design

_CHUNK_VALUES = 2**24  # intermediate values a formulation may hold at any time


def crossbar_matmul(x: Array, programmed: Programmed, key: Array | None = None) -> Array:
    """The product as the engine gives it, bit for bit: `[..., P] -> [..., F]`.

    Integers in, integers out: int32 in units of 1/den of the ADC's lsb (the product itself where the lsb is an
    integer). Floats in, which must hold integers: float32 in units of 1, each part of the result rounded once, with
    the gradient of `x @ w` (straight-through); a NaN or infinity, which no converter takes, makes every filter of its
    product NaN. Inputs outside `design.input_range` lose their upper bits, as on the
    hardware; `quantize_inputs` clips.

    Args:
      x: inputs.
      programmed: the weights on crossbars, with their design.
      key: for read noise; needed where the programmed arrays have any, ignored otherwise.

    Returns:
      `[..., F]`, int32 or float32 as described.

    Raises:
      ValueError: the last axis is not P; an integer result may pass int32 (use floats, or `crossbar_parts`).

    Source: bit-serial inputs, sliced weights and flipped columns: A. Shafiee et al., "ISAAC", 2016; polarized groups:
    G. Yuan et al., "FORMS", 2021, section IV.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar.program import program
      >>> arrays = program([[3], [-2]], crossbar.forms(4).but(active_rows=1))
      >>> crossbar.crossbar_matmul(jnp.array([[5, 1]], jnp.int32), arrays).tolist()
      [[13]]
    """
    if jnp.issubdtype(x.dtype, jnp.floating):
        return _straight_through(x, programmed, key)
    parts = crossbar_parts(x, programmed, key)
    if len(parts) > 1:
        raise ValueError(
            f"design {programmed.design.name}: results of {programmed.inputs} inputs may pass int32; "
            f"give floats, or add up crossbar_parts in 64 bits"
        )
    return parts[0][1]


def crossbar_parts(x: Array, programmed: Programmed, key: Array | None = None) -> list[tuple[int, Array]]:
    """The exact product as a sum of int32 parts: [(shift, part)], y = sum of part * 2^shift, in units of 1/den.

    Bit-serial inputs add up cycle by cycle, so the low and the high bits of the inputs are products of their own; each
    part holds as many cycles as provably fit.

    Args:
      x: int32 `[..., P]`, inputs.
      programmed: the weights on crossbars.
      key: for read noise.

    Returns:
      (shift, int32 `[..., F]`) for each part, lowest cycles first.

    Raises:
      ValueError: the last axis is not P, or the arrays have read noise and there is no key.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar.program import program
      >>> parts = crossbar.crossbar_parts(jnp.array([[70]], jnp.int32), program([[3]], crossbar.isaac()))
      >>> sum(int(part[0, 0]) << shift for shift, part in parts)
      210
    """
    design = programmed.design
    if x.shape[-1:] != (programmed.inputs,):
        raise ValueError(f"expected inputs [..., {programmed.inputs}], got shape {x.shape}")
    if programmed.read_noise and key is None:
        raise ValueError("these arrays have read noise: give a key")
    if design.inputs == "sign_planes":
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        plus = _parts(jnp.maximum(x, 0), programmed, keys[0])
        minus = _parts(jnp.maximum(-x, 0), programmed, keys[1])
        return [(shift, a - b) for (shift, a), (_, b) in zip(plus, minus, strict=True)]
    return _parts(x, programmed, key)


def _parts(x: Array, programmed: Programmed, key: Array | None) -> list[tuple[int, Array]]:
    design, size = programmed.design, programmed.limb_cycles
    flat = programmed.drive(x.reshape(-1, x.shape[-1])).astype(jnp.int32)
    parts = []
    for start in range(0, design.cycles, size):
        cycles = min(size, design.cycles - start)
        shift, bits = design.dac_bits * start, design.dac_bits * cycles
        signed = design.inputs == "twos_complement" and start + cycles == design.cycles
        piece = (flat >> shift) & (2**bits - 1)
        if signed:
            piece = piece - ((piece >> (bits - 1)) << bits)
        powers = [2 ** (design.dac_bits * t) for t in range(cycles)]
        powers[-1] *= -1 if signed else 1
        now = None if key is None else jax.random.fold_in(key, start)
        y = _bounded(piece, programmed, tuple(powers), now)
        parts.append((shift, y.reshape(*x.shape[:-1], programmed.filters)))
    return parts


def _bounded(x: Array, programmed: Programmed, powers: tuple[int, ...], key: Array | None) -> Array:
    """`_product` over as many inputs at a time as memory allows."""
    per_input = programmed.cells.cells.shape[3] * (
        len(powers) * len(programmed.design.column_weights) if programmed.path in ("folded", "integer") else 1
    )
    chunk = max(1, _CHUNK_VALUES // max(1, per_input, x.shape[1]))
    if len(x) <= chunk:
        return _product(x, programmed, powers, key)
    count = ceil(len(x) / chunk)
    padded = jnp.pad(x, ((0, count * chunk - len(x)), (0, 0))).reshape(count, chunk, x.shape[1])

    def run(step: tuple[Array, Array]) -> Array:
        part, index = step
        return _product(part, programmed, powers, None if key is None else jax.random.fold_in(key, index))

    y = jax.lax.map(run, (padded, jnp.arange(count, dtype=jnp.int32)))
    return y.reshape(count * chunk, -1)[: len(x)]


def _product(x: Array, programmed: Programmed, powers: tuple[int, ...], key: Array | None) -> Array:
    """One part for inputs `[n, k]` of the rows in use: int32 `[n, F]`."""
    design, den = programmed.design, programmed.design.adc.lsb.denominator
    proven, simulated = programmed.proven.shape[0], programmed.simulated.shape[0]
    out = []
    if proven:
        narrow = len(powers) * design.dac_bits <= 8
        limbs = programmed.limbs if not simulated else programmed.limbs[:, :, programmed.proven]
        out.append(kernels.exact(x, limbs, programmed.exact_rows, narrow) * den)
    if simulated:
        y = _simulate(x, programmed, powers, key)
        if design.signs == "offset":
            ones = jnp.sum(x, axis=1, keepdims=True, dtype=jnp.int32)
            y = y - ones * (2 ** (design.weight_bits - 1) * den)
        out.append(y)
    if len(out) == 1 and out[0].shape[1] == programmed.filters:
        return out[0]
    out.append(jnp.zeros((x.shape[0], 1), jnp.int32))
    return jnp.concatenate(out, axis=1)[:, programmed.place]


def _simulate(x: Array, programmed: Programmed, powers: tuple[int, ...], key: Array | None) -> Array:
    design, cells = programmed.design, programmed.cells
    blocks = _grouped(x, design)
    noisy = programmed.read_noise > 0
    if programmed.path == "popcount" and programmed.planes is not None:
        return kernels.popcount(blocks, programmed.planes, cells, design, powers)
    if programmed.path == "table" and not noisy:
        if programmed.tables is not None:
            return kernels.table(blocks, programmed.tables, design, powers)
        errors = () if programmed.gain is None or programmed.shift is None else (programmed.gain, programmed.shift)
        return kernels.table(blocks, cells, design, powers, *errors)
    if programmed.path == "integer":
        return kernels.folded(blocks, cells, design, powers, integer=True)
    reads = (key, programmed.read_noise) if noisy and key is not None else None
    return kernels.folded(blocks, cells, design, powers, programmed.gain, programmed.shift, reads)


def _grouped(x: Array, design: Design) -> Array:
    groups = ceil(x.shape[1] / design.active_rows)
    padded = jnp.pad(x, ((0, 0), (0, groups * design.active_rows - x.shape[1])))
    return padded.reshape(x.shape[0], groups, design.active_rows)


@jax.custom_vjp
def _straight_through(x: Array, programmed: Programmed, key: Array | None) -> Array:
    whole = jnp.round(x.astype(jnp.float32)).astype(jnp.int32)
    den = programmed.design.adc.lsb.denominator
    parts = crossbar_parts(whole, programmed, key)
    y = sum((y.astype(jnp.float32) * (2.0**shift / den) for shift, y in parts[1:]), _first(parts, den))
    kept = programmed.place < programmed.proven.shape[0] + programmed.simulated.shape[0]
    number = jnp.isfinite(programmed.drive(x)).all(axis=-1, keepdims=True)
    return jnp.where(number | ~kept.reshape((1,) * (y.ndim - 1) + (-1,)), y, jnp.nan)


def _first(parts: list[tuple[int, Array]], den: int) -> Array:
    shift, y = parts[0]
    return y.astype(jnp.float32) * (2.0**shift / den)


def _forward(x: Array, programmed: Programmed, key: Array | None) -> tuple[Array, tuple[Array, Programmed]]:
    return _straight_through(x, programmed, key), (x[:0], programmed)


def _backward(kept: tuple[Array, Programmed], g: Array) -> tuple[Array, None, None]:
    like, programmed = kept
    limbs = programmed.limbs
    w = limbs[0] + 256.0 * limbs[1] if limbs.shape[0] == 2 else limbs[0]
    order = jnp.concatenate([programmed.proven, programmed.simulated])  # kept filter of each place
    padded = jnp.concatenate([w[:, order], jnp.zeros((w.shape[0], 1), jnp.float32)], axis=1)
    dx = jnp.matmul(g, padded[:, programmed.place].T, precision=jax.lax.Precision.HIGHEST)
    if not programmed.in_order:
        dx = jnp.zeros((*dx.shape[:-1], programmed.inputs), jnp.float32).at[..., programmed.rows].set(dx)
    return dx.astype(like.dtype), None, None


_straight_through.defvjp(_forward, _backward)


class Saturation(NamedTuple):
    """Clipped conversions of a product.

    Attributes:
      clipped: int64 `[B, K, S]`, of each column of the simulated filters.
      conversions: all conversions, those of proven columns among them.

    Example:
      >>> compressx.crossbar.Saturation(clipped=np.array([[[3]]]), conversions=24).share
      0.125
    """

    clipped: np.ndarray
    conversions: int

    @property
    def share(self) -> float:
        """Share of all conversions that clipped."""
        return float(self.clipped.sum()) / self.conversions if self.conversions else 0.0


@partial(jax.jit, static_argnames="design")
def _count_clipped(x: Array, cells: Cells, design: Design) -> Array:
    return kernels.count_clipped(_grouped(x, design), cells, design, design.cycles)


def saturation(x: Array, programmed: Programmed) -> Saturation:
    """How many conversions of integer inputs `[..., P]` clip; integer cells.

    Args:
      x: integers `[..., P]`.
      programmed: arrays of integer cells (no drawn devices).

    Returns:
      `Saturation`: clipped conversions by column, and how many there were.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar.program import program
      >>> narrow = crossbar.Design(rows=4, active_rows=4, adc=crossbar.Adc(2), weight_bits=2, signs="polarized")
      >>> arrays = program([[3], [3], [3], [3]], narrow)  # sums up to 12, codes up to 3
      >>> found = crossbar.saturation(jnp.array([[1, 1, 1, 1], [1, 0, 0, 0]], jnp.int32), arrays)
      >>> int(found.clipped.sum()), found.conversions  # 8 input bits, one converted each cycle
      (1, 16)
    """
    design = programmed.design
    flat = programmed.drive(x.reshape(-1, x.shape[-1])).astype(jnp.int32)
    planes = [flat] if design.inputs != "sign_planes" else [jnp.maximum(flat, 0), jnp.maximum(-flat, 0)]
    groups, _, columns, simulated = programmed.cells.cells.shape
    clipped = np.zeros((groups, columns, simulated), np.int64)
    chunk = max(1, _CHUNK_VALUES // max(1, design.cycles * columns * simulated))
    for plane in planes:
        for start in range(0, len(flat), chunk):
            clipped += np.asarray(_count_clipped(plane[start : start + chunk], programmed.cells, design))
    filters = programmed.proven.shape[0] + simulated
    return Saturation(clipped, len(planes) * len(flat) * design.cycles * groups * columns * filters)
