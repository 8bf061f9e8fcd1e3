"""What a loaded data set is: arrays that share a leading axis, and the facts about where they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Info:
    """Facts about a data set that a report prints and a model needs.

    Attributes:
      name: the name `load` knows it by.
      source: where the data come from, in one line.
      licence: the licence, in one line.
      classes: number of classes; 0 where the labels are not classes.
      shape: shape of one example's input, `[h, w, c]` for images.
      mean: per channel, of the training inputs in 0..1 (uint8 divided by 255); empty where it has no meaning.
      std: per channel, likewise.
      class_names: names in the order of the labels; may be empty.
      stand_in: True where results must not be set beside a paper's without saying so.
      note: how it differs from the original, and what it stands in for.
    """

    name: str
    source: str
    licence: str
    classes: int
    shape: tuple[int, ...]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    stand_in: bool = False
    note: str = ""


@dataclass(frozen=True)
class Dataset:
    """A split held in memory: inputs, labels and `Info`.

    Inputs and labels are each an array or a dict of arrays. All arrays have the same leading axis n, one row an
    example; examples of varying length are padded, with their lengths as one more array. The image sets have
    inputs uint8 or float32 `[n, h, w, c]` and labels int32 `[n]`.
    """

    inputs: Any
    labels: Any
    info: Info

    def __len__(self) -> int:
        return int(jax.tree.leaves(self.inputs)[0].shape[0])

    def take(self, rows: slice | Array) -> Dataset:
        """Returns the data set of the given rows (a slice, integer indices or a boolean mask)."""
        inputs, labels = jax.tree.map(lambda a: a[rows], (self.inputs, self.labels))
        return Dataset(inputs, labels, self.info)


def from_arrays(arrays: Arrays, info: Info) -> Dataset:
    """Builds a `Dataset` from named arrays.

    The name is `inputs` or `labels`, or `inputs/NAME` and `labels/NAME` for entries of a dict.

    Raises:
      ValueError: a name is neither, inputs or labels are missing, or leading axes differ.
    """
    parts: dict[str, Any] = {}
    for name, array in arrays.items():
        part, _, key = name.partition("/")
        if part not in ("inputs", "labels"):
            raise ValueError(f"data set {info.name!r}: array {name!r} is under neither 'inputs' nor 'labels'")
        if key:
            parts.setdefault(part, {})[key] = array
        else:
            parts[part] = array
    lengths = {name: len(array) for name, array in arrays.items()}
    if set(parts) != {"inputs", "labels"} or len(set(lengths.values())) != 1:
        raise ValueError(f"data set {info.name!r}: inputs and labels must have the same number of rows, got {lengths}")
    return Dataset(parts["inputs"], parts["labels"], info)


def channel_moments(images: Array) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns per-channel mean and standard deviation of uint8 images `[n, h, w, c]` in 0..1."""
    pixels = images.reshape(-1, images.shape[-1])
    counts = [np.bincount(channel, minlength=256) / len(pixels) for channel in pixels.T]
    level = np.arange(256) / 255.0
    mean = [float(count @ level) for count in counts]
    std = [float(np.sqrt(count @ (level - m) ** 2)) for count, m in zip(counts, mean, strict=True)]
    return tuple(mean), tuple(std)
