"""Every attack on a running federation is refused before a decrypted value is used."""

import gc
import shutil
import struct

import numpy as np
import pytest

from compressx.federated.host import Loopback
from compressx.federated.trusted import attest, messages, sessions
from compressx.federated.trusted.aggregator import Aggregator
from compressx.federated.trusted.quotes import Policy
from compressx.federated.trusted.refused import Refused
from compressx.federated.trusted.sealing import NOTHING, FileCounter
from compressx.federated.trusted.sessions import NEVER, Hello
from tests.federated import world


class Cheap:
    """A client without JAX: a real session, and an update that is all ones times its number."""

    def __init__(self, w: world.World, number: int, verifier=None) -> None:
        self.w, self.number, self.verifier = w, number, verifier or w.verifier()
        self.session: sessions.Session | None = None

    def hello(self, seen=(NEVER, bytes(32)), identity=None) -> bytes:
        self.private, key = sessions.fresh_key()
        hello = Hello(self.number, sessions.fresh_nonce(), key, *seen)
        self.said = sessions.write_hello(hello, identity or self.w.identities[self.number])
        return self.said

    def accept(self, data: bytes) -> None:
        offer = sessions.read_offer(data)
        bound = sessions.binding(self.said, offer.session, offer.key, self.w.plan.hash())
        report = self.verifier.verify(offer.quote, bound)
        self.session = sessions.derive(
            self.private, offer.key, self.said, offer, report.measurement, self.number, False
        )

    def message(self, value: float | None = None) -> bytes:
        layout = self.w.plan.open_layout()
        ones = [np.full(x.size, value if value is not None else self.number + 1.0, np.float32) for x in layout]
        return messages.write(ones, layout, kind=messages.UPDATE)

    def answer(self, offer: bytes | None, frame: bytes, payload: bytes | None = None) -> bytes:
        if offer is not None:
            self.accept(offer)
        assert self.session is not None
        number, state, _ = self.session.open(frame, None, None, 2**24)
        return self.session.seal(number, state, payload or self.message())


def joined(w: world.World, aggregator, number: int) -> Cheap:
    client = Cheap(w, number)
    client.accept(aggregator.hello(client.hello()))
    return client


def reason(call) -> str:
    with pytest.raises(Refused) as caught:
        call()
    return caught.value.reason


@pytest.fixture
def federation(tmp_path):
    w = world.make(tmp_path, quorum=2, release=True)
    return w, w.aggregator()


def untouched(aggregator, w) -> bool:
    """Whether nothing has been counted and the model is as it was."""
    same = all(np.array_equal(a, b.reshape(-1)) for a, b in zip(aggregator.release(), w.initial, strict=True))
    return same and aggregator.status() == (0, ())


