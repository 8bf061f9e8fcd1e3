"""The product: every formulation equals the definition, which equals integer products; what is proven holds."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.crossbar import presets
from compressx.crossbar.arrays import lossless_columns, rows_of
from compressx.crossbar.design import Adc, Design, Device
from compressx.crossbar.mvm import crossbar_matmul, crossbar_parts, saturation
from compressx.crossbar.program import program
from compressx.crossbar.reference import reference
from tests.thinning import some

BASE = Design(rows=16, cols=64, active_rows=16, input_bits=4, weight_bits=4, adc=Adc(8))

DESIGNS = {
    "offset, 4-bit ADC": BASE.but(adc=Adc(4)),
    "offset, flip, 4-bit ADC": BASE.but(adc=Adc(4, encoding="flip")),
    "offset, lossless flip": BASE.but(adc=Adc(5, encoding="flip")),
    "offset, lsb 3/2": BASE.but(adc=Adc(4, lsb=Fraction(3, 2))),
    "offset, lsb 2 ideal": BASE.but(adc=Adc(4, lsb=Fraction(2), encoding="ideal")),
    "offset, two's complement": BASE.but(adc=Adc(4), inputs="twos_complement"),
    "digital pairs": BASE.but(adc=Adc(3), signs="differential_digital", weight_bits=3),
    "digital, flip, lsb 1/2": BASE.but(adc=Adc(5, Fraction(1, 2), "flip"), signs="differential_digital"),
    "analog pairs": BASE.but(adc=Adc(4), signs="differential_analog"),
    "analog pairs, lsb 3": BASE.but(adc=Adc(3, lsb=Fraction(3)), signs="differential_analog"),
    "analog pairs, own range": BASE.but(adc=Adc(5, low=-3, high=7), signs="differential_analog"),
    "2-bit DAC, sign planes": BASE.but(adc=Adc(5), dac_bits=2, inputs="sign_planes"),
    "3-bit DAC, 1-bit cells, flip": BASE.but(adc=Adc(5, encoding="flip"), dac_bits=3, device=Device(1)),
    "polarized 4": BASE.but(adc=Adc(3), signs="polarized", active_rows=4),
    "polarized 8, flip": BASE.but(adc=Adc(4, encoding="flip"), signs="polarized", active_rows=8),
    "polarized 8, sign planes": BASE.but(adc=Adc(3), signs="polarized", active_rows=8, inputs="sign_planes"),
    "40 rows": BASE.but(rows=40, active_rows=40, adc=Adc(6)),
}  # fmt: skip


def _weights(rng, design, rows, filters):
    low, high = design.weight_range
    w = rng.integers(low, high + 1, (rows, filters))
    if design.signs == "polarized":
        signs = rng.choice([-1, 1], (-(-rows // design.active_rows), filters))
        w = np.abs(w) * np.repeat(signs, design.active_rows, axis=0)[:rows]
    return w


def _inputs(rng, design, n, rows):
    low, high = design.input_range
    return rng.integers(low, high + 1, (n, rows))


def _paths(design):
    return ["folded", "integer", "popcount"] + (["table"] if design.active_rows <= 8 and design.dac_bits == 1 else [])


@pytest.mark.parametrize("name", some(list(DESIGNS)[::2], DESIGNS))
def test_formulations_equal_the_definition(name, rng):
    design = DESIGNS[name]
    rows, filters = design.active_rows * 2 + 3, 5
    w, x = _weights(rng, design, rows, filters), _inputs(rng, design, 6, rows)
    expected = reference(x, w, design)
    for path in _paths(design):
        programmed = program(w, design, rows=np.arange(rows), path=path, prove=path == "popcount")
        got = jax.jit(crossbar_matmul)(jnp.asarray(x, jnp.int32), programmed)
        np.testing.assert_array_equal(np.asarray(got), expected.y, err_msg=path)
    found = saturation(jnp.asarray(x, jnp.int32), programmed)
    assert (int(found.clipped.sum()), found.conversions) == (expected.clipped, expected.conversions)


def test_some_designs_clip_and_some_do_not(rng):
    """The grid above would show little if nothing clipped in it, or everything."""
    clipped = []
    for design in DESIGNS.values():
        w, x = _weights(rng, design, design.active_rows * 2 + 3, 3), _inputs(rng, design, 4, design.active_rows * 2 + 3)
        clipped.append(reference(x, w, design).clipped > 0)
    assert 5 < sum(clipped) < len(clipped) - 2


@pytest.mark.parametrize("encoding", ["ideal", "flip"])
@pytest.mark.parametrize("fragment", [4, 8, 16])
def test_forms_is_the_integer_product(fragment, encoding, rng):
    """Bit-serial, bit-sliced, by fragments with a sign: lossless with an ideal ADC, and with 3, 4, 5 bits and flip."""
    design = presets.forms(fragment, encoding).but(input_bits=6)
    w, x = _weights(rng, design, 21, 4), _inputs(rng, design, 3, 21)
    expected = reference(x, w, design)
    np.testing.assert_array_equal(expected.y, x @ w)
    assert expected.clipped == 0
    assert program(w, design, rows=np.arange(21)).proven_share == 1
    simulated = program(w, design, rows=np.arange(21), prove=False)
    np.testing.assert_array_equal(np.asarray(crossbar_matmul(jnp.asarray(x, jnp.int32), simulated)), x @ w)


def test_forms_saturates_at_face_value():
    design = presets.forms(8, "saturating").but(input_bits=1)
    w, x = np.full((8, 1), 255), np.ones((1, 8), int)
    assert reference(x, w, design).y[0, 0] == 15 * 85  # each column reads 15 where the sum is 24
    assert saturation(jnp.asarray(x, jnp.int32), program(w, design)).share == 1.0


def test_isaac_is_the_integer_product_at_16_bits(rng):
    """16 x 16 bits pass int32: the parts add up exactly, and the integer call says that it cannot."""
    design = presets.isaac()
    w, x = _weights(rng, design, 140, 3), _inputs(rng, design, 4, 140)
    w[0], x[0] = design.weight_range[0], design.input_range[0]
    for prove in (True, False):
        programmed = program(w, design, prove=prove)
        assert programmed.proven_share == prove
        parts = jax.jit(crossbar_parts, static_argnums=())(jnp.asarray(x, jnp.int32), programmed)
        total = sum(np.asarray(y, np.int64) << int(shift) for shift, y in parts)
        np.testing.assert_array_equal(total, x @ w)
    with pytest.raises(ValueError, match="may pass int32"):
        crossbar_matmul(jnp.asarray(x, jnp.int32), programmed)
    floats = crossbar_matmul(jnp.asarray(x, jnp.float32), programmed)
    np.testing.assert_allclose(np.asarray(floats), (x @ w).astype(np.float64), rtol=3e-6, atol=2e3)


def test_pruned_rows_and_columns_are_squeezed_out(rng):
    design = BASE.but(adc=Adc(4))
    w = _weights(rng, design, 30, 7)
    w[rng.permutation(30)[:13]] = 0
    w[:, [1, 4]] = 0
    programmed = program(w, design)
    assert programmed.rows.shape == (17,) and programmed.limbs.shape[2] == 5
    x = _inputs(rng, design, 5, 30)
    got = np.asarray(crossbar_matmul(jnp.asarray(x, jnp.int32), programmed))
    kept = np.flatnonzero(w.any(1))
    np.testing.assert_array_equal(got[:, [0, 2, 3, 5, 6]], reference(x[:, kept], w[kept][:, w.any(0)], design).y)
    assert (got[:, [1, 4]] == 0).all()


def test_nothing_left():
    programmed = program(np.zeros((5, 3), int), BASE)
    np.testing.assert_array_equal(
        np.asarray(crossbar_matmul(jnp.ones((2, 5), jnp.int32), programmed)), np.zeros((2, 3))
    )


def test_the_proof_is_tight(rng):
    """A column is proven exactly when the input that drives all its rows does not clip."""
    design = BASE.but(adc=Adc(5, encoding="flip"), signs="polarized", active_rows=16, weight_bits=2)
    w = np.zeros((16, 49), int)
    for f in range(1, 49):
        w[: f // 3, f], w[f // 3 : f // 3 + 1, f] = 3, f % 3
    x = np.full((1, 16), 1)
    for encoding in ("flip", "saturating"):
        plain = design.but(encoding=encoding, adc_bits=4)
        programmed = program(w, plain, rows=np.arange(16))
        proven = set(np.flatnonzero(w.any(0))[np.asarray(programmed.proven)])
        clips = {f for f in range(1, 49) if reference(x, w[:, [f]], plain).clipped}
        assert proven == set(range(1, 49)) - clips
        assert clips


def test_lsb_above_one_is_never_proven():
    from compressx.crossbar.cells import encode

    design = BASE.but(adc=Adc(8, lsb=Fraction(2)))
    assert not lossless_columns(encode(np.ones((4, 2), np.int32), design), design).any()


def test_gradient_is_that_of_the_plain_product(rng):
    design = BASE.but(adc=Adc(3))
    w = _weights(rng, design, 20, 4)
    w[3], w[:, 2] = 0, 0
    programmed = program(w, design)
    x, g = jnp.asarray(_inputs(rng, design, 2, 20), jnp.float32), jnp.asarray(rng.normal(size=(2, 4)), jnp.float32)
    found = jax.jit(jax.grad(lambda v: jnp.sum(crossbar_matmul(v, programmed) * g)))(x)
    np.testing.assert_allclose(np.asarray(found), np.asarray(g) @ w.T, rtol=1e-5)


def test_vmap_over_inputs_and_over_arrays(rng):
    design = BASE.but(adc=Adc(4))
    w = np.stack([_weights(rng, design, 16, 3) for _ in range(2)])
    x = _inputs(rng, design, 4, 16)
    many = jax.tree.map(lambda *a: jnp.stack(a), *[program(m, design, rows=np.arange(16), prove=False) for m in w])
    got = jax.vmap(crossbar_matmul, in_axes=(None, 0))(jnp.asarray(x, jnp.int32), many)
    for i in range(2):
        np.testing.assert_array_equal(np.asarray(got[i]), reference(x, w[i], design).y)
    rowwise = jax.vmap(crossbar_matmul, in_axes=(0, None))(jnp.asarray(x, jnp.int32), program(w[0], design))
    np.testing.assert_array_equal(np.asarray(rowwise), reference(x, w[0], design).y)


def test_chunks_of_inputs_and_tables_built_on_the_way_change_nothing(rng, monkeypatch):
    from compressx.crossbar import arrays, mvm

    design = DESIGNS["polarized 8, flip"].but(encoding="saturating", adc_bits=3)
    w, x = _weights(rng, design, 19, 4), _inputs(rng, design, 7, 19)
    monkeypatch.setattr(mvm, "_CHUNK_VALUES", 60)
    monkeypatch.setattr(arrays, "TABLE_BYTES", 10)
    programmed = program(w, design, rows=np.arange(19))
    assert programmed.path == "table" and programmed.tables is None
    got = crossbar_matmul(jnp.asarray(x, jnp.int32), programmed)
    np.testing.assert_array_equal(np.asarray(got), reference(x, w, design).y)


def test_rows_follow_a_polarized_structure(rng):
    from compressx.constraints import polarize

    constraint = polarize(4, order="W")
    w = jnp.asarray(rng.normal(size=(3, 3, 2, 3)), jnp.float32).at[:, 1].set(0.0)
    structure = constraint.init(w)
    polar = constraint.project(w, structure)
    ints = np.asarray(jnp.round(polar * 5), np.int32).reshape(18, 3)
    design = presets.forms(4).but(input_bits=4)
    rows = rows_of(structure.order, ints)
    assert len(rows) <= 12
    programmed = program(ints, design, rows=rows)
    x = _inputs(rng, design, 4, 18)
    np.testing.assert_array_equal(np.asarray(crossbar_matmul(jnp.asarray(x, jnp.int32), programmed)), x @ ints)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.astype(np.float32), "integer matrix"),
        (lambda w: w * 100, "leave the range -8..7"),
    ],
)
def test_refuses_weights(change, message):
    with pytest.raises(ValueError, match=f"conv1: .*{message}"):
        program(change(np.ones((4, 2), int)), BASE, name="conv1")


def test_refuses():
    w = np.array([[1, 1], [-1, 1]])
    with pytest.raises(ValueError, match="first group 0 of filter 0"):
        program(w, DESIGNS["polarized 4"])
    with pytest.raises(ValueError, match="leaves out"):
        program(w, BASE, rows=[0])
    with pytest.raises(ValueError, match="distinct"):
        program(w, BASE, rows=[0, 0, 1])
    with pytest.raises(ValueError, match="path must be"):
        program(w, BASE, path="fast")
    with pytest.raises(ValueError, match="8 active rows"):
        program(w, BASE, path="table")
    with pytest.raises(ValueError, match=r"expected inputs \[..., 2\]"):
        crossbar_matmul(jnp.ones((1, 3), jnp.int32), program(w, BASE))
