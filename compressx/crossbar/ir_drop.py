"""Wire resistance: the exact linear circuit of an array, solved by elimination row by row, differentiable and batched.

The circuit, for N word lines (rows) and M bit lines (columns):

    driver i -- r_word -- V[i,0] -- r_word -- V[i,1] ... V[i,M-1]        word line i, driven on the left
    V[i,j] -- cell conductance G[i,j] -- U[i,j]
    U[0,j] -- r_bit -- U[1,j] -- ... -- U[N-1,j] -- r_bit -- ground      bit line j, sensed at the bottom

The far ends are open. The sense amplifier is a virtual ground, the driver an ideal source behind one segment. Currents
are linear in the voltages, so all of it is one effective conductance matrix: current[j] = sum_i v[i] * Geff[i, j].

With W the Laplacian of a word line (its driver segment included), A_i = D_i (W + D_i)^-1 W is what row i loads the bit
lines with (D_i = diag G[i]), b_i = D_i (W + D_i)^-1 e_0 / r_word what its driver injects, and the bit lines above row i
are an admittance Y_i:

    Y_i = A_i + Y_(i-1) (1 + r_bit Y_(i-1))^-1,     injections pass a row as  J_i = (1 + r_bit Y_(i-1))^-T J_(i-1) + b_i

written without a difference of large numbers, so that float32 suffices. O(N M^3).
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from compressx.crossbar.arrays import Programmed, with_cells


def effective_conductance(g: Array, r_word: float, r_bit: float) -> Array:
    """The conductance matrix that an array with wires shows: `[N, M] -> [N, M]`, in the unit of g.

    Args:
      g: cell conductances, non-negative, in 1/unit of the resistances (siemens for ohm).
      r_word, r_bit: resistance of a segment between neighbouring cells, at least 0.

    Returns:
      Geff, with current[j] = sum_i v[i] Geff[i, j]; g itself where both resistances are 0. float32 or float64 as g.

    Raises:
      ValueError: a resistance is negative.

    Example:
      >>> g = jnp.full((1, 1), 0.5)  # one cell of 2 ohm between two segments of 1 ohm: 4 ohm in all
      >>> float(compressx.crossbar.effective_conductance(g, r_word=1.0, r_bit=1.0)[0, 0])
      0.25
    """
    if r_word < 0 or r_bit < 0:
        raise ValueError(f"resistances must be at least 0, got r_word={r_word}, r_bit={r_bit}")
    columns = g.shape[1]
    eye = jnp.eye(columns, dtype=g.dtype)
    first = jnp.zeros(columns, g.dtype).at[0].set(1.0)
    # word lines: Laplacian times r_word; every node has a neighbour to its left (the driver for the first)
    line = np.diag(np.r_[np.full(columns - 1, 2.0), 1.0]) - np.eye(columns, k=1) - np.eye(columns, k=-1)
    laplacian = jnp.asarray(line, g.dtype)

    def word_line(row: Array) -> tuple[Array, Array]:
        """A_i and b_i."""
        if r_word == 0:
            return jnp.diag(row), row
        # (W + D)^-1 W = (L + r D)^-1 L and (W + D)^-1 e_0 / r = (L + r D)^-1 e_0
        solved = jnp.linalg.solve(laplacian + r_word * jnp.diag(row), jnp.concatenate([laplacian, first[:, None]], 1))
        return row[:, None] * solved[:, :columns], row * solved[:, columns]

    def add_row(carry: tuple[Array, Array], step: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        admittance, injected = carry
        row, index = step
        load, source = word_line(row)
        # both through the segment above: Y (1 + r Y)^-1 and J (1 + r Y)^-1 (Y is symmetric)
        both = jnp.concatenate([admittance, injected], axis=0)
        passed = jnp.linalg.solve((eye + r_bit * admittance).T, both.T).T
        injected = passed[columns:].at[index].add(source)
        return (load + passed[:columns], injected), None

    start = (jnp.zeros((columns, columns), g.dtype), jnp.zeros(g.shape, g.dtype))
    (admittance, injected), _ = lax.scan(add_row, start, (g, jnp.arange(g.shape[0], dtype=jnp.int32)))
    return jnp.linalg.solve((eye + r_bit * admittance).T, injected.T).T


def with_wires(
    programmed: Programmed, r_on: float | None, r_word: float, r_bit: float, filters_per_array: int
) -> Programmed:
    """The same weights as cells seen through wires, each physical array solved on its own.

    Cells are those of one group of active rows: groups that share an array are not driven together, but the idle rows'
    segments of the bit line below them are left out, which flatters designs with small groups. Cells meet the wires
    with their leak; what the reference subtracts afterwards is the leak of cells without wires.

    Args:
      programmed: arrays of unsigned cells, ideal or perturbed, from `program(..., prove=False)`.
      r_on: resistance of the highest level in ohm; a cell unit is 1 / (r_on * top) siemens. None: the device's.
      r_word, r_bit: ohm of a segment.
      filters_per_array: filters whose columns lie side by side in an array; the last array may hold fewer.

    Returns:
      `Programmed` whose cells are effective conductances, float32 in cell units.

    Raises:
      ValueError: the design subtracts currents (`differential_analog`), or columns of `programmed` are proven.

    Example:
      >>> from compressx import crossbar
      >>> from compressx.crossbar.program import program
      >>> arrays = program([[1]], crossbar.Design(rows=1, active_rows=1, weight_bits=2, signs="polarized"), prove=False)
      >>> seen = crossbar.with_wires(arrays, r_on=1e3, r_word=1e3, r_bit=1e3, filters_per_array=1)
      >>> round(float(seen.cells.cells[0, 0, 0, 0]), 2)  # level 1 of 0..3: a cell of 3 kOhm behind 2 kOhm of wire
      0.6
    """
    design = programmed.design
    if design.signed_sums:
        raise ValueError("analog pairs are two arrays; solve effective_conductance for each and subtract")
    r_on = design.device.r_on if r_on is None else r_on
    if r_on is None or not r_on > 0:
        raise ValueError(f"r_on={r_on}: give the resistance of the highest level in ohm, or a Device that states one")
    unit = 1.0 / (r_on * design.device.top)
    leak = jnp.where(programmed.driven, programmed.leak, 0.0)[:, :, None, None].astype(jnp.float32)
    cells = programmed.cells.cells.astype(jnp.float32) + leak
    groups, rows, columns, filters = cells.shape
    parts = []
    for start in range(0, filters, filters_per_array):
        part = cells[..., start : start + filters_per_array]
        width = part.shape[3]
        flat = part.transpose(0, 1, 3, 2).reshape(groups, rows, width * columns)  # a weight's slices side by side
        seen = lax.map(lambda g: effective_conductance(g * unit, r_word, r_bit) / unit, flat)
        parts.append(seen.reshape(groups, rows, width, columns).transpose(0, 1, 3, 2))
    return with_cells(
        programmed,
        jnp.concatenate(parts, axis=3) - leak,
        gain=programmed.gain,
        shift=programmed.shift,
        read_noise=programmed.read_noise,
    )
