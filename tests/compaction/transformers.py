"""Random small transformers in the forms in which people write them, as functions of a dictionary of arrays."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Leaves = dict[str, Any]
VOCABULARY, LENGTH = 11, 5


class Kind(NamedTuple):
    """How a transformer is written.

    Attributes:
      form: of its projections. "general": `[d, heads, dim]`; "dense": `[d, heads * dim]`, reshaped; "fused": one kernel
        `[d, (heads + 2 * kv) * dim]`, split; "three": one kernel, reshaped to `[3, heads, dim]`; "interleaved": one
        kernel, reshaped to `[heads, 3 * dim]`; "torch": like "dense", kernels `[out, in]`.
      heads: of the queries.
      kv: heads of keys and values.
      repeated: keys and values are repeated for their queries; else the queries are grouped.
      dim: of a head.
      d: width of the residual stream.
      hidden: width of the MLP.
      gated: "" (GELU), "two" (SwiGLU of two kernels) or "one" (of one kernel, split).
      norm: "rms", "layer" or "" (none).
      layers: number of them.
      scanned: the layers are stacked, and a scan runs over them.
    """

    form: str = "dense"
    heads: int = 4
    kv: int = 4
    repeated: bool = False
    dim: int = 2
    d: int = 6
    hidden: int = 10
    gated: str = ""
    norm: str = "rms"
    layers: int = 1
    scanned: bool = False


def leaves(kind: Kind, rng: np.random.Generator) -> Leaves:
    """Random leaves, `[layers, ...]` where the layers are scanned, else a dictionary a layer."""
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape) / max(1, int(np.prod(shape[:-1]))) ** 0.5, jnp.float32)
    one = [_layer(kind, draw) for _ in range(kind.layers)]
    layers: Leaves = {f"layer{i}": layer for i, layer in enumerate(one)}
    if kind.scanned:
        layers = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *one)}
    return {"table": draw(VOCABULARY, kind.d), "at": draw(LENGTH, kind.d), "head": draw(kind.d, 3), **layers}


def _layer(k: Kind, draw: Any) -> Leaves:
    q, kv = k.heads * k.dim, k.kv * k.dim
    v: Leaves = {}
    if k.form == "general":
        v |= {"q": draw(k.d, k.heads, k.dim), "k": draw(k.d, k.kv, k.dim), "v": draw(k.d, k.kv, k.dim)}
        v |= {"v_bias": draw(k.kv, k.dim), "o": draw(k.heads, k.dim, k.d)}
    elif k.form == "dense":
        v |= {"q": draw(k.d, q), "k": draw(k.d, kv), "v": draw(k.d, kv), "v_bias": draw(kv), "o": draw(q, k.d)}
    elif k.form == "torch":
        v |= {"q": draw(q, k.d), "k": draw(kv, k.d), "v": draw(kv, k.d), "v_bias": draw(kv), "o": draw(k.d, q)}
    else:
        v |= {"qkv": draw(k.d, q + 2 * kv), "qkv_bias": draw(q + 2 * kv), "o": draw(q, k.d)}
    if k.gated == "one":
        v["up"] = draw(k.d, 2 * k.hidden)
    else:
        v |= {"up": draw(k.d, k.hidden), **({"gate": draw(k.d, k.hidden)} if k.gated else {"up_bias": draw(k.hidden)})}
    v |= {"down": draw(k.hidden, k.d), "down_bias": draw(k.d)}
    for name in ("norm1", "norm2") if k.norm else ():
        v[name] = 1 + draw(k.d)
    if k.norm == "layer":
        v |= {"shift1": draw(k.d), "shift2": draw(k.d)}
    return v


def _norm(k: Kind, v: Leaves, which: int, x: jax.Array) -> jax.Array:
    if not k.norm:
        return x
    mean = x.mean(-1, keepdims=True) if k.norm == "layer" else 0.0
    scaled = (x - mean) * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) - mean**2 + 1e-3) * v[f"norm{which}"]
    return scaled + v[f"shift{which}"] if k.norm == "layer" else scaled


def _heads(k: Kind, v: Leaves, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    b, t, _ = x.shape
    if k.form == "general":
        q, key, value = (jnp.einsum("btd,dhe->bthe", x, v[n]) for n in "qkv")
        return q, key, value + v["v_bias"]
    if k.form in ("dense", "torch"):
        q, key, value = (x @ (v[n] if k.form == "dense" else v[n].T) for n in "qkv")
        value = value + v["v_bias"]
    else:
        qkv = x @ v["qkv"] + v["qkv_bias"]
        if k.form == "three":
            parts = qkv.reshape(b, t, 3, k.heads, k.dim)
            return parts[:, :, 0], parts[:, :, 1], parts[:, :, 2]
        if k.form == "interleaved":
            q, key, value = jnp.split(qkv.reshape(b, t, k.heads, 3 * k.dim), 3, -1)
            return q, key, value
        q, key, value = jnp.split(qkv, [k.heads * k.dim, (k.heads + k.kv) * k.dim], -1)
    return tuple(y.reshape(b, t, n, k.dim) for y, n in ((q, k.heads), (key, k.kv), (value, k.kv)))


def _attention(k: Kind, v: Leaves, x: jax.Array) -> jax.Array:
    b, t, _ = x.shape
    q, key, value = _heads(k, v, x)
    if k.kv != k.heads and not k.repeated:
        q = q.reshape(b, t, k.kv, k.heads // k.kv, k.dim)
        weights = jax.nn.softmax(jnp.einsum("btgre,bsge->bgrts", q, key) * k.dim**-0.5)
        y = jnp.einsum("bgrts,bsge->btgre", weights, value).reshape(b, t, k.heads, k.dim)
    else:
        if k.kv != k.heads:
            key, value = (jnp.repeat(y, k.heads // k.kv, 2) for y in (key, value))
        weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, key) * k.dim**-0.5)
        y = jnp.einsum("bhts,bshe->bthe", weights, value)
    if k.form == "general":
        return jnp.einsum("bthe,hed->btd", y, v["o"])
    return y.reshape(b, t, -1) @ (v["o"].T if k.form == "torch" else v["o"])


def _mlp(k: Kind, v: Leaves, x: jax.Array) -> jax.Array:
    up = x @ v["up"]
    if k.gated == "one":
        up, gate = jnp.split(up, 2, -1)
        up = up * jax.nn.silu(gate)
    elif k.gated:
        up = up * jax.nn.silu(x @ v["gate"])
    else:
        up = jax.nn.gelu(up + v["up_bias"])
    return up @ v["down"] + v["down_bias"]


def apply(kind: Kind, v: Leaves, tokens: jax.Array) -> jax.Array:
    """Numbers `[batch, 3]` for tokens `[batch, LENGTH]`."""
    with jax.numpy_rank_promotion("allow"):  # biases and norms, as people write them
        return _apply(kind, v, tokens)


def _apply(kind: Kind, v: Leaves, tokens: jax.Array) -> jax.Array:
    def layer(x: jax.Array, v: Leaves) -> tuple[jax.Array, None]:
        x = x + _attention(kind, v, _norm(kind, v, 1, x))
        return x + _mlp(kind, v, _norm(kind, v, 2, x)), None

    x = jnp.take(v["table"], tokens, axis=0) + v["at"]
    if kind.scanned:
        x, _ = jax.lax.scan(layer, x, v["layers"])
    else:
        for i in range(kind.layers):
            x, _ = layer(x, v[f"layer{i}"])
    return x.mean(1) @ v["head"]


def draw_kind(rng: np.random.Generator) -> Kind:
    """A kind of any form and size."""
    form = str(rng.choice(["general", "dense", "fused", "three", "interleaved", "torch"]))
    kv, group = int(rng.integers(2, 4)), int(rng.integers(1, 4))
    if form in ("three", "interleaved"):
        group = 1
    scanned = bool(rng.random() < 0.4)
    return Kind(
        form=form,
        heads=kv * group,
        kv=kv,
        repeated=bool(rng.random() < 0.5),
        dim=int(rng.integers(2, 4)),
        d=int(rng.integers(4, 8)),
        hidden=int(rng.integers(4, 12)),
        gated=str(rng.choice(["", "two", "one"])),
        norm=str(rng.choice(["rms", "layer", ""])),
        layers=int(rng.integers(2, 4)) if scanned else int(rng.integers(1, 3)),
        scanned=scanned,
    )
