"""GRU and LSTM steps, and products of vectors, on matrices that are block-sparse (BSPC), block-max, CSR or dense.

A matrix becomes tiles. BSPC's blocks are tiles whose outputs share one list of inputs: an input is loaded once for up
to 64 outputs (load elimination), and blocks of several gates with the same list become one. Of the other formats,
outputs are sorted by length (matrix reorder) and taken a vector at a time, every lane with its own inputs. All gates
of a step are one pass over one matrix; over the steps of a sequence the state stays in a scratch of a few kilobytes.

    cell = kernels.prepare_recurrent("gru_after", [uz, ur, uh])      # packed or dense, [hidden, hidden] each
    y, h = cell(x, h0, bias=bu)                                      # x: the input's part of the gates, all steps

Sequences of a batch run side by side on threads; one sequence is one thread's work. No native gradient: the backward
pass differentiates the dense recurrence.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero

from compressx import formats
from compressx.formats.base import Packed
from compressx.kernels import exact, native
from compressx.native import build as compiled

BSPC = ("bspc", "bspc-coded")
CELLS = ("gru_before", "gru_after", "lstm")
_SCATTERED, _CONTIGUOUS = 1, 2
_MOST_VECTORS = 4
_MOST_INPUTS = 1 << 16
_TARGETS = {"compressx_sparse_product": "CompressxSparseProduct", "compressx_recurrent": "CompressxRecurrent"}
LIBRARY = compiled.Library(Path(__file__).with_name("recurrent.cc"), _TARGETS, seconds=6)

Block = tuple[np.ndarray, np.ndarray, np.ndarray]  # outputs [r], inputs [c], weights [r, c]


@functools.cache
def _library() -> Any:
    return compiled.load(LIBRARY)


def available() -> bool:
    """True if the native loops run here; compiles them at the first call."""
    return jax.default_backend() == "cpu" and native.available() and _library() is not None


class Tiles(NamedTuple):
    """A matrix `[inputs, outputs]` as the native loops read it; see `recurrent.cc`."""

    tiles: np.ndarray
    columns: np.ndarray
    places: np.ndarray
    weights: np.ndarray


def blocks_of(packed: Packed) -> list[Block]:
    """BSPC's blocks: outputs, inputs and weights of each, checked as `formats.unpack` checks them."""
    packed = formats.in_floats(packed)
    formats.unpack(packed)
    a = packed.arrays
    stride, offset = a["stride"].astype(np.int64), a["offset"].astype(np.int64)
    found, start = [], 0
    for k in range(len(stride) - 1):
        inputs, outputs = a["column"][stride[k] : stride[k + 1]], a["reorder"][offset[k] : offset[k + 1]]
        size = len(inputs) * len(outputs)
        weight = a["weight"][start : start + size].reshape(len(outputs), len(inputs)).astype(np.float32)
        found.append((outputs.astype(np.int64), inputs.astype(np.int64), weight))
        start += size
    return found


def shared(blocks: Sequence[Block]) -> list[Block]:
    """Blocks with the same inputs joined into one, longest lists first."""
    by_inputs: dict[bytes, list[Block]] = {}
    for block in blocks:
        by_inputs.setdefault(block[1].astype(np.int64).tobytes(), []).append(block)
    joined = []
    for same in by_inputs.values():
        outputs = np.concatenate([b[0] for b in same])
        sort = np.argsort(outputs, kind="stable")
        joined.append((outputs[sort], same[0][1], np.concatenate([b[2] for b in same])[sort]))
    return sorted(joined, key=lambda b: (-len(b[1]), b[1].tobytes()))


