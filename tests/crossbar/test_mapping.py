"""Mapping: array counts against an array-by-array layout, compaction, groups, and the factors of the reduction."""

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressx.crossbar import mapping
from compressx.crossbar.arrays import rows_of
from compressx.crossbar.design import Adc, Design, Device
from compressx.crossbar.presets import forms, isaac
from compressx.crossbar.program import program

SMALL = Design(rows=8, cols=16, active_rows=8, weight_bits=4, signs="polarized", adc=Adc(8))  # 2 columns a weight


def _sparse(rng, p, f, rows, cols):
    w = np.zeros((p, f))
    w[np.ix_(rng.permutation(p)[:rows], rng.permutation(f)[:cols])] = 1.0
    return w


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**31))
def test_arrays_are_those_that_hold_a_cell(p, f, seed):
    rng = np.random.default_rng(seed)
    w = _sparse(rng, p, f, rng.integers(1, p + 1), rng.integers(1, f + 1))
    layer = mapping.dense_layer("w", w)
    mapped = mapping.map_layer(layer, SMALL)
    r, c = int(w.any(1).sum()), int(w.any(0).sum())
    touched = {(i // 8, j // 16) for i in range(r) for j in range(2 * c)}  # array of every programmed cell
    assert mapped.arrays == len(touched) == ceil(r / 8) * ceil(2 * c / 16)
    assert mapped.dense_arrays == ceil(p / 8) * ceil(2 * f / 16)
    assert mapped.cells == 2 * r * c and mapped.nonzero_cells == 2 * np.count_nonzero(w)
    picture = mapping.occupancy(layer, SMALL)
    assert picture.size == mapped.arrays
    assert picture.mean() == pytest.approx(mapped.density)


@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**31))
def test_arrays_are_those_that_are_programmed_when_the_row_order_has_holes(p, f, seed):
    rng = np.random.default_rng(seed)
    w = _sparse(rng, p, f, rng.integers(1, p + 1), rng.integers(1, f + 1)).astype(np.int32)
    rows = rows_of(rng.permutation(p), w)
    layer = mapping.Layer("w", (w != 0)[None], rows=rows)
    mapped = mapping.map_layer(layer, SMALL)
    programmed = program(w, SMALL, rows=rows)
    assert mapped.kept_rows == (len(programmed.rows),) and mapped.kept_rows[0] >= int(w.any(1).sum())
    columns = len(programmed.proven) + len(programmed.simulated)
    assert mapped.arrays == ceil(len(programmed.rows) / 8) * ceil(2 * columns / 16)
    assert mapping.occupancy(layer, SMALL).mean() == pytest.approx(mapped.density)
    assert mapping.reduction([layer], SMALL).arrays == mapped.arrays


def test_holes_of_an_order_take_arrays_and_an_empty_group_none():
    w = np.zeros((20, 2))
    w[[0, 19]] = 1
    squeezed, laid = mapping.Layer("w", (w != 0)[None]), mapping.Layer("w", (w != 0)[None], rows=np.arange(20))
    assert mapping.map_layer(squeezed, SMALL).arrays == 1 and mapping.map_layer(laid, SMALL).arrays == 3
    both = np.stack([w != 0, np.zeros_like(w, bool)])
    assert mapping.map_layer(mapping.Layer("g", both, rows=np.arange(20)), SMALL).kept_rows == (20, 0)


def test_differential_pairs_take_twice_the_columns():
    w = np.ones((8, 8))
    assert mapping.map_layer(mapping.dense_layer("w", w), SMALL).arrays == 1
    assert mapping.map_layer(mapping.dense_layer("w", w), SMALL.but(signs="differential_analog")).arrays == 2


def test_convolution_rows_columns_and_uses():
    w = np.ones((3, 3, 16, 64))
    mapped = mapping.map_layer(mapping.conv_layer("c", w, (32, 32), (2, 2)), forms(8))
    assert (mapped.rows, mapped.cols, mapped.uses) == (144, 64, 256)
    assert mapped.arrays == 2 * 2
    assert mapping.map_layer(mapping.conv_layer("c", w, (32, 32), padding="VALID"), isaac()).uses == 900


