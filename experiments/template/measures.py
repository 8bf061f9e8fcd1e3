"""What the template measures of a network: its accuracy on each class."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.common import data
from experiments.common.training import Weights


def by_class(model: Any, weights: Weights, test: Mapping[str, Any], info: data.Info) -> list[float | None]:
    """The share of each class's images that are known; None for a class without images."""
    inputs = data.augment.normalise(jnp.asarray(test["inputs"]), info.mean, info.std)
    logits = model.apply({**weights.params, **weights.batch_stats}, inputs)
    labels = np.asarray(test["labels"])
    right = np.asarray(jnp.argmax(logits, axis=-1)) == labels
    return [float(right[labels == c].mean()) if (labels == c).any() else None for c in range(info.classes)]
