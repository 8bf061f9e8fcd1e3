"""SecAgg-style masking: the server learns the sum of the updates without an enclave. For contrast, not in SGX's place.

Each pair of clients shares a mask that one adds and the other subtracts; each client adds one of its own. Seeds are
shared out (Shamir), so that the survivors can take out the masks of those who dropped out, and the own masks of those
who stayed, but never both of one client. Sums are exact modulo 2^32, of updates clipped and rounded to fixed point.

Every client must send values at the same positions: per-client sparse indices and masking do not mix. With a common
mask only the kept weights are sent.

Source: K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", 2017 (figure 4,
honest but curious server; without its signatures).
"""

import os
import secrets
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from compressx.federated.trusted.refused import Refused

NpArray = npt.NDArray[Any]
PRIME = 2**521 - 1
SHARE_BYTES = 66
CLIP = 8.0
BITS = 27  # CLIP * 2**BITS < 2**31: a weighted mean never wraps
ADVERTISED_BYTES = 64
SEALED_BYTES = 2 * SHARE_BYTES + 16


def to_field(x: NpArray, weight: float) -> NpArray:
    """Fixed-point numbers modulo 2^32 of `weight * x`, clipped to +-CLIP: uint32.

    Args:
      x: float, any shape.
      weight: of the client, in 0..1; the weights of all add up to at most 1.

    Returns:
      uint32 of x's shape.

    Source: sums of integers modulo 2^32 as in K. Bonawitz et al., 2017; the fixed point is our own.

    Example:
      >>> from compressx.federated.secagg import from_field, to_field
      >>> total = to_field(np.array([1.0, -2.0]), 0.25) + to_field(np.array([3.0, 2.0]), 0.75)
      >>> from_field(total, 1.0).tolist()
      [2.5, 1.0]
    """
    q = np.rint(np.clip(x.astype(np.float64), -CLIP, CLIP) * weight * 2.0**BITS)
    return q.astype(np.int64).astype(np.uint32)


def from_field(total: NpArray, weight: float) -> NpArray:
    """The mean, from the sum of `to_field` and the sum of the weights: float32.

    Args:
      total: uint32, the sum modulo 2^32.
      weight: of all whose values are in it.

    Returns:
      float32 of the same shape.

    Example:
      >>> from compressx.federated.secagg import from_field, to_field
      >>> from_field(to_field(np.array([0.5]), 0.2), 0.2).tolist()  # one survivor
      [0.5]
    """
    return (total.view(np.int32).astype(np.float64) / 2.0**BITS / weight).astype(np.float32)


def split_secret(secret: bytes, members: list[int], threshold: int) -> dict[int, bytes]:
    """Shamir shares of 32 bytes, any `threshold` of which give it back.

    Args:
      secret: 32 bytes.
      members: their numbers, 0 and above, all different.
      threshold: shares that give it back.

    Returns:
      member -> share, `SHARE_BYTES` bytes.

    Source: A. Shamir, "How to Share a Secret", 1979; here over the integers modulo 2^521 - 1.

    Example:
      >>> from compressx.federated.secagg import join_shares, split_secret
      >>> shares = split_secret(bytes(range(32)), [0, 1, 2], threshold=2)
      >>> join_shares({k: shares[k] for k in (0, 2)}, threshold=2) == bytes(range(32))
      True
    """
    coefficients = [int.from_bytes(secret, "big"), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]

    def at(x: int) -> int:
        value = 0
        for c in reversed(coefficients):
            value = (value * x + c) % PRIME
        return value

    return {m: at(m + 1).to_bytes(SHARE_BYTES, "big") for m in members}


