"""Dense weights from a safetensors file, by the paths of our variables or PyTorch's names of a CIFAR ResNet."""

import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from compressx.tree import paths
from experiments.common.models.convert import CheckpointError, from_torch

_MAX_BYTES = 1 << 30


def load(path: str | os.PathLike[str], template: Any) -> Any:
    """The variables of a network from a file that anyone may have written.

    Args:
      path: a .safetensors file, its entries float32, named by the paths of the template joined with "/" or "."
        (`params/c1/kernel`) in our layouts, or by PyTorch's names and layouts (`layer1.0.conv1.weight`).
      template: variables of the network, arrays or shapes.

    Returns:
      A tree like the template, with jax arrays.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: it is damaged, too large, or not of this network; names the file and the entry.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"no checkpoint at {name}")
    if os.path.getsize(name) > _MAX_BYTES:
        raise CheckpointError(f"{name}: has {os.path.getsize(name)} bytes, more than the {_MAX_BYTES} it may have")
    try:
        arrays = load_file(name)
    except (SafetensorError, ValueError, TypeError, KeyError, OSError) as error:
        raise CheckpointError(f"{name}: not a readable safetensors file: {type(error).__name__}: {error}") from error
    ours = paths(template)
    for sign in ("/", "."):
        if set(arrays) == {p.replace("/", sign) for p in ours}:
            leaves = jax.tree.leaves(template)
            held = [_leaf(name, p, arrays[p.replace("/", sign)], x) for p, x in zip(ours, leaves, strict=True)]
            return jax.tree.unflatten(jax.tree.structure(template), held)
    try:
        return from_torch(arrays, template)
    except (CheckpointError, KeyError, ValueError) as error:
        odd = ", ".join(sorted(set(arrays) ^ set(ours))[:6])
        raise CheckpointError(f"{name}: its entries are not the variables of this network ({odd}): {error}") from None


def _leaf(name: str, path: str, array: np.ndarray, wanted: Any) -> jax.Array:
    if array.shape != tuple(wanted.shape) or array.dtype != np.float32:
        raise CheckpointError(f"{name}: {path} is {array.dtype} {array.shape}, expected float32 {tuple(wanted.shape)}")
    if not np.isfinite(array).all():
        raise CheckpointError(f"{name}: {path} holds values that are not finite")
    return jnp.asarray(array)


__all__ = ["load"]
