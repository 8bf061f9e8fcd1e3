"""Physical compaction: the same network with smaller arrays, its outputs unchanged to float tolerance."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compressx.compaction.channels import Channels, CompactionError, channels
from compressx.compaction.dead import Dead, dead
from compressx.compaction.gathered import gathered_conv
from compressx.compaction.plan import Plan, plans, run
from compressx.native.convolve import convolve
from compressx.trace import Function, Op, arrays, of_nothing
from compressx.tree import described, paths

_NHWC, _HWIO = (0, 3, 1, 2), (3, 2, 0, 1)  # jax's names of dimensions: batch or filters, channels, rows, columns


_SAID = 8  # axes that the text of a warning names


class NothingRemoved(UserWarning):
    """A network has empty channels, and all of them must stay; the text names the operations that keep them.

    Example:
      >>> warnings.simplefilter("error", compressx.compaction.NothingRemoved)  # where a run relies on a smaller network
    """


class Compact(NamedTuple):
    """A network with smaller arrays.

    Attributes:
      variables: the tree of the whole network, with smaller leaves.
      apply: `apply(variables, x) -> outputs`, pure; jits, differentiates, exports. Batch normalisation uses its running
        statistics: a compact network is for inference (or for tuning with the statistics frozen).
      dead: what was removed, and what was folded into biases.

    Example:
      >>> two = lambda v, x: jnp.maximum(x @ v["a"], 0) @ v["b"]
      >>> variables = {"a": jnp.asarray([[1.0, 0.0, 2.0]]), "b": jnp.ones((3, 1))}  # the second unit is never on
      >>> small = compressx.compaction.compact(two, variables, jnp.zeros((1, 1)))
      >>> small.apply(small.variables, jnp.ones((1, 1))).tolist(), two(variables, jnp.ones((1, 1))).tolist()
      ([[3.0]], [[3.0]])
    """

    variables: Any
    apply: Callable[[Any, Any], Any]
    dead: Dead


def compact(model: nn.Module | Function, variables: Any, x: Any, keep: tuple[str, ...] = ()) -> Compact:
    """Removes every channel that does not matter, and returns the smaller network.

    The network need not know: its traced program is run again with smaller shapes, convolutions in the formulation that
    is fastest at their new size.

        small = compact(model, variables, jnp.zeros((1, 32, 32, 3)))
        logits = jax.jit(small.apply)(small.variables, images)

    A warning, `NothingRemoved`, names what stands in the way where weights are 0 along whole indices and none can go.

    Args:
      model, variables, x, keep: as for `dead`, which says what goes.

    Returns:
      `Compact`: smaller variables, the function that takes them, and what was removed.

    Raises:
      CompactionError: see `dead`.

    Example:
      >>> two = lambda v, x: jnp.maximum(x @ v["a"], 0) @ v["b"]
      >>> variables = {"a": jnp.asarray([[1.0, 0.0, 2.0]]), "b": jnp.ones((3, 1))}  # the second unit is never on
      >>> small = compressx.compaction.compact(two, variables, jnp.zeros((1, 1)))
      >>> {name: w.shape for name, w in small.variables.items()}
      {'a': (1, 2), 'b': (2, 1)}
    """
    found = dead(model, variables, x, keep)
    if not found.kept and found.stuck:
        words = "; ".join(f"{where}: {why}" for where, why in list(found.stuck.items())[:_SAID])
        warnings.warn(
            f"nothing can be removed, although weights are 0 along whole indices of {len(found.stuck)} axes: {words}",
            NothingRemoved,
            stacklevel=2,
        )
    return Compact(cut(variables, found), smaller(model, variables, found, keep), found)


def cut(variables: Any, found: Dead) -> Any:
    """The leaves without what is removed, constants folded in.

    Args:
      variables: pytree of the whole network.
      found: what is removed, from `dead`.

    Returns:
      The same tree; dtypes are kept.

    Example:
      >>> two = lambda v, x: jnp.maximum(x @ v["a"], 0) @ v["b"]
      >>> variables = {"a": jnp.asarray([[1.0, 0.0, 2.0]]), "b": jnp.ones((3, 1))}
      >>> found = compressx.compaction.dead(two, variables, jnp.zeros((1, 1)))
      >>> compressx.compaction.cut(variables, found)["a"].tolist()
      [[1.0, 2.0]]
    """
    leaves, treedef = jax.tree.flatten(variables)
    out = []
    for path, leaf in zip(paths(variables), leaves, strict=True):
        if path not in found.folded and path not in found.kept:  # also what is no array: functions, keys
            out.append(leaf)
            continue
        array = np.asarray(leaf)
        if path in found.folded:
            array = array + found.folded[path].astype(array.dtype)
        for axis, ids in enumerate(found.kept.get(path, ())):
            if ids is not None and ids.ndim == 1:
                array = array.take(ids, axis)
            elif ids is not None:  # every slice of a stacked leaf keeps others
                array = np.stack([part.take(each, axis - 1) for part, each in zip(array, ids, strict=True)])
        out.append(jnp.asarray(array))
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

    Returns:
      A pure function; it raises a `CompactionError` where leaves do not have the shapes of `cut`.

    Example:
      >>> two = lambda v, x: jnp.maximum(x @ v["a"], 0) @ v["b"]
      >>> variables = {"a": jnp.asarray([[1.0, 0.0, 2.0]]), "b": jnp.ones((3, 1))}
      >>> found = compressx.compaction.dead(two, variables, jnp.zeros((1, 1)))
      >>> apply = compressx.compaction.smaller(two, variables, found)
      >>> apply(compressx.compaction.cut(variables, found), jnp.ones((4, 1))).ravel().tolist()
      [3.0, 3.0, 3.0, 3.0]
    """
    spec = jax.tree.map(described, variables)
    traced: dict[Any, tuple[Channels, Plan]] = {}

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
            traced[key] = whole, plans(whole.scope, _masks(whole, found))
        whole, left = traced[key]
        return _run(whole, left, arrays(small), jax.tree.leaves(x), positions or {})

    return apply


