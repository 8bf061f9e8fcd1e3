"""Gradual magnitude pruning: densities that fall along a cubic while the network trains.

    d(t) = d_final + (1 - d_final) * (1 - t)^3,  t = update / updates in 0..1

Source: M. Zhu, S. Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017,
eq. 1 (there for the sparsity s = 1 - d).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax

from compressx import constraints
from compressx._retrain import RetrainState
from compressx.rules import Rules, resolve
from experiments.common.training.config import ConfigError, Rule

# what a spec counts, by kind: (density field, keep field) -> how many of them a leaf of that shape has
_GROUPS: dict[str, dict[tuple[str, str], Callable[[tuple[int, ...]], int] | None]] = {
    "unstructured": {("density", "keep"): math.prod},
    "filters": {("density", "keep"): lambda shape: shape[-1]},
    "columns": {("density", "keep"): lambda shape: math.prod(shape[:-1])},
    "channels": {("density", "keep"): lambda shape: shape[-2]},
    "filters_and_columns": {
        ("filter_density", "keep_filters"): lambda shape: shape[-1],
        ("column_density", "keep_columns"): lambda shape: math.prod(shape[:-1]),
    },
    "block": {("density", "keep"): None},
}


def remaining(t: float) -> float:
    """The part of the way still to go at time t in 0..1: (1 - t)^3."""
    return (1.0 - min(max(t, 0.0), 1.0)) ** 3


def check_scalable(rules: tuple[Rule, ...]) -> None:
    """Raises ConfigError for a constraint whose density cannot fall gradually."""
    for pattern, spec in rules:
        if spec is not None and spec.get("kind") not in _GROUPS:
            raise ConfigError(f"rule {pattern!r}: gradual pruning lowers densities, and {spec.get('kind')!r} has none")
        if spec is not None and spec.get("scope") == "rule" and spec.get("keep") is not None:
            raise ConfigError(f"rule {pattern!r}: gradual pruning over several leaves needs a density, not keep")


def loosen(spec: Mapping[str, Any], shape: tuple[int, ...], t: float) -> dict[str, Any]:
    """The spec at time t: its densities at d(t), its counts likewise and rounded up.

    Args:
      spec: a constraint's spec with a density or a count.
      shape: the leaf's shape (of any leaf of the rule, for densities).
      t: 0 (everything stays) to 1 (the spec itself).
    """
    out = dict(spec)
    far = remaining(t)
    for (density, keep), total in _GROUPS[spec["kind"]].items():
        if spec.get(density) is not None:
            out[density] = spec[density] + (1.0 - spec[density]) * far
        elif spec.get(keep) is not None:
            n = _blocks(spec, shape) if total is None else total(shape)
            out[keep] = spec[keep] + math.ceil((n - spec[keep]) * far)
    return out


def _blocks(spec: Mapping[str, Any], shape: tuple[int, ...]) -> int:
    bh, bw = spec["block"]
    return math.ceil(math.prod(shape[:-1]) / bh) * math.ceil(shape[-1] / bw)


def prune(params: Any, rules: Rules, t: float) -> tuple[Any, dict[str, Any]]:
    """The weights at time t: projected onto the loosened sets.

    Returns:
      The weights, and by name the active sets (masks) in which they may move until the next step, as in `RetrainState`.
    """

    @jax.jit
    def run(params: Any) -> tuple[Any, dict[str, Any]]:
        leaves, treedef = jax.tree.flatten(params)
        active = {}
        for b in resolve(rules, params):
            loose = constraints.from_spec(loosen(b.constraint.spec, leaves[b.indices[0]].shape, t))
            w = b.take(leaves)
            structure = loose.init(w)
            z = loose.project(w, structure)
            active[b.name] = loose.freeze(z, structure)
            b.put(leaves, z)
        return jax.tree.unflatten(treedef, leaves), active

    pruned: tuple[Any, dict[str, Any]] = run(params)
    return pruned


def with_active(opt_state: Any, active: dict[str, Any]) -> Any:
    """The optimizer state with the active sets of its `RetrainState` replaced."""
    return jax.tree.map(
        lambda s: s._replace(active=active) if isinstance(s, RetrainState) else s,
        opt_state,
        is_leaf=lambda s: isinstance(s, RetrainState),
    )
