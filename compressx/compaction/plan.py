"""The operations that are left of a program without its dead channels, and how they are run."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from compressx.compaction.channels import CompactionError, Scope, parts_of
from compressx.compaction.shrink import shrink
from compressx.trace import Op, Program


class Plan(NamedTuple):
    """A scope on arrays without their dead indices.

    Attributes:
      program: the whole one.
      shapes: of its values, as they are left.
      constants: value -> array, cut.
      ops: of the program, in order, with the parameters of the smaller shapes.
      inner: number of a scan's op -> its body, where that is another one than before.
    """

    program: Program
    shapes: tuple[tuple[int, ...], ...]
    constants: dict[int, Any]
    ops: tuple[Op, ...]
    inner: dict[int, "Plan"]

    def same(self, other: "Plan") -> bool:
        """Whether two plans do the same."""
        return (
            self.shapes == other.shapes
            and _equal(self.constants, other.constants)
            and _equal([(op.primitive, op.params) for op in self.ops], [(op.primitive, op.params) for op in other.ops])
            and self.inner.keys() == other.inner.keys()
            and all(self.inner[k].same(other.inner[k]) for k in self.inner)
        )


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, np.ndarray | jax.Array) and isinstance(b, np.ndarray | jax.Array):
        return a.shape == b.shape and a.dtype == b.dtype and bool((np.asarray(a) == np.asarray(b)).all())
    return bool(a == b)


def plans(scope: Scope, live: np.ndarray) -> Plan:
    """What is left of a scope.

    Args:
      scope: a program with the units of its values.
      live: unit -> whether it stays.

    Raises:
      CompactionError: the steps of a scan keep numbers of channels that no single body can have.
    """
    program = scope.program
    masks = [[None if u is None else live[u] for u in axes] for axes in scope.axes]
    masks = [[None if m is None or m.all() else m for m in axes] for axes in masks]

    def left(value: int) -> tuple[int, ...]:
        sizes = zip(program.shapes[value], masks[value], strict=True)
        return tuple(n if m is None else _number(m) for n, m in sizes)

    shapes = tuple(map(left, range(len(program.shapes))))
    constants = {}
    for value, array in program.constants.items():
        for axis, mask in enumerate(masks[value]):
            if mask is not None:
                array = np.asarray(array).compress(mask, axis)
        constants[value] = array
    ops, inner = [], {}
    for number, op in enumerate(program.ops):
        bodies = [plans(body, live) for body in scope.inner.get(number, ())]
        if bodies:
            if not all(bodies[0].same(b) for b in bodies[1:]):
                raise CompactionError("the steps of a scan keep channels that no single body can have")
            if bodies[0].shapes != bodies[0].program.shapes:
                inner[number] = bodies[0]
        cut = [masks[v] for v in op.inputs], [masks[v] for v in op.outputs]
        if any(m is not None and m.ndim == 1 for side in cut for axes in side for m in axes):
            whole, results = [program.shapes[v] for v in op.inputs], [shapes[v] for v in op.outputs]
            op = shrink(op, *cut, whole, results, program.constants)
        ops.append(op)
    return Plan(program, shapes, constants, tuple(ops), inner)


def _number(mask: np.ndarray) -> int:
    """How many indices stay; of a stacked leaf in every slice."""
    numbers = set(np.atleast_2d(mask).sum(1).tolist())
    if len(numbers) > 1:
        raise CompactionError(f"the slices of a stacked leaf keep {sorted(numbers)} channels, and must keep one number")
    return int(numbers.pop())


Do = Callable[[int, Op, Sequence[Any]], list[Any] | None]


def run(plan: Plan, given: Mapping[int, Any], do: Do) -> list[Any]:
    """The outputs of a plan.

    Args:
      plan: from `plans`.
      given: value -> array, of its leaves and inputs.
      do: `do(number of the op, op, arguments) -> results`; the number is -1 in the body of a scan.
    """
    return _run(plan, given, do, outside=True)


def _run(plan: Plan, given: Mapping[int, Any], do: Do, outside: bool) -> list[Any]:
    program = plan.program
    values = {**plan.constants, **given}
    for number, op in enumerate(plan.ops):
        arguments = [values[v] for v in op.inputs]
        if number in plan.inner:
            results: Any = _scan(op, program, plan.inner[number], arguments, do)
        else:
            results = do(number if outside else -1, op, arguments)
        values |= zip(op.outputs, results, strict=True)
    return [values[v] for v in program.outputs]


def _scan(op: Op, outer: Program, body: Plan, arguments: list[Any], do: Do) -> list[Any]:
    fixed, carried = parts_of(op, outer, body.program)
    over, p = fixed + carried, op.params

    def step(carry: list[Any], slices: list[Any]) -> tuple[list[Any], list[Any]]:
        given = dict(zip(body.program.inputs, (*arguments[:fixed], *carry, *slices), strict=True))
        results = _run(body, given, do, outside=False)
        return results[:carried], results[carried:]

    start = [jnp.asarray(x) for x in arguments[fixed:over]]
    length, unroll = p["length"], p.get("unroll", 1)
    last, stacked = lax.scan(step, start, arguments[over:], length=length, reverse=p["reverse"], unroll=unroll)
    return [*last, *stacked]
