"""The weights of a sparse convolution in the order in which the native loops read them; host-side, NumPy, once a layer.

Three orders, one of which a `Plan` names:

- `kernels`: FKW as it is. Kernels are sorted by block of filters, input channel, pattern. A run of equal (block,
  channel, pattern) is a visit: its inputs are loaded once into registers and serve every kernel of the run (load
  redundancy elimination between filters).
- `chunks`: E consecutive (channel, tap) positions are a pattern of their own, across channels where they must be. For
  layers that are dense or nearly so: unpruned 1x1, whole kernels.
- `runs`: filter after filter, weights that read neighbouring vectors as one run with one place: an input is loaded
  once for all of a run (load redundancy elimination within a kernel, whatever its pattern). For few filters, where
  visits are short, for first layers, and for scattered weights: pruned 1x1.

Every kernel also knows its place: filters come in the order that FKW reorders them to (filter kernel reorder).
"""

import math
from typing import NamedTuple

import numpy as np

from compressx import formats
from compressx.formats.base import CompressedFileError, Packed
from compressx.formats.fkw import assign_patterns, kernel_array, patterns_of, reorder_filters
from compressx.kernels.grid import Grid

FKW = ("fkw", "fkw-coded")
MOST_PATTERNS = 255
MOST_FILTERS = 256
MOST_CHANNELS = 1 << 16
WIDEST = 5  # taps of a visit
LONGEST = 3  # weights of a run

Pads = tuple[tuple[int, int], tuple[int, int]]


