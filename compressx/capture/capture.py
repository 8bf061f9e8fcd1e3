"""Observes what the leaves of a network really multiply, over batches of examples."""

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from compressx.capture.observers import GRAM, Observer
from compressx.capture.saved import Saved, StateError, fingerprint, load, of_batch, of_network, save
from compressx.capture.uses import Uses, uses
from compressx.capture.walk import Runner
from compressx.trace import Program, arrays, settled, trace


class CaptureError(ValueError):
    """A leaf, a batch or a network that cannot be observed; the text names it and says why.

    Example:
      >>> try:
      ...     capture(lambda w, x: x * w["b"], {"b": jnp.ones(())}, [jnp.ones((1, 3))], ["b"])
      ... except CaptureError as error:
      ...     print(error)
      b (): no product reads it (a bias, or a scale), so it has no inputs
    """


class Network(NamedTuple):
    """A traced network, and the products in it that read leaves."""

    program: Program
    uses: Uses


def read(model: Any, params: Any, x: Any) -> Network:
    """Traces a network for inputs of one shape."""
    program = settled(trace(model, params, x))
    return Network(program, uses(program))


def leaf_of(network: Network, path: str) -> int:
    """The number of a leaf that can be observed.

    Raises:
      CaptureError: it cannot; the text says why.
    """
    program, found = network
    if path not in program.paths:
        raise CaptureError(f"{path!r}: the network has no such leaf; its paths are {', '.join(program.paths)}")
    leaf = program.paths.index(path)
    named = f"{path} {program.shapes[leaf]}"
    if leaf in found.refused:
        raise CaptureError(f"{named}: {found.refused[leaf]}")
    if not found.scopes(leaf):
        raise CaptureError(f"{named}: no product reads it (a bias, or a scale), so it has no inputs")
    return leaf


def axes_and_groups(network: Network, path: str) -> tuple[str, int]:
    """The words of a leaf's axes, and the feature groups of the convolution that reads it."""
    leaf = leaf_of(network, path)
    words, view = network.uses.axes[leaf], network.uses.views[leaf]
    shape = network.program.shapes[leaf]
    stack = int(np.prod([n for n, w in zip(shape, words.split(), strict=True) if w == "stack"]))
    return words, view.groups // stack


