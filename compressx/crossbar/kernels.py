"""Formulations of the crossbar's product, all equal to `reference` on integers; `mvm` picks one.

    exact     no column can clip: a plain integer product, in float32 blocks that stay below 2^24, summed in int32
    popcount  ideal cells: bit planes of inputs and cells, AND + population count
    table     groups of up to 8 rows, 1-bit DAC: all input patterns of a group converted once, then looked up
    folded    any conductances: one float32 product per group for all cycles and slices
    integer   ideal cells: the same as an int8 product summed in int32, for devices that have units for it

Each but `exact` scans over the groups of rows, so memory does not grow with them. int32 throughout; sums wrap, and
`program` proves that no result does. Shapes: n inputs, B groups of R rows, K columns of a weight, F filters, T cycles.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.crossbar.adc import clip, convert, convert_float, unclipped
from compressx.crossbar.bits import WORD, pack
from compressx.crossbar.cells import Cells
from compressx.crossbar.design import Design

_UNROLL = 4  # cycles that one turn of the popcount loop holds: as fast as all of them, and quicker to compile


def digits(x: Array, design: Design, cycles: int) -> Array:
    """The digits of integers, lowest first: `[...] -> [T, ...]`, int32."""
    shifts = jnp.arange(cycles, dtype=jnp.int32) * design.dac_bits
    return (x[None] >> shifts.reshape((-1,) + (1,) * x.ndim)) & (2**design.dac_bits - 1)


def exact(x: Array, limbs: Array, rows: int, narrow: bool) -> Array:
    """Integer product `[n, k] @ [k, F]`, int32.

    Args:
      x: int32, |x| below 2^16.
      limbs: float32 `[L, k, F]`, the weights in base 256, lowest first.
      rows: how many rows can be summed with all partial sums below 2^24 (`program.exact_rows`).
      narrow: |x| is below 2^8, so that one product does where two are needed otherwise.
    """
    out = jnp.zeros((x.shape[0], limbs.shape[2]), jnp.int32)
    for i, part in enumerate([x] if narrow else [x & 255, x >> 8]):
        wide = part.astype(jnp.float32)
        for j in range(limbs.shape[0]):
            for start in range(0, x.shape[1], rows):
                block = slice(start, start + rows)
                product = jnp.matmul(wide[:, block], limbs[j, block], precision=lax.Precision.HIGHEST)
                out = out + (product.astype(jnp.int32) << (8 * (i + j)))
    return out


def plane_weights(design: Design) -> tuple[int, ...]:
    """What each bit plane of a cell counts: powers of two, then their negatives where cells are signed."""
    powers = tuple(2**q for q in range(design.device.cell_bits))
    return powers + tuple(-p for p in powers) if design.signed_sums else powers


def pack_planes(cells: np.ndarray, design: Design) -> np.ndarray:
    """Cells as bit planes, 32 rows a word: int8 `[B, R, K, F] -> uint32 [B, words, Q, K, F]`."""
    groups, rows, columns, filters = cells.shape
    words = -(-rows // WORD)
    level = np.abs(cells)
    planes = []
    for weight in plane_weights(design):
        side = (cells < 0) if weight < 0 else (cells > 0)
        planes.append(((level & abs(weight)) > 0) & side)
    bits = np.stack(planes, axis=2)  # [B, R, Q, K, F]
    bits = np.pad(bits, ((0, 0), (0, words * WORD - rows), (0, 0), (0, 0), (0, 0)))
    packed = np.packbits(bits.reshape(groups, words, 4, 8, -1), axis=3, bitorder="little")
    packed = packed.reshape(groups, words, 4, -1).astype(np.uint32)
    word = sum(packed[:, :, i] << np.uint32(8 * i) for i in range(4))
    return np.asarray(word, np.uint32).reshape(groups, words, len(planes), columns, filters)


def popcount(x: Array, planes: Array, cells: Cells, design: Design, cycle_weights: Sequence[int]) -> Array:
    """The product for ideal cells.

    Args:
      x: int32 `[n, B, R]`.
      planes: uint32 `[B, words, Q, K, F]` of `pack_planes`.
      cells: flips and signs; its cells are not read.
      design: of the engine.
      cycle_weights: of the cycles to run.

    Returns:
      int32 `[n, F]` in units of 1/den, the offset not yet subtracted.
    """
    groups, words, _, columns, filters = planes.shape
    n, rows, cycles, dac = x.shape[0], x.shape[2], len(cycle_weights), design.dac_bits
    powers = jnp.asarray(cycle_weights, jnp.int32)
    packed = pack(x.transpose(2, 1, 0).reshape(rows, groups * n), cycles * dac)
    packed = packed.reshape(cycles, dac, words, groups, n).transpose(3, 0, 1, 2, 4)  # [B, T, dac, words, n]

    def group(total: Array, step: tuple[Array, Array, Array | None, Array | None]) -> tuple[Array, None]:
        block, plane, flip, negative = step
        counts = jnp.sum(lax.population_count(block), axis=2).astype(jnp.int32)  # [T, dac, n]
        ones = sum((counts[:, b] << b for b in range(1, dac)), counts[:, 0])  # sums of the digits

        def cycle(acc: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
            word, one, power = now  # [dac, words, n], [n], []
            value = jnp.zeros((n, filters), jnp.int32)
            for k in range(columns):
                sums = jnp.zeros((n, filters), jnp.int32)
                for b in range(dac):
                    for q, weight in enumerate(plane_weights(design)):
                        for i in range(words):
                            met = lax.population_count(word[b, i, :, None] & plane[i, q, k][None])
                            sums = sums + met.astype(jnp.int32) * (weight << b)
                read = _corrected(convert(sums, design), one[:, None], None if flip is None else flip[k][None], design)
                value = value + read * design.column_weights[k]
            return acc + value * power, None

        part, _ = lax.scan(cycle, jnp.zeros((n, filters), jnp.int32), (block, ones, powers), unroll=_UNROLL)
        return total + _signed(part, negative), None

    steps = (packed, planes, cells.flip, cells.negative)
    return lax.scan(group, jnp.zeros((n, filters), jnp.int32), steps)[0]


def build_table(cells: Cells, design: Design, gain: Array | None = None, shift: Array | None = None) -> Array:
    """What a group adds to the result for each pattern of input bits: int32 `[..., 2^R, F]`.

    Cells `[..., R, K, F]` (leading axes for groups) may be integer levels or float conductances in cell units.
    """
    rows = cells.cells.shape[-3]
    patterns = (np.arange(2**rows)[:, None] >> np.arange(rows)[None]) & 1  # [2^R, R]
    levels = cells.cells
    sums = jnp.einsum(
        "pr,...rkf->...pkf",
        jnp.asarray(patterns, jnp.float32),
        levels.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    codes = _codes(sums, levels.dtype, design, _under(gain), _under(shift))
    ones = jnp.asarray(patterns.sum(axis=1), jnp.int32).reshape((1,) * (sums.ndim - 3) + (-1, 1, 1))
    values = _combined(codes, ones, _under(cells.flip), design)
    return values if cells.negative is None else jnp.where(cells.negative[..., None, :], -values, values)


def table(x: Array, tables: Array | Cells, design: Design, cycle_weights: Sequence[int], *errors: Array) -> Array:
    """The product by look-up: x int32 `[n, B, R]`, tables `[B, 2^R, F]`, or cells from which each is built in turn.

    Returns:
      int32 `[n, F]` in units of 1/den, the offset not yet subtracted.
    """
    places = jnp.arange(x.shape[2], dtype=jnp.int32).reshape(1, -1, 1)
    filters = (tables.cells if isinstance(tables, Cells) else tables).shape[-1]

    def group(total: Array, step: tuple[Array, Array | Cells, tuple[Array, ...]]) -> tuple[Array, None]:
        block, entry, error = step
        made = build_table(entry, design, *error) if isinstance(entry, Cells) else entry
        at = jnp.sum(digits(block, design, len(cycle_weights)) << places, axis=1, dtype=jnp.int32)  # [T, n]
        for t, power in enumerate(cycle_weights):
            total = total + made[at[t]].astype(jnp.int32) * power
        return total, None

    steps = (x.transpose(1, 2, 0), tables, errors)
    return lax.scan(group, jnp.zeros((x.shape[0], filters), jnp.int32), steps)[0]


def folded(
    x: Array,
    cells: Cells,
    design: Design,
    cycle_weights: Sequence[int],
    gain: Array | None = None,
    shift: Array | None = None,
    read_noise: tuple[Array, float] | None = None,
    integer: bool = False,
) -> Array:
    """The product for any conductances: x int32 `[n, B, R]`, cells `[B, R, K, F]`, integer or float32 in cell units.

    Integer cells are converted in integers, so results are exact; `integer` also multiplies them as such. Gain and
    shift are of each column's ADC, `[B, K, F]`; read noise is (key, standard deviation of a column's sum in cell
    units), drawn for every conversion.

    Returns:
      int32 `[n, F]` in units of 1/den, the offset not yet subtracted.
    """
    groups, rows, columns, filters = cells.cells.shape
    n, cycles = x.shape[0], len(cycle_weights)
    powers = jnp.asarray(cycle_weights, jnp.int32)[:, None, None]

    def group(total: Array, step: tuple[Array, Cells, Array | None, Array | None, Array]) -> tuple[Array, None]:
        block, cell, gains, shifts, index = step
        cut = digits(block, design, cycles)
        left, right = cut.reshape(cycles * n, rows), cell.cells.reshape(rows, columns * filters)
        if integer:
            numbers = (((1,), (0,)), ((), ()))
            product = lax.dot_general(left.astype(jnp.int8), right, numbers, preferred_element_type=jnp.int32)
        else:
            wide = (left.astype(jnp.float32), right.astype(jnp.float32))
            product = jnp.matmul(*wide, precision=lax.Precision.HIGHEST)
        sums = product.reshape(cycles, n, columns, filters)
        dtype = cell.cells.dtype
        if read_noise is not None:
            key, sigma = read_noise
            sums = sums + sigma * jax.random.normal(jax.random.fold_in(key, index), sums.shape, jnp.float32)
            dtype = jnp.dtype(jnp.float32)
        lift = lambda v: None if v is None else v[None, None]
        codes = _codes(sums, dtype, design, lift(gains), lift(shifts))
        values = _combined(codes, jnp.sum(cut, axis=2, dtype=jnp.int32)[:, :, None, None], lift(cell.flip), design)
        return total + _signed(jnp.sum(values * powers, axis=0, dtype=jnp.int32), cell.negative), None

    steps = (x.transpose(1, 0, 2), cells, gain, shift, jnp.arange(groups, dtype=jnp.int32))
    return lax.scan(group, jnp.zeros((n, filters), jnp.int32), steps)[0]


def count_clipped(x: Array, cells: Cells, design: Design, cycles: int) -> Array:
    """Clipped conversions of each column, all cycles and inputs counted: int32 `[B, K, F]`; integer cells."""

    def group(step: tuple[Array, Array]) -> Array:
        block, cell = step
        cut = digits(block, design, cycles).astype(jnp.float32)
        sums = jnp.einsum("tnr,rkf->tnkf", cut, cell.astype(jnp.float32), precision=lax.Precision.HIGHEST)
        codes = unclipped(sums.astype(jnp.int32), design)
        return jnp.sum(codes != clip(codes, design), axis=(0, 1), dtype=jnp.int32)

    return lax.map(group, (x.transpose(1, 0, 2), cells.cells))


def _codes(sums: Array, dtype: jnp.dtype, design: Design, gain: Array | None, shift: Array | None) -> Array:
    """Codes of float32 sums; through integers where the cells are integers and the ADC has no error."""
    if gain is None and shift is None and jnp.issubdtype(dtype, jnp.integer):
        return convert(sums.astype(jnp.int32), design)
    sums = sums if gain is None else sums * gain
    return convert_float(sums if shift is None else sums + shift, design)


def _corrected(codes: Array, ones: Array, flip: Array | None, design: Design) -> Array:
    """Values of codes in units of 1/den; flipped columns give top x (sum of the digits) - value."""
    values = codes * design.adc.lsb.numerator
    if flip is None:
        return values
    return jnp.where(flip, (design.device.top * design.adc.lsb.denominator) * ones - values, values)


def _combined(codes: Array, ones: Array, flip: Array | None, design: Design) -> Array:
    """Values of a weight's columns, summed: `[..., K, F] -> [..., F]`."""
    values = _corrected(codes, ones, flip, design)
    weights = jnp.asarray(design.column_weights, jnp.int32).reshape((1,) * (values.ndim - 2) + (-1, 1))
    return jnp.sum(values * weights, axis=-2, dtype=jnp.int32)


def _signed(values: Array, negative: Array | None) -> Array:
    return values if negative is None else jnp.where(negative[None], -values, values)


def _under(v: Array | None) -> Array | None:
    """`[..., K, F] -> [..., 1, K, F]`, to meet an axis of patterns."""
    return None if v is None else v[..., None, :, :]
