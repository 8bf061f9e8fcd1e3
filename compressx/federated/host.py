"""The host: carries sealed bytes between clients and the enclave, and counts them. It holds no key and no plaintext.

`Enclave` is the aggregator in a process of its own. `Loopback` drives a round without any network: the same calls, the
same bytes; a network engine replaces only the carrying.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from compressx.federated.trusted import main as process
from compressx.federated.trusted.refused import Refused
from compressx.federated.trusted.rounds import Closed, Plan

Array = npt.NDArray[Any]

PATIENCE = 60.0  # seconds for an aggregator to finish the request that it is at


class Aggregating(Protocol):
    """What a host may ask of an aggregator, in its process or elsewhere.

    Example:
      >>> from compressx.federated.host import Enclave
      >>> from compressx.federated.trusted.aggregator import Aggregator
      >>> asked = ("hello", "model", "update", "close", "status", "release")
      >>> all(hasattr(kind, name) for kind in (Aggregator, Enclave) for name in asked)
      True
    """

    def hello(self, data: bytes) -> bytes: ...
    def model(self, client: int) -> bytes: ...
    def update(self, frame: bytes) -> int: ...
    def close(self) -> Closed: ...
    def status(self) -> tuple[int, tuple[int, ...]]: ...
    def release(self) -> list[Array]: ...


class EnclaveStopped(RuntimeError):
    """The aggregator's process ended; its last words are in the message.

    Example:
      >>> from compressx.federated.host import Enclave, EnclaveStopped
      >>> from compressx.federated.trusted.messages import Layer
      >>> from compressx.federated.trusted.rounds import Plan
      >>> with Enclave("run", Plan((Layer("w", 2, 2),), {0: ("", 1)}, 1), [np.zeros(2)], simulated=True) as enclave:
      ...     try:
      ...         enclave.status()
      ...     except EnclaveStopped as error:
      ...         print(error)
      the aggregator ended (code 3): policy: the first model is not the one the plan names
    """


class Enclave:
    """The aggregator's process; the same methods as `trusted.aggregator.Aggregator`.

    Args:
      folder: gets `plan.json`, `initial.bin`, the sealed state and the counter.
      plan: the plan.
      initial: the first model's layers.
      simulated: SIMULATED machine instead of SGX.
      command: what runs the process; for SGX `("gramine-sgx", "aggregator")`.

    Raises:
      EnclaveStopped: by any call, where the process has ended.
      Refused: by any call, as `Aggregator` says.

    Example:
      >>> from compressx.federated.host import Enclave
      >>> from compressx.federated.trusted import messages, rounds
      >>> first = [np.zeros(2, np.float32)]
      >>> hash_ = rounds.model_hash(first).hex()
      >>> plan = rounds.Plan((messages.Layer("w", 2, 2),), {0: ("", 1)}, rounds=1, initial=hash_)
      >>> with Enclave("run", plan, first, simulated=True) as enclave:
      ...     print(enclave.status(), "jax" in enclave.loaded())
      (0, ()) False
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Plan,
        initial: Sequence[Array],
        *,
        simulated: bool = False,
        command: Sequence[str] | None = None,
    ) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.json").write_bytes(plan.to_bytes())
        (folder / "initial.bin").write_bytes(b"".join(np.ascontiguousarray(x, "<f4").tobytes() for x in initial))
        self._sizes = [layer.size for layer in plan.layers]
        self.simulated = simulated
        self.machine = folder / "machine.simulated"
        flags = [f"--plan={folder / 'plan.json'}", f"--initial={folder / 'initial.bin'}"]
        flags += [f"--state={folder / 'sealed'}", f"--counter={folder / 'counter'}"]
        flags += [f"--simulated={self.machine}"] if simulated else []
        if command is None:
            command = (sys.executable, "-m", process.__name__)
        self._log = open(folder / "enclave.log", "ab")
        self._process = subprocess.Popen(
            [*command, *flags],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, "PYTHONPATH": str(Path(process.__file__).parents[3])},
        )
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def _ask(self, operation: int, payload: bytes = b"") -> bytes:
        with self._lock:
            assert self._process.stdin is not None and self._process.stdout is not None
            try:
                process.write_frame(self._process.stdin, operation, payload)
                reply = process.read_frame(self._process.stdout)
            except OSError:
                reply = None
        if reply is None:
            last = Path(self._log.name).read_text(errors="replace").strip().splitlines()[-1:]
            raise EnclaveStopped(f"the aggregator ended (code {self._process.wait()}): {' '.join(last)}")
        status, answer = reply
        if status:
            reason, _, text = answer.decode().partition(": ")
            raise Refused(reason, text)
        return answer

    def hello(self, data: bytes) -> bytes:
        """See `Aggregator.hello`."""
        if len(data) > process.SMALL:
            raise Refused("size", f"a hello of {len(data)} bytes")
        return self._ask(process.HELLO, data)

    def model(self, client: int) -> bytes:
        """See `Aggregator.model`."""
        return self._ask(process.MODEL, client.to_bytes(4, "little"))

    def update(self, frame: bytes) -> int:
        """See `Aggregator.update`."""
        return int.from_bytes(self._ask(process.UPDATE, frame), "little")

    def close(self) -> Closed:
        """See `Aggregator.close`."""
        fields = json.loads(self._ask(process.CLOSE))
        return Closed(**(fields | {"clients": tuple(fields["clients"])}))

    def status(self) -> tuple[int, tuple[int, ...]]:
        """See `Aggregator.status`."""
        number, clients = json.loads(self._ask(process.STATUS))
        return number, tuple(clients)

    def release(self) -> list[Array]:
        """See `Aggregator.release`."""
        flat = np.frombuffer(self._ask(process.RELEASE), "<f4").copy()
        return np.split(flat, np.cumsum(self._sizes)[:-1])

    def loaded(self) -> list[str]:
        """The modules that the process has loaded."""
        return list(json.loads(self._ask(process.LOADED)))

    def stop(self) -> None:
        """Ends the process; its sealed state stays."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has ended already, and what ended it is the error to tell
                self._process.stdin.close()
        try:
            self._process.wait(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def kill(self) -> None:
        """Ends the process as a crash would."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            if stream is not None:
                stream.close()

    def __enter__(self) -> "Enclave":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass
