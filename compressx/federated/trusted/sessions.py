"""Sessions between a client and the enclave: X25519, HKDF-SHA256, AES-256-GCM, bound to everything that matters.

    hello   client -> enclave   client id, its nonce, its fresh public key, the last state it saw, its signature
    offer   enclave -> client   session id, the enclave's fresh public key, policy hash, a quote over all of these
    frame   both ways           header in the clear, authenticated; sealed payload

The key of each direction is HKDF(shared secret, salt = client's nonce, info = hello, offer, measurement). Associated
data of a frame: measurement, nonce, session, direction, client, round, sequence, hash of the state. Sequence numbers
only rise and are the AEAD's nonces, under keys that live as long as the session. Nothing of a frame is decrypted
before its header has passed, and nothing decrypted is returned before its tag has.
"""

import hashlib
import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from compressx.federated.trusted.refused import Refused

_TAG = b"compressx federated session 1"
_HELLO = struct.Struct("<4sI32s32sI32s64s")
_OFFER = struct.Struct("<4s16s32s32sI")
_FRAME = struct.Struct("<4sBBHIIQ")
TO_ENCLAVE, TO_CLIENT = range(2)
HELLO_BYTES = _HELLO.size
OFFER_BYTES = _OFFER.size  # and the quote
FRAME_BYTES = _FRAME.size + 16 + 32  # header, tag, and the state's hash inside the payload of a model's frame
UPDATE_BYTES = _FRAME.size + 16
MAX_QUOTE = 8192
NEVER = 2**32 - 1  # the round of a client that has seen none


class Hello(NamedTuple):
    """A client's first words; `seen_round` and `seen_hash` are the newest state it holds (NEVER, zeros: none)."""

    client: int
    nonce: bytes
    key: bytes
    seen_round: int
    seen_hash: bytes


class Offer(NamedTuple):
    """The enclave's answer."""

    session: bytes
    key: bytes
    policy: bytes
    quote: bytes


def write_hello(hello: Hello, identity: Ed25519PrivateKey) -> bytes:
    """Signs and writes a hello."""
    packed = _HELLO.pack(b"CXH1", *hello, bytes(64))
    return packed[:-64] + identity.sign(_TAG + packed[:-64])


def read_hello(data: bytes, roster: "dict[int, bytes]") -> Hello:
    """Reads a hello from anyone.

    Raises:
      Refused: not one ("size", "structure"), an unknown client ("client"), or signed by another key ("signature").
    """
    if len(data) != _HELLO.size:
        raise Refused("size", f"a hello of {len(data)} bytes; it has {_HELLO.size}")
    magic, client, nonce, key, seen, seen_hash, signature = _HELLO.unpack(data)
    if magic != b"CXH1":
        raise Refused("structure", "this is not a hello")
    if client not in roster:
        raise Refused("client", f"client {client} is not enrolled")
    try:
        Ed25519PublicKey.from_public_bytes(roster[client]).verify(signature, _TAG + data[:-64])
    except InvalidSignature:
        raise Refused("signature", f"the hello of client {client} is not signed by its key") from None
    return Hello(client, nonce, key, seen, seen_hash)


def write_offer(offer: Offer) -> bytes:
    """Writes an offer."""
    return _OFFER.pack(b"CXO1", offer.session, offer.key, offer.policy, len(offer.quote)) + offer.quote


def read_offer(data: bytes) -> Offer:
    """Reads an offer; its quote is not checked yet.

    Raises:
      Refused: "size" or "structure".
    """
    if not _OFFER.size < len(data) <= _OFFER.size + MAX_QUOTE:
        raise Refused("size", f"an offer of {len(data)} bytes; it has at most {_OFFER.size + MAX_QUOTE}")
    magic, session, key, policy, length = _OFFER.unpack_from(data)
    if magic != b"CXO1" or length != len(data) - _OFFER.size:
        raise Refused("structure", "this is not an offer")
    return Offer(session, key, policy, data[_OFFER.size :])


def binding(hello: bytes, session: bytes, key: bytes, policy: bytes) -> bytes:
    """Report data of the quote (64 bytes): SHA-256 over the hello (so the verifier's nonce), session, key and
    policy."""
    return hashlib.sha256(_TAG + hello + session + key + policy).digest() + bytes(32)


