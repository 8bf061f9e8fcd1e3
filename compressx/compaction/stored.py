"""Compact networks in files: what was removed as JSON beside the small leaves, and the network from both again."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compressx.compaction.channels import CompactionError
from compressx.compaction.compact import Compact, smaller
from compressx.compaction.dead import Dead
from compressx.constraints.coupled import expand, indices, runs
from compressx.trace import Function
from compressx.tree import paths


def removed(found: Dead) -> dict[str, Any]:
    """What was removed from a network, JSON-able: the `extra` under which `save_model` keeps it for `restore`.

    Args:
      found: `Compact.dead`.

    Returns:
      `{path: [[axis, runs], ...]}`, the indices that stay as runs `[first, length]`; of a stacked leaf, of which every
      slice keeps others, a list of runs for each slice.

    Example:
      >>> def layer(v, x):
      ...     return jax.nn.relu(x @ v["up"]) @ v["down"]
      >>> v = {"up": jnp.ones((4, 8)).at[:, 2:].set(0), "down": jnp.ones((8, 2))}
      >>> small = compressx.compaction.compact(layer, v, jnp.ones((1, 4)))
      >>> compressx.compaction.removed(small.dead)
      {'down': [[0, [[0, 2]]]], 'up': [[1, [[0, 2]]]]}
    """
    return {
        path: [
            [axis, runs(ids) if ids.ndim == 1 else [runs(each) for each in ids]]
            for axis, ids in enumerate(kept)
            if ids is not None
        ]
        for path, kept in found.kept.items()
    }


def restore(
    model: nn.Module | Function, like: Any, params: Any, cuts: Mapping[str, Any], keep: tuple[str, ...] = ()
) -> Compact:
    """The compact network of a file, in any process that has the module of the whole network.

    Args:
      model: the whole network, as `compact` was given it.
      like: its variables, arrays or shapes (`jax.eval_shape(model.init, ...)`), in the form that it takes.
      params: the small leaves, as `load_model` gives them; matched by path.
      cuts: from `removed`; `SavedModel.extra` or a part of it.
      keep: see `channels`.

    Returns:
      What `compact` returned, with the leaves of the file in the form of `like`. What was folded into biases is in
      them, so that `dead.folded` is empty.

    Raises:
      CompactionError: leaves, shapes or cuts do not fit the network; the text names the leaf.

    Example:
      >>> def layer(v, x):
      ...     return jax.nn.relu(x @ v["up"]) @ v["down"]
      >>> v = {"up": jnp.ones((4, 8)).at[:, 2:].set(0), "down": jnp.ones((8, 2))}
      >>> small = compressx.compaction.compact(layer, v, jnp.ones((1, 4)))
      >>> cuts = compressx.compaction.removed(small.dead)
      >>> sizes = compressx.save_model("small.safetensors", small.variables, extra=cuts)
      >>> saved = compressx.load_model("small.safetensors")
      >>> again = compressx.compaction.restore(layer, v, saved.params, saved.extra)
      >>> again.variables["up"].shape, again.apply(again.variables, jnp.ones((1, 4))).tolist()
      ((4, 2), [[8.0, 8.0]])
    """
    names, spec = paths(like), jax.tree.leaves(like)
    given = dict(zip(paths(params), jax.tree.leaves(params), strict=True))
    if set(given) != set(names) or not set(cuts) <= set(names):
        odd = sorted(set(given) ^ set(names) | (set(cuts) - set(names)))
        raise CompactionError(f"the file and the network differ in {', '.join(odd)}")
    kept: dict[str, tuple[np.ndarray | None, ...]] = {}
    leaves = []
    for name, whole in zip(names, spec, strict=True):
        shape = tuple(whole.shape)
        try:
            axes = _read(cuts[name], shape) if name in cuts else (None,) * len(shape)
        except (TypeError, ValueError, KeyError) as error:
            raise CompactionError(f"{name}: what was removed cannot be read: {error}") from None
        if name in cuts:
            kept[name] = axes
        wanted = tuple(n if ids is None else ids.shape[-1] for n, ids in zip(shape, axes, strict=True))
        leaf = given[name]
        if np.shape(leaf) != wanted or leaf.dtype != whole.dtype:
            raise CompactionError(f"{name}: is {leaf.dtype} {np.shape(leaf)}, expected {whole.dtype} {wanted}")
        leaves.append(jnp.asarray(leaf))
    found = Dead(kept, {}, {})
    return Compact(jax.tree.unflatten(jax.tree.structure(like), leaves), smaller(model, like, found, keep), found)


def _read(cuts: Any, shape: tuple[int, ...]) -> tuple[np.ndarray | None, ...]:
    """Per axis the indices that stay; ValueError for what is none."""
    axes: list[np.ndarray | None] = [None] * len(shape)
    for axis, held in cuts:
        if type(axis) is not int or not 0 <= axis < len(shape) or axes[axis] is not None:
            raise ValueError(f"axis {axis!r} of {shape}")
        stacked = isinstance(held[0][0], list)
        rows = [_ids(row, shape[axis]) for row in (held if stacked else [held])]
        if len({row.size for row in rows}) != 1 or (stacked and (axis == 0 or len(rows) != shape[0])):
            raise ValueError(f"axis {axis} does not keep as many in each of {shape[0]} slices")
        axes[axis] = np.stack(rows) if stacked else rows[0]
    return tuple(axes)


def _ids(given: Any, size: int) -> np.ndarray:
    if indices(given) > size:
        raise ValueError(f"more than {size} indices")
    ids = expand(given)
    if not ids.size or ids[0] < 0 or ids[-1] >= size or (np.diff(ids) <= 0).any():
        raise ValueError(f"indices do not increase within 0..{size - 1}")
    return ids
