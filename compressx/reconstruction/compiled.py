"""The compiled programs of the solver, kept for the whole process by sets, layouts and settings.

A network of twenty layers has a handful of shapes: each program is compiled once a shape, and not again by the next
call. Sets that no `factory` made are not told from others, and are compiled anew every time.
"""

import functools
from collections.abc import Callable, Hashable
from typing import Any

from compressx.constraints.base import Constraint
from compressx.constraints.programs import set_key
from compressx.reconstruction.iterate import admm_loop
from compressx.reconstruction.levels import descend
from compressx.reconstruction.problem import Layout
from compressx.reconstruction.refit import refit_loop
from compressx.reconstruction.settings import Settings

_KEPT = 512
_MAKERS: dict[str, Callable[..., Any]] = {"admm": admm_loop, "refit": refit_loop, "levels": descend}

Sets = tuple[Constraint, ...]


class _Keyed:
    """Single sets that equal other ones of the same calls."""

    def __init__(self, key: Hashable, sets: Sets) -> None:
        self.key, self.sets = key, sets

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and self.key == other.key


@functools.lru_cache(_KEPT)
def _kept(name: str, of: _Keyed, layouts: tuple[Layout, ...], *rest: Hashable) -> Callable[..., Any]:
    return _MAKERS[name](of.sets, layouts, *rest)


def _program(name: str, sets: Sets, layouts: tuple[Layout, ...], *rest: Hashable) -> Callable[..., Any]:
    keys = tuple(set_key(part) for part in sets)
    if any(key is None for key in keys):
        return _MAKERS[name](sets, layouts, *rest)
    return _kept(name, _Keyed(keys, sets), layouts, *rest)


def admm_program(
    sets: Sets, layouts: tuple[Layout, ...], settings: Settings, each: bool, chosen: bool
) -> Callable[..., Any]:
    """`iterate.admm_loop`."""
    return _program("admm", sets, layouts, settings, each, chosen)


def refit_program(sets: Sets, layouts: tuple[Layout, ...], steps: int) -> Callable[..., Any]:
    """`refit.refit_loop`."""
    return _program("refit", sets, layouts, steps)


def levels_program(sets: Sets, layouts: tuple[Layout, ...], sweeps: int) -> Callable[..., Any]:
    """`levels.descend`."""
    return _program("levels", sets, layouts, sweeps)
