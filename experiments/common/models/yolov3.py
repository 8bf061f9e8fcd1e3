"""YOLOv3 and its trunk Darknet-53: 107 blocks as a list, and one module that runs the list.

The network is data: `blocks` lists what is at every index of the published configuration, `Network` runs it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from experiments.common.models.layers import BatchNorm, Conv, widen

STRIDES = (32, 16, 8)  # of the three heads, in their order
ANCHORS_PER_HEAD = 3
REPEATS = (1, 2, 8, 8, 4)  # residual blocks of the five stages
_STAGES = (64, 128, 256, 512, 1024)  # channels of the five stages
_HEADS = (512, 256, 128)  # channels of the narrow convolutions before each head

# COCO's published anchors (w, h in pixels of a 416 input), in head order; `detection.anchors` makes others.
COCO_ANCHORS = (
    *((116.0, 90.0), (156.0, 198.0), (373.0, 326.0)),
    *((30.0, 61.0), (62.0, 45.0), (59.0, 119.0)),
    *((10.0, 13.0), (16.0, 30.0), (33.0, 23.0)),
)

_HE = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


class Block(NamedTuple):
    """What is at one index.

    Attributes:
      kind: "conv", "shortcut" (adds), "route" (concatenates), "upsample" (doubles rows and columns) or "yolo" (a head).
      inputs: indices of the blocks read, the first block reads -1, the image.
      features: channels made, of a convolution.
      size: rows and columns of a convolution's kernel.
      stride: of a convolution.
      linear: a convolution with a bias in place of normalisation and ReLU, as before each head.
    """

    kind: str
    inputs: tuple[int, ...]
    features: int = 0
    size: int = 0
    stride: int = 1
    linear: bool = False


def blocks(outputs: int, width: float = 1.0, repeats: Sequence[int] = REPEATS) -> tuple[Block, ...]:
    """YOLOv3's blocks; with the default repeats the 107 of the published configuration, at its indices.

    75 convolutions, 23 shortcuts, 4 routes, 2 upsamplings and 3 heads (at 82, 94, 106).

    Args:
      outputs: channels of each head, `3 * (5 + classes)`.
      width: factor on all channels but the heads' outputs.
      repeats: residual blocks of the five stages, each 0 or more.
    """
    found, ends = _trunk(width, repeats)
    last = len(found) - 1

    def conv(reads: int, features: int, size: int) -> int:
        found.append(Block("conv", (reads,), widen(features, width), size))
        return len(found) - 1

    for number, features in enumerate(_HEADS):
        if number:
            found.append(Block("route", (last,)))
            last = conv(len(found) - 1, features, 1)
            found.append(Block("upsample", (last,)))
            found.append(Block("route", (len(found) - 1, ends[4 - number])))
            last = len(found) - 1
        for _ in range(2):
            last = conv(last, features, 1)
            last = conv(last, 2 * features, 3)
        last = conv(last, features, 1)  # read by the next head too
        wide = conv(last, 2 * features, 3)
        found.append(Block("conv", (wide,), outputs, 1, linear=True))
        found.append(Block("yolo", (len(found) - 1,)))
    return tuple(found)


def _trunk(width: float, repeats: Sequence[int]) -> tuple[list[Block], list[int]]:
    """Darknet-53 without its classifier, and the last index of every stage."""
    if len(repeats) != len(_STAGES) or min(repeats) < 0:
        raise ValueError(f"repeats must be five numbers, 0 or more, got {tuple(repeats)}")
    found = [Block("conv", (-1,), widen(32, width), 3)]
    ends = []
    for features, count in zip(_STAGES, repeats, strict=True):
        found.append(Block("conv", (len(found) - 1,), widen(features, width), 3, 2))
        for _ in range(count):
            entry = len(found) - 1
            found.append(Block("conv", (entry,), widen(features // 2, width), 1))
            found.append(Block("conv", (entry + 1,), widen(features, width), 3))
            found.append(Block("shortcut", (entry + 2, entry)))
        ends.append(len(found) - 1)
    return found, ends


def upsample(x: jax.Array) -> jax.Array:
    """Repeats every row and column: `[n, h, w, c]` to `[n, 2 h, 2 w, c]`."""
    n, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (n, h, 2, w, 2, c)).reshape(n, 2 * h, 2 * w, c)


def _run(layers: Sequence[Block], x: jax.Array, train: bool) -> tuple[list[jax.Array], jax.Array]:
    """What the heads hold, and the last block's value; called inside a compact module, whose children it makes."""
    values: dict[int, jax.Array] = {-1: x}
    heads: list[jax.Array] = []
    last_use = {i: number for number, layer in enumerate(layers) for i in layer.inputs}
    for number, layer in enumerate(layers):
        ins = [values[i] for i in layer.inputs]
        x = ins[0]
        if layer.kind == "conv":
            pad = layer.size // 2
            x = Conv(
                layer.features,
                (layer.size, layer.size),
                strides=layer.stride,
                padding=[(pad, pad), (pad, pad)],
                use_bias=layer.linear,
                kernel_init=_HE if not layer.linear else nn.initializers.normal(0.01),
                name=f"conv_{number}",
            )(x)
            if not layer.linear:
                x = BatchNorm(name=f"bn_{number}")(x, train=train)
                x = jnp.maximum(x, 0.1 * x)
        elif layer.kind == "shortcut":
            x = ins[0] + ins[1]
        elif layer.kind == "route" and len(ins) > 1:
            x = jnp.concatenate(ins, -1)
        elif layer.kind == "upsample":
            x = upsample(x)
        elif layer.kind == "yolo":
            heads.append(x)
        values[number] = x
        for i in layer.inputs:
            if last_use[i] == number:
                del values[i]
    return heads, x