def test_flipped_bits_in_updates(federation) -> None:
    w, aggregator = federation
    client = joined(w, aggregator, 1)
    frame = client.answer(None, aggregator.model(1))
    for at in [0, 4, 5, 6, 8, 12, 16, 20, 28, 29, len(frame) // 2, len(frame) - 17, len(frame) - 1]:
        bad = bytearray(frame)
        bad[at] ^= 4
        with pytest.raises(Refused):
            aggregator.update(bytes(bad))
    assert untouched(aggregator, w)
    assert aggregator.update(frame) == 1  # the session still stands, and the honest frame counts


def test_flipped_bits_in_models(federation) -> None:
    w, aggregator = federation
    client = joined(w, aggregator, 1)
    frame = aggregator.model(1)
    for at in [0, 4, 5, 8, 12, 16, 28, 40, 70, len(frame) - 1]:
        bad = bytearray(frame)
        bad[at] ^= 1
        with pytest.raises(Refused):
            client.answer(None, bytes(bad))


def test_truncated_and_oversized_frames(federation) -> None:
    w, aggregator = federation
    client = joined(w, aggregator, 1)
    frame = client.answer(None, aggregator.model(1))
    assert reason(lambda: aggregator.update(frame[:23])) == "size"
    assert reason(lambda: aggregator.update(frame[:39])) == "size"
    assert reason(lambda: aggregator.update(frame[:-1])) == "decryption"
    assert reason(lambda: aggregator.update(frame + bytes(10**7))) == "size"
    assert untouched(aggregator, w)


def test_a_replayed_update_is_counted_once(federation) -> None:
    w, aggregator = federation
    client = joined(w, aggregator, 1)
    frame = client.answer(None, aggregator.model(1))
    aggregator.update(frame)
    assert reason(lambda: aggregator.update(frame)) == "sequence"
    again = client.answer(None, aggregator.model(1))  # a new frame of the same round
    assert reason(lambda: aggregator.update(again)) == "counted"
    fresh = joined(w, aggregator, 1)  # even through a new session
    assert reason(lambda: aggregator.update(fresh.answer(None, aggregator.model(1)))) == "counted"
    assert aggregator.status() == (0, (1,))


def test_a_late_update_of_a_closed_round(federation) -> None:
    w, aggregator = federation
    clients = {k: joined(w, aggregator, k) for k in range(3)}
    late = clients[2].answer(None, aggregator.model(2))
    for k in (0, 1):
        aggregator.update(clients[k].answer(None, aggregator.model(k)))
    assert aggregator.close().clients == (0, 1)
    assert reason(lambda: aggregator.update(late)) == "round"
    assert aggregator.status() == (1, ())


def test_an_update_relabelled_as_another_round_does_not_open(federation) -> None:
    w, aggregator = federation
    clients = {k: joined(w, aggregator, k) for k in range(3)}
    late = bytearray(clients[2].answer(None, aggregator.model(2)))
    for k in (0, 1):
        aggregator.update(clients[k].answer(None, aggregator.model(k)))
    aggregator.close()
    struct.pack_into("<I", late, 12, 1)
    assert reason(lambda: aggregator.update(bytes(late))) == "decryption"


def test_one_client_as_another(federation) -> None:
    w, aggregator = federation
    one, _two = joined(w, aggregator, 1), joined(w, aggregator, 2)
    frame = bytearray(one.answer(None, aggregator.model(1)))
    struct.pack_into("<I", frame, 8, 2)  # in client 2's session
    assert reason(lambda: aggregator.update(bytes(frame))) == "decryption"
    struct.pack_into("<I", frame, 8, 3)  # who has none
    assert reason(lambda: aggregator.update(bytes(frame))) == "session"
    assert untouched(aggregator, w)


def test_the_host_cannot_hand_one_client_the_frame_of_another(federation) -> None:
    w, aggregator = federation
    one, _two = joined(w, aggregator, 1), joined(w, aggregator, 2)
    assert reason(lambda: one.answer(None, aggregator.model(2))) == "client"


def test_strangers_and_stolen_numbers(federation) -> None:
    w, aggregator = federation
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    stranger = Cheap(w, 1)
    assert reason(lambda: aggregator.hello(stranger.hello(identity=Ed25519PrivateKey.generate()))) == "signature"
    stranger.number = 9
    assert reason(lambda: aggregator.hello(stranger.hello(identity=w.identities[1]))) == "client"
    assert reason(lambda: aggregator.hello(b"x" * 500)) == "size"
    assert reason(lambda: aggregator.hello(bytes(sessions.HELLO_BYTES))) == "structure"


def test_a_replayed_hello(federation) -> None:
    w, aggregator = federation
    client = Cheap(w, 1)
    hello = client.hello()
    client.accept(aggregator.hello(hello))
    assert reason(lambda: aggregator.hello(hello)) == "session"
    assert aggregator.update(client.answer(None, aggregator.model(1))) == 1  # the session was not disturbed


def test_a_replayed_quote(federation) -> None:
    w, aggregator = federation
    first = Cheap(w, 1)
    old = aggregator.hello(first.hello())
    second = Cheap(w, 1)
    second.hello()
    assert reason(lambda: second.accept(old)) == "binding"


def test_keys_swapped_by_the_host(federation) -> None:
    w, aggregator = federation
    client = Cheap(w, 1)
    offer = bytearray(aggregator.hello(client.hello()))
    _, key = sessions.fresh_key()
    offer[20:52] = key  # man in the middle: its own key under the enclave's quote
    assert reason(lambda: client.accept(bytes(offer))) == "binding"
    hello = bytearray(client.hello())
    hello[40:72] = key
    assert reason(lambda: aggregator.hello(bytes(hello))) == "signature"


def test_a_key_of_low_order(federation) -> None:
    w, aggregator = federation
    client = Cheap(w, 1)
    client.private, _ = sessions.fresh_key()
    hello = sessions.write_hello(Hello(1, sessions.fresh_nonce(), bytes(32), NEVER, bytes(32)), w.identities[1])
    assert reason(lambda: aggregator.hello(hello)) == "binding"


@pytest.mark.parametrize(("attester", "why"), [
    ({"measurement": b"x" * 32}, "measurement"),
    ({"measurement": b"m" * 32, "debug": True}, "debug"),
])  # fmt: skip
def test_wrong_and_debug_enclaves(tmp_path, attester, why: str) -> None:
    w = world.make(tmp_path)
    theirs = attest.SimulatedAttester(secret=b"s", identity=w.attester.identity(), **attester)
    aggregator, client = w.aggregator(attester=theirs), w.client(1)
    offer = aggregator.hello(client.hello())
    assert reason(lambda: client.answer(offer, aggregator.model(1))) == why
    assert client._session is None  # the model was never opened


def test_an_enclave_with_another_plan(tmp_path) -> None:
    w = world.make(tmp_path)
    other = world.make(tmp_path / "other", rounds=3)
    aggregator, client = other.aggregator(), w.client(1)
    offer = aggregator.hello(client.hello())
    assert reason(lambda: client.answer(offer, aggregator.model(1))) == "policy"


def test_a_production_client_refuses_a_simulated_enclave(tmp_path) -> None:
    from tests.federated.test_quotes import Machine

    w = world.make(tmp_path)
    production = Machine().verifier(Policy(w.attester.measurement()))
    aggregator, client = w.aggregator(), w.client(1, verifier=production)
    offer = aggregator.hello(client.hello())
    assert reason(lambda: client.answer(offer, aggregator.model(1))) == "structure"


def test_an_offer_is_good_once(federation) -> None:
    w, aggregator = federation
    client = w.client(1)
    offer = aggregator.hello(client.hello())
    client.attest(offer)
    assert reason(lambda: client.attest(offer)) == "session"
    assert reason(lambda: client.attest(b"CXO1" + bytes(200))) == "session"
    client.hello()
    assert reason(lambda: client.attest(b"CXO1" + bytes(200))) == "structure"
    client.hello()
    assert reason(lambda: client.attest(offer + bytes(9000))) == "size"


MALFORMED = {
    "not a message": b"garbage",
    "another model's": messages.write([np.ones(3, np.float32)], [messages.Layer("w", 3, 3)], kind=messages.UPDATE),
}


@pytest.mark.parametrize("name", [*MALFORMED, "NaN", "weights instead of an update", "a bomb"])
def test_malformed_messages_from_an_enrolled_client(federation, name: str) -> None:
    w, aggregator = federation
    client = joined(w, aggregator, 1)
    good = client.message()
    if name == "NaN":
        payload = good[:-4] + struct.pack("<f", float("nan"))
    elif name == "weights instead of an update":
        payload = good[:4] + b"\x00" + good[5:]
    elif name == "a bomb":
        payload = good[:13] + struct.pack("<I", 2**31) + good[17:]
    else:
        payload = MALFORMED[name]
    frame = client.answer(None, aggregator.model(1), payload)
    assert reason(lambda: aggregator.update(frame)) in ("message", "size")
    assert untouched(aggregator, w)
    assert not list((w.folder / "sealed").glob("update-*"))


def test_clients_drop_out_and_the_weights_are_of_those_who_stayed(federation) -> None:
    w, aggregator = federation
    for k in (0, 2):
        client = joined(w, aggregator, k)
        aggregator.update(client.answer(None, aggregator.model(k)))
    assert aggregator.close().clients == (0, 2)
    n = [len(part) for part in w.split]
    mean = (n[0] * 1.0 + n[2] * 3.0) / (n[0] + n[2])
    for a, b in zip(aggregator.release(), w.initial, strict=True):
        np.testing.assert_allclose(a, b.reshape(-1) + mean, rtol=1e-6)


def test_a_round_without_its_quorum_does_not_close(federation) -> None:
    w, aggregator = federation
    client = joined(w, aggregator, 0)
    aggregator.update(client.answer(None, aggregator.model(0)))
    assert reason(aggregator.close) == "round"


# -- killed and started again; a hostile disk --------------------------------------------------------------------------


def test_a_killed_aggregator_has_lost_and_doubled_nothing(federation) -> None:
    w, aggregator = federation
    loop = Loopback(aggregator, {k: Cheap(w, k) for k in range(4)})
    loop.round(range(4))
    for k in (0, 3):
        loop.exchange(k)
    uninterrupted = [x.copy() for x in aggregator.release()]
    del aggregator
    again = w.aggregator()  # nothing but the disk
    assert again.status() == (1, (0, 3))
    assert all(np.array_equal(a, b) for a, b in zip(again.release(), uninterrupted, strict=True))
    client = joined(w, again, 3)
    assert reason(lambda: again.update(client.answer(None, again.model(3)))) == "counted"
    loop = Loopback(again, {k: Cheap(w, k) for k in range(4)})
    assert loop.round(range(4)).clients == (0, 1, 2, 3)
    n = np.array([len(part) for part in w.split])
    mean = float(np.sum(n * np.arange(1, 5)) / n.sum())
    for a, b in zip(again.release(), w.initial, strict=True):
        np.testing.assert_allclose(a, b.reshape(-1) + 2 * mean, rtol=1e-5)


def test_frames_of_before_the_kill_are_worth_nothing(federation) -> None:
    w, aggregator = federation
    client = joined(w, aggregator, 1)
    frame = client.answer(None, aggregator.model(1))
    again = w.aggregator()
    assert reason(lambda: again.update(frame)) == "session"
    joined(w, again, 1)
    assert reason(lambda: again.update(frame)) == "decryption"


def test_an_older_state_is_refused(federation) -> None:
    w, aggregator = federation
    sealed = w.folder / "sealed"
    old = {p.name: p.read_bytes() for p in sealed.iterdir()}
    loop = Loopback(aggregator, {k: Cheap(w, k) for k in range(4)})
    loop.round(range(4))
    loop.round(range(4))
    for path in sealed.iterdir():
        path.unlink()
    assert reason(w.aggregator) == "rollback"  # everything gone
    for name, data in old.items():
        (sealed / name).write_bytes(data)
    assert reason(w.aggregator) == "rollback"  # an old state in its place


@pytest.mark.parametrize("restarted", [False, True])
def test_of_two_aggregators_on_copies_of_one_state_one_closes_the_round(tmp_path, restarted) -> None:
    """Else the difference of the two models that they release would be one victim's update."""
    w = world.make(tmp_path, rounds=2, quorum=2, release=True)
    w.aggregator()
    shutil.copytree(w.folder / "sealed", w.folder / "copy")
    counter = FileCounter(w.folder / "counter")
    fork = lambda: Aggregator(w.plan, w.initial, w.attester, w.folder / "copy", counter)
    first, second = w.aggregator(), fork()
    Loopback(first, {k: Cheap(w, k) for k in (0, 1, 2)}).round([0, 1, 2])
    if restarted:
        assert reason(fork) == "rollback"
        return
    attack = Loopback(second, {k: Cheap(w, k) for k in (0, 1)})
    assert reason(lambda: attack.round([0, 1])) == "rollback"
    assert second.status()[0] == 0 and reason(second.close) == "rollback"
    for released, initial in zip(second.release(), w.initial, strict=True):
        np.testing.assert_array_equal(released, initial.reshape(-1))
    assert reason(fork) == "rollback"  # nor from what it had written before it was refused


def test_a_counter_moves_by_compare_and_swap_alone(tmp_path) -> None:
    counter, a, b = FileCounter(tmp_path / "counter"), (1, b"a" * 32), (1, b"b" * 32)
    assert counter.read() == NOTHING
    counter.swap(NOTHING, a)
    assert counter.read() == a and reason(lambda: counter.swap(NOTHING, b)) == "rollback"
    assert reason(lambda: counter.swap(b, (2, b"c" * 32))) == "rollback" and counter.read() == a
    for text in ("", "2", "x y", "0 " + "00" * 32, "2 " + "zz" * 32, "2 00"):
        (tmp_path / "counter").write_text(text)
        assert reason(counter.read) == "rollback"


def test_a_turned_back_counter_is_noticed_by_clients(federation) -> None:
    w, aggregator = federation
    sealed, counter = w.folder / "sealed", w.folder / "counter"
    old, stood = {p.name: p.read_bytes() for p in sealed.iterdir()}, counter.read_bytes()
    clients = w.clients()
    loop = Loopback(aggregator, clients)
    loop.round(range(4))
    loop.round([0, 1])
    for path in sealed.iterdir():
        path.unlink()
    for name, data in old.items():
        (sealed / name).write_bytes(data)
    counter.write_bytes(stood)
    forked = w.aggregator()
    assert forked.status() == (0, ())
    assert reason(lambda: forked.hello(clients[0].hello())) == "rollback"


def test_sealed_records_cannot_be_changed_or_moved(federation) -> None:
    w, aggregator = federation
    for k in (0, 1):
        client = joined(w, aggregator, k)
        aggregator.update(client.answer(None, aggregator.model(k)))
    paths = sorted((w.folder / "sealed").glob("update-*"))
    first, second = (p.read_bytes() for p in paths)
    paths[0].write_bytes(second)  # one client's update as another's
    assert reason(w.aggregator) == "sealed"
    paths[0].write_bytes(first[:-1] + bytes([first[-1] ^ 1]))
    assert reason(w.aggregator) == "sealed"
    paths[0].write_bytes(first)
    assert w.aggregator().status() == (0, (0, 1))
    other = attest.SimulatedAttester(b"z" * 32, b"s" * 32)
    assert reason(lambda: w.aggregator(attester=other)) == "sealed"  # another measurement
    (state,) = (w.folder / "sealed").glob("state-*")
    state.write_bytes(b"junk")
    assert reason(w.aggregator) == "sealed"


def test_nothing_in_the_clear_lies_on_the_disk(federation) -> None:
    w, aggregator = federation
    client = joined(w, aggregator, 1)
    aggregator.update(client.answer(None, aggregator.model(1)))
    plain = np.full(64, 2.0, "<f4").tobytes()
    assert plain in client.message()
    for path in (w.folder / "sealed").iterdir():
        assert plain not in path.read_bytes()


def test_a_model_that_the_plan_does_not_name(tmp_path) -> None:
    w = world.make(tmp_path)
    w.model = {"params": {k: {n: x + 1 for n, x in v.items()} for k, v in w.model["params"].items()}}
    assert reason(w.aggregator) == "policy"


def test_the_model_is_released_only_where_the_plan_says_so(tmp_path) -> None:
    assert reason(world.make(tmp_path).aggregator().release) == "policy"


# -- clients that crash ------------------------------------------------------------------------------------------------


def test_a_client_that_crashed_while_sending_sends_the_same_again(tmp_path) -> None:
    w = world.make(tmp_path, sparsify="update", density=world.DENSITY, release=True)
    aggregator, memory = w.aggregator(), tmp_path / "client"
    client = w.client(1, folder=memory)
    first = client.answer(aggregator.hello(client.hello()), aggregator.model(1))
    message, left = client._pending.payload, client._memory
    del client, first  # lost on the way
    again = w.client(1, folder=memory)
    aggregator.update(again.answer(aggregator.hello(again.hello()), aggregator.model(1)))
    assert again._pending.payload == message and again.seconds["train"] == 0.0
    assert all(np.array_equal(a, b) for a, b in zip(again._memory, left, strict=True))
    assert aggregator.status() == (0, (1,))


def test_an_update_that_was_never_counted_goes_back_into_the_memory(tmp_path) -> None:
    w = world.make(tmp_path, sparsify="update", density=world.DENSITY)
    aggregator, clients = w.aggregator(), w.clients()
    loop = Loopback(aggregator, clients)
    lost = clients[3]
    offer = aggregator.hello(lost.hello())
    lost.answer(offer, aggregator.model(3))  # never arrives
    sent = [
        messages.to_dense(p, x.size)
        for p, x in zip(messages.parse(lost._pending.payload, w.plan.layers).pieces, w.plan.layers, strict=True)
    ]
    limited = [k for k, x in enumerate(w.plan.layers) if x.budget < x.size]
    left = [m.copy() for m in lost._memory]
    loop.round([0, 1, 2])
    lost._settle(0)
    for m, before, k in zip(lost._memory, left, limited, strict=True):
        np.testing.assert_array_equal(m, before + sent[k].reshape(m.shape))
    counted = clients[0]
    kept = [m.copy() for m in counted._memory]
    counted._settle(1)  # round 0 was counted
    assert all(np.array_equal(a, b) for a, b in zip(counted._memory, kept, strict=True))


def test_a_late_joiner_gets_the_masks(tmp_path) -> None:
    w = world.make(tmp_path, sparsify="common", density=world.DENSITY, prune_round=1, quorum=2, release=True)
    aggregator, clients = w.aggregator(), w.clients()
    loop = Loopback(aggregator, clients)
    for number in range(w.alg.rounds):
        chosen = range(4) if number == 2 else range(2)
        assert loop.round(chosen).clients == tuple(chosen)
    for x, layer in zip(aggregator.release(), w.plan.layers, strict=True):
        assert np.count_nonzero(x) <= layer.budget


# -- where plaintext is ------------------------------------------------------------------------------------------------


def reachable(root: object, limit: int = 20_000) -> list[object]:
    """Everything that can be reached from an object, without modules, classes and functions' globals."""
    seen, queue = {id(root): root}, [root]
    while queue and len(seen) < limit:
        for found in gc.get_referents(queue.pop()):
            if (
                id(found) not in seen
                and not isinstance(found, type)
                and type(found).__name__ not in ("module", "function")
            ):
                seen[id(found)] = found
                queue.append(found)
    return list(seen.values())


def test_the_host_holds_ciphertext_only(tmp_path) -> None:
    from compressx.federated.host import Enclave

    w = world.make(tmp_path, rounds=2, quorum=2)
    with Enclave(tmp_path / "enclave", w.plan, w.initial, simulated=True) as enclave:
        root = lambda: attest.SimulatedAttester(b"", b"", identity=enclave.machine.read_bytes()[32:]).root
        loaded = enclave.loaded()  # answers once it is up
        assert "jax" not in loaded and "flax" not in loaded and "flwr" not in loaded and "numpy" in loaded
        verifier = attest.SimulatedVerifier(root(), Policy(attest.measure()))
        clients = {k: Cheap(w, k, verifier) for k in (0, 1)}
        carried: list[bytes] = []

        class Recording(Loopback):
            """Keeps all that the host ever carries."""

            def exchange(self, number: int) -> None:
                client = self.clients[number]
                hello = client.hello()
                offer = self.enclave.hello(hello)
                frame = self.enclave.model(number)
                update = client.answer(offer, frame)
                carried.extend((hello, offer, frame, update))
                self.enclave.update(update)

        host = Recording(enclave, {})
        host.clients = clients
        host.round([0, 1])
        host.clients = {}
        plain = [np.full(64, k + 1.0, "<f4").tobytes() for k in (0, 1)] + [w.initial[0].astype("<f4").tobytes()]
        held = [x for x in reachable([host, carried]) if isinstance(x, bytes | bytearray | np.ndarray)]
        assert sum(len(x) for x in carried) > 10_000 and any(x is carried[-1] for x in held)
        for x in held:
            raw = x.tobytes() if isinstance(x, np.ndarray) else bytes(x)
            assert not any(p in raw for p in plain)
        assert reason(enclave.release) == "policy"


def test_the_enclave_process_survives_a_kill(tmp_path) -> None:
    from compressx.federated.host import Enclave, EnclaveStopped

    w = world.make(tmp_path, rounds=2, quorum=2, release=True)
    enclave = Enclave(tmp_path / "enclave", w.plan, w.initial, simulated=True)
    enclave.status()
    machine = enclave.machine.read_bytes()[32:]
    verifier = attest.SimulatedVerifier(
        attest.SimulatedAttester(b"", b"", identity=machine).root, Policy(attest.measure())
    )
    loop = Loopback(enclave, {k: Cheap(w, k, verifier) for k in range(4)})
    loop.round([0, 1])
    loop.exchange(2)
    enclave.kill()
    with pytest.raises((EnclaveStopped, ValueError)):
        enclave.status()
    with Enclave(tmp_path / "enclave", w.plan, w.initial, simulated=True) as again:
        assert again.status() == (1, (2,))
        loop = Loopback(again, {k: Cheap(w, k, verifier) for k in range(4)})
        assert loop.round([2, 3]).clients == (2, 3)
        n = [len(part) for part in w.split]
        total = (n[0] * 1 + n[1] * 2) / (n[0] + n[1]) + (n[2] * 3 + n[3] * 4) / (n[2] + n[3])
        for a, b in zip(again.release(), w.initial, strict=True):
            np.testing.assert_allclose(a, b.reshape(-1) + total, rtol=1e-5)
