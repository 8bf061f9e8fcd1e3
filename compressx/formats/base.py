"""What a storage format is, and the checks that every format makes on arrays it did not write.

A format turns one weight into a few plain arrays from which exactly that weight comes back, bit for bit. Its size is
the bytes of those arrays, indices included. Packed arrays may come from a hostile file: `unpack` believes nothing, and
every check here raises `CompressedFileError`. Everything runs on the host, in NumPy.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from compressx.formats.weight import Bytes, Weight
from compressx.formats.weight import nonzero as nonzero

MAX_BYTES = 1 << 32  # what a packed weight (and all of a file) may unfold to, unless the caller says otherwise
PIECE = 1 << 16  # entries that are decoded together; a multiple of 8, so that pieces of bits begin with a byte

Meta = dict[str, Any]  # JSON: str -> int | float | str | list


class CompressedFileError(ValueError):
    """Packed data that is damaged, truncated, foreign, too large or inconsistent; the text names the entry.

    Example:
      >>> packed = compressx.formats.pack(np.eye(4, dtype=np.float32), format="dense")
      >>> try:
      ...     compressx.formats.unpack(packed._replace(format="other"))
      ... except compressx.formats.CompressedFileError as error:
      ...     print(str(error)[:21])
      other: unknown format
    """


class Packed(NamedTuple):
    """One weight in a storage format.

    Attributes:
      format: name of the format, a key of `formats.FORMATS`.
      shape: shape of the weight, as stored: conv `[kh, kw, cin, cout]`, dense `[in, out]`.
      dtype: name of the weight's dtype, a key of `DTYPES`.
      arrays: the arrays that hold it; their bytes are its size.
      meta: small JSON-able facts (widths, block shapes, orders) that the arrays cannot say.

    Example:
      >>> packed = compressx.formats.pack(np.eye(64, dtype=np.float32), format="csr16")
      >>> packed.format, packed.shape, packed.dtype
      ('csr16', (64, 64), 'float32')
    """

    format: str
    shape: tuple[int, ...]
    dtype: str
    arrays: dict[str, np.ndarray]
    meta: Meta


def extent(packed: Packed) -> int:
    """Weights, empty axes left out: a shape [0, 10**12] has none, yet ids over its second axis take memory."""
    return math.prod(max(n, 1) for n in packed.shape)


def on_the_way(packed: Packed) -> int:
    """What the formats that decode in pieces take beside the weight: a byte a weight, half of the arrays."""
    return extent(packed) + nbytes(packed) // 2


class Format(NamedTuple):
    """A storage format, as a tuple of pure functions.

    Attributes:
      name: its name, as in `Packed.format`.
      supports: `supports(w, constraint)` is True, or the reason (a str) why not; a look at shape, dtype and constraint,
        cheap. The constraint may be None.
      size: `size(weight) -> Bytes`, what `pack` of a `Weight` will take, to the byte, by counting alone; ValueError
        where it is seen that `pack` cannot hold it.
      pack: `pack(weight) -> Packed`; ValueError where the values of w are not exactly representable (a weight off its
        levels, a block that is not unified): it never rounds.
      unpack: `unpack(packed) -> w`, the exact inverse, bit for bit and in dtype. It checks everything it reads and
        raises `CompressedFileError`; `formats.unpack` has bounded the product of the shape before.
      least: where counting takes long, what `size` returns at least, index and values both; a format that cannot be the
        smallest is then not counted.
      workspace: bytes that `unpack` takes on the way at most, beside the arrays, the weight and some pieces of a fixed
        size; `formats.unpack` has bounded it before.

    Example:
      >>> csr = compressx.formats.FORMATS["csr"]
      >>> csr.supports(np.eye(4, dtype=np.float32), None)
      True
    """

    name: str
    supports: Callable[[np.ndarray, Any], bool | str]
    size: Callable[[Weight], Bytes]
    pack: Callable[[Weight], Packed]
    unpack: Callable[[Packed], np.ndarray]
    workspace: Callable[[Packed], int] = on_the_way
    least: Callable[[Weight], Bytes] | None = None


# The dtypes a weight and a packed array may have; those that safetensors stores and NumPy computes with.
DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in (
        *("float64", "float32", "float16", "bfloat16"),
        *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
        *("float8_e4m3fn", "float8_e5m2", "complex64"),
    )
}
# Those that every format takes; the others are kept dense, as nothing here computes with them.
COMPUTED = tuple(name for name in DTYPES if not name.startswith(("float8", "complex")))


def nbytes(packed: Packed) -> int:
    """Bytes of the real arrays, indices included.

    Args:
      packed: a weight in any format.

    Returns:
      Bytes, as in memory: what a file adds by itself (names, header) or saves by entropy coding is not in it.

    Example:
      >>> compressx.formats.nbytes(compressx.formats.pack(np.eye(64, dtype=np.float32), format="dense"))
      16384
    """
    return sum(a.nbytes for a in packed.arrays.values())


def fail(entry: str, message: str) -> NoReturn:
    """Raises CompressedFileError, the entry first."""
    raise CompressedFileError(f"{entry}: {message}")


def dtype_of(packed: Packed) -> np.dtype[Any]:
    """The weight's dtype."""
    if packed.dtype not in DTYPES:
        fail(packed.format, f"dtype {packed.dtype!r} is not one of {', '.join(DTYPES)}")
    return DTYPES[packed.dtype]


