"""Physical compaction: the same network with smaller arrays, its outputs unchanged to float tolerance."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compressx.compaction.channels import Channels, CompactionError, channels
from compressx.compaction.dead import Dead, dead
from compressx.compaction.gathered import gathered_conv
from compressx.compaction.shrink import shrink
from compressx.native.convolve import convolve
from compressx.trace import Function, Op, of_nothing
from compressx.tree import paths

_NHWC, _HWIO = (0, 3, 1, 2), (3, 2, 0, 1)  # jax's names of dimensions: batch or filters, channels, rows, columns


class Compact(NamedTuple):
    """A network with smaller arrays.

    Attributes:
      variables: the tree of the whole network, with smaller leaves.
      apply: `apply(variables, x) -> outputs`, pure; jits, differentiates, exports. Batch normalisation uses its running
        statistics: a compact network is for inference (or for tuning with the statistics frozen).
      dead: what was removed, and what was folded into biases.
    """

    variables: Any
    apply: Callable[[Any, Any], Any]
    dead: Dead


def compact(model: nn.Module | Function, variables: Any, x: Any, keep: tuple[str, ...] = ()) -> Compact:
    """Removes every channel that does not matter, and returns the smaller network.

    Arguments and errors are those of `dead`, which says what goes. The network need not know: its traced program is run
    again with smaller shapes, convolutions in the formulation that is fastest at their new size.

        small = compact(model, variables, jnp.zeros((1, 32, 32, 3)))
        logits = jax.jit(small.apply)(small.variables, images)

    Example:
      >>> two = lambda v, x: jnp.maximum(x @ v["a"], 0) @ v["b"]
      >>> variables = {"a": jnp.asarray([[1.0, 0.0, 2.0]]), "b": jnp.ones((3, 1))}  # the second unit is never on
      >>> small = compressx.compaction.compact(two, variables, jnp.zeros((1, 1)))
      >>> {name: w.shape for name, w in small.variables.items()}
      {'a': (1, 2), 'b': (2, 1)}
    """
    found = dead(model, variables, x, keep)
    return Compact(cut(variables, found), smaller(model, variables, found, keep), found)


def cut(variables: Any, found: Dead) -> Any:
    """The leaves without what is removed, constants folded in."""
    leaves, treedef = jax.tree.flatten(variables)
    out = []
    for path, leaf in zip(paths(variables), leaves, strict=True):
        array = np.asarray(leaf)
        if path in found.folded:
            array = array + found.folded[path].astype(array.dtype)
        for axis, ids in enumerate(found.kept.get(path, ())):
            if ids is not None:
                array = array.take(ids, axis)
        out.append(jnp.asarray(array) if array is not leaf else leaf)
    return jax.tree.unflatten(treedef, out)


def smaller(
    model: nn.Module | Function,
    variables: Any,
    found: Dead,
    keep: tuple[str, ...] = (),
    positions: Mapping[str, np.ndarray] | None = None,
) -> Callable[[Any, Any], Any]:
    """`apply(small variables, x)` of the network without what is removed, for inputs of any batch.

    Args:
      model: the whole network.
      variables: of the whole network, arrays or shapes.
      found: what is removed.
      keep: see `channels`.
      positions: path -> the positions of a smaller kernel that are not all zero; its leaf is then the matrix of those
        (see `gathered.gather`), and its convolution a product of gathered patches.
    """
    spec = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    traced: dict[Any, tuple[Channels, np.ndarray]] = {}

    def apply(small: Any, x: Any) -> Any:
        shape = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf), leaf.dtype), x)
        leaves, treedef = jax.tree.flatten(shape)
        if any(s.shape[:1] == (0,) for s in leaves):
            empty = of_nothing(model, spec, shape)  # outputs are never cut
            if empty is not None:
                return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), empty)
        key = (treedef, tuple((s.shape, s.dtype) for s in leaves))
        if key not in traced:
            whole = channels(model, spec, shape, keep)
            traced[key] = whole, _masks(whole, found)
        whole, live = traced[key]
        return _run(whole, live, jax.tree.leaves(small), jax.tree.leaves(x), positions or {})

    return apply


def _masks(whole: Channels, found: Dead) -> np.ndarray:
    """unit -> whether it stays."""
    live = np.ones(whole.units, bool)
    for leaf, path in enumerate(whole.program.paths):
        for units, ids in zip(whole.axes[leaf], found.kept.get(path, ()), strict=False):
            if ids is not None:
                gone = np.setdiff1d(np.arange(0 if units is None else units.size), ids)
                if units is None or not units[gone].all():
                    raise CompactionError(f"{path}: inputs of this shape need channels that inputs of another did not")
                live[units[gone]] = False
    return live


def _run(
    whole: Channels, live: np.ndarray, leaves: list[Any], inputs: list[Any], positions: Mapping[str, np.ndarray]
) -> Any:
    program = whole.program
    held = {value: path for value, path in enumerate(program.paths) if path in positions}

    def masks(value: int) -> list[np.ndarray | None]:
        cuts = (None if units is None else live[units] for units in whole.axes[value])
        return [None if m is None or m.all() else m for m in cuts]

    def shape(value: int) -> tuple[int, ...]:
        pairs = zip(program.shapes[value], masks(value), strict=True)
        return tuple(n if m is None else int(m.sum()) for n, m in pairs)

    values: dict[int, Any] = {}
    for value, array in program.constants.items():
        for axis, mask in enumerate(masks(value)):
            if mask is not None:
                array = np.asarray(array).compress(mask, axis)
        values[value] = array
    for value, leaf in enumerate(leaves):
        wanted = shape(value)
        if value in held:
            wanted = (len(positions[held[value]]), wanted[-1])
        if jnp.shape(leaf) != wanted:
            raise CompactionError(f"{program.paths[value]}: has shape {jnp.shape(leaf)}, expected {wanted}")
        values[value] = leaf
    values |= zip(program.inputs, inputs, strict=True)
    for op in program.ops:
        before, after = [masks(v) for v in op.inputs], [masks(v) for v in op.outputs]
        if any(m is not None for axes in (*before, *after) for m in axes):
            shapes = [program.shapes[v] for v in op.inputs], [shape(v) for v in op.outputs]
            op = shrink(op, before, after, *shapes, program.constants)
        arguments = [values[v] for v in op.inputs]
        gathered = next((held[v] for v in op.inputs if v in held), None)
        if gathered is None:
            values |= zip(op.outputs, _do(op, arguments), strict=True)
        else:
            window = shape(op.inputs[1])[:3]
            values[op.outputs[0]] = _gathered(op, arguments, positions[gathered], window, gathered)
    return jax.tree.unflatten(program.treedef, [values[v] for v in program.outputs])


def _gathered(op: Op, arguments: list[Any], positions: np.ndarray, window: tuple[int, ...], path: str) -> Any:
    p = op.params
    if op.primitive.name != "conv_general_dilated" or not plain(op):
        raise CompactionError(f"{path}: only a plain convolution NHWC, HWIO can be gathered, not {op.primitive.name}")
    pads = tuple((int(a), int(b)) for a, b in p["padding"])
    lhs, matrix = arguments
    return gathered_conv(lhs, matrix, positions, window, tuple(p["window_strides"]), pads)


def plain(op: Op) -> bool:
    """Whether a convolution is of NHWC images with HWIO kernels, one group, no dilation."""
    p = op.params
    numbers = p["dimension_numbers"]
    return (
        (tuple(numbers.lhs_spec), tuple(numbers.rhs_spec), tuple(numbers.out_spec)) == (_NHWC, _HWIO, _NHWC)
        and p["feature_group_count"] == p["batch_group_count"] == 1
        and set(p["lhs_dilation"]) == set(p["rhs_dilation"]) == {1}
    )


def _do(op: Op, arguments: list[Any]) -> list[Any]:
    p = op.params
    if op.primitive.name == "conv_general_dilated" and p["batch_group_count"] == 1 and not p["preferred_element_type"]:
        lhs, rhs = arguments
        out = convolve(
            lhs,
            rhs,
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            p["dimension_numbers"],
            p["feature_group_count"],
            p["precision"],
        )
        return [out]
    out = op.primitive.bind(*arguments, **p)
    return list(out) if op.primitive.multiple_results else [out]
