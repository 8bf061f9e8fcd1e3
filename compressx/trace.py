"""A traced function as a flat list of operations on numbered values, calls inlined."""

import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.extend.core import ClosedJaxpr, Literal

from compressx.native.convolve import lax_only
from compressx.tree import described, paths

Function = Callable[[Any, Any], Any]
Shape = tuple[int, ...]

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
      dtypes: of every value.
      treedef: of the returned tree.
    """

    paths: tuple[str, ...]
    inputs: tuple[int, ...]
    constants: dict[int, Any]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[Any, ...]
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


# What modules call the switch between training and evaluation, and its value in evaluation.
_EVALUATION = {"train": False, "training": False, "is_training": False, "deterministic": True}


def function_of(model: Any) -> Function:
    """`f(variables, inputs)` of a flax module in evaluation mode; a function is returned as it is.

    A module is given those of `train=False`, `training=False`, `is_training=False` and `deterministic=True` that its
    `__call__` has. An NNX module is split and merged with the variables (its state, or a part of it).

    Warns:
      UserWarning: when called, where running statistics of an NNX module are not among the variables.
    """
    if not isinstance(model, nn.Module | nnx.Module):
        return model
    known = inspect.signature(type(model).__call__).parameters
    switches: dict[str, Any] = {name: value for name, value in _EVALUATION.items() if name in known}
    if isinstance(model, nn.Module):
        return lambda variables, x: model.apply(variables, x, **switches)
    graph, state = nnx.split(model)
    statistics = _names(nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)))

    def run(variables: Any, x: Any) -> Any:
        given = jax.tree.map(lambda leaf: leaf, state)  # variables of this trace, which may be written to
        values = nnx.to_pure_dict(variables) if isinstance(variables, nnx.State) else variables
        if absent := sorted(statistics - _names(values)):
            warnings.warn(
                f"the variables lack the running statistics {', '.join(absent)}: those of the module itself are used. "
                "Give nnx.state(model, (nnx.Param, nnx.BatchStat)), and save both",
                stacklevel=2,
            )
        nnx.replace_by_pure_dict(given, values)
        merged = nnx.merge(graph, given)
        merged.eval()
        return merged(x, **switches)

    return run


def _names(tree: Any) -> set[str]:
    """The slash-joined paths of the leaves of nested dictionaries."""
    return {"/".join(map(str, path)) for path in flatten_dict(tree)}


def arrays(variables: Any) -> list[Any]:
    """The leaves of a pytree that are arrays, or described as such: an Equinox module has functions beside them."""
    return [leaf for leaf in jax.tree.leaves(variables) if hasattr(leaf, "dtype")]


def trace(model: nn.Module | Function, variables: Any, x: Any) -> Program:
    """Traces a network, convolutions of `experiments.common.models` as one primitive each.

    Args:
      model: a flax module, see `function_of`, or any `f(variables, x)`.
      variables: pytree of arrays or `jax.ShapeDtypeStruct`; other leaves (the functions of an Equinox module) are
        passed on as they are.
      x: inputs, a pytree of arrays or `jax.ShapeDtypeStruct`.
    """
    run, names, spec = _of_arrays(model, variables)
    with lax_only():
        closed, out = jax.make_jaxpr(run, return_shape=True)(spec, jax.tree.map(described, x))
    return flatten(closed, names, jax.tree.structure(out))


def _of_arrays(model: nn.Module | Function, variables: Any) -> tuple[Function, tuple[str, ...], list[Any]]:
    """The network as a function of the arrays among its variables; their names; their shapes and dtypes."""
    function, names = function_of(model), paths(variables)
    leaves, treedef = jax.tree.flatten(variables)
    held = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def run(given: Sequence[Any], x: Any) -> Any:
        whole = list(leaves)
        for i, leaf in zip(held, given, strict=True):
            whole[i] = leaf
        return function(jax.tree.unflatten(treedef, whole), x)

    return run, tuple(names[i] for i in held), [described(leaves[i]) for i in held]


def of_nothing(model: nn.Module | Function, variables: Any, x: Any) -> Any:
    """Shapes and dtypes of the outputs for inputs of batch 0, or None where an output is not one for each input.

    The axes that grow with the batch are those that differ between batches of 1 and 2: many networks cannot be traced
    with nothing in them (`y.reshape(y.shape[0], -1)` divides by 0).
    """

    run, _, spec = _of_arrays(model, variables)

    def outputs(n: int) -> Any:
        def sized(leaf: Any) -> jax.ShapeDtypeStruct:
            shape = np.shape(leaf)
            return jax.ShapeDtypeStruct((n, *shape[1:]) if shape[:1] == (0,) else shape, leaf.dtype)

        return jax.eval_shape(run, spec, jax.tree.map(sized, x))

    one, two = outputs(1), outputs(2)
    sizes = lambda a, b: tuple(m if m == n else 0 for m, n in zip(a.shape, b.shape, strict=True))
    empty = jax.tree.map(lambda a, b: jax.ShapeDtypeStruct(sizes(a, b), a.dtype), one, two)
    return empty if all(0 in leaf.shape for leaf in jax.tree.leaves(empty)) else None


def scan_parts(body: Program, given: Sequence[Shape], results: Sequence[Shape]) -> tuple[int, int]:
    """How many operands of a `scan` are the same in every step, and how many are carried from step to step.

    Read off the shapes: what is scanned over has one axis more outside of the body. jax's own names for these numbers
    went with 0.12.

    Args:
      body: the program of a step.
      given: shapes of the operands.
      results: shapes of the outputs.
    """
    over = sum(len(outer) > len(body.shapes[v]) for outer, v in zip(given, body.inputs, strict=True))
    stacked = sum(len(outer) > len(body.shapes[v]) for outer, v in zip(results, body.outputs, strict=True))
    carried = len(results) - stacked
    return len(given) - carried - over, carried


def flatten(closed: Any, names: tuple[str, ...] = (), treedef: Any = None) -> Program:
    """A closed jaxpr as a program, calls inlined; its first arguments are variables of these names."""
    shapes: list[tuple[int, ...]] = []
    dtypes: list[Any] = []
    constants: dict[int, Any] = {}
    ops: list[Op] = []

    def new(aval: Any) -> int:
        shapes.append(tuple(aval.shape))
        dtypes.append(aval.dtype)
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
                held = isinstance(inner, ClosedJaxpr)
                results = run(inner.jaxpr if held else inner, inner.consts if held else (), values)
            else:
                results = [new(v.aval) for v in equation.outvars]
                ops.append(Op(equation.primitive, dict(equation.params), tuple(values), tuple(results)))
            known |= dict(zip(equation.outvars, results, strict=True))
        return [read(v) for v in jaxpr.outvars]

    arguments = [new(v.aval) for v in closed.jaxpr.invars]
    outputs = run(closed.jaxpr, closed.consts, arguments)
    inputs = tuple(arguments[len(names) :])
    made = (constants, _needed(ops, outputs), tuple(outputs), tuple(shapes), tuple(dtypes), treedef)
    return Program(names, inputs, *made)


def _needed(ops: Sequence[Op], outputs: Sequence[int]) -> tuple[Op, ...]:
    """The operations that reach an output: what the function computes and throws away couples nothing."""
    wanted, kept = set(outputs), []
    for op in reversed(ops):
        if wanted.intersection(op.outputs):
            wanted.update(op.inputs)
            kept.append(op)
    return tuple(reversed(kept))


def settled(program: Program) -> Program:
    """The program with what constants alone make as constants: nothing of it belongs together but by what it meets.

    Broadcasts stay, as their extent is whatever they meet, and so does what depends on an extent that is free (the
    batch's, when a program is exported).
    """
    made = {v: op for op in program.ops for v in op.outputs}
    constants = dict(program.constants)
    fixed = set(constants)  # depends on neither variables nor inputs, and has a size
    for op in program.ops:
        sizes = (n for v in op.outputs for n in program.shapes[v])
        if all(v in fixed for v in op.inputs) and all(isinstance(n, int) for n in sizes):
            fixed |= set(op.outputs)

    def compute(value: int) -> Any:
        if value not in constants:
            op = made[value]
            out = op.primitive.bind(*map(compute, op.inputs), **op.params)
            constants.update(zip(op.outputs, out if op.primitive.multiple_results else [out], strict=True))
        return constants[value]

    with jax.ensure_compile_time_eval():
        for op in program.ops:
            index = op.inputs[1:] if op.primitive.name in ("gather", "dynamic_slice") else ()
            for v in (*index, *(op.outputs if op.primitive.name != "broadcast_in_dim" else ())):
                if v in fixed:
                    compute(v)
    ops = _needed([op for op in program.ops if op.outputs[0] not in constants], program.outputs)
    used = {v for op in ops for v in op.inputs} | set(program.outputs)
    return program._replace(ops=ops, constants={v: c for v, c in constants.items() if v in used})