class _Writer:
    """Collects tiles."""

    def __init__(self, lanes: int, outputs: int):
        self.lanes, self.waste = lanes, outputs
        self.rows: list[list[int]] = []
        self.columns: list[np.ndarray] = []
        self.places: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []
        self.ends = [0, 0, 0]

    def add(self, kind: int, outputs: np.ndarray, columns: np.ndarray, weights: np.ndarray) -> None:
        """One tile: `weights` `[n, outputs]`, `columns` `[n]` or `[n, outputs]`; padded to whole vectors."""
        vectors = -(-len(outputs) // self.lanes)
        short = vectors * self.lanes - len(outputs)
        if not short and (np.diff(outputs) == 1).all():
            kind |= _CONTIGUOUS
        outputs = np.pad(outputs, (0, short), constant_values=self.waste)
        weights = np.pad(weights, ((0, 0), (0, short)))
        if kind & _SCATTERED:
            columns = np.pad(columns, ((0, 0), (0, short)))
        self.rows.append([kind, vectors, len(weights), *self.ends])
        for k, (held, new) in enumerate(((self.columns, columns), (self.weights, weights), (self.places, outputs))):
            held.append(new.reshape(-1))
            self.ends[k] += new.size

    def tiles(self) -> Tiles:
        """Everything added."""
        if max(self.ends) >= 1 << 31:
            raise ValueError("the matrix has more weights than 32-bit positions reach")
        none = np.zeros(0)
        return Tiles(
            np.array(self.rows, np.int32).reshape(-1, 6),
            np.concatenate([none, *self.columns]).astype(np.uint16),
            np.concatenate([none, *self.places]).astype(np.int32),
            np.concatenate([none, *self.weights]).astype(np.float32),
        )


def tiles_of_blocks(blocks: Sequence[Block], outputs: int, lanes: int) -> Tiles:
    """Dense tiles of at most four vectors of outputs each."""
    writer = _Writer(lanes, outputs)
    for places, inputs, weight in blocks:
        for start in range(0, len(places), _MOST_VECTORS * lanes):
            part = slice(start, start + _MOST_VECTORS * lanes)
            writer.add(0, places[part], inputs, weight[part].T)
    return writer.tiles()


def tiles_of_matrix(w: np.ndarray, lanes: int) -> Tiles:
    """Scattered tiles of `[inputs, outputs]`: outputs by falling number of non-zeros, two vectors at a time."""
    live = w != 0
    length = live.sum(axis=0)
    order = np.argsort(-length, kind="stable")
    order = order[length[order] > 0]
    writer = _Writer(lanes, w.shape[1])
    for start in range(0, len(order), 2 * lanes):
        outputs = order[start : start + 2 * lanes]
        n = int(length[outputs].max())
        first = np.argsort(~live[:, outputs], axis=0, kind="stable")[:n]
        weights = np.take_along_axis(w[:, outputs], first, axis=0)
        writer.add(_SCATTERED, outputs, np.where(weights != 0, first, 0), weights)
    return writer.tiles()


def _matrix(w: Packed | np.ndarray) -> np.ndarray:
    m = formats.unpack(w) if isinstance(w, Packed) else np.asarray(w)
    if m.ndim != 2:
        raise ValueError(f"needs matrices [in, out], got shape {list(m.shape)}")
    return m.astype(np.float32)


def tiles_of(gates: Sequence[Packed | np.ndarray], lanes: int) -> Tiles:
    """Matrices side by side as tiles: blocks where all of them are BSPC, else single weights."""
    widths = [int(g.shape[-1]) for g in gates]
    if int(gates[0].shape[0]) > _MOST_INPUTS:
        raise ValueError(f"more than {_MOST_INPUTS} inputs")
    if all(isinstance(g, Packed) and g.format in BSPC and len(g.shape) == 2 for g in gates):
        found: list[Block] = []
        for k, g in enumerate(gates):
            assert isinstance(g, Packed)
            found += [(places + sum(widths[:k]), inputs, weight) for places, inputs, weight in blocks_of(g)]
        return tiles_of_blocks(shared(found), sum(widths), lanes)
    joined = np.concatenate([_matrix(g) for g in gates], axis=1)
    if np.count_nonzero(joined) > joined.size // 3:
        return tiles_of_blocks([(np.arange(joined.shape[1]), np.arange(len(joined)), joined.T)], sum(widths), lanes)
    return tiles_of_matrix(joined, lanes)


def loads(t: Tiles, lanes: int) -> dict[str, int]:
    """Counted work of one product: multiply-adds, loads of inputs, and those that sharing lists has saved."""
    kind, vectors, n = (t.tiles[:, k].astype(np.int64) for k in range(3))
    macs = int((vectors * n * lanes).sum())
    loaded = int((np.where(kind & _SCATTERED, vectors * lanes, 1) * n).sum())
    return {"macs": macs, "input_loads": macs, "input_loads_eliminated": loaded}


def spread(t: Tiles, outputs: int, lanes: int, threads: int) -> tuple[float, float]:
    """Most over mean work of threads that share one product: outputs in their own order, and as the tiles store them.

    Outputs are taken a vector at a time, the vectors by the threads in turn. A vector's work is its lanes times the
    weights of its longest output, for lanes go together. This is counted, not run: here a sequence is one thread's.

    Args:
      t: of a matrix `[inputs, outputs]`.
      outputs: of it.
      lanes: that the tiles were made for.
      threads: that share the vectors.
    """
    length = np.zeros(outputs + 1, np.int64)  # the last is the waste slot
    stored: list[int] = []
    for _, vectors, n, _, weight, place in t.tiles.astype(np.int64):
        wide = vectors * lanes
        live = np.count_nonzero(t.weights[weight : weight + n * wide].reshape(n, wide), axis=0)
        np.add.at(length, t.places[place : place + wide], live)
        stored += [n] * vectors
    own = np.pad(length[:outputs], (0, -outputs % lanes)).reshape(-1, lanes).max(axis=1)

    def most(work: np.ndarray) -> float:
        shares = np.array([work[k::threads].sum() for k in range(threads)])
        return float(shares.max() / shares.mean()) if shares.any() else 1.0

    return most(own), most(np.array(stored, np.int64))


@np.errstate(invalid="ignore")
def reference(
    cell: str, x: np.ndarray, u: np.ndarray, h: np.ndarray, c: np.ndarray | None = None, bias: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The definition, in NumPy float64, with the gates of `models.gru` (z, r, h) and `models.lstm` (i, f, g, o).

    Args:
      cell: one of `CELLS`.
      x: the input's part of the gates, biases included, `[t, n, gates * hidden]`.
      u: `[hidden, gates * hidden]`, zeros in place.
      h: state before the first step, `[n, hidden]`.
      c: the LSTM's cell state, or None for zeros.
      bias: of the candidate inside the reset, `[hidden]`, for "gru_after".

    Returns:
      States of all steps `[t, n, hidden]`, and the last one (for an LSTM the last cell state).
    """

    def sigmoid(v: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-v))

    m = h.shape[1]
    h, u = h.astype(np.float64), u.astype(np.float64)
    c = np.zeros_like(h) if c is None else c.astype(np.float64)
    states = []
    for step in x.astype(np.float64):
        if cell == "lstm":
            a = step + exact.reference(h, u)
            i, f, g, o = (a[:, k * m : (k + 1) * m] for k in range(4))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            zr = sigmoid(step[:, : 2 * m] + exact.reference(h, u[:, : 2 * m]))
            z, r = zr[:, :m], zr[:, m:]
            if cell == "gru_after":
                inner = r * (exact.reference(h, u[:, 2 * m :]) + (0 if bias is None else bias))
            else:
                inner = exact.reference(r * h, u[:, 2 * m :])
            new = np.tanh(step[:, 2 * m :] + inner)
            h = z * h + (1 - z) * new
        states.append(h)
    y = np.stack(states) if states else np.zeros((0, *h.shape))
    return y, c if cell == "lstm" else h


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def xla(cell: str, x: Array, u: Array, h: Array, c: Array, bias: Array) -> tuple[Array, Array]:
    """The same on XLA with dense `u`: the fallback. Its derivatives are those of `dense`."""
    return _checked(cell, dense(cell, x, u, h, c, bias), x, u, h, c, bias)


@functools.partial(xla.defjvp, symbolic_zeros=True)
def _xla_jvp(cell: str, primals: Any, tangents: Any) -> Any:
    moved = [k for k, t in enumerate(tangents) if not isinstance(t, SymbolicZero)]

    def run(*some: Array) -> tuple[Array, Array]:
        given = dict(zip(moved, some, strict=True))
        return dense(cell, *(given.get(k, p) for k, p in enumerate(primals)))

    out, change = jax.jvp(run, [primals[k] for k in moved], [tangents[k] for k in moved])
    return _checked(cell, out, *primals), change


def _checked(
    cell: str, out: tuple[Array, Array], x: Array, u: Array, h: Array, c: Array, bias: Array
) -> tuple[Array, Array]:
    """`out` of `dense` where the states are finite; else from the weights that are not zero."""
    times = functools.partial(exact.without_zeros, jnp.matmul)
    found: tuple[Array, Array] = lax.cond(
        exact.finite(out[0]), lambda: out, lambda: dense(cell, x, u, h, c, bias, times)
    )
    return found


def dense(
    cell: str, x: Array, u: Array, h: Array, c: Array, bias: Array, times: exact.Multiply = jnp.matmul
) -> tuple[Array, Array]:
    """The recurrence with dense products, `times`: what gradients go through."""
    m = h.shape[1]

    def gru(h: Array, step: Array) -> tuple[Array, Array]:
        zr = jax.nn.sigmoid(step[:, : 2 * m] + times(h, u[:, : 2 * m]))
        z, r = zr[:, :m], zr[:, m:]
        if cell == "gru_after":
            inner = r * (times(h, u[:, 2 * m :]) + bias[None])
        else:
            inner = times(r * h, u[:, 2 * m :])
        new = jnp.tanh(step[:, 2 * m :] + inner)
        h = z * h + (1 - z) * new
        return h, h

    def lstm(carry: tuple[Array, Array], step: Array) -> tuple[tuple[Array, Array], Array]:
        h, c = carry
        i, f, g, o = jnp.split(step + times(h, u), 4, axis=1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h

    if cell == "lstm":
        (_, last), y = lax.scan(lstm, (h, c), x)
        return y, last
    last, y = lax.scan(gru, h, x)
    return y, last


def cell_tiles(cell: str, gates: Sequence[Packed | np.ndarray], lanes: int) -> tuple[Tiles, Tiles]:
    """A cell's recurrent matrices, gates apart, as tiles: those a step reads first, and "gru_before"'s last gate."""
    if cell == "gru_before":
        return tiles_of(gates[:2], lanes), tiles_of(gates[2:], lanes)
    return tiles_of(gates, lanes), _Writer(lanes, int(gates[0].shape[0])).tiles()


def native_product(tiles: Any, x: Array, outputs: int, isa: str, threads: int = 0) -> Array:
    """`x @ w` for the tiles of w `[in, outputs]`, made for that instruction set's lanes; pure, under jit or not."""
    out = jax.ShapeDtypeStruct((x.shape[0], outputs), jnp.float32)
    f = jax.ffi.ffi_call("compressx_sparse_product", out, vmap_method="sequential")
    result: Array = f(x, *tiles, isa=np.int64(native.ISAS.index(isa)), threads=np.int64(threads))
    return result


def native_cell(
    cell: str, tiles: Any, x: Array, h: Array, c: Array, bias: Array, isa: str, threads: int = 0
) -> tuple[Array, Array]:
    """`reference` for the tiles of `cell_tiles`; pure, under jit or not."""
    out = (
        jax.ShapeDtypeStruct((x.shape[0], x.shape[1], h.shape[1]), jnp.float32),
        jax.ShapeDtypeStruct(h.shape, jnp.float32),
    )
    f = jax.ffi.ffi_call("compressx_recurrent", out, vmap_method="sequential")
    kind, number = np.int64(CELLS.index(cell)), np.int64(native.ISAS.index(isa))
    y, last = f(x, h, c, bias, *tiles[0], *tiles[1], isa=number, cell=kind, threads=np.int64(threads))
    return y, last


class Product:
    """A prepared matrix `[inputs, outputs]`: `product(x)` is `x @ w` for float32 `[n, inputs]`. No native gradient.

    Attributes:
      path: `native/<instruction set>` or `xla`.
      shape: (inputs, outputs).

    Raises:
      ValueError: when called with anything but float32 `[n, inputs]`.

    Example:
      >>> product = compressx.kernels.prepare_product(np.array([[2.0], [0.0]], np.float32), path="xla")
      >>> product.shape, product(jnp.array([[3.0, 1.0]])).tolist()
      ((2, 1), [[6.0]])
    """

    def __init__(self, w: Packed | np.ndarray, threads: int, path: str):
        self.path, self.threads = path, threads
        self.shape = (int(w.shape[0]), int(w.shape[-1]))
        self.dense = jnp.asarray(_matrix(w)) if path == "xla" else None
        self.tiles: Any = ()
        if path != "xla":
            self.tiles = jax.tree.map(jnp.asarray, tiles_of([w], native.LANES[path.removeprefix("native/")]))
        self._call = jax.jit(self._run)

    def _run(self, tiles: Any, x: Array) -> Array:
        if self.path == "xla":
            assert self.dense is not None
            return exact.linear(jnp.matmul, x, self.dense)
        return native_product(tiles, x, self.shape[1], self.path.removeprefix("native/"), self.threads)

    def __call__(self, x: Array) -> Array:
        if x.ndim != 2 or x.shape[1] != self.shape[0] or x.dtype != jnp.float32:
            raise ValueError(f"needs float32 [n, {self.shape[0]}], got {x.dtype} {list(x.shape)}")
        return self._call(self.tiles, x)


class Recurrent:
    """A prepared cell, called with whole sequences.

    Attributes:
      path: `native/<instruction set>` or `xla`.

    Source: P. Dong et al., "RTMobile", 2020 (matrix reorder, load elimination).

    Example:
      >>> cell = compressx.kernels.prepare_recurrent("lstm", [np.zeros((2, 8), np.float32)], path="xla")
      >>> cell.hidden, cell.path
      (2, 'xla')
    """

    def __init__(self, cell: str, gates: Sequence[Packed | np.ndarray], threads: int, path: str):
        self.cell, self.path, self.threads = cell, path, threads
        joined = np.concatenate([_matrix(g) for g in gates], axis=1)
        self.hidden, number = joined.shape[0], 4 if cell == "lstm" else 3
        if joined.shape[1] != number * self.hidden:
            raise ValueError(f"{cell} needs {number} gates of {self.hidden} units, got {list(joined.shape)}")
        self.u = jnp.asarray(joined)
        self.tiles: Any = ()
        if path != "xla":
            lanes = native.LANES[path.removeprefix("native/")]
            parts = list(gates) if len(gates) == number else np.split(joined, number, axis=1)
            self.tiles = jax.tree.map(jnp.asarray, cell_tiles(cell, parts, lanes))
        self._call = jax.jit(self._run)

    def _run(self, tiles: Any, x: Array, h: Array, c: Array, bias: Array) -> tuple[Array, Array]:
        if self.path == "xla":
            return xla(self.cell, x, self.u, h, c, bias)
        return _differentiable(self, tiles, x, h, c, bias)

    def native(self, tiles: Any, x: Array, h: Array, c: Array, bias: Array) -> tuple[Array, Array]:
        """The FFI call."""
        return native_cell(self.cell, tiles, x, h, c, bias, self.path.removeprefix("native/"), self.threads)

    def __call__(
        self, x: Array, h: Array | None = None, c: Array | None = None, bias: Array | None = None
    ) -> tuple[Array, Array]:
        """Runs sequences: x `[t, n, gates * hidden]`; see `reference` for the arguments and the result.

        Raises:
          ValueError: shapes that do not fit.
        """
        if x.ndim != 3 or x.shape[2] != self.u.shape[1] or x.dtype != jnp.float32:
            raise ValueError(f"needs float32 [t, n, {self.u.shape[1]}], got {x.dtype} {list(x.shape)}")
        shape = (x.shape[1], self.hidden)
        zeros = jnp.zeros(shape, jnp.float32)
        h, c = zeros if h is None else h, zeros if c is None else c
        if h.shape != shape or c.shape != shape:
            raise ValueError(f"states of {list(shape)} are needed, got {list(h.shape)} and {list(c.shape)}")
        bias = jnp.zeros(self.hidden, jnp.float32) if bias is None else bias
        return self._call(self.tiles, x, h, c, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(cell: Recurrent, tiles: Any, x: Array, h: Array, c: Array, bias: Array) -> tuple[Array, Array]:
    return cell.native(tiles, x, h, c, bias)


def _forward(cell: Recurrent, tiles: Any, *args: Array) -> Any:
    return cell.native(tiles, *args), (tiles, args)


def _backward(cell: Recurrent, saved: Any, g: Any) -> Any:
    tiles, args = saved
    _, pull = jax.vjp(lambda x, h, c, bias: dense(cell.cell, x, cell.u, h, c, bias), *args)
    none = jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0 if a.dtype.kind in "iu" else a.dtype), tiles)
    return (none, *pull(g))


_differentiable.defvjp(_forward, _backward)


def _path(path: str | None) -> str:
    if path not in (None, "native", "xla"):
        raise ValueError(f"no path {path!r}; the paths are native and xla")
    if path == "native" and not available():
        raise ValueError("the native path does not run: no compiler, COMPRESSX_NATIVE=off, or not on the CPU")
    return "xla" if path == "xla" or not available() else f"native/{native.isa()}"


def prepare_product(w: Packed | np.ndarray, *, threads: int = 0, path: str | None = None) -> Product:
    """Makes a matrix `[in, out]` ready for products with vectors.

    Args:
      w: packed in any format (BSPC runs by blocks), or the matrix with its zeros in place.
      threads: for the rows of a batch.
      path: "native", "xla", or None for the native one where it runs.

    Returns:
      A `Product`, called with float32 `[n, in]`.

    Raises:
      ValueError: w is no matrix, or the path is unknown or does not run here.

    Example:
      >>> product = compressx.kernels.prepare_product(np.eye(3, dtype=np.float32), path="xla")
      >>> print(product(jnp.asarray([[1.0, 2.0, 3.0]])))
      [[1. 2. 3.]]
    """
    return Product(w, threads, _path(path))


def prepare_recurrent(
    cell: str, gates: Sequence[Packed | np.ndarray], *, threads: int = 0, path: str | None = None
) -> Recurrent:
    """Makes a recurrent cell ready.

    Args:
      cell: "gru_before" or "gru_after" (where the reset gate acts), or "lstm".
      gates: recurrent matrices `[hidden, hidden]` in the order z, r, h or i, f, g, o, or one of them joined.
      threads: for the sequences of a batch.
      path: as in `prepare_product`.

    Returns:
      A `Recurrent`, called with the input's part of the gates, `[t, n, gates * hidden]`.

    Raises:
      ValueError: unknown cell or path, or matrices that do not fit.

    Source: P. Dong et al., "RTMobile", 2020 (matrix reorder, load elimination, BSPC).

    Example:
      >>> cell = compressx.kernels.prepare_recurrent("gru_after", [np.zeros((2, 6), np.float32)], path="xla")
      >>> y, last = cell(jnp.zeros((3, 1, 6)), h=jnp.ones((1, 2)))  # 3 steps; gates of 1/2 halve the state
      >>> last.tolist()
      [[0.125, 0.125]]
    """
    if cell not in CELLS:
        raise ValueError(f"no cell {cell!r}; there are {', '.join(CELLS)}")
    return Recurrent(cell, gates, threads, _path(path))
