"""A chip's parts for a design that its tables do not hold: what follows what, by stated rules, or a refusal.

    ADC           one law through the two converters of the papers (ISAAC 8 bits, FORMS 4), per conversion:
                  energy(b) = energy(8) * (a b / 8 + (1 - a) 2^(b - 8)),  area alike with a constant of its own;
                  their number follows the columns of an array, so that a cycle stays as long as it is
    DAC, input registers, skip logic             follow the rows of an array
    sample and hold, shift and add, output registers, signs     follow its columns
    arrays        follow rows x columns

A linear part (reference, memory, clock) and an exponential one (the capacitive DAC) are how ISAAC scaled its ADC. The
shares a are solved from the two published converters, so that the law passes through both; beyond 3 to 9 bits it is an
extrapolation, and the plan says so. Digital units and links stay. Nothing follows the bits of a cell or of a weight.

Sources: A. Shafiee et al., "ISAAC", 2016; G. Yuan et al., "FORMS", 2021, table III.
"""

from dataclasses import replace

from compressx.crossbar.chips import Chip, Part
from compressx.crossbar.design import Design

# (mW of a converter / its GS/s = pJ a conversion, mm2), of FORMS' table III.
_FOUR = (15.2 / 32 / 2.1, 0.0091 / 32)
_EIGHT = (16.0 / 8 / 1.2, 0.0096 / 8)


def _share(four: float, eight: float) -> float:
    """The linear share a with which the law passes through both converters."""
    return (four / eight - 2.0**-4) / (4 / 8 - 2.0**-4)


_LINEAR = tuple(_share(four, eight) for four, eight in zip(_FOUR, _EIGHT, strict=True))


def adc_law(bits: int) -> tuple[float, float]:
    """Energy of a conversion and area of a converter at the same rate, as shares of ISAAC's 8-bit one.

    Args:
      bits: of the converter.

    Returns:
      (energy, area), each 1 at 8 bits.

    Example:
      >>> from compressx.crossbar.scaling import adc_law
      >>> [round(v, 3) for v in adc_law(4)]  # FORMS' converter: 0.226 of 1.667 pJ, 284 of 1200 um2
      [0.136, 0.237]
    """
    energy, area = (a * bits / 8 + (1 - a) * 2.0 ** (bits - 8) for a in _LINEAR)
    return energy, area


def fitted(chip: Chip, design: Design) -> Chip:
    """The chip with the parts that a design needs; the chip itself where its tables hold it.

    Args:
      chip: of `chips`, or of one's own that says what its parts were made for and of which kinds they are.
      design: gives rows and columns of an array and the bits of the converters.

    Returns:
      A chip with a note that says what was scaled.

    Raises:
      ValueError: no rule leads there: another DAC, or a chip whose parts are not told apart.

    Example:
      >>> from compressx.crossbar.chips import isaac_chip
      >>> from compressx.crossbar.presets import isaac
      >>> [round(fitted(isaac_chip(), isaac().but(adc_bits=b)).mw / 1e3, 1) for b in (4, 8, 12)]
      [37.9, 65.8, 471.4]
    """
    asked = (design.rows, design.cols, design.adc.bits, design.dac_bits)
    has = (chip.array_rows, chip.array_cols, chip.adc_bits, chip.dac_bits)
    if asked == has or chip.adc_bits is None:
        return chip
    what = f"design {design.name} has {asked[0]} x {asked[1]} arrays, {asked[2]}-bit ADCs and {asked[3]}-bit DACs, "
    what += f"{chip.name}'s tables {has[0]} x {has[1]}, {has[2]} and {has[3]}"
    if design.dac_bits != chip.dac_bits:
        raise ValueError(f"{what}: there is no rule for another DAC; take a chip that has it, or build a Chip")
    if not any(part.kind == "adc" for part in chip.parts):
        raise ValueError(f"{what}: its parts are not told apart, so they cannot be scaled; build a Chip of parts")
    new, old = adc_law(design.adc.bits), adc_law(chip.adc_bits)
    rows, columns = design.rows / chip.array_rows, design.cols / chip.array_cols
    factors = {
        "adc": (columns * new[0] / old[0], columns * new[1] / old[1]),
        "dac": (rows, rows),
        "rows": (rows, rows),
        "hold": (columns, columns),
        "columns": (columns, columns),
        "array": (rows * columns, rows * columns),
        "": (1.0, 1.0),
    }

    def part(p: Part) -> Part:
        power, area = factors[p.kind]
        return p if power == area == 1 else replace(p, mw=p.mw * power, mm2=p.mm2 * area, spec=f"{p.spec}, scaled")

    far = "" if 3 <= design.adc.bits <= 9 else "; the ADC's law is an extrapolation there"
    note = f"{what}: parts scaled by the rules of crossbar.scaling{far}"
    return replace(
        chip,
        parts=tuple(part(p) for p in chip.parts),
        array_rows=design.rows,
        array_cols=design.cols,
        adc_bits=design.adc.bits,
        notes=(*chip.notes, note),
    )
