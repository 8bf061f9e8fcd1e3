"""A small federation for the tests: four clients with digits, a dense network, the aggregator in this process."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compressx.federated import algorithm, splits
from compressx.federated.algorithm import Algorithm, Loss
from compressx.federated.client import Client
from compressx.federated.trusted import attest, rounds
from compressx.federated.trusted.aggregator import Aggregator
from compressx.federated.trusted.quotes import Policy
from compressx.federated.trusted.rounds import Plan
from compressx.federated.trusted.sealing import FileCounter
from experiments.common import data, models, training
from experiments.common.models.layers import BatchNorm
from experiments.common.training.state import plain_loss

DENSITY = ((r"params/f[12]/kernel", 0.1),)
CLIENTS = 4
SEED = 5


@dataclass
class World:
    """Everything that a federation has."""

    plan: Plan
    alg: Algorithm
    model: Any
    loss: Loss
    data: dict[str, np.ndarray]
    split: list[np.ndarray]
    identities: list[Ed25519PrivateKey]
    attester: attest.SimulatedAttester
    folder: Path

    @property
    def initial(self) -> list[np.ndarray]:
        return [np.asarray(x) for x in jax.tree.leaves(self.model)]

    def aggregator(self, **changes: Any) -> Aggregator:
        attester = changes.get("attester", self.attester)
        return Aggregator(
            self.plan, self.initial, attester, self.folder / "sealed", FileCounter(self.folder / "counter")
        )

    def verifier(self) -> attest.SimulatedVerifier:
        return attest.SimulatedVerifier(self.attester.root, Policy(self.attester.measurement()))

    def client(self, number: int, **changes: Any) -> Client:
        mine = {k: v[self.split[number]] for k, v in self.data.items()}
        given: dict[str, Any] = {
            "identity": self.identities[number],
            "verifier": self.verifier(),
            "folder": None,
        } | changes
        return Client(number, self.plan, self.alg, self.model, self.loss, mine, SEED, **given)

    def clients(self, **changes: Any) -> dict[int, Client]:
        return {k: self.client(k, **changes) for k in range(len(self.split))}


class Normalised(nn.Module):
    """Batch normalisation of the pixels and two dense layers: running statistics that no weight moves."""

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = BatchNorm(name="bn")(x.reshape(x.shape[0], -1), train=train)
        return nn.Dense(10, name="f2")(nn.relu(nn.Dense(24, name="f1")(x)))


_SHARED: dict[bool, dict[str, Any]] = {}


def _parts(normalised: bool) -> dict[str, Any]:
    if normalised not in _SHARED:
        digits = data.load("digits", "train")
        rows = np.arange(240)
        held = {"inputs": np.asarray(digits.inputs)[rows], "labels": np.asarray(digits.labels)[rows]}
        network = Normalised() if normalised else models.build("lenet_300_100", classes=10, width=0.1)
        model = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
        task = training.classification(
            network.apply, lambda x: data.augment.normalise(x, digits.info.mean, digits.info.std)
        )
        _SHARED[normalised] = {
            "data": held,
            "model": dict(model),
            "loss": plain_loss(task, training.Fit()),
            "identities": [Ed25519PrivateKey.generate() for _ in range(CLIENTS)],
            "attester": attest.SimulatedAttester(b"m" * 32, b"s" * 32),
        }
    return _SHARED[normalised]


def make(folder: Path, **changes: Any) -> World:
    """A federation; `changes` are fields of `Algorithm` or of `Plan`, or `normalised`."""
    parts = _parts(changes.pop("normalised", False))
    in_plan = {k: changes.pop(k) for k in ("padded", "oblivious", "quorum", "release") if k in changes}
    skew = changes.pop("skew", splits.iid)  # of equal sizes: one compilation for all clients
    alg = Algorithm(**({"rounds": 4, "batch": 8, "local_epochs": 0.5, "lr": 0.1, "every": 3} | changes))
    split = skew(SEED, parts["data"]["labels"], CLIENTS)
    flat = [np.asarray(x).reshape(-1) for x in jax.tree.leaves(parts["model"])]
    keys = [k.public_key().public_bytes_raw().hex() for k in parts["identities"]]
    plan = Plan(
        layers=algorithm.layout(alg, parts["model"]),
        roster={k: (keys[k], len(split[k])) for k in range(CLIENTS)},
        rounds=alg.rounds,
        sparsify=alg.sparsify,
        prune_round=alg.prune_round,
        value_type=alg.value_type,
        initial=rounds.model_hash(flat).hex(),
        **in_plan,
    )
    return World(
        plan, alg, parts["model"], parts["loss"], parts["data"], split, parts["identities"], parts["attester"], folder
    )
