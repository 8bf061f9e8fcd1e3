"""A client: checks the enclave, trains, packs, seals; remembers on its own disk what a crash must not lose.

    hello() -> bytes                    to be carried to the aggregator
    answer(offer, frame) -> bytes       the offer is checked before the frame is opened; the sealed update comes back

An update is kept until the client knows that it was counted: asked again for the same round of the same state (a lost
connection, an aggregator that was killed), it sends the same one, sealed anew. An update that turns out not to have
been counted goes back into the error-feedback memory.
"""

import functools
import io
import json
import struct
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from compressx.federated import algorithm
from compressx.federated.algorithm import Algorithm, Loss
from compressx.federated.trusted import messages, rounds, sessions
from compressx.federated.trusted.attest import Verifier
from compressx.federated.trusted.refused import Refused
from compressx.federated.trusted.rounds import Plan
from compressx.federated.trusted.sealing import Sealer, write_durably
from compressx.federated.trusted.sessions import NEVER, Hello, Session

NpArray = npt.NDArray[Any]


class _Pending(NamedTuple):
    """An update that was sent: for which state, and the message."""

    round: int
    state: bytes
    payload: bytes


@functools.lru_cache(maxsize=32)
def _program(loss: Loss, alg: Algorithm, layers: tuple[messages.Layer, ...], treedef: Any, kind: str) -> Any:
    """Compiled once in a process, however many clients live in it."""
    return jax.jit(algorithm.make_local(loss, alg, layers, treedef, kind))


