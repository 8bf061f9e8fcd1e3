"""Messages that carry a model or an update: dense, bitmap, delta-index or shared support, the smallest for each layer.

    message   "CXM1" | kind u8 | values u8 | layers u16 | length u32 | layer ... | zeros up to the padded size
    layer     code u8 | count u32 | scale f32 (int8 values only) | positions | values (float32 where the layer is exact)

    code      positions                                                   values
    DENSE     none                                                        one for every weight
    BITMAP    one bit a weight, the first weight in the lowest bit        one for every set bit
    DELTA     index - previous index (first: index + 1) as LEB128         one for every index
    SHARED    none: the support both sides hold                           one for every weight of the support

Integers are little-endian. The parser trusts nothing: it knows the layers, their sizes and their budgets beforehand,
checks every count against them before it allocates, and hands out values only after the whole message has passed.
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from compressx.federated.trusted import oblivious
from compressx.federated.trusted.refused import Refused

Array = npt.NDArray[Any]

DENSE, BITMAP, DELTA, SHARED = range(4)
CODES = ("dense", "bitmap", "delta", "shared")
WEIGHTS, UPDATE = range(2)  # the model itself, or what is to be added to the model that was sent
FLOAT32, FLOAT16, INT8 = range(3)
VALUES = ("float32", "float16", "int8")
_BYTES = (4, 2, 1)

_MAGIC = b"CXM1"
_HEADER = struct.Struct("<4sBBHI")
_LAYER = struct.Struct("<BI")
MAX_LAYER = 2**28  # an index difference has at most four bytes of seven bits


class Layer(NamedTuple):
    """What is known of a layer before any message: its name, its weights, and how many of them may be non-zero.

    Values of an `exact` layer are float32 whatever those of the message are: a running variance of 1e-3 beside one of
    10 does not survive eight bits, and below zero it is the end of the model.
    """

    name: str
    size: int
    budget: int
    exact: bool = False

    def values(self, values: int) -> int:
        """The type of its values in a message of such values."""
        return FLOAT32 if self.exact else values


class Piece(NamedTuple):
    """One layer of a parsed message.

    Attributes:
      code: of `CODES`.
      indices: where the values go; None: one for every weight, or as `bits` says.
      values: float32.
      bits: uint8 `[size]`, where the values go in order, of a bitmap that was read obliviously; else None.
    """

    code: int
    indices: Array | None
    values: Array
    bits: Array | None = None


class Message(NamedTuple):
    """A parsed message: `kind` WEIGHTS or UPDATE, and a piece for every layer."""

    kind: int
    pieces: tuple[Piece, ...]


def check_layout(layout: Sequence[Layer]) -> None:
    """Raises ValueError where a layer is too large or its budget impossible."""
    for layer in layout:
        if not 1 <= layer.budget <= layer.size < MAX_LAYER:
            raise ValueError(
                f"{layer.name}: size {layer.size} and budget {layer.budget}; need 1 <= budget <= size < 2**28"
            )
    if not 1 <= len(layout) < 2**16:
        raise ValueError(f"{len(layout)} layers; a message has 1 to {2**16 - 1}")


# -- sizes -------------------------------------------------------------------------------------------------------------


def overhead(layout: Sequence[Layer], values: int) -> int:
    """Bytes of a message that are neither positions nor values."""
    return _HEADER.size + sum(_LAYER.size + (4 if layer.values(values) == INT8 else 0) for layer in layout)


def varint_bytes(gaps: Array) -> int:
    """Bytes of index differences as LEB128."""
    return int(gaps.size + sum(int(np.count_nonzero(gaps >= 1 << (7 * k))) for k in (1, 2, 3)))


def body_bytes(code: int, layer: Layer, count: int, positions: int, values: int) -> int:
    """Bytes of a layer's positions and `count` values; `positions` are those of DELTA."""
    each = _BYTES[layer.values(values)]
    if code == DENSE:
        return layer.size * each
    return (0, -(-layer.size // 8), positions, 0)[code] + count * each


def padded_bytes(layout: Sequence[Layer], values: int, shared: bool = False) -> int:
    """The size that every message within the budgets fits into; with `shared`, where the support is known."""
    total = overhead(layout, values)
    for layer in layout:
        codes = [DENSE] if layer.budget == layer.size else [DENSE, SHARED if shared else BITMAP]
        total += min(body_bytes(c, layer, layer.budget, 0, values) for c in codes)
    return total


def largest_bytes(layout: Sequence[Layer]) -> int:
    """No message of these layers without padding is longer, whatever its values and codes."""
    whole = [layer._replace(budget=layer.size) for layer in layout]
    return max(padded_bytes(whole, values) for values in (FLOAT32, INT8))


# -- writing -----------------------------------------------------------------------------------------------------------


def to_varints(gaps: Array) -> bytes:
    """Positive integers below 2**28 as LEB128."""
    gaps = gaps.astype(np.uint32)
    lengths = 1 + (gaps >= 1 << 7).astype(int) + (gaps >= 1 << 14) + (gaps >= 1 << 21)
    out = np.zeros((gaps.size, 4), np.uint8)
    for k in range(4):
        out[:, k] = (gaps >> (7 * k)) & 0x7F | np.where(k + 1 < lengths, 0x80, 0).astype(np.uint32)
    return out[np.arange(4)[None] < lengths[:, None]].tobytes()


def to_values(x: Array, values: int) -> tuple[bytes, bytes]:
    """The scale (int8 only) and the values of a layer, rounded to nearest."""
    x = np.ascontiguousarray(x, np.float32)
    if values == FLOAT32:
        return b"", x.astype("<f4").tobytes()
    if values == FLOAT16:
        return b"", np.clip(x, -65504, 65504).astype("<f2").tobytes()
    top = np.float32(np.max(np.abs(x), initial=0.0))
    scale = np.float32(top / np.float32(127))
    q = np.rint(x / scale) if scale > 0 else np.zeros_like(x)
    return scale.astype("<f4").tobytes(), np.clip(q, -127, 127).astype(np.int8).tobytes()


def write(
    layers: Sequence[Array],
    layout: Sequence[Layer],
    *,
    kind: int,
    values: int = FLOAT32,
    masks: Sequence[Array | None] | None = None,
    shared: bool = False,
    codes: Sequence[int] = (DENSE, BITMAP, DELTA),
    pad: int = 0,
) -> bytes:
    """Writes a message, each layer in the smallest of the allowed codes (the first of equals).

    Args:
      layers: float arrays `[size]`, finite.
      layout: what each layer is.
      kind: WEIGHTS or UPDATE.
      values: FLOAT32, FLOAT16 or INT8 (one scale a layer).
      masks: the support of each layer, bool `[size]`; None takes the non-zeros.
      shared: the receiver holds these masks: they are not sent.
      codes: the codes to choose from for layers with a budget or a mask; the others are always DENSE.
      pad: fill up with zeros to this many bytes.

    Raises:
      ValueError: a layer has not its size, holds NaN, exceeds its budget, or the message exceeds `pad`.
    """
    body = []
    for k, (x, layer) in enumerate(zip(layers, layout, strict=True)):
        x = np.asarray(x).reshape(-1)
        if x.size != layer.size or not np.all(np.isfinite(x)):
            raise ValueError(f"{layer.name}: {x.size} values, {layer.size} finite ones are needed")
        given = masks[k] if masks is not None else None
        dense = layer.budget == layer.size and given is None
        held = np.asarray(given).reshape(-1) if given is not None else x != 0
        indices = np.flatnonzero(held)
        if not dense and indices.size > layer.budget:
            raise ValueError(f"{layer.name}: {indices.size} non-zeros, the budget is {layer.budget}")
        gaps = np.diff(indices, prepend=-1)
        allowed = [DENSE] if dense else [SHARED] if shared and given is not None else list(codes)
        sizes = {c: body_bytes(c, layer, indices.size, varint_bytes(gaps), values) for c in allowed}
        code = min(allowed, key=lambda c: sizes[c])
        kept = x if code == DENSE else x[indices]
        scale, numbers = to_values(kept, layer.values(values))
        positions = b""
        if code == BITMAP:
            positions = np.packbits(held, bitorder="little").tobytes()
        elif code == DELTA:
            positions = to_varints(gaps)
        body += [_LAYER.pack(code, kept.size), scale, positions, numbers]
    content = b"".join(body)
    length = _HEADER.size + len(content)
    if pad and length > pad:
        raise ValueError(f"the message has {length} bytes, more than the {pad} it is to be padded to")
    return _HEADER.pack(_MAGIC, kind, values, len(layout), length) + content + bytes(max(0, pad - length))


# -- reading -----------------------------------------------------------------------------------------------------------


class _Reader:
    """Takes bytes off the front, and refuses where there are not enough."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.at = 0

    def take(self, n: int, what: str) -> memoryview:
        if n > len(self.data) - self.at:
            raise Refused("message", f"{what} need {n} bytes, {len(self.data) - self.at} are left")
        self.at += n
        return self.data[self.at - n : self.at]


def parse(
    data: bytes,
    layout: Sequence[Layer],
    *,
    kind: int | None = None,
    values: int | None = None,
    supports: Sequence[Array | None] | None = None,
    size: int = 0,
    codes: Sequence[int] = (DENSE, BITMAP, DELTA, SHARED),
    largest: float = 1e6,
    unlisted: bool = False,
) -> Message:
    """Reads a message from anyone.

    Args:
      data: the bytes.
      layout: the layers that must be in it; budgets are upper bounds.
      kind: the kind it must have, or None.
      values: the type its values must have, or None.
      supports: indices of each layer's shared support, increasing; None where nothing is shared.
      size: the exact size it must have (padding included); 0 for none.
      codes: the codes allowed.
      largest: magnitude above which a value is refused.
      unlisted: keep bitmaps as they are; no index is ever formed of them, so that no access depends on a support.

    Raises:
      Refused: anything is not as it must be; the text names the layer.
    """
    most = largest_bytes(layout)
    if len(data) < _HEADER.size or len(data) > max(most, size):
        raise Refused("size", f"a message of {len(data)} bytes; this model's have {_HEADER.size} to {most}")
    if size and len(data) != size:
        raise Refused("size", f"a message of {len(data)} bytes; {size} are agreed")
    magic, is_kind, is_values, count, length = _HEADER.unpack_from(data)
    if magic != _MAGIC or is_kind > UPDATE or is_values > INT8 or count != len(layout):
        raise Refused("message", f"the header {bytes(data[: _HEADER.size]).hex()} is not one of this model's")
    if (kind is not None and is_kind != kind) or (values is not None and is_values != values):
        raise Refused("message", f"kind {is_kind} and values {is_values}; {kind} and {values} are agreed")
    if not _HEADER.size <= length <= len(data) or (not size and length != len(data)):
        raise Refused("message", f"a length of {length} in a message of {len(data)} bytes")
    if np.any(np.frombuffer(data, np.uint8, offset=length)):
        raise Refused("message", "padding that is not zero")
    reader = _Reader(data[:length])
    reader.take(_HEADER.size, "the header")
    pieces = []
    for k, layer in enumerate(layout):
        support = supports[k] if supports is not None else None
        pieces.append(_parse_layer(reader, layer, layer.values(is_values), support, codes, largest, unlisted))
    if reader.at != length:
        raise Refused("message", f"{length - reader.at} bytes after the last layer")
    return Message(is_kind, tuple(pieces))


def _parse_layer(
    reader: _Reader,
    layer: Layer,
    values: int,
    support: Array | None,
    codes: Sequence[int],
    largest: float,
    unlisted: bool,
) -> Piece:
    code, count = _LAYER.unpack(reader.take(_LAYER.size, f"{layer.name}: the layer's header"))
    whole = layer.budget == layer.size
    if code >= len(CODES) or (code not in codes and not (code == DENSE and whole)):
        raise Refused("message", f"{layer.name}: code {code} is not allowed")
    wanted = layer.size if code == DENSE else support.size if code == SHARED and support is not None else None
    if code == SHARED and support is None:
        raise Refused("message", f"{layer.name}: no support is shared")
    if (wanted is not None and count != wanted) or (code != DENSE and count > layer.budget):
        raise Refused("message", f"{layer.name}: {count} values; {wanted or f'at most {layer.budget}'} are allowed")
    scale = np.float32(1)
    if values == INT8:
        scale = np.frombuffer(reader.take(4, f"{layer.name}: the scale"), "<f4")[0]
        if not (np.isfinite(scale) and 0 <= scale <= largest):
            raise Refused("message", f"{layer.name}: a scale of {scale}")
    indices = support if code == SHARED else None
    bits = None
    if code == BITMAP:
        bits = _read_bitmap(reader, layer, count)
        indices, bits = (None, bits) if unlisted else (np.flatnonzero(bits), None)
    elif code == DELTA:
        indices = _read_deltas(reader, layer, count)
    raw = reader.take(count * _BYTES[values], f"{layer.name}: the values")
    numbers: Array
    if values == INT8:
        q = np.frombuffer(raw, np.int8)
        if np.any(q == -128):
            raise Refused("message", f"{layer.name}: an int8 value of -128")
        numbers = q.astype(np.float32) * scale
    else:
        numbers = np.frombuffer(raw, "<f4" if values == FLOAT32 else "<f2").astype(np.float32)
    if not np.all(np.isfinite(numbers)) or np.any(np.abs(numbers) > largest):
        raise Refused("message", f"{layer.name}: NaN, infinity or a value above {largest:g}")
    if code == DENSE and not whole and np.count_nonzero(numbers) > layer.budget:
        raise Refused("message", f"{layer.name}: {np.count_nonzero(numbers)} non-zeros, the budget is {layer.budget}")
    return Piece(code, indices, numbers, bits)


def _read_bitmap(reader: _Reader, layer: Layer, count: int) -> Array:
    raw = np.frombuffer(reader.take(-(-layer.size // 8), f"{layer.name}: the bitmap"), np.uint8)
    bits = np.unpackbits(raw, bitorder="little")
    if np.any(bits[layer.size :]) or int(bits.sum()) != count:
        raise Refused("message", f"{layer.name}: a bitmap of {int(bits.sum())} bits for {count} values")
    return bits[: layer.size]


def _read_deltas(reader: _Reader, layer: Layer, count: int) -> Array:
    window = np.frombuffer(reader.data[reader.at : reader.at + 4 * count], np.uint8)
    ends = np.flatnonzero(window < 0x80)[:count]
    if ends.size < count:
        raise Refused("message", f"{layer.name}: {ends.size} whole index differences, {count} are needed")
    lengths = np.diff(ends, prepend=-1)
    if np.any(lengths > 4) or np.any((lengths > 1) & (window[ends] == 0)):
        raise Refused("message", f"{layer.name}: an index difference that is too long")
    starts = ends - lengths + 1
    gaps = np.zeros(count, np.int64)
    for k in range(4):
        longer = lengths > k
        gaps[longer] |= (window[starts[longer] + k] & 0x7F).astype(np.int64) << (7 * k)
    if np.any(gaps == 0):
        raise Refused("message", f"{layer.name}: an index twice")
    indices = np.cumsum(gaps) - 1
    if count and indices[-1] >= layer.size:
        raise Refused("message", f"{layer.name}: index {indices[-1]} of {layer.size} weights")
    reader.take(int(ends[-1]) + 1 if count else 0, f"{layer.name}: the index differences")
    return indices


def to_dense(piece: Piece, size: int) -> Array:
    """The layer as float32 `[size]`; without an access that depends on the support where it is held as bits."""
    if piece.bits is not None:
        return oblivious.expand(piece.bits, piece.values)
    if piece.indices is None:
        return piece.values.copy()
    out = np.zeros(size, np.float32)
    out[piece.indices] = piece.values
    return out
