"""Formats for weights on levels and in unified blocks: exact inverses, bytes from formulas, nothing believed."""

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
from compressx.formats.quantized import coded, pack_codes, read_codes
from tests.formats.mutations import mutated

BITS = {"float32": 32, "bfloat16": 16}


def hard(constraint: cx.Constraint, shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> tuple[Any, Any]:
    w = jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))

    @jax.jit
    def both(w: Any) -> Any:
        structure = constraint.init(w)
        return constraint.project(w, structure), structure

    z, structure = both(w)
    return np.asarray(z), structure


def up(bits: int) -> int:
    return math.ceil(bits / 8)


@given(st.integers(1, 16), st.lists(st.integers(0, 2**16 - 1), max_size=30))
def test_codes_come_back(bits: int, values: list[int]) -> None:
    codes = np.asarray(values, np.int64) & ((1 << bits) - 1)
    stored = pack_codes(codes, bits)
    assert stored.size == up(bits * codes.size)
    text = "".join(f"{v:0{bits}b}" for v in codes)
    assert "".join(f"{b:08b}" for b in stored)[: len(text)] == text
    np.testing.assert_array_equal(read_codes(stored, slice(0, codes.size), bits), codes)
    rest = slice(codes.size // 3, codes.size)
    np.testing.assert_array_equal(read_codes(stored, rest, bits), codes[rest])


QUANTIZED = {
    "uniform": cx.quantize(4),
    "channel": cx.quantize(3, per="channel"),
    "powers": cx.quantize(4, grid="power_of_two"),
    "cells": cx.quantize(4, grid="cells"),
    "codebook": cx.quantize(4, grid="codebook"),
    "codebooks": cx.quantize(3, grid="codebook", per="channel"),
    "pruned": cx.unstructured(0.2) & cx.quantize(8),
    "pruned little": cx.unstructured(0.95) & cx.quantize(2),
    "zero level": cx.quantize(2, zero_level=True),
    "asymmetric": cx.quantize(3, symmetric=False),
    "asymmetric channels": cx.unstructured(0.3) & cx.quantize(8, per="channel", symmetric=False),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, np.float32) for n in QUANTIZED]
    + [("codebooks", ml_dtypes.bfloat16)]
    + [pytest.param(n, ml_dtypes.bfloat16, marks=pytest.mark.slow) for n in ("uniform", "powers")],
)
def test_quantized_comes_back_in_the_bytes_of_the_formula(name: str, dtype: Any) -> None:
    constraint = QUANTIZED[name]
    w, structure = hard(constraint, (3, 3, 5, 7), dtype)
    packed = formats.pack(w, constraint, structure, "quantized")
    assert same(formats.unpack(packed), w)
    levels = levels_of(constraint.sets[-1].spec)
    b = levels.bits + (levels.grid == "cells")
    channels = 7 if levels.per == "channel" else 1
    table = channels * (levels.top * w.dtype.itemsize if levels.grid == "codebook" else 4 if levels.symmetric else 8)
    kept = np.count_nonzero(w)
    assert formats.nbytes(packed) == table + min(up(w.size * b), up(kept * b) + up(w.size))
    assert ("mask" in packed.arrays) == (name in ("pruned", "asymmetric channels"))
    unknown = formats.pack(w, constraint, None, "quantized")  # without a structure the scale is found again
    assert same(formats.unpack(unknown), w)


@pytest.mark.parametrize("name", ["uniform", "channel", "cells", "pruned", "zero level"])
@pytest.mark.parametrize("format", ["bit-planes", "bit-planes-complement"])
def test_bit_planes_are_the_bits_of_the_integers(name: str, format: str) -> None:
    constraint = QUANTIZED[name]
    w, structure = hard(constraint, (3, 3, 5, 7))
    packed = formats.pack(w, constraint, structure, format)
    assert same(formats.unpack(packed), w)
    c = coded(w, constraint, structure)
    planes = packed.arrays["planes"]
    number = planes.shape[0]
    bits = np.unpackbits(planes, axis=1)[:, : w.size].astype(np.int64)
    place = 2 ** np.arange(number - 1, -1, -1)
    if format == "bit-planes":
        assert number == int(np.abs(c.codes).max()).bit_length()
        sign = 1 - 2 * np.unpackbits(packed.arrays["sign"])[: w.size].astype(np.int64)
        integers = sign * (place @ bits)
    else:
        place[0] *= -1
        integers = place @ bits
    np.testing.assert_array_equal(integers, c.codes.reshape(-1))
    np.testing.assert_array_equal(
        integers * np.broadcast_to(structure_of(structure), (45, 7)).reshape(-1), w.reshape(-1)
    )
    signs = up(w.size) if format == "bit-planes" else 0
    assert formats.nbytes(packed) == number * up(w.size) + signs + c.structure.nbytes


