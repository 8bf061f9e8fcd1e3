"""Published chips as sums of their parts: power, area and cycle time, each number with its source.

Sums reproduce the papers' totals to the digit; where the papers contradict themselves, `known_inconsistencies` says so.
"""

from dataclasses import dataclass, replace

from compressx.crossbar.presets import FORMS_PAPER, ISAAC_PAPER, PUMA_PAPER

_FORMS_III = f"{FORMS_PAPER}, table III"
_ISAAC_IMA = f"{ISAAC_PAPER}, table of parts"


@dataclass(frozen=True)
class Part:
    """A component of an MCU (the unit that holds a few arrays), all its instances together.

    Attributes:
      name: of the component.
      spec: how many, and of what size.
      mw: power in milliwatts.
      mm2: area in square millimetres.
      source: of both numbers.
      kind: how it follows a design (`scaling.fitted`): "adc", "dac", "hold", "array", "columns" (one for each column),
        "rows"; "" is the same for every design.

    Example:
      >>> adc = compressx.crossbar.isaac_chip().parts[0]
      >>> adc.name, adc.spec, adc.mw
      ('ADC', '8 x 8 bit, 1.2 GS/s', 16.0)
    """

    name: str
    spec: str
    mw: float
    mm2: float
    source: str
    kind: str = ""


@dataclass(frozen=True)
class Chip:
    """A chip of tiles of MCUs of arrays.

    Attributes:
      name: for reports.
      parts: of one MCU.
      digital_mw, digital_mm2: milliwatts and square millimetres of a tile outside its MCUs (buffer, bus, router,
        activation, pooling, output registers).
      cycle_ns: nanoseconds of one input cycle of one group of active rows: all columns of an array converted once.
      link_mw, link_mm2: of the chip's links (HyperTransport).
      mcus: of a tile.
      tiles: of the chip.
      arrays: of an MCU.
      overhead_stages: pipeline stages besides the input cycles; ISAAC's 22 stages are 16 input cycles and 6 others.
      pooling_stages: further stages where a layer pools (FORMS: 26 in all).
      array_rows, array_cols, adc_bits, dac_bits: of the arrays and converters that the parts were made for; where
        `adc_bits` is None, they are taken to be made for whatever design runs on them.
      notes: what was assumed.

    Example:
      >>> chip = compressx.crossbar.isaac_chip()
      >>> chip.total_arrays, round(chip.mw / 1000, 1), round(chip.mm2, 1)  # arrays, watts, mm2
      (16128, 65.8, 85.1)
    """

    name: str
    parts: tuple[Part, ...]
    digital_mw: float
    digital_mm2: float
    cycle_ns: float
    link_mw: float = 10400.0  # HyperTransport: FORMS, table IV, alike for ISAAC
    link_mm2: float = 22.88  # FORMS, table IV
    mcus: int = 12  # FORMS, section IV; ISAAC alike
    tiles: int = 168  # ISAAC; FORMS, table IV
    arrays: int = 8  # ISAAC: 8 arrays an IMA; FORMS, table III
    overhead_stages: int = 6  # ISAAC: 22 stages, 16 of them input cycles
    pooling_stages: int = 4  # FORMS, section IV: 26 stages with pooling
    array_rows: int = 128  # ISAAC, FORMS and PUMA alike
    array_cols: int = 128
    adc_bits: int | None = None
    dac_bits: int = 1
    notes: tuple[str, ...] = ()

    @property
    def mcu_mw(self) -> float:
        """Power of an MCU."""
        return sum(p.mw for p in self.parts)

    @property
    def mcu_mm2(self) -> float:
        """Area of an MCU."""
        return sum(p.mm2 for p in self.parts)

    @property
    def mcus_mw(self) -> float:
        """Power of a tile's MCUs."""
        return self.mcus * self.mcu_mw

    @property
    def tile_mw(self) -> float:
        """Power of a tile."""
        return self.mcus_mw + self.digital_mw

    @property
    def tile_mm2(self) -> float:
        """Area of a tile."""
        return self.mcus * self.mcu_mm2 + self.digital_mm2

    @property
    def mw(self) -> float:
        """Power of the chip, all parts on."""
        return self.tiles * self.tile_mw + self.link_mw

    @property
    def mm2(self) -> float:
        """Area of the chip."""
        return self.tiles * self.tile_mm2 + self.link_mm2

    @property
    def total_arrays(self) -> int:
        """Arrays on the chip."""
        return self.tiles * self.mcus * self.arrays

    def rows(self) -> list[dict[str, object]]:
        """The parts of an MCU as rows of a table."""
        return [
            {"part": p.name, "spec": p.spec, "mW": p.mw, "mm2": p.mm2, "source": p.source}
            for p in self.parts
        ]  # fmt: skip


