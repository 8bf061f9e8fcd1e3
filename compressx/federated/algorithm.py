"""The algorithm, once: what a client does in a round, and which kind of round it is. Both engines run these functions.

    DENSE    SGD on the client's examples; the change of the model is sent
    ADMM     the same, with ADMM's penalty towards `budget` non-zeros a layer
    MASKED   within the mask: the common one, or (client) after ADMM the client's own, which it retrains in

A client's examples of a round, its keys and the participants are functions of (seed, round, client), so the simulation
and a client process on another machine see the same numbers. With `update` a client keeps what it did not send and
adds it to the next update (error feedback).

Sources: S. Lin et al., "ESMFL: Efficient and Secure Models for Federated Learning", 2020 (the system; its exact
schedule is not published); H. B. McMahan et al., 2017 (FedAvg); T. Li et al., "Federated Optimization in Heterogeneous
Networks", 2020 (`mu`); S. U. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", 2018 (error feedback).
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import optax
from jax import Array, lax

from compressx._admm import admm
from compressx.constraints import Constraint, count, factory, support, top_k_mask, unstructured
from compressx.federated.trusted import messages, rounds
from compressx.federated.trusted.messages import Layer
from compressx.tree import paths

NpArray = npt.NDArray[Any]
DENSE, ADMM, MASKED = "dense", "admm", "masked"


@dataclass(frozen=True)
class Algorithm:
    """What clients and server do.

    Attributes:
      rounds: how many.
      participants: clients a round, drawn at random; 0 is all.
      local_epochs: passes of a client over its examples in a round; may be a fraction.
      batch: examples a step; a client with fewer repeats them.
      lr: of SGD in the first round.
      lr_final: factor of the last round's, cosine between.
      momentum: of SGD, from zero in every round.
      mu: FedProx's penalty towards the round's model; 0 is FedAvg.
      sparsify: "none", "update" (top-k with error feedback), "common" (one mask), "client" (each client's own).
      density: pairs (path pattern, share of weights kept) of the layers that are made sparse; first match wins.
      prune_round: first round of the pruned model, for "common" and "client".
      admm_rounds: rounds with ADMM's penalty before `prune_round`.
      rho: ADMM's penalty in its first round; a step moves a weight by lr * rho of its distance, momentum apart.
      rho_final: in its last; geometric between.
      every: local steps between Z and U updates.
      value_type: "float32", "float16" or "int8" on the wire; running statistics are always float32.

    Raises:
      ValueError: a setting is impossible, or settings exclude each other; the message names it.

    Source: S. Lin et al., "ESMFL: Efficient and Secure Models for Federated Learning", 2020 (sparse models and an
    enclave; its exact schedule is not published); H. B. McMahan et al., 2017 (FedAvg); T. Li et al., 2020 (`mu`).

    Example:
      >>> from compressx.federated.algorithm import Algorithm
      >>> alg = Algorithm(rounds=10, sparsify="common", density=((".*kernel", 0.1),), prune_round=6, admm_rounds=4)
      >>> [alg.kind(round_) for round_ in (0, 3, 6)]
      ['dense', 'admm', 'masked']
    """

    rounds: int = 20
    participants: int = 0
    local_epochs: float = 1.0
    batch: int = 32
    lr: float = 0.05
    lr_final: float = 0.1
    momentum: float = 0.9
    mu: float = 0.0
    sparsify: str = "none"
    density: tuple[tuple[str, float], ...] = ()
    prune_round: int = 0
    admm_rounds: int = 0
    rho: float = 1e-2
    rho_final: float = 1.0
    every: int = 10
    value_type: str = "float32"

    def __post_init__(self) -> None:
        def need(ok: bool, key: str, allowed: str) -> None:
            if not ok:
                raise ValueError(f"{key}={getattr(self, key)!r} is impossible; it must be {allowed}")

        for key in ("rounds", "batch", "every"):
            need(getattr(self, key) >= 1, key, "1 or more")
        for key in ("local_epochs", "lr", "rho", "rho_final"):
            need(getattr(self, key) > 0, key, "positive")
        for key in ("participants", "mu", "prune_round", "admm_rounds"):
            need(getattr(self, key) >= 0, key, "0 or more")
        need(0 <= self.momentum < 1, "momentum", "in [0, 1)")
        need(0 <= self.lr_final <= 1, "lr_final", "in [0, 1]")
        need(self.sparsify in rounds.SPARSIFY, "sparsify", f"one of {', '.join(rounds.SPARSIFY)}")
        need(self.value_type in messages.VALUES, "value_type", f"one of {', '.join(messages.VALUES)}")
        need(bool(self.density) == (self.sparsify != "none"), "density", "given where something is made sparse")
        need(all(0 < d <= 1 for _, d in self.density), "density", "pairs (path pattern, share in (0, 1])")
        if self.pruning:
            need(self.admm_rounds <= self.prune_round < self.rounds, "prune_round", "from admm_rounds to rounds - 1")

    @property
    def pruning(self) -> bool:
        """Whether the model itself becomes sparse."""
        return self.sparsify in ("common", "client")

    def kind(self, round_: int) -> str:
        """DENSE, ADMM or MASKED."""
        if not self.pruning or round_ < self.prune_round - self.admm_rounds:
            return DENSE
        return ADMM if round_ < self.prune_round else MASKED

    def rates(self, round_: int) -> tuple[float, float]:
        """Learning rate and rho of a round."""
        part = round_ / max(1, self.rounds - 1)
        lr = self.lr * (self.lr_final + (1 - self.lr_final) * 0.5 * (1 + math.cos(math.pi * part)))
        k = round_ - (self.prune_round - self.admm_rounds)
        along = min(max(k / max(1, self.admm_rounds - 1), 0.0), 1.0)
        return lr, self.rho * (self.rho_final / self.rho) ** along


class Upload(NamedTuple):
    """What a client's round gives.

    Attributes:
      leaves: float32 arrays, shaped as the model's leaves: what is added to the model, or the model itself (client
        masks).
      masks: support of each leaf with a budget; None for the others and where nothing is sparse.
      memory: what was not sent, by leaf with a budget (`update`), for the next round.
      loss: mean over the steps, float32 [].

    Example:
      >>> from compressx.federated.algorithm import Upload
      >>> up = Upload(leaves=(jnp.ones(3),), masks=(None,), memory=(), loss=jnp.float32(0.5))
      >>> len(up.leaves), up.memory
      (1, ())
    """

    leaves: tuple[Array, ...]
    masks: tuple[Array | None, ...]
    memory: tuple[Array, ...]
    loss: Array


def layout(alg: Algorithm, model: Any) -> tuple[Layer, ...]:
    """The layers of a model `{"params": ..., "batch_stats": ...}` and their budgets; all but the parameters are exact.

    Args:
      alg: whose densities give the budgets.
      model: a tree of arrays or shapes.

    Returns:
      A `Layer` (path, size, budget, exact) for each leaf, in leaf order.

    Raises:
      ValueError: a density pattern matches nothing, or something that is no weight.

    Example:
      >>> from compressx.federated import algorithm
      >>> alg = algorithm.Algorithm(sparsify="update", density=((".*kernel", 0.25),))
      >>> model = {"params": {"kernel": np.zeros((4, 4))}, "batch_stats": {"mean": np.zeros(4)}}
      >>> [tuple(layer) for layer in algorithm.layout(alg, model)]
      [('batch_stats/mean', 4, 4, True), ('params/kernel', 16, 4, False)]
    """
    names, leaves = paths(model), jax.tree.leaves(model)
    for pattern, _ in alg.density:
        hits = [n for n in names if re.fullmatch(pattern, n)]
        if not hits or not all(n.startswith("params/") for n in hits):
            raise ValueError(f"density: {pattern!r} matches {hits or 'nothing'}; it must match weights among {names}")

    def budget(name: str, size: int) -> int:
        chosen = [d for p, d in alg.density if re.fullmatch(p, name)]
        return count(chosen[0], size) if chosen else size

    sizes = [int(x.size) for x in leaves]
    return tuple(Layer(n, k, budget(n, k), not n.startswith("params/")) for n, k in zip(names, sizes, strict=True))


def participants(seed: int, alg: Algorithm, clients: int, round_: int) -> NpArray:
    """The clients of a round, sorted.

    Args:
      seed: of the run.
      alg: how many take part.
      clients: how many there are.
      round_: its number, from 0.

    Returns:
      int `[participants]`.

    Raises:
      ValueError: more are to take part than there are.

    Source: H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017,
    algorithm 1.

    Example:
      >>> from compressx.federated import algorithm
      >>> algorithm.participants(0, algorithm.Algorithm(participants=2), clients=5, round_=0).size
      2
    """
    if alg.participants > clients:
        raise ValueError(f"participants={alg.participants} is impossible with {clients} clients")
    if not alg.participants:
        return np.arange(clients)
    rng = np.random.default_rng((seed, 1, round_))
    return np.sort(rng.choice(clients, alg.participants, replace=False))


def local_steps(alg: Algorithm, examples: int) -> int:
    """Steps of a client with so many examples.

    Args:
      alg: epochs and batch.
      examples: of the client.

    Returns:
      At least 1.

    Example:
      >>> from compressx.federated import algorithm
      >>> algorithm.local_steps(algorithm.Algorithm(local_epochs=2.0, batch=8), examples=20)
      5
    """
    return max(1, round(alg.local_epochs * examples / alg.batch))


def local_rows(seed: int, alg: Algorithm, round_: int, client: int, examples: int) -> NpArray:
    """Which of its examples a client takes in each step: int32 `[steps, batch]`, permutation after permutation.

    Args:
      seed: of the run.
      alg: epochs and batch.
      round_: its number, from 0.
      client: its number.
      examples: that it has.

    Returns:
      int32 `[steps, batch]`.

    Example:
      >>> from compressx.federated import algorithm
      >>> rows = algorithm.local_rows(0, algorithm.Algorithm(batch=2), round_=0, client=3, examples=4)
      >>> rows.shape, sorted(rows.ravel().tolist())  # one epoch: every example once
      ((2, 2), [0, 1, 2, 3])
    """
    steps = local_steps(alg, examples)
    rng = np.random.default_rng((seed, 2, round_, client))
    passes = -(-steps * alg.batch // examples)
    stream = np.concatenate([rng.permutation(examples) for _ in range(passes)])
    return stream[: steps * alg.batch].reshape(steps, alg.batch).astype(np.int32)


def round_key(seed: int, round_: Any, client: Any) -> Array:
    """The key of a client's round.

    Args:
      seed: of the run.
      round_: its number; int or int32 `[]`, traced or not.
      client: its number, likewise.

    Returns:
      A key of `jax.random`.

    Example:
      >>> from compressx.federated.algorithm import round_key
      >>> bool((jax.random.key_data(round_key(0, 1, 2)) == jax.random.key_data(round_key(0, 2, 1))).all())
      False
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), round_), client)