def structure_of(structure: Any) -> np.ndarray:
    return np.asarray(structure[-1] if isinstance(structure, tuple) else structure)


FORMS = {
    "forms": (cx.filters(0.5) & cx.columns(0.6) & cx.polarize(4, order="W") & cx.quantize(8, grid="cells"), 4),
    "height": (cx.columns(0.5) & cx.polarize(8, order="H") & cx.quantize(4, grid="cells"), 8),
    "channel": (cx.polarize(3, order="C") & cx.quantize(4, grid="cells", per="channel", cell_bits=4), 3),
    "uniform": (cx.polarize(16, order="C") & cx.quantize(8), 16),
    "no fragments": (cx.filters(0.5) & cx.quantize(6, grid="cells", cell_bits=3), 1),
}


@pytest.mark.parametrize("name", FORMS)
def test_cells_come_back_in_the_bytes_of_the_formula(name: str) -> None:
    constraint, m = FORMS[name]
    w, structure = hard(constraint, (3, 2, 5, 8))
    packed = formats.pack(w, constraint, structure, "cells")
    assert same(formats.unpack(packed), w)
    levels = levels_of(constraint.sets[-1].spec)
    cell = levels.cell_bits if levels.grid == "cells" else 1
    matrix = w.reshape(30, 8)
    rows, f = fragment_rows(constraint, structure, matrix), int(np.any(matrix, axis=0).sum())
    p = len(rows)
    slices = math.ceil(levels.top.bit_length() / cell)
    scales = 4 * (8 if levels.per == "channel" else 1)
    masks = (up(30) if p < 30 else 0) + (up(8) if f < 8 else 0)
    assert formats.nbytes(packed) == slices * up(p * f * cell) + up(math.ceil(p / m) * f) + masks + scales
    # the cells are what a crossbar holds: slices of the magnitudes, rows in fragment order
    first = np.unpackbits(packed.arrays["cells"][0])[: p * f * cell].reshape(p * f, cell)
    top = (first * 2 ** np.arange(cell - 1, -1, -1)).sum(axis=1)
    codes = np.abs(coded(w, constraint, structure).codes.reshape(30, 8))
    kept = np.ix_(rows, np.flatnonzero(matrix.any(axis=0)))
    np.testing.assert_array_equal(top, (codes[kept] >> (cell * (slices - 1))).reshape(-1))


def fragment_rows(constraint: cx.Constraint, structure: Any, matrix: np.ndarray) -> np.ndarray:
    """Rows on the crossbar: those of the fragments up to the last non-zero one, or all non-zero ones."""
    for single, of in zip(constraint.sets, structure, strict=True):
        if single.spec["kind"] == "polarize":
            order = np.asarray(of.order)
            return order[: np.flatnonzero(matrix[order].any(axis=1))[-1] + 1]
    return np.flatnonzero(matrix.any(axis=1))


def test_cells_refuse_mixed_fragments() -> None:
    w = np.asarray([[1.0], [-1.0]], np.float32)
    constraint = cx.polarize(2) & cx.quantize(2, grid="cells")
    signs, scale = constraint.init(jnp.asarray(w))
    with pytest.raises(ValueError, match="1 fragments of 2 hold both signs"):
        formats.pack(w, constraint, (signs, jnp.ones_like(scale)), "cells")  # one of the scales on which both lie


UNIFIED = {
    "unify": cx.unify((4, 2), 0.6),
    "both": cx.unify_and_prune((4, 2), 0.4, 0.3),
    "cubes": cx.unify_and_prune((2, 6, 2), 0.4, 0.3),
    "prune": cx.prune_blocks((4, 1), 0.5),
    "coded": cx.unify_and_prune((4, 2), 0.4, 0.3) & cx.quantize(5),
    "channels": cx.unify((4, 1), 0.7) & cx.quantize(5, per="channel"),
    "clusters": cx.unify((4, 2), 0.7) & cx.quantize(4, grid="codebook"),
}


