"""A vision transformer in NNX."""

import jax
from flax import nnx

from experiments.common.models.transformer import Stack, positions


class ViT(nnx.Module):
    """A vision transformer: `patches`, `positions`, `stack`, `norm`, `head` on the mean over all patches.

    Smaller than the published ones, with RMS norms before attention and MLP and no class token.

    Args:
      shape: of an image, `[h, w, c]`; h and w are multiples of `patch`.
      classes: number of classes.
      patch: side of a patch in pixels.
      width: of the residual stream, a multiple of `heads`.
      heads: in each layer.
      hidden: width of the MLP.
      layers: number of them.
      rngs: of the weights.

    Source: A. Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        patch: int,
        width: int,
        heads: int,
        hidden: int,
        layers: int,
        rngs: nnx.Rngs,
    ):
        h, w, c = shape
        if patch < 1 or h % patch or w % patch:
            raise ValueError(f"images {shape} do not divide into patches of {patch}x{patch}")
        self.patch = patch
        self.patches = nnx.Linear(patch * patch * c, width, rngs=rngs)
        self.positions = positions((h // patch) * (w // patch), width, rngs)
        self.stack = Stack(width, heads, hidden, layers, False, rngs)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps images `[n, h, w, c]` to logits `[n, classes]`."""
        n, h, w, c = x.shape
        p = self.patch
        x = x.reshape(n, h // p, p, w // p, p, c).transpose(0, 1, 3, 2, 4, 5).reshape(n, -1, p * p * c)
        x = self.patches(x)
        x = self.stack(x + self.positions[...][None])
        return self.head(self.norm(x.mean(1)))
