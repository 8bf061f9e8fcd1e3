"""Networks as flax.linen modules, under one index.

Every model is called as `model.apply(variables, x, train=False)` with x float32 `[n, h, w, c]`, normalised, and returns
logits `[n, classes]` (`yolov3`: three heads; `gru`: sequences `[n, t, features]`; `lstm_lm`: words in, see
`models.lstm`). Those with batch normalisation take `mutable=["batch_stats"]` while training.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn

from experiments.common.models.gru import GRU
from experiments.common.models.lenet import DigitsCNN, LeNet5, LeNet5Caffe, LeNet300
from experiments.common.models.lstm import LanguageModel
from experiments.common.models.mobilenet import MobileNetV2
from experiments.common.models.resnet import CifarResNet, ResNet
from experiments.common.models.vgg import VGG16
from experiments.common.models.yolov3 import Darknet53, YOLOv3

MODELS: dict[str, Callable[..., nn.Module]] = {
    "digits_cnn": DigitsCNN,
    "lenet_300_100": LeNet300,
    "lenet5": LeNet5,
    "lenet5_caffe": LeNet5Caffe,
    "vgg16": VGG16,
    "resnet20": partial(CifarResNet, blocks=3),
    "resnet32": partial(CifarResNet, blocks=5),
    "resnet56": partial(CifarResNet, blocks=9),
    "resnet18": partial(ResNet, blocks=(2, 2, 2, 2)),
    "resnet50": partial(ResNet, blocks=(3, 4, 6, 3), bottleneck=True),
    "mobilenet_v2": MobileNetV2,
    "darknet53": Darknet53,
    "yolov3": YOLOv3,
    "gru": GRU,
    "lstm_lm": LanguageModel,
}


def build(name: str, classes: int, **options: Any) -> nn.Module:
    """Makes the model of that name.

    Args:
      name: a key of `MODELS`.
      classes: number of classes, at least 1.
      **options: fields of the model, such as `width`, `stem`, `head`.

    Raises:
      ValueError: no such model, no such option, or classes < 1.
    """
    if name not in MODELS:
        raise ValueError(f"no model {name!r}; the models are {', '.join(sorted(MODELS))}")
    if classes < 1:
        raise ValueError(f"model {name!r}: classes must be at least 1, got {classes}")
    make = MODELS[name]
    module, fixed = (make.func, set(make.keywords)) if isinstance(make, partial) else (make, set())
    fields = {field.name for field in dataclasses.fields(module) if field.init}  # type: ignore[arg-type]
    allowed = sorted(fields - fixed - {"classes", "parent", "name"})
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        raise ValueError(f"model {name!r} has no option {', '.join(unknown)}; its options are {', '.join(allowed)}")
    return make(classes=classes, **options)


def named(saved: Any) -> nn.Module:
    """The model that a saved file (`formats.SavedModel`) names; the number of classes may stand in its extra facts.

    Raises:
      ValueError: it names none, or one that cannot be built.
    """
    if saved.model is None:
        raise ValueError("the saved model names no network; build the module and give it with the variables")
    facts = saved.extra
    known = {"classes": facts["classes"]} if isinstance(facts, dict) and "classes" in facts else {}
    options = known | saved.model.get("options", {})
    if "classes" not in options:
        raise ValueError("the saved model says nowhere how many classes its network has; build the module yourself")
    return build(saved.model["name"], **options)


__all__ = [
    "GRU",
    "MODELS",
    "CifarResNet",
    "DigitsCNN",
    "LeNet5",
    "LanguageModel",
    "LeNet5Caffe",
    "LeNet300",
    "MobileNetV2",
    "ResNet",
    "VGG16",
    "Darknet53",
    "YOLOv3",
    "build",
    "named",
]