@factory
def _held_support(k: int) -> Constraint:
    """The weights within the support of the k largest magnitudes of the first weights: the same set for all clients."""
    base = support(lambda w: top_k_mask(jnp.abs(w), k))
    return base._replace(
        init=lambda w: top_k_mask(jnp.abs(w), k),
        project=lambda w, mask: jnp.where(mask, w, jnp.zeros((), w.dtype)),
        freeze=lambda w, mask: mask,
    )


def quantise(x: Array, values: str) -> Array:
    """What arrives of a leaf that is sent with such values; as `messages.to_values`, in JAX.

    Args:
      x: float32, any shape.
      values: "float32", "float16" or "int8"; int8 has one scale for the leaf.

    Returns:
      float32 of x's shape.

    Example:
      >>> from compressx.federated.algorithm import quantise
      >>> quantise(jnp.array([0.0, 63.6, 127.0]), "int8").tolist()
      [0.0, 64.0, 127.0]
    """
    if values == "float32":
        return x
    if values == "float16":
        return jnp.clip(x, -65504, 65504).astype(jnp.float16).astype(jnp.float32)
    scale = jnp.max(jnp.abs(x)) / jnp.float32(127)
    q = jnp.round(x / jnp.where(scale > 0, scale, 1.0))
    return jnp.clip(q, -127, 127) * scale


