"""A traced function as a flat list of operations on numbered values, calls inlined."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Literal

from compressx.native.convolve import lax_only
from compressx.tree import paths

Function = Callable[[Any, Any], Any]

_CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat2", "checkpoint")


class Op(NamedTuple):
    """One primitive: `outputs = primitive(*inputs, **params)`, inputs and outputs as numbers of values."""

    primitive: Any
    params: dict[str, Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


class Program(NamedTuple):
    """A function of (variables, inputs), in single assignment form.

    Attributes:
      paths: names of the leaves of the variables; they are the values 0, 1, ...
      inputs: the values of the leaves of the inputs.
      constants: value -> array, closed over or written in the program.
      ops: in order.
      outputs: the values returned.
      shapes: of every value.
      treedef: of the returned tree.
    """

    paths: tuple[str, ...]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    treedef: Any

    def readers(self) -> dict[int, list[tuple[int, int]]]:
        """value -> (op, operand) of every use; -1 stands for the program's result."""
        found: dict[int, list[tuple[int, int]]] = {}
        for number, op in enumerate(self.ops):
            for operand, value in enumerate(op.inputs):
                found.setdefault(value, []).append((number, operand))
        for operand, value in enumerate(self.outputs):
            found.setdefault(value, []).append((-1, operand))
        return found


def function_of(model: nn.Module | Function) -> Function:
    """`f(variables, inputs)` of a flax module in evaluation mode; a function is returned as it is."""
    if isinstance(model, nn.Module):
        return lambda variables, x: model.apply(variables, x, train=False)
    return model


def trace(model: nn.Module | Function, variables: Any, x: Any) -> Program:
    """Traces a network, convolutions of `experiments.common.models` as one primitive each.

    Args:
      model: a flax module called as `apply(variables, x, train=False)`, or any `f(variables, x)`.
      variables: pytree of arrays or `jax.ShapeDtypeStruct`.
      x: inputs, a pytree of arrays or `jax.ShapeDtypeStruct`.
    """

    def shape(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype)

    spec = jax.tree.map(shape, (variables, x))
    with lax_only():
        closed, out = jax.make_jaxpr(function_of(model), return_shape=True)(*spec)
    shapes: list[tuple[int, ...]] = []
    constants: dict[int, Any] = {}
    ops: list[Op] = []

    def new(aval: Any) -> int:
        shapes.append(tuple(aval.shape))
        return len(shapes) - 1

    def constant(value: Any, aval: Any) -> int:
        number = new(aval)
        constants[number] = value if not isinstance(value, (bool, int, float)) else np.asarray(value, aval.dtype)
        return number

    def run(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[int]) -> list[int]:
        known = dict(zip(jaxpr.invars, arguments, strict=True))
        known |= {v: constant(c, v.aval) for v, c in zip(jaxpr.constvars, consts, strict=True)}

        def read(v: Any) -> int:
            return constant(v.val, v.aval) if isinstance(v, Literal) else known[v]

        for equation in jaxpr.eqns:
            values = [read(v) for v in equation.invars]
            inner = next((equation.params[k] for k in ("jaxpr", "call_jaxpr") if k in equation.params), None)
            if equation.primitive.name in _CALLS and inner is not None:
                closed = isinstance(inner, ClosedJaxpr)
                results = run(inner.jaxpr if closed else inner, inner.consts if closed else (), values)
            else:
                results = [new(v.aval) for v in equation.outvars]
                ops.append(Op(equation.primitive, dict(equation.params), tuple(values), tuple(results)))
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    arguments = [new(v.aval) for v in closed.jaxpr.invars]
    outputs = run(closed.jaxpr, closed.consts, arguments)
    names = tuple(paths(variables))
    return Program(
        names,
        tuple(arguments[len(names) :]),
        constants,
        _needed(ops, outputs),
        tuple(outputs),
        tuple(shapes),
        jax.tree.structure(out),
    )


def _needed(ops: Sequence[Op], outputs: Sequence[int]) -> tuple[Op, ...]:
    """The operations that reach an output: what the function computes and throws away couples nothing."""
    wanted, kept = set(outputs), []
    for op in reversed(ops):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))
