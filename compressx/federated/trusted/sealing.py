"""Sealed records of the enclave on a disk that belongs to someone else, and the counter that shows a rollback.

A record is AES-256-GCM under a key of this process (HKDF of the enclave's sealing key and a fresh salt), a counter as
nonce, and what it is (kind, round, client, hash of the state) as associated data. Files appear whole or not at all, on
disk before anyone is notified.

Under Gramine the key is `_sgx_mrenclave`: only the same measurement opens the records, and an upgraded aggregator
starts anew. `_sgx_mrsigner` would let upgrades read them, and also every older, perhaps faulty, version.
"""

import contextlib
import fcntl
import os
import struct
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from compressx.federated.trusted.refused import Refused

_HEAD = struct.Struct("<4s32sQ")


class Sealer:
    """Seals and opens records; `context` (measurement and policy) is bound into every one."""

    def __init__(self, key: bytes, context: bytes) -> None:
        self._root, self._context, self._salt, self._count = key, context, os.urandom(32), 0
        self._key = self._derive(self._salt)

    def _derive(self, salt: bytes) -> AESGCM:
        derived = HKDF(algorithm=hashes.SHA256(), length=32, salt=salt, info=b"compressx seal 1").derive(self._root)
        return AESGCM(derived)

    def seal(self, what: bytes, payload: bytes) -> bytes:
        """A record of the payload, bound to `what`."""
        self._count += 1
        head = _HEAD.pack(b"CXS1", self._salt, self._count)
        return head + self._key.encrypt(struct.pack("<IQ", 0, self._count), payload, head + self._context + what)

    def open(self, what: bytes, record: bytes) -> bytes:
        """The payload of a record.

        Raises:
          Refused: "sealed", where it was changed, is of another enclave or policy, or is something else than `what`.
        """
        if len(record) < _HEAD.size + 16 or record[:4] != b"CXS1":
            raise Refused("sealed", "this is not a sealed record")
        _, salt, count = _HEAD.unpack_from(record)
        head = record[: _HEAD.size]
        try:
            nonce = struct.pack("<IQ", 0, count)
            return self._derive(salt).decrypt(nonce, record[_HEAD.size :], head + self._context + what)
        except InvalidTag:
            raise Refused("sealed", f"the record of {what!r} was changed, or is of another enclave or policy") from None


NOTHING = (0, bytes(32))  # what a counter holds before any state was sealed


class Counter(Protocol):
    """How many states were sealed and the hash of the newest, kept where the host can neither lower nor copy it.

    A number alone shows a rollback, not a fork: two aggregators on copies of one state would both raise it to the same
    number. With the hash beside it, and moved by compare-and-swap, one of the two wins and the other is refused.
    """

    def read(self) -> tuple[int, bytes]:
        """The number and the hash; `NOTHING` before the first."""

    def swap(self, old: tuple[int, bytes], new: tuple[int, bytes]) -> None:
        """Moves from `old` to `new` in one step.

        Raises:
          Refused: "rollback", where it is not at `old`.
        """


class FileCounter:
    """SIMULATED. A counter in a file: the host can lower it, and then only the clients notice (see `aggregator`).

    A deployment puts a replicated counter service or a TPM here; SGX on servers has no counter of its own.
    """

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)

    def read(self) -> tuple[int, bytes]:
        """`NOTHING` where there is no file yet.

        Raises:
          Refused: "rollback", where the file is not a counter.
        """
        try:
            number, hash_ = self._path.read_text().split()
            found = int(number), bytes.fromhex(hash_)
        except FileNotFoundError:
            return NOTHING
        except (ValueError, UnicodeDecodeError):
            raise Refused("rollback", f"{self._path} is not a counter") from None
        if found[0] < 1 or len(found[1]) != 32:
            raise Refused("rollback", f"{self._path} is not a counter")
        return found

    def swap(self, old: tuple[int, bytes], new: tuple[int, bytes]) -> None:
        """See `Counter.swap`; processes on one file exclude each other."""
        with open(self._path.with_name(f"{self._path.name}.lock"), "wb") as lock:
            with contextlib.suppress(OSError):  # Gramine may not have it
                fcntl.flock(lock, fcntl.LOCK_EX)
            here = self.read()
            if here != old:
                raise Refused(
                    "rollback", f"the counter is at {here[0]} ({here[1].hex()[:16]}), not at {old[0]} "
                    f"({old[1].hex()[:16]}): another aggregator continues from a copy of this state"
                )  # fmt: skip
            write_durably(self._path, f"{new[0]} {new[1].hex()}".encode())


def write_durably(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Writes a file in one step, for its owner's eyes unless `mode` says otherwise; returns when it is on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)  # of a process of this number that was killed
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
