"""What a crossbar engine is: cells, converters and the way signs are stored, as frozen records.

Everything is counted in cell units: a cell of b bits holds an integer 0..2^b - 1, a column's analog sum is the integer
sum of (input digit x cell), and the ADC maps this integer to a code. Widths along the chain are properties here.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from typing import Any

ENCODINGS = ("ideal", "flip", "saturating")
SIGNS = ("offset", "differential_digital", "differential_analog", "polarized")
INPUTS = ("unsigned", "twos_complement", "sign_planes")


@dataclass(frozen=True)
class Adc:
    """The converter at the foot of a column, defined in integers.

        code(S) = clip(floor(S / lsb + 1/2), low, high),    value = code * lsb

    so a tie between two codes goes up (towards +infinity). With lsb = num/den this is the integer quotient
    floor((2 S den + num) / (2 num)): no float enters.

    Attributes:
      bits: width of the code, at least 1. In "ideal" mode it counts for area and power only.
      lsb: size of a step in cell units, an exact rational.
      encoding: "ideal": no clip, as if the code were as wide as needed; "saturating": clips; "flip": clips, but a
        column whose cells sum to more than half of the possible sum is stored as (largest level - cell) and corrected
        digitally, which halves the largest sum (ISAAC).
      low, high: ends of the clip range in codes; None: 0..2^bits - 1, or -2^(bits-1)..2^(bits-1) - 1 where sums are
        signed (sign scheme "differential_analog").

    Raises:
      ValueError: bits, step, encoding or clip range is not possible.

    Source: encoding "flip": A. Shafiee et al., "ISAAC", 2016.

    Example:
      >>> from compressx import crossbar
      >>> crossbar.Adc(4).limits(signed=False), crossbar.Adc(4).limits(signed=True)
      ((0, 15), (-8, 7))
    """

    bits: int
    lsb: Fraction = Fraction(1)
    encoding: str = "saturating"
    low: int | None = None
    high: int | None = None

    def __post_init__(self) -> None:
        if self.bits < 1 or self.bits > 24:
            raise ValueError(f"ADC bits must be in 1..24, got {self.bits}; for no clipping say encoding='ideal'")
        if self.encoding not in ENCODINGS:
            raise ValueError(f"ADC encoding must be one of {', '.join(ENCODINGS)}, got {self.encoding!r}")
        if not isinstance(self.lsb, (int, Fraction)) or self.lsb <= 0:
            raise ValueError(f"ADC lsb must be a positive int or Fraction (exact), got {self.lsb!r}")
        object.__setattr__(self, "lsb", Fraction(self.lsb))
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"ADC clip range is empty: low={self.low}, high={self.high}")

    def limits(self, signed: bool) -> tuple[int, int]:
        """The clip range in codes."""
        low, high = (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if signed else (0, 2**self.bits - 1)
        return (low if self.low is None else self.low), (high if self.high is None else self.high)


@dataclass(frozen=True)
class Device:
    """A memory cell: how many bits it holds and how far its conductance can swing.

    Attributes:
      cell_bits: bits of a cell, 1..6; levels are evenly spaced in conductance.
      r_on, r_off: resistances of the top and the bottom level in ohm; None where no source gives them. They set the
        on/off ratio of `noise.Variation` and the conductances of `ir_drop`; the ideal simulation needs neither.
      source: where the numbers come from.

    Raises:
      ValueError: the bits are not in 1..6, or not 0 < r_on < r_off.

    Example:
      >>> compressx.crossbar.Device(cell_bits=2).top
      3
    """

    cell_bits: int = 2
    r_on: float | None = None
    r_off: float | None = None
    source: str = "chosen by the user"

    def __post_init__(self) -> None:
        if not 1 <= self.cell_bits <= 6:
            raise ValueError(f"cell_bits must be in 1..6, got {self.cell_bits}")
        if self.r_on is not None and self.r_off is not None and not 0 < self.r_on < self.r_off:
            raise ValueError(f"resistances must obey 0 < r_on < r_off, got r_on={self.r_on}, r_off={self.r_off}")

    @property
    def top(self) -> int:
        """The highest level."""
        return 2**self.cell_bits - 1


@dataclass(frozen=True)
class Design:
    """How weights and inputs meet in a crossbar.

    Attributes:
      name: for reports.
      rows, cols: size of a physical array, in cells.
      active_rows: rows driven together; the m of FORMS' fragments. `rows` is a multiple of it.
      device: the cell.
      adc: the converter.
      dac_bits: bits of an input that are applied in a cycle.
      input_bits: bits of an input; the simulation takes up to 16, counting and cost up to 32 (weights alike).
      inputs: "unsigned"; "twos_complement" (the top bit counts negative; 1-bit DAC only); "sign_planes" (positive and
        negative parts one after the other, twice the cycles).
      weight_bits: bits of a stored weight: the sign is one of them with "offset", and it is not one of them with the
        other schemes, which store magnitudes.
      signs: "offset" stores w + 2^(weight_bits-1) and subtracts 2^(weight_bits-1) x (sum of the inputs), counted by a
        unit column, whose reading is exact (ISAAC); "differential_digital" has positive and negative
        magnitudes in two sets of columns and subtracts codes; "differential_analog" subtracts currents before the ADC,
        whose codes are then signed; "polarized" has magnitudes of one sign in every group of `active_rows` rows, and a
        sign bit that adds or subtracts the code (FORMS, section IV).
      sources: (field, source) pairs of what a preset sets.

    Raises:
      ValueError: a field is out of range, or fields exclude each other; the message names design and field.

    Source: the scheme "offset" and the sliced weights: A. Shafiee et al., "ISAAC", 2016; "polarized": G. Yuan et
    al., "FORMS", 2021, section IV; pairs of arrays: P. Chi et al., "PRIME", 2016.

    Example:
      >>> from compressx import crossbar
      >>> design = crossbar.Design(rows=64, cols=64, active_rows=8, weight_bits=4, signs="polarized")
      >>> design.slices, design.groups, design.cycles, design.lossless_bits
      (2, 8, 8, 5)
    """

    name: str = "custom"
    rows: int = 128
    cols: int = 128
    active_rows: int = 128
    device: Device = Device()
    adc: Adc = Adc(8)
    dac_bits: int = 1
    input_bits: int = 8
    inputs: str = "unsigned"
    weight_bits: int = 8
    signs: str = "offset"
    sources: tuple[tuple[str, str], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name, low, high in (
            ("rows", 1, 4096),
            ("cols", 1, 4096),
            ("active_rows", 1, self.rows),
            ("dac_bits", 1, 8),
            ("input_bits", 1, 32),
            ("weight_bits", 1, 32),
        ):
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"design {self.name}: {name} must be in {low}..{high}, got {getattr(self, name)}")
        if self.rows % self.active_rows:
            raise ValueError(
                f"design {self.name}: rows={self.rows} is not a multiple of active_rows={self.active_rows}"
            )
        if self.signs not in SIGNS:
            raise ValueError(f"design {self.name}: signs must be one of {', '.join(SIGNS)}, got {self.signs!r}")
        if self.inputs not in INPUTS:
            raise ValueError(f"design {self.name}: inputs must be one of {', '.join(INPUTS)}, got {self.inputs!r}")
        if self.inputs == "twos_complement" and self.dac_bits != 1:
            raise ValueError(
                f"design {self.name}: two's complement inputs need dac_bits=1, got {self.dac_bits}; "
                "use inputs='sign_planes'"
            )
        if self.signs == "differential_analog" and self.adc.encoding == "flip":
            raise ValueError(
                f"design {self.name}: flip encoding needs unsigned sums; analog subtraction has signed ones"
            )
        if self.columns_per_weight > self.cols:
            raise ValueError(
                f"design {self.name}: a weight takes {self.columns_per_weight} columns, an array has {self.cols}"
            )
        largest = 2 * self.largest_sum * self.adc.lsb.denominator + self.adc.lsb.numerator
        if largest >= 2**31:
            raise ValueError(
                f"design {self.name}: column sums up to {self.largest_sum} with lsb={self.adc.lsb} overflow"
            )

    @property
    def slices(self) -> int:
        """Cells that a magnitude is cut into, lowest bits first."""
        return ceil(self.weight_bits / self.device.cell_bits)

    @property
    def column_weights(self) -> tuple[int, ...]:
        """What the code of each of a weight's columns is multiplied with."""
        powers = tuple(2 ** (self.device.cell_bits * s) for s in range(self.slices))
        return powers + tuple(-p for p in powers) if self.signs == "differential_digital" else powers

    @property
    def columns_per_weight(self) -> int:
        """Physical columns that a weight takes; both arrays of a differential pair are counted."""
        return self.slices * (2 if self.signs.startswith("differential") else 1)

    @property
    def signed_sums(self) -> bool:
        """Whether the ADC sees negative sums."""
        return self.signs == "differential_analog"

    @property
    def largest_sum(self) -> int:
        """The largest column sum there can be, in cell units, before any flip."""
        return self.active_rows * (2**self.dac_bits - 1) * self.device.top

    @property
    def lossless_bits(self) -> int:
        """ADC bits that never clip at lsb 1, whatever the weights: of half the largest sum with flip encoding."""
        largest = self.largest_sum // 2 if self.adc.encoding == "flip" else self.largest_sum
        return largest.bit_length() + int(self.signed_sums)

    @property
    def cycles(self) -> int:
        """Input cycles of a group of rows, sign planes not counted."""
        return ceil(self.input_bits / self.dac_bits)

    @property
    def cycle_weights(self) -> tuple[int, ...]:
        """What the result of each input cycle is multiplied with; lowest digit first."""
        powers = [2 ** (self.dac_bits * t) for t in range(self.cycles)]
        if self.inputs == "twos_complement":
            powers[-1] = -powers[-1]
        return tuple(powers)

    @property
    def input_range(self) -> tuple[int, int]:
        """Smallest and largest input."""
        if self.inputs == "unsigned":
            return 0, 2**self.input_bits - 1
        if self.inputs == "twos_complement":
            return -(2 ** (self.input_bits - 1)), 2 ** (self.input_bits - 1) - 1
        return -(2**self.input_bits - 1), 2**self.input_bits - 1

    @property
    def weight_range(self) -> tuple[int, int]:
        """Smallest and largest integer weight."""
        if self.signs == "offset":
            return -(2 ** (self.weight_bits - 1)), 2 ** (self.weight_bits - 1) - 1
        return -(2**self.weight_bits - 1), 2**self.weight_bits - 1

    @property
    def groups(self) -> int:
        """Groups of rows that an array is swept through for one input."""
        return self.rows // self.active_rows

    def but(self, **changes: Any) -> "Design":
        """This design with some fields changed; `encoding=` and `adc_bits=` reach into the ADC."""
        adc = {k: changes.pop(a) for a, k in (("encoding", "encoding"), ("adc_bits", "bits")) if a in changes}
        if adc:
            changes["adc"] = replace(changes.get("adc", self.adc), **adc)
        return replace(self, **changes)
