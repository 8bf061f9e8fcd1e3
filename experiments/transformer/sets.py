"""Heads and MLP units as sets: a rule of the config that stands for what is coupled in the traced network."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from compressx import compaction
from compressx.compaction import Group
from compressx.tree import paths
from experiments.common.models.functional import Functional
from experiments.common.training import ConfigError, Plan, Stage

# The kind of a spec {"kind": COUPLED, "heads": share to keep, "units": share to keep}; its pattern is not read.
COUPLED = "heads_and_units"
MAKERS = {"heads": "attention/query/kernel", "units": "mlp/up/kernel"}


def resolved(plan: Plan, net: Functional, example: jax.ShapeDtypeStruct) -> Plan:
    """The plan with the sets of the network's own groups in place of every rule of kind `COUPLED`.

    Raises:
      ConfigError: a share is not in (0, 1], or the network has no such groups.
    """
    wanted = [spec for s in plan.stages for _, spec in s.rules if _is_coupled(spec)]
    if not wanted:
        return plan
    found = compaction.groups(compaction.channels(net.apply, net.like(), example))

    def rules(stage: Stage) -> Stage:
        made: list[tuple[str, Any]] = []
        for pattern, spec in stage.rules:
            made += _coupled(spec, found) if _is_coupled(spec) else [(pattern, spec)]
        return dataclasses.replace(stage, rules=tuple(made))

    return dataclasses.replace(plan, stages=tuple(map(rules, plan.stages)))


def is_coupled(plan: Plan) -> bool:
    """Whether the plan's last stage takes heads or units away."""
    return bool(plan.stages) and any(_is_coupled(spec) for _, spec in plan.stages[-1].rules)


def _is_coupled(spec: Any) -> bool:
    return isinstance(spec, Mapping) and spec.get("kind") == COUPLED


def _coupled(spec: Mapping[str, Any], found: Sequence[Group]) -> list[tuple[str, Any]]:
    if odd := sorted(set(spec) - {"kind", *MAKERS}):
        raise ConfigError(f"a rule of kind {COUPLED!r} has no setting {odd[0]!r}; it has {' and '.join(MAKERS)}")
    shares: dict[int, float] = {}
    for name, end in MAKERS.items():
        share = float(spec.get(name, 1.0))
        if not 0 < share <= 1:
            raise ConfigError(f"rule {COUPLED!r}: {name}={share} is impossible; it must be in (0, 1]")
        mine = [i for i, g in enumerate(found) if any(s.role == "out" and s.path.endswith(end) for s in g.slots)]
        if not mine:
            raise ConfigError(f"rule {COUPLED!r}: the network has no {name} that go together")
        shares |= dict.fromkeys(mine if share < 1 else [], share)
    if not shares:
        raise ConfigError(f"rule {COUPLED!r}: {' and '.join(MAKERS)} are both kept whole")
    return [(pattern, dict(c.spec)) for pattern, c in compaction.coupled_rules(found, shares, vectors=True)]


def kept(params: Any, heads: int) -> dict[str, list[int]]:
    """How many heads and units of each layer are left: those with a weight other than 0.

    Args:
      params: of the network, hardened.
      heads: of a layer.
    """
    left: dict[str, list[int]] = {name: [] for name in MAKERS}
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        for name, end in MAKERS.items():
            if re.fullmatch(f".*{end}", path):
                parts = leaf.reshape(leaf.shape[0], heads if name == "heads" else leaf.shape[1], -1)
                left[name].append(int((parts != 0).any((0, 2)).sum()))
    return left
