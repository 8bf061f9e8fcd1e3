"""Flower as the distributed engine: its gRPC server and clients over TLS carry our sealed messages.

    server    flwr.server.start_server with a `FederatedServer`; the host of an enclave, it sees sealed bytes only
    client    flwr.client.start_client with a `FlowerClient` around a `Client`; reconnects until the server says that
    it is over

Flower 1.41 moves messages of SuperNodes over HTTP; what it offers over gRPC is `start_server` and `start_client`,
which it calls deprecated. They are used here because they are its gRPC transport; two calls of each are what would
change.

    get_properties {"op": "hello"}      -> {"hello": bytes}
    fit [offer or empty, sealed model]  -> [sealed update]

A round ends when all its clients are counted, or at its deadline with the quorum. A client that joins late or comes
back after a crash says hello and is asked again; what the enclave has counted is not asked again.
"""

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # read by flwr when it is imported

import flwr.client
import flwr.server
import grpc  # type: ignore[import-untyped]
from flwr.common import (
    Code,
    FitIns,
    FitRes,
    GetPropertiesIns,
    GetPropertiesRes,
    Parameters,
    ReconnectIns,
    Status,
)

from compressx.federated import algorithm
from compressx.federated.algorithm import Algorithm
from compressx.federated.client import Client
from compressx.federated.host import Aggregating, Traffic
from compressx.federated.tls import Certificates
from compressx.federated.trusted import messages
from compressx.federated.trusted.refused import Refused
from compressx.federated.trusted.rounds import Plan

log = logging.getLogger("compressx.federated")

GREETING = 15.0  # seconds within which a connection has to say hello
FAREWELL = 10.0  # seconds in which all clients hear that it is over
SPARE = 2**20  # bytes of Flower's own in a message


