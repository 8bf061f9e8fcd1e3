"""Sparse products and recurrent cells from every format, against NumPy; gradients, threads, hostile arrays."""

import concurrent.futures

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


def use(isa, monkeypatch):
    monkeypatch.delenv("COMPRESSX_ISA", raising=False)
    if native.ISAS.index(isa) > native.ISAS.index(native.isa()):
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv("COMPRESSX_ISA", isa)


FORMATS = {"bspc": blocky, "block-max": one_per_block, "csr": scattered, "dense": scattered}


@needs_native
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("isa", native.ISAS)
def test_products_from_every_format(name, isa, monkeypatch):
    use(isa, monkeypatch)
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


@pytest.mark.parametrize("kind", ["bspc", "csr"])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_spread_is_that_of_the_weights(kind, threads):
    rng, lanes = np.random.default_rng(8), 4
    w = FORMATS[kind](rng, 40, 46)
    tiles = recurrent.tiles_of([formats.pack(w, format=kind)], lanes)
    shares = [0] * threads
    for vector, start in enumerate(range(0, 46, lanes)):
        longest = max(sum(w[i, o] != 0 for i in range(40)) for o in range(start, min(46, start + lanes)))
        shares[vector % threads] += longest
    stored, number = [0] * threads, 0
    for _, vectors, n, *_ in tiles.tiles:
        for _ in range(vectors):
            stored[number % threads] += n
            number += 1
    expected = (max(shares) * threads / sum(shares), max(stored) * threads / sum(stored))
    assert recurrent.spread(tiles, 46, lanes, threads) == pytest.approx(expected)


def test_reordering_levels_the_work_of_threads():
    w = np.zeros((9, 16), np.float32)
    for output in range(16):
        w[: 8 if output // 4 % 2 == 0 else 2, output] = 1  # long vectors would all be the first thread's
    assert recurrent.spread(recurrent.tiles_of_matrix(w, 4), 16, 4, 2) == (1.6, 1.0)
    none = recurrent.tiles_of_matrix(np.zeros((9, 16), np.float32), 4)
    assert recurrent.spread(none, 16, 4, 2) == (1.0, 1.0)


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
@pytest.mark.parametrize("isa", native.ISAS)
def test_cells_equal_the_reference(cell, isa, monkeypatch):
    use(isa, monkeypatch)
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
        assert prepared.path == f"native/{isa}"
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


def corrupt(rng, tiles):
    """One array with a few bytes changed, a number moved a little (past an end by one), or cut."""
    leaves, structure = jax.tree.flatten(jax.tree.map(np.array, tiles))
    k = rng.choice([k for k, a in enumerate(leaves) if a.size])
    a, how = leaves[k], rng.integers(3)
    if how == 0:
        flat = a.view(np.uint8).reshape(-1)
        flat[rng.integers(0, flat.size, 2)] = rng.integers(0, 256, 2)
    elif how == 1:
        flat = a.reshape(-1)
        flat[rng.integers(0, flat.size, 2)] += rng.choice([1, 2, 4, 16, 37]).astype(a.dtype)
    else:
        leaves[k] = a[: rng.integers(0, len(a))]
    return jax.tree.unflatten(structure, leaves)


def attack(tries, seed=0):
    """Calls the native products and cells with corrupted tiles; returns how many calls were refused."""
    rng, m, isa = np.random.default_rng(seed), 21, native.isa()
    lanes, refused = native.LANES[isa], 0
    targets = []
    for kind in ("bspc", "csr"):
        gates = [formats.pack(FORMATS[kind](rng, m, m), format=kind) for _ in range(4)]
        targets.append((None, recurrent.tiles_of(gates, lanes)))
        for cell in recurrent.CELLS:
            targets.append((cell, recurrent.cell_tiles(cell, gates if cell == "lstm" else gates[:3], lanes)))
    h, bias = jnp.zeros((2, m), jnp.float32), jnp.zeros(m, jnp.float32)
    for i in range(tries):
        cell, tiles = targets[i % len(targets)]
        try:
            if cell is None:
                call = recurrent.native_product(corrupt(rng, tiles), h, 4 * m, isa)
            else:
                x = jnp.zeros((2, 2, (4 if cell == "lstm" else 3) * m), jnp.float32)
                call = recurrent.native_cell(cell, corrupt(rng, tiles), x, h, h, bias, isa)
            jax.block_until_ready(call)
        except (jax.errors.JaxRuntimeError, ValueError) as e:
            refused += "recurrent:" in str(e)
    return refused


@needs_native
def test_corrupted_tiles_are_refused_or_harmless():
    assert attack(64) > 16


@needs_native
@pytest.mark.slow
def test_corrupted_tiles_under_the_address_sanitizer(under_address_sanitizer):
    assert under_address_sanitizer(__file__, "attack(600, seed=1)") > 150


@needs_native
def test_operands_of_other_shapes_are_refused():
    tiles = recurrent.cell_tiles("gru_after", [np.ones((5, 5), np.float32)] * 3, native.LANES[native.isa()])
    x, h, bias = jnp.zeros((2, 1, 15)), jnp.zeros((1, 5)), jnp.zeros(5)
    call = lambda *args: jax.block_until_ready(recurrent.native_cell("gru_after", tiles, *args, native.isa()))
    call(x, h, h, bias)
    for wrong in ((x[..., :14], h, h, bias), (x, h[:, :4], h, bias), (x, h, h[:, :4], bias), (x, h, h, bias[:4])):
        with pytest.raises(jax.errors.JaxRuntimeError, match="recurrent: "):
            call(*wrong)
    with pytest.raises(jax.errors.JaxRuntimeError, match="recurrent: "):
        jax.block_until_ready(recurrent.native_product(tiles[0], h[:, :4], 15, native.isa()))


@needs_native
def test_concurrent_calls_and_threads_give_the_same_bits():
    rng = np.random.default_rng(6)
    gates = [formats.pack(0.3 * blocky(rng, 40, 40), format="bspc") for _ in range(3)]
    one, many = (kernels.prepare_recurrent("gru_before", gates, threads=n) for n in (1, 4))
    a, b = (kernels.prepare_product(gates[0], threads=n) for n in (1, 4))
    x = jnp.asarray(rng.standard_normal((8, 5, 120), dtype=np.float32))
    v = jnp.asarray(rng.standard_normal((7, 40), dtype=np.float32))
    calls = (lambda: one(x)[0], lambda: many(x)[0], lambda: a(v), lambda: b(v))
    states, product = (np.asarray(f()).tobytes() for f in (calls[0], calls[2]))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: np.asarray(calls[i % 4]()).tobytes(), range(128)))
    assert set(found[0::4]) | set(found[1::4]) == {states}
    assert set(found[2::4]) | set(found[3::4]) == {product}


def test_bad_arguments_are_named():
    square = np.ones((4, 4), np.float32)
    with pytest.raises(ValueError, match="no cell"):
        kernels.prepare_recurrent("rnn", [square])
    with pytest.raises(ValueError, match="needs 3 gates"):
        kernels.prepare_recurrent("gru_after", [square], path="xla")
    with pytest.raises(ValueError, match="float32"):
        kernels.prepare_product(square, path="xla")(jnp.zeros((2, 5), jnp.float32))
