"""The aggregator: the only place where a client's update exists in the clear. NumPy and cryptography, nothing else.

    hello(bytes) -> bytes          attest to one client, open a session
    model(client) -> bytes         the model of the round, sealed for that client
    update(bytes) -> int           take an update: opened, parsed, sealed to disk, counted once
    close() -> Closed              average, prune, seal the new state, raise the counter

An update counts from the moment its sealed copy is on the disk: an aggregator that is killed and started again finds
it there. A second one of the same client and round is refused, so is one of any other round.

Rollback and fork: the state's round and hash must be the counter's (or its round one more: killed between the two), and
the counter moves by compare-and-swap, so that of two aggregators on copies of one state only one closes a round. A host
that turns back the counter too is noticed by any client that saw more: its hello names the newest state it holds.
"""

import re
import struct
import threading
from collections.abc import Sequence
from pathlib import Path

from compressx.federated.trusted import messages, rounds, sessions
from compressx.federated.trusted.attest import Attester
from compressx.federated.trusted.messages import Message
from compressx.federated.trusted.refused import Refused
from compressx.federated.trusted.rounds import Array, Closed, Plan, State
from compressx.federated.trusted.sealing import NOTHING, Counter, Sealer, write_durably
from compressx.federated.trusted.sessions import NEVER, Offer, Session