class FederatedServer(flwr.server.Server):
    """The host's loop over rounds.

    Args:
      enclave: the aggregator.
      plan: the plan.
      alg: who takes part in which round.
      seed: likewise.
      deadline: seconds after which a round closes with the quorum.
      journal: a file that gets a line of JSON for every round and every refusal, or None.
      after: called after every round.

    Example:
      >>> from types import SimpleNamespace
      >>> from compressx.federated import flower
      >>> finished = SimpleNamespace(status=lambda: (3, ()))  # an enclave that has closed three rounds
      >>> plan = flower.Plan((flower.messages.Layer("w", 2, 2),), {0: ("", 1)}, rounds=3)
      >>> server = flower.FederatedServer(finished, plan, flower.Algorithm(rounds=3), seed=0)
      >>> history, seconds = server.fit(num_rounds=3, timeout=None)  # Flower calls it; nothing is left to do
      >>> server.traffic.total
      0
    """

    def __init__(
        self,
        enclave: Aggregating,
        plan: Plan,
        alg: Algorithm,
        seed: int,
        deadline: float = 600.0,
        journal: str | Path | None = None,
        after: Callable[[int], None] = lambda round_: None,
    ) -> None:
        super().__init__(client_manager=flwr.server.SimpleClientManager())
        self.enclave, self.plan, self.alg, self.seed = enclave, plan, alg, seed
        self.deadline, self.after = deadline, after
        self.journal = Path(journal) if journal else None
        self.traffic = Traffic()
        self._lock = threading.Lock()
        self._numbers: dict[str, int] = {}  # Flower's connection -> client
        self._offers: dict[str, bytes] = {}
        # A thread for each connection, none of which is waited for: whoever is silent holds up nobody but itself.
        self._busy: dict[str, threading.Thread] = {}
        self._strikes: dict[str, int] = {}
        self._asked: set[str] = set()  # in this round, since their last hello

    def fit(self, num_rounds: int, timeout: float | None) -> tuple[Any, float]:
        """All rounds that the enclave has not closed yet; Flower calls this."""
        begin = time.monotonic()
        while (round_ := self.enclave.status()[0]) < self.plan.rounds:
            self._round(round_)
        return flwr.server.History(), time.monotonic() - begin

    def disconnect_all_clients(self, timeout: float | None) -> None:
        """Tells every client that it is over; waits for the silent no longer than `FAREWELL` seconds in all."""
        end = time.monotonic() + (FAREWELL if timeout is None else min(FAREWELL, timeout))
        threads = []
        for proxy in list(self.client_manager().all().values()):
            say = lambda proxy=proxy: proxy.reconnect(ReconnectIns(seconds=None), timeout=FAREWELL, group_id=None)
            threads.append(threading.Thread(target=_quietly, args=(say,), daemon=True))
            threads[-1].start()
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))

    def _start(self, cid: str, work: Callable[..., None], *args: Any) -> None:
        self._busy[cid] = threading.Thread(target=work, args=(cid, *args), daemon=True)
        self._busy[cid].start()

    def _round(self, round_: int) -> None:
        wanted = {int(c) for c in algorithm.participants(self.seed, self.alg, len(self.plan.roster), round_)}
        end = time.monotonic() + self.deadline
        self._asked.clear()
        while True:
            counted = set(self.enclave.status()[1])
            late = time.monotonic() > end
            if wanted <= counted or (late and len(counted) >= self.plan.quorum):
                break
            for cid, proxy in list(self.client_manager().all().items()):
                busy = self._busy.get(cid)
                if busy is not None and busy.is_alive():
                    continue
                if cid not in self._numbers and self._strikes.get(cid, 0) < 3:
                    self._start(cid, self._greet, proxy)
                elif self._numbers.get(cid) in wanted - counted and cid not in self._asked:
                    self._asked.add(cid)
                    self._start(cid, self._exchange, proxy, round_)
            time.sleep(0.02)
        closed = self.enclave.close()
        self._write(event="round", **closed._asdict(), bytes=vars(self.traffic).copy())
        self.after(round_)

    def _greet(self, cid: str, proxy: Any) -> None:
        """Hello and offer; the offer travels with the first model."""
        try:
            patience = min(GREETING, self.deadline)
            reply = proxy.get_properties(GetPropertiesIns({"op": "hello"}), timeout=patience, group_id=None)
            hello = reply.properties["hello"]
            offer = self.enclave.hello(hello)
        except (Refused, KeyError, TypeError) as error:
            self._strikes[cid] = self._strikes.get(cid, 0) + 1
            self._write(event="refused", what="hello", why=str(error))
            return
        except Exception as error:  # Flower raises bare exceptions for a client that has gone
            self._write(event="lost", what="hello", why=str(error))
            self._strikes[cid] = self._strikes.get(cid, 0) + 1
            return
        number = int.from_bytes(hello[4:8], "little")
        with self._lock:
            self.traffic.hello_up += len(hello)
            self.traffic.offer_down += len(offer)
            for other in [k for k, v in self._numbers.items() if v == number]:
                del self._numbers[other]  # its session is replaced
            self._numbers[cid], self._offers[cid] = number, offer
            self._asked.discard(cid)
        self._write(event="joined", client=number)

    def _exchange(self, cid: str, proxy: Any, round_: int) -> None:
        number = self._numbers.get(cid)
        if number is None:  # it said hello again over another connection
            return
        try:
            offer = self._offers.pop(cid, b"")
            frame = self.enclave.model(number)
            with self._lock:
                self.traffic.model_down += len(frame)
            ins = FitIns(Parameters([offer, frame], "compressx"), {})
            reply = proxy.fit(ins, timeout=self.deadline, group_id=round_)
            if reply.status.code != Code.OK:
                raise Refused("client", f"client {number} says: {reply.status.message}")
            update = reply.parameters.tensors[0]
            with self._lock:
                self.traffic.update_up += len(update)
            self.enclave.update(update)
        except Refused as error:
            self._write(event="refused", what="update", client=number, round=round_, why=str(error))
            if error.reason not in ("round", "counted"):
                self._numbers.pop(cid, None)  # a new session
                self._strikes[cid] = self._strikes.get(cid, 0) + 1
        except Exception as error:
            self._write(event="lost", what="update", client=number, round=round_, why=str(error)[:200])
            self._numbers.pop(cid, None)
            self._strikes[cid] = self._strikes.get(cid, 0) + 1

    def _write(self, **record: Any) -> None:
        log.info("%s", record)
        if self.journal is not None:
            with self._lock, open(self.journal, "a") as file:
                file.write(json.dumps(record) + "\n")


def _quietly(call: Callable[[], Any]) -> None:
    """A call whose failure is of no account: its client has gone."""
    try:
        call()
    except Exception as error:
        log.info("a client was not reached: %s", error)


