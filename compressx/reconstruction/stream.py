"""The compressed and the dense network side by side over all calibration batches, an operation after the other.

Between two layers only the values that are still needed are held, for every batch. Values that depend on the weights
alone are formed when an operation needs them, so that a weight may change at any time before that.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from compressx.capture.capture import Network, check_states, read
from compressx.capture.observers import Observer, products
from compressx.capture.products import input_lead, input_matrix, output_lead, output_matrix
from compressx.capture.uses import Use, uses
from compressx.capture.walk import How, Runner, Values, agree, by_parts, chosen, how, key_of, observed
from compressx.reconstruction.blocks import Tail, in_order, makers_of, shortcuts
from compressx.reconstruction.norms import Moments, Norm, moments, norms
from compressx.trace import arrays

COMPRESSED, DENSE = 0, 1


def _init(groups: int, rows: int) -> dict[str, Any]:
    square, vector = np.zeros((groups, rows, rows)), np.zeros((groups, rows))
    return {"h": square, "c": square, "sum": vector, "sum_dense": vector, "rows": np.zeros(groups)}


def _update(state: dict[str, Any], xs: Sequence[Array]) -> dict[str, Any]:
    x, dense = xs
    square = products(x, x)
    total = x.sum(1).astype(jnp.float64)
    same = dense is x
    return {
        "h": state["h"] + square,
        "c": state["c"] + (square if same else products(x, dense)),
        "sum": state["sum"] + total,
        "sum_dense": state["sum_dense"] + (total if same else dense.sum(1).astype(jnp.float64)),
        "rows": state["rows"] + x.shape[1],
    }


BOTH = Observer(_init, _update, lambda state: state)
"""X~'X~, X~'X and the sums of both, of the compressed inputs X~ and the dense ones X."""


class Stream:
    """Both networks on all batches.

    Attributes:
      network: the traced network of the first batch, its operations in an order in which shortcuts come first.
      tails: what follows each leaf, see `blocks`.
      norms: operation -> the normalisations that begin there.
      weights: of the compressed and of the dense network, by leaf.
    """

    def __init__(self, model: Any, params: Any, batches: Sequence[Any], leaves: Sequence[str], corrected: bool) -> None:
        held = list(arrays(params))
        self.weights: tuple[list[Any], list[Any]] = (held, list(held))
        self.parts: list[_Part] = []
        known: dict[Any, Network] = {}
        for x in batches:
            flat, tree = jax.tree.flatten(x)
            key = (tree, tuple((np.shape(leaf), str(leaf.dtype)) for leaf in flat))
            if key not in known:
                known[key] = _ordered(read(model, params, x), leaves, corrected)
            self.parts.append(_Part(known[key], x, self.weights))
        self.network = self.parts[0].network
        program, found = self.network
        if any(part.signature() != self.parts[0].signature() for part in self.parts):
            raise ValueError("batches of different shapes make networks of different operations: give equal shapes")
        numbers = [program.paths.index(path) for path in leaves]
        self.tails: dict[int, Tail] = shortcuts(program, found, [n for n in numbers if n in found.views])
        self.norms: dict[int, list[Norm]] = {}
        for norm in norms(program, found.data):
            self.norms.setdefault(norm.op, []).append(norm)

    def put(self, leaf: int, value: Any) -> None:
        """Changes a leaf of the compressed network."""
        self.weights[COMPRESSED][leaf] = value
        for part in self.parts:
            part.env[leaf] = (value, part.env[leaf][DENSE])

    def run(self, number: int) -> None:
        """Executes one operation on every batch."""
        for part in self.parts:
            part.run(number)

    def both(self, leaf: int, number: int) -> dict[str, NDArray[np.float64]]:
        """Sums over the inputs of a leaf in operation `number`, which is not executed: see `BOTH`.

        Raises:
          CaptureError: they are not finite.
        """
        states: dict[int, Any] = {}
        for k, part in enumerate(self.parts, 1):
            part.observe(leaf, number, states)
            if k == len(self.parts):
                check_states(part.runner(leaf), states, "the batches")
        held: dict[str, Any] = jax.device_get(states[leaf])
        return {name: np.asarray(a, np.float64) for name, a in held.items()}

    def correction(self, leaf: int) -> tuple[NDArray[np.float64], NDArray[np.float64]] | None:
        """X~'D / rows `[G, P, F]` and the mean of D, `[G, F]`, of the shortcut's error D = dense - compressed.

        D is divided by the factors between the layer and the sum. None where there is no shortcut, or no error.
        """
        tail = self.tails.get(leaf)
        if tail is None or tail.shortcut is None:
            return None
        if all(agree(part.env[tail.shortcut]) for part in self.parts):
            return None
        number = self.network.uses.scopes(leaf)[0][0]
        uses_here = [use for use in self.network.uses.at[number,] if use.leaf == leaf]
        columns = uses_here[0].columns
        if len(uses_here) > 1 or (columns is not None and len(columns) < self.network.uses.views[leaf].columns):
            return None  # a part of the outputs alone
        state: Any = None
        for part in self.parts:
            state = part.correct(leaf, number, tail, state)
        held = jax.device_get(state)
        rows = np.asarray(held["rows"], np.float64)
        return np.asarray(held["xd"]) / rows[:, None, None], np.asarray(held["d"]) / rows[:, None]

    def moments(self, norm: Norm) -> tuple[Moments, Moments] | None:
        """Moments of a normalisation's input in the compressed and in the dense network; None where they are equal."""
        values = [part.env[norm.value] for part in self.parts]
        if all(map(agree, values)):
            return None
        compressed, dense = (moments([value[k] for value in values], norm.axis) for k in (COMPRESSED, DENSE))
        return compressed, dense

    def outputs(self) -> list[list[Values]]:
        """The outputs of both networks for every batch."""
        return [[part.value(v) for v in part.network.program.outputs] for part in self.parts]


