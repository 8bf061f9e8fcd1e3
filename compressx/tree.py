"""Names of the leaves of a pytree, the check that all of them are finite, and their precision."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

Key = str | int


def keys(tree: Any) -> list[tuple[Key, ...]]:
    """The keys on the way to every leaf, in leaf order: strings, and integers where the tree has integers.

    The box around an array that Flax has (an NNX variable, Linen's metadata) adds no key, so that rules read alike for
    all trees; a leaf of the user's own that is called `value` keeps its name.
    """
    found: list[tuple[Key, ...]] = []
    for path, node in jax.tree_util.tree_leaves_with_path(tree, is_leaf=_boxed):
        inside = jax.tree_util.tree_leaves_with_path(node)
        for more, _ in inside:
            whole = path if _boxed(node) and len(inside) == 1 else (*path, *more)
            found.append(tuple(map(_key, whole)))
    return found


def unboxed(tree: Any) -> Any:
    """The tree with each of Flax's boxes replaced by the array in it (`nnx.Optimizer` boxes the optimizer's state)."""
    return jax.tree.map(lambda node: jax.tree.leaves(node)[0] if _boxed(node) else node, tree, is_leaf=_boxed)


def _boxed(node: Any) -> bool:
    """Whether a node is Flax's box around one value (told by name: this module imports no Flax)."""
    return any(f"{t.__module__}.{t.__name__}" in _BOXES for t in type(node).__mro__)


_BOXES = ("flax.nnx.variablelib.Variable", "flax.nnx.statelib.VariableState", "flax.core.meta.AxisMetadata")


def _key(entry: Any) -> Key:
    """A key as it stands in the tree."""
    for attribute in ("key", "idx", "name"):
        value = getattr(entry, attribute, None)
        if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
            return value
    return jax.tree_util.keystr((entry,), simple=True)


def path_name(key_path: Sequence[Key]) -> str:
    """The name of a leaf: its keys, joined by slashes. Patterns of rules match this name."""
    return "/".join(map(str, key_path))


def paths(tree: Any) -> list[str]:
    """The names of all leaves, in leaf order."""
    return list(map(path_name, keys(tree)))


def check_finite(params: Any, what: str = "weight") -> None:
    """Raises ValueError naming the first leaf that holds a NaN or an infinity (concrete arrays only)."""
    named = zip(paths(params), jax.tree.leaves(params), strict=True)
    # keys of random numbers, and functions and names among the leaves of a module, are no weights
    numeric = [(n, x) for n, x in named if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jnp.floating)]
    finite: list[Array] = [jnp.all(jnp.isfinite(x)) for _, x in numeric]
    for (name, leaf), ok in zip(numeric, jax.device_get(finite), strict=True):
        if not ok:
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
            raise ValueError(
                f"{name} {tuple(leaf.shape)}: {bad} {what} values are NaN or infinite; "
                "the training before this step diverged (lower the learning rate or rho)"
            )


def in_their_precision(tree: Any) -> AbstractContextManager[Any]:
    """A context in which the arrays of a tree are computed with as they are: no float64 is cut to float32."""
    cut = any(jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype for x in jax.tree.leaves(tree))
    return jax.enable_x64(True) if cut else nullcontext()


def described(leaf: Any) -> Any:
    """The shape and dtype of an array; what is none, as it is."""
    if not hasattr(leaf, "dtype"):
        return leaf
    dtype = jax.dtypes.canonicalize_dtype(leaf.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)
