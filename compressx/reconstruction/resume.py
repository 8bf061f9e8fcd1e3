"""The layers that are done, in a file from which a reconstruction that was killed continues."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from compressx.capture.saved import Saved, fingerprint, load, of_batch, of_network, save
from compressx.rules import Bound
from compressx.trace import Program


class Done(NamedTuple):
    """A leaf that is done.

    Attributes:
      about: its `Layer` as a dictionary.
      w: the leaf.
      structure: of its sets.
      bias: the bias that took a mean, or None.
    """

    about: dict[str, Any]
    w: Any
    structure: tuple[Any, ...]
    bias: Any


class Journal:
    """The leaves that are done, in the order in which the network runs.

    Args:
      path: the file, or None: nothing is kept.
      program: the traced network.
      weights: its arrays.
      task: what else the result depends on, in words.
      batches: the calibration inputs.
      every: seconds between two writes.

    Raises:
      StateError: the file is of another network, task or other batches.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        program: Program,
        weights: Sequence[Any],
        task: str,
        batches: Sequence[Any],
        every: float,
    ) -> None:
        self.path, self.every, self.written = path, every, time.monotonic()
        self.entries: list[list[Any]] = []
        self.old: list[list[Any]] = []
        self.prints: dict[str, str] = {}
        if path is not None:
            data = ""
            for x in batches:
                data = of_batch(data, x)
            self.prints = {"network": of_network(program, weights), "task": fingerprint(task), "calibration": data}
            saved = load(path, self.prints)
            self.old = [] if saved is None else saved.states

    def known(self, b: Bound, w0: Any) -> Done | None:
        """The next leaf (`w0` as its constraint takes it), if it was done before; it then counts as done again."""
        if len(self.entries) >= len(self.old):
            return None
        entry = self.old[len(self.entries)]
        about = json.loads(bytes(np.asarray(entry[0])).decode())
        self.entries.append(entry)
        rest = entry[2:] if not about["bias"] else entry[3:]
        like = jax.eval_shape(b.choose, w0)
        structure = jax.tree.unflatten(jax.tree.structure(like), list(map(jax.numpy.asarray, rest)))
        return Done(about["layer"], jax.numpy.asarray(entry[1]), structure, entry[2] if about["bias"] else None)

    def add(self, done: Done) -> None:
        """Notes a leaf, and writes the file where it is time."""
        if self.path is None:
            return
        text = json.dumps({"layer": done.about, "bias": done.bias is not None})
        bias = [] if done.bias is None else [done.bias]
        header = np.frombuffer(text.encode(), np.uint8)
        self.entries.append([header, done.w, *bias, *jax.tree.leaves(done.structure)])
        if time.monotonic() - self.written >= self.every:
            save(Path(self.path), Saved(self.prints, len(self.entries), 0, "", self.entries))
            self.written = time.monotonic()