def arrive(leaves: Sequence[Array], layers: Sequence[Layer], values: str) -> tuple[Array, ...]:
    """What arrives of a message's leaves; the exact ones as they are.

    Args:
      leaves: float32 arrays.
      layers: from `layout`, in the same order.
      values: the message's type of values.

    Returns:
      float32 arrays.

    Example:
      >>> from compressx.federated import algorithm
      >>> layers = algorithm.layout(algorithm.Algorithm(), {"params": {"w": np.zeros(2)}})
      >>> algorithm.arrive([jnp.array([1.0, 1e6])], layers, "float16")[0].tolist()  # float16 ends at 65504
      [1.0, 65504.0]
    """
    return tuple(x if layer.exact else quantise(x, values) for x, layer in zip(leaves, layers, strict=True))


def top_masks(leaves: Sequence[Array], layers: Sequence[Layer]) -> tuple[Array | None, ...]:
    """The mask of each layer's `budget` largest magnitudes; None for layers without a budget.

    Args:
      leaves: float32 arrays.
      layers: from `layout`, in the same order.

    Returns:
      bool, shaped as the leaf, or None.

    Example:
      >>> from compressx.federated import algorithm
      >>> alg = algorithm.Algorithm(sparsify="update", density=((".*", 0.5),))
      >>> layers = algorithm.layout(alg, {"params": {"w": np.zeros(4)}})
      >>> algorithm.top_masks([jnp.array([1.0, -3.0, 2.0, 0.5])], layers)[0].tolist()
      [False, True, True, False]
    """
    return tuple(
        top_k_mask(jnp.abs(x), layer.budget) if layer.budget < layer.size else None
        for x, layer in zip(leaves, layers, strict=True)
    )


