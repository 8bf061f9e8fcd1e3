"""Runs a traced network operation by operation, several sets of weights side by side, and observes its products.

Operations are executed one at a time, so that only the values that are still needed are held, and what is compiled is
shared by all layers of one shape. Where the networks still agree (before the first layer in which they differ) a value
is computed once and is one array.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from compressx.capture.observers import Observer
from compressx.capture.products import Product, input_lead, input_matrix
from compressx.capture.uses import Use, Uses
from compressx.trace import Op, Program, flatten, scan_parts

Values = tuple[Any, ...]  # a value in each of the networks
Slots = dict[Any, Any]
_PART = 1 << 21  # entries of X that are formed at a time
_ROWS = 1 << 13  # rows of X whose products are summed in float32


class How(NamedTuple):
    """Everything about a use that what is compiled depends on; hashable."""

    product: Product
    batches: tuple[int, ...] | None
    rows: tuple[int, ...] | None
    merged: bool


def how(use: Use) -> How:
    return How(use.product, use.batches, use.rows, use.merged)


def chosen(form: How, x: Array) -> Array:
    """Of X `[B, rows, C]` what the leaf multiplies, its P inputs in the leaf's order."""
    if form.batches is not None:
        x = x[np.asarray(form.batches), :, :]
    if form.merged:
        x = x.reshape(1, -1, x.shape[-1])
    return x if form.rows is None else x[:, :, np.asarray(form.rows)]


def observed(observer: Observer, use: Use, state: Any, operands: Values, networks: int) -> Any:
    """The state `[B, ...]` of an observer after the rows of a product in so many networks."""
    return _observed(observer.update, how(use), networks, state, *(operands[:1] if agree(operands) else operands))


def agree(value: Values) -> bool:
    """Whether a value is the same array in all networks."""
    return all(x is value[0] for x in value)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _observed(update: Any, form: How, networks: int, state: Any, *operands: Array) -> Any:
    def step(state: Any, parts: Sequence[Array]) -> Any:
        xs = [chosen(form, input_matrix(form.product, part)) for part in parts]
        xs = [x if x.dtype == jnp.float64 else x.astype(jnp.float32) for x in xs]
        return jax.tree.map(
            lambda new, old: new.astype(old.dtype), update(state, xs if len(xs) == networks else xs * networks), state
        )

    return by_parts(form.product, step, state, [input_lead(form.product, x) for x in operands])


