"""Messages come back as they were written, have the size that was counted, and hostile ones are refused."""

import struct

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from compressx.federated import algorithm
from compressx.federated.simulate import delta_bytes, message_bytes
from compressx.federated.trusted import messages, oblivious, rounds
from compressx.federated.trusted.messages import BITMAP, DELTA, DENSE, FLOAT32, INT8, SHARED, UPDATE, Layer
from compressx.federated.trusted.refused import Refused


def sparse(rng: np.random.Generator, size: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    mask = np.zeros(size, bool)
    mask[rng.choice(size, k, replace=False)] = True
    return np.where(mask, rng.standard_normal(size), 0).astype(np.float32), mask


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**20),
    shapes=st.lists(st.tuples(st.integers(1, 4000), st.floats(0.002, 1.0), st.booleans()), min_size=1, max_size=4),
    values=st.sampled_from([FLOAT32, messages.FLOAT16, INT8]),
    shared=st.booleans(),
    pad=st.booleans(),
)
def test_round_trip_and_size(
    seed: int, shapes: list[tuple[int, float, bool]], values: int, shared: bool, pad: bool
) -> None:
    rng = np.random.default_rng(seed)
    layout = [Layer(f"l{i}", n, max(1, int(d * n)), exact) for i, (n, d, exact) in enumerate(shapes)]
    pairs = [sparse(rng, x.size, x.budget) for x in layout]
    arrays = [a for a, _ in pairs]
    masks = [m if x.budget < x.size else None for x, (_, m) in zip(layout, pairs, strict=True)]
    size = messages.padded_bytes(layout, values, shared) if pad else 0
    data = messages.write(arrays, layout, kind=UPDATE, values=values, masks=masks, shared=shared, pad=size)
    supports = [None if m is None else np.flatnonzero(m) for m in masks] if shared else None
    read = messages.parse(data, layout, kind=UPDATE, values=values, supports=supports, size=size)
    positions = [messages.varint_bytes(np.diff(np.flatnonzero(m), prepend=-1)) for m in masks if m is not None]
    assert len(data) == message_bytes(layout, values, positions, shared=shared, padded=pad)
    for piece, x, layer in zip(read.pieces, arrays, layout, strict=True):
        tolerance = {FLOAT32: 0, messages.FLOAT16: 2e-3 * np.abs(x).max(), INT8: np.abs(x).max() / 250}[values]
        tolerance = 0 if layer.exact else tolerance
        np.testing.assert_allclose(messages.to_dense(piece, layer.size), x, atol=tolerance, rtol=0)


def test_the_smallest_code_wins() -> None:
    rng = np.random.default_rng(0)
    for k, code in ((20, DELTA), (3000, BITMAP), (9900, DENSE)):
        layout = [Layer("w", 10_000, k)]
        x, mask = sparse(rng, 10_000, k)
        data = messages.write([x], layout, kind=UPDATE, masks=[mask])
        assert messages.parse(data, layout).pieces[0].code == code
        others = [messages.write([x], layout, kind=UPDATE, masks=[mask], codes=(c,)) for c in (DENSE, BITMAP, DELTA)]
        assert len(data) == min(map(len, others))


