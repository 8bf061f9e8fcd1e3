"""rho schedules against the rules written out in plain Python."""

import jax.numpy as jnp
import pytest

from compressx import schedules


def follow(schedule: schedules.RhoSchedule, residuals: list[tuple[float, float]]) -> list[float]:
    value = schedule.init()
    out = [float(value)]
    for number, (primal, dual) in enumerate(residuals, 1):
        value = schedule.update(value, jnp.float32(primal), jnp.float32(dual), jnp.int32(number))
        out.append(float(value))
    return out


def test_constant_stays() -> None:
    assert follow(schedules.constant(0.5), [(1, 0), (0, 1)]) == [0.5] * 3


def test_staged_multiplies_at_stage_ends_up_to_the_maximum() -> None:
    got = follow(schedules.staged(1e-3, 10.0, every=2, maximum=0.05), [(1, 1)] * 6)
    assert got == pytest.approx([1e-3, 1e-3, 1e-2, 1e-2, 0.05, 0.05, 0.05])


def test_residual_balancing_follows_the_larger_residual() -> None:
    # primal 1 against rho * dual: leads by more than 10, is balanced, is led by more than 10
    got = follow(schedules.residual_balancing(1.0, 10.0, 2.0), [(1, 0.01), (1, 1), (0.01, 1)])
    assert got == [1.0, 2.0, 2.0, 1.0]


def test_rtmobile_rule_over_its_three_ranges() -> None:
    value, want, residuals = 0.01, [0.01], []
    for number in range(60):
        a, b = (1.0, 1.0) if number % 5 else (0.05, 1.0)
        residuals.append((a**0.5, b**0.5))
        if value > 0.5:
            pass
        elif value > 0.02:
            value += 0.02
        else:
            value = value * 1.2 if a / b >= 0.1 else value / 1.2
        want.append(value)
    assert follow(schedules.rtmobile(0.01), residuals) == pytest.approx(want, rel=1e-4)
    assert want[-1] > 0.5


def test_rtmobile_does_not_divide_by_a_zero_dual() -> None:
    assert follow(schedules.rtmobile(0.01), [(0.0, 0.0)]) == pytest.approx([0.01, 0.012])


@pytest.mark.parametrize(
    "make", [schedules.constant, schedules.staged, schedules.residual_balancing, schedules.rtmobile]
)
def test_rho_must_be_positive(make: object) -> None:
    with pytest.raises(ValueError, match="rho must be .*, got -1"):
        make(-1.0)  # type: ignore[operator]