def isaac_chip() -> Chip:
    """ISAAC as FORMS' tables list it, with the array power that makes its sum come out (2.40 mW, ISAAC's own).

    Returns:
      A `Chip` of 168 tiles of 12 MCUs of 8 arrays.

    Source: A. Shafiee et al., "ISAAC: A Convolutional Neural Network Accelerator with In-Situ Analog Arithmetic in
    Crossbars", 2016; as listed by G. Yuan et al., "FORMS", 2021, tables III and IV.

    Example:
      >>> round(compressx.crossbar.isaac_chip().tile_mw, 2)  # 288.96 mW of MCUs and 40.85 mW besides
      329.81
    """
    return Chip(
        "ISAAC",
        parts=(
            Part("ADC", "8 x 8 bit, 1.2 GS/s", 16.0, 0.0096, _FORMS_III, "adc"),
            Part("DAC", "8 x 128, 1 bit", 4.0, 0.00017, _FORMS_III, "dac"),
            Part("sample and hold", "8 x 128", 0.01, 0.00004, _FORMS_III, "hold"),
            # FORMS prints 2.43 mW; with it the tile would be 289.32 mW, not the 288.96 mW of table IV
            Part(
                "arrays",
                "8, 128 x 128, 2-bit cells",
                2.40,
                0.0002,
                "8 x 0.3 mW, 2.5e-5 mm2: constants of PUMA's simulator (2019), after ISAAC",
                "array",
            ),
            Part("shift and add", "4", 0.2, 0.00024, f"{_FORMS_III}; area {_ISAAC_IMA}", "columns"),
            Part("input register", "", 1.24, 0.0021, _ISAAC_IMA, "rows"),
            Part("output register", "", 0.23, 0.00077, _ISAAC_IMA, "columns"),
        ),
        adc_bits=8,
        digital_mw=40.85,  # FORMS, table IV
        digital_mm2=0.213,  # FORMS, table IV
        cycle_ns=100.0,  # ISAAC: 100 ns; 128 columns at 1.2 GS/s would be 106.7 ns
        notes=("cycle of 100 ns as ISAAC states; one ADC for 128 columns at 1.2 GS/s would take 106.7 ns",),
    )


