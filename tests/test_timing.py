"""Interleaved timing: every call is made once a round, after one that is not counted, until the time is used up."""

import jax.numpy as jnp
import pytest

from compressx.timing import interleaved


def test_a_round_makes_each_call_once() -> None:
    made: list[str] = []

    def call(name: str) -> jnp.ndarray:
        made.append(name)
        return jnp.ones(3)

    spent = interleaved({"a": lambda: call("a"), "b": lambda: call("b")}, rounds=3)
    assert made == ["a", "b"] * 4
    assert {name: len(times) for name, times in spent.items()} == {"a": 3, "b": 3}
    assert all(t > 0 for times in spent.values() for t in times)


def test_rounds_are_added_until_the_time_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("compressx.timing.time.perf_counter", lambda: float(next(clock)))
    assert interleaved({"a": lambda: 0}, rounds=1, seconds=10.0) == {"a": [1.0] * 4}  # three looks at the clock a round
