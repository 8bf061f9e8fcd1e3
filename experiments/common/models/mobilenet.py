"""MobileNetV2 with the stem for ImageNet or the one for CIFAR."""

import flax.linen as nn
import jax

from experiments.common.models.layers import BatchNorm, Conv

_HE = nn.initializers.variance_scaling(2.0, "fan_out", "normal")
# expansion, channels, blocks, stride of the first block
_STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def _divisible(channels: float, by: int = 8) -> int:
    """Rounds to a multiple of `by`, never losing more than a tenth: the rule of the published implementation."""
    rounded = max(by, int(channels + by / 2) // by * by)
    return rounded + by if rounded < 0.9 * channels else rounded


class ConvNorm(nn.Module):
    """Convolution `conv`, batch normalisation `bn` and, on request, ReLU6."""

    features: int
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    activation: bool = True

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[n, h, w, c]` to `[n, ceil(h / stride), ceil(w / stride), features]`."""
        pad = self.size // 2
        conv = Conv(
            self.features,
            (self.size, self.size),
            strides=self.stride,
            padding=[(pad, pad), (pad, pad)],
            feature_group_count=x.shape[-1] if self.depthwise else 1,
            use_bias=False,
            kernel_init=_HE,
            name="conv",
        )
        x = BatchNorm(name="bn")(conv(x), train=train)
        return nn.relu6(x) if self.activation else x


class InvertedResidual(nn.Module):
    """Expands by 1x1, filters each channel by 3x3, projects by 1x1: `expand`, `depthwise`, `project`."""

    features: int
    stride: int
    expansion: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[n, h, w, c]` to `[n, ceil(h / stride), ceil(w / stride), features]`."""
        channels = x.shape[-1] * self.expansion
        y = x
        if self.expansion != 1:
            y = ConvNorm(channels, name="expand")(y, train)
        y = ConvNorm(channels, 3, self.stride, depthwise=True, name="depthwise")(y, train)
        y = ConvNorm(self.features, activation=False, name="project")(y, train)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """MobileNetV2: `stem`, seventeen inverted residuals `block0` ... `block16`, `last`, `linear`.

    3,504,872 parameters for 1000 classes. `stem="cifar"` takes stride 1 in the stem and in the first stage of stride 2,
    for 32x32 images. `dropout` acts before the classifier while training (the paper's code: 0.2) and needs
    `rngs={"dropout": key}`.

    Source: Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks", 2018, table 2.
    """

    classes: int = 1000
    width: float = 1.0
    stem: str = "imagenet"
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, classes]`."""
        if self.stem not in ("imagenet", "cifar"):
            raise ValueError(f"stem is 'imagenet' or 'cifar', got {self.stem!r}")
        small = self.stem == "cifar"
        x = ConvNorm(_divisible(32 * self.width), 3, 1 if small else 2, name="stem")(x, train)
        index = 0
        for stage, (expansion, channels, count, stride) in enumerate(_STAGES):
            for block in range(count):
                first = 1 if small and stage == 1 else stride
                x = InvertedResidual(
                    _divisible(channels * self.width), first if block == 0 else 1, expansion, name=f"block{index}"
                )(x, train)
                index += 1
        x = ConvNorm(_divisible(1280 * max(1.0, self.width)), name="last")(x, train)
        x = x.mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name="linear")(x)