def join_shares(shares: Mapping[int, bytes], threshold: int) -> bytes:
    """The secret of Shamir shares.

    Args:
      shares: member -> share, at least `threshold`.
      threshold: as it was when they were made.

    Returns:
      32 bytes.

    Raises:
      Refused: "message", where there are too few or they do not belong together.

    Source: A. Shamir, "How to Share a Secret", 1979 (Lagrange interpolation at 0).

    Example:
      >>> from compressx.federated.secagg import join_shares, split_secret
      >>> join_shares(split_secret(b"k" * 32, [4, 7], threshold=2), threshold=2).decode()
      'kkkkkkkkkkkkkkkkkkkkkkkkkkkkkkkk'
    """
    if len(shares) < threshold:
        raise Refused("message", f"{len(shares)} shares; {threshold} are needed")
    points = [(m + 1, int.from_bytes(s, "big")) for m, s in sorted(shares.items())[:threshold]]
    value = 0
    for i, (x, y) in enumerate(points):
        top = bottom = 1
        for j, (other, _) in enumerate(points):
            if i != j:
                top, bottom = top * other % PRIME, bottom * (other - x) % PRIME
        value = (value + y * top * pow(bottom, -1, PRIME)) % PRIME
    if value >= 2**256:
        raise Refused("message", "the shares do not belong together")
    return value.to_bytes(32, "big")


def stream(seed: bytes, size: int) -> NpArray:
    """Pseudo-random uint32 `[size]` of a seed of 32 bytes (ChaCha20).

    Args:
      seed: 32 bytes.
      size: how many.

    Returns:
      uint32 `[size]`.

    Source: D. J. Bernstein, "ChaCha, a variant of Salsa20", 2008.

    Example:
      >>> from compressx.federated.secagg import stream
      >>> bool((stream(bytes(32), 3) == stream(bytes(32), 5)[:3]).all())
      True
    """
    encryptor = Cipher(ChaCha20(seed, bytes(16)), mode=None).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * size)), "<u4").astype(np.uint32)


def _agree(private: X25519PrivateKey, theirs: bytes, what: bytes) -> bytes:
    secret = private.exchange(X25519PublicKey.from_public_bytes(theirs))
    return HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"compressx secagg " + what).derive(secret)


class Member:
    """A client of one masked round: `advertise`, `share`, `masked`, `reveal`, in this order.

    Args:
      number: of the client, 0 and above.
      threshold: members without which nothing is unmasked.

    Source: K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", 2017, figure 4.

    Example:
      >>> from compressx.federated.secagg import Member
      >>> members = {k: Member(k, threshold=2) for k in (0, 1)}
      >>> advertised = {k: member.advertise() for k, member in members.items()}
      >>> shares = members[0].share(advertised)
      >>> len(advertised[0]), {k: len(sealed) for k, sealed in shares.items()}
      (64, {1: 148})
    """

    def __init__(self, number: int, threshold: int) -> None:
        self.number, self.threshold = number, threshold
        self._channel, self._mask = X25519PrivateKey.generate(), X25519PrivateKey.generate()
        self._own = os.urandom(32)
        self._peers: dict[int, bytes] = {}
        self._held: dict[int, bytes] = {}
        self._revealed = False

    def advertise(self) -> bytes:
        """Two public keys, 64 bytes."""
        keys = (self._channel, self._mask)
        return b"".join(k.public_key().public_bytes_raw() for k in keys)

    def share(self, advertised: Mapping[int, bytes]) -> dict[int, bytes]:
        """For every member, sealed: a share of this one's mask key and of its own seed."""
        if len(advertised) < self.threshold:
            raise Refused("message", f"{len(advertised)} members; {self.threshold} are needed")
        self._peers = dict(advertised)
        members = sorted(advertised)
        key = split_secret(self._mask.private_bytes_raw(), members, self.threshold)
        own = split_secret(self._own, members, self.threshold)
        self._held[self.number] = key[self.number] + own[self.number]
        out = {}
        for m in members:
            if m != self.number:
                sealer = AESGCM(_agree(self._channel, advertised[m][:32], b"share"))
                nonce = struct.pack("<III", self.number, m, 0)
                out[m] = sealer.encrypt(nonce, key[m] + own[m], None)
        return out

    def masked(self, vector: NpArray, incoming: Mapping[int, bytes]) -> bytes:
        """The vector uint32 `[n]` under all masks; `incoming` are the shares sealed for this member."""
        for m, sealed in incoming.items():
            opener = AESGCM(_agree(self._channel, self._peers[m][:32], b"share"))
            self._held[m] = opener.decrypt(struct.pack("<III", m, self.number, 0), sealed, None)
        total = vector + stream(self._own, vector.size)
        for m in incoming:
            mask = stream(_agree(self._mask, self._peers[m][32:], b"mask"), vector.size)
            total = total + mask if self.number < m else total - mask
        return total.astype("<u4").tobytes()

    def reveal(self, survivors: list[int]) -> dict[int, bytes]:
        """Of each survivor the share of its own seed, of everyone else the share of its mask key; once."""
        if self._revealed or len(survivors) < self.threshold:
            raise Refused("round", "shares are revealed once, and to enough survivors")
        self._revealed = True
        cut = SHARE_BYTES
        return {m: held[cut:] if m in survivors else held[:cut] for m, held in self._held.items()}