def take(packed: Packed, name: str, dtype: str | tuple[str, ...], shape: tuple[int | None, ...]) -> np.ndarray:
    """The array `name`, checked to exist with one of the dtypes and with the shape (None: any extent)."""
    entry = f"{packed.format}/{name}"
    if name not in packed.arrays:
        fail(entry, f"missing; the file has {', '.join(packed.arrays)[:200] or 'no arrays'}")
    array = packed.arrays[name]
    names = (dtype,) if isinstance(dtype, str) else dtype
    if array.dtype.name not in names:
        fail(entry, f"dtype {array.dtype.name}, expected {' or '.join(names)}")
    if array.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
        expected = "[" + ", ".join("any" if n is None else str(n) for n in shape) + "]"
        fail(entry, f"shape {list(array.shape)}, expected {expected}")
    return array


def only(packed: Packed, *names: str) -> None:
    """Refuses arrays that the format does not know."""
    unknown = sorted(set(packed.arrays) - set(names))
    if unknown:
        fail(f"{packed.format}/{unknown[0][:80]}", f"unknown array; the format has {', '.join(names)}")


def integer(packed: Packed, name: str, low: int, high: int) -> int:
    """The integer `name` of the meta, checked to lie in low..high."""
    value = packed.meta.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        fail(f"{packed.format}/{name}", f"{repr(value)[:80]} is not an integer in {low}..{high}")
    return value


def choice(packed: Packed, name: str, values: tuple[Any, ...]) -> Any:
    """The value `name` of the meta, checked to be one of `values` (compared by type too)."""
    value = packed.meta.get(name)
    for v in values:
        if type(v) is type(value) and v == value:
            return v
    fail(f"{packed.format}/{name}", f"{repr(value)[:80]} is not one of {', '.join(map(repr, values))}")


def check_range(entry: str, x: np.ndarray, high: int) -> None:
    """Indices must lie in 0..high-1."""
    if x.size and not (int(x.min()) >= 0 and int(x.max()) < high):
        fail(entry, f"values {int(x.min())}..{int(x.max())} leave the range 0..{high - 1}")


def check_increasing(entry: str, x: np.ndarray, high: int, last: int = -1) -> int:
    """A list of ids, or the next piece of one whose last id was `last`: strictly increasing, in 0..high-1.

    Returns:
      The last id.
    """
    check_range(entry, x, high)
    if not x.size:
        return last
    if x.size > high:
        fail(entry, f"{x.size} ids, of {high}")
    if int(x[0]) <= last or not bool(np.all(x[1:] > x[:-1])):
        fail(entry, "ids do not increase strictly")
    return int(x[-1])


def check_offsets(entry: str, x: np.ndarray, total: int) -> None:
    """Offsets into a list: the first is 0, the last is its length, none decreases."""
    if not x.size or int(x[0]) != 0 or int(x[-1]) != total:
        ends = f"{int(x[0])}..{int(x[-1])}" if x.size else "nothing"
        fail(entry, f"offsets run over {ends}, expected 0..{total}")
    if not bool(np.all(x[1:] >= x[:-1])):
        fail(entry, "offsets decrease")


def check_finite(entry: str, x: np.ndarray) -> None:
    """Scales and levels that weights are computed from must be finite. (Stored weights may be any bits.)"""
    if not bool(np.all(np.isfinite(x))):
        fail(entry, "holds NaN or infinity")


def index_dtype(high: int) -> np.dtype[Any]:
    """The smallest unsigned dtype that holds 0..high-1."""
    for name in ("uint8", "uint16", "uint32"):
        if high - 1 <= np.iinfo(name).max:
            return np.dtype(name)
    return np.dtype("uint64")


def same(a: np.ndarray, b: np.ndarray) -> bool:
    """Equal in shape, dtype and every bit (NaN payloads and signs of zero included)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    flat = [np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b)]
    if not flat[0].size % 8:
        flat = [x.view(np.uint64) for x in flat]
    return all(np.array_equal(flat[0][here], flat[1][here]) for here in pieces(flat[0].size))


def filters_first(w: np.ndarray) -> np.ndarray:
    """The GEMM view as papers write it, a filter a row: `[kh, kw, cin, cout] -> [F, P]`, p = (i * kw + j) * cin + c."""
    return np.ascontiguousarray(w.reshape(math.prod(w.shape[:-1]), w.shape[-1]).T)


def native(w: Any) -> np.ndarray:
    """The array with its bytes in this machine's order and without gaps, of the same shape; what a format packs.

    Raises:
      ValueError: w is no array of numbers, or one that would lose something on the way.
    """
    if isinstance(w, np.ma.MaskedArray):
        raise ValueError("a masked array, whose mask no format keeps; give it filled")
    if str(getattr(w, "dtype", "")).startswith("key<"):
        raise ValueError("a random key, which is no weight; leave it out (of NNX: the state of Param and BatchStat)")
    try:
        array = np.asarray(w)
    except TypeError as error:
        raise ValueError(f"{type(w).__name__} is no array: {error}") from None
    if not array.dtype.isnative and array.dtype.kind == "V":  # NumPy swaps its bytes when reading, not when writing
        raise ValueError(f"dtype {array.dtype.name} in a foreign byte order; give it in this machine's")
    return np.ascontiguousarray(array, array.dtype.newbyteorder("=")).reshape(array.shape)


def pieces(n: int, size: int = PIECE) -> Iterator[slice]:
    """Slices of `size` entries each, the last one shorter, over n entries."""
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def rank(least: int, known: Sequence[str] = COMPUTED) -> Callable[[np.ndarray, Any], bool | str]:
    """A `supports` that asks for a dtype among those and at least so many axes."""

    def supports(w: np.ndarray, constraint: Any) -> bool | str:
        del constraint
        if w.dtype.name not in known:
            return f"dtype {w.dtype.name} cannot be stored"
        return w.ndim >= least or f"needs at least {least} axes, got shape {w.shape}"

    return supports
