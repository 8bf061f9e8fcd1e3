"""The dense network of another run as the start of this one: `init_from`, in every driver that has it."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.common import driver, training
from experiments.common.training import ConfigError, Fit, Phase, Plan, phases


def plan_phases(plan: Plan, init_from: str) -> tuple[Phase, ...]:
    """The phases of a plan; nothing is left to train in the dense one where another run gives its weights."""
    if init_from:
        plan = dataclasses.replace(plan, dense=dataclasses.replace(plan.dense, epochs=0))
    return phases.plan(plan)


def take_dense(
    job: training.Job,
    workdir: Path,
    init_from: str,
    config: Mapping[str, Any],
    sections: Sequence[str] = ("data", "model"),
    free: Sequence[str] = (),
) -> training.Job:
    """The job with another run's dense weights in place of the first ones; the run keeps a copy of its own.

    Args:
      job: as it would train from nothing.
      workdir: of this run.
      init_from: work directory of the other run.
      config: this run's, as nested dicts.
      sections: parts of the config in which the two runs must agree.
      free: settings in them that may differ.

    Raises:
      ConfigError: the other is no run, or of another network, or has not finished its dense phase.
      CheckpointError: its weights are damaged.
    """
    own, other = training.Checkpoints(workdir / "checkpoints"), Path(init_from)
    template = training.like(job.first, Phase(phases.DENSE, "dense", "", Fit()), job.placement)
    if own.has_weights(phases.DENSE):
        return dataclasses.replace(job, first=own.load_weights(phases.DENSE, template))
    try:
        theirs = json.loads((other / "config.json").read_text())
        theirs = {k: driver.flatten(theirs.get(k)) for k in sections}
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"init_from={init_from!r} is not a run: {error}") from None
    plain = json.loads(json.dumps(config))
    mine = {k: driver.flatten(plain.get(k)) for k in sections}
    differ = [
        f"{k}.{n}".rstrip(".")
        for k in sections
        for n in sorted(theirs[k] | mine[k])
        if theirs[k].get(n) != mine[k].get(n) and n not in free
    ]
    if differ:
        raise ConfigError(f"init_from={init_from!r} is a run with another {', '.join(differ)}")
    source = training.Checkpoints(other / "checkpoints")
    if not source.has_weights(phases.DENSE):
        raise ConfigError(f"init_from={init_from!r} has not finished its dense phase")
    return dataclasses.replace(job, first=source.load_weights(phases.DENSE, template))
