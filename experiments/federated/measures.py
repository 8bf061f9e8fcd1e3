"""Bytes and elapsed time of a federated run beside dense FedAvg, encrypted and not, and beside SecAgg.

Dense messages all have one size, so what dense FedAvg would have moved is counted whether or not it was trained.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from compressx.federated import algorithm, secagg, timing
from compressx.federated.algorithm import Algorithm
from compressx.federated.simulate import message_bytes
from compressx.federated.trusted import attest, messages, sessions
from compressx.federated.trusted.rounds import State
from experiments.federated import config as setup
from experiments.federated.arms import Arm, dense
from experiments.federated.config import Config, Setting

NpArray = npt.NDArray[Any]
LINKS = ((1.0, 5.0), (2.0, 10.0), (5.0, 25.0), (10.0, 50.0), (50.0, 250.0))  # megabit a second, up and down


class Sent(NamedTuple):
    """The messages of a run.

    Attributes:
      alg: the algorithm.
      down: int64 `[rounds, participants]`, bytes of the message that carries the model.
      up: likewise, of the client's.
      layers: the last model's layers, flat.
      masks: bool, of each layer with a budget; None for the others.
    """

    alg: Algorithm
    down: NpArray
    up: NpArray
    layers: tuple[NpArray, ...]
    masks: tuple[NpArray | None, ...]


class Comparison(NamedTuple):
    """What a run cost beside others.

    Attributes:
      bytes: run -> bytes by purpose, and "total".
      seconds: run -> modelled seconds `[rounds, stages]`.
      saving: share of encrypted dense FedAvg's bytes that was saved, both ways, everything counted.
      saving_same_values: the same beside dense FedAvg with values of this run's type: what sparsity alone saves.
      speedup: encrypted dense FedAvg's elapsed time over this run's.
      links: the speed-up over other links, by "up/down" in megabit a second.
    """

    bytes: dict[str, dict[str, int]]
    seconds: dict[str, NpArray]
    saving: float
    saving_same_values: float
    speedup: float
    links: dict[str, float]


def compare(config: Config, setting: Setting, sparse: Arm) -> Comparison:
    """Counts and times the run and what it is compared with."""
    alg, clients = sparse.alg, len(setting.split)
    ids = [algorithm.participants(config.seed, alg, clients, r) for r in range(alg.rounds)]
    layers = tuple(np.asarray(x).reshape(-1) for x in jax.device_get(sparse.state.leaves))
    masks = tuple(None if m is None else np.asarray(m).reshape(-1) for m in jax.device_get(sparse.state.masks))
    ours = Sent(alg, sparse.ledger.down, sparse.ledger.up, layers, masks)
    plain = dense_messages(config, setting, ours, "float32")
    runs = {"encrypted sparse": (ours, True), "encrypted dense": (plain, True), "plain dense": (plain, False)}
    same = "encrypted dense"
    if alg.value_type != "float32":
        same = f"encrypted dense, {alg.value_type}"
        runs[same] = (dense_messages(config, setting, ours, alg.value_type), True)
    counts = {name: totals(sent, encrypted, ids) for name, (sent, encrypted) in runs.items()}
    costs = {name: measure(config, sent, setting) for name, (sent, _) in runs.items()}

    def seconds(name: str, network: timing.Network) -> NpArray:
        sent, encrypted = runs[name]
        return elapsed(config.seed, network, sent, setting, costs[name], encrypted, ids)

    times = {name: seconds(name, config.network) for name in runs}
    links = {}
    for up, down in LINKS:
        network = dataclasses.replace(config.network, up_mbit=up, down_mbit=down)
        gain = seconds("encrypted dense", network).sum() / seconds("encrypted sparse", network).sum()
        links[f"{up:g}/{down:g}"] = float(gain)
    if "secagg" in config.baselines:
        counts["secagg dense"] = {"total": secagg_bytes(plain)}
    return Comparison(
        counts,
        times,
        1 - counts["encrypted sparse"]["total"] / counts["encrypted dense"]["total"],
        1 - counts["encrypted sparse"]["total"] / counts[same]["total"],
        float(times["encrypted dense"].sum() / times["encrypted sparse"].sum()),
        links,
    )


def dense_messages(config: Config, setting: Setting, like: Sent, value_type: str) -> Sent:
    """What dense FedAvg moves in the same rounds with values of that type."""
    alg = dense(like.alg, value_type)
    values = messages.VALUES.index(value_type)
    one = message_bytes(algorithm.layout(alg, setting.model), values, None, padded=config.padded)
    every = np.full(like.down.shape, one, np.int64)
    return Sent(alg, every, every, like.layers, (None,) * len(like.layers))


@functools.cache
def handshake_bytes() -> tuple[int, int]:
    """Bytes up and down of one handshake, with a (SIMULATED) quote."""
    quote = attest.SimulatedAttester(bytes(32), bytes(32)).quote(bytes(64))
    return sessions.HELLO_BYTES, sessions.OFFER_BYTES + len(quote)


def totals(sent: Sent, encrypted: bool, ids: Sequence[NpArray]) -> dict[str, int]:
    """All bytes of a run: messages, frames, handshakes of every client that took part."""
    n, hands = sent.down.size, handshake_bytes()
    frames, met = (n, len(np.unique(np.concatenate(list(ids))))) if encrypted else (0, 0)
    out = {
        "model_down": int(sent.down.sum()),
        "update_up": int(sent.up.sum()),
        "framing_down": frames * (sessions.FRAME_BYTES + 4),
        "framing_up": frames * sessions.UPDATE_BYTES,
        "handshake_down": met * hands[1],
        "handshake_up": met * hands[0],
    }
    return out | {"total": sum(out.values())}


def measure(config: Config, sent: Sent, setting: Setting) -> dict[bool, timing.Costs]:
    """Measured seconds of one message, before pruning (False) and after it (True), for the kinds of round there are."""
    plan = setup.make_plan(config, sent.alg, setting)
    none = (None,) * len(sent.layers)
    first = {plan.pruned(r): r for r in reversed(range(sent.alg.rounds))}
    return {
        pruned: timing.measure(plan, State(r, sent.layers, sent.masks if pruned else none, bytes(32), {}))
        for pruned, r in first.items()
    }


def elapsed(
    seed: int,
    network: timing.Network,
    sent: Sent,
    setting: Setting,
    costs: dict[bool, timing.Costs],
    encrypted: bool,
    ids: Sequence[NpArray],
) -> NpArray:
    """Modelled seconds by round and stage `[rounds, stages]`."""
    alg, hands = sent.alg, handshake_bytes()
    speeds = network.speeds(seed, len(setting.split))
    rows: list[list[float]] = []
    met: set[int] = set()
    for r, who in enumerate(ids):
        new = np.array([encrypted and int(c) not in met for c in who])
        met.update(int(c) for c in who)
        extra = (sessions.FRAME_BYTES + 4, sessions.UPDATE_BYTES) if encrypted else (0, 0)
        stages = timing.elapsed(
            network,
            speeds,
            who,
            sent.down[r] + extra[0] + new * hands[1],
            sent.up[r] + extra[1] + new * hands[0],
            np.array([algorithm.local_steps(alg, len(setting.split[c])) * alg.batch for c in who]),
            costs[alg.pruning and r >= alg.prune_round],
            encrypted,
        )
        rows.append([stages[s] for s in timing.STAGES])
    return np.array(rows)


def secagg_audit(config: Config, setting: Setting, leaves: Sequence[Any]) -> dict[str, Any]:
    """One masked round of real messages on these weights, one client dropping out, against the plain mean."""
    clients = min(len(setting.split), 5)
    flat = np.concatenate([np.asarray(x).reshape(-1) for x in leaves])
    rng = np.random.default_rng(config.seed)
    vectors = {k: (flat * np.float32(1 + 0.01 * rng.standard_normal())).astype(np.float32) for k in range(clients)}
    threshold = clients // 2 + 1
    sizes = [len(setting.split[k]) for k in range(clients)]
    weights = {k: sizes[k] / sum(sizes) for k in range(clients)}
    members = {k: secagg.Member(k, threshold) for k in range(clients)}
    advertised = {k: m.advertise() for k, m in members.items()}
    shares = {k: m.share(advertised) for k, m in members.items()}
    stay = list(range(clients - 1)) if clients > 2 else list(range(clients))
    uploads = {
        k: members[k].masked(secagg.to_field(vectors[k], weights[k]), {j: shares[j][k] for j in members if j != k})
        for k in stay
    }
    revealed = {k: members[k].reveal(stay) for k in stay}
    total = secagg.unmask(uploads, advertised, revealed, threshold)
    part = sum(weights[k] for k in stay)
    mean = sum((weights[k] / part) * vectors[k].astype(np.float64) for k in stay)
    error = float(np.max(np.abs(secagg.from_field(total, part) - mean)))
    return {"clients": clients, "dropped": clients - len(stay), "largest_error": error}


def secagg_bytes(plain: Sent) -> int:
    """All bytes of dense FedAvg under masking: the models down in the clear, key shares and masked vectors."""
    number, m = plain.down.shape
    down, up = secagg.round_bytes(m, m, sum(x.size for x in plain.layers))
    return int(plain.down.sum()) + number * (down + up)
