"""Mapping of layers to arrays: pruned rows and columns compacted, whole arrays counted, cells in use reported.

    arrays = ceil(kept rows / array rows) * ceil(kept columns * columns of a weight / array columns)

for each group of a layer; groups that fit into one array share arrays along the diagonal, because they share neither
inputs nor outputs. Shapes: P = rows (kh*kw*cin/groups), F = columns (cout/groups) of a group's matrix.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np

from compressx.crossbar.design import Design


@dataclass(frozen=True)
class Layer:
    """A layer as matrices: what is stored, and how often it is used for one input of the network.

    Attributes:
      name: path of the weight.
      kept: bool `[groups, P, F]`: non-zero weights.
      uses: matrix-vector products for one inference: output pixels of a convolution, time steps of a recurrence, or 1.
      rows: what `program` is given as `rows`: the rows that every group lays on its word lines, in this order, those
        without a weight too; None: each group's rows with a weight.
      dynamic: a product of two activations (attention): it is counted, and no array holds it.

    Raises:
      ValueError: shapes, `uses` or `rows` are not possible; the message names the layer.

    Example:
      >>> kept = np.ones((1, 27, 16), bool)  # one group of a 3x3 convolution of 3 channels to 16
      >>> compressx.crossbar.Layer("conv", kept, uses=64).macs
      27648
    """

    name: str
    kept: np.ndarray
    uses: int = 1
    rows: np.ndarray | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        if self.kept.ndim != 3 or self.kept.dtype != np.bool_ or min(self.kept.shape) < 1:
            raise ValueError(
                f"layer {self.name}: kept must be bool [groups, P, F] and not empty, "
                f"got {self.kept.dtype} {self.kept.shape}"
            )
        if self.uses < 1:
            raise ValueError(f"layer {self.name}: uses must be at least 1, got {self.uses}")
        for matrix in self.kept:
            word_lines(matrix, self.rows, f"layer {self.name}")

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense layer for one inference."""
        return int(self.kept.size) * self.uses

    def laid(self, group: int) -> np.ndarray:
        """The rows that a group lays on word lines, in order; none where it has no weight."""
        matrix = self.kept[group]
        return word_lines(matrix, self.rows) if matrix.any() else np.zeros(0, np.int64)


@dataclass(frozen=True)
class Mapped:
    """One layer on a design, in whole arrays.

    Attributes:
      name, groups, uses: of the layer.
      rows, cols: of the dense matrix of a group.
      kept_rows, kept_cols: rows that are programmed and columns that are not all zero, per group: int `[groups]`.
      weights: non-zero weights of all groups.
      arrays: physical arrays.
      dense_arrays: the same without compaction.
      cells: cells inside compacted matrices (what has to be programmed, zeros among them).
      nonzero_cells: cells of non-zero weights, all slices counted.
      array_cells: cells of an array.
      dynamic: a product of two activations, in no array.

    Example:
      >>> from compressx import crossbar
      >>> layer = crossbar.dense_layer("w", np.eye(256)[:, :16])  # 16 of 256 rows hold a weight
      >>> placed = crossbar.map_layer(layer, crossbar.isaac())
      >>> placed.dense_arrays, placed.arrays, placed.utilisation, placed.density
      (2, 1, 0.125, 0.0078125)
    """

    name: str
    groups: int
    uses: int
    rows: int
    cols: int
    kept_rows: tuple[int, ...]
    kept_cols: tuple[int, ...]
    weights: int
    arrays: int
    dense_arrays: int
    cells: int
    nonzero_cells: int
    array_cells: int
    dynamic: bool = False

    @property
    def utilisation(self) -> float:
        """Share of the arrays' cells that belong to a kept row and a kept column."""
        return self.cells / (self.arrays * self.array_cells) if self.arrays else 0.0

    @property
    def density(self) -> float:
        """Share of the arrays' cells that belong to a non-zero weight."""
        return self.nonzero_cells / (self.arrays * self.array_cells) if self.arrays else 0.0

    def row(self) -> dict[str, Any]:
        """The layer as a row of a table."""
        return {
            "layer": self.name,
            "matrix": f"{self.rows}x{self.cols}" + (f" x{self.groups}" if self.groups > 1 else ""),
            "kept rows": sum(self.kept_rows),
            "kept columns": sum(self.kept_cols),
            "weights": self.weights,
            "uses": self.uses,
            "arrays dense": self.dense_arrays,
            "arrays": self.arrays,
            "utilisation": self.utilisation,
            "non-zero cells": self.density,
        }


