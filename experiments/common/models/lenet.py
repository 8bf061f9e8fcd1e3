"""LeNet-300-100, LeNet-5 in its two usual shapes, and a convolutional network for 8x8 digits."""

import flax.linen as nn
import jax

from experiments.common.models.layers import Conv, max_pool, widen

_HE = nn.initializers.he_normal()


class LeNet300(nn.Module):
    """LeNet-300-100: two hidden dense layers, `f1`, `f2`, `f3`.

    266,610 parameters for 28x28 inputs and ten classes.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998, III.C.
    """

    classes: int = 10
    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps inputs `[n, ...]` to logits `[n, classes]`."""
        del train
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(widen(300, self.width), kernel_init=_HE, name="f1")(x))
        x = nn.relu(nn.Dense(widen(100, self.width), kernel_init=_HE, name="f2")(x))
        return nn.Dense(self.classes, name="f3")(x)


class LeNet5(nn.Module):
    """LeNet-5 with 6 and 16 filters, `c1`, `c2`, `f1`, `f2`, `f3`, with ReLU and max-pooling as it is used today.

    61,706 parameters for 28x28 inputs and ten classes.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-based learning applied to document recognition", 1998, II.B.
    """

    classes: int = 10
    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, classes]`."""
        del train
        x = nn.relu(Conv(widen(6, self.width), (5, 5), padding="SAME", kernel_init=_HE, name="c1")(x))
        x = max_pool(x, (2, 2))
        x = nn.relu(Conv(widen(16, self.width), (5, 5), padding="VALID", kernel_init=_HE, name="c2")(x))
        x = max_pool(x, (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(widen(120, self.width), kernel_init=_HE, name="f1")(x))
        x = nn.relu(nn.Dense(widen(84, self.width), kernel_init=_HE, name="f2")(x))
        return nn.Dense(self.classes, name="f3")(x)


class LeNet5Caffe(nn.Module):
    """LeNet-5 as Caffe ships it, 20-50-500, `c1`, `c2`, `f1`, `f2`: the network of the pruning literature.

    430,500 weights and 580 biases for 28x28x1 inputs and ten classes. In Caffe no activation follows the convolutions;
    `conv_relu` adds the ReLU layers that most PyTorch versions have (the weights are the same).

    Source: the `lenet` example of Jia et al., "Caffe: Convolutional Architecture for Fast Feature Embedding", 2014.
    """

    classes: int = 10
    width: float = 1.0
    conv_relu: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, classes]`."""
        del train
        after = nn.relu if self.conv_relu else lambda x: x
        x = after(max_pool(Conv(widen(20, self.width), (5, 5), padding="VALID", name="c1")(x), (2, 2)))
        x = after(max_pool(Conv(widen(50, self.width), (5, 5), padding="VALID", name="c2")(x), (2, 2)))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(widen(500, self.width), kernel_init=_HE, name="f1")(x))
        return nn.Dense(self.classes, name="f2")(x)


class DigitsCNN(nn.Module):
    """A small convolutional network for the 8x8 digits of scikit-learn, `c1`, `c2`, `f1`, `f2`.

    38,282 parameters for 8x8x1 inputs and ten classes.
    """

    classes: int = 10
    width: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, classes]`."""
        del train
        x = nn.relu(Conv(widen(16, self.width), (3, 3), padding="SAME", kernel_init=_HE, name="c1")(x))
        x = nn.relu(Conv(widen(32, self.width), (3, 3), padding="SAME", kernel_init=_HE, name="c2")(x))
        x = max_pool(x, (2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.relu(nn.Dense(widen(64, self.width), kernel_init=_HE, name="f1")(x))
        return nn.Dense(self.classes, name="f2")(x)
