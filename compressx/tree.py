"""Names of the leaves of a pytree, and the check that all of them are finite."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def path_name(key_path: Sequence[Any]) -> str:
    """The slash-joined name of a leaf; NNX's trailing `value` is left out, so that rules read alike everywhere."""
    name = jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")
    return name.removesuffix("/value").removesuffix("/.value")


def paths(tree: Any) -> list[str]:
    """The names of all leaves, in leaf order."""
    return [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)]


def check_finite(params: Any, what: str = "weight") -> None:
    """Raises ValueError naming the first leaf that holds a NaN or an infinity (concrete arrays only)."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    numeric = [(p, x) for p, x in flat if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)]
    finite: list[Array] = [jnp.all(jnp.isfinite(x)) for _, x in numeric]
    for (path, leaf), ok in zip(numeric, jax.device_get(finite), strict=True):
        if not ok:
            bad = int(jnp.sum(~jnp.isfinite(leaf)))
            raise ValueError(
                f"{path_name(path)} {tuple(leaf.shape)}: {bad} {what} values are NaN or infinite; "
                "the training before this step diverged (lower the learning rate or rho)"
            )
