"""The layer that the transformers share, in NNX: attention and an MLP, each behind an RMS norm and added to its input.

Projections are plain linear layers, `[in, out]`; heads are a reshape of their outputs.
"""

import jax
import jax.numpy as jnp
from flax import nnx

POSITIONS = 0.02  # standard deviation of position vectors at the start


class Attention(nnx.Module):
    """Multi-head attention without biases: `query`, `key`, `value`, `out`, all `[width, width]`.

    Source: A. Vaswani et al., "Attention Is All You Need", 2017, section 3.2.
    """

    def __init__(self, width: int, heads: int, causal: bool, rngs: nnx.Rngs):
        if heads < 1 or width % heads:
            raise ValueError(f"width={width} is not a multiple of heads={heads}")
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (
            nnx.Linear(width, width, use_bias=False, rngs=rngs) for _ in range(4)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, t, width]` to the same shape; a causal position attends to itself and those before it."""
        n, t, width = x.shape
        q, k, v = (layer(x).reshape(n, t, self.heads, -1) for layer in (self.query, self.key, self.value))
        scores = jnp.einsum("nqhd,nkhd->nhqk", q, k) * (width // self.heads) ** -0.5
        if self.causal:
            scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e30)
        mixed = jnp.einsum("nhqk,nkhd->nqhd", jax.nn.softmax(scores), v)
        return self.out(mixed.reshape(n, t, width))


class MLP(nnx.Module):
    """`up` to the hidden width, GELU, `down` again."""

    def __init__(self, width: int, hidden: int, rngs: nnx.Rngs):
        self.up = nnx.Linear(width, hidden, rngs=rngs)
        self.down = nnx.Linear(hidden, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, t, width]` to the same shape."""
        return self.down(jax.nn.gelu(self.up(x)))


class Layer(nnx.Module):
    """`attention` behind `norm1` and `mlp` behind `norm2`, on a residual stream."""

    def __init__(self, width: int, heads: int, hidden: int, causal: bool, rngs: nnx.Rngs):
        self.norm1, self.norm2 = (nnx.RMSNorm(width, rngs=rngs) for _ in range(2))
        self.attention = Attention(width, heads, causal, rngs)
        self.mlp = MLP(width, hidden, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, t, width]` to the same shape."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Stack(nnx.Module):
    """Layers one after the other, `layer0`, `layer1`, ..."""

    def __init__(self, width: int, heads: int, hidden: int, layers: int, causal: bool, rngs: nnx.Rngs):
        self.number = layers
        for i in range(layers):
            setattr(self, f"layer{i}", Layer(width, heads, hidden, causal, rngs))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[n, t, width]` to the same shape."""
        for i in range(self.number):
            x = getattr(self, f"layer{i}")(x)
        return x


def positions(number: int, width: int, rngs: nnx.Rngs) -> nnx.Param[jax.Array]:
    """A learned vector for each of so many positions, float32 `[number, width]`."""
    return nnx.Param(POSITIONS * jax.random.normal(rngs.params(), (number, width)))


__all__ = ["MLP", "Attention", "Layer", "Stack", "positions"]