def masked(leaves: Sequence[Array], masks: Sequence[Array | None]) -> tuple[Array, ...]:
    """The leaves with zeros outside the masks.

    Args:
      leaves: arrays.
      masks: bool arrays of the leaves' shapes, or None for a leaf that stays whole.

    Returns:
      Arrays of the leaves' shapes.

    Example:
      >>> from compressx.federated.algorithm import masked
      >>> [x.tolist() for x in masked([jnp.ones(2), jnp.ones(2)], [jnp.array([True, False]), None])]
      [[1.0, 0.0], [1.0, 1.0]]
    """
    return tuple(x if m is None else jnp.where(m, x, 0.0) for x, m in zip(leaves, masks, strict=True))


Loss = Callable[[Any, Any, dict[str, Array], Array], tuple[Array, Any]]
Local = Callable[..., Upload]


def make_local(loss: Loss, alg: Algorithm, layers: Sequence[Layer], treedef: Any, kind: str) -> Local:
    """A client's round as a pure function, not yet jitted.

    Args:
      loss: `loss(params, state, batch, key) -> (scalar, state)`: params `{"params": ...}`, state the model's other
        collections (`{}` where it has none), batch rows of the client's examples.
      alg: the algorithm.
      layers: from `layout`.
      treedef: of the model `{"params": ..., other collections}`.
      kind: DENSE, ADMM or MASKED.

    Returns:
      `local(leaves, masks, memory, data, rows, steps, lr, rho, key) -> Upload`: the model as received, the common masks
      (None without), the client's memory (() without), data with leading axis n, rows int32 `[>= steps, batch]`, and
      scalars. Rows from `steps` on are not used.

    Source: local SGD: H. B. McMahan et al., 2017, algorithm 1; proximal term `mu`: T. Li et al., "Federated
    Optimization in Heterogeneous Networks", 2020, algorithm 2; error feedback: S. U. Stich et al., "Sparsified SGD with
    Memory", 2018.

    Example:
      >>> from compressx.federated import algorithm
      >>> loss = lambda params, state, batch, key: (jnp.sum((params["params"]["w"] - batch["x"][0]) ** 2), state)
      >>> alg, model = algorithm.Algorithm(batch=1, momentum=0.0), {"params": {"w": jnp.zeros(1)}}
      >>> leaves, treedef = jax.tree.flatten(model)
      >>> local = algorithm.make_local(loss, alg, algorithm.layout(alg, model), treedef, algorithm.DENSE)
      >>> data, rows = {"x": jnp.ones((1, 1))}, jnp.zeros((1, 1), jnp.int32)
      >>> steps, lr, rho = jnp.int32(1), jnp.float32(0.25), jnp.float32(0.0)
      >>> up = local(tuple(leaves), (None,), (), data, rows, steps, lr, rho, jax.random.key(0))
      >>> up.leaves[0].tolist()  # a step of 0.25 times the gradient of (w - 1)^2
      [0.5]
    """
    budgets = [layer.budget if layer.budget < layer.size else 0 for layer in layers]
    own = alg.sparsify == "client"
    every = alg.every
    gradient = jax.value_and_grad(loss, has_aux=True)

    def transform(rho: Any) -> optax.GradientTransformationExtraArgs:
        pull = []
        if kind == ADMM or (kind == MASKED and own):
            make = (lambda k: unstructured(keep=k)) if own else _held_support
            rules = [(re.escape(x.name), make(b)) for x, b in zip(layers, budgets, strict=True) if b]
            pull = [admm(rules, rho=rho, every=every)]
        # The penalty comes after the momentum, with which a strong one would overshoot; stable for lr * rho < 2.
        return optax.chain(optax.trace(alg.momentum), *pull)

    def run(
        leaves: Any, masks: Any, data: Any, rows: Array, first: Any, last: Any, lr: Any, tx: Any, key: Array
    ) -> Any:
        start = jax.tree.unflatten(treedef, leaves)
        anchor = {"params": start["params"]}
        stats = {k: v for k, v in start.items() if k != "params"}
        keep = jax.tree.unflatten(
            treedef, [jnp.ones_like(x, bool) if m is None else m for x, m in zip(leaves, masks, strict=True)]
        )
        keep = {"params": keep["params"]}
        within = any(m is not None for m in masks)

        def step(i: Any, carry: Any) -> Any:
            params, stats, opt_state, total = carry
            batch = {name: x[rows[i]] for name, x in data.items()}
            (value, stats), g = gradient(params, stats, batch, jax.random.fold_in(key, i))
            if alg.mu:
                g = jax.tree.map(lambda g, p, a: g + alg.mu * (p - a), g, params, anchor)
            moves, opt_state = tx.update(g, opt_state, params)
            if within:
                moves = jax.tree.map(lambda d, m: jnp.where(m, d, 0.0), moves, keep)
            return jax.tree.map(lambda p, d: p - lr * d, params, moves), stats, opt_state, total + value

        carry = (anchor, stats, tx.init(anchor), jnp.zeros((), jnp.float32))
        params, stats, _, total = lax.fori_loop(first, last, step, carry)
        return tuple(jax.tree.leaves({**params, **stats})), total

    def local(
        leaves: tuple[Array, ...],
        masks: tuple[Array | None, ...],
        memory: tuple[Array, ...],
        data: Any,
        rows: Array,
        steps: Array,
        lr: Array,
        rho: Array,
        key: Array,
    ) -> Upload:
        none: tuple[Array | None, ...] = (None,) * len(layers)
        if kind == MASKED and own:
            half = (steps + 1) // 2
            trained, total = run(leaves, none, data, rows, 0, half, lr, transform(rho), key)
            masks = top_masks(trained, layers)
            hard = masked(trained, masks)
            trained, more = run(hard, masks, data, rows, half, steps, lr, optax.trace(alg.momentum), key)
            sent = masked(trained, masks)
            sent = arrive(sent, layers, alg.value_type)
            return Upload(sent, masks, (), (total + more) / steps.astype(jnp.float32))
        inside = masks if kind == MASKED else none
        trained, total = run(leaves, inside, data, rows, 0, steps, lr, transform(rho), key)
        change = tuple(a - b for a, b in zip(trained, leaves, strict=True))
        if alg.sparsify != "update":
            sent = arrive(change, layers, alg.value_type)
            return Upload(sent, inside, (), total / steps.astype(jnp.float32))
        kept = iter(memory)
        whole = tuple(x + next(kept) if b else x for x, b in zip(change, budgets, strict=True))
        chosen = top_masks(whole, layers)
        sent = arrive(masked(whole, chosen), layers, alg.value_type)
        left = tuple(a - b for a, b, k in zip(whole, sent, budgets, strict=True) if k)
        return Upload(sent, chosen, left, total / steps.astype(jnp.float32))

    return local


def no_memory(alg: Algorithm, layers: Sequence[Layer], leaves: Sequence[Any]) -> tuple[NpArray, ...]:
    """A client's memory before its first round.

    Args:
      alg: with `sparsify="update"`, or there is no memory.
      layers: from `layout`.
      leaves: arrays or shapes, in the same order.

    Returns:
      Zeros, float32, shaped as each leaf with a budget; () where nothing is kept.

    Source: S. U. Stich, J.-B. Cordonnier, M. Jaggi, "Sparsified SGD with Memory", 2018.

    Example:
      >>> from compressx.federated import algorithm
      >>> alg = algorithm.Algorithm(sparsify="update", density=((".*", 0.5),))
      >>> layers = algorithm.layout(alg, {"params": {"w": np.zeros(4)}})
      >>> [m.shape for m in algorithm.no_memory(alg, layers, [np.zeros(4)])]
      [(4,)]
    """
    if alg.sparsify != "update":
        return ()
    return tuple(np.zeros(x.shape, np.float32) for x, y in zip(leaves, layers, strict=True) if y.budget < y.size)