class Aggregator:
    """See the module. `folder` holds sealed records; everything in it is the host's to read, delete or replace."""

    def __init__(
        self, plan: Plan, layers: Sequence[Array], attester: Attester, folder: str | Path, counter: Counter
    ) -> None:
        self.plan, self._attester, self._folder, self._counter = plan, attester, Path(folder), counter
        self._folder.mkdir(parents=True, exist_ok=True)
        self._keys = {client: bytes.fromhex(key) for client, (key, _) in plan.roster.items()}
        self._measurement = attester.measurement()
        self._sealer = Sealer(attester.sealing_key(), self._measurement + plan.hash())
        self._sessions: dict[int, Session] = {}
        self._knows_masks: set[int] = set()
        self._nonces: set[bytes] = set()
        self._lock = threading.RLock()
        self._stands: tuple[int, bytes] = NOTHING
        self._state = self._restore(layers)
        self._accepted: dict[int, Message] = self._journal()

    # -- what the host may ask ---------------------------------------------------------------------------------------

    def hello(self, data: bytes) -> bytes:
        """An offer for a client's hello; a session with it replaces any earlier one.

        Raises:
          Refused: see `sessions.read_hello`; "session" for a hello seen before; "rollback" where the client holds a
            newer state than this aggregator.
        """
        with self._lock:
            hello = sessions.read_hello(data, self._keys)
            if hello.nonce in self._nonces:
                raise Refused("session", "this hello was used before")
            newer = hello.seen_round != NEVER and hello.seen_round > self._state.round
            forked = hello.seen_round == self._state.round and hello.seen_hash != self._state.hash
            if newer or forked:
                raise Refused(
                    "rollback", f"client {hello.client} holds round {hello.seen_round}; here is {self._state.round}"
                )
            self._nonces.add(hello.nonce)
            private, key = sessions.fresh_key()
            session, policy = sessions.fresh_nonce()[:16], self.plan.hash()
            quote = self._attester.quote(sessions.binding(data, session, key, policy))
            offer = Offer(session, key, policy, quote)
            self._sessions[hello.client] = sessions.derive(
                private, hello.key, data, offer, self._measurement, hello.client, enclave=True
            )
            self._knows_masks.discard(hello.client)
            return sessions.write_offer(offer)

    def model(self, client: int) -> bytes:
        """The model of the open round for a client with a session, and whether its last update was counted.

        Raises:
          Refused: "session" without one, "round" after the last.
        """
        with self._lock:
            state = self._state
            if state.round >= self.plan.rounds:
                raise Refused("round", f"all {self.plan.rounds} rounds are closed")
            session = self._session(client)
            counted = struct.pack("<I", state.counted.get(client, 0))
            return session.seal(
                state.round, state.hash, counted + rounds.write_model(self.plan, state, client in self._knows_masks)
            )

    def update(self, frame: bytes) -> int:
        """Takes a client's update and returns the client's number.

        Raises:
          Refused: whatever is wrong with it; nothing of it was used.
        """
        with self._lock:
            state = self._state
            client = sessions.peek(frame)
            session = self._session(client)
            if state.round >= self.plan.rounds:
                raise Refused("round", f"all {self.plan.rounds} rounds are closed")
            most = messages.largest_bytes(self.plan.layers)
            _, _, payload = session.open(frame, state.round, state.hash, most)
            if client in self._accepted:
                raise Refused("counted", f"an update of client {client} is already counted in round {state.round}")
            message = rounds.read_upload(self.plan, state, payload)
            write_durably(self._record(client), self._sealer.seal(self._what(client), payload))
            self._accepted[client] = message
            if self.plan.pruned(state.round):
                self._knows_masks.add(client)
            return client

    def close(self) -> Closed:
        """Ends the round.

        Raises:
          Refused: "round" where fewer clients than the quorum were counted, or after the last round.
        """
        with self._lock:
            if self._state.round >= self.plan.rounds or len(self._accepted) < self.plan.quorum:
                raise Refused(
                    "round", f"round {self._state.round} has {len(self._accepted)} of {self.plan.quorum} updates"
                )
            old = [self._record(c) for c in self._accepted]
            state, closed = rounds.close(self.plan, self._state, self._accepted)
            self._write(state)
            old.append(self._path(self._state.round))
            self._state, self._accepted = state, {}
            for path in old:
                path.unlink(missing_ok=True)
            return closed

    def status(self) -> tuple[int, tuple[int, ...]]:
        """The open round and the clients counted in it."""
        with self._lock:
            return self._state.round, tuple(sorted(self._accepted))

    def release(self) -> list[Array]:
        """The model in the clear, where the plan (and so every client) allows it.

        Raises:
          Refused: "policy".
        """
        with self._lock:
            if not self.plan.release:
                raise Refused("policy", "the plan does not release the model to the host")
            return [x.copy() for x in self._state.layers]

    # -- sealed state ------------------------------------------------------------------------------------------------

    def _session(self, client: int) -> Session:
        if client not in self._sessions:
            raise Refused("session", f"client {client} has no session; it must say hello first")
        return self._sessions[client]

    def _path(self, round_: int) -> Path:
        return self._folder / f"state-{round_:06d}.sealed"

    def _record(self, client: int) -> Path:
        return self._folder / f"update-{self._state.round:06d}-{client:06d}.sealed"

    def _what(self, client: int) -> bytes:
        return b"update" + struct.pack("<II", self._state.round, client) + self._state.hash

    def _write(self, state: State) -> None:
        record = self._sealer.seal(b"state" + struct.pack("<I", state.round), rounds.pack_state(state))
        write_durably(self._path(state.round), record)
        self._advance(state)

    def _advance(self, state: State) -> None:
        new = (state.round + 1, state.hash)
        self._counter.swap(self._stands, new)
        self._stands = new

    def _restore(self, layers: Sequence[Array]) -> State:
        numbers = [int(m[1]) for p in self._folder.iterdir() if (m := re.fullmatch(r"state-(\d{6})\.sealed", p.name))]
        self._stands = self._counter.read()  # one more than the newest round that was sealed, and its hash
        floor = self._stands[0]
        if not numbers:
            if floor:
                raise Refused("rollback", f"no state is left, and the counter is at {floor}")
            state = rounds.initial(self.plan, layers)
            self._write(state)
            return state
        number = max(numbers)
        if number + 1 < floor or number > floor:
            raise Refused("rollback", f"the newest state is of round {number}, and the counter is at {floor}")
        record = self._sealer.open(b"state" + struct.pack("<I", number), self._path(number).read_bytes())
        state = rounds.unpack_state(record)
        if number == floor:  # killed between the state and the counter
            self._advance(state)
        elif state.hash != self._stands[1]:
            raise Refused("rollback", f"the counter knows another state of round {number} than the one that is here")
        return state

    def _journal(self) -> dict[int, Message]:
        found = {}
        for client in self.plan.roster:
            path = self._record(client)
            if path.exists():
                payload = self._sealer.open(self._what(client), path.read_bytes())
                found[client] = rounds.read_upload(self.plan, self._state, payload)
        return found