def blocks(w: np.ndarray, block: list[int]) -> list[np.ndarray]:
    x = w.reshape(30, 7) if len(block) == 2 else w.reshape(6, 5, 7).transpose(1, 0, 2)
    x = x if len(block) == 3 else x[None]
    a, b, c = block if len(block) == 3 else (1, *block)
    return [
        x[i : i + a, j : j + b, k : k + c].reshape(-1)
        for i in range(0, x.shape[0], a)
        for j in range(0, x.shape[1], b)
        for k in range(0, x.shape[2], c)
    ]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, "float32") for n in UNIFIED]
    + [pytest.param(n, "bfloat16", marks=[] if n in ("both", "coded") else pytest.mark.slow) for n in UNIFIED],
)
def test_unified_comes_back_in_the_bits_of_the_formula(name: str, dtype: str) -> None:
    constraint = UNIFIED[name]
    kind = np.float32 if dtype == "float32" else ml_dtypes.bfloat16
    w, structure = hard(constraint, (3, 2, 5, 7), kind)
    packed = formats.pack(w, constraint, structure, "unified")
    assert same(formats.unpack(packed), w)
    coded_bits = constraint.sets[-1].spec.get("bits")
    whole = coded_bits or BITS[dtype]  # q + 1
    magnitude = whole - 1 if coded_bits else whole
    pieces = blocks(w.astype(np.float32), constraint.sets[0].spec["block"])
    pruned = [p for p in pieces if not p.any()]
    tied = [p for p in pieces if p.any() and np.ptp(np.abs(p)) == 0]
    free = [p for p in pieces if p.any() and np.ptp(np.abs(p)) > 0]
    total = (
        (up(len(pieces)) if pruned else 0)
        + (up(len(pieces) - len(pruned)) + up(sum(p.size for p in tied)) if tied else 0)
        + up(len(tied) * magnitude)
        + up(sum(p.size for p in free) * whole)
    )
    levels = packed.arrays["levels"].nbytes if coded_bits else 0
    assert formats.nbytes(packed) == total + levels
    assert pruned or "prune" not in str(constraint)


def test_unified_gain_is_that_of_the_sheet() -> None:
    """Blocks of 16 at 7 + 1 bits: n (q + 1) / (n + q) = 5.57 over the dense codes, map and scale apart."""
    constraint = cx.unify((4, 4), 1.0) & cx.quantize(8)
    w, structure = hard(constraint, (64, 64))
    packed = formats.pack(w, constraint, structure, "unified")
    payload = packed.arrays["signs"].nbytes + packed.arrays["magnitudes"].nbytes
    assert w.size / payload == pytest.approx(16 * 8 / (16 + 7))
    assert packed.arrays["unified"].nbytes == up(256) and formats.pack(w, constraint, structure).format == "unified"


@settings(max_examples=60)
@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([(2, 2), (1, 3), (2, 1, 2)]), st.integers(0, 2**32 - 1))
def test_any_bits_come_back_from_the_unified_format(rows: int, cols: int, block: Any, seed: int) -> None:
    r = np.random.default_rng(seed)
    w = r.choice(np.asarray([0.0, -0.0, 1.0, -1.0, np.nan, -np.inf, 2.5], np.float32), (rows, cols))
    packed = formats.pack(w, cx.unify(block, 1.0), (), "unified")
    assert same(formats.unpack(packed), w)


def test_weights_off_their_levels_are_refused_and_fall_back() -> None:
    constraint = cx.quantize(4)
    w, structure = hard(constraint, (6, 5))
    w = w.copy()
    w[0, 0] *= 1.01
    with pytest.raises(ValueError, match="1 of 30 weights are not on the levels"):
        formats.pack(w, constraint, structure, "quantized")
    assert formats.pack(w, constraint, structure).format in ("dense", "compact", "bitmask")


