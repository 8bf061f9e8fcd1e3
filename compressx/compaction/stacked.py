"""Layers that a scan runs over: each may lose channels of its own, and all as many, as their arrays are stacked."""

import numpy as np

from compressx.compaction.channels import CompactionError, Scope
from compressx.compaction.plan import plans


def equalise(scope: Scope, live: np.ndarray) -> None:
    """Keeps some dead units, in place, so that one body serves every step of each scan in a scope.

    Units of a step are of one kind where they lie on the same axes as often (a layer's width, its heads). Of each kind
    every step keeps as many as the one that needs most. Where the steps would then still do different things (an
    operation in the body picks channels by their index) they keep the same units: those that any of them needs.

    Args:
      scope: a program with the units of its values.
      live: bool, unit -> whether it stays; changed.
    """
    for bodies in scope.inner.values():
        for body in bodies:
            equalise(body, live)
        if len(bodies) < 2:
            continue
        columns, kinds = _columns(bodies)
        wanted = live.copy()
        for kind in kinds:
            alive = wanted[columns[:, kind]]
            most = int(alive.sum(1).max())
            for step, mask in enumerate(alive):
                wanted[columns[step, kind[~mask][: most - int(mask.sum())]]] = True
        if not _one_body(bodies, wanted):
            wanted = live.copy()
            wanted[columns[:, live[columns].any(0)]] = True
        live[:] = wanted


def _one_body(bodies: tuple[Scope, ...], live: np.ndarray) -> bool:
    try:
        first, *others = [plans(body, live) for body in bodies]
    except CompactionError:
        return False
    return all(first.same(other) for other in others)


def _columns(bodies: tuple[Scope, ...]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The units that each step has of its own, `[steps, k]`, one column for what is the same unit in every step.

    Returns:
      The columns, and for each kind of unit which of them it has.
    """
    places = []  # per axis of what the body is given or computes: its units in every step
    for v in range(len(bodies[0].program.shapes)):
        for a in range(len(bodies[0].program.shapes[v])):
            units = [body.axes[v][a] for body in bodies]
            if all(x is not None for x in units):
                places.append((v in bodies[0].program.inputs, np.stack([x for x in units if x is not None])))
    if not places:
        return np.zeros((len(bodies), 0), int), []
    columns = np.unique(np.concatenate([x for _, x in places], 1), axis=1)
    columns = columns[:, (columns != columns[:1]).any(0)]
    number = {int(u): k for k, u in enumerate(columns[0])}
    counts = np.zeros((columns.shape[1], sum(given for given, _ in places)), int)
    for i, rows in enumerate(x for given, x in places if given):
        held = [number[int(u)] for u in rows[0] if int(u) in number]
        np.add.at(counts, (held, i), 1)
    alike: dict[bytes, list[int]] = {}
    for k, row in enumerate(counts):
        alike.setdefault(row.tobytes(), []).append(k)
    return columns, [np.array(ids) for ids in alike.values()]
