"""Recurrent language models: long short-term memory with its gates joined, between an embedding and a softmax.

Time runs along axis 0 inside and along axis 1 outside: a batch of text is `[lanes, steps]`. The four gates lie side by
side in one matrix `[in, 4 H]`, in the order input, forget, cell, output. A row of it is what one input sends to all
gates of all cells: the row that DARB and block-max weight masking cut into blocks (`constraints.darb`, axis="outputs").

Source: W. Zaremba, I. Sutskever, O. Vinyals, "Recurrent Neural Network Regularization", 2014.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

GATES = ("input", "forget", "cell", "output")
Carry = tuple[Array, Array]  # h, c, each [lanes, H]


def lstm_reference(x: Array, u: Array, carry: Carry) -> tuple[Array, Carry]:
    """The recurrence, one step after the other, for any gradient.

        i, f, g, o = split(x_t + h U);  c' = sigmoid(f) c + sigmoid(i) tanh(g);  h' = sigmoid(o) tanh(c')

    Args:
      x: float32 `[T, B, 4H]`, the input's part of the gates, bias included.
      u: float32 `[H, 4H]`, recurrent weights.
      carry: h and c before the first step.

    Returns:
      h of all steps `[T, B, H]`, and h and c after the last.
    """

    def step(carry: Carry, x: Array) -> tuple[Carry, Array]:
        h, c, _ = _cell(x + carry[0] @ u, carry[1])
        return (h, c), h

    carry, y = lax.scan(step, carry, x)
    return y, carry


def _cell(a: Array, c: Array) -> tuple[Array, Array, Array]:
    """h and c after a step, and the gates `[B, 4H]` after their functions, from the gates before them and c.

    sigmoid(a) is (1 + tanh(a / 2)) / 2: so one function serves all gates, where four would have to be joined again.
    """
    half, shift = _halves(c.shape[1])
    gates = jnp.tanh(a * half) * half + shift
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    c = f * c + i * g
    return o * jnp.tanh(c), c, gates


def _halves(hidden: int) -> tuple[Array, Array]:
    """1/2 and 1/2 for the gates that are sigmoids, 1 and 0 for the cell's, each `[1, 4H]`."""
    of = jnp.array([[gate != "cell" for gate in GATES]], jnp.float32).repeat(hidden, 1)
    return 1 - of / 2, of / 2


@jax.custom_vjp
def lstm(x: Array, u: Array, carry: Carry) -> tuple[Array, Carry]:
    """`lstm_reference`, with the gradient of u taken as one product over all steps: first derivatives only."""
    return lstm_reference(x, u, carry)


def _forward(x: Array, u: Array, carry: Carry) -> tuple[tuple[Array, Carry], Any]:
    def step(carry: Carry, x: Array) -> tuple[Carry, tuple[Array, Array, Array]]:
        h, c, gates = _cell(x + carry[0] @ u, carry[1])
        return (h, c), (h, c, gates)

    last, (h, c, gates) = lax.scan(step, carry, x)
    return (h, last), (u, carry, h, c, gates)


def _backward(saved: Any, cotangents: tuple[Array, Carry]) -> tuple[Array, Array, Carry]:
    u, (h0, c0), h, c, gates = saved
    dy, (dh, dc) = cotangents
    before = jnp.concatenate([c0[None], c[:-1]])
    half, shift = _halves(u.shape[0])
    i, f, g, o = jnp.split(gates, 4, axis=-1)
    t = jnp.tanh(c)
    # of all steps together: da_t / (dc_t, dc_t, dc_t, dh_t), and what dh_t adds to dc_t
    slopes = jnp.concatenate([g, before, i, t], -1) * (half[None] ** 2 - (gates - shift[None]) ** 2)
    opened = o * (1.0 - t * t)

    def step(carry: Carry, saved: tuple[Array, ...]) -> tuple[Carry, Array]:
        (dh, dc), (dy, slope, opened, f) = carry, saved
        dh = dh + dy
        dc = dc + dh * opened
        da = jnp.concatenate([dc, dc, dc, dh], -1) * slope
        return (da @ u.T, dc * f), da

    (dh, dc), da = lax.scan(step, (dh, dc), (dy, slopes, opened, f), reverse=True)
    previous = jnp.concatenate([h0[None], h[:-1]])
    du = _flat(previous).T @ _flat(da)
    return da, du, (dh, dc)


lstm.defvjp(_forward, _backward)


def _flat(x: Array) -> Array:
    """All steps of all lanes as the rows of one matrix. Over two axes XLA's CPU products are slow."""
    return x.reshape(-1, x.shape[-1])


def _uniform(scale: float) -> nn.initializers.Initializer:
    def init(key: Array, shape: Any, dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(key, shape, dtype, -scale, scale)

    return init


class _Matrix(nn.Module):
    """A weight `kernel` of its own, so that its path names it."""

    scale: float

    @nn.compact
    def __call__(self, rows: int, columns: int) -> Array:
        kernel: Array = self.param("kernel", _uniform(self.scale), (rows, columns), jnp.float32)
        return kernel


class LSTM(nn.Module):
    """One layer: params `input/kernel` `[in, 4H]`, `recurrent/kernel` `[H, 4H]`, `bias` `[4H]`.

    Attributes:
      hidden: H.
      scale: weights and biases start uniform in -scale..scale.
    """

    hidden: int
    scale: float = 0.1

    @nn.compact
    def __call__(self, x: Array, carry: Carry) -> tuple[Array, Carry]:
        """`[T, B, in]` to h of all steps `[T, B, H]` and the carry after the last; one product for all inputs."""
        w = _Matrix(self.scale, name="input")(x.shape[-1], 4 * self.hidden)
        u = _Matrix(self.scale, name="recurrent")(self.hidden, 4 * self.hidden)
        bias = self.param("bias", _uniform(self.scale), (4 * self.hidden,), jnp.float32)
        a = _flat(x) @ w + bias[None]
        return lstm(a.reshape(*x.shape[:2], -1), u, carry)

    def run_with(
        self, product: Callable[[Array, str, Array], Array], x: Array, carry: Carry
    ) -> tuple[tuple[Array, Carry], dict[str, Array]]:
        """`__call__` with every product made by `product(x, name, w)`, see `crossbar.recurrent.Recurrent`."""
        p = self.variables["params"]
        times = lambda v, name: product(v, name, p[name]["kernel"])

        def step(carry: Carry, a: Array) -> tuple[Carry, Array]:
            h, c, _ = _cell(a + times(carry[0], "recurrent"), carry[1])
            return (h, c), h

        last, y = lax.scan(step, carry, times(x, "input") + p["bias"][None, None])
        return (y, last), {"input": x, "recurrent": jnp.concatenate([carry[0][None], y[:-1]])}


class LanguageModel(nn.Module):
    """A distribution over the next word at every step, given all words before it.

    Params: `embedding/embedding` `[V, E]`, `lstm_0/...`, `lstm_1/...`, `softmax/kernel` `[H, V]`, `softmax/bias` `[V]`.
    Dropout stands on the connections that do not run in time: embedding, between layers, before the softmax.

    Attributes:
      classes: V, words in the vocabulary.
      hidden: H, cells a layer; the published sizes are 200 (small), 650 (medium) and 1500 (large).
      embedding: E; 0 is H.
      layers: of LSTM.
      dropout: share of the activations set to zero in training, the others divided by 1 - dropout.
      scale: all weights start uniform in -scale..scale (0.1, 0.05, 0.04).
    """

    classes: int
    hidden: int = 200
    embedding: int = 0
    layers: int = 2
    dropout: float = 0.0
    scale: float = 0.1

    def __post_init__(self) -> None:
        for name, low in (("hidden", 1), ("embedding", 0), ("layers", 1)):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} is impossible; it must be at least {low}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is impossible; it must be in [0, 1)")
        if self.scale <= 0:
            raise ValueError(f"scale={self.scale} is impossible; it must be positive")
        super().__post_init__()

    def begin(self, lanes: int) -> tuple[Carry, ...]:
        """The carry before the first word: zeros, h and c `[lanes, H]` for every layer."""
        return tuple(
            (jnp.zeros((lanes, self.hidden), jnp.float32), jnp.zeros((lanes, self.hidden), jnp.float32))
            for _ in range(self.layers)
        )

    @nn.compact
    def __call__(
        self, words: Array, carry: tuple[Carry, ...] | None = None, train: bool = False
    ) -> tuple[Array, tuple[Carry, ...]]:
        """Reads words and says what it expects after each.

        Args:
          words: int32 `[B, T]`.
          carry: as `begin(B)` or an earlier call left it; None for the beginning of the text.
          train: drops out, with the random stream `dropout`.

        Returns:
          Logits float32 `[B, T, V]`, and the carry after the last word.
        """
        start = self.begin(words.shape[0]) if carry is None else carry
        drop = nn.Dropout(self.dropout, deterministic=not train)
        table = nn.Embed(
            self.classes, self.embedding or self.hidden, embedding_init=_uniform(self.scale), name="embedding"
        )
        x = drop(table(words.T))
        end = []
        for i in range(self.layers):
            x, last = LSTM(self.hidden, self.scale, name=f"lstm_{i}")(x, start[i])
            end.append(last)
            x = drop(x)
        dense = nn.Dense(
            self.classes, kernel_init=_uniform(self.scale), bias_init=_uniform(self.scale), name="softmax"
        )
        lanes, steps = words.shape
        return dense(_flat(x.transpose(1, 0, 2))).reshape(lanes, steps, self.classes), tuple(end)
