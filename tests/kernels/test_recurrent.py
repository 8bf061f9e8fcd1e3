"""Sparse products and recurrent cells from every format, against NumPy; gradients, threads, hostile arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx import formats, kernels
from compressx.kernels import native, recurrent

needs_native = pytest.mark.skipif(not recurrent.available(), reason="no compiler, so no native kernels")


def blocky(rng, inputs, outputs):
    """Strips of outputs, each with inputs and outputs of its own, as block-based structured pruning leaves them."""
    w = np.zeros((inputs, outputs), np.float32)
    for start in range(0, outputs, 20):
        rows = rng.random(min(20, outputs - start)) < 0.7
        columns = rng.random(inputs) < 0.4
        part = rng.standard_normal((inputs, rows.size), dtype=np.float32)
        w[:, start : start + 20] = part * columns[:, None] * rows[None]
    return w


def one_per_block(rng, inputs, outputs, size=4):
    w = np.zeros((inputs, outputs), np.float32)
    for r in range(inputs):
        for start in range(0, outputs, size):
            w[r, min(outputs - 1, start + rng.integers(size))] = rng.standard_normal()
    return w


def scattered(rng, inputs, outputs):
    return rng.standard_normal((inputs, outputs), dtype=np.float32) * (rng.random((inputs, outputs)) < 0.15)


FORMATS = {"bspc": blocky, "block-max": one_per_block, "csr": scattered, "dense": scattered}


@needs_native
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", native.ISAS)
def test_products_from_every_format(name, isa, monkeypatch):
    monkeypatch.delenv("COMPRESSX_ISA", raising=False)
    if native.ISAS.index(isa) > native.ISAS.index(native.isa()):
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv("COMPRESSX_ISA", isa)
    rng = np.random.default_rng(0)
    w = FORMATS[name](rng, 37, 75)
    x = rng.standard_normal((3, 37), dtype=np.float32)
    product = kernels.prepare_product(formats.pack(w, format=name))
    assert product.path == f"native/{isa}"
    np.testing.assert_allclose(product(jnp.asarray(x)), x @ w, atol=1e-5)


@needs_native
def test_blocks_load_each_input_once_for_all_their_outputs():
    rng = np.random.default_rng(1)
    packed = formats.pack(blocky(rng, 64, 64), format="bspc")
    found = recurrent.loads(recurrent.tiles_of([packed], 16), 16)
    assert found["input_loads_eliminated"] < found["input_loads"] / 8


def test_blocks_with_codes_for_weights_are_blocks_of_floats():
    levels = cx.quantize(5, per="channel")
    w = jnp.asarray(blocky(np.random.default_rng(1), 64, 48))
    scale = levels.init(w)
    w = np.asarray(levels.project(w, scale))
    a = recurrent.tiles_of([formats.pack(w, levels, scale, "bspc-coded")], 16)
    b = recurrent.tiles_of([formats.pack(w, format="bspc")], 16)
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


@needs_native
def test_gates_with_the_same_inputs_share_a_list():
    w = blocky(np.random.default_rng(2), 30, 16)
    w = np.where(w.any(axis=1)[:, None], w + 1, 0).astype(np.float32)
    packed = formats.pack(w, format="bspc")
    assert len(recurrent.tiles_of([packed] * 3, 16).tiles) == 1


@needs_native
@pytest.mark.parametrize("cell", recurrent.CELLS)
def test_cells_equal_the_reference(cell):
    rng = np.random.default_rng(3)
    m, gates = 37, 4 if cell == "lstm" else 3
    mats = [0.4 * blocky(rng, m, m) for _ in range(gates)]
    x = rng.standard_normal((6, 3, gates * m), dtype=np.float32)
    h, c = (rng.standard_normal((3, m), dtype=np.float32) for _ in range(2))
    bias = rng.standard_normal(m, dtype=np.float32)
    u = np.concatenate(mats, axis=1)
    expected, last = recurrent.reference(cell, x, u, h, c, bias)
    for given in ([formats.pack(w, format="bspc") for w in mats], [formats.pack(w, format="csr") for w in mats], [u]):
        prepared = kernels.prepare_recurrent(cell, given)
        y, end = prepared(*map(jnp.asarray, (x, h, c, bias)))
        np.testing.assert_allclose(y, expected, atol=2e-6)
        np.testing.assert_allclose(end, last, atol=4e-6)
    y, end = kernels.prepare_recurrent(cell, given, path="xla")(*map(jnp.asarray, (x, h, c, bias)))
    np.testing.assert_allclose(y, expected, atol=2e-6)


@needs_native
def test_functions_of_gates_hold_at_the_extremes():
    cell = kernels.prepare_recurrent("lstm", [np.zeros((4, 16), np.float32)])
    x = np.array([-1e4, -90.0, -1e-4, 0, 1e-4, 90.0, 1e4, 3.3] * 2, np.float32).reshape(1, 1, 16)
    expected, last = recurrent.reference("lstm", np.clip(x, -700, 700), np.zeros((4, 16)), np.zeros((1, 4)))
    y, c = cell(jnp.asarray(x))
    np.testing.assert_allclose(y, expected, atol=3e-7)
    np.testing.assert_allclose(c, last, atol=3e-7)


@needs_native
def test_gradients_are_those_of_the_dense_cell():
    rng = np.random.default_rng(4)
    u = blocky(rng, 8, 24)
    x = jnp.asarray(rng.standard_normal((3, 2, 24), dtype=np.float32))
    ours, theirs = (kernels.prepare_recurrent("gru_after", [u], path=p) for p in ("native", "xla"))
    a, b = (jax.grad(lambda x, f=f: jnp.square(f(x)[0]).sum())(x) for f in (ours, theirs))
    np.testing.assert_allclose(a, b, atol=1e-5)


@needs_native
def test_corrupted_tiles_are_refused_or_harmless():
    rng = np.random.default_rng(5)
    cell = kernels.prepare_recurrent("gru_before", [formats.pack(blocky(rng, 20, 20), format="bspc")] * 3)
    x, h = jnp.zeros((2, 1, 60), jnp.float32), jnp.zeros((1, 20), jnp.float32)
    refused = 0
    for _ in range(40):
        tiles = [np.array(a) for a in jax.tree.leaves(cell.tiles)]
        k = rng.choice([0, 1, 2, 4, 5, 6])
        flat = tiles[k].view(np.uint8).reshape(-1)
        flat[rng.integers(0, flat.size, 2)] = rng.integers(0, 256, 2)
        broken = jax.tree.unflatten(jax.tree.structure(cell.tiles), tiles)
        try:
            jax.block_until_ready(cell.native(broken, x, h, h, jnp.zeros(20, jnp.float32)))
        except (jax.errors.JaxRuntimeError, ValueError):
            refused += 1
    assert refused > 10


def test_bad_arguments_are_named():
    square = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match="no cell"):
        kernels.prepare_recurrent("rnn", [square])
    with pytest.raises(ValueError, match="needs 3 gates"):
        kernels.prepare_recurrent("gru_after", [square], path="xla")
    with pytest.raises(ValueError, match="float32"):
        kernels.prepare_product(square, path="xla")(jnp.zeros((2, 5), jnp.float32))