def word_lines(matrix: np.ndarray, rows: Any = None, name: str = "weights") -> np.ndarray:
    """The rows of a matrix `[P, F]` that are laid on word lines, in order: `rows`, or those with a non-zero weight.

    Raises:
      ValueError: `rows` repeats one, leaves the matrix, or leaves out a weight.
    """
    if rows is None:
        return np.flatnonzero(matrix.any(axis=1))
    order = np.asarray(rows)
    if len(np.unique(order)) != len(order) or (order.size and not 0 <= order.min() <= order.max() < len(matrix)):
        raise ValueError(f"{name}: rows must be distinct and in 0..{len(matrix) - 1}")
    if np.delete(matrix, order, axis=0).any():
        raise ValueError(f"{name}: rows leaves out rows with non-zero weights; leave it None, or take them in")
    return order


def dense_layer(name: str, weight: Any, uses: int = 1) -> Layer:
    """A dense layer `[in, out]`.

    Args:
      name: path of the weight.
      weight: `[in, out]`; only where it is zero counts.
      uses: products for one inference: of a dense layer on tokens, the number of tokens.

    Returns:
      A `Layer` of one group.

    Raises:
      ValueError: the weight is empty or has not two axes.

    Example:
      >>> compressx.crossbar.dense_layer("top/kernel", np.ones((64, 10))).macs
      640
    """
    w = _weight(name, weight, 2)
    return Layer(name, (w != 0)[None], uses)