def _ordered(network: Network, leaves: Sequence[str], corrected: bool) -> Network:
    program, found = network
    if not corrected:
        return network
    numbers = [program.paths.index(path) for path in leaves]
    tails = shortcuts(program, found, [n for n in numbers if n in found.views])
    moved = in_order(program, found, tails)
    return network if moved.ops == program.ops else Network(moved, uses(moved))


class _Part:
    """Both networks on one batch."""

    def __init__(self, network: Network, x: Any, weights: tuple[list[Any], list[Any]]) -> None:
        self.network = network
        program, found = network
        self._runners: dict[int, Runner] = {}
        self._plain = Runner(program, found, BOTH, (), networks=2)
        self.env = self._plain.start(weights, x)
        self._makers = makers_of(program)

    def signature(self) -> tuple[Any, ...]:
        program, found = self.network
        return tuple(op.primitive.name for op in program.ops), tuple(found.at)

    def runner(self, leaf: int) -> Runner:
        if leaf not in self._runners:
            self._runners[leaf] = Runner(*self.network, BOTH, (leaf,), networks=2)
        return self._runners[leaf]

    def value(self, v: int) -> Values:
        """A value that is held, or that the weights alone make."""
        if v in self.env:
            return self.env[v]
        formed: dict[int, Values] = {}
        waiting = [v]
        while waiting:
            number = self._makers[waiting[-1]]
            op = self.network.program.ops[number]
            missing = [i for i in op.inputs if i not in self.env and i not in formed]
            if missing:
                waiting.extend(missing)
                continue
            ins = [self.env.get(i, formed.get(i, ())) for i in op.inputs]
            results, _ = self._plain.execute(self.network.program, op, (number,), ins, {}, 2)
            formed |= zip(op.outputs, results, strict=True)
            waiting.pop()
        return formed[v]

    def run(self, number: int) -> None:
        op = self.network.program.ops[number]
        if not any(v in self.network.uses.data for v in op.inputs):
            return
        ins = [self.value(v) for v in op.inputs]
        results, _ = self._plain.execute(self.network.program, op, (number,), ins, {}, 2)
        self.env |= zip(op.outputs, results, strict=True)
        for v in (*op.inputs, *op.outputs):
            if self._plain.last_use.get(v) == number and v in self.network.uses.data:
                self.env.pop(v, None)

    def observe(self, leaf: int, number: int, states: dict[int, Any]) -> None:
        runner = self.runner(leaf)
        if not states:
            states |= runner.init()
        op = self.network.program.ops[number]
        with jax.enable_x64(True):
            slots = runner.slots((number,), states)
            held = runner.at.get((number,), ())
            if held:
                for use in held:
                    key = key_of(use)
                    slots[key] = observed(BOTH, use, slots[key], self.value(use.source), 2)
            else:
                ins = [self.value(v) for v in op.inputs]
                _, slots = runner.execute(self.network.program, op, (number,), ins, slots, 2)
            runner.put(slots, states)

    def correct(self, leaf: int, number: int, tail: Tail, state: Any) -> Any:
        use = next(u for u in self.network.uses.at[number,] if u.leaf == leaf)
        assert tail.shortcut is not None
        compressed, dense = self.env[tail.shortcut]
        gain: Any = None
        for v, divides in tail.gains:
            own = self.value(v)[DENSE].astype(jnp.float32)
            own = 1.0 / own if divides else own
            gain = own if gain is None else gain * own
        view = self.network.uses.views[leaf]
        if state is None:
            zero = {"xd": (view.groups, view.rows, view.columns), "d": (view.groups, view.columns)}
            state = {k: np.zeros(s) for k, s in zero.items()} | {"rows": np.zeros(view.groups)}
        with jax.enable_x64(True):
            form = how(use)
            slot = jax.tree.map(lambda s: jnp.asarray(s)[use.groups], state)
            slot = _corrected(form, use.columns, slot, self.value(use.source)[COMPRESSED], compressed, dense, gain)
            return jax.tree.map(lambda s, new: jnp.asarray(s).at[use.groups].set(new), state, slot)


