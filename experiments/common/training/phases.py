"""A run as a list of phases, each starting from the weights that another left.

    dense -> [admm -> retrain] for each stage        and from the same dense weights, the baselines

Hardening is the start of `retrain`: the weights are projected once and checked, and then trained inside the part of
the set they landed in.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from compressx import constraints
from compressx._harden import check, count_violations, project, structures
from compressx._retrain import RetrainState, retract
from compressx.constraints.base import Constraint
from compressx.rules import Rules
from compressx.tree import check_finite
from experiments.common.training.config import Admm, ConfigError, Fit, Plan, Rule, Stage
from experiments.common.training.gradual import check_scalable
from experiments.common.training.state import all_finite

DENSE = "dense"
ONE_SHOT, SAME_BUDGET, GRADUAL, RECONSTRUCT = "one_shot", "dense_same_budget", "gradual", "reconstruct"


class Phase(NamedTuple):
    """A stretch of training with one optimizer and one learning-rate schedule.

    Attributes:
      name: unique in the run; data order and random keys depend on it and the seed alone.
      kind: "dense", "admm", "retrain" (hardens first) or "gradual" (prunes more and more, then is followed by retrain).
      start: phase whose weights it starts from; "" for the initial weights.
      fit: how long and how fast.
      rules: what it moves towards or stays inside; None for "dense".
      within: rules whose support it must not leave while it moves ("admm" of a later stage).
      calibration: of "retrain", examples on which the weights are reconstructed in place of being projected; 0: none.
    """

    name: str
    kind: str
    start: str
    fit: Fit
    rules: tuple[tuple[str, Constraint | None], ...] | None = None
    within: tuple[tuple[str, Constraint | None], ...] | None = None
    calibration: int = 0


class Weights(NamedTuple):
    """What a phase leaves: parameters, running statistics, the structure of its sets by name (`{}` without sets)."""

    params: Any
    batch_stats: Any
    structure: dict[str, Any]


def build_rules(rules: tuple[Rule, ...]) -> tuple[tuple[str, Constraint | None], ...]:
    """Constraints from their specs.

    Raises:
      ConfigError: a spec that no constraint has; names the rule.
    """
    built = []
    for pattern, spec in rules:
        try:
            built.append((pattern, None if spec is None else constraints.from_spec(_lists(spec))))
        except ValueError as error:
            raise ConfigError(f"rule {pattern!r}: {error}") from None
    return tuple(built)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _lists(v) for k, v in value.items()}
    return [_lists(v) for v in value] if isinstance(value, tuple | list) else value


def plan(config: Plan) -> tuple[Phase, ...]:
    """The phases of a run, in the order in which they run."""
    phases = [Phase(DENSE, "dense", "", config.dense)]
    phases += _phases(config)
    for name in config.baselines:
        if name == SAME_BUDGET and config.method == "dense" or name == config.method:
            raise ConfigError(f"baselines: {name!r} is the method itself")
        phases += _method("dense" if name == SAME_BUDGET else name, config.stages)
    return tuple(phases)


def final(config: Plan) -> str:
    """The phase whose weights are the run's result."""
    return (_phases(config) or [Phase(DENSE, "dense", "", config.dense)])[-1].name


def schedule(todo: Sequence[Phase], last: str) -> dict[str, Any] | None:
    """The schedule by which ADMM reached a phase's rules, as arguments of `compressx.admm`; None where it did not.

    Left out is what is no number there: a rho that moves, and updates once an epoch.
    """
    starts = [p.start for p in todo if p.name == last]
    fit = next((p.fit for p in todo if p.name in starts and p.kind == "admm"), None)
    if not isinstance(fit, Admm):
        return None
    found: dict[str, Any] = {"refresh_every": fit.refresh_every or None}
    if fit.rho_schedule == "constant":
        found["rho"] = fit.rho
    return found | ({"every": fit.every} if fit.every else {})


def _phases(config: Plan) -> list[Phase]:
    """The phases of the config's own method."""
    if config.method != RECONSTRUCT:
        return _method(config.method, config.stages)
    last = config.stages[-1]
    return [Phase(RECONSTRUCT, "retrain", DENSE, last.retrain, build_rules(last.rules), calibration=config.calibration)]


def _method(method: str, stages: tuple[Stage, ...]) -> list[Phase]:
    if not stages:
        return []
    moving = sum(s.admm.epochs for s in stages)
    inside = sum(s.retrain.epochs for s in stages)
    last = stages[-1]
    rules = build_rules(last.rules)
    whole = dataclasses.replace(last.retrain, epochs=moving + inside)
    if method == "one_shot":
        return [Phase(ONE_SHOT, "retrain", DENSE, whole, rules)]
    if method == "dense":
        return [Phase(SAME_BUDGET, "dense", DENSE, whole)]
    if method == "gradual":
        check_scalable(last.rules)
        shrinking = dataclasses.replace(last.admm, epochs=moving)
        staying = dataclasses.replace(last.retrain, epochs=inside)
        return [
            Phase(GRADUAL, "gradual", DENSE, shrinking, rules),
            Phase(f"{GRADUAL}_retrain", "retrain", GRADUAL, staying, rules),
        ]
    phases: list[Phase] = []
    start, within = DENSE, None
    for number, stage in enumerate(stages):
        mark = f"_{number + 1}" if len(stages) > 1 else ""
        rules = build_rules(stage.rules)
        phases.append(Phase(f"admm{mark}", "admm", start, stage.admm, rules, within))
        phases.append(Phase(f"retrain{mark}", "retrain", f"admm{mark}", stage.retrain, rules))
        start, within = f"retrain{mark}", rules
    return phases


def harden(weights: Weights, rules: Rules) -> Weights:
    """The weights projected once onto their sets, with the structure they carry if they have one; checked.

    Raises:
      ValueError: NaN or infinity in a leaf.
      ConstraintViolation: a projected leaf lies outside one of its sets.
    """
    if not all_finite(weights.params):
        check_finite(weights.params)  # raises, naming the leaf

    def run(params: Any, structure: Any) -> Any:
        structure = structure or structures(params, rules)
        hard = project(params, rules, structure)
        return hard, structure, count_violations(hard, rules, structure)

    params, structure, outside = set_by_set(run)(weights.params, weights.structure)
    if any(jax.device_get(outside).values()):
        check(params, rules, structure)  # raises, naming the leaves
    return Weights(params, weights.batch_stats, structure)


def set_by_set(run: Callable[..., Any]) -> Callable[..., Any]:
    """A function of whole trees that runs the library's programs, which are kept for each set and shape.

    Jitted as a whole it would be compiled anew for every phase. Of several processes each holds a part of the arrays,
    and what stands between the programs needs one program too.
    """
    if jax.process_count() > 1:
        return jax.jit(run)
    return lambda *trees: run(*jax.tree.map(jnp.asarray, trees))


def settle(weights: Weights, rules: Rules, active: RetrainState) -> Weights:
    """Retrained weights at the nearest point of their active sets, with the levels they lie on; checked.

    Raises:
      ConstraintViolation: a leaf lies outside one of its sets.
    """

    def run(params: Any, active: RetrainState) -> Any:
        hard = retract(params, rules, active)
        return hard, count_violations(hard.params, rules, hard.structures)

    hard, outside = set_by_set(run)(weights.params, active)
    if any(jax.device_get(outside).values()):
        check(hard, rules)  # raises, naming the leaves
    return weights._replace(params=hard.params, structure=hard.structures)
