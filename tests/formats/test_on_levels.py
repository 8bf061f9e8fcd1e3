"""Codes for the values of fkw, bspc, block-max, compact, csr and coo-delta: exact, in the bytes of the formula."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx as cx
from compressx import formats
from compressx.constraints.levels import levels_of
from compressx.formats import CompressedFileError, Packed
from compressx.formats.base import same
from compressx.formats.on_levels import ON_LEVELS
from tests.formats.mutations import mutated

VALUES = {
    **dict.fromkeys(("fkw", "bspc"), "weight"),
    **dict.fromkeys(("block-max", "bank-balanced", "csr", "csr16", "coo-delta"), "values"),
    "compact": "matrix",
}


def hard(constraint: cx.Constraint, shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> tuple[Any, Any]:
    w = jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))

    @jax.jit
    def both(w: Any) -> Any:
        structure = constraint.init(w)
        return constraint.project(w, structure), structure

    z, structure = both(w)
    return np.asarray(z), structure


CASES = {
    "pattern": ("fkw", cx.pattern("scp") & cx.connectivity(0.4) & cx.quantize(4), (3, 3, 8, 10)),
    "pattern, channels": ("fkw", cx.pattern_connectivity(0.3, k=4) & cx.quantize(3, per="channel"), (3, 3, 9, 7)),
    "pattern, zeros kept": ("fkw", cx.pattern_connectivity(0.3) & cx.quantize(2, zero_level=True), (3, 3, 9, 7)),
    "connectivity": ("fkw", cx.connectivity(0.3) & cx.quantize(4, grid="codebook"), (1, 1, 9, 11)),
    "bsp": ("bspc", cx.bsp(0.25, 0.5, column_strips=4, row_strips=2) & cx.quantize(8), (39, 32)),
    "bsp, channels": ("bspc", cx.bsp_columns(0.2, strips=4) & cx.quantize(4, per="channel"), (40, 30)),
    "block max": ("block-max", cx.block_max(14) & cx.quantize(5), (9, 100)),
    "darb, inputs": (
        "block-max",
        cx.darb(0.2, allowed=(1, 2, 4, 8), axis="inputs") & cx.quantize(4, grid="power_of_two"),
        (64, 40),
    ),
    "banks": ("bank-balanced", cx.bank_balanced(0.25, 16, axis="inputs") & cx.quantize(4, per="channel"), (40, 21)),
    "banks, asymmetric": (
        "bank-balanced",
        cx.bank_balanced(0.25, 16, axis="inputs") & cx.quantize(4, per="channel", symmetric=False),
        (40, 21),
    ),
    "filters": ("compact", cx.filters(0.5) & cx.columns(0.5) & cx.quantize(6), (3, 3, 5, 8)),
    "codebooks": ("compact", cx.filters(0.5) & cx.quantize(3, grid="codebook", per="channel"), (3, 3, 5, 8)),
    "rows": ("csr", cx.unstructured(0.1) & cx.quantize(8), (30, 40)),
    "rows, 16": ("csr16", cx.unstructured(0.1) & cx.quantize(8, grid="cells"), (30, 40)),
    "scattered": ("coo-delta", cx.unstructured(0.02) & cx.quantize(4), (5, 6, 40)),
    "scattered, channels": ("coo-delta", cx.unstructured(0.1) & cx.quantize(4, per="channel"), (30, 40)),
    "one axis": ("coo-delta", cx.unstructured(0.1) & cx.quantize(4), (300,)),
    "all zero": ("compact", cx.quantize(4), (4, 5)),
}


def made(name: str, dtype: Any = np.float32) -> tuple[np.ndarray, cx.Constraint, Any, Packed, Packed]:
    """A case's weight, constraint, structure, and both packed forms; tests do not change them."""
    return _made(name, dtype)