def capture(
    model: Any,
    params: Any,
    batches: Iterable[Any],
    leaves: Sequence[str] | None = None,
    *,
    observer: Observer = GRAM,
    max_bytes: int = 1 << 30,
    state: str | os.PathLike[str] | None = None,
    save_every: float = 10.0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Observes the inputs of the leaves of a network: by default their Gram matrices.

    What a leaf multiplies is read off the traced program, so any function will do: dense layers, einsums, attention,
    convolutions (each row is a patch; strides, dilation and groups as the network has them), recurrent gates and
    stacked layers inside `lax.scan`. A leaf that several products read in one way is given the rows of all of them.

    Args:
      model: a Linen or NNX module (run in evaluation mode), or any `f(params, x)`.
      params: its pytree of arrays.
      batches: inputs x, each a pytree of arrays; one pass for each group of leaves, so it has to be a list, or another
        iterable that can be read more than once, where `max_bytes` makes several groups.
      leaves: paths; None: every leaf that a product reads and that can be observed.
      observer: what is noted.
      max_bytes: limit on the observer's states that are held at a time. Activations are held only for one batch, and
        only as long as an operation still needs them.
      state: a file into which the states are written on the way. A further call with the same network and the same
        batches resumes from it; the file stays, and then holds the whole result of the last group.
      save_every: seconds between two writes.
      progress: called with the number of batches that are done and the number of the pass.

    Returns:
      path -> the observer's result (`Gram`: `h` float64 `[G, P, P]`, `rows`, `mean` `[G, P]`).

    Raises:
      CaptureError: a leaf cannot be observed, or holds more than `max_bytes`; there is no batch; an input of a layer is
        NaN or infinite, and which batch does it.
      StateError: the file is of another network, other leaves or other batches.

    Example:
      >>> def network(w, x):
      ...     return jnp.tanh(x @ w["a"]) @ w["b"]
      >>> w = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 1))}
      >>> grams = capture(network, w, [jnp.asarray([[1.0, 2.0]]), jnp.asarray([[3.0, 4.0]])])
      >>> print(grams["a"].h[0], grams["a"].rows)
      [[ 5.  7.]
       [ 7. 10.]] 2
    """
    many = iter(batches)
    first = next(many, None)
    if first is None:
        raise CaptureError("there is no batch of inputs to observe")
    source = _Batches(model, params, batches, first, many)
    network = source.network(first)
    if leaves is None:
        leaves = [p for leaf, p in enumerate(network.program.paths) if network.uses.scopes(leaf)]
    groups = _groups(network, observer, [leaf_of(network, path) for path in leaves], max_bytes)
    if len(groups) > 1 and many is batches:
        raise CaptureError(f"max_bytes={max_bytes} takes {len(groups)} passes over the batches: give them as a list")
    weights = arrays(params)
    choice = fingerprint(*leaves, str(max_bytes), observer.update.__qualname__)
    prints = {"network": of_network(network.program, weights), "choice of leaves": choice}
    saved = load(state, prints) if state is not None else None
    states: dict[int, Any] = {}
    for number, group in enumerate(groups):
        mine = Runner(network.program, network.uses, observer, group).init()
        seen, expected = 0, ""
        if saved is not None and number <= saved.group:
            mine = _unflattened(saved.states[number], mine)
            seen, expected = (saved.done, saved.data) if number == saved.group else (-1, "")
        if seen >= 0:
            data, when, count = "", time.monotonic(), 0
            for count, x in enumerate(source.once(), 1):
                data = of_batch(data, x) if state is not None else data
                if count == seen and data != expected:
                    raise StateError(f"{os.fspath(state or '')}: gathered from other batches, or in another order")
                if count > seen:
                    _add(source.network(x), group, observer, weights, x, mine, count)
                    if progress is not None:
                        progress(count, number)
                    if state is not None and time.monotonic() - when >= save_every:
                        save(state, Saved(prints, number, count, data, _flat(groups, states | mine)))
                        when = time.monotonic()
            if count < seen:
                raise StateError(f"{os.fspath(state or '')}: holds {seen} batches, {count} were given")
            if state is not None:
                save(state, Saved(prints, number, count, data, _flat(groups, states | mine)))
        states |= jax.device_get(mine)
    return {path: observer.result(states[network.program.paths.index(path)]) for path in leaves}


class _Batches:
    """Batches that may be read several times, and the network as it is traced for inputs of each shape."""

    def __init__(self, model: Any, params: Any, batches: Iterable[Any], first: Any, rest: Iterator[Any]) -> None:
        self.model, self.params, self.batches = model, params, batches
        self.begun: tuple[Any, Iterator[Any]] | None = (first, rest)
        self.known: dict[Any, Network] = {}

    def network(self, x: Any) -> Network:
        leaves, tree = jax.tree.flatten(x)
        key = (tree, tuple((np.shape(leaf), str(leaf.dtype)) for leaf in leaves))
        if key not in self.known:
            self.known[key] = read(self.model, self.params, x)
        return self.known[key]

    def once(self) -> Iterator[Any]:
        if self.begun:
            (first, rest), self.begun = self.begun, None
            return itertools.chain([first], rest)
        return iter(self.batches)


def _groups(network: Network, observer: Observer, leaves: Sequence[int], max_bytes: int) -> list[list[int]]:
    """The leaves in the order of the program, parted so that the states of each part fit the limit."""
    ordered = sorted(dict.fromkeys(leaves), key=lambda leaf: network.uses.scopes(leaf)[0])
    groups: list[list[int]] = [[]]
    held = 0
    for leaf in ordered:
        view = network.uses.views[leaf]
        size = sum(np.asarray(a).nbytes for a in jax.tree.leaves(observer.init(view.groups, view.rows)))
        if size > max_bytes:
            named = f"{network.program.paths[leaf]} {network.program.shapes[leaf]}"
            raise CaptureError(f"{named}: its statistics take {size} bytes, max_bytes is {max_bytes}")
        if held + size > max_bytes:
            groups, held = [*groups, []], 0
        groups[-1].append(leaf)
        held += size
    return groups


def _add(
    network: Network, group: list[int], observer: Observer, weights: list[Any], x: Any, states: dict[int, Any], k: int
) -> None:
    """Observes one batch, the k-th."""
    for leaf in jax.tree.leaves(x):
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not bool(jnp.isfinite(jnp.asarray(leaf)).all()):
            raise CaptureError(f"batch {k}: its inputs hold NaN or infinite values")
    runner = Runner(network.program, network.uses, observer, group)
    with jax.enable_x64(True):
        runner.run(runner.start([weights], x), range(runner.last() + 1), states)
    check_states(runner, states, f"batch {k}")


def check_states(runner: Runner, states: dict[int, Any], when: str) -> None:
    """Raises CaptureError where the sums of a layer are not finite, naming the first of the program."""
    for leaf in sorted(states, key=lambda leaf: runner.uses.scopes(leaf)[0]):
        finite = [bool(np.isfinite(a).all()) for a in jax.device_get(jax.tree.leaves(states[leaf]))]
        if not all(finite):
            path = f"{runner.program.paths[leaf]} {runner.program.shapes[leaf]}"
            raise CaptureError(f"{path}: its inputs hold NaN or infinite values in {when}")


def _flat(groups: Sequence[Sequence[int]], states: dict[int, Any]) -> list[list[Any]]:
    return [jax.tree.leaves([states[leaf] for leaf in group]) for group in groups if all(g in states for g in group)]


def _unflattened(flat: Sequence[np.ndarray], like: dict[int, Any]) -> dict[int, Any]:
    return jax.tree.unflatten(jax.tree.structure(like), flat)
