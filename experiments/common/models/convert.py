"""CIFAR ResNet checkpoints with PyTorch's names, into our variables and back, value for value."""

import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from experiments.common.models.resnet import CifarResNet

_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
_TORCH_COUNTER = ".num_batches_tracked"  # PyTorch's step counter in each BatchNorm; it has no part in the function
_MAX_BYTES = 1 << 30  # 300 times ResNet-56: more than that in one archive is a mistake or an attack

# What numpy, zipfile and zlib raise on damaged or foreign files.
_UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    OSError,
    EOFError,
    MemoryError,
    KeyError,
    NotImplementedError,
)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file or the key, what it holds and what was expected."""


def torch_name(path: tuple[str, ...]) -> str:
    """The PyTorch name of a leaf: `("params", "layer2_0", "conv1", "kernel")` is `layer2.0.conv1.weight`."""
    _, *modules, leaf = path
    modules = [re.sub(r"^(layer\d+)_(\d+)$", r"\1.\2", module) for module in modules]
    return ".".join([*modules, _LEAVES[leaf]])


def _to_torch(array: np.ndarray) -> np.ndarray:
    """Conv `[kh, kw, cin, cout]` -> `[cout, cin, kh, kw]`, dense `[in, out]` -> `[out, in]`, vectors as they are."""
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T


def _from_torch(array: np.ndarray) -> np.ndarray:
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def read_npz(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads every array of an .npz file, without ever unpickling.

    Args:
      path: the file.

    Returns:
      The arrays by name.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: not an .npz file, damaged, over 1 GiB when unpacked, or with something other than numbers in it.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"no checkpoint at {name}")
    try:
        with zipfile.ZipFile(name) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _MAX_BYTES:
            raise CheckpointError(f"{name}: unpacks to {size} bytes, more than the {_MAX_BYTES} a checkpoint may have")
        arrays = {}
        with np.load(name, allow_pickle=False) as archive:
            for key in archive.files:
                arrays[key] = archive[key]
    except CheckpointError:
        raise
    except _UNREADABLE as e:
        raise CheckpointError(f"{name}: not a readable .npz checkpoint: {type(e).__name__}: {e}") from e
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
            kind = array.dtype if isinstance(array, np.ndarray) else "raw bytes"
            raise CheckpointError(f"{name}: entry {key!r} holds {kind}, expected an array of numbers")
    return arrays


def from_torch(arrays: Mapping[str, np.ndarray], template: Any) -> dict[str, Any]:
    """Turns arrays with PyTorch's names and layouts into our variables.

    Args:
      arrays: by PyTorch name; conv `[cout, cin, kh, kw]`, dense `[out, in]`. `*.num_batches_tracked` is left out.
      template: variables of a `CifarResNet`, arrays or shapes (`jax.eval_shape` of its `init`).

    Returns:
      A tree like the template, with float32 arrays.

    Raises:
      CheckpointError: keys missing or left over, a wrong shape, a type other than float32, or a value not finite.
    """
    wanted = {torch_name(path): (path, leaf) for path, leaf in traverse_util.flatten_dict(template).items()}
    given = {key: array for key, array in arrays.items() if not key.endswith(_TORCH_COUNTER)}
    missing, extra = sorted(set(wanted) - set(given)), sorted(set(given) - set(wanted))
    if missing or extra:
        parts = [f"{what}: {', '.join(keys)}" for what, keys in (("missing", missing), ("not expected", extra)) if keys]
        raise CheckpointError(f"the checkpoint is not of this model; {'; '.join(parts)}")
    leaves = {}
    for key, (path, leaf) in wanted.items():
        array = given[key]
        shape = tuple(_to_torch(np.empty(leaf.shape, np.bool_)).shape)
        if array.shape != shape:
            raise CheckpointError(f"{key} ({'/'.join(path)}) has shape {array.shape}, expected {shape}")
        if array.dtype != np.float32:
            raise CheckpointError(f"{key} ({'/'.join(path)}) has type {array.dtype}, expected float32")
        if not np.isfinite(array).all():
            raise CheckpointError(f"{key} ({'/'.join(path)}) holds values that are not finite")
        leaves[path] = jnp.asarray(_from_torch(array))
    return traverse_util.unflatten_dict(leaves)


def to_torch(variables: Any) -> dict[str, np.ndarray]:
    """The inverse of `from_torch`: arrays with PyTorch's names and layouts, ready for `np.savez`."""
    flat = traverse_util.flatten_dict(variables)
    return {torch_name(path): np.array(_to_torch(np.asarray(leaf)), order="C") for path, leaf in flat.items()}


def load_cifar_resnet(path: str | os.PathLike[str]) -> tuple[CifarResNet, dict[str, Any]]:
    """Loads a CIFAR ResNet checkpoint with shortcuts of option A; depth and classes are read from the names and shapes.

    Args:
      path: an .npz file with PyTorch's names (`conv1.weight`, `layer2.0.conv1.weight`, `linear.weight`).

    Returns:
      The model and its variables `{"params": ..., "batch_stats": ...}`, for RGB inputs in 0..1 normalised by the
      mean and deviation the checkpoint was trained with.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: see `read_npz` and `from_torch`; the message names the file.
    """
    arrays = read_npz(path)
    bias = arrays.get("linear.bias")
    numbers = [int(m.group(1)) for key in arrays if (m := re.match(r"layer1\.(\d{1,3})\.", key))]
    if bias is None or bias.ndim != 1 or bias.size == 0 or not numbers:
        raise CheckpointError(f"{os.fspath(path)}: not a CIFAR ResNet: needs layer1.* entries and a vector linear.bias")
    model = CifarResNet(blocks=max(numbers) + 1, classes=bias.size)
    template = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32))
    try:
        return model, from_torch(arrays, template)
    except CheckpointError as e:
        raise CheckpointError(f"{os.fspath(path)}: {e}") from e