def _correct(
    form: How, columns: tuple[int, ...] | None, state: Any, x: Array, compressed: Array, dense: Array, gain: Any
) -> Any:
    error = dense.astype(jnp.float32) - compressed.astype(jnp.float32)
    if gain is not None:
        small = 1e-6 * jnp.max(jnp.abs(gain))
        error = jnp.where(jnp.abs(gain) > small, error / jnp.where(jnp.abs(gain) > small, gain, 1.0), 0.0)

    def step(state: Any, parts: Sequence[Array]) -> Any:
        inputs = chosen(form, input_matrix(form.product, parts[0])).astype(jnp.float32)
        missing = output_matrix(form.product, parts[1])
        if form.batches is not None:
            missing = missing[np.asarray(form.batches), :, :]
        if form.merged:
            missing = missing.reshape(1, -1, missing.shape[-1])
        if columns is not None:
            missing = missing[:, :, np.asarray(columns)]
        return {
            "xd": state["xd"] + products(inputs, missing),
            "d": state["d"] + missing.sum(1).astype(jnp.float64),
            "rows": state["rows"] + inputs.shape[1],
        }

    return by_parts(form.product, step, state, [input_lead(form.product, x), output_lead(form.product, error)])


_corrected = jax.jit(_correct, static_argnums=(0, 1))


def whole(stats: Mapping[str, NDArray[np.float64]], name: str) -> NDArray[np.float64]:
    """A sum of `BOTH` divided by the rows."""
    rows = np.maximum(stats["rows"], 1.0)
    return stats[name] / rows.reshape(-1, *(1,) * (stats[name].ndim - 1))


__all__ = ["BOTH", "COMPRESSED", "DENSE", "Stream", "Use", "whole"]
