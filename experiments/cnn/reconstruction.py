"""Post-training reconstruction of an image classifier: `--config.plan.method=reconstruct`."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

import compressx
from compressx.rules import Rules
from experiments.common import data
from experiments.common.training.phases import Weights

BATCH = 128  # calibration examples that run through the network together


def of_images(
    model: Any, images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], seed: int
) -> Callable[[Weights, Rules, int], Weights]:
    """How `training.Job` reconstructs: layer by layer, on training images drawn by the seed.

    Args:
      model: the network, a flax module.
      images: the training images, uint8 `[n, h, w, c]`.
      mean: per channel, of the normalisation.
      std: likewise.
      seed: of the run.
    """

    def run(weights: Weights, rules: Rules, examples: int) -> Weights:
        chosen = np.random.default_rng(seed).permutation(len(images))[:examples]
        parts = [chosen[k : k + BATCH] for k in range(0, len(chosen), BATCH)]
        batches = [data.augment.normalise(jnp.asarray(images[part]), mean, std) for part in parts]
        # running statistics take part, and no rule of the plan is meant for them
        free = [(f"({'|'.join(weights.batch_stats)})/.*", None)] if weights.batch_stats else []
        both = {**weights.params, **weights.batch_stats}
        hard, _ = compressx.reconstruct(model, both, [*free, *rules], batches, project_rest=True)
        moved = {name: hard.params[name] for name in weights.batch_stats}
        return Weights({name: hard.params[name] for name in weights.params}, moved, hard.structures)

    return run