@dataclass
class Session:
    """Keys and counters of one side. `send` and `receive` are the directions' AEADs."""

    client: int
    session: bytes
    nonce: bytes
    measurement: bytes
    enclave: bool
    keys: tuple[AESGCM, AESGCM]
    sent: int = 0
    received: int = 0

    def _data(self, direction: int, round_: int, sequence: int, state: bytes) -> bytes:
        numbers = struct.pack("<BIIQ", direction, self.client, round_, sequence)
        return _TAG + self.measurement + self.nonce + self.session + numbers + state

    def seal(self, round_: int, state: bytes, payload: bytes) -> bytes:
        """A frame for the other side. `state` is the hash of the state it speaks of; a model's frame carries it."""
        direction = TO_CLIENT if self.enclave else TO_ENCLAVE
        self.sent += 1
        header = _FRAME.pack(b"CXF1", 1, direction, 0, self.client, round_, self.sent)
        shown = state if self.enclave else b""
        nonce = struct.pack("<IQ", direction, self.sent)
        sealed = self.keys[direction].encrypt(nonce, payload, self._data(direction, round_, self.sent, state))
        return header + shown + sealed

    def open(self, frame: bytes, round_: int | None, state: bytes | None, largest: int) -> tuple[int, bytes, bytes]:
        """Round, state hash and payload of a frame from the other side.

        Args:
          frame: the bytes.
          round_: the round it must be of, or None where the frame tells (a client opening a model).
          state: the hash it must be bound to, or None likewise.
          largest: bytes of payload allowed.

        Raises:
          Refused: "size", "structure", "client", "round", "sequence" before decrypting; "decryption" where the tag
            does not fit.
        """
        direction = TO_ENCLAVE if self.enclave else TO_CLIENT
        extra = 32 if state is None else 0
        if not _FRAME.size + extra + 16 <= len(frame) <= _FRAME.size + extra + 16 + largest:
            raise Refused("size", f"a frame of {len(frame)} bytes; its payload may have {largest}")
        magic, version, way, reserved, client, is_round, sequence = _FRAME.unpack_from(frame)
        if magic != b"CXF1" or version != 1 or way != direction or reserved:
            raise Refused("structure", "this is not a frame of this direction")
        if client != self.client:
            raise Refused("client", f"a frame of client {client} in the session of client {self.client}")
        if round_ is not None and is_round != round_:
            raise Refused("round", f"a frame of round {is_round}; round {round_} is open")
        if sequence <= self.received:
            raise Refused("sequence", f"frame {sequence} after frame {self.received}")
        if state is None:
            state = bytes(frame[_FRAME.size : _FRAME.size + 32])
        nonce = struct.pack("<IQ", direction, sequence)
        try:
            sealed = bytes(frame[_FRAME.size + extra :])
            payload = self.keys[direction].decrypt(nonce, sealed, self._data(direction, is_round, sequence, state))
        except InvalidTag:
            raise Refused(
                "decryption", f"frame {sequence} of client {client} was changed or is of other keys"
            ) from None
        self.received = sequence
        return is_round, state, payload


def peek(frame: bytes) -> int:
    """The client a frame says it is of; nothing is checked but its length."""
    if len(frame) < _FRAME.size:
        raise Refused("size", f"a frame of {len(frame)} bytes")
    return int(_FRAME.unpack_from(frame)[4])


def derive(
    private: X25519PrivateKey, theirs: bytes, hello: bytes, offer: Offer, measurement: bytes, client: int, enclave: bool
) -> Session:
    """The session of one side, from its private key and the other's public key.

    Raises:
      Refused: "binding", a public key of low order.
    """
    try:
        secret = private.exchange(X25519PublicKey.from_public_bytes(theirs))
    except ValueError:
        raise Refused("binding", "a public key of low order") from None
    nonce = _HELLO.unpack(hello)[2]
    transcript = hashlib.sha256(hello + write_offer(offer)).digest()
    info = _TAG + measurement + transcript
    material = HKDF(algorithm=hashes.SHA256(), length=64, salt=nonce, info=info).derive(secret)
    keys = (AESGCM(material[:32]), AESGCM(material[32:]))
    return Session(client, offer.session, nonce, measurement, enclave, keys)


def fresh_key() -> tuple[X25519PrivateKey, bytes]:
    """A key pair for one session."""
    private = X25519PrivateKey.generate()
    return private, private.public_key().public_bytes_raw()


def fresh_nonce() -> bytes:
    """32 bytes of the operating system's randomness."""
    return os.urandom(32)