@functools.cache
def _made(name: str, dtype: Any) -> tuple[np.ndarray, cx.Constraint, Any, Packed, Packed]:
    inner, constraint, shape = CASES[name]
    w, structure = hard(constraint, shape, dtype)
    if name == "all zero":
        w = np.zeros_like(w)
    packed = formats.pack(w, constraint, structure, f"{inner}-coded")
    return w, constraint, structure, packed, formats.pack(w, constraint, structure, inner)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, np.float32) for n in CASES]
    + [("codebooks", ml_dtypes.bfloat16)]
    + [pytest.param(n, ml_dtypes.bfloat16, marks=pytest.mark.slow) for n in ("pattern, channels", "bsp")],
)
def test_weights_come_back_in_b_bits_a_value_and_the_inner_index(name: str, dtype: Any) -> None:
    w, constraint, _, packed, raw = made(name, dtype)
    assert same(formats.unpack(packed), w)
    values = VALUES[raw.format]
    levels = levels_of(constraint.sets[-1].spec)
    b = levels.bits + (levels.grid == "cells")
    entries = (levels.top if levels.grid == "codebook" else 1) * (w.shape[-1] if levels.per == "channel" else 1)
    number, v = raw.arrays[values].size, w.dtype.itemsize
    scales = entries * (v if levels.grid == "codebook" else 4 if levels.symmetric else 8)
    assert formats.nbytes(packed) == formats.nbytes(raw) - number * v + math.ceil(number * b / 8) + scales
    for key in set(raw.arrays) - {values}:
        assert same(packed.arrays[key], raw.arrays[key])


@pytest.mark.parametrize("name", CASES)
def test_readers_of_the_inner_format_get_its_floats(name: str) -> None:
    _, _, _, packed, raw = made(name)
    plain = formats.in_floats(packed)
    assert plain.format == raw.format and plain.dtype == raw.dtype and plain.shape == raw.shape
    assert plain.arrays.keys() == raw.arrays.keys()
    assert all(same(plain.arrays[k], raw.arrays[k]) for k in raw.arrays)
    assert formats.in_floats(raw) is raw


def test_codes_are_sign_and_index_in_the_order_of_the_inner_values() -> None:
    w = np.zeros((4, 3), np.float32)
    w[0, 2], w[1, 0], w[3, 0], w[3, 2] = 3, -1, 7, -6
    scale = jnp.ones(())
    packed = formats.pack(w, cx.quantize(4), scale, "csr-coded")  # a filter after another
    text = "".join(f"{byte:08b}" for byte in packed.arrays["values"])
    assert text == "1001" + "0111" + "0011" + "1110"
    assert packed.arrays["indices"].tolist() == [1, 3, 0, 3] and packed.meta["values"] == [4]


@pytest.mark.parametrize(
    ("format", "constraint", "shape"),
    [
        ("fkw-coded", cx.connectivity(0.28) & cx.quantize(4), (5, 5, 32, 32)),
        ("coo-delta-coded", cx.pattern(k=8) & cx.connectivity(0.28) & cx.quantize(4), (3, 3, 32, 32)),
        ("bspc-coded", cx.bsp(0.125, 0.5, column_strips=4, row_strips=2) & cx.quantize(4), (128, 128)),
        ("block-max-coded", cx.block_max(16) & cx.quantize(4), (64, 128)),
        ("compact-coded", cx.filters(0.5) & cx.columns(0.3) & cx.quantize(4, grid="power_of_two"), (3, 3, 32, 32)),
        ("coo-delta-coded", cx.unstructured(0.02) & cx.quantize(4), (128, 128)),
        ("quantized", cx.quantize(4), (32, 32)),
    ],
)
def test_supports_and_levels_are_stored_together(format: str, constraint: Any, shape: tuple[int, ...]) -> None:
    w, structure = hard(constraint, shape)
    chosen = formats.pack(w, constraint, structure)
    assert chosen.format == format
    b = constraint.sets[-1].spec["bits"]
    kept = np.count_nonzero(w)
    # the index alone is paid for beside b bits a weight, and no other format for codes does better
    assert formats.nbytes(chosen) < math.ceil(kept * b / 8) + math.ceil(w.size / 8) + 8
    for other in ("quantized", "cells", "bit-planes", "csr-coded", "coo-delta-coded", "compact-coded"):
        if formats.FORMATS[other].supports(w, constraint) is True:
            assert formats.nbytes(chosen) <= formats.nbytes(formats.pack(w, constraint, structure, other))


def test_a_pattern_layer_on_16_levels_takes_the_bits_of_its_sheet() -> None:
    """64 x 64 kernels, 1 in 3.6 kept with 4 of 9 weights of 4 bits: 16 bits of weights and 16 of index a kernel."""
    constraint = cx.pattern_connectivity(1 / 3.6, k=8) & cx.quantize(4)
    w, structure = hard(constraint, (3, 3, 64, 64))
    kernels = round(64 * 64 / 3.6)
    index = 4 * 65 + 2 * 64 + 2 * kernels + 2 * 64 * 9
    assert formats.nbytes(formats.pack(w, constraint, structure, "fkw-coded")) == index + 2 * kernels + 4