class Client:
    """One client.

    Args:
      number: its number in the plan's roster.
      plan: what it agreed to; the enclave must be bound to this plan's hash.
      alg: how it trains.
      model: a tree of the model's shapes.
      loss: as `algorithm.make_local` takes it.
      data: its own examples, arrays with a common leading axis.
      seed: shared by all, of orders and keys.
      identity: its enrolled key.
      verifier: accepts or refuses the enclave's quote.
      folder: where it remembers, or None to remember in memory only. What it remembers holds its update, and is sealed
        with its identity and for its plan.

    Raises:
      ValueError: the plan has another number of examples for it.
      Refused: what it remembers was changed, or is of another plan, number or identity.

    Example:
      >>> from compressx.federated import algorithm, client
      >>> from compressx.federated.trusted import attest, quotes, rounds
      >>> alg, model = algorithm.Algorithm(rounds=1), {"params": {"w": jnp.zeros(2)}}
      >>> key, machine = client.Ed25519PrivateKey.generate(), attest.SimulatedAttester(b"m" * 32, b"s" * 32)
      >>> roster = {0: (key.public_key().public_bytes_raw().hex(), 4)}
      >>> plan = rounds.Plan(algorithm.layout(alg, model), roster, rounds=1)
      >>> trusts = attest.SimulatedVerifier(machine.root, quotes.Policy(machine.measurement()))
      >>> loss = lambda params, state, batch, key: (jnp.sum(params["params"]["w"] ** 2), state)
      >>> one = client.Client(0, plan, alg, model, loss, {"x": np.ones((4, 2))}, 0, key, trusts)
      >>> hello = one.hello()
      >>> hello == one.hello()  # each hello is used once
      False
    """

    def __init__(
        self,
        number: int,
        plan: Plan,
        alg: Algorithm,
        model: Any,
        loss: Loss,
        data: Mapping[str, NpArray],
        seed: int,
        identity: Ed25519PrivateKey,
        verifier: Verifier,
        folder: str | Path | None = None,
    ) -> None:
        self.number, self.plan, self.alg, self._seed = number, plan, alg, seed
        self._identity, self._verifier = identity, verifier
        self._data = {k: jnp.asarray(v) for k, v in data.items()}
        self._examples = len(next(iter(data.values())))
        if plan.roster[number][1] != self._examples:
            raise ValueError(f"client {number} has {self._examples} examples; the plan says {plan.roster[number][1]}")
        leaves, self._treedef = jax.tree.flatten(model)
        self._shapes = [x.shape for x in leaves]
        self._loss = loss
        self._session: Session | None = None
        self._hello: tuple[bytes, Any] | None = None
        self._masks: tuple[NpArray | None, ...] | None = None
        self._memory = algorithm.no_memory(alg, plan.layers, leaves)
        self._seen = (NEVER, bytes(32))
        self._pending: _Pending | None = None
        self._file = Path(folder) / f"client-{number:06d}.state" if folder else None
        self._sealer = Sealer(identity.private_bytes_raw(), plan.hash())
        self.seconds = {"train": 0.0, "pack": 0.0, "seal": 0.0, "open": 0.0}
        if self._file is not None and self._file.exists():
            self._load(self._unsealed(self._file))

    # -- protocol ----------------------------------------------------------------------------------------------------

    def hello(self) -> bytes:
        """A fresh hello; the session before it is over."""
        private, key = sessions.fresh_key()
        seen_round, seen_hash = self._seen
        data = sessions.write_hello(
            Hello(self.number, sessions.fresh_nonce(), key, seen_round, seen_hash), self._identity
        )
        self._hello, self._session, self._masks = (data, private), None, None
        return data

    def attest(self, data: bytes) -> None:
        """Checks an offer and opens the session.

        Raises:
          Refused: the offer, its quote or its policy is not what this client agreed to.
        """
        if self._hello is None:
            raise Refused("session", "an offer without a hello")
        hello, private = self._hello
        self._hello = None  # one use
        offer = sessions.read_offer(data)
        if offer.policy != self.plan.hash():
            raise Refused("policy", "the enclave runs another plan")
        bound = sessions.binding(hello, offer.session, offer.key, offer.policy)
        report = self._verifier.verify(offer.quote, bound)
        self._session = sessions.derive(
            private, offer.key, hello, offer, report.measurement, self.number, enclave=False
        )

    def answer(self, offer: bytes | None, frame: bytes) -> bytes:
        """The sealed update for a sealed model; `offer` where the session is new.

        Raises:
          Refused: as `attest`; or the frame, or the model in it, is not acceptable.
        """
        if offer is not None:
            self.attest(offer)
        if self._session is None:
            raise Refused("session", "there is no session; say hello first")
        begin = time.perf_counter()
        largest = 4 + messages.largest_bytes(self.plan.layers)
        round_, state, payload = self._session.open(frame, None, None, largest)
        seen_round, seen_hash = self._seen
        if round_ >= self.plan.rounds or (seen_round != NEVER and round_ < seen_round):
            raise Refused("round", f"a model of round {round_}; {seen_round} was seen, {self.plan.rounds} are planned")
        if round_ == seen_round and state != seen_hash:
            raise Refused("rollback", f"another model of round {round_} than the one seen before")
        leaves, masks = self._read_model(round_, payload[4:])
        self.seconds["open"] += time.perf_counter() - begin
        if self._pending is not None and (self._pending.round, self._pending.state) == (round_, state):
            message = self._pending.payload
        else:
            (counted,) = struct.unpack("<I", payload[:4])
            self._settle(counted)
            message = self._train(round_, leaves, masks)
            self._seen, self._pending = (round_, state), _Pending(round_, state, message)
            self._save()
        begin = time.perf_counter()
        sealed = self._session.seal(round_, state, message)
        self.seconds["seal"] += time.perf_counter() - begin
        return sealed

    # -- inside ------------------------------------------------------------------------------------------------------

    def _read_model(self, round_: int, data: bytes) -> tuple[list[NpArray], tuple[NpArray | None, ...]]:
        plan, pruned = self.plan, self.plan.pruned(round_)
        common = pruned and plan.sparsify == "common"
        layout = plan.layers if pruned else plan.open_layout()
        supports = None
        if common and self._masks is not None:
            supports = [None if m is None else np.flatnonzero(m) for m in self._masks]
        message = messages.parse(
            data[: len(data)],
            layout,
            kind=messages.WEIGHTS,
            values=plan.value_code,
            supports=supports,
            size=len(data) if plan.padded else 0,
        )
        leaves = [messages.to_dense(p, layer.size) for p, layer in zip(message.pieces, layout, strict=True)]
        masks: tuple[NpArray | None, ...] = (None,) * len(layout)
        if common:
            found: list[NpArray | None] = []
            for piece, layer in zip(message.pieces, layout, strict=True):
                mask = None
                if piece.indices is not None:
                    mask = np.zeros(layer.size, bool)
                    mask[piece.indices] = True
                found.append(mask)
            self._masks = masks = tuple(found)
        return leaves, masks

    def _train(self, round_: int, leaves: list[NpArray], masks: tuple[NpArray | None, ...]) -> bytes:
        alg, plan = self.alg, self.plan
        begin = time.perf_counter()
        program = _program(self._loss, alg, plan.layers, self._treedef, alg.kind(round_))
        shaped = tuple(jnp.asarray(x.reshape(s)) for x, s in zip(leaves, self._shapes, strict=True))
        held = tuple(None if m is None else jnp.asarray(m.reshape(s)) for m, s in zip(masks, self._shapes, strict=True))
        rows = algorithm.local_rows(self._seed, alg, round_, self.number, self._examples)
        lr, rho = (jnp.float32(v) for v in alg.rates(round_))
        key = algorithm.round_key(self._seed, round_, self.number)
        up = program(shaped, held, self._memory, self._data, rows, jnp.int32(len(rows)), lr, rho, key)
        sent, chosen, memory = jax.device_get((up.leaves, up.masks, up.memory))
        self.seconds["train"] += time.perf_counter() - begin
        begin = time.perf_counter()
        what, layout, shared = rounds.upload_form(plan, round_)
        message = messages.write(
            sent,
            layout,
            kind=what,
            values=plan.value_code,
            masks=chosen if any(m is not None for m in chosen) else None,
            shared=shared,
            codes=rounds.upload_codes(plan),
            pad=rounds.upload_size(plan, round_),
        )
        self._memory = tuple(np.asarray(m) for m in memory)
        self.seconds["pack"] += time.perf_counter() - begin
        return message

    def _settle(self, counted: int) -> None:
        """Takes an update back into the memory where the server says that it was never counted."""
        if self._pending is None or not self._memory or counted == self._pending.round + 1:
            return
        message = messages.parse(
            self._pending.payload, self.plan.layers, size=len(self._pending.payload) if self.plan.padded else 0
        )
        limited = [k for k, layer in enumerate(self.plan.layers) if layer.budget < layer.size]
        dense = (messages.to_dense(message.pieces[k], self.plan.layers[k].size) for k in limited)
        self._memory = tuple(m + d.reshape(m.shape) for m, d in zip(self._memory, dense, strict=True))

    def _save(self) -> None:
        if self._file is None or self._pending is None:
            return
        head = {"round": self._seen[0], "state": self._seen[1].hex(), "memory": [list(m.shape) for m in self._memory]}
        text = json.dumps(head).encode()
        out = io.BytesIO()
        out.write(struct.pack("<II", len(text), len(self._pending.payload)) + text + self._pending.payload)
        for m in self._memory:
            out.write(m.astype("<f4").tobytes())
        self._file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._file, self._sealer.seal(b"client %d" % self.number, out.getvalue()))

    def _unsealed(self, file: Path) -> bytes:
        try:
            return self._sealer.open(b"client %d" % self.number, file.read_bytes())
        except Refused:
            told = f"{file} was changed, or is of another plan or identity; without it this client begins anew"
            raise Refused("sealed", told) from None

    def _load(self, data: bytes) -> None:
        length, size = struct.unpack_from("<II", data)
        head = json.loads(data[8 : 8 + length])
        at = 8 + length
        self._seen = (int(head["round"]), bytes.fromhex(head["state"]))
        self._pending = _Pending(*self._seen, data[at : at + size])
        at += size
        memory = []
        for shape in head["memory"]:
            n = int(np.prod(shape))
            memory.append(np.frombuffer(data, "<f4", n, at).reshape(shape).astype(np.float32))
            at += 4 * n
        self._memory = tuple(memory)
