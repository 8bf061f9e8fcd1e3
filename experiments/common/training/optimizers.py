"""The optimizer of each kind of phase: learning rates, Adam or SGD, and where ADMM and retraining stand."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from compressx import schedules as rho_schedules
from compressx._admm import admm
from compressx._retrain import retrain
from compressx.rules import Rules
from experiments.common.training.config import Admm, ConfigError, Fit
from experiments.common.training.phases import Phase
from experiments.common.training.refreshes import watch_refreshes


def learning_rate(fit: Fit, steps: int) -> optax.Schedule:
    """The learning rate of step 0..steps-1 of a phase: warm-up, then `cycles` runs of the schedule.

    The last step of a cosine cycle is one step short of `lr * final`, so that no step has a learning rate of 0.
    """
    warm = round(fit.warmup * steps)
    length = max(1, math.ceil((steps - warm) / fit.cycles))

    def schedule(count: Any) -> Any:
        count = jnp.asarray(count, jnp.int32)
        position = jnp.maximum(count - warm, 0)
        part = (position % length).astype(jnp.float32) / length
        if fit.schedule == "cosine":
            value = fit.lr * (fit.final + (1 - fit.final) * 0.5 * (1 + jnp.cos(jnp.pi * part)))
        else:
            value = jnp.full((), fit.lr, jnp.float32)
            for boundary in fit.boundaries:
                value = jnp.where(part >= boundary, value * fit.drop, value)
        if warm:
            value = jnp.where(count < warm, fit.lr * (count.astype(jnp.float32) + 1) / warm, value)
        return value

    return schedule


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda w: w.ndim >= 2, params)


def _base(name: str) -> optax.GradientTransformation:
    if name == "adam":
        return optax.scale_by_adam()
    if name == "sgd":
        return optax.trace(decay=0.9, nesterov=True)
    if name == "plain_sgd":
        return optax.identity()
    if name == "rmsprop":
        return optax.scale_by_rms(decay=0.95, eps=1e-8, eps_in_sqrt=False)
    raise ConfigError(f"optimizer={name!r} is impossible; it must be adam, sgd (Nesterov's), plain_sgd or rmsprop")


def _parts(name: str, fit: Fit, steps: int) -> tuple[list[Any], list[Any]]:
    """What normalises the gradient, and what scales it into an update."""
    decay = [optax.add_decayed_weights(fit.weight_decay, _matrices)] if fit.weight_decay else []
    return [_base(name)], [*decay, optax.scale_by_learning_rate(learning_rate(fit, steps))]


def dense(name: str, fit: Fit, steps: int) -> optax.GradientTransformationExtraArgs:
    """Training without constraints."""
    direction, scaling = _parts(name, fit, steps)
    return optax.chain(*direction, *scaling)


def every(fit: Admm, steps_per_epoch: int) -> int:
    """Steps between Z and U updates."""
    return fit.every or steps_per_epoch


def check_due(fit: Admm, steps: int, steps_per_epoch: int) -> None:
    """Raises ConfigError where a phase is too short for one update."""
    due = every(fit, steps_per_epoch)
    if 0 < steps < due:
        raise ConfigError(
            f"every={due} steps between updates is more than the {steps} steps of the phase; train longer"
        )


def constrained(
    name: str, fit: Admm, steps: int, steps_per_epoch: int, rules: Rules, within: Rules | None, structure: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Training with ADMM's penalty towards the rules, inside `within` (the rules of the stage before) if any."""
    due = every(fit, steps_per_epoch)
    pull = admm(rules, rho=_rho(fit, steps // due), every=due, refresh_every=fit.refresh_every or None)
    if fit.refresh_every and any(part.changed is not None for _, c in rules if c is not None for part in c.sets):
        pull = watch_refreshes(pull, rules, fit.refresh_every)
    direction, scaling = _parts(name, fit, steps)
    chain = [*direction, pull, *scaling] if fit.decoupled else [pull, *direction, *scaling]
    return optax.chain(*chain, *([retrain(within, structure)] if within is not None else []))


def retraining(
    name: str, fit: Fit, steps: int, rules: Rules, structure: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Training inside the part of the rules' sets in which the weights lie."""
    direction, scaling = _parts(name, fit, steps)
    return optax.chain(*direction, *scaling, retrain(rules, structure))


def _rho(fit: Admm, updates: int) -> Any:
    def one(value: float) -> rho_schedules.RhoSchedule:
        if fit.rho_schedule == "staged":
            each = max(1, math.ceil(updates / fit.rho_stages))
            top = value * fit.rho_factor ** (fit.rho_stages - 1)
            ends = top if fit.rho_factor >= 1 else None
            return rho_schedules.staged(value, fit.rho_factor, each, ends)
        if fit.rho_schedule == "residual_balancing":
            return rho_schedules.residual_balancing(value)
        if fit.rho_schedule == "rtmobile":
            return rho_schedules.rtmobile(value)
        return rho_schedules.constant(value)

    if isinstance(fit.rho, tuple):
        return [(pattern, one(value)) for pattern, value in fit.rho]
    return one(fit.rho)


def of_phase(
    name: str, phase: Phase, steps: int, per_epoch: int, structure: Any, clip: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    """The phase's optimizer; `structure` is that of the sets it must stay inside (None: chosen at init).

    With `clip` the gradient of the loss is scaled down to that norm where it is longer, before ADMM's penalty is added.
    """
    tx = _of_phase(name, phase, steps, per_epoch, structure)
    return optax.chain(optax.clip_by_global_norm(clip), tx) if clip else tx


def _of_phase(
    name: str, phase: Phase, steps: int, per_epoch: int, structure: Any
) -> optax.GradientTransformationExtraArgs:
    if phase.kind == "dense":
        return dense(name, phase.fit, steps)
    assert phase.rules is not None
    if phase.kind == "retrain":
        return retraining(name, phase.fit, steps, phase.rules, structure)
    assert isinstance(phase.fit, Admm)
    check_due(phase.fit, steps, per_epoch)
    if phase.kind == "gradual":
        return retraining(name, phase.fit, steps, phase.rules, structure)
    return constrained(name, phase.fit, steps, per_epoch, phase.rules, phase.within, structure)
