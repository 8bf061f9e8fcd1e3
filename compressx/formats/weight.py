"""A weight that is to be packed, and what several formats ask of it: each is found once, however many formats ask.

Choosing the smallest of all formats is counting: how many weights are not zero, in how many rows and columns, on which
levels. A `Weight` keeps what was counted while the formats compare their sizes and the smallest of them is written.
"""

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


def nonzero(w: np.ndarray) -> np.ndarray:
    """Where any bit of a weight is set (bool). A negative zero counts as a value, so that it comes back as one."""
    unsigned = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[w.dtype.itemsize]
    return np.ascontiguousarray(w).view(unsigned).reshape(w.shape) != 0


class Bytes(NamedTuple):
    """What a format takes: bytes of all arrays but the values, and how many values it stores."""

    indices: int
    values: int


class Support:
    """Where a weight is not zero, and what follows from that alone.

    Attributes:
      mask: bool, of the weight's shape.
    """

    def __init__(self, mask: np.ndarray) -> None:
        self.mask = mask
        self._found: dict[Any, Any] = {}

    def once(self, count: Callable[["Support"], T]) -> T:
        """What `count` says of this support, kept for whoever asks again; `count` is a function of a module."""
        if count not in self._found:
            self._found[count] = count(self)
        found: T = self._found[count]
        return found

    @cached_property
    def matrix(self) -> np.ndarray:
        """The mask of the GEMM view `[positions, filters]` of a weight of two axes or more."""
        return self.mask.reshape(-1, self.mask.shape[-1]) if self.mask.size else np.zeros(_view(self.mask.shape), bool)

    @cached_property
    def count(self) -> int:
        """How many weights are not zero."""
        return int(np.count_nonzero(self.mask))

    @cached_property
    def positions(self) -> np.ndarray:
        """Which rows of the GEMM view hold a weight, bool."""
        found: np.ndarray = np.logical_or.reduce(self.matrix, axis=1)
        return found

    @cached_property
    def filters(self) -> np.ndarray:
        """Which columns of the GEMM view hold a weight, bool."""
        found: np.ndarray = np.logical_or.reduce(self.matrix, axis=0)
        return found


def _view(shape: tuple[int, ...]) -> tuple[int, int]:
    return int(np.prod(shape[:-1], dtype=np.int64)), shape[-1]


class Weight:
    """A weight with the constraint it satisfies and the structure of that; either may be None.

    Attributes:
      w: the array, in this machine's byte order and without gaps.
      constraint, structure: as `formats.pack` takes them.
    """

    def __init__(self, w: np.ndarray, constraint: Any = None, structure: Any = None) -> None:
        self.w, self.constraint, self.structure = w, constraint, structure
        self._found: dict[Any, Any] = {}

    @cached_property
    def support(self) -> Support:
        """Where it is not zero; a negative zero is a value."""
        return Support(nonzero(self.w))

    def once(self, find: Callable[["Weight"], T]) -> T:
        """What `find` says of this weight, or the ValueError that it raised, kept for whoever asks again."""
        if find not in self._found:
            try:
                self._found[find] = find(self), None
            except ValueError as error:
                self._found[find] = None, error
        found, refused = self._found[find]
        if refused is not None:
            raise refused
        result: T = found
        return result

    def forget(self) -> None:
        """Drops all that was found, to free its memory."""
        self._found.clear()
        self.__dict__.pop("support", None)

    def refuse(self, find: Callable[["Weight"], T], error: ValueError) -> None:
        """Whoever asks for what `find` says gets this error."""
        self._found[find] = None, error
