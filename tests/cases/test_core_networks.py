"""Networks of today: transformers compacted, exported, and modules that are not called with `train=False`.

Each case is a small input that was wrong, after a need that people have stated in public. It stands for its kind.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
from flax import nnx

from tests.cases import api
from tests.cases.support import normal, raised_by

# Coupled pruning and compaction of transformers.
#
# Right: `coupled_rules(groups, 0.5)` for a network with attention: a leaf that makes channels on two axes (head,
# head_dim) must get one rule for both, or the groups that clash must be named with what to do
# (`density={number: share}` works and no text says so). Heads of the `Dense` + reshape form (HF Flax, timm ports),
# fused qkv and GQA go when they are dead. Layers under `nn.scan` are compacted where all layers lose the same number;
# `keep=('scan',)` must not end in "nothing removed" without a word. Where nothing can be removed, say which operation
# stood in the way (`Channels.reasons` has it).


def test_coupled_rules_attention() -> None:
    m, x = nn.MultiHeadDotProductAttention(num_heads=4), normal(1, 5, 16)
    v = m.init(jax.random.key(0), x)
    api.harden(v, api.coupled_rules(lambda v, x: m.apply(v, x), v, x, 0.5))


def test_heads_of_dense_qkv() -> None:
    class Attention(nn.Module):  # HF-style: Dense, then reshape
        @nn.compact
        def __call__(self, x):
            b, t, _ = x.shape
            q, k, v = [nn.Dense(16, name=i)(x).reshape(b, t, 4, 4) for i in "qkv"]
            a = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
            return nn.Dense(16, name="o")(jnp.einsum("bhqk,bkhd->bqhd", a, v).reshape(b, t, 16))

    m, x = Attention(), normal(1, 5, 16)
    v = m.init(jax.random.key(0), x)
    p = v["params"]
    for i in "qkv":
        p[i] = {"kernel": p[i]["kernel"].at[:, :8].set(0), "bias": p[i]["bias"].at[:8].set(0)}
    p["o"]["kernel"] = p["o"]["kernel"].at[:8].set(0)  # heads 0 and 1 are gone
    small = api.compact(lambda v, x: m.apply(v, x), v, x)
    assert small.variables["params"]["o"]["kernel"].shape == (8, 16), "nothing removed"
    np.testing.assert_allclose(small.apply(small.variables, x), m.apply(v, x), atol=1e-5)


def test_compact_scan() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, c, _):
            return c + nn.Dense(8, name="down")(nn.relu(nn.Dense(16, name="up")(c))), None

    class Stack(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return layers(name="layers")(x, None)[0]

    m, x = Stack(), normal(1, 8)
    v = m.init(jax.random.key(0), x)
    up = v["params"]["layers"]["up"]
    up["kernel"] = up["kernel"].at[:, :, 8:].set(0)
    up["bias"] = up["bias"].at[:, 8:].set(0)
    small = api.compact(lambda v, x: m.apply(v, x), v, x)
    assert small.variables["params"]["layers"]["up"]["kernel"].shape == (2, 8, 8)
    np.testing.assert_allclose(small.apply(small.variables, x), m.apply(v, x), atol=1e-5)


# ONNX and StableHLO export.
#
# Right: the graph, checked against onnxruntime at batch 1 and 3; or an error that names the operation *and* is a
# ValueError (in 0.1 RMSNorm and GRU end in foreign errors, bfloat16 in the checker's). `dot_general` in general is
# Transpose + Reshape + MatMul, `reduce_window_sum` is AveragePool times a count, `split` is Split, `erfc` is 1 - Erf,
# `broadcast` over the batch is Expand with a Shape. `stablehlo` and `onnx` take a dtype (integer tokens) and several
# inputs.


def _onnxruntime_agrees(f: Any, shape: tuple[int, ...], v: Any = None) -> None:
    v = {} if v is None else v
    x = normal(3, *shape)
    session = onnxruntime.InferenceSession(api.onnx(f, v, shape))
    y = f.apply(v, x) if isinstance(f, nn.Module) else f(v, x)
    for batch in (3, 1):
        assert np.allclose(session.run(None, {"x": np.asarray(x[:batch])})[0], y[:batch], atol=1e-4)


def _layer(m: nn.Module, shape: tuple[int, ...]) -> None:
    _onnxruntime_agrees(m, shape, m.init(jax.random.key(0), normal(1, *shape)))


def test_onnx_attention() -> None:
    _layer(nn.MultiHeadDotProductAttention(num_heads=2), (5, 8))


def test_onnx_avg_pool() -> None:
    _onnxruntime_agrees(lambda v, x: nn.avg_pool(x, (2, 2), (2, 2)), (4, 4, 3))


def test_onnx_first_token() -> None:
    _onnxruntime_agrees(lambda v, x: x[:, 0], (5, 8))


def test_onnx_class_token() -> None:
    def f(v: Any, x: jax.Array) -> jax.Array:
        return jnp.concatenate([jnp.broadcast_to(jnp.ones((1, 1, 8)), (x.shape[0], 1, 8)), x], 1)

    _onnxruntime_agrees(f, (5, 8))


def test_onnx_gelu_exact() -> None:
    _onnxruntime_agrees(lambda v, x: nn.gelu(x, approximate=False), (5, 8))


def test_onnx_elu() -> None:
    _onnxruntime_agrees(lambda v, x: nn.elu(x), (8,))


def test_onnx_rmsnorm() -> None:
    _layer(nn.RMSNorm(), (5, 8))


def test_onnx_gru() -> None:
    m = nn.RNN(nn.GRUCell(8))
    v = m.init(jax.random.key(0), normal(1, 5, 4))
    error = raised_by(lambda: _onnxruntime_agrees(m, (5, 4), v), ValueError)
    assert error is None or "scan" in str(error)


def test_onnx_bfloat16() -> None:
    m = nn.Dense(4, dtype=jnp.bfloat16)
    api.onnx(m, m.init(jax.random.key(0), normal(1, 8)), (8,))


def test_onnx_transpose_conv() -> None:
    _layer(nn.ConvTranspose(8, (3, 3), strides=(2, 2)), (5, 5, 4))


def test_onnx_stack_flip() -> None:
    _onnxruntime_agrees(lambda v, x: jnp.stack([x, x[:, ::-1]], 1), (4, 3))


def test_onnx_dense_general_in() -> None:
    _layer(nn.DenseGeneral(8, axis=(-2, -1)), (5, 2, 4))


def test_hlo_tokens() -> None:
    m = nn.Embed(16, 8)
    api.stablehlo(m, m.init(jax.random.key(0), jnp.ones((1, 5), jnp.int32)), (5,))


def test_hlo_two_inputs() -> None:
    assert api.stablehlo(lambda v, x: x["a"] + x["b"], {}, {"a": (4,), "b": (4,)})


# A module is called with `train=False`, or without, as it happens.
#
# Right: the keyword is given only where the module's `__call__` has it (`inspect.signature`), the same in all three
# functions, or the error says: wrap it, `lambda v, x: m.apply(v, x, deterministic=True)`. An `nnx.Module` is split and
# merged, or the error says how (the wrapped form works well).


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic=True):
        return nn.Dense(4)(nn.Dropout(0.5, deterministic=deterministic)(x))


def test_module_without_train_compact() -> None:
    m, x = Deterministic(), normal(1, 8)
    api.compact(m, m.init(jax.random.key(0), x), x)


def test_module_without_train_compile() -> None:
    m, x = Deterministic(), normal(1, 8)
    api.compile(m, m.init(jax.random.key(0), x))(x)


def test_nnx_module_compile() -> None:
    m = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    api.compile(m, nnx.state(m))(normal(2, 4))
