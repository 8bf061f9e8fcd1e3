"""GRU networks over sequences, left to right so that they stream, every gate a matrix of its own.

    z_t = sigmoid(x_t Wz + h_{t-1} Uz + bz)                       the share of the old state that stays
    r_t = sigmoid(x_t Wr + h_{t-1} Ur + br)
    c_t = tanh(x_t Wh + (r_t * h_{t-1}) Uh + bh) * d              reset "before": Cho et al., RTMobile's network
    c_t = tanh(x_t Wh + r_t * (h_{t-1} Uh + bu) + bh) * d         reset "after": cuDNN, PyTorch, flax
    h_t = z_t * h_{t-1} + (1 - z_t) * c_t

d is a dropout mask over units, one for a whole sequence, 1 in evaluation. The six matrices of a layer are the leaves
`wz wr wh` `[in, hidden]` and `uz ur uh` `[hidden, hidden]`: a constraint may take them apart or together.

For speed the input products of all steps are one product before the loop, the gates of a step are one or two, and the
gradient of the recurrent matrices is one product after the backward loop (autodiff would add up one a step).

Sources: K. Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014; P. Dong et al., "RTMobile",
2020, whose released training code is pytorch-kaldi's.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

GATES = "zrh"
MATRICES = r"params/gru_\d+/[wu][zrh]"  # the paths of the constrained matrices


class GRULayer(nn.Module):
    """One layer over time-major sequences: `[t, n, in] -> [t, n, hidden]`.

    Attributes:
      hidden: units.
      reset: "before" or "after", see the module.
    """

    hidden: int
    reset: str = "before"

    @nn.compact
    def __call__(self, x: Array, h: Array, mask: Array) -> Array:
        """All states of a sequence that starts from the state `h` `[n, hidden]`; `mask` `[n, hidden]` is d."""
        shape = (x.shape[-1], self.hidden)
        w = [self.param(f"w{g}", nn.initializers.glorot_uniform(), shape) for g in GATES]
        u = [self.param(f"u{g}", nn.initializers.orthogonal(), (self.hidden, self.hidden)) for g in GATES]
        b = [self.param(f"b{g}", nn.initializers.zeros, (self.hidden,)) for g in GATES]
        inputs = x @ jnp.concatenate(w, axis=1) + jnp.concatenate(b)[None, None]
        if self.reset == "before":
            return reset_before(inputs, h, jnp.concatenate(u[:2], axis=1), u[2], mask)
        bu = self.param("bu", nn.initializers.zeros, (self.hidden,))
        return reset_after(inputs, h, jnp.concatenate(u, axis=1), bu, mask)


    def run_with(
        self, product: Callable[[Array, str, Array], Array], x: Array, h: Array, mask: Array
    ) -> tuple[Array, dict[str, Array]]:
        """`__call__` with every product made by `product(x, name, w)`, see `crossbar.recurrent.Recurrent`."""
        p, after = self.variables["params"], self.reset == "after"
        times = lambda v, name: product(v, name, p[name])
        inputs = tuple(times(x, f"w{g}") + p[f"b{g}"][None, None] for g in GATES)

        def step(h: Array, at: tuple[Array, ...]) -> tuple[Array, tuple[Array, Array]]:
            z, r = (jax.nn.sigmoid(a + times(h, f"u{g}")) for a, g in zip(at[:2], "zr", strict=True))
            c = jnp.tanh(at[2] + (r * (times(h, "uh") + p["bu"][None]) if after else times(r * h, "uh")))
            h = z * h + (1 - z) * (c * mask)
            return h, (h, r)

        _, (states, r) = lax.scan(step, h, inputs)
        past = _previous(h, states)
        fed = {**dict.fromkeys(("wz", "wr", "wh"), x), "uz": past, "ur": past, "uh": past if after else r * past}
        return states, fed


class GRU(nn.Module):
    """A stack of GRU layers and a linear layer: `[n, t, features] -> logits [n, t, classes]`, causal.

    Attributes:
      classes: outputs a step.
      hidden: units a layer.
      layers: number of layers.
      dropout: share of candidate units dropped in training, the same ones over a sequence.
      reset: "before" or "after", see the module.
    """

    classes: int
    hidden: int = 1024
    layers: int = 2
    dropout: float = 0.2
    reset: str = "before"

    def setup(self) -> None:
        """Declares the layers `gru_0`, `gru_1`, ... and `output`."""
        if self.hidden < 1 or self.layers < 1:
            raise ValueError(f"hidden={self.hidden} and layers={self.layers} must be at least 1")
        if self.reset not in ("before", "after"):
            raise ValueError(f'reset={self.reset!r} is impossible; it must be "before" or "after"')
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} is impossible; it must be in [0, 1)")
        self.gru = [GRULayer(self.hidden, self.reset) for _ in range(self.layers)]
        self.output = nn.Dense(self.classes)

    def __call__(self, x: Array, train: bool = False) -> Array:
        """Logits of whole sequences; training with dropout needs `rngs={"dropout": key}`."""
        return self.stream(x, self.start(x.shape[0], x.dtype), train)[0]

    def start(self, n: int, dtype: Any = jnp.float32) -> Array:
        """The state before anything was heard, `[layers, n, hidden]`."""
        return jnp.zeros((self.layers, n, self.hidden), dtype)

    def stream(self, x: Array, state: Array, train: bool = False) -> tuple[Array, Array]:
        """Logits of the next piece of each sequence and the state after it.

        Args:
          x: `[n, t, features]`, t at least 1.
          state: `[layers, n, hidden]`, from `start` or the piece before.
        """
        h = jnp.swapaxes(x, 0, 1)
        last = []
        for layer, start in zip(self.gru, state, strict=True):
            h = layer(h, start, self._mask(start, train))
            last.append(h[-1])
        return jnp.swapaxes(self.output(h), 0, 1), jnp.stack(last)

    def _mask(self, like: Array, train: bool) -> Array:
        if not train or self.dropout == 0:
            return jnp.ones_like(like)
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.dropout, like.shape)
        return kept.astype(like.dtype) / (1 - self.dropout)


# -- the recurrences, time-major; gates are joined in the order z, r, h ------------------------------------------------


def _sum_over_steps(a: Array, b: Array) -> Array:
    """sum_t a_t^T b_t as one product."""
    return a.reshape(-1, a.shape[-1]).T @ b.reshape(-1, b.shape[-1])


def _previous(h: Array, states: Array) -> Array:
    return jnp.concatenate([h[None], states[:-1]])


@jax.custom_vjp
def reset_before(x: Array, h: Array, uzr: Array, uh: Array, mask: Array) -> Array:
    """All states of the recurrence with reset "before".

    Args:
      x: x_t W + b of all steps, `[t, n, 3 * hidden]`.
      h: state before the first step, `[n, hidden]`.
      uzr: `[hidden, 2 * hidden]`.
      uh: `[hidden, hidden]`.
      mask: d, `[n, hidden]`; it has no gradient.
    """
    return _before(x, h, uzr, uh, mask)[0]


def _before(x: Array, h: Array, uzr: Array, uh: Array, mask: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    m = h.shape[-1]

    def step(h: Array, x: Array) -> tuple[Array, Any]:
        zr = jax.nn.sigmoid(x[:, : 2 * m] + h @ uzr)
        z, r = zr[:, :m], zr[:, m:]
        c = jnp.tanh(x[:, 2 * m :] + (r * h) @ uh)
        h = z * h + (1 - z) * (c * mask)
        return h, (h, z, r, c)

    _, (states, *gates) = lax.scan(step, h, x)
    return states, tuple(gates)


def _before_forward(x: Array, h: Array, uzr: Array, uh: Array, mask: Array) -> tuple[Array, Any]:
    states, gates = _before(x, h, uzr, uh, mask)
    return states, (gates, states, h, uzr, uh, mask)


def _before_backward(saved: Any, g: Array) -> tuple[Array | None, ...]:
    (z, r, c), states, h, uzr, uh, mask = saved
    previous = _previous(h, states)

    def step(dh: Array, at: Any) -> tuple[Array, Any]:
        g, h, z, r, c = at
        dh = dh + g
        da = dh * (1 - z) * mask * (1 - c * c)
        drh = da @ uh.T
        dz = dh * (h - c * mask) * z * (1 - z)
        dzr = jnp.concatenate([dz, drh * h * r * (1 - r)], axis=1)
        return dh * z + drh * r + dzr @ uzr.T, (dzr, da)

    dh, (dzr, da) = lax.scan(step, jnp.zeros_like(h), (g, previous, z, r, c), reverse=True)
    dx = jnp.concatenate([dzr, da], axis=-1)
    return dx, dh, _sum_over_steps(previous, dzr), _sum_over_steps(r * previous, da), None


reset_before.defvjp(_before_forward, _before_backward)


@jax.custom_vjp
def reset_after(x: Array, h: Array, u: Array, bu: Array, mask: Array) -> Array:
    """All states of the recurrence with reset "after"; `u` `[hidden, 3 * hidden]`, `bu` `[hidden]`, else as above."""
    return _after(x, h, u, bu, mask)[0]


def _after(x: Array, h: Array, u: Array, bu: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    m = h.shape[-1]

    def step(h: Array, x: Array) -> tuple[Array, Any]:
        hu = h @ u
        zr = jax.nn.sigmoid(x[:, : 2 * m] + hu[:, : 2 * m])
        z, r = zr[:, :m], zr[:, m:]
        n = hu[:, 2 * m :] + bu[None]
        c = jnp.tanh(x[:, 2 * m :] + r * n)
        h = z * h + (1 - z) * (c * mask)
        return h, (h, z, r, c, n)

    _, (states, *gates) = lax.scan(step, h, x)
    return states, tuple(gates)


def _after_forward(x: Array, h: Array, u: Array, bu: Array, mask: Array) -> tuple[Array, Any]:
    states, gates = _after(x, h, u, bu, mask)
    return states, (gates, states, h, u, bu, mask)


def _after_backward(saved: Any, g: Array) -> tuple[Array | None, ...]:
    (z, r, c, n), states, h, u, bu, mask = saved
    previous = _previous(h, states)

    def step(dh: Array, at: Any) -> tuple[Array, Any]:
        g, h, z, r, c, n = at
        dh = dh + g
        da = dh * (1 - z) * mask * (1 - c * c)
        dz = dh * (h - c * mask) * z * (1 - z)
        dr = da * n * r * (1 - r)
        dhu = jnp.concatenate([dz, dr, da * r], axis=1)
        return dh * z + dhu @ u.T, (dhu, da)

    dh, (dhu, da) = lax.scan(step, jnp.zeros_like(h), (g, previous, z, r, c, n), reverse=True)
    m = bu.shape[0]
    dx = jnp.concatenate([dhu[:, :, : 2 * m], da], axis=-1)
    return dx, dh, _sum_over_steps(previous, dhu), jnp.sum(dhu[:, :, 2 * m :], axis=(0, 1)), None


reset_after.defvjp(_after_forward, _after_backward)