def forms_chip() -> Chip:
    """FORMS with fragments of 8; `scaling.fitted` makes the converters of 4 and 16, which the paper does not list.

    Returns:
      A `Chip` of 168 tiles of 12 MCUs of 8 arrays.

    Source: G. Yuan et al., "FORMS: Fine-grained Polarized ReRAM-based In-situ Computation for Mixed-signal DNN
    Accelerator", 2021, tables III and IV, cycle time from section IV.

    Example:
      >>> chip = compressx.crossbar.forms_chip()
      >>> round(chip.mcus_mw, 2), round(chip.cycle_ns, 2)  # mW of a tile's MCUs as the paper states it; ns
      (280.05, 15.24)
    """
    return Chip(
        "FORMS",
        parts=(
            Part("ADC", "32 x 4 bit, 2.1 GS/s", 15.2, 0.0091, _FORMS_III, "adc"),
            Part("DAC", "8 x 128, 1 bit", 4.0, 0.00017, _FORMS_III, "dac"),
            Part("sample and hold", "8 x 128", 0.0055, 0.000023, _FORMS_III, "hold"),
            Part("arrays", "8, 128 x 128, 2-bit cells", 2.44, 0.00024, _FORMS_III, "array"),
            Part("shift and add", "4", 0.2, 0.00024, f"{_FORMS_III}; area {_ISAAC_IMA} (0.000024 in FORMS)", "columns"),
            Part("skip logic", "", 0.01, 1e-7, _FORMS_III, "rows"),
            Part("sign indicator", "", 0.012, 3.1e-6, _FORMS_III, "columns"),
            Part("input register", "", 1.24, 0.0021, f"{_ISAAC_IMA}; not listed by FORMS, needed for its sum", "rows"),
            Part("output register", "", 0.23, 0.00077, f"{_ISAAC_IMA}; as the input register", "columns"),
        ),
        digital_mw=53.05,  # FORMS, table IV
        digital_mm2=0.25,  # FORMS, table IV
        adc_bits=4,
        cycle_ns=128 / (4 * 2.1),  # FORMS, section IV: 4 ADCs an array, 32 columns each, 2.1 GS/s: 15.24 ns
        notes=(
            "parts are those of fragment size 8; the ADCs of other sizes have the same rate",
            "a cycle converts one fragment; all 128 rows take 128 / fragment cycles for every input bit",
        ),
    )


def puma_chip() -> Chip:
    """PUMA from its published totals; what these do not separate is one part, and the cycle follows from its peak.

    A core has 2 units of 128 x 128 16-bit weights, 8 arrays of 2-bit cells each. The peak of 52.31 TOPS over
    138 x 8 x 2 units x 2 x 128 x 128 operations gives 1383 ns a product, a sixteenth of it a cycle.
    """
    tile_mw, tile_mm2, core_mw, core_mm2, cores, tiles = 373.8, 0.479, 42.37, 0.036, 8, 138
    product_ns = tiles * cores * 2 * 2 * 128 * 128 / 52.31e12 * 1e9
    return Chip(
        "PUMA",
        parts=(Part("core", "2 units of 8 arrays, with all that drives them", core_mw, core_mm2, PUMA_PAPER),),
        digital_mw=tile_mw - cores * core_mw,
        digital_mm2=tile_mm2 - cores * core_mm2,
        cycle_ns=product_ns / 16,
        link_mw=62500.0 - tiles * tile_mw,
        link_mm2=90.6 - tiles * tile_mm2,
        mcus=cores,
        tiles=tiles,
        arrays=16,
        adc_bits=8,
        notes=(
            "PUMA: the cycle follows from the stated peak; links are what the stated chip has beyond its tiles",
            "PUMA: pipeline stages are taken from ISAAC",
        ),
    )


def prime_like_chip() -> Chip:
    """PRIME's way of computing on ISAAC's parts: PRIME publishes no table of parts. For orientation alone."""
    isaac = isaac_chip()
    note = "PRIME-like: power, area and cycle are ISAAC's, 3 input bits a cycle; PRIME publishes no table of parts"
    return replace(isaac, name="PRIME-like on ISAAC's parts", adc_bits=6, dac_bits=3, notes=(note,))


CHIPS = {"isaac": isaac_chip, "forms": forms_chip, "puma": puma_chip, "prime_like": prime_like_chip}


@dataclass(frozen=True)
class Inconsistency:
    """Where a paper contradicts itself or its source: what it says, and what follows from its other numbers."""

    where: str
    stated: str
    recomputed: str
    treatment: str


