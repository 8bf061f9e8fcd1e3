"""Designs of published engines. Each field has its source; what a paper does not say is marked."""

from fractions import Fraction

from compressx.crossbar.design import Adc, Design, Device

ISAAC_PAPER = 'A. Shafiee et al., "ISAAC", ISCA 2016'
PUMA_PAPER = 'A. Ankit et al., "PUMA", ASPLOS 2019'
FORMS_PAPER = 'G. Yuan et al., "FORMS", ISCA 2021, arXiv 2106.09144'
_OURS = "our choice; the paper does not say"

FORMS_FRAGMENTS = {4: 3, 8: 4, 16: 5}  # rows of a fragment: bits of its ADC; FORMS, section IV


def isaac() -> Design:
    """ISAAC: 128 x 128 arrays of 2-bit cells, 16-bit weights with an offset, 16-bit inputs, 8-bit ADC with flip.

    Returns:
      A `Design`, with the source of each field.

    Source: A. Shafiee et al., "ISAAC: A Convolutional Neural Network Accelerator with In-Situ Analog Arithmetic in
    Crossbars", 2016.

    Example:
      >>> design = compressx.crossbar.isaac()
      >>> design.slices, design.cycles, design.lossless_bits  # cells a weight, cycles an input, bits of its ADC
      (8, 16, 8)
    """
    return Design(
        name="ISAAC",
        device=Device(2, source=ISAAC_PAPER),
        adc=Adc(8, encoding="flip"),
        input_bits=16,
        inputs="twos_complement",
        weight_bits=16,
        sources=(
            ("rows, cols, active_rows, device, dac_bits", f"{ISAAC_PAPER}: 128 x 128, 2-bit cells, 1-bit DAC"),
            ("input_bits, weight_bits", f"{ISAAC_PAPER}: 16 bits, 16 input cycles of 100 ns"),
            ("adc", f"{ISAAC_PAPER}: log2(128) + 2 + 1 - 1 = 9 bits, less one by flipped columns"),
            ("signs", f"{ISAAC_PAPER}: w + 2^15 stored, 2^15 x (number of ones) subtracted"),
            ("inputs", f"two's complement with a negative top cycle: {_OURS}"),
        ),
    )


