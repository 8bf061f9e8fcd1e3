"""VGG-16 with batch normalisation, with the head for CIFAR or the one for ImageNet."""

import flax.linen as nn
import jax

from experiments.common.models.layers import BatchNorm, Conv, max_pool, widen

_HE = nn.initializers.he_normal()
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))


class VGG16(nn.Module):
    """VGG-16: thirteen 3x3 convolutions `conv0` ... `conv12` in five pooled stages, then a dense head.

    `head="imagenet"` is the published one, `f1`, `f2` (4096 units each) and `f3`: 138,357,544 parameters for 224x224x3
    inputs and 1000 classes without batch normalisation. With it (`bn0` ... `bn12`) the convolutions drop their bias,
    which the normalisation would cancel, and the count is 138,361,768. `head="cifar"` is one dense layer `f1`.
    `dropout` acts on `f1` and `f2` of the ImageNet head while training (the paper: 0.5), with `rngs={"dropout": key}`.

    Source: Simonyan, Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014, table 1, D;
    batch normalisation: Ioffe, Szegedy, 2015.
    """

    classes: int = 10
    width: float = 1.0
    head: str = "cifar"
    batch_norm: bool = True
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[n, h, w, c]`, h and w at least 32, to logits `[n, classes]`."""
        if self.head not in ("cifar", "imagenet"):
            raise ValueError(f"head is 'cifar' or 'imagenet', got {self.head!r}")
        if min(x.shape[1:3]) < 32:
            raise ValueError(f"VGG-16 halves images five times and needs 32x32 or more, got shape {x.shape}")
        index = 0
        for stage in _STAGES:
            for features in stage:
                conv = Conv(
                    widen(features, self.width),
                    (3, 3),
                    padding="SAME",
                    use_bias=not self.batch_norm,
                    kernel_init=_HE,
                    name=f"conv{index}",
                )
                x = conv(x)
                if self.batch_norm:
                    x = BatchNorm(name=f"bn{index}")(x, train=train)
                x = nn.relu(x)
                index += 1
            x = max_pool(x, (2, 2))
        x = x.reshape(x.shape[0], -1)
        if self.head == "cifar":
            return nn.Dense(self.classes, name="f1")(x)
        for name in ("f1", "f2"):
            x = nn.relu(nn.Dense(widen(4096, self.width), kernel_init=_HE, name=name)(x))
            x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(self.classes, name="f3")(x)