def conv_layer(
    name: str,
    weight: Any,
    input_size: tuple[int, int],
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    groups: int = 1,
) -> Layer:
    """A convolution `[kh, kw, cin/groups, cout]`: one use per output pixel; depthwise where groups = cin.

    Args:
      name: path of the weight.
      weight: the kernel.
      input_size: height and width of the input.
      strides: rows, columns.
      padding: "SAME", "VALID" or ((top, bottom), (left, right)).
      groups: `feature_group_count`; output channels are divided among the groups in order.

    Returns:
      A `Layer` whose rows are the kernel's (i, j, cin) in this order, the last fastest.

    Raises:
      ValueError: the weight has not four axes, the groups do not divide the outputs, or the kernel leaves no output.

    Example:
      >>> layer = compressx.crossbar.conv_layer("conv", np.ones((3, 3, 3, 16)), input_size=(32, 32), strides=(2, 2))
      >>> layer.kept.shape, layer.uses
      ((1, 27, 16), 256)
    """
    w = _weight(name, weight, 4)
    kh, kw, cin, cout = w.shape
    if groups < 1 or cout % groups:
        raise ValueError(f"layer {name}: {cout} output channels do not divide into groups={groups}")
    out = output_size(input_size, (kh, kw), strides, padding)
    if min(out) < 1:
        raise ValueError(f"layer {name}: kernel {kh}x{kw} leaves no output of an input {input_size}")
    matrices = np.moveaxis((w != 0).reshape(kh * kw * cin, groups, cout // groups), 1, 0)
    return Layer(name, matrices, out[0] * out[1])


def recurrent_layers(name: str, kernels: Mapping[str, Any], steps: int) -> list[Layer]:
    """A recurrent cell: each of its matrices `[in, gates]` is a layer of its own, used once a time step.

    Input and recurrent matrices stay apart, since a GRU's reset gate acts on the recurrent product alone.

    Args:
      name: path of the cell.
      kernels: matrix by name, each `[in, gates]`.
      steps: time steps of one inference.

    Returns:
      A `Layer` for each matrix, named `name/key`.

    Example:
      >>> kernels = {"wi": np.ones((8, 12)), "wh": np.ones((4, 12))}
      >>> layers = compressx.crossbar.recurrent_layers("gru", kernels, steps=50)
      >>> [(layer.name, layer.uses) for layer in layers]
      [('gru/wi', 50), ('gru/wh', 50)]
    """
    return [dense_layer(f"{name}/{key}", kernel, steps) for key, kernel in kernels.items()]


def output_size(
    size: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int], padding: str | Sequence[tuple[int, int]]
) -> tuple[int, int]:
    """Height and width of a convolution's output."""
    if isinstance(padding, str):
        if padding == "SAME":
            return ceil(size[0] / strides[0]), ceil(size[1] / strides[1])
        if padding != "VALID":
            raise ValueError(f'padding must be "SAME", "VALID" or pairs of numbers, got {padding!r}')
        padding = ((0, 0), (0, 0))
    pads = [sum(p) for p in padding]
    height, width = ((n + p - k) // s + 1 for n, p, k, s in zip(size, pads, kernel, strides, strict=True))
    return height, width


def map_layer(layer: Layer, design: Design, squeeze: bool = True) -> Mapped:
    """Counts the arrays of a layer, see the module's formula; a group without a weight takes none.

    Args:
      layer: what is stored.
      design: array size and columns per weight.
      squeeze: leave out rows and columns that are all zero (rows among `layer.rows` stay).

    Returns:
      `Mapped`: arrays with and without compaction, and how full they are.

    Source: rows and columns compacted as in G. Yuan et al., "FORMS", 2021, section III.

    Example:
      >>> from compressx import crossbar
      >>> w = np.ones((256, 32))
      >>> w[128:] = 0
      >>> placed = crossbar.map_layer(crossbar.dense_layer("w", w), crossbar.isaac())
      >>> placed.dense_arrays, placed.arrays  # 8 cells a weight: 16 weights side by side
      (4, 2)
    """
    groups, rows, cols = layer.kept.shape
    if layer.dynamic:
        none = (0,) * groups
        cells = design.rows * design.cols
        return Mapped(layer.name, groups, layer.uses, rows, cols, none, none, 0, 0, 0, 0, 0, cells, dynamic=True)
    kept_rows = np.array([len(layer.laid(group)) for group in range(groups)])
    kept_cols = layer.kept.any(axis=1).sum(axis=1)
    dense = _arrays(np.full(groups, rows), np.full(groups, cols), design)
    if not squeeze:
        kept_rows, kept_cols = np.full(groups, rows), np.full(groups, cols)
    weights, per = int(layer.kept.sum()), design.columns_per_weight
    return Mapped(
        name=layer.name,
        groups=groups,
        uses=layer.uses,
        rows=rows,
        cols=cols,
        kept_rows=tuple(int(n) for n in kept_rows),
        kept_cols=tuple(int(n) for n in kept_cols),
        weights=weights,
        arrays=_arrays(kept_rows, kept_cols, design),
        dense_arrays=dense,
        cells=int((kept_rows * kept_cols).sum()) * per,
        nonzero_cells=weights * per,
        array_cells=design.rows * design.cols,
    )


def _arrays(rows: np.ndarray, cols: np.ndarray, design: Design) -> int:
    """Whole arrays for matrices of these sizes; small ones are laid along diagonals, first fit in order."""
    per, total = design.columns_per_weight, 0
    free_rows = free_cols = 0
    for r, c in zip((int(n) for n in rows), (int(n) * per for n in cols), strict=True):
        if r == 0 or c == 0:
            continue
        if r > design.rows or c > design.cols or len(rows) == 1:
            total += ceil(r / design.rows) * ceil(c / design.cols)
            continue
        if r > free_rows or c > free_cols:
            total, free_rows, free_cols = total + 1, design.rows, design.cols
        free_rows, free_cols = free_rows - r, free_cols - c
    return total


def map_network(layers: Sequence[Layer], design: Design, squeeze: bool = True) -> list[Mapped]:
    """All layers, in order.

    Args:
      layers, design, squeeze: as for `map_layer`.

    Returns:
      `Mapped` for each layer.

    Example:
      >>> from compressx import crossbar
      >>> layers = [crossbar.dense_layer(n, np.ones((128, 16))) for n in ("a", "b")]
      >>> [m.arrays for m in crossbar.map_network(layers, crossbar.isaac())]
      [1, 1]
    """
    return [map_layer(layer, design, squeeze) for layer in layers]


@dataclass(frozen=True)
class Reduction:
    """Where a reduction in arrays comes from: prune x bits x signs (FORMS, table of crossbar reductions).

    Attributes:
      prune: dense weights / weights in kept rows and columns.
      bits: columns of a baseline weight / columns of a stored weight, signs left out (32 -> 8 bit: 4).
      signs: 2 where the baseline has positive and negative arrays and the design has one, else 1.
      baseline_arrays: arrays of the dense network on the baseline.
      arrays: arrays of the compacted network on the design.

    Source: G. Yuan et al., "FORMS", 2021, table of crossbar reductions.

    Example:
      >>> factors = compressx.crossbar.Reduction(prune=2.0, bits=4.0, signs=2.0, baseline_arrays=30, arrays=2)
      >>> factors.product, factors.measured, factors.rounding
      (16.0, 15.0, 0.9375)
    """

    prune: float
    bits: float
    signs: float
    baseline_arrays: int
    arrays: int

    @property
    def product(self) -> float:
        """The reduction as the paper counts it: weights, bits and signs multiplied."""
        return self.prune * self.bits * self.signs

    @property
    def measured(self) -> float:
        """The reduction in whole arrays."""
        return self.baseline_arrays / self.arrays if self.arrays else float("inf")

    @property
    def rounding(self) -> float:
        """measured / product: what the whole arrays of either side gain or lose."""
        return self.measured / self.product


def reduction(layers: Sequence[Layer], design: Design, baseline_bits: int = 32) -> Reduction:
    """Factors of the reduction from a dense network of `baseline_bits` in split arrays to this network here.

    Args:
      layers: of the network, pruned.
      design: on which the compacted network lies.
      baseline_bits: bits of a weight of the baseline, which has positive and negative arrays.

    Returns:
      `Reduction`: the factors, and both numbers of arrays.

    Raises:
      ValueError: no weight is left.

    Source: factors of G. Yuan et al., "FORMS", 2021, table of crossbar reductions.

    Example:
      >>> from compressx import crossbar
      >>> layer = crossbar.dense_layer("w", np.ones((128, 64)))
      >>> found = crossbar.reduction([layer], crossbar.forms(8))  # from 32 bits and two arrays to 8 bits and one
      >>> found.bits, found.signs, found.baseline_arrays, found.arrays
      (4.0, 2.0, 16, 2)
    """
    mapped = map_network(layers, design)
    wide = ceil(baseline_bits / design.device.cell_bits)
    kept = sum(r * c for m in mapped for r, c in zip(m.kept_rows, m.kept_cols, strict=True))
    if kept == 0:
        raise ValueError("no weight is left: every row of every layer is zero")
    baseline = 0
    for layer in layers:
        groups, rows, cols = layer.kept.shape
        baseline += groups * ceil(rows / design.rows) * ceil(2 * cols * wide / design.cols)
    return Reduction(
        prune=sum(int(layer.kept.size) for layer in layers) / kept,
        bits=wide / design.slices,
        signs=2 * design.slices / design.columns_per_weight,
        baseline_arrays=baseline,
        arrays=sum(m.arrays for m in mapped),
    )


def frees_whole_arrays(mapped: Mapped, design: Design) -> bool:
    """Whether not one more row or column could be kept in the same arrays (of a layer without groups).

    True where programmed rows fill whole arrays or nothing was pruned, and columns likewise. It says nothing of what
    lies in them: a row may be empty (a hole in the order), or read what is always zero.
    """
    if mapped.groups != 1:
        raise ValueError(f"layer {mapped.name} has {mapped.groups} groups; this holds for one matrix")
    per_array = design.cols // design.columns_per_weight
    rows, cols = mapped.kept_rows[0], mapped.kept_cols[0]
    return (rows == mapped.rows or rows % design.rows == 0) and (cols == mapped.cols or cols % per_array == 0)


def occupancy(layer: Layer, design: Design, group: int = 0) -> np.ndarray:
    """The picture of a layer: share of non-zero weights in each physical array, float64 `[row arrays, column arrays]`.

    Rows as they lie on the word lines, columns compacted in order; a weight that straddles two arrays counts in both by
    its columns.

    Args:
      layer: what is stored.
      design: size of an array, columns of a weight.
      group: which group of the layer's filters.

    Returns:
      float64 `[row arrays, column arrays]`, each in 0..1.

    Example:
      >>> from compressx import crossbar
      >>> w = np.ones((256, 16))
      >>> w[128:, 8:] = 0
      >>> crossbar.occupancy(crossbar.dense_layer("w", w), crossbar.isaac()).tolist()
      [[1.0], [0.5]]
    """
    kept = layer.kept[group]
    kept = kept[layer.laid(group)][:, kept.any(axis=0)]
    cells = np.repeat(kept, design.columns_per_weight, axis=1)
    down, across = ceil(cells.shape[0] / design.rows), ceil(cells.shape[1] / design.cols)
    full = np.zeros((down * design.rows, across * design.cols))
    full[: cells.shape[0], : cells.shape[1]] = cells
    return full.reshape(down, design.rows, across, design.cols).mean(axis=(1, 3))


def _weight(name: str, weight: Any, ndim: int) -> np.ndarray:
    w = np.asarray(weight)
    if w.ndim != ndim or w.size == 0:
        raise ValueError(f"layer {name}: expected a weight of {ndim} axes that is not empty, got shape {w.shape}")
    return w