@pytest.mark.parametrize(
    ("format", "constraint", "message"),
    [
        ("quantized", None, r"needs a constraint with quantize\(...\)"),
        ("bit-planes", cx.quantize(4, grid="codebook"), "'codebook' are not integers times a scale"),
        ("cells", cx.quantize(4, grid="power_of_two"), "'power_of_two' are not integers"),
        ("unified", cx.quantize(4), "which cuts the blocks"),
    ],
)
def test_formats_say_what_they_need(format: str, constraint: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        formats.pack(np.ones((3, 4), np.float32), constraint, None, format)


def example(format: str) -> Packed:
    constraint = {
        "quantized": cx.unstructured(0.2) & cx.quantize(8, per="channel"),
        "bit-planes": cx.quantize(4),
        "bit-planes-complement": cx.quantize(4),
        "cells": FORMS["forms"][0],
        "unified": UNIFIED["coded"],
    }[format]
    w, structure = hard(constraint, (3, 2, 5, 7))
    return formats.pack(w, constraint, structure, format)


@functools.cache
def examples() -> dict[str, Packed]:
    """A packed weight of every format, made when the first test asks: every worker of a run imports this file."""
    names = ("quantized", "bit-planes", "bit-planes-complement", "cells", "unified")
    raw = formats.pack(hard(UNIFIED["both"], (3, 2, 5, 7))[0], UNIFIED["both"], (), "unified")
    return {**{name: example(name) for name in names}, "unified raw": raw}


def meta(name: str, **changes: Any) -> Packed:
    return examples()[name]._replace(meta={**examples()[name].meta, **changes})


def array(name: str, entry: str, change: Any) -> Packed:
    arrays = examples()[name].arrays
    return examples()[name]._replace(arrays={**arrays, entry: change(arrays[entry].copy())})


def fill(value: int) -> Any:
    return lambda a: np.full_like(a, value)


DAMAGE = {
    "grid": (lambda: meta("quantized", grid="round"), "quantized/grid: 'round'"),
    "bits": (lambda: meta("quantized", bits=77), "quantized/bits: 77"),
    "few bits": (lambda: meta("quantized", bits=1), "quantized/bits: bits must be in 2..16"),
    "per": (lambda: meta("quantized", per=None), "quantized/per: None"),
    "masked": (lambda: meta("quantized", masked=False), "quantized/mask: present"),
    "mask": (lambda: array("quantized", "mask", fill(255)), "quantized/mask: bits after"),
    "codes": (lambda: array("quantized", "codes", lambda a: a[1:]), r"quantized/codes: shape \[41\], expected \[42\]"),
    "sign of zero": (lambda: array("quantized", "codes", fill(128)), "quantized/codes: a zero has a sign"),
    "scale": (lambda: array("quantized", "levels", fill(np.nan)), "quantized/levels: holds NaN"),
    "scales": (lambda: array("quantized", "levels", lambda a: a[1:]), r"quantized/levels: shape \[6\], expected \[7\]"),
    "planes": (lambda: array("bit-planes", "planes", lambda a: a[:, 1:]), "bit-planes/planes: shape"),
    "many planes": (lambda: array("bit-planes", "planes", lambda a: np.tile(a, (9, 1))), "27 planes for levels of 4"),
    "plane grid": (lambda: meta("bit-planes", grid="power_of_two"), "bit-planes/grid: 'power_of_two' has no bit"),
    "sign": (lambda: array("bit-planes", "planes", fill(0)), "bit-planes/sign: a zero"),
    "complement": (
        lambda: array("bit-planes-complement", "planes", lambda a: np.where(np.arange(4)[:, None] == 0, 255, 0 * a)),
        "complement/planes: (dtype|bits after|integer 8)",
    ),
    "fragment": (lambda: meta("cells", fragment=0), "cells/fragment: 0"),
    "order": (lambda: meta("cells", order="X"), "cells/order: 'X'"),
    "cell": (lambda: meta("cells", cell=3), "cells/cells: shape"),
    "rows": (lambda: array("cells", "rows", fill(255)), "cells/rows: not a mask"),
    "signs": (lambda: array("cells", "signs", lambda a: a[1:]), "cells/signs: shape"),
    "block": (lambda: meta("unified", block=[0, 1]), "unified/block"),
    "blocks": (lambda: meta("unified", block=[1, 1, 1, 1]), "unified/block"),
    "pruned": (lambda: array("unified", "pruned", fill(255)), r"unified/unified: shape \[3\], expected \[0\]"),
    "free": (lambda: array("unified", "free", lambda a: a[1:]), "unified/free: shape"),
    "magnitude": (lambda: array("unified", "magnitudes", fill(0)), "unified/magnitudes: indices 0..0"),
    "coded": (lambda: meta("unified", coded=1), "unified/coded: 1 is not"),
    "raw": (lambda: meta("unified", coded=False), "unified/levels: present"),
    "negative": (lambda: array("unified raw", "magnitudes", lambda a: -a), "a magnitude is negative"),
    "missing": (
        lambda: examples()["cells"]._replace(
            arrays={k: v for k, v in examples()["cells"].arrays.items() if k != "cells"}
        ),
        "cells/cells: missing",
    ),
    "unknown": (
        lambda: examples()["cells"]._replace(arrays={**examples()["cells"].arrays, "extra": np.zeros(1)}),
        "cells/extra: unknown",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_named(case: str) -> None:
    make, message = DAMAGE[case]
    with pytest.raises(CompressedFileError, match=message):
        formats.unpack(make())


@settings(max_examples=min(400, 5 * settings().max_examples))
@given(data=st.data())
def test_mutations_unpack_to_a_weight_or_one_error(data: st.DataObject) -> None:
    packed = mutated(data, examples()[data.draw(st.sampled_from(sorted(examples())))])
    try:
        back = formats.unpack(packed, max_bytes=1 << 20)
    except CompressedFileError:
        return
    assert back.shape == packed.shape
