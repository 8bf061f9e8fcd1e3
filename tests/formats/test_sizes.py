"""Sizes that are counted before anything is packed are those of the packed arrays, and the smallest format is taken."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx as cx
from compressx import formats
from compressx.constraints.levels import Levels
from compressx.formats import FORMATS
from compressx.formats.base import same
from compressx.formats.block_max import row_sizes
from compressx.formats.packing import sizes
from compressx.formats.parts import pack_bits, pack_codes, read_codes
from compressx.formats.quantized import decoded, pack_signed, to_signed
from compressx.formats.weight import Weight

SETS = {
    "none": None,
    "unstructured": cx.unstructured(0.2),
    "sparse": cx.unstructured(0.01),
    "block": cx.block((4, 4), 0.25),
    "bsp": cx.bsp(0.5, 0.5),
    "bsp_columns": cx.bsp_columns(0.3, strips=4),
    "block_max": cx.block_max(16),
    "darb": cx.darb(1 / 5),
    "bank_balanced": cx.bank_balanced(0.3, 7),
    "bank_of_8": cx.bank_balanced(0.25, 8),
    "filters": cx.filters(0.5) & cx.columns(0.5),
    "levels": cx.quantize(4, per="channel"),
    "codebook": cx.quantize(3, grid="codebook"),
    "levels_sparse": cx.unstructured(0.25) & cx.quantize(4),
    "many_levels": cx.unstructured(0.25) & cx.quantize(12),
    "unify": cx.unify_and_prune((4, 4), 0.3, 0.5),
    "forms": cx.filters(0.5) & cx.polarize(8) & cx.quantize(8, grid="cells"),
    "pattern": cx.pattern(k=8),
    "pattern_connectivity": cx.pattern_connectivity(0.3, k=8) & cx.quantize(4),
}


def _hardened(name: str) -> tuple[np.ndarray, Any, Any]:
    shape = (3, 3, 17, 23) if "pattern" in name else (103, 67)
    w = jax.random.normal(jax.random.key(len(name)), shape)
    if SETS[name] is None:
        return np.asarray(w), None, None
    hard = cx.harden({"w": w}, [("w", SETS[name])], fresh=True)
    return np.asarray(hard.params["w"]), SETS[name], hard.structures["w"]


@pytest.mark.parametrize("name", SETS)
def test_counted_bytes_are_packed_bytes_and_the_smallest_is_taken(name: str) -> None:
    w, constraint, structure = _hardened(name)
    packed = {}
    for f in FORMATS.values():
        if f.supports(w, constraint) is not True:
            continue
        try:
            packed[f.name] = formats.pack(w, constraint, structure, f.name)
        except ValueError:
            continue
        weight = Weight(w, constraint, structure)
        index, values = f.size(weight)
        assert index + values * w.dtype.itemsize == formats.nbytes(packed[f.name]), f.name
        if f.least is not None:
            low = f.least(weight)
            assert low.indices + low.values * w.dtype.itemsize <= formats.nbytes(packed[f.name]), f.name
    best = min(packed.values(), key=formats.nbytes)
    chosen = formats.pack(w, constraint, structure)
    assert (chosen.format, formats.nbytes(chosen)) == (best.format, formats.nbytes(best))
    assert same(formats.unpack(chosen), w)
    assert set(sizes(Weight(w, constraint, structure))) <= set(FORMATS)


@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    density=st.sampled_from([0, 0.02, 0.3, 1]),
    lines=st.booleans(),
)
@settings(max_examples=60)
def test_without_a_constraint_the_smallest_of_all_is_taken(
    seed: int, shape: tuple[int, int], density: float, lines: bool
) -> None:
    r = np.random.default_rng(seed)
    w = np.where(r.random(shape) < density, r.standard_normal(shape), 0).astype(np.float32)
    w = np.repeat(w, 3, axis=1) if lines else w
    every = [formats.pack(w, format=f.name) for f in FORMATS.values() if f.supports(w, None) is True]
    assert formats.nbytes(formats.pack(w)) == min(map(formats.nbytes, every))


@given(bits=st.integers(1, 16), number=st.integers(0, 200), start=st.integers(0, 50), seed=st.integers(0, 999))
@settings(max_examples=100)
def test_codes_are_strings_of_bits(bits: int, number: int, start: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, number)
    text = "".join(f"{c:0{bits}b}" for c in codes)
    text += "0" * (-len(text) % 8)
    stored = np.array([int(text[i : i + 8], 2) for i in range(0, len(text), 8)], np.uint8)
    assert pack_codes(codes, bits).tolist() == stored.tolist() == pack_bits(codes, bits).tolist()
    here = slice(min(start, number), number)
    assert read_codes(stored, here, bits).tolist() == codes[here].tolist()


@given(seed=st.integers(0, 999), number=st.integers(0, 3000))
@settings(max_examples=30)
def test_strings_of_integers_of_many_widths(seed: int, number: int) -> None:
    r = np.random.default_rng(seed)
    widths = r.integers(0, 20, number)
    values = r.integers(0, 1 << 20, number) & ((1 << widths) - 1)
    text = "".join(f"{v:0{n}b}" if n else "" for v, n in zip(values, widths, strict=True))
    text += "0" * (-len(text) % 8)
    assert pack_bits(values, widths).tolist() == [int(text[i : i + 8], 2) for i in range(0, len(text), 8)]


@pytest.mark.parametrize("bits", [2, 4, 8, 12])
def test_signed_codes_by_table_are_those_by_rule(bits: int) -> None:
    top = 2 ** (bits - 1) - 1
    codes = np.random.default_rng(0).integers(-top, top + 1, 1000)
    stored = pack_signed(codes.astype(np.int16), Levels(bits, "uniform"))
    assert to_signed("x", read_codes(stored, slice(0, 1000), bits), bits, top).tolist() == codes.tolist()
    for wrong in ([1 << (bits - 1)], [top] if bits > 2 else [3]):  # a zero with a sign; an index above the top
        bad = np.concatenate([np.zeros(1000, np.int32), np.array(wrong, np.int32)])
        with pytest.raises(formats.CompressedFileError, match=r"a zero has a sign|index \d+ of"):
            to_signed("x", bad, bits, top - 1 if wrong == [top] else 0)


@pytest.mark.parametrize("per", ["tensor", "channel"])
@pytest.mark.parametrize("grid", ["uniform", "power_of_two", "codebook"])
def test_levels_by_table_are_those_of_the_set(per: str, grid: str) -> None:
    constraint = cx.quantize(4, grid=grid, per=per)
    w = jax.random.normal(jax.random.key(0), (128, 64))
    structure = constraint.init(w)
    hard = np.asarray(constraint.project(w, structure))
    packed = formats.pack(hard, constraint, structure, "quantized")
    assert same(formats.unpack(packed), hard)


def test_a_negative_scale_gives_no_negative_zero() -> None:
    from compressx.constraints.quantization import Levels

    codes = np.tile(np.array([0, 1], np.int8), 1000)
    made = decoded(codes, 0, np.array([-2.0, -2.0], np.float32), Levels(4, per="channel"), np.dtype("f4"), 2)
    assert not np.signbit(made[::2]).any() and (made[1::2] == -2).all()


@given(seed=st.integers(0, 999), length=st.integers(1, 70), density=st.sampled_from([0.01, 0.05, 0.3]))
@settings(max_examples=60)
def test_block_sizes_are_the_largest_that_the_rows_allow(seed: int, length: int, density: float) -> None:
    mask = np.random.default_rng(seed).random((5, length)) < density
    for allowed in ((1, 2, 4, 8, 16, 32, 64, 128), (4, 16), (3, 6, 24)):
        want = []
        for row in mask:
            best = 1
            for size in allowed:
                if any(row[i : i + size].sum() > 1 for i in range(0, length, size)):
                    break
                best = size
            want.append(best)
        assert row_sizes(mask, allowed).tolist() == want


def test_large_leaves_are_encoded_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    constraint = cx.quantize(4, per="channel")
    w = jax.random.normal(jax.random.key(0), (50, 32))
    structure = constraint.init(w)
    hard = np.asarray(constraint.project(w, structure))
    whole = formats.pack(hard, constraint, structure, "quantized")
    monkeypatch.setattr("compressx.formats.quantized._ROWS", 7 * 32)
    by_rows = formats.pack(hard, constraint, structure, "quantized")
    assert all(same(whole.arrays[k], by_rows.arrays[k]) for k in whole.arrays)
    assert jnp.asarray(whole.arrays["codes"]).size == 50 * 16


def test_float64_leaves_keep_their_levels_in_every_thread(tmp_path: Path) -> None:
    rules = [("w", cx.quantize(4))]
    with jax.enable_x64(True):
        hard = cx.harden({"w": jax.random.normal(jax.random.key(0), (32, 16), jnp.float64)}, rules, fresh=True)
        cx.save_model(tmp_path / "m", hard, rules)
    saved = cx.load_model(tmp_path / "m")
    assert saved.packed["w"].format == "quantized" and same(saved.params["w"], np.asarray(hard.params["w"]))
