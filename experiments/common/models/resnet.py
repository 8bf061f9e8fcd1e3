"""Residual networks: ResNet-20/32/56 for CIFAR and ResNet-18/50 for ImageNet."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from experiments.common.models.layers import BatchNorm, Conv, max_pool, widen

_HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def _conv(features: int, size: int, stride: int, name: str) -> nn.Module:
    pad = size // 2  # PyTorch's padding: with stride 2 it differs from SAME, and published weights expect it
    return Conv(
        features,
        (size, size),
        strides=stride,
        padding=[(pad, pad), (pad, pad)],
        use_bias=False,
        kernel_init=_HE,
        name=name,
    )


def shortcut_a(x: jax.Array, features: int, stride: int) -> jax.Array:
    """Subsamples space and pads channels with zeros, half on each side: the shortcut without parameters (option A).

    Args:
      x: `[n, h, w, c]`, c <= features.
      features: channels of the result; an odd one out is added at the end.
      stride: keeps every stride-th row and column.

    Returns:
      `[n, ceil(h / stride), ceil(w / stride), features]`.
    """
    extra = features - x.shape[-1]
    # not by indexing, which is a gather where the batch size is free: channels pass a slice
    x = lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (extra // 2, extra - extra // 2)))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, `conv1`, `bn1`, `conv2`, `bn2` (and `downsample_conv`, `downsample_bn`)."""

    features: int
    stride: int = 1
    projection: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[n, h, w, c]` to `[n, ceil(h / stride), ceil(w / stride), features]`."""
        y = _conv(self.features, 3, self.stride, "conv1")(x)
        y = nn.relu(BatchNorm(name="bn1")(y, train=train))
        y = _conv(self.features, 3, 1, "conv2")(y)
        y = BatchNorm(name="bn2")(y, train=train)
        if x.shape != y.shape:
            if self.projection:
                x = _conv(self.features, 1, self.stride, "downsample_conv")(x)
                x = BatchNorm(name="downsample_bn")(x, train=train)
            else:
                x = shortcut_a(x, self.features, self.stride)
        return nn.relu(x + y)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions with the stride in the middle one, and a projection where the shape changes."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[n, h, w, c]` to `[n, ceil(h / stride), ceil(w / stride), 4 * features]`."""
        y = _conv(self.features, 1, 1, "conv1")(x)
        y = nn.relu(BatchNorm(name="bn1")(y, train=train))
        y = _conv(self.features, 3, self.stride, "conv2")(y)
        y = nn.relu(BatchNorm(name="bn2")(y, train=train))
        y = _conv(4 * self.features, 1, 1, "conv3")(y)
        y = BatchNorm(name="bn3")(y, train=train)
        if x.shape != y.shape:
            x = _conv(4 * self.features, 1, self.stride, "downsample_conv")(x)
            x = BatchNorm(name="downsample_bn")(x, train=train)
        return nn.relu(x + y)


class CifarResNet(nn.Module):
    """ResNet-(6k+2) for 32x32 images: three stages of k basic blocks, 16, 32, 64 channels, shortcuts of option A.

    Parameters are named `conv1`, `bn1`, `layer<stage>_<block>/{conv1,bn1,conv2,bn2}`, `linear`. ResNet-20 (k = 3) has
    269,722 parameters for ten classes.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, section 4.2.
    """

    blocks: int = 3
    classes: int = 10
    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, classes]`."""
        x = _conv(widen(16, self.width), 3, 1, "conv1")(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train=train))
        for stage in range(3):
            for block in range(self.blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                name = f"layer{stage + 1}_{block}"
                x = BasicBlock(widen(16 << stage, self.width), stride, name=name)(x, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.classes, name="linear")(x)


class ResNet(nn.Module):
    """ResNet for ImageNet: four stages of 64, 128, 256, 512 (x4 with bottlenecks) channels, projection shortcuts.

    Parameters are named as in `CifarResNet`, with `downsample_conv` and `downsample_bn` for the projections. The stride
    of a bottleneck is in its 3x3 convolution, as in every published set of weights since. ResNet-18 (2, 2, 2, 2) has
    11,689,512 parameters and ResNet-50 (3, 4, 6, 3, bottlenecks) 25,557,032 for 1000 classes. `stem="cifar"` takes a
    3x3 convolution and no pooling for 32x32 images.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", 2015, table 1.
    """

    blocks: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    classes: int = 1000
    width: float = 1.0
    stem: str = "imagenet"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, classes]`."""
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem is 'imagenet' or 'cifar', got {self.stem!r}")
        large = self.stem == "imagenet"
        x = _conv(widen(64, self.width), 7 if large else 3, 2 if large else 1, "conv1")(x)
        x = nn.relu(BatchNorm(name="bn1")(x, train=train))
        if large:
            x = max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)])
        for stage, count in enumerate(self.blocks):
            for block in range(count):
                stride = 2 if stage > 0 and block == 0 else 1
                features = widen(64 << stage, self.width)
                name = f"layer{stage + 1}_{block}"
                if self.bottleneck:
                    x = Bottleneck(features, stride, name=name)(x, train)
                else:
                    x = BasicBlock(features, stride, projection=True, name=name)(x, train)
        x = x.mean(axis=(1, 2))
        return nn.Dense(self.classes, name="linear")(x)