@pytest.mark.parametrize("padding", ["SAME", "VALID", ((1, 2), (0, 1))])
@pytest.mark.parametrize("strides", [(1, 1), (2, 3)])
def test_output_size_is_jax_own(padding, strides):
    import jax
    import jax.numpy as jnp

    out = jax.eval_shape(
        lambda x, w: jax.lax.conv_general_dilated(x, w, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC")),
        jax.ShapeDtypeStruct((1, 11, 9, 2), jnp.float32),
        jax.ShapeDtypeStruct((3, 2, 2, 4), jnp.float32),
    )
    assert mapping.output_size((11, 9), (3, 2), strides, padding) == out.shape[1:3]


def test_depthwise_groups_share_arrays_along_the_diagonal():
    w = np.ones((3, 3, 1, 20))
    mapped = mapping.map_layer(mapping.conv_layer("d", w, (4, 4), groups=20), SMALL.but(rows=32, active_rows=8))
    # 9 rows and 2 columns a channel: an array of 32 x 16 has place for min(32 // 9, 16 // 2) = 3
    assert mapped.groups == 20 and mapped.arrays == ceil(20 / 3)
    pruned = w.copy()
    pruned[..., :11] = 0
    layer = mapping.conv_layer("d", pruned, (4, 4), groups=20)
    assert mapping.map_layer(layer, SMALL.but(rows=32, active_rows=8)).arrays == ceil(9 / 3)


def test_grouped_convolution_takes_each_group_s_own_filters():
    w = np.ones((1, 1, 4, 6))
    w[:, :, :, 3:] = 0  # second group is empty
    mapped = mapping.map_layer(mapping.conv_layer("g", w, (2, 2), groups=2), SMALL)
    assert mapped.kept_rows == (4, 0) and mapped.kept_cols == (3, 0) and mapped.arrays == 1


def test_recurrent_matrices_are_used_every_step():
    layers = mapping.recurrent_layers("gru", {"in": np.ones((4, 6)), "hidden": np.ones((2, 6))}, steps=7)
    assert [(layer.name, layer.uses) for layer in layers] == [("gru/in", 7), ("gru/hidden", 7)]


def test_reduction_factors_multiply_to_whole_arrays_where_nothing_is_rounded():
    design = Design(
        rows=8, cols=8, active_rows=8, weight_bits=8, signs="polarized", device=Device(2), adc=Adc(8)
    )  # 4 columns a weight
    w = np.zeros((32, 16))
    w[:16, :4] = 1  # an eighth, in whole arrays
    found = mapping.reduction([mapping.dense_layer("w", w)], design)
    assert (found.prune, found.bits, found.signs) == (8, 4, 2)
    assert found.product == 64 == found.measured and found.rounding == 1
    assert found.baseline_arrays == 4 * 16 * 2 * 16 // 8


def test_paper_reduction_rows():
    """FORMS: prune ratio x 4 x 2 is the crossbar reduction of every row of the table."""
    for prune, table in ((23.18, 185.44), (41.2, 329.6), (50.85, 406.8), (6.65, 53.2), (9.18, 73.44), (8.15, 65.2)):
        assert mapping.Reduction(prune, 4, 2, 1, 1).product == pytest.approx(table, rel=1e-9)


def test_frees_whole_arrays(rng):
    keep = lambda r, c: mapping.map_layer(mapping.dense_layer("w", _sparse(rng, 24, 16, r, c)), SMALL)
    assert mapping.frees_whole_arrays(keep(16, 8), SMALL)
    assert mapping.frees_whole_arrays(keep(24, 16), SMALL)
    assert not mapping.frees_whole_arrays(keep(15, 8), SMALL)
    assert not mapping.frees_whole_arrays(keep(16, 7), SMALL)


def test_refuses():
    with pytest.raises(ValueError, match="fc: expected a weight of 2 axes"):
        mapping.dense_layer("fc", np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="layer fc: rows leaves out rows with non-zero weights"):
        mapping.Layer("fc", np.ones((1, 3, 2), bool), rows=np.array([0, 2]))
    with pytest.raises(ValueError, match="do not divide"):
        mapping.conv_layer("c", np.ones((1, 1, 2, 3)), (4, 4), groups=2)
    with pytest.raises(ValueError, match="leaves no output"):
        mapping.conv_layer("c", np.ones((5, 5, 2, 3)), (4, 4), padding="VALID")
    with pytest.raises(ValueError, match="no weight is left"):
        mapping.reduction([mapping.dense_layer("w", np.zeros((2, 2)))], SMALL)


def test_row_of_the_report():
    row = mapping.map_layer(mapping.dense_layer("fc", np.ones((9, 8))), SMALL).row()
    assert row["arrays"] == 2 and row["utilisation"] == pytest.approx(9 * 16 / (2 * 128)) and row["layer"] == "fc"
