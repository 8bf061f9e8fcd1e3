"""The per-layer table: one row a leaf, the same numbers on the page, on the console and in `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from experiments.common.report import format as fmt

HEADER = ("layer", "shape", "constraint", "kept", "of", "density", "dense", "packed", "rate")
NUMERIC = (False, False, False, True, True, True, True, True, True)


class Layer(NamedTuple):
    """What became of one leaf.

    Attributes:
      path: the slash-joined path.
      shape: the stored shape.
      constraint: the constraint in words, or None where the leaf is not constrained.
      kept: weights that are not zero.
      total: weights of the dense leaf.
      bytes_dense: bytes before, at the dense dtype.
      bytes_packed: bytes as stored, indices included; None where it is not packed.
    """

    path: str
    shape: tuple[int, ...]
    constraint: str | None
    kept: int
    total: int
    bytes_dense: int
    bytes_packed: int | None

    @property
    def density(self) -> float | None:
        """Kept over total; None for an empty leaf."""
        return self.kept / self.total if self.total else None

    @property
    def rate(self) -> float | None:
        """Bytes dense over bytes packed; None where not packed, or where nothing is left."""
        return self.bytes_dense / self.bytes_packed if self.bytes_packed else None


def total(layers: Sequence[Layer], path: str = "all layers") -> Layer:
    """The sum of the rows as a row; its packed size is None if any row's is."""
    packed = [layer.bytes_packed for layer in layers if layer.bytes_packed is not None]
    return Layer(
        path=path,
        shape=(),
        constraint=None,
        kept=sum(layer.kept for layer in layers),
        total=sum(layer.total for layer in layers),
        bytes_dense=sum(layer.bytes_dense for layer in layers),
        bytes_packed=sum(packed) if len(packed) == len(layers) else None,
    )


def brief(layers: Sequence[Layer], most: int = 40) -> list[Layer]:
    """The rows for a console: of more than `most` the constrained ones alone, and one that sums up all others."""
    others = [layer for layer in layers if layer.constraint is None]
    if len(layers) <= most or len(others) < 2:
        return list(layers)
    named = [layer for layer in layers if layer.constraint is not None]
    return [*named, total(others, f"{len(others)} leaves without a constraint")]


def cells(layer: Layer) -> tuple[str, ...]:
    """The row as text, in the order of `HEADER`."""
    return (
        layer.path,
        "×".join(str(n) for n in layer.shape),
        layer.constraint or fmt.ABSENT,
        fmt.count(layer.kept),
        fmt.count(layer.total),
        fmt.percent(layer.density),
        fmt.size(layer.bytes_dense),
        fmt.size(layer.bytes_packed),
        fmt.rate(layer.rate),
    )
