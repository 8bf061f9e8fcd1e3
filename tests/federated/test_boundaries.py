"""What stands between processes: files that hold secrets, requests of any length, plans that others hand out."""

import dataclasses
import io
import os
import struct
import threading
import warnings

import numpy as np
import pytest

from compressx.federated.host import Enclave, EnclaveStopped, Loopback
from compressx.federated.trusted import main, messages
from compressx.federated.trusted.refused import Refused
from configs import federated as configs
from experiments.common.driver import Options
from experiments.common.training import ConfigError
from experiments.federated import config as setup
from experiments.federated import nodes
from tests.federated import world

with warnings.catch_warnings():  # of libraries that flwr imports
    warnings.simplefilter("ignore", DeprecationWarning)
    from compressx.federated import flower


def test_what_a_client_remembers_is_sealed_and_for_its_plan_alone(tmp_path) -> None:
    w = world.make(tmp_path / "w", sparsify="update", density=world.DENSITY)
    aggregator, own = w.aggregator(), tmp_path / "own"
    first = w.client(0, folder=own)
    Loopback(aggregator, {0: first}).exchange(0)
    (file,) = own.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    data, update = file.read_bytes(), first._pending.payload
    assert update not in data and update[64:128] not in data
    again = w.client(0, folder=own)
    assert again._pending == first._pending and again._seen == first._seen
    np.testing.assert_equal(again._memory, first._memory)
    other = dataclasses.replace(w, plan=dataclasses.replace(w.plan, quorum=2))
    for attempt in (
        lambda: other.client(0, folder=own),
        lambda: w.client(0, folder=own, identity=w.identities[1]),
    ):
        with pytest.raises(Refused, match="was changed, or is of another plan or identity"):
            attempt()
    for at in (0, len(data) // 2, len(data) - 1):
        bad = bytearray(data)
        bad[at] ^= 1
        file.write_bytes(bytes(bad))
        with pytest.raises(Refused, match="sealed"):
            w.client(0, folder=own)
    file.write_bytes(data[:20])
    with pytest.raises(Refused, match="sealed"):
        w.client(0, folder=own)


class Endless(io.RawIOBase):
    """A stream that claims a payload of 2^30 bytes, and keeps count of what is asked of it in one piece."""

    def __init__(self) -> None:
        self.left, self.largest, self.head = 2**30, 0, struct.pack("<IB", 2**30, main.HELLO)

    def read(self, n: int = -1) -> bytes:
        if self.head:
            out, self.head = self.head[:n], self.head[n:]
            return out
        self.largest = max(self.largest, n)
        took = min(n, self.left, 2**20)
        self.left -= took
        return bytes(took)


def test_a_request_is_refused_before_it_is_held_in_memory() -> None:
    stream = Endless()
    with pytest.raises(Refused, match="a request of 1073741824 bytes"):
        main.read_frame(stream, lambda kind: main.SMALL)
    assert stream.largest <= 2**16 and stream.left == 0
    assert main.read_frame(io.BytesIO(struct.pack("<IB", 3, 1) + b"abc"), lambda kind: 3) == (1, b"abc")


def test_the_aggregator_outlives_requests_of_any_length(tmp_path) -> None:
    w = world.make(tmp_path / "w")
    with Enclave(tmp_path / "enclave", w.plan, w.initial, simulated=True) as enclave:
        with pytest.raises(Refused, match="size"):
            enclave.hello(bytes(10_000))
        for operation in (main.HELLO, main.CLOSE, main.UPDATE, 99):
            with pytest.raises(Refused, match="size|structure|round"):
                enclave._ask(operation, bytes(messages.largest_bytes(w.plan.layers) + 2 * main.SMALL))
        assert enclave.status() == (0, ())
        enclave._process.kill()
        enclave._process.wait()
        with pytest.raises(EnclaveStopped, match="the aggregator ended"):  # and not a broken pipe
            enclave.status()


def test_a_client_joins_no_other_plan_than_its_own(tmp_path) -> None:
    settings = configs.get_config("digits_tiny")
    config, options = setup.read(settings), Options(tmp_path)
    setting = setup.make(config, options)
    plan = setup.make_plan(config, config.algorithm, setting)
    nodes.agreed(plan, config, setting)
    changes = {"quorum": plan.quorum + 1, "rounds": plan.rounds + 1, "release": not plan.release, "initial": "00"}
    for name, value in changes.items():
        with pytest.raises(ConfigError, match=rf"plan.json has {name}=.*joins no other plan"):
            nodes.agreed(dataclasses.replace(plan, **{name: value}), config, setting)
    fewer = dataclasses.replace(plan, roster={k: v for k, v in plan.roster.items() if k})
    with pytest.raises(ConfigError, match="roster"):
        nodes.agreed(fewer, config, setting)


class Silent:
    """A connection that never answers."""

    def __init__(self) -> None:
        self.cid, self.asked = os.urandom(4).hex(), threading.Event()

    def _hang(self, *_: object, **__: object) -> None:
        self.asked.set()
        threading.Event().wait()

    get_properties = fit = reconnect = _hang


class Honest(Silent):
    """A client in this process, behind Flower's calls."""

    def __init__(self, client) -> None:
        super().__init__()
        self._client = flower.FlowerClient(client)

    def get_properties(self, ins, timeout, group_id):
        return self._client.get_properties(ins)

    def fit(self, ins, timeout, group_id):
        return self._client.fit(ins)

    def reconnect(self, ins, timeout, group_id):
        return None


def test_silent_connections_hold_up_nobody(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(flower, "FAREWELL", 0.5)
    w = world.make(tmp_path / "w", rounds=1, quorum=3)
    server = flower.FederatedServer(w.aggregator(), w.plan, w.alg, world.SEED, deadline=60.0)
    silent = [Silent() for _ in range(8)]
    for connection in [*silent, *(Honest(c) for c in w.clients().values())]:
        server.client_manager().register(connection)
    done = threading.Thread(target=server.fit, args=(1, None), daemon=True)
    done.start()
    done.join(120)
    assert not done.is_alive() and server.enclave.status()[0] == 1
    assert all(s.asked.is_set() for s in silent)
    farewell = threading.Thread(target=server.disconnect_all_clients, args=(None,), daemon=True)
    farewell.start()
    farewell.join(20)
    assert not farewell.is_alive()


def test_an_enrolled_client_that_falls_silent_does_not_keep_a_round_from_its_end(tmp_path) -> None:
    w = world.make(tmp_path / "w", rounds=1, quorum=3)
    server = flower.FederatedServer(w.aggregator(), w.plan, w.alg, world.SEED, deadline=3.0)
    clients = w.clients()
    mute = Honest(clients.pop(3))
    mute.fit = mute._hang
    for connection in [mute, *(Honest(c) for c in clients.values())]:
        server.client_manager().register(connection)
    done = threading.Thread(target=server.fit, args=(1, None), daemon=True)
    done.start()
    done.join(120)
    assert not done.is_alive() and server.enclave.status()[0] == 1


def test_private_keys_are_made_where_the_clients_are(tmp_path) -> None:
    settings = configs.get_config("digits_tiny")
    config, options = setup.read(settings), Options(tmp_path / "server")
    count = config.split.clients
    for number in range(count):
        nodes.enroll(tmp_path / f"client{number}", number)
        secret = tmp_path / f"client{number}" / "clients" / str(number) / "identity.key"
        assert secret.stat().st_mode & 0o777 == 0o600
    public = lambda where, number: where / "public" / "keys" / f"{number}.hex"
    for number in range(count):
        with pytest.raises(ConfigError, match=f"{number}.hex does not exist: run --role=enroll --number={number}"):
            nodes.make_plan(config, options, "localhost", True)
        public(options.workdir, number).parent.mkdir(parents=True, exist_ok=True)
        public(options.workdir, number).write_bytes(public(tmp_path / f"client{number}", number).read_bytes())
    nodes.make_plan(config, options, "localhost", True)
    assert not (options.workdir / "clients").exists()  # the server holds no client's key
    plan = nodes.read_plan(options.workdir)
    keys = [plan.roster[number][0] for number in range(count)]
    nodes.enroll(tmp_path / "client0", 0)  # again: the same key
    assert keys == [public(tmp_path / f"client{number}", number).read_text() for number in range(count)]
    public(options.workdir, 0).write_text("not a key")
    with pytest.raises(ConfigError, match="holds no public key"):
        nodes.enrolled(options.workdir, count)
