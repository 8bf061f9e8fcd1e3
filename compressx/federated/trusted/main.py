"""The aggregator's process: requests on standard input, replies on standard output, both framed and bounded.

    python -m compressx.federated.trusted.main --plan=plan.json --initial=initial.bin --state=DIR --counter=FILE
    ... --simulated=FILE      without SGX; FILE holds the SIMULATED machine's secret and keys, made if it is missing
    ... --doctor              say where this runs, and what it has loaded

    request   length u32 | operation u8 | payload          reply   length u32 | 0 ok, 1 refused | payload

Nothing that it imports loads JAX, which has no place in an enclave.
"""

import argparse
import fcntl
import os
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO

from compressx.federated.trusted.refused import Refused

HELLO, MODEL, UPDATE, CLOSE, STATUS, RELEASE, LOADED = range(7)
MAX_REPLY = 2**31
SMALL = 4096  # more than any request but an update


def read_frame(stream: IO[bytes], limit: Callable[[int], int] = lambda kind: MAX_REPLY) -> tuple[int, bytes] | None:
    """Operation or status, and payload; None at the end of the stream.

    Args:
      stream: bytes.
      limit: of the payload, by operation.

    Raises:
      Refused: the payload is longer; it was passed over, and the stream can be read further.
    """
    head = stream.read(5)
    if len(head) < 5:
        return None
    length, kind = struct.unpack("<IB", head)
    if length > limit(kind):
        left = length
        while left and (part := stream.read(min(left, 2**16))):
            left -= len(part)
        raise Refused("size", f"a request of {length} bytes; operation {kind} takes at most {limit(kind)}")
    payload = stream.read(length)
    return (kind, payload) if len(payload) == length else None


def write_frame(stream: IO[bytes], kind: int, payload: bytes) -> None:
    """Inverse of `read_frame`."""
    stream.write(struct.pack("<IB", len(payload), kind) + payload)
    stream.flush()


def lock(folder: Path) -> IO[bytes]:
    """Waits until no other aggregator works in the folder: one whose host was killed may still be finishing a
    request."""
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / "lock", "wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:  # Gramine may not have it; forks are then the clients' to notice
        pass
    return file


def main() -> None:
    """Serves until standard input ends."""
    parser = argparse.ArgumentParser()
    for flag in ("plan", "initial", "state", "counter", "simulated"):
        parser.add_argument(f"--{flag}", type=Path)
    parser.add_argument("--doctor", action="store_true")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # every thread of NumPy's takes enclave memory

    import json

    import numpy as np

    from compressx.federated.trusted import attest, messages
    from compressx.federated.trusted.aggregator import Aggregator
    from compressx.federated.trusted.rounds import Plan
    from compressx.federated.trusted.sealing import FileCounter, write_durably

    if args.doctor:
        print(attest.mode())
        print(f"measurement that a simulation states: {attest.measure().hex()}")
        print(
            "loaded:",
            ", ".join(sorted({name.partition(".")[0] for name in sys.modules} - set(sys.stdlib_module_names))),
        )
        return
    plan = Plan.from_bytes(args.plan.read_bytes())
    flat = np.frombuffer(args.initial.read_bytes(), "<f4")
    layers = np.split(flat, np.cumsum([layer.size for layer in plan.layers])[:-1])
    attester: attest.Attester
    if args.simulated:
        if not args.simulated.exists():
            write_durably(args.simulated, os.urandom(32) + attest.make_identity())
        stored = args.simulated.read_bytes()
        attester = attest.SimulatedAttester(attest.measure(), stored[:32], identity=stored[32:])
    else:
        attester = attest.GramineAttester()
    held = lock(args.state)
    try:
        aggregator = Aggregator(plan, layers, attester, args.state, FileCounter(args.counter))
    except Refused as error:
        print(error, file=sys.stderr)
        sys.exit(3)

    def answer(kind: int, payload: bytes) -> bytes:
        if kind == HELLO:
            return aggregator.hello(payload)
        if kind == MODEL:
            return aggregator.model(int.from_bytes(payload, "little"))
        if kind == UPDATE:
            return aggregator.update(payload).to_bytes(4, "little")
        if kind == CLOSE:
            return json.dumps(aggregator.close()._asdict()).encode()
        if kind == STATUS:
            return json.dumps(aggregator.status()).encode()
        if kind == RELEASE:
            return b"".join(x.astype("<f4").tobytes() for x in aggregator.release())
        if kind == LOADED:
            return json.dumps(sorted({name.partition(".")[0] for name in sys.modules})).encode()
        raise Refused("structure", f"operation {kind} is not known")

    # An update is at most a message of the model, in a sealed frame; whatever is longer is never held in memory.
    largest = messages.largest_bytes(plan.layers) + SMALL
    requests, replies = sys.stdin.buffer, sys.stdout.buffer
    while True:
        try:
            if (frame := read_frame(requests, lambda kind: largest if kind == UPDATE else SMALL)) is None:
                break
            write_frame(replies, 0, answer(*frame))
        except Refused as error:
            write_frame(replies, 1, str(error).encode())
    held.close()


if __name__ == "__main__":
    main()
