"""What a long observation has gathered so far, in a file that another network, or other data, refuse."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from compressx.trace import Program


class StateError(ValueError):
    """A file of gathered statistics that cannot be continued; the text names the file and what differs.

    Example:
      >>> def network(w, x):
      ...     return x @ w["a"]
      >>> x = [jnp.ones((2, 2))]
      >>> _ = compressx.capture.capture(network, {"a": jnp.ones((2, 3))}, x, state="state.npz")
      >>> try:
      ...     compressx.capture.capture(network, {"a": jnp.zeros((2, 3))}, x, state="state.npz")
      ... except StateError as error:
      ...     print(str(error).split(" (")[0])
      state.npz: the state of another network
    """


class Saved(NamedTuple):
    """The contents of a file.

    Attributes:
      fingerprints: what it belongs to, by name ("network", "observer", ...).
      group: number of the group of leaves that is being observed; those before it are complete.
      done: how many batches this group has seen.
      data: fingerprint of these batches, in their order.
      states: for each group up to this one the arrays of its states.
    """

    fingerprints: dict[str, str]
    group: int
    done: int
    data: str
    states: list[list[Any]]


def fingerprint(*parts: Any) -> str:
    """A digest of strings and arrays: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            digest.update(part.encode() + b"\0")
        else:
            array = np.ascontiguousarray(jax.device_get(part))
            digest.update(f"{array.dtype} {array.shape}\0".encode() + array.tobytes())
    return digest.hexdigest()[:16]


def of_network(program: Program, weights: Iterable[Any]) -> str:
    """The fingerprint of a network: names and values of its leaves, and its operations."""
    ops = " ".join(op.primitive.name for op in program.ops)
    return fingerprint(ops, *program.paths, *weights)


def of_batch(before: str, x: Any) -> str:
    """The fingerprint of the batches so far, of whose fingerprint and one more."""
    return fingerprint(before, *jax.tree.leaves(x))


def save(path: str | os.PathLike[str], saved: Saved) -> None:
    """Writes a file beside the old one, then puts it in its place, so that a kill leaves one of the two."""
    target = Path(path)
    beside = target.with_name(f"{target.name}.part")
    sizes = [len(group) for group in saved.states]
    about = {"fingerprints": saved.fingerprints, "group": saved.group, "done": saved.done, "data": saved.data}
    header = json.dumps(about | {"sizes": sizes})
    flat = [np.asarray(jax.device_get(a)) for group in saved.states for a in group]
    named: dict[str, Any] = {f"array{k}": a for k, a in enumerate(flat)}
    with open(beside, "wb") as file:
        np.savez(file, header=np.frombuffer(header.encode(), np.uint8), **named)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, target)


def load(path: str | os.PathLike[str], fingerprints: Mapping[str, str]) -> Saved | None:
    """What a file holds, or None where there is none.

    Raises:
      StateError: it cannot be read, or belongs to something else, which the text names.
    """
    if not os.path.exists(path):
        return None
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as held:
            header = json.loads(bytes(held["header"]).decode())
            arrays = iter([held[f"array{k}"] for k in range(len(held.files) - 1)])
        states = [[next(arrays) for _ in range(size)] for size in header["sizes"]]
        numbers = int(header["group"]), int(header["done"])
        saved = Saved(dict(header["fingerprints"]), *numbers, str(header["data"]), states)
    except Exception as error:  # whatever zipfile, NumPy and json raise on a damaged file
        raise StateError(f"{os.fspath(path)}: no readable state ({type(error).__name__}: {error}); remove it") from None
    odd = [name for name, value in fingerprints.items() if saved.fingerprints.get(name) != value]
    if odd:
        raise StateError(
            f"{os.fspath(path)}: the state of another {odd[0]} ({saved.fingerprints.get(odd[0], 'none')}, this one is "
            f"{fingerprints[odd[0]]}); remove it, or name another file"
        )
    return saved
