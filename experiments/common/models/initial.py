"""First weights drawn on the host, for networks of so many layers that compiling their `init` takes long."""

import zlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from compressx.tree import paths


def draw(model: nn.Module, x: Any, seed: int) -> dict[str, Any]:
    """Variables of a module: He-normal kernels, scales and variances 1, all else 0.

        kernel ~ N(0, 2 / fan_in),  fan_in = product of all axes but the last

    A leaf's numbers depend on the seed and its path alone. XLA takes some 20 s to compile the 75 draws of YOLOv3's own
    `init`; this takes none.

    Args:
      model: its leaves must be called `kernel`, `scale`, `bias`, `mean` and `var`.
      x: inputs, arrays or shapes.
      seed: 0 or more.

    Raises:
      ValueError: a leaf of another name.
    """
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)

    def one(path: str, leaf: Any) -> jax.Array:
        name = path.rpartition("/")[2]
        if name == "kernel":
            rng = np.random.default_rng([seed, zlib.crc32(path.encode())])
            scale = np.sqrt(2.0 / np.prod(leaf.shape[:-1]))
            return jnp.asarray((scale * rng.standard_normal(leaf.shape, np.float32)).astype(np.float32))
        if name not in ("scale", "var", "bias", "mean"):
            raise ValueError(f"{path}: no rule says how to draw {name!r}")
        return jnp.full(leaf.shape, 1.0 if name in ("scale", "var") else 0.0, jnp.float32)

    leaves, treedef = jax.tree.flatten(shapes)
    return jax.tree.unflatten(treedef, map(one, paths(shapes), leaves))
