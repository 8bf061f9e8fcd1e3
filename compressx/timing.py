"""Wall times of several functions, measured in turn."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import jax

Name = TypeVar("Name", bound=Hashable)


def interleaved(
    calls: Mapping[Name, Callable[[], Any]], rounds: int = 5, seconds: float = 0.0
) -> dict[Name, list[float]]:
    """Seconds that each call takes in every round; a round makes each once, so that other work meets all alike.

    Each is called once before, to compile; results are waited for.

    Args:
      calls: by name.
      rounds: at least so many.
      seconds: rounds are added until so much time has passed.
    """
    for call in calls.values():
        jax.block_until_ready(call())
    spent: dict[Name, list[float]] = {name: [] for name in calls}
    started, done = time.perf_counter(), 0
    while done < rounds or time.perf_counter() - started < seconds:
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            spent[name].append(time.perf_counter() - begin)
        done += 1
    return spent
