"""A decoder-only transformer in NNX."""

import jax
from flax import nnx

from experiments.common.models.transformer import Stack, positions


class Decoder(nnx.Module):
    """A language model: `embedding`, `positions`, a causal `stack`, `norm`, `head`.

    Args:
      classes: size of the vocabulary.
      window: the most positions of an input.
      width: of the residual stream, a multiple of `heads`.
      heads: in each layer.
      hidden: width of the MLP.
      layers: number of them.
      rngs: of the weights.

    Source: A. Radford et al., "Language Models are Unsupervised Multitask Learners", 2019, with RMS norms.
    """

    def __init__(
        self, classes: int, window: int, *, width: int, heads: int, hidden: int, layers: int, rngs: nnx.Rngs
    ):
        self.embedding = nnx.Embed(classes, width, rngs=rngs)
        self.positions = positions(window, width, rngs)
        self.stack = Stack(width, heads, hidden, layers, True, rngs)
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, classes, use_bias=False, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps int32 `[n, t]`, t at most the window, to logits of every next token, `[n, t, classes]`."""
        t = tokens.shape[1]
        x = self.embedding(tokens) + self.positions[...][None, :t]
        return self.head(self.norm(self.stack(x)))