def test_a_loop_decodes_the_same_varints() -> None:
    gaps = np.array([1, 127, 128, 300, 16_383, 16_384, 2**21 - 1, 2**21, 2**28 - 1])
    data, found, value, shift = messages.to_varints(gaps), [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            found.append(value)
            value = shift = 0
    assert found == gaps.tolist() and len(data) == messages.varint_bytes(gaps)


def test_counted_in_jax_as_in_numpy() -> None:
    rng = np.random.default_rng(1)
    count = jax.jit(delta_bytes)
    for k in (0, 1, 30, 20_000):
        mask = sparse(rng, 40_000, k)[1]
        assert int(count(jnp.asarray(mask))) == messages.varint_bytes(np.diff(np.flatnonzero(mask), prepend=-1))


@pytest.mark.parametrize("values", ["float16", "int8"])
def test_quantised_in_jax_as_in_numpy(values: str, rng) -> None:
    x = rng.standard_normal(500).astype(np.float32)
    data = messages.write([x], [Layer("w", 500, 500)], kind=UPDATE, values=messages.VALUES.index(values))
    got = messages.parse(data, [Layer("w", 500, 500)]).pieces[0].values
    np.testing.assert_allclose(algorithm.quantise(jnp.asarray(x), values), got, rtol=1e-6, atol=1e-7)


def test_the_largest_message_is_accepted() -> None:
    layout = [Layer("tiny", 1, 1), Layer("small", 2, 2), Layer("exact", 3, 3, True)]
    for values in (FLOAT32, messages.FLOAT16, INT8):
        data = messages.write([np.ones(x.size) for x in layout], layout, kind=UPDATE, values=values)
        assert len(data) <= messages.largest_bytes(layout)
        assert len(messages.parse(data, layout, values=values).pieces) == 3


LAYOUT = [Layer("w", 1001, 10)]


def forged(code: int, count: int, body: bytes, *, length: int | None = None, layers: int = 1, kind: int = 1) -> bytes:
    content = struct.pack("<BI", code, count) + body
    size = 12 + len(content) if length is None else length
    return struct.pack("<4sBBHI", b"CXM1", kind, 0, layers, size) + content


def floats(*x: float) -> bytes:
    return np.array(x, "<f4").tobytes()


HOSTILE = {
    "empty": b"",
    "no magic": b"XXXX" + forged(DELTA, 1, b"\x01" + floats(1))[4:],
    "other kind": forged(DELTA, 1, b"\x01" + floats(1), kind=7),
    "other layer count": forged(DELTA, 1, b"\x01" + floats(1), layers=2),
    "length too long": forged(DELTA, 1, b"\x01" + floats(1), length=10_000),
    "length too short": forged(DELTA, 1, b"\x01" + floats(1), length=14),
    "unknown code": forged(9, 1, b"\x01" + floats(1)),
    "shared without a support": forged(SHARED, 1, floats(1)),
    "count beyond the budget": forged(DELTA, 11, bytes([1] * 11) + floats(*range(11))),
    "a bomb of a count": forged(DELTA, 2**32 - 1, b"\x01" + floats(1)),
    "a bomb of a bitmap": forged(BITMAP, 2**31, b"\xff" * 125),
    "dense that is not dense": forged(DENSE, 999, floats(*[0.0] * 999)),
    "dense beyond the budget": forged(DENSE, 1001, floats(*[1.0] * 1001)),
    "index out of range": forged(DELTA, 2, messages.to_varints(np.array([1, 1001])) + floats(1, 2)),
    "index twice": forged(DELTA, 2, b"\x05\x00" + floats(1, 2)),
    "unsorted: a difference that wraps": forged(DELTA, 2, b"\x05\xff\xff\xff\x7f" + floats(1, 2)),
    "a difference of five bytes": forged(DELTA, 1, b"\x80\x80\x80\x80\x01" + floats(1)),
    "a difference longer than it need be": forged(DELTA, 1, b"\x81\x00" + floats(1)),
    "differences cut off": forged(DELTA, 3, b"\xff\xff"),
    "bitmap with another count": forged(
        BITMAP, 3, np.packbits(np.arange(1001) < 5, bitorder="little").tobytes() + floats(1, 2, 3)
    ),
    "bits after the last weight": forged(BITMAP, 1, b"\x00" * 125 + b"\x80" + floats(1)),
    "NaN": forged(DELTA, 1, b"\x01" + floats(float("nan"))),
    "infinity": forged(DELTA, 1, b"\x01" + floats(float("inf"))),
    "a huge value": forged(DELTA, 1, b"\x01" + floats(1e30)),
    "values cut off": forged(DELTA, 2, b"\x01\x01" + floats(1)),
    "bytes left over": forged(DELTA, 1, b"\x01" + floats(1) + b"\x00"),
    "oversized": forged(DELTA, 1, b"\x01" + floats(1)) + bytes(10_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_refused(name: str) -> None:
    with pytest.raises(Refused):
        messages.parse(HOSTILE[name], LAYOUT, kind=UPDATE, values=FLOAT32)


def test_padding_must_be_zero_and_of_the_agreed_size() -> None:
    good = messages.write([np.eye(1, 1001, 3)[0]], LAYOUT, kind=UPDATE, pad=200)
    assert messages.parse(good, LAYOUT, size=200).pieces[0].indices.tolist() == [3]
    for bad in (good[:-1] + b"\x01", good + b"\x00", good[:-1]):
        with pytest.raises(Refused):
            messages.parse(bad, LAYOUT, size=200)


@settings(max_examples=150)
@given(st.data())
def test_a_changed_message_is_read_whole_or_refused(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 100)))
    x, mask = sparse(rng, 1001, 10)
    code = data.draw(st.sampled_from([BITMAP, DELTA]))
    raw = bytearray(messages.write([x], LAYOUT, kind=UPDATE, masks=[mask], codes=(code,)))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read = messages.parse(bytes(raw), LAYOUT)
    except Refused:
        return
    (piece,) = read.pieces
    assert piece.values.size <= 10 and np.all(np.isfinite(piece.values))
    assert np.all(np.diff(piece.indices) > 0) and piece.indices[-1] < 1001


def test_int8_edges_are_refused() -> None:
    for body in (
        b"\x00\x00\x80\xbf" + b"\x01" + b"\x01",
        floats(1.0) + b"\x01" + b"\x80",
        floats(float("nan")) + b"\x01\x01",
    ):
        raw = struct.pack("<4sBBHI", b"CXM1", 1, INT8, 1, 12 + 5 + len(body)) + struct.pack("<BI", DELTA, 1) + body
        with pytest.raises(Refused):
            messages.parse(raw, LAYOUT)


@pytest.mark.parametrize("bad", [np.full(1001, np.nan), np.ones(1001), np.ones(999)])
def test_writing_refuses_what_could_not_be_read(bad) -> None:
    with pytest.raises(ValueError, match="w: "):
        messages.write([bad], LAYOUT, kind=UPDATE)


# -- oblivious ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(bits=st.lists(st.integers(0, 1), min_size=1, max_size=300))
def test_oblivious_expansion_is_a_scatter(bits: list[int]) -> None:
    held = np.array(bits, np.uint8)
    values = np.arange(1, held.sum() + 1, dtype=np.float32)
    expected = np.zeros(held.size, np.float32)
    expected[np.flatnonzero(held)] = values
    np.testing.assert_array_equal(oblivious.expand(held, values), expected)


class Traced(np.ndarray):
    """Records every operation with its shapes, its strides and how it indexes: what an observer of addresses sees."""

    log: list = []

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        plain = [np.asarray(x) for x in inputs]
        kwargs = {k: tuple(map(np.asarray, v)) if k == "out" else v for k, v in kwargs.items()}
        Traced.log.append((ufunc.__name__, method, [(x.shape, x.strides, x.dtype.str) for x in plain]))
        return np.asarray(getattr(ufunc, method)(*plain, **kwargs)).view(Traced)

    def __array_function__(self, function, types, args, kwargs):
        args = [np.asarray(a) if isinstance(a, np.ndarray) else a for a in args]
        Traced.log.append((function.__name__, [a.shape for a in args if isinstance(a, np.ndarray)]))
        return np.asarray(function(*args, **kwargs)).view(Traced)

    def __getitem__(self, key):
        Traced.log.append(("get", repr(key)))
        return np.asarray(self)[key].view(Traced)

    def __setitem__(self, key, value):
        Traced.log.append(("set", repr(key)))
        np.asarray(self)[key] = np.asarray(value)


def trace(run, bits: np.ndarray, values: np.ndarray) -> list:
    Traced.log = []
    run(bits.view(Traced), values.view(Traced))
    return Traced.log


def test_what_is_touched_does_not_depend_on_the_indices(rng) -> None:
    def scatter(bits, values):
        out = np.zeros(bits.shape[0], np.float32).view(Traced)
        out[np.flatnonzero(np.asarray(bits))] = values

    pairs = [sparse(rng, 400, 40)[1].astype(np.uint8) for _ in range(2)]
    values = np.ones(40, np.float32)
    oblivious_traces = [trace(oblivious.expand, bits, values) for bits in pairs]
    assert oblivious_traces[0] == oblivious_traces[1] and len(oblivious_traces[0]) > 50
    plain = [trace(scatter, bits, values) for bits in pairs]
    assert plain[0] != plain[1]  # the recorder does see a data-dependent access


class Watched:
    """NumPy, whose new arrays are `Traced`."""

    def __getattr__(self, name):
        found = getattr(np, name)
        if name not in ("frombuffer", "zeros", "unpackbits", "ascontiguousarray"):
            return found
        return lambda *args, **kwargs: np.asarray(found(*args, **kwargs)).view(Traced)


@pytest.mark.parametrize("oblivious_round", [True, False])
def test_a_whole_round_touches_the_same_whatever_the_supports(rng, monkeypatch, oblivious_round: bool) -> None:
    """From the bytes of two uploads to the next model: every access of NumPy's, in order."""
    layers = (messages.Layer("a", 300, 30), messages.Layer("b", 20, 20))
    model = [np.zeros(300, np.float32), np.zeros(20, np.float32)]
    plan = rounds.Plan(
        layers, {0: ("00", 3), 1: ("01", 2)}, 1, "update", padded=True, oblivious=oblivious_round,
        initial=rounds.model_hash(model).hex(),
    )  # fmt: skip
    state = rounds.initial(plan, model)
    logs, results, wanted = [], [], []
    for _ in range(2):
        uploads, mean = {}, np.zeros(300)
        for client, share in ((0, 0.6), (1, 0.4)):
            mask = np.zeros(300, bool)
            mask[rng.permutation(300)[:30]] = True
            values = np.where(mask, rng.normal(size=300), 0).astype(np.float32)
            mean += share * values
            uploads[client] = messages.write(
                [values, np.ones(20, np.float32)], layers, kind=messages.UPDATE, values=messages.FLOAT32,
                masks=[mask, None], codes=(messages.BITMAP,), pad=rounds.upload_size(plan, 0),
            )  # fmt: skip
        with monkeypatch.context() as patch:
            for module in (messages, rounds, oblivious):
                patch.setattr(module, "np", Watched())
            Traced.log = []
            read = {client: rounds.read_upload(plan, state, data) for client, data in uploads.items()}
            after, _ = rounds.close(plan, state, read)
        logs.append(Traced.log)
        results.append(np.asarray(after.layers[0]))
        wanted.append(mean)
    np.testing.assert_allclose(results, wanted, atol=1e-6)
    assert len(logs[0]) > 100 and (logs[0] == logs[1]) == oblivious_round