def test_what_is_not_on_levels_is_refused_and_falls_back() -> None:
    constraint = cx.unstructured(0.1) & cx.quantize(4)
    w, structure = hard(constraint, (30, 40))
    with pytest.raises(ValueError, match=r"needs a constraint with quantize\(...\)"):
        formats.pack(w, cx.unstructured(0.1), (), "csr-coded")
    w = w.copy()
    w[np.nonzero(w)] *= np.linspace(1, 1.01, np.count_nonzero(w))
    with pytest.raises(ValueError, match="are not on the levels"):
        formats.pack(w, constraint, structure, "csr-coded")
    assert formats.pack(w, constraint, structure).format == "coo-delta"


@functools.cache
def examples() -> dict[str, Packed]:
    """A packed weight of every format, made when the first test asks: every worker of a run imports this file."""
    first = {f.name: next(n for n, case in CASES.items() if f"{case[0]}-coded" == f.name) for f in ON_LEVELS}
    names = {**first, "channels": "scattered, channels", "codebooks": "codebooks"}
    return {name: made(case)[3] for name, case in names.items()}


def meta(name: str, **changes: Any) -> Packed:
    return examples()[name]._replace(meta={**examples()[name].meta, **changes})


def array(name: str, entry: str, change: Any) -> Packed:
    arrays = examples()[name].arrays
    return examples()[name]._replace(arrays={**arrays, entry: change(arrays[entry].copy())})


DAMAGE = {
    "no extents": (lambda: meta("csr-coded", values=None), "csr-coded/values: None are not the extents"),
    "sign": (lambda: meta("csr-coded", values=[-1]), "csr-coded/values: .* not the extents of at most 1200"),
    "bomb": (lambda: meta("compact-coded", values=[300, 300]), "compact-coded/values: .* of at most 360 values"),
    "long bomb": (lambda: meta("compact-coded", values=[9] * 10**6), "compact-coded/values: .* not the extents"),
    "true": (lambda: meta("csr-coded", values=[True]), "csr-coded/values: .* not the extents"),
    "fewer": (lambda: meta("csr-coded", values=[60]), r"csr-coded/values: shape \[120\], expected \[60\]"),
    "turned": (lambda: meta("fkw-coded", values=[4, 32]), r"fkw/weight: shape \[4, 32\], expected \[32, 4\]"),
    "flat": (lambda: meta("fkw-coded", values=[128]), r"fkw/weight: shape \[128\], expected \[32, 4\]"),
    "grid": (lambda: meta("fkw-coded", grid="round"), "fkw-coded/grid: 'round'"),
    "bits": (lambda: meta("fkw-coded", bits=17), "fkw-coded/bits: 17"),
    "codes": (lambda: array("fkw-coded", "weight", lambda a: a[1:]), "fkw-coded/weight: shape"),
    "sign of zero": (lambda: array("csr-coded", "values", lambda a: np.full_like(a, 128)), "a zero has a sign"),
    "levels": (lambda: array("bspc-coded", "levels", lambda a: a * np.nan), "bspc-coded/levels: holds NaN"),
    "index": (lambda: array("fkw-coded", "index", lambda a: a * 0 + 99), "fkw/index: values 99..99 leave"),
    "empty": (lambda: examples()["coo-delta-coded"]._replace(shape=()), "coo-delta-coded: shape"),
    "raw": (
        lambda: examples()["csr-coded"]._replace(
            arrays={k: a for k, a in examples()["csr-coded"].arrays.items() if k != "levels"}
        ),
        "csr-coded/levels: missing",
    ),
    "extra": (
        lambda: examples()["csr-coded"]._replace(arrays={**examples()["csr-coded"].arrays, "x": np.zeros(1)}),
        "csr/x: unknown array",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str) -> None:
    make, message = DAMAGE[case]
    with pytest.raises(CompressedFileError, match=message):
        formats.unpack(make())


@settings(max_examples=min(500, 5 * settings().max_examples))
@given(data=st.data())
def test_mutations_unpack_to_a_weight_or_one_error(data: st.DataObject) -> None:
    packed = mutated(data, examples()[data.draw(st.sampled_from(sorted(examples())))])
    try:
        back = formats.unpack(packed, max_bytes=1 << 20)
    except CompressedFileError:
        return
    assert back.shape == packed.shape and back.dtype.name == packed.dtype
    assert same(formats.unpack(formats.in_floats(packed)), back)