class YOLOv3(nn.Module):
    """The 106-layer detector: three heads at strides 32, 16 and 8, each three boxes a cell.

    Parameters are named by the index of their block: `conv_0/kernel`, `bn_0/{scale,bias}`, `conv_81/{kernel,bias}`.
    At width 1 it has 61,523,734 of them for one class and 61,949,149 for eighty, for images of three channels.

    Args:
      classes: number of classes.
      width: factor on all channels but the heads' outputs.
      repeats: residual blocks of the five stages.

    Source: Redmon, Farhadi, "YOLOv3: An Incremental Improvement", 2018; blocks as in its public configuration.
    """

    classes: int = 1
    width: float = 1.0
    repeats: Sequence[int] = REPEATS

    @property
    def layers(self) -> tuple[Block, ...]:
        """The blocks by index."""
        return blocks(ANCHORS_PER_HEAD * (5 + self.classes), self.width, self.repeats)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Maps images `[n, h, w, c]`, h and w multiples of 32, to raw heads `[n, h/s, w/s, 3 * (5 + classes)]`.

        Channels of a head are `[anchor, (tx, ty, tw, th, objectness, class 0, ...)]`; s is 32, 16, 8.
        """
        if x.shape[1] % STRIDES[0] or x.shape[2] % STRIDES[0]:
            raise ValueError(f"images must be multiples of {STRIDES[0]} high and wide, got {x.shape[1]} x {x.shape[2]}")
        heads, _ = _run(self.layers, x, train)
        return heads[0], heads[1], heads[2]


class Darknet53(nn.Module):
    """The trunk of `YOLOv3` as an image classifier: blocks 0..74, the mean over space, a dense layer `linear`.

    Source: as `YOLOv3`.
    """

    classes: int = 2
    width: float = 1.0
    repeats: Sequence[int] = REPEATS

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, classes]`."""
        layers, _ = _trunk(self.width, self.repeats)
        _, x = _run(layers, x, train)
        return nn.Dense(self.classes, name="linear")(x.mean(axis=(1, 2)))