class Geometry(NamedTuple):
    """The geometry of a convolution: kernel size, strides, zeros around the image, groups of channels.

    Attributes:
      size: of the kernel, rows and columns.
      strides: rows and columns.
      pads: zeros before and after, per axis.
      groups: of channels.

    Example:
      >>> geometry = compressx.kernels.Geometry(size=(3, 3), strides=(2, 2), pads=((1, 1), (1, 1)))
      >>> geometry.out(8, 8)
      (4, 4)
    """

    size: tuple[int, int]
    strides: tuple[int, int]
    pads: Pads
    groups: int = 1

    def out(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of the output."""
        (kh, kw), (sh, sw), (rows, columns) = self.size, self.strides, self.pads
        return (h + sum(rows) - kh) // sh + 1, (w + sum(columns) - kw) // sw + 1

    def _reads(self) -> list[tuple[int, int, int, int]]:
        """(row phase, column phase, rows, columns) of every tap."""
        found = []
        for i in range(self.size[0]):
            for j in range(self.size[1]):
                dy, a = divmod(i - self.pads[0][0], self.strides[0])
                dx, b = divmod(j - self.pads[1][0], self.strides[1])
                found.append((a, b, dy, dx))
        return found

    def phases(self) -> list[tuple[int, int]]:
        """The phases of the stride that some tap reads; each is a plane of every input channel."""
        return sorted({(a, b) for a, b, _, _ in self._reads()})

    def taps(self) -> list[tuple[int, int, int]]:
        """(number of the phase, rows, columns) of every tap: which plane it reads, and how far from the output."""
        number = {phase: k for k, phase in enumerate(self.phases())}
        return [(number[a, b], dy, dx) for a, b, dy, dx in self._reads()]

    def reach(self) -> tuple[int, int]:
        """The most rows and columns that a tap reads away from the output."""
        taps = self.taps()
        return max(abs(dy) for _, dy, _ in taps), max(abs(dx) for _, _, dx in taps)

    def cover(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns that hold both the output and the phases of an input of `h` rows and `w` columns."""
        (oh, ow), (sh, sw) = self.out(h, w), self.strides
        return max(oh, -(-h // sh)), max(ow, -(-w // sw))

    def gap(self, h: int, w: int) -> tuple[int, int]:
        """Rows and columns of zeros that must follow each `cover`, so that taps beyond the image read zeros."""
        (oh, ow), (rows, columns), taps = self.out(h, w), self.cover(h, w), self.taps()
        up, left = -min(dy for _, dy, _ in taps), -min(dx for _, _, dx in taps)
        down = oh + max(dy for _, dy, _ in taps) - rows
        right = ow + max(dx for _, _, dx in taps) - columns
        return max(up, down, 0), max(left, right, 0)


class Sparse(NamedTuple):
    """A convolution's weights by kernels, filters reordered.

    Attributes:
      order: int `[cout]`, the filter at each place.
      place, channel, pattern: int `[K]` of every live kernel.
      patterns: int `[P, E]`, taps of each pattern, ascending.
      weight: float32 `[K, E]`.
      shape: `[kh, kw, cin / groups, cout]`.
      live: bool `[K, E]`, which weights are the layer's; the others fill a pattern up. A weight stays the layer's
        where a scale makes it zero.

    Source: FKW's order of W. Niu et al., "PatDNN", 2020.

    Example:
      >>> from compressx.kernels import schedule
      >>> w = np.zeros((1, 2, 1, 2), np.float32)
      >>> w[0, 1, 0, 1] = 3.0  # one live kernel, of filter 1, with its second tap
      >>> s = schedule.from_weight(w)
      >>> s.patterns.tolist(), s.order[s.place].tolist(), s.weight.tolist()
      ([[1]], [1], [[3.0]])
    """

    order: np.ndarray
    place: np.ndarray
    channel: np.ndarray
    pattern: np.ndarray
    patterns: np.ndarray
    weight: np.ndarray
    shape: tuple[int, ...]
    live: np.ndarray


class Plan(NamedTuple):
    """How a layer is run; what the tuner chooses.

    Attributes:
      order: "kernels", "chunks" or "runs".
      taps: of a visit; for runs, of the longest, 1 to `LONGEST`.
      filters: of a block.
      width: vectors of a tile.
      channels: input channels of a group, for runs.
      columns: tiles run down columns of the image rather than along it.

    Source: what is tuned follows W. Niu et al., "PatDNN", 2020 (loop order, tiles, unrolling).

    Example:
      >>> compressx.kernels.Plan(order="runs", width=2)
      Plan(order='runs', taps=4, filters=128, width=2, channels=16, columns=False)
    """

    order: str = "kernels"
    taps: int = 4
    filters: int = 128
    width: int = 4
    channels: int = 16
    columns: bool = False


def from_fkw(packed: Packed) -> Sparse:
    """FKW's arrays, checked as `formats.unpack` checks them, kernel by kernel; with codes for values too."""
    packed = formats.in_floats(packed)
    if packed.format != "fkw":
        raise CompressedFileError(f"{packed.format}: not fkw")
    formats.unpack(packed)
    a = packed.arrays
    stride: np.ndarray = a["stride"].astype(np.int64)
    counts = stride[:, 1:] - stride[:, :-1]
    place = np.repeat(np.arange(len(counts)), counts.sum(axis=1))
    pattern = np.repeat(np.tile(np.arange(counts.shape[1]), len(counts)), counts.reshape(-1))
    patterns = np.array(packed.meta["patterns"], np.int64)
    weight = a["weight"].astype(np.float32)
    return Sparse(
        *(a["reorder"].astype(np.int64), place, a["index"].astype(np.int64), pattern),
        *(patterns, weight, tuple(packed.shape), weight != 0),
    )


def from_weight(w: np.ndarray, reorder: bool = True) -> Sparse:
    """The same for any `[kh, kw, cin, cout]`: patterns are the supports of the fullest kernels that cover the rest.

    Where kernels are too different for `MOST_PATTERNS` patterns, the one pattern is the whole kernel.
    """
    x = kernel_array(np.asarray(w, np.float32))
    mask = x != 0
    taps = x.shape[2]
    try:
        patterns = patterns_of(mask.reshape(-1, taps)) if taps <= 62 else np.ones((1, taps), bool)
        if not patterns.any() or len(patterns) > MOST_PATTERNS:
            patterns = np.ones((1, taps), bool)
        ids = assign_patterns(mask, patterns) if taps <= 62 else np.where(mask.any(axis=2), 0, -1)
    except ValueError:
        patterns = np.ones((1, taps), bool)
        ids = np.where(mask.any(axis=2), 0, -1)
    order = reorder_filters(ids) if reorder else np.arange(len(ids))
    place, channel = np.nonzero(ids[order] >= 0)
    pattern = ids[order[place], channel].astype(np.int64)
    listed = np.array([np.flatnonzero(p) for p in patterns])
    weight = np.take_along_axis(x[order[place], channel], listed[pattern], axis=1)
    return Sparse(order, place, channel, pattern, listed, weight, tuple(w.shape), weight != 0)


def dense(s: Sparse) -> np.ndarray:
    """The weight again, float32 `[kh, kw, cin, cout]`."""
    kh, kw, cin, cout = s.shape
    x = np.zeros((cout, cin, kh * kw), np.float32)
    x[s.order[s.place][:, None], s.channel[:, None], s.patterns[s.pattern]] = s.weight
    return np.ascontiguousarray(x.transpose(2, 1, 0)).reshape(s.shape)


FILLER = np.float32(-0.0)


def fillers(weight: np.ndarray) -> np.ndarray:
    """Where weights of a stream are fillers (bool)."""
    return (weight == 0) & np.signbit(weight)


def _marked(s: Sparse) -> np.ndarray:
    """The weights as a stream holds them: `FILLER` where there is none of the layer's, whose own zeros are 0.0.

    A filler adds nothing to a finite sum. The loops skip fillers where an input is NaN or infinite, see `ExactSums`.
    """
    return np.where(s.live, s.weight + np.float32(0), FILLER)


class Stream(NamedTuple):
    """What the native loops read; see `pattern_conv.cc`. `taps` = 0 means runs."""

    weight: np.ndarray
    members: np.ndarray
    visits: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray
    places: np.ndarray
    order: np.ndarray
    taps: int
    filters: int
    groups: int


def _positions(s: Sparse, g: Geometry, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Vectors from a channel's first plane to each tap, and the input channel that each kernel reads."""
    offsets = np.array([phase * grid.plane + dy * grid.row + dx for phase, dy, dx in g.taps()], np.int64)
    cout = s.shape[3]
    group = s.order[s.place] // (cout // g.groups)
    return offsets, s.channel + group * s.shape[2]


def stream(s: Sparse, g: Geometry, grid: Grid, plan: Plan) -> Stream:
    """Sorts a layer's weights into the order of a plan.

    Args:
      s: the weights.
      g: the convolution.
      grid: of the input, a plane a phase and channel, on the cells of the output.
      plan: how it is run.

    Raises:
      ValueError: the plan does not fit the layer.
    """
    offsets, channel = _positions(s, g, grid)
    if plan.order == "runs":
        return _runs(s, offsets, channel, len(g.phases()) * grid.plane, plan)
    if plan.order == "chunks":
        return _chunks(s, g, offsets, grid, plan)
    if plan.order != "kernels":
        raise ValueError(f"no order {plan.order!r}; the orders are kernels, chunks and runs")
    taps = s.patterns.shape[1]
    parts = -(-taps // WIDEST)
    if taps < 2:
        raise ValueError("kernels of one tap are run as runs or chunks")
    # kernels of more taps than a visit has registers for are cut into equal parts, each a pattern of its own
    width = -(-taps // parts)
    cut = np.zeros((len(s.patterns), parts, width), np.int64)
    marked = _marked(s)
    weight = np.full((len(marked), parts, width), FILLER)
    for part in range(parts):
        mine = s.patterns[:, part * width : (part + 1) * width]
        cut[:, part] = np.pad(mine, ((0, 0), (0, width - mine.shape[1])), mode="edge")
        weight[:, part, : mine.shape[1]] = marked[:, part * width : (part + 1) * width]
    if len(s.patterns) * parts > MOST_PATTERNS:
        raise ValueError(f"{len(s.patterns)} patterns in {parts} parts are more than {MOST_PATTERNS}")
    pattern = s.pattern[:, None] * parts + np.arange(parts)[None, :]
    return _visits(
        np.repeat(s.place, parts),
        np.repeat(channel, parts),
        pattern.reshape(-1),
        weight.reshape(-1, width),
        offsets[cut].reshape(-1, width),
        s.order,
        plan,
    )


def _visits(
    place: np.ndarray,
    channel: np.ndarray,
    pattern: np.ndarray,
    weight: np.ndarray,
    offsets: np.ndarray,
    order: np.ndarray,
    plan: Plan,
) -> Stream:
    filters = min(plan.filters, len(order), MOST_FILTERS)
    if channel.size and int(channel.max()) >= MOST_CHANNELS:
        raise ValueError(f"more than {MOST_CHANNELS} input channels")
    blocks = -(-len(order) // filters)
    block = place // filters
    sort = np.lexsort((place, pattern, channel, block))
    block, channel, pattern, place = block[sort], channel[sort], pattern[sort], place[sort]
    new = np.ones(place.size, bool)
    new[1:] = (np.diff(block) != 0) | (np.diff(channel) != 0) | (np.diff(pattern) != 0)
    first = np.flatnonzero(new)
    runs = np.diff(np.append(first, place.size))
    visits = channel[first] << 16 | pattern[first] << 8 | (runs - 1)
    visit_start = np.searchsorted(block[first], np.arange(blocks + 1))
    kernel_start = np.searchsorted(block, np.arange(blocks + 1))
    return Stream(
        weight=np.ascontiguousarray(weight[sort], np.float32),
        members=(place % filters).astype(np.uint8),
        visits=visits.astype(np.uint32),
        starts=np.concatenate([visit_start, kernel_start]).astype(np.int32),
        offsets=_int32(offsets),
        places=np.zeros(0, np.int32),
        order=order.astype(np.int32),
        taps=offsets.shape[1],
        filters=filters,
        groups=1,
    )


def _int32(x: np.ndarray) -> np.ndarray:
    if x.size and int(np.abs(x).max()) > np.iinfo(np.int32).max:
        raise ValueError("the layer's input is too large for 32-bit positions")
    return np.ascontiguousarray(x, np.int32)


def _matrix(s: Sparse, values: np.ndarray) -> np.ndarray:
    """`[cout, cin * taps]` in the order of filters, of values `[K, E]`, zeros elsewhere."""
    kh, kw, cin, cout = s.shape
    x = np.zeros((cout, cin, kh * kw), values.dtype)
    x[s.place[:, None], s.channel[:, None], s.patterns[s.pattern]] = values
    return x.reshape(cout, cin * kh * kw)


def _chunks(s: Sparse, g: Geometry, offsets: np.ndarray, grid: Grid, plan: Plan) -> Stream:
    if g.groups != 1:
        raise ValueError("chunks run across channels, which groups forbid")
    mine, taps, e = _matrix(s, s.live), len(offsets), plan.taps
    m = np.where(mine, _matrix(s, _marked(s)), FILLER)
    live = np.flatnonzero(mine.any(axis=0))
    if not live.size:
        live = np.zeros(1, np.int64)
    chunks = -(-live.size // e)
    positions = np.pad(live, (0, chunks * e - live.size), mode="edge").reshape(chunks, e)
    real = np.arange(chunks * e).reshape(chunks, e) < live.size
    first = positions[:, 0] // taps
    step = len(g.phases()) * grid.plane
    relative = (positions // taps - first[:, None]) * step + offsets[positions % taps]
    patterns, pattern = np.unique(relative, axis=0, return_inverse=True)
    if len(patterns) > MOST_PATTERNS:
        raise ValueError(f"{len(patterns)} patterns are more than {MOST_PATTERNS}")
    weight = np.where(real[None], m[:, positions], FILLER)
    place, chunk = np.nonzero((mine[:, positions] & real[None]).any(axis=2))
    return _visits(place, first[chunk], pattern.reshape(-1)[chunk], weight[place, chunk], patterns, s.order, plan)


def _runs(s: Sparse, offsets: np.ndarray, channel: np.ndarray, step: int, plan: Plan) -> Stream:
    cout, taps = len(s.order), s.patterns.shape[1]
    place = np.repeat(s.place, taps)
    channel = np.repeat(channel, taps)
    where = channel * step + offsets[s.patterns[s.pattern]].reshape(-1)
    value, live = s.weight.reshape(-1), s.live.reshape(-1)
    place, channel, where, value = place[live], channel[live], where[live], value[live]
    if not 1 <= plan.taps <= LONGEST:
        raise ValueError(f"runs of up to {plan.taps} weights; it must be 1 to {LONGEST}")
    groups = max(1, math.ceil((int(channel.max(initial=0)) + 1) / plan.channels))
    item = channel // plan.channels * cout + place
    sort = np.lexsort((where, item))
    item, where, value = item[sort], where[sort], value[sort]
    # a run begins where the neighbour before is missing, and again when it is full
    number = np.arange(value.size)
    new = np.ones(value.size, bool)
    new[1:] = (np.diff(item) != 0) | (np.diff(where) != 1)
    since = number - np.maximum.accumulate(np.where(new, number, 0))
    first = np.flatnonzero(since % plan.taps == 0)
    length = np.diff(np.append(first, value.size))
    kind = item[first] * LONGEST + length - 1
    again = np.lexsort((where[first], kind))
    first, length = first[again], length[again]
    weight = value[np.repeat(first - np.cumsum(length) + length, length) + number]
    run_start = np.searchsorted(kind[again], np.arange(groups * cout * LONGEST + 1))
    value_start = np.searchsorted(item, np.arange(groups * cout + 1))
    return Stream(
        weight=np.ascontiguousarray(weight, np.float32),
        members=np.zeros(0, np.uint8),
        visits=np.zeros(0, np.uint32),
        starts=np.concatenate([run_start, value_start]).astype(np.int32),
        offsets=np.zeros(0, np.int32),
        places=_int32(where[first]),
        order=s.order.astype(np.int32),
        taps=0,
        filters=min(plan.filters, cout),
        groups=groups,
    )


class Loads(NamedTuple):
    """Vector loads for one output vector of every filter, in full tiles.

    Attributes:
      none: of inputs if every multiply-add loaded its own.
      kernel: with the elimination within a kernel: a run of K weights loads F + K - 1 vectors for F output vectors.
      filter: and with that between filters: a visit loads its inputs once for all kernels of a block. As executed.
      sums: of partial sums, as executed.
    """

    none: int
    kernel: float
    filter: float
    sums: int


def loads(t: Stream, width: int) -> Loads:
    """Counts the loads of a stream in tiles of `width` vectors: `runs` eliminate within kernels, visits between."""
    if t.taps:
        slots = len(t.members) * t.taps
        return Loads(slots, slots, len(t.visits) * t.taps, len(t.members))
    items = t.groups * len(t.order)
    lengths = np.diff(t.starts[: items * LONGEST + 1]).reshape(items, LONGEST).sum(axis=0)
    kernel = sum(int(n) * (width + k) for k, n in enumerate(lengths)) / width
    return Loads(len(t.weight), kernel, kernel, items)


def counts(s: Sparse, g: Geometry, h: int, w: int) -> dict[str, int]:
    """Counted work of a layer for one image: multiply-adds, dense and left, and kernels left."""
    oh, ow = g.out(h, w)
    kh, kw, cin, cout = s.shape
    return {
        "macs_dense": kh * kw * cin * cout * oh * ow,
        "macs": int(np.count_nonzero(s.weight)) * oh * ow,
        "kernels": len(s.place),
    }