def message_bytes(plan: Plan) -> int:
    """More than any message of a plan's federation takes: what the transport may hold of one connection.

    Args:
      plan: whose layers are sent.

    Returns:
      Bytes, `SPARE` for Flower's own among them.

    Example:
      >>> from compressx.federated import flower
      >>> plan = flower.Plan((flower.messages.Layer("w", 1000, 100),), {0: ("", 1)}, rounds=1)
      >>> flower.message_bytes(plan) > 4000  # a thousand floats
      True
    """
    return messages.largest_bytes(plan.layers) + SPARE


def serve(server: FederatedServer, address: str, certificates: Certificates) -> None:
    """Runs Flower's gRPC server over TLS until every round is closed; then tells the clients that it is over.

    Args:
      server: with its enclave and plan.
      address: `host:port`.
      certificates: whose server certificate names the host.

    Example:
      >>> import socket
      >>> from types import SimpleNamespace
      >>> from compressx.federated import flower, tls
      >>> finished = SimpleNamespace(status=lambda: (1, ()))  # an enclave that has closed the only round
      >>> plan = flower.Plan((flower.messages.Layer("w", 2, 2),), {0: ("", 1)}, rounds=1)
      >>> server = flower.FederatedServer(finished, plan, flower.Algorithm(rounds=1), seed=0)
      >>> with socket.create_server(("localhost", 0)) as free:
      ...     address = f"localhost:{free.getsockname()[1]}"
      >>> flower.serve(server, address, tls.make())
    """
    flwr.server.start_server(
        server_address=address,
        server=server,
        config=flwr.server.ServerConfig(num_rounds=server.plan.rounds, round_timeout=FAREWELL),
        grpc_max_message_length=message_bytes(server.plan),
        certificates=(certificates.authority, certificates.server, certificates.key),
    )


class FlowerClient(flwr.client.Client):
    """A Flower client that answers with a `Client`'s sealed bytes.

    A refusal goes back as text, without stopping the process.

    Args:
      client: with `hello` and `answer`.

    Example:
      >>> from types import SimpleNamespace
      >>> from compressx.federated.flower import FlowerClient
      >>> answering = FlowerClient(SimpleNamespace(hello=lambda: b"hello"))
      >>> answering.get_properties(None).properties, answering.calls
      ({'hello': b'hello'}, 1)
    """

    def __init__(self, client: Client) -> None:
        self.client, self.calls = client, 0

    def get_properties(self, ins: GetPropertiesIns) -> GetPropertiesRes:
        """The hello."""
        self.calls += 1
        return GetPropertiesRes(Status(Code.OK, ""), {"hello": self.client.hello()})

    def fit(self, ins: FitIns) -> FitRes:
        """The sealed update."""
        self.calls += 1
        try:
            offer, frame = ins.parameters.tensors
            update, status = [self.client.answer(offer or None, frame)], Status(Code.OK, "")
        except (Refused, ValueError) as error:
            log.warning("refused: %s", error)
            update, status = [], Status(Code.FIT_NOT_IMPLEMENTED, str(error))
        return FitRes(status, Parameters(update, "compressx"), 1, {})


def join(client: Client, address: str, authority: bytes, patience: float = 600.0) -> None:
    """Runs a client until the server says that it is over; a lost connection is tried again.

    Args:
      client: that answers.
      address: of the server, `host:port`.
      authority: PEM of the certificate that clients trust (`tls.Certificates.authority`).
      patience: seconds.

    Raises:
      ConnectionError: no server was there for `patience` seconds.

    Example:
      >>> from types import SimpleNamespace
      >>> from compressx.federated import flower, tls
      >>> plan = flower.Plan((flower.messages.Layer("w", 2, 2),), {0: ("", 1)}, rounds=1)
      >>> client = SimpleNamespace(hello=lambda: b"hello", plan=plan)  # a `Client` in earnest
      >>> try:
      ...     flower.join(client, "localhost:1", tls.make().authority, patience=0.0)
      ... except ConnectionError as error:
      ...     print(str(error).split(" for ")[0])
      no server at localhost:1
    """
    answering, calls, last = FlowerClient(client), 0, time.monotonic()
    while True:
        try:
            flwr.client.start_client(
                server_address=address,
                client=answering,
                root_certificates=authority,
                insecure=False,
                grpc_max_message_length=message_bytes(client.plan),
            )
            return
        except (grpc.RpcError, StopIteration) as error:
            if answering.calls != calls:  # there was a server meanwhile
                calls, last = answering.calls, time.monotonic()
            if time.monotonic() - last > patience:
                raise ConnectionError(f"no server at {address} for {patience:.0f} s: {error}") from error
            time.sleep(0.5)
