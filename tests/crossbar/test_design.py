"""Design records: what they refuse, the widths along the chain, and the presets' published widths."""

from fractions import Fraction

import pytest

from compressx.crossbar import design, presets
from compressx.crossbar.design import Adc, Design, Device


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Adc(0), "ADC bits"),
        (lambda: Adc(8, encoding="none"), "encoding must be one of"),
        (lambda: Adc(8, lsb=0.5), "exact"),  # type: ignore[arg-type]
        (lambda: Adc(8, lsb=Fraction(-1)), "positive"),
        (lambda: Adc(8, low=3, high=1), "clip range is empty"),
        (lambda: Device(0), "cell_bits"),
        (lambda: Device(2, r_on=2.0, r_off=1.0), "r_on < r_off"),
        (lambda: Design(rows=100, active_rows=8), "multiple of active_rows"),
        (lambda: Design(signs="both"), "signs must be one of"),
        (lambda: Design(inputs="float"), "inputs must be one of"),
        (lambda: Design(inputs="twos_complement", dac_bits=2), "sign_planes"),
        (lambda: Design(signs="differential_analog", adc=Adc(8, encoding="flip")), "unsigned sums"),
        (lambda: Design(cols=2), "takes 4 columns"),
        (lambda: Design(adc=Adc(8, lsb=Fraction(1, 2**23))), "overflow"),
        (lambda: presets.forms(5), "must divide the 128 rows of FORMS' arrays, got 5"),
        (lambda: presets.forms(256), "must divide"),
        (lambda: presets.preset("tpu"), "isaac"),
    ],
)
def test_refuses(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_isaac_widths():
    d = presets.isaac()
    assert d.largest_sum == 384 and d.slices == 8 and d.cycles == 16 and d.columns_per_weight == 8
    assert d.lossless_bits == 8  # with flip
    assert d.but(encoding="saturating").lossless_bits == 9


@pytest.mark.parametrize(("fragment", "bits"), [(4, 3), (8, 4), (16, 5)])
def test_forms_widths_need_the_flip(fragment, bits):
    d = presets.forms(fragment)
    assert d.adc.bits == bits == d.lossless_bits
    assert d.but(encoding="saturating").lossless_bits == bits + 1
    assert d.groups == 128 // fragment and d.slices == 4


def test_prime_cannot_clip():
    d = presets.prime_like()
    assert d.largest_sum / d.adc.lsb < 2**5 - 1


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_name_their_sources(name):
    d = presets.preset(name)
    named = " ".join(field for field, _ in d.sources)
    for field in ("rows", "device", "adc", "input_bits", "weight_bits", "dac_bits"):
        assert field in named
    assert hash(d) == hash(presets.preset(name)) and d == presets.preset(name)


def test_ranges():
    d = Design(weight_bits=4, input_bits=4)
    assert d.weight_range == (-8, 7) and d.input_range == (0, 15)
    assert d.but(inputs="twos_complement").input_range == (-8, 7)
    assert d.but(inputs="twos_complement").cycle_weights == (1, 2, 4, -8)
    assert d.but(signs="polarized").weight_range == (-15, 15)
    assert d.but(signs="differential_digital").column_weights == (1, 4, -1, -4)
    assert set(design.SIGNS) == {"offset", "differential_digital", "differential_analog", "polarized"}