class Traffic:
    """Bytes of our messages as the transport carried them, by direction and purpose.

    Attributes:
      hello_up: of hellos, from clients.
      offer_down: of offers, to clients.
      model_down: of sealed models.
      update_up: of sealed updates.

    Example:
      >>> from compressx.federated.host import Traffic
      >>> Traffic(hello_up=100, offer_down=900, model_down=4000, update_up=400).total
      5400
    """

    hello_up: int = 0
    offer_down: int = 0
    model_down: int = 0
    update_up: int = 0

    @property
    def total(self) -> int:
        """All of them."""
        return self.hello_up + self.offer_down + self.model_down + self.update_up


class _Answering(Protocol):
    """A client as the host sees it."""

    def hello(self) -> bytes: ...
    def answer(self, offer: bytes | None, frame: bytes) -> bytes: ...


class Loopback:
    """Rounds without a network: each message is handed over in this process, and counted.

    Args:
      enclave: the aggregator.
      clients: number -> client, each with `hello` and `answer`.

    Attributes:
      sessions: the clients that have one.
      traffic: bytes so far.

    Example:
      >>> from types import SimpleNamespace
      >>> from compressx.federated.host import Loopback
      >>> mute = {"status": lambda: (0, ()), "hello": lambda data: b"offer", "model": lambda number: b"model"}
      >>> aggregator = SimpleNamespace(**mute, update=len, close=lambda: "closed")  # an `Aggregator` in earnest
      >>> client = SimpleNamespace(hello=lambda: b"hello", answer=lambda offer, frame: b"update")
      >>> loop = Loopback(aggregator, {0: client})
      >>> loop.round([0]), loop.traffic
      ('closed', Traffic(hello_up=5, offer_down=5, model_down=5, update_up=6))
    """

    def __init__(self, enclave: Aggregating, clients: Mapping[int, _Answering]) -> None:
        self.enclave, self.clients = enclave, dict(clients)
        self.sessions: set[int] = set()
        self.traffic = Traffic()

    def exchange(self, number: int) -> None:
        """Handshake where there is none, model down, update up."""
        client, offer = self.clients[number], None
        if number not in self.sessions:
            hello = client.hello()
            offer = self.enclave.hello(hello)
            self.traffic.hello_up += len(hello)
            self.traffic.offer_down += len(offer)
            self.sessions.add(number)
        frame = self.enclave.model(number)
        self.traffic.model_down += len(frame)
        update = client.answer(offer, frame)
        self.traffic.update_up += len(update)
        self.enclave.update(update)

    def round(self, numbers: Sequence[int]) -> Closed:
        """Every client in turn that is not counted yet, then the round is closed."""
        counted = self.enclave.status()[1]
        for number in numbers:
            if number not in counted:
                self.exchange(int(number))
        return self.enclave.close()
