"""A whole network's convolutions together: which channels exist, and which positions of each kernel are used."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, ops

from compressx.constraints.base import Constraint, check_choice, factory, support
from compressx.constraints.coupled import expand, indices
from compressx.constraints.floats import nonzero
from compressx.constraints.select import energies, squares, top_k_mask
from compressx.constraints.spec import brief, fits

_NUMBERS = ("makes", "reads", "columns")
SELECTIONS = ("energy", "random")
GROUPS_A_MEMBER = 16  # each group is ranked apart


@factory
def network_structure(
    members: Sequence[Mapping[str, Any]],
    groups: Sequence[Sequence[int]],
    *,
    selection: str = "energy",
    seed: int = 0,
) -> Constraint:
    """At most k_g channels in every group g, and at most p_l positions in every kernel l: smaller dense matrices.

        channels    the k_g of each group with the largest energy, summed over all weights that make them
        zeros       a weight that makes or reads a channel that is out (its filters, normalisation, input channels)
        positions   of what is left of each kernel, the p_l positions (i, j, c) of largest energy; where they are at
                    least as many as the channels that it reads, the best position of each of these comes first

    So the non-zeros of a kernel are exactly the matrix that compaction leaves. Each of the two selections is nearest
    given what came before it; together they are not the projection, which is a combinatorial problem: what a channel's
    readers lose is not weighed when channels are chosen.

    The rule that holds it takes all weights of the network, in tree order (a joint constraint);
    `compaction.structure_rules` makes both from a network.

    Args:
      members: per leaf a mapping with the keys `makes` (the axis whose indices are channels it makes, or None) and
        `makes_units` (their numbers as runs `[first, length]`, -1 outside any group), `reads` and `reads_units`
        likewise, and `columns`, how many positions (all axes but the last) are kept, or None for all.
      groups: per group `[first number, size, how many stay]`; together they hold every number once.
      selection: "energy", or "random": the same numbers of channels and positions, drawn by `seed`, a control.
      seed: of the draws.

    Raises:
      ValueError: the amounts or the numbers are impossible; on use, the leaves do not fit the members.

    Source: sets of H. Li et al., "Deep Compressed Pneumonia Detection for Low-Power Embedded Devices", 2019 (filter,
    column, combined); the coupling of channels is ours.

    Example:
      >>> first, second = jnp.ones((2, 3)).at[:, 1].set(5.0), jnp.ones((3, 2))  # 3 channels, made and read
      >>> made = {"makes": 1, "makes_units": [[0, 3]], "reads": None, "reads_units": None, "columns": None}
      >>> read = {"makes": None, "makes_units": None, "reads": 0, "reads_units": [[0, 3]], "columns": None}
      >>> constraint = compressx.network_structure([made, read], [[0, 3, 1]])
      >>> z = constraint.project((first, second), constraint.init((first, second)))
      >>> jnp.any(z[0] != 0, axis=0).tolist(), jnp.any(z[1] != 0, axis=1).tolist()
      ([False, True, False], [False, True, False])
    """
    check_choice("selection", selection, SELECTIONS)
    plain = [_member(m, i) for i, m in enumerate(members)]
    ends = [[int(v) for v in g] for g in groups]
    edge = 0
    for first, size, keep in ends:
        if first != edge or not 1 <= keep <= size:
            raise ValueError(f"group [{first}, {size}, {keep}] must start at {edge} and keep 1..{size} channels")
        edge += size
    total = edge
    given = [[m[f"{k}_units"] for k in ("makes", "reads") if m[k] is not None] for m in plain]
    lengths = [{k: None if m[k] is None else indices(m[f"{k}_units"]) for k in ("makes", "reads")} for m in plain]
    if any(first + n > total for each in given for runs in each for first, n in runs if first >= 0):
        raise ValueError(f"a member names a channel beyond the {total} of the groups")
    pairs = list(zip(plain, lengths, strict=True))
    if total > sum(n or 0 for each in lengths for n in each.values()) or len(ends) > GROUPS_A_MEMBER * len(plain):
        raise ValueError(f"{len(ends)} groups of {total} channels are more than {len(plain)} members can make and read")

    def check(leaves: tuple[Array, ...]) -> None:
        if len(leaves) != len(plain):
            raise ValueError(f"the structure has {len(plain)} members and the rule takes {len(leaves)} leaves")
        for w, m, each in zip(leaves, plain, lengths, strict=True):
            for role, n in each.items():
                if n is not None and (not 0 <= m[role] < w.ndim or w.shape[m[role]] != n):
                    raise ValueError(f"a member that {role} {n} channels on axis {m[role]} is not {w.shape}")
            if m["columns"] is not None and not 1 <= m["columns"] <= w.size // w.shape[-1]:
                raise ValueError(f"columns={m['columns']} is impossible for shape {w.shape}")

    # What has the size of runs is made when `check` has found them as long as the leaves, not before.
    @cache
    def units() -> list[dict[str, np.ndarray | None]]:
        return [{k: None if n is None else expand(m[f"{k}_units"]) for k, n in each.items()} for m, each in pairs]

    # Sums and masks of all leaves in one scatter and one gather: hundreds of small ones take long to compile.
    @cache
    def made() -> np.ndarray:
        return _joined([each["makes"] for each in units()])

    @cache
    def touched() -> np.ndarray:
        return _joined([ids for each in units() for ids in each.values()])

    def energy(leaves: tuple[Array, ...]) -> Array:
        check(leaves)
        makers = [(w, m["makes"]) for w, m in zip(leaves, plain, strict=True) if m["makes"] is not None]
        parts = [jnp.zeros(0, jnp.float32)]
        for e, (w, makes) in zip(energies([w for w, _ in makers]) if makers else [], makers, strict=True):
            parts.append(jnp.sum(e, tuple(a for a in range(w.ndim) if a != makes)).astype(jnp.float32))
        where = np.where(made() < 0, total, made())  # the last one collects what is in no group
        return ops.segment_sum(jnp.concatenate(parts), where, total + 1)[:total]

    def lines(chosen: Array, leaves: tuple[Array, ...]) -> list[Array]:
        """Per leaf the mask of what neither makes nor reads a channel that is out."""
        along = jnp.concatenate([chosen, jnp.ones(1, bool)])[np.where(touched() < 0, total, touched())]
        masks, start = [], 0
        for w, m, each in zip(leaves, plain, units(), strict=True):
            mask = jnp.ones(w.shape, bool)
            for role, ids in each.items():
                if ids is not None:
                    mine = along[start : start + ids.size]
                    mask = mask & jnp.expand_dims(mine, [a for a in range(w.ndim) if a != m[role]])
                    start += ids.size
            masks.append(mask)
        return masks

    @cache
    def kept_of() -> np.ndarray:
        return np.repeat([keep / size for _, size, keep in ends] or [0.0], [size for _, size, _ in ends] or [0])

    def inputs(i: int, w: Array) -> int:
        """How many input channels of a kernel stay, where it reads whole groups."""
        ids = units()[i]["reads"]
        return w.shape[-2] if ids is None else round(kept_of()[ids[ids >= 0]].sum()) + int((ids < 0).sum())

    def by_position(leaves: tuple[Array, ...], masks: list[Array]) -> list[Array]:
        """The masks with only the best positions of each kernel, all kernels ranked side by side."""
        chosen = [i for i, w in enumerate(leaves) if _fewer(plain[i]["columns"], w)]
        if not chosen:
            return masks
        scores = []
        for i in chosen:
            w, mask = leaves[i], masks[i]
            if selection == "random":
                drawn = np.random.default_rng([seed, 1, i]).permutation(w.size // w.shape[-1]).astype(np.float32)
                e = jnp.where(mask.any(-1), drawn.reshape(w.shape[:-1]) + 1.0, 0.0)
            else:
                e = squares(jnp.where(mask, w, jnp.zeros((), w.dtype)), -1).astype(jnp.float32)
            flat = e.reshape(-1, w.shape[-2])
            if plain[i]["columns"] >= inputs(i, w):
                first = jnp.arange(flat.shape[0])[:, None] == jnp.argmax(flat, 0)[None]
                flat = jnp.where(first & (flat > 0), jnp.finfo(jnp.float32).max, flat)
            scores.append(flat.ravel())
        kept = _side_by_side(scores, [plain[i]["columns"] for i in chosen])
        for i, k in zip(chosen, kept, strict=True):
            masks[i] = masks[i] & k.reshape(*leaves[i].shape[:-1], 1)
        return masks

    def select(leaves: tuple[Array, ...]) -> tuple[Array, ...]:
        if selection == "random":
            check(leaves)
            scores = jnp.asarray(np.random.default_rng([seed, 0]).permutation(total).astype(np.float32)) + 1.0
        else:
            scores = energy(leaves)
        chosen = _side_by_side([scores[first : first + size] for first, size, _ in ends], [k for _, _, k in ends])
        return tuple(by_position(leaves, lines(jnp.concatenate(chosen), leaves)))

    def alive(leaves: tuple[Array, ...]) -> tuple[Array, ...]:
        masks = lines(energy(leaves) > 0, leaves)
        return tuple(
            mask if m["columns"] is None else mask & jnp.any(nonzero(w), axis=-1, keepdims=True)
            for w, m, mask in zip(leaves, plain, masks, strict=True)
        )

    return support(select, alive, joint=True)


def _joined(ids: Sequence[np.ndarray | None]) -> np.ndarray:
    return np.concatenate([i for i in ids if i is not None] or [np.zeros(0, int)])


def _fewer(columns: int | None, w: Array) -> bool:
    return columns is not None and columns < w.size // w.shape[-1]


def _side_by_side(scores: Sequence[Array], keep: Sequence[int]) -> list[Array]:
    """The mask of the largest `keep` of each vector; one search over all of them, for each of its own compiles."""
    longest = max(s.size for s in scores)
    rows = jnp.stack([jnp.pad(s, (0, longest - s.size)) for s in scores])  # what fills up is last among equals
    masks = top_k_mask(rows, jnp.asarray(keep, jnp.int32)[:, None], axis=1)
    return [m[: s.size] for m, s in zip(masks, scores, strict=True)]


def _member(given: Mapping[str, Any], number: int) -> dict[str, Any]:
    keys = {*_NUMBERS, "makes_units", "reads_units"}
    if set(given) != keys:
        raise ValueError(f"member {number} has the keys {', '.join(sorted(given))}; expected {', '.join(sorted(keys))}")
    for key, value in given.items():
        kind = int | None if key in _NUMBERS else Sequence[Sequence[int]] | None
        if not fits(value, kind):
            raise ValueError(f"member {number}: {key}={brief(value)} is not of the type {kind}")
    out: dict[str, Any] = {k: None if given[k] is None else int(given[k]) for k in _NUMBERS}
    for role in ("makes", "reads"):
        runs = given[f"{role}_units"]
        if (out[role] is None) != (runs is None):
            raise ValueError(f"member {number} needs both or neither of {role} and {role}_units")
        out[f"{role}_units"] = None if runs is None else [[int(first), int(n)] for first, n in runs]
    return out
