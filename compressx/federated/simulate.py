"""The simulation: whole rounds of all clients in one jitted program, with the bytes that the messages would have.

A scan over rounds, in it a scan over the round's clients in groups of `width` that are vmapped (1 is fastest on a CPU,
where convolutions of many kernels together are slow; a GPU takes as many as fit). Averages are float32 sums in the
clients' order, where the aggregator sums in float64: see `docs/federated.md` for how far the two engines differ.

Bytes are exact: they are counted from the same masks that would be sent, code by code, with the same choice of the
smallest.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import Array, lax

from compressx.federated import algorithm
from compressx.federated.algorithm import MASKED, Algorithm, Loss
from compressx.federated.trusted import messages
from compressx.federated.trusted.messages import BITMAP, DELTA, Layer

NpArray = npt.NDArray[Any]


class SimState(NamedTuple):
    """All that changes.

    Attributes:
      leaves: the model's leaves, float32.
      masks: as in `trusted.rounds.State`, shaped as the leaves.
      memory: of every client with error feedback, `[clients, ...]` for each leaf with a budget; else ().
      knows_masks: bool `[clients]`, who holds the common masks.

    Example:
      >>> from compressx.federated.simulate import SimState
      >>> state = SimState(leaves=(jnp.ones(3),), masks=(None,), memory=(), knows_masks=np.zeros(2, bool))
      >>> state.knows_masks.tolist()  # nobody holds the common masks yet
      [False, False]
    """

    leaves: tuple[Array, ...]
    masks: tuple[Array | None, ...]
    memory: tuple[Array, ...]
    knows_masks: NpArray


class Ledger(NamedTuple):
    """What rounds gave.

    Attributes:
      down: int64 `[rounds, participants]`, bytes of the message that carries the model.
      up: likewise, of the client's.
      loss: float32 `[rounds]`, mean training loss.
      residual: float32 `[rounds]`, ||W - P(W)|| / ||W|| of the averaged model over the layers with budgets.
      density: float32 `[rounds, 2]`, non-zeros of the averaged model over its weights with budgets, before and after
        pruning.

    Example:
      >>> from compressx.federated.simulate import Ledger
      >>> one = np.zeros(1, np.float32)
      >>> ledger = Ledger(np.array([[64, 64]]), np.array([[16, 16]]), one, one, np.ones((1, 2), np.float32))
      >>> int(ledger.down.sum() + ledger.up.sum())  # bytes of the round, both ways
      160
    """

    down: NpArray
    up: NpArray
    loss: NpArray
    residual: NpArray
    density: NpArray


def delta_bytes(mask: Array) -> Array:
    """Bytes of a mask's positions in the DELTA code (int32).

    Args:
      mask: bool, any shape.

    Returns:
      int32 `[]`: 1 byte a position, 2 to 4 where the gap to the one before is 128, 2^14 or 2^21 and more.

    Source: the code is LEB128, of differences; DWARF debugging format, version 5, section 7.6.

    Example:
      >>> from compressx.federated.simulate import delta_bytes
      >>> mask = np.zeros(300, bool)
      >>> mask[[0, 5, 299]] = True
      >>> int(delta_bytes(jnp.asarray(mask)))  # gaps of 1, 5 and 294
      4
    """
    flat = mask.reshape(-1)
    index = jnp.arange(flat.size, dtype=jnp.int32)
    last = lax.cummax(jnp.where(flat, index, -1))
    before = jnp.concatenate([jnp.full((1,), -1, jnp.int32), last[:-1]])
    gap = index - before
    each = 1 + sum((gap >= 1 << bits).astype(jnp.int32) for bits in (7, 14, 21))
    return jnp.sum(jnp.where(flat, each, 0))


def _positions(masks: Sequence[Array | None]) -> Array:
    found = [delta_bytes(m) for m in masks if m is not None]
    return jnp.stack(found) if found else jnp.zeros((0,), jnp.int32)


def message_bytes(
    layers: Sequence[Layer],
    values: int,
    positions: Sequence[int] | NpArray | None,
    *,
    shared: bool = False,
    padded: bool = False,
    oblivious: bool = False,
    dense_allowed: bool = True,
) -> int:
    """Exact size of a message.

    Args:
      layers: budgets are the numbers of values sent.
      values: their type.
      positions: DELTA bytes of each layer with a budget below its size; None where nothing is sparse.
      shared: positions are not sent.
      padded: filled up.
      oblivious: DELTA is not allowed.
      dense_allowed: DENSE is, for layers with a budget.

    Returns:
      Bytes, header included, encryption not.

    Example:
      >>> from compressx.federated.simulate import message_bytes
      >>> from compressx.federated.trusted.messages import FLOAT32, Layer
      >>> dense = message_bytes([Layer("w", 1000, 1000)], FLOAT32, None)
      >>> sparse = message_bytes([Layer("w", 1000, 100)], FLOAT32, [100])  # 100 positions of a byte each
      >>> dense - sparse
      3500
    """
    if positions is None:
        layers = [layer._replace(budget=layer.size) for layer in layers]
    if padded:
        return messages.padded_bytes(layers, values, shared)
    total, k = messages.overhead(layers, values), 0
    for layer in layers:
        if layer.budget == layer.size:
            total += messages.body_bytes(messages.DENSE, layer, layer.size, 0, values)
            continue
        codes = [messages.SHARED] if shared else [BITMAP, *([] if oblivious else [DELTA])]
        codes += [messages.DENSE] if dense_allowed and not shared else []
        assert positions is not None
        total += min(messages.body_bytes(c, layer, layer.budget, int(positions[k]), values) for c in codes)
        k += 1
    return total


class Simulation:
    """Many clients in one program.

    Args:
      loss: as `algorithm.make_local` takes it.
      alg: the algorithm.
      model: the first model, `{"params": ..., other collections}`.
      data: arrays with a common leading axis.
      split: every client's rows of `data`.
      seed: of everything drawn.
      width: clients that are vmapped together; must divide the participants.
      padded: messages are padded.
      oblivious: no DELTA code upwards.

    Raises:
      ValueError: the width does not divide the participants, or what `algorithm.layout` refuses.

    Example:
      >>> from compressx.federated.simulate import Simulation
      >>> from compressx.federated.algorithm import Algorithm
      >>> loss = lambda params, state, batch, key: (jnp.sum((params["params"]["w"] - batch["x"][0]) ** 2), state)
      >>> alg, data = Algorithm(rounds=1, batch=1, momentum=0.0, lr=0.25), {"x": np.array([[1.0], [3.0]], np.float32)}
      >>> run = Simulation(loss, alg, {"params": {"w": jnp.zeros(1)}}, data, [np.array([0]), np.array([1])], seed=0)
      >>> state, ledger = run.run(run.start(), first=0, number=1)
      >>> run.model(state)["params"]["w"].tolist(), ledger.up.shape  # half way to the mean, 2
      ([1.0], (1, 2))
    """

    def __init__(
        self,
        loss: Loss,
        alg: Algorithm,
        model: Any,
        data: dict[str, Any],
        split: Sequence[NpArray],
        seed: int,
        width: int = 1,
        padded: bool = False,
        oblivious: bool = False,
    ) -> None:
        self.loss, self.alg, self.split, self.seed, self.width = loss, alg, list(split), seed, width
        self.padded, self.oblivious = padded, oblivious
        self.layers = algorithm.layout(alg, model)
        leaves, self.treedef = jax.tree.flatten(model)
        self.shapes = [x.shape for x in leaves]
        self.data = {k: jnp.asarray(v) for k, v in data.items()}
        self.sizes = np.array([len(part) for part in split])
        active = alg.participants or len(split)
        if active % width:
            raise ValueError(f"width={width} does not divide the {active} participants of a round")
        self._programs: dict[str, Callable[..., Any]] = {}
        self._first = tuple(jnp.asarray(x, jnp.float32) for x in leaves)

    def start(self) -> SimState:
        """Round 0."""
        none = (None,) * len(self.layers)
        clients = len(self.split)
        memory = tuple(jnp.zeros((clients, *m.shape)) for m in algorithm.no_memory(self.alg, self.layers, self._first))
        return SimState(self._first, none, memory, np.zeros(clients, bool))

    def model(self, state: SimState) -> Any:
        """The model as a tree."""
        return jax.tree.unflatten(self.treedef, state.leaves)

    def run(self, state: SimState, first: int, number: int) -> tuple[SimState, Ledger]:
        """Rounds `first` to `first + number - 1`; the first pruned round begins with `prune`."""
        parts = []
        while number:
            kind = self.alg.kind(first)
            if first == self.alg.prune_round:
                state = self.prune(state)
            here = next((n for n in range(1, number) if self.alg.kind(first + n) != kind), number)
            state, ledger = self._same_kind(state, first, here, kind)
            first, number = first + here, number - here
            parts.append(ledger)
        return state, Ledger(*(np.concatenate(x) for x in zip(*parts, strict=True)))

    def _same_kind(self, state: SimState, first: int, number: int, kind: str) -> tuple[SimState, Ledger]:
        alg, span = self.alg, range(first, first + number)
        ids = np.stack([algorithm.participants(self.seed, alg, len(self.split), r) for r in span])
        longest = max(algorithm.local_steps(alg, int(n)) for n in self.sizes)
        rows = np.zeros((*ids.shape, longest, alg.batch), np.int32)
        for i, r in enumerate(span):
            for j, c in enumerate(ids[i]):
                mine = algorithm.local_rows(self.seed, alg, r, int(c), int(self.sizes[c]))
                rows[i, j, : len(mine)] = self.split[c][mine]
        steps = np.array([algorithm.local_steps(alg, int(n)) for n in self.sizes], np.int32)[ids]
        sizes = self.sizes[ids].astype(np.float64)
        weights = (sizes / sizes.sum(1, keepdims=True)).astype(np.float32)
        rates = np.array([alg.rates(r) for r in span], np.float32)
        xs = (ids.astype(np.int32), rows, steps, weights, rates[:, 0], rates[:, 1], np.arange(first, first + number))
        if kind not in self._programs:
            self._programs[kind] = jax.jit(self._make(kind))
        knows = state.knows_masks.copy()
        carry = (state.leaves, state.masks, state.memory)
        begun = jax.device_get(_positions_jit(state.masks)) if kind == MASKED else None
        (leaves, masks, memory), ys = self._programs[kind](carry, self.data, xs)
        loss, residual, density, up, down = jax.device_get(ys)
        ledger = self._count(kind, ids, knows, up, down, begun, loss, residual, density)
        state = SimState(leaves, masks, memory, knows)
        return state, ledger

    @property
    def _budgeted(self) -> int:
        return max(1, sum(layer.size for layer in self.layers if layer.budget < layer.size))

    def prune(self, state: SimState) -> SimState:
        """Every layer within its budget, where the algorithm makes the model sparse; pruning twice changes nothing."""
        if not self.alg.pruning:
            return state
        masks = algorithm.top_masks(state.leaves, self.layers)
        return state._replace(leaves=algorithm.masked(state.leaves, masks), masks=masks)

    def _make(self, kind: str) -> Callable[..., Any]:
        alg, layers, width = self.alg, self.layers, self.width
        local = algorithm.make_local(self.loss, alg, layers, self.treedef, kind)
        own = alg.sparsify == "client" and kind == MASKED
        sparse_up = own or alg.sparsify == "update"

        def round_(carry: Any, x: Any, data: Any) -> Any:
            leaves, masks, memory = carry
            ids, rows, steps, weights, lr, rho, number = x
            sent = algorithm.arrive(leaves, layers, alg.value_type)

            def client(c: Array, rows: Array, steps: Array) -> Any:
                mine = tuple(m[c] for m in memory)
                key = algorithm.round_key(self.seed, number, c)
                up = local(sent, masks, mine, data, rows, steps, lr, rho, key)
                return up.leaves, up.memory, up.loss, _positions(up.masks) if sparse_up else jnp.zeros((0,), jnp.int32)

            def group(total: Any, x: Any) -> Any:
                c, r, s, w = x
                if width == 1:
                    got = jax.tree.map(lambda v: v[None], client(c[0], r[0], s[0]))
                else:
                    got = jax.vmap(client)(c, r, s)
                parts, kept, loss, where = got
                for k in range(width):
                    total = tuple(t + w[k] * p[k] for t, p in zip(total, parts, strict=True))
                return total, (kept, loss, where)

            grouped = jax.tree.map(lambda v: v.reshape(-1, width, *v.shape[1:]), (ids, rows, steps, weights))
            zero = tuple(jnp.zeros_like(w) for w in leaves)
            total, (kept, losses, where) = lax.scan(group, zero, grouped)
            memory = tuple(m.at[ids].set(k.reshape(-1, *k.shape[2:])) for m, k in zip(memory, kept, strict=True))
            mean = total if own else tuple(a + b for a, b in zip(leaves, total, strict=True))
            chosen = algorithm.top_masks(mean, layers)
            inside = [x if m is None else x - jnp.where(m, x, 0.0) for x, m in zip(mean, chosen, strict=True)]
            limited = [k for k, m in enumerate(chosen) if m is not None]
            off = sum((jnp.sum(jnp.square(inside[k])) for k in limited), jnp.zeros(()))
            all_ = sum((jnp.sum(jnp.square(mean[k])) for k in limited), jnp.zeros(()))
            residual = jnp.sqrt(off / jnp.maximum(all_, 1e-30))
            before = _non_zeros(mean, limited) / self._budgeted
            if own:
                mean, masks = algorithm.masked(mean, chosen), chosen
            after = _non_zeros(mean, limited) / self._budgeted
            down = _positions(masks) if own else jnp.zeros((0,), jnp.int32)
            mean_loss = jnp.sum(losses.reshape(-1) * weights)
            ys = (mean_loss, residual, jnp.stack([before, after]), where.reshape(len(steps), -1), down)
            return (mean, masks, memory), ys

        def program(carry: Any, data: Any, xs: Any) -> Any:
            return lax.scan(lambda c, x: round_(c, x, data), carry, xs)

        return program

    def _count(
        self,
        kind: str,
        ids: NpArray,
        knows: NpArray,
        up: NpArray,
        down: NpArray,
        begun: NpArray | None,
        loss: NpArray,
        residual: NpArray,
        density: NpArray,
    ) -> Ledger:
        """Message sizes from positions; marks who learns the common masks."""
        alg, layers, values = self.alg, self.layers, messages.VALUES.index(self.alg.value_type)
        own, common = alg.sparsify == "client" and kind == MASKED, alg.sparsify == "common" and kind == MASKED
        sizes = np.zeros((2, *ids.shape), np.int64)
        for i, row in enumerate(ids):
            model_at = begun if i == 0 or common else down[i - 1]
            for j, c in enumerate(row):
                if kind == MASKED:
                    shared = bool(common and knows[c])
                    sizes[0, i, j] = message_bytes(
                        layers, values, model_at, shared=shared, padded=self.padded, dense_allowed=False
                    )
                else:
                    sizes[0, i, j] = message_bytes(layers, values, None, padded=self.padded)
                if common:
                    sizes[1, i, j] = message_bytes(layers, values, [0] * len(layers), shared=True, padded=self.padded)
                else:
                    where = up[i, j] if own or alg.sparsify == "update" else None
                    sizes[1, i, j] = message_bytes(layers, values, where, padded=self.padded, oblivious=self.oblivious)
            if common:
                knows[row] = True
        return Ledger(sizes[0], sizes[1], np.asarray(loss), np.asarray(residual), np.array(density))


def _non_zeros(leaves: Sequence[Array], which: Sequence[int]) -> Array:
    counts = [jnp.count_nonzero(leaves[k]).astype(jnp.float32) for k in which]
    return sum(counts, jnp.zeros((), jnp.float32))


_positions_jit = jax.jit(_positions)


def with_sparsity(alg: Algorithm, **changes: Any) -> Algorithm:
    """The algorithm with other settings: how a run makes its baselines.

    Args:
      alg: of the run.
      changes: fields of `Algorithm`.

    Returns:
      A new `Algorithm`.

    Example:
      >>> from compressx.federated.algorithm import Algorithm
      >>> from compressx.federated.simulate import with_sparsity
      >>> with_sparsity(Algorithm(), sparsify="update", density=((".*kernel", 0.1),)).pruning  # only updates are sparse
      False
    """
    return dataclasses.replace(alg, **changes)