def forms(fragment: int = 8, encoding: str = "flip", weight_bits: int = 8) -> Design:
    """FORMS: polarized fragments of 4, 8 or 16 rows, one fragment active at a time, 3-, 4- or 5-bit ADC.

    Args:
      fragment: rows of a fragment. Other sizes that divide the array's 128 rows get the ADC that is lossless with
        flipped columns, which for 4, 8 and 16 is the paper's; their power and area are not known.
      encoding: "flip" makes the paper's ADC widths lossless (a worst-case sum of 3 m needs one bit more without it);
        the paper does not mention it. "saturating" takes the widths at face value; "ideal" never clips.
      weight_bits: bits of the magnitude. The paper says "8-bit weights" and keeps the sign elsewhere; whether the sign
        is one of the 8 is not said.

    Returns:
      A `Design`, with the source of each field.

    Raises:
      ValueError: the fragment does not divide 128 rows.

    Source: G. Yuan et al., "FORMS: Fine-grained Polarized ReRAM-based In-situ Computation for Mixed-signal DNN
    Accelerator", 2021, section IV.

    Example:
      >>> {m: compressx.crossbar.forms(m).adc.bits for m in (4, 8, 16)}
      {4: 3, 8: 4, 16: 5}
    """
    if not 1 <= fragment <= 128 or 128 % fragment:
        raise ValueError(f"a fragment must divide the 128 rows of FORMS' arrays, got {fragment}")
    device, published = Device(2, source=FORMS_PAPER), fragment in FORMS_FRAGMENTS
    bits = FORMS_FRAGMENTS[fragment] if published else (fragment * device.top // 2).bit_length()
    return Design(
        name=f"FORMS-{fragment}",
        active_rows=fragment,
        device=device,
        adc=Adc(bits, encoding=encoding),
        input_bits=16,
        weight_bits=weight_bits,
        signs="polarized",
        sources=(
            ("rows, cols, active_rows, device, dac_bits", f"{FORMS_PAPER}, section IV"),
            (
                "adc.bits",
                f"{FORMS_PAPER}, section IV: 3, 4, 5 bits for 4, 8, 16 rows"
                if published
                else f"lossless with flipped columns, as the paper's are for 4, 8, 16 rows: {_OURS}",
            ),
            ("adc.encoding", "flip is ISAAC's, added here: without it the stated widths are one bit short"),
            ("input_bits", f"{FORMS_PAPER}: 16-bit inputs, one bit a cycle"),
            ("weight_bits", f"{FORMS_PAPER}: 8 bits, four 2-bit cells"),
            ("inputs", f"unsigned, as after ReLU; signed inputs: 'sign_planes' ({_OURS})"),
        ),
    )


def prime_like() -> Design:
    """Like PRIME: 4-bit cells in pairs, inputs in two 3-bit halves, 6-bit outputs, positive minus negative array.

    Returns:
      A `Design`, with the source of each field.

    Source: P. Chi et al., "PRIME: A Novel Processing-in-memory Architecture for Neural Network Computation in
    ReRAM-based Main Memory", 2016.

    Example:
      >>> design = compressx.crossbar.prime_like()
      >>> design.columns_per_weight, design.cycles, design.signed_sums
      (4, 2, True)
    """
    paper = 'P. Chi et al., "PRIME", ISCA 2016'
    return Design(
        name="PRIME-like",
        device=Device(4, source=paper),
        adc=Adc(6, lsb=Fraction(512)),
        dac_bits=3,
        input_bits=6,
        weight_bits=8,
        signs="differential_analog",
        sources=(
            ("device, weight_bits", f"{paper}: two 4-bit cells a weight"),
            ("dac_bits, input_bits", f"{paper}: 6-bit inputs in two parts of 3 bits"),
            ("adc.bits", f"{paper}: 6-bit output"),
            ("adc.lsb", f"512, the power of two with which 128 rows cannot clip: {_OURS}"),
            ("signs", f"{paper}: one array for positive, one for negative weights; subtraction of currents: {_OURS}"),
            ("rows, cols, active_rows", "128 x 128 as the others, for comparison; not the paper's"),
        ),
    )


def puma_like() -> Design:
    """Like PUMA: ISAAC's array and ADC with 16-bit weights and inputs.

    Returns:
      A `Design`, with the source of each field.

    Source: A. Ankit et al., "PUMA: A Programmable Ultra-efficient Memristor-based Accelerator for Machine Learning
    Inference", 2019.

    Example:
      >>> design = compressx.crossbar.puma_like()
      >>> design.name, design.weight_bits, design.rows, design.cols
      ('PUMA-like', 16, 128, 128)
    """
    return isaac().but(
        name="PUMA-like",
        sources=(
            ("rows, cols, device, weight_bits, input_bits, dac_bits, adc.bits", f"{PUMA_PAPER}, simulator's defaults"),
            ("signs, adc.encoding, inputs", "as ISAAC; PUMA's simulator does not evaluate the array through the ADC"),
        ),
    )


PRESETS = {
    "isaac": isaac,
    "forms-4": lambda: forms(4),
    "forms-8": lambda: forms(8),
    "forms-16": lambda: forms(16),
    "prime-like": prime_like,
    "puma-like": puma_like,
}


def preset(name: str) -> Design:
    """The design of that name.

    Args:
      name: one of `PRESETS`.

    Returns:
      A `Design`.

    Raises:
      ValueError: there is none; the message lists the names.

    Example:
      >>> compressx.crossbar.preset("forms-8").active_rows
      8
    """
    if name not in PRESETS:
        raise ValueError(f"no design {name!r}; there are {', '.join(PRESETS)}, or build a Design(...)")
    return PRESETS[name]()
