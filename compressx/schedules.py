"""Schedules of rho, the weight of ADMM's quadratic penalty; one value per constrained leaf and set of leaves.

A schedule is a pair of pure functions: `init() -> rho` and
`update(rho, primal, dual, updates) -> rho`, called after every Z and U update with primal = ||W - Z||_2,
dual = ||Z - Z_previous||_2 (over all sets of the leaf) and the number of updates done, this one included.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array


class RhoSchedule(NamedTuple):
    """How rho moves from one Z and U update to the next; all numbers are float32 `[]`.

    Attributes:
      init: `init()` is rho's first value.
      update: `update(rho, primal, dual, updates)` is the next one.

    Example:
      >>> halving = compressx.schedules.RhoSchedule(lambda: jnp.float32(8), lambda rho, primal, dual, updates: rho / 2)
      >>> float(halving.update(halving.init(), 1.0, 1.0, 1))
      4.0
    """

    init: Callable[[], Array]
    update: Callable[[Array, Array, Array, Array], Array]


def _positive(**values: float) -> None:
    for name, value in values.items():
        if isinstance(value, int | float) and not value > 0:
            raise ValueError(f"{name} must be positive, got {value}")


def constant(rho: float | Array) -> RhoSchedule:
    """rho stays as it is.

    Args:
      rho: 0, which is no penalty, or above.

    Returns:
      A schedule that gives `rho` always.

    Example:
      >>> schedule = compressx.schedules.constant(0.25)
      >>> float(schedule.update(schedule.init(), 1.0, 1.0, 1))
      0.25
    """
    if isinstance(rho, int | float) and not 0 <= rho < math.inf:
        raise ValueError(f"rho must be finite and not negative, got {rho}")
    return RhoSchedule(lambda: jnp.asarray(rho, jnp.float32), lambda value, primal, dual, updates: value)


def of_steps(schedule: Callable[[Array], Any], every: int) -> RhoSchedule:
    """rho follows an optax schedule, a function of the number of gradient steps done; `every` is that of `admm`.

    Args:
      schedule: number of gradient steps done (int32 `[]`) -> rho.
      every: gradient steps between two updates.

    Example:
      >>> schedule = compressx.schedules.of_steps(optax.linear_schedule(0.0, 1.0, 100), every=25)
      >>> float(schedule.update(schedule.init(), 1.0, 1.0, 2))  # after two updates, 50 steps
      0.5
    """
    return RhoSchedule(
        lambda: jnp.asarray(schedule(jnp.zeros((), jnp.int32)), jnp.float32),
        lambda value, primal, dual, updates: jnp.asarray(schedule(updates * every), jnp.float32),
    )


def staged(rho: float, factor: float = 10.0, every: int = 4, maximum: float | None = None) -> RhoSchedule:
    """rho is multiplied by `factor` after every `every` updates, up to `maximum`.

    Args:
      rho: its first value, above 0.
      factor: of each stage, above 0.
      every: updates in a stage, at least 1.
      maximum: rho never passes it; None: no bound.

    Raises:
      ValueError: rho, factor or every is not positive.

    Source: public training code of the groups of W. Niu et al., "PatDNN", 2020, and G. Yuan et al., "FORMS", 2021:
    1e-4, then x10 at each of four stages.

    Example:
      >>> schedule = compressx.schedules.staged(0.5, factor=4, every=2)
      >>> [float(schedule.update(0.5, 1.0, 1.0, updates)) for updates in (1, 2)]
      [0.5, 2.0]
    """
    _positive(rho=rho, factor=factor, every=every)

    def update(value: Array, primal: Array, dual: Array, updates: Array) -> Array:
        raised = jnp.where(updates % every == 0, value * factor, value)
        return raised if maximum is None else jnp.minimum(raised, jnp.float32(maximum))

    return RhoSchedule(lambda: jnp.asarray(rho, jnp.float32), update)


def residual_balancing(rho: float, ratio: float = 10.0, factor: float = 2.0) -> RhoSchedule:
    """rho follows the residuals: x factor where primal > ratio * rho-scaled dual, / factor where the dual leads.

        primal ||W - Z||, dual rho * ||Z - Z_previous||

    Args:
      rho: its first value, above 0.
      ratio: how far one residual must lead (mu in the paper), above 0.
      factor: by which rho moves (tau in the paper), above 0.

    Raises:
      ValueError: an argument is not positive.

    Source: S. Boyd et al., "Distributed Optimization and Statistical Learning via the ADMM", 2011, eq. 3.13.

    Example:
      >>> schedule = compressx.schedules.residual_balancing(1.0)
      >>> float(schedule.update(jnp.float32(1.0), jnp.float32(50.0), jnp.float32(1.0), 1))  # the weights lag behind
      2.0
    """
    _positive(rho=rho, ratio=ratio, factor=factor)

    def update(value: Array, primal: Array, dual: Array, updates: Array) -> Array:
        scaled = value * dual
        up, down = primal > ratio * scaled, scaled > ratio * primal
        return jnp.where(up, value * factor, jnp.where(down, value / factor, value))

    return RhoSchedule(lambda: jnp.asarray(rho, jnp.float32), update)


def rtmobile(rho: float = 1e-3) -> RhoSchedule:
    """RTMobile's rule, with a = ||W - Z||^2 and b = ||Z - Z_previous||^2:

        rho <= 0.02:  rho * 1.2 where a / b >= 0.1, else rho / 1.2
        0.02 < rho <= 0.5:  rho + 0.02
        rho > 0.5:  frozen

    Args:
      rho: its first value, above 0.

    Raises:
      ValueError: rho is not positive.

    Source: P. Dong et al., "RTMobile", 2020, the authors' released training code; its first rho is not published.

    Example:
      >>> schedule = compressx.schedules.rtmobile()
      >>> float(schedule.update(jnp.float32(0.75), jnp.float32(1.0), jnp.float32(1.0), 1))  # frozen above 0.5
      0.75
    """
    _positive(rho=rho)

    def update(value: Array, primal: Array, dual: Array, updates: Array) -> Array:
        a, b = jnp.square(primal), jnp.square(dual)
        early = jnp.where(a >= 0.1 * b, value * 1.2, value / 1.2)  # a / b >= 0.1 without dividing by 0
        return jnp.where(value > 0.5, value, jnp.where(value > 0.02, value + 0.02, early))

    return RhoSchedule(lambda: jnp.asarray(rho, jnp.float32), update)