def by_parts(product: Product, step: Any, state: Any, arrays: Sequence[Array]) -> Any:
    """`step(state, parts)` over the leading axis of what `input_lead` gives, so many that a part is of bounded size."""
    n = arrays[0].shape[0]
    one = jax.ShapeDtypeStruct((1, *arrays[0].shape[1:]), arrays[0].dtype)
    x = jax.eval_shape(partial(input_matrix, product), one)
    size = max(1, min(n, _PART // max(1, x.size), _ROWS // max(1, x.shape[1])))
    whole = n // size * size
    if whole > size:
        cut = [x[:whole].reshape(-1, size, *x.shape[1:]) for x in arrays]
        state, _ = lax.scan(lambda held, parts: (step(held, parts), None), state, cut)
    elif whole:
        state = step(state, [x[:whole] for x in arrays])
    return step(state, [x[whole:] for x in arrays]) if whole < n else state


class Runner:
    """A program, the uses in it, and an observer of some of its leaves.

    Attributes:
      program: the traced network.
      uses: see `uses`.
      observer: what is noted.
      leaves: of these.
      networks: how many sets of weights run side by side.
    """

    def __init__(
        self, program: Program, found: Uses, observer: Observer, leaves: Iterable[int], networks: int = 1
    ) -> None:
        self.program, self.uses, self.observer, self.networks = program, found, observer, networks
        wanted = set(leaves)
        kept = {scope: tuple(u for u in held if u.leaf in wanted) for scope, held in found.at.items()}
        self.at = {scope: held for scope, held in kept.items() if held}
        self.last_use = _last_uses(program)

    def init(self) -> dict[int, Any]:
        """The states before anything was seen, by leaf."""
        wanted = {use.leaf for held in self.at.values() for use in held}
        views = self.uses.views
        return {leaf: self.observer.init(views[leaf].groups, views[leaf].rows) for leaf in sorted(wanted)}

    def last(self) -> int:
        """The number of the last operation that is observed."""
        return max(scope[0] for scope in self.at)

    def start(self, weights: Sequence[Sequence[Any]], x: Any) -> dict[int, Values]:
        """The values before the first operation, for the arrays of each network and one batch of inputs."""
        program, count = self.program, self.networks
        env: dict[int, Values] = {v: (jnp.asarray(c, program.dtypes[v]),) * count for v, c in _plain(program).items()}
        env |= {v: (c,) * count for v, c in program.constants.items() if v not in env}
        env |= {leaf: tuple(automatic(one[leaf]) for one in weights) for leaf in range(len(program.paths))}
        for v, leaf in zip(program.inputs, jax.tree.leaves(x), strict=True):
            given = automatic(leaf)
            env[v] = (given if _typed(program.dtypes[v]) else jnp.asarray(given, program.dtypes[v]),) * count
        return env

    def run(
        self, env: dict[int, Values], ops: Iterable[int], states: dict[int, Any], held: frozenset[int] = frozenset()
    ) -> None:
        """Executes operations; values and states are written in place.

        Args:
          env: the values known; each is dropped behind its last reader.
          ops: numbers of operations, rising.
          states: by leaf; observations are added to those that are there.
          held: values to be kept.
        """
        for number in ops:
            op = self.program.ops[number]
            own = self.slots((number,), states)
            ins = [env[v] for v in op.inputs]
            results, own = self.execute(self.program, op, (number,), ins, own, self.networks)
            self.put(own, states)
            env |= zip(op.outputs, results, strict=True)
            for v in (*op.inputs, *op.outputs):
                if self.last_use.get(v) == number and v not in held and v >= len(self.program.paths):
                    env.pop(v, None)

    def slots(self, scope: tuple[int, ...], states: Mapping[int, Any]) -> Slots:
        """The states of the matrices that the uses within an operation read, by what tells them apart."""
        slots: Slots = {}
        for where, held in self.at.items():
            if where[: len(scope)] == scope:
                for use in held:
                    if use.leaf in states and (key := key_of(use)) not in slots:
                        if any(use.leaf == other[0] for other in slots):
                            raise ValueError(
                                f"{self.program.paths[use.leaf]}: one loop reads it in ways that differ, which is not "
                                "supported"
                            )
                        slots[key] = jax.tree.map(partial(_taken, index=use.groups), states[use.leaf])
        return slots

    def put(self, slots: Slots, states: dict[int, Any]) -> None:
        """Writes slots back into the states of their leaves."""
        for (leaf, shape, raw), slot in slots.items():
            index = np.frombuffer(raw, np.int64).reshape(shape)
            states[leaf] = jax.tree.map(partial(_written, index), states[leaf], slot)

    def execute(
        self, program: Program, op: Op, scope: tuple[int, ...], ins: Sequence[Values], slots: Slots, count: int
    ) -> tuple[list[Values], Slots]:
        """The results of an operation in each network, and the slots after it."""
        if op.primitive.name == "scan" and slots:
            return self._scan(program, op, scope, ins, slots, count)
        slots = dict(slots)
        for use in self.at.get(scope, ()):
            if (key := key_of(use)) in slots:
                slots[key] = observed(self.observer, use, slots[key], ins[1 - use.product.side], self.networks)
        if all(map(agree, ins)):
            return [(r,) * count for r in _bind(op, [value[0] for value in ins])], slots
        each = [_bind(op, [value[k] for value in ins]) for k in range(count)]
        return list(zip(*each, strict=True)), slots

    def _scan(
        self, outer: Program, op: Op, scope: tuple[int, ...], ins: Sequence[Values], slots: Slots, count: int
    ) -> tuple[list[Values], Slots]:
        """A loop, observed in every step."""
        inside = 1 if all(map(agree, ins)) else count
        ins = [value[:inside] for value in ins]
        body = flatten(op.params["jaxpr"])
        shapes = [outer.shapes[v] for v in op.inputs], [outer.shapes[v] for v in op.outputs]
        fixed, carried = scan_parts(body, *shapes)
        over = fixed + carried
        level = len(scope) - 1
        sliced = {key for key in slots if key[1][level] > 1 or op.params["length"] == 1}
        constants = {v: (c,) * inside for v, c in body.constants.items()}

        def step(carry: Any, slices: Any) -> Any:
            values, kept = carry
            parts, own = slices
            env = dict(constants) | dict(zip(body.inputs, (*ins[:fixed], *values, *parts), strict=True))
            inner = {**kept, **own}
            for number, one in enumerate(body.ops):
                mine = {k: s for k, s in inner.items() if self._within(k, (*scope, number))}
                results, after = self.execute(body, one, (*scope, number), [env[v] for v in one.inputs], mine, inside)
                inner |= after
                env |= zip(one.outputs, results, strict=True)
            outs = [env[v] for v in body.outputs]
            return (outs[:carried], {k: inner[k] for k in kept}), (outs[carried:], {k: inner[k] for k in own})

        # a slot has an axis for each loop, of length 1 where the loop does not take the leaf slice by slice
        kept = {k: jax.tree.map(lambda s: s[0], slot) for k, slot in slots.items() if k not in sliced}
        own = {k: s for k, s in slots.items() if k in sliced}
        (last, kept), (stacked, own) = lax.scan(
            step,
            (list(ins[fixed:over]), kept),
            (list(ins[over:]), own),
            length=op.params["length"],
            reverse=op.params["reverse"],
        )
        results = [value * (count // inside) for value in (*last, *stacked)]
        after = {k: jax.tree.map(lambda s: s[None], slot) for k, slot in kept.items()} | own
        return results, after

    def _within(self, key: Any, scope: tuple[int, ...]) -> bool:
        held = (u for where, us in self.at.items() if where[: len(scope)] == scope for u in us)
        return any(key_of(use) == key for use in held)


def automatic(x: Any) -> Any:
    """An array that is sharded over a mesh of explicit axes, sharded alike with axes that the compiler sees to."""
    sharding = getattr(x, "sharding", None)
    if not isinstance(sharding, NamedSharding) or isinstance(sharding.mesh, AbstractMesh):
        return x
    if all(kind == AxisType.Auto for kind in sharding.mesh.axis_types):
        return x
    mesh = Mesh(sharding.mesh.devices, sharding.mesh.axis_names)
    return jax.device_put(x, NamedSharding(mesh, sharding.spec))


def key_of(use: Use) -> Any:
    """What tells the slots of uses apart: the leaf, and which of its matrices they read."""
    return use.leaf, use.groups.shape, np.ascontiguousarray(use.groups, np.int64).tobytes()


def _taken(state: Any, index: np.ndarray) -> Any:
    whole = index.ndim == 1 and list(index) == list(range(np.shape(state)[0]))
    return jnp.asarray(state) if whole else jnp.asarray(state)[index]


def _written(index: np.ndarray, state: Any, new: Any) -> Any:
    whole = index.ndim == 1 and list(index) == list(range(np.shape(state)[0]))
    return new if whole else jnp.asarray(state).at[index].set(new)


def _bind(op: Op, arguments: Sequence[Any]) -> list[Any]:
    made = op.primitive.bind(*arguments, **op.params)
    return list(made) if op.primitive.multiple_results else [made]


def _last_uses(program: Program) -> dict[int, int]:
    found = {v: number for number, op in enumerate(program.ops) for v in (*op.outputs, *op.inputs)}
    return {v: n for v, n in found.items() if v not in program.outputs}


def _plain(program: Program) -> dict[int, Any]:
    return {v: c for v, c in program.constants.items() if not _typed(program.dtypes[v])}


def _typed(dtype: Any) -> bool:
    """Whether values of a type are no plain numbers (keys of random numbers)."""
    return bool(jnp.issubdtype(dtype, jax.dtypes.extended))
