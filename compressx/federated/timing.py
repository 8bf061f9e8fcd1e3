"""Elapsed time of rounds under a stated network and stated devices: a model, with measured costs where it says so.

    round = max over its clients (latency + down + open + train + pack + seal + latency + up) + server (open + parse,
    average)

Bytes are the exact ones; the seconds of opening, packing, sealing, parsing and averaging are measured here, for this
model; training is examples over the device's speed. Speeds differ between clients: log-normal around the median.
"""

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from compressx.federated.trusted import messages, rounds
from compressx.federated.trusted.rounds import Plan, State

NpArray = npt.NDArray[Any]
STAGES = ("down", "open", "train", "pack", "seal", "up", "server")


@dataclass(frozen=True)
class Network:
    """Links and devices.

    Attributes:
      up_mbit: of every client, megabit a second.
      down_mbit: likewise.
      latency_ms: one way.
      examples_per_second: median training speed of a device.
      spread: standard deviation of the logarithm of the speeds.
      slower: how much slower than this machine a device packs and seals.

    Raises:
      ValueError: a speed is not positive, or latency or spread is negative.

    Example:
      >>> from compressx.federated.timing import Network
      >>> Network(examples_per_second=500.0, spread=0.0).speeds(seed=0, clients=2).tolist()
      [500.0, 500.0]
    """

    up_mbit: float = 10.0
    down_mbit: float = 50.0
    latency_ms: float = 20.0
    examples_per_second: float = 2000.0
    spread: float = 0.3
    slower: float = 4.0

    def __post_init__(self) -> None:
        for key in ("up_mbit", "down_mbit", "examples_per_second", "slower"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)} is impossible; it must be positive")
        if self.latency_ms < 0 or self.spread < 0:
            raise ValueError("latency_ms and spread must not be negative")

    def speeds(self, seed: int, clients: int) -> NpArray:
        """Examples a second of every client."""
        draw = np.random.default_rng((seed, 3)).standard_normal(clients)
        return self.examples_per_second * np.exp(self.spread * draw)


class Costs(NamedTuple):
    """Seconds measured on this machine, for one message.

    Attributes:
      open: of opening and parsing the model.
      pack, seal: of the update.
      take: of opening and parsing the update at the server.
      average: of averaging one client's layers.

    Example:
      >>> from compressx.federated.timing import Costs
      >>> sum(Costs(open=0.001, pack=0.002, seal=0.001, take=0.001, average=0.001)[:3])
      0.004
    """

    open: float
    pack: float
    seal: float
    take: float
    average: float


def measure(plan: Plan, state: State, repeats: int = 3) -> Costs:
    """The costs of one message of this state's round: the smallest of the repeats.

    Args:
      plan: what server and clients agreed on.
      state: whose round is measured.
      repeats: of each; at least 1.

    Returns:
      `Costs`, in seconds of this machine.

    Example:
      >>> from compressx.federated.timing import measure
      >>> from compressx.federated.trusted.messages import Layer
      >>> from compressx.federated.trusted.rounds import Plan, State
      >>> plan = Plan((Layer("w", 8, 8),), {0: ("", 10)}, rounds=1)
      >>> costs = measure(plan, State(0, (np.ones(8, np.float32),), (None,), bytes(32), {}), repeats=1)
      >>> all(seconds > 0 for seconds in costs)
      True
    """
    key, nonce = AESGCM(bytes(32)), bytes(12)
    model = key.encrypt(nonce, rounds.write_model(plan, state, False), None)
    kind, layout, shared = rounds.upload_form(plan, state.round)
    masks = state.masks if plan.pruned(state.round) else rounds.prune(plan, state.layers)[1]
    if plan.sparsify in ("none", "common") and not plan.pruned(state.round):
        masks = (None,) * len(layout)
    update = [x if m is None else np.where(m, x, np.float32(0)) for x, m in zip(state.layers, masks, strict=True)]

    def pack() -> bytes:
        return messages.write(
            update,
            layout,
            kind=kind,
            values=plan.value_code,
            masks=masks,
            shared=shared,
            codes=rounds.upload_codes(plan),
            pad=rounds.upload_size(plan, state.round),
        )

    packed = pack()
    sealed = key.encrypt(nonce, packed, None)
    layers = plan.layers if plan.pruned(state.round) else plan.open_layout()
    size = len(model) - 16 if plan.padded else 0
    read = rounds.read_upload(plan, state, packed)
    one = next(iter(plan.roster))
    alone = Plan(**(plan.__dict__ | {"quorum": 1}))

    def best(run: Any) -> float:
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            run()
            times.append(time.perf_counter() - begin)
        return min(times)

    return Costs(
        open=best(lambda: messages.parse(key.decrypt(nonce, model, None), layers, size=size)),
        pack=best(pack),
        seal=best(lambda: key.encrypt(nonce, packed, None)),
        take=best(lambda: rounds.read_upload(plan, state, key.decrypt(nonce, sealed, None))),
        average=best(lambda: rounds.close(alone, state, {one: read})),
    )


def elapsed(
    network: Network,
    speeds: NpArray,
    ids: NpArray,
    down: NpArray,
    up: NpArray,
    examples: NpArray,
    costs: Costs,
    encrypted: bool,
) -> dict[str, float]:
    """Seconds of one round by stage: the stages of its slowest client, and the server's.

    Args:
      network: links and devices.
      speeds: of every client, from `Network.speeds`.
      ids: the round's clients `[m]`.
      down: bytes to each of them, everything counted.
      up: bytes from each.
      examples: that each trains on.
      costs: from `measure`.
      encrypted: False leaves sealing out of the server's time and the client's.

    Returns:
      Seconds by name of `STAGES`.

    Example:
      >>> from compressx.federated.timing import Costs, Network, elapsed
      >>> network = Network(up_mbit=8.0, down_mbit=8.0, latency_ms=0.0, spread=0.0)
      >>> ids, bytes_, free = np.array([0]), np.array([1_000_000]), Costs(0.0, 0.0, 0.0, 0.0, 0.0)
      >>> stages = elapsed(network, network.speeds(0, 1), ids, bytes_, bytes_, np.array([4000]), free, encrypted=True)
      >>> {name: seconds for name, seconds in stages.items() if seconds}  # a megabyte at a megabyte a second
      {'down': 1.0, 'train': 2.0, 'up': 1.0}
    """
    each = {
        "down": network.latency_ms / 1e3 + 8 * down / (network.down_mbit * 1e6),
        "open": np.full(len(ids), costs.open * network.slower),
        "train": examples / speeds[ids],
        "pack": np.full(len(ids), costs.pack * network.slower),
        "seal": np.full(len(ids), costs.seal * network.slower if encrypted else 0.0),
        "up": network.latency_ms / 1e3 + 8 * up / (network.up_mbit * 1e6),
    }
    slowest = int(np.argmax(sum(each.values())))
    server = len(ids) * (costs.take + costs.average)
    return {k: float(v[slowest]) for k, v in each.items()} | {"server": float(server)}