def known_inconsistencies() -> tuple[Inconsistency, ...]:
    """The contradictions found in FORMS' hardware numbers, recomputed here from the same tables.

    Returns:
      One `Inconsistency` for each: where, what is stated, what follows from other numbers, how it is treated here.

    Example:
      >>> found = compressx.crossbar.known_inconsistencies()
      >>> [(i.stated, i.recomputed) for i in found if i.where == "text, chip power against ISAAC"]
      [('+0.08 %', '+0.84 %')]
    """
    forms, isaac = forms_chip(), isaac_chip()
    stated_area = 12 * (forms.mcu_mm2 - 0.00024 + 0.000024)
    printed = 12 * (isaac.mcu_mw - 2.40 + 2.43)
    return (
        Inconsistency(
            "table III, ADC bits",
            "3, 4, 5 bits for fragments of 4, 8, 16",
            "largest sums 12, 24, 48 need 4, 5, 6 bits; with ISAAC's flipped columns 6, 12, 24 fit 3, 4, 5",
            "three ADC modes: ideal, flip (lossless), saturating (as stated)",
        ),
        Inconsistency(
            "table III, shift and add",
            "0.000024 mm2",
            f"12 MCUs would take {stated_area:.4f} mm2; {12 * forms.mcu_mm2:.4f} with ISAAC's 0.00024; stated 0.152",
            "0.00024 mm2 used",
        ),
        Inconsistency(
            "table IV, area of FORMS' tile",
            "0.39 mm2, and 66.27 for 168 tiles",
            f"MCUs and digital unit as stated are 0.152 + 0.25 = 0.402; 168 tiles {168 * forms.tile_mm2:.2f}, "
            f"chip {forms.mm2:.2f} instead of 89.15",
            "sum of the parts used",
        ),
        Inconsistency(
            "table III, ISAAC's arrays",
            "2.43 mW",
            f"12 MCUs would take {printed:.2f} mW; with ISAAC's 2.40 mW {isaac.mcus_mw:.2f}, as table IV says",
            "2.40 mW used",
        ),
        Inconsistency(
            "table III, registers",
            "not listed",
            f"12 MCUs take {12 * (forms.mcu_mw - 1.24 - 0.23):.2f} mW without, {forms.mcus_mw:.2f} with ISAAC's; "
            "stated 280.05",
            "registers added",
        ),
        Inconsistency(
            "text, chip power against ISAAC",
            "+0.08 %",
            f"{100 * (forms.mw / isaac.mw - 1):+.2f} %",
            "tables used",
        ),
        Inconsistency(
            "text, chip area against ISAAC",
            "+4.5 %",
            f"{100 * (89.15 / 85.09 - 1):+.2f} % from table IV",
            "tables used",
        ),
        Inconsistency(
            "table V, polarization only, fragment 8",
            "0.54 of ISAAC's GOPS/s/mm2, 0.61 of its GOPS/W",
            "0.39 and 0.41 from cycle time, sweep, area and power; fragment 16 agrees (0.77, 0.84 against 0.78, 0.82)",
            "computed value reported; the table holds a factor that is not stated",
        ),
        Inconsistency(
            "text, fragment 16 against 8",
            "+42 % (29 %)",
            f"{100 * (0.77 / 0.54 - 1):+.0f} % ({100 * (0.84 / 0.61 - 1):+.0f} %) from the table",
            "table used",
        ),
        Inconsistency(
            "headline ratios",
            "1.50x and 1.93x the throughput per area and per watt",
            f"fragment 16: {39.48 / 26.4:.2f}x, {51.26 / 26.61:.2f}x; "
            f"fragment 8: {36.02 / 26.4:.2f}x, {27.73 / 26.61:.2f}x",
            "the size is named with every ratio",
        ),
        Inconsistency(
            "frames per second with zero skipping, fragment 8",
            "3.4x on the best network",
            "16 input cycles / mean effective cycles of 10.7 and more is at most 1.5x",
            "all-zero fragments count 0 cycles here, and this is said; see zero_skip",
        ),
    )