def _masks(whole: Channels, found: Dead) -> np.ndarray:
    """unit -> whether it stays."""
    live = np.ones(whole.units, bool)
    for leaf, path in enumerate(whole.program.paths):
        for units, ids in zip(whole.axes[leaf], found.kept.get(path, ()), strict=False):
            if ids is None:
                continue
            rows = np.zeros((0, 0), int) if units is None else np.atleast_2d(units)
            kept = np.broadcast_to(ids, (len(rows), ids.shape[-1]))
            for row, stay in zip(rows, kept, strict=True):
                gone = row[np.setdiff1d(np.arange(row.size), stay)]
                if not gone.all():
                    units = None
                live[gone] = False
            if units is None or (ids.ndim == 2 and units.ndim != 2):
                raise CompactionError(f"{path}: inputs of this shape need channels that inputs of another did not")
    return live


def _run(whole: Channels, left: Plan, leaves: list[Any], inputs: list[Any], positions: Mapping[str, np.ndarray]) -> Any:
    program = whole.program
    held = {value: path for value, path in enumerate(program.paths) if path in positions}
    for value, leaf in enumerate(leaves):
        wanted = left.shapes[value]
        if value in held:
            wanted = (len(positions[held[value]]), wanted[-1])
        if jnp.shape(leaf) != wanted:
            raise CompactionError(f"{program.paths[value]}: has shape {jnp.shape(leaf)}, expected {wanted}")

    def do(number: int, op: Op, arguments: Sequence[Any]) -> list[Any]:
        gathered = next((held[v] for v in op.inputs if v in held), None) if number >= 0 else None
        if gathered is None:
            return _do(op, arguments)
        return [_gathered(op, arguments, positions[gathered], left.shapes[op.inputs[1]][:3], gathered)]

    given = dict(enumerate(leaves)) | dict(zip(program.inputs, inputs, strict=True))
    return jax.tree.unflatten(program.treedef, run(left, given, do))


def _gathered(op: Op, arguments: Sequence[Any], positions: np.ndarray, window: tuple[int, ...], path: str) -> Any:
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


def _do(op: Op, arguments: Sequence[Any]) -> list[Any]:
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