def unmask(
    uploads: Mapping[int, bytes],
    advertised: Mapping[int, bytes],
    revealed: Mapping[int, Mapping[int, bytes]],
    threshold: int,
) -> NpArray:
    """The sum of the survivors' vectors (uint32), from their uploads and the shares they revealed.

    Args:
      uploads: survivor -> what `Member.masked` gave.
      advertised: member -> what `Member.advertise` gave.
      revealed: survivor -> what `Member.reveal` gave.
      threshold: of the members.

    Returns:
      uint32 `[n]`, the sum modulo 2^32.

    Raises:
      Refused: too few shares, or shares that do not belong together.

    Source: K. Bonawitz et al., "Practical Secure Aggregation for Privacy-Preserving Machine Learning", 2017, figure 4.

    Example:
      >>> from compressx.federated.secagg import Member, unmask
      >>> members = {k: Member(k, threshold=2) for k in (0, 1)}
      >>> advertised = {k: m.advertise() for k, m in members.items()}
      >>> shares = {k: m.share(advertised) for k, m in members.items()}
      >>> vector = np.array([5, 7], np.uint32)
      >>> uploads = {k: m.masked(vector, {1 - k: shares[1 - k][k]}) for k, m in members.items()}
      >>> unmask(uploads, advertised, {k: m.reveal([0, 1]) for k, m in members.items()}, threshold=2).tolist()
      [10, 14]
    """
    total = np.zeros(len(next(iter(uploads.values()))) // 4, np.uint32)
    for data in uploads.values():
        total = total + np.frombuffer(data, "<u4")
    members = {m for shares in revealed.values() for m in shares}
    for m in sorted(members):
        secret = join_shares({r: s[m] for r, s in revealed.items() if m in s}, threshold)
        if m in uploads:
            total = total - stream(secret, total.size)
            continue
        key = X25519PrivateKey.from_private_bytes(secret)
        for r in sorted(uploads):
            mask = stream(_agree(key, advertised[r][32:], b"mask"), total.size)
            total = total - mask if r < m else total + mask  # what survivor r put in
    return total


def round_bytes(members: int, survivors: int, size: int) -> tuple[int, int]:
    """Bytes down and up of one round of masking, all clients together, the model's own way down not counted.

    Args:
      members: that advertised keys.
      survivors: that sent a vector.
      size: of a vector, in values of 4 bytes.

    Returns:
      (bytes down, bytes up).

    Example:
      >>> from compressx.federated.secagg import round_bytes
      >>> down, up = round_bytes(members=10, survivors=9, size=100_000)
      >>> up - 9 * 400_000  # what masking adds to the vectors
      19900
    """
    down = members * (members - 1) * (ADVERTISED_BYTES + SEALED_BYTES) + survivors * 4 * survivors
    up = members * (ADVERTISED_BYTES + (members - 1) * SEALED_BYTES) + survivors * (4 * size + members * SHARE_BYTES)
    return down, up
