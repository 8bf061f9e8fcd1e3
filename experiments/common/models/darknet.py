"""Darknet weight files for YOLOv3, into our variables and back, value for value.

A file is a header (int32 major, minor, revision; images seen, int64 from version 0.2 on) and float32 numbers with no
names: of every convolution in turn its biases, scales, means, variances (only biases where it has no normalisation)
and weights `[filters, channels, rows, columns]`.
"""

import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.models.convert import CheckpointError
from experiments.common.models.yolov3 import YOLOv3

_MAX_BYTES = 1 << 31  # eight times YOLOv3
_VERSIONS = range(100)


class Header(NamedTuple):
    """The head of a file: version and how many images the weights have seen."""

    major: int
    minor: int
    revision: int
    seen: int


class _Part(NamedTuple):
    """One run of numbers of the file: the leaf it fills, and its shape in the file."""

    path: tuple[str, str, str]
    shape: tuple[int, ...]


def _layout(model: YOLOv3, template: Any) -> list[list[_Part]]:
    """Per convolution, what stands in the file."""
    convolutions = []
    for number, block in enumerate(model.layers):
        if block.kind != "conv":
            continue
        name, kernel = f"conv_{number}", template["params"][f"conv_{number}"]["kernel"].shape
        n = (kernel[3],)
        if block.linear:
            parts = [_Part(("params", name, "bias"), n)]
        else:
            bn = f"bn_{number}"
            parts = [_Part(("params", bn, "bias"), n), _Part(("params", bn, "scale"), n)]
            parts += [_Part(("batch_stats", bn, "mean"), n), _Part(("batch_stats", bn, "var"), n)]
        convolutions.append([*parts, _Part(("params", name, "kernel"), (kernel[3], kernel[2], kernel[0], kernel[1]))])
    return convolutions


def _template(model: YOLOv3, channels: int) -> Any:
    x = jax.ShapeDtypeStruct((1, 32, 32, channels), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), x)


def load_darknet(
    path: str | os.PathLike[str], model: YOLOv3, channels: int = 3, variables: Any = None
) -> tuple[dict[str, Any], Header]:
    """Reads a Darknet weight file.

    Args:
      path: the file, such as `yolov3.weights`.
      model: the network it is of.
      channels: of the images.
      variables: where given, a file that ends after some convolution (`darknet53.conv.74`) fills the first ones of
        these; None: the file must hold them all.

    Returns:
      `{"params": ..., "batch_stats": ...}` of float32 arrays, and the header.

    Raises:
      FileNotFoundError: no such file.
      CheckpointError: too large, an unknown version, truncated, longer than the network, or with values that are not
        finite or variances that are negative; the message names the file and the layer.
    """
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise FileNotFoundError(f"no weights at {name}")
    size = os.path.getsize(name)
    if size > _MAX_BYTES:
        raise CheckpointError(f"{name}: {size} bytes, more than the {_MAX_BYTES} a weight file may have")
    with open(name, "rb") as handle:
        data = handle.read(_MAX_BYTES + 1)
    header, body = _header(data, name)
    if len(body) % 4:
        raise CheckpointError(f"{name}: {len(body)} bytes after the header are no whole number of float32")
    numbers = np.frombuffer(body, "<f4")
    out = _copy(variables if variables is not None else _template(model, channels))
    at = 0
    for parts in _layout(model, _template(model, channels)):
        length = sum(int(np.prod(p.shape)) for p in parts)
        if at == numbers.size and variables is not None:
            break
        if at + length > numbers.size:
            have, layer = numbers.size - at, parts[-1].path[1]
            raise CheckpointError(f"{name}: ends inside {layer}, which takes {length} numbers; {have} are left")
        for part in parts:
            n = int(np.prod(part.shape))
            out[part.path[0]][part.path[1]][part.path[2]] = _leaf(numbers[at : at + n], part, name)
            at += n
    if at != numbers.size:
        raise CheckpointError(f"{name}: holds {numbers.size} numbers, this network {at}; it is of another network")
    return out, header


def _header(data: bytes, name: str) -> tuple[Header, bytes]:
    if len(data) < 16:
        raise CheckpointError(f"{name}: {len(data)} bytes are too few for a header")
    major, minor, revision = (int(v) for v in np.frombuffer(data[:12], "<i4"))
    if major not in _VERSIONS or minor not in _VERSIONS or revision < 0:
        raise CheckpointError(f"{name}: states the version {major}.{minor}.{revision}; it is no Darknet weight file")
    wide = major * 10 + minor >= 2
    if wide and len(data) < 20:
        raise CheckpointError(f"{name}: ends inside its header")
    seen = int(np.frombuffer(data[12:20], "<i8")[0]) if wide else int(np.frombuffer(data[12:16], "<i4")[0])
    return Header(major, minor, revision, seen), data[20 if wide else 16 :]


def _leaf(numbers: np.ndarray, part: _Part, name: str) -> jax.Array:
    where = "/".join(part.path)
    if not np.isfinite(numbers).all():
        raise CheckpointError(f"{name}: {where} holds values that are not finite")
    if part.path[2] == "var" and (numbers < 0).any():
        raise CheckpointError(f"{name}: {where} holds a negative variance")
    array = numbers.reshape(part.shape)
    return jnp.asarray(array.transpose(2, 3, 1, 0) if array.ndim == 4 else array)


def _copy(tree: Any) -> Any:
    return {k: _copy(v) for k, v in tree.items()} if hasattr(tree, "items") else tree


def save_darknet(path: str | os.PathLike[str], model: YOLOv3, variables: Any, seen: int = 0) -> None:
    """Writes variables as a Darknet weight file of version 0.2.0; the inverse of `load_darknet`."""
    with open(path, "wb") as handle:
        handle.write(np.array([0, 2, 0], "<i4").tobytes() + np.array([seen], "<i8").tobytes())
        for parts in _layout(model, variables):
            for part in parts:
                array = np.asarray(variables[part.path[0]][part.path[1]][part.path[2]], "<f4")
                handle.write(np.ascontiguousarray(array.transpose(3, 2, 0, 1) if array.ndim == 4 else array).tobytes())
