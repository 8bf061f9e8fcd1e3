"""Exported networks compute what ours compute: ONNX in onnxruntime, StableHLO read back, any batch size."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx import compaction, export
from experiments.common import models
from tests.thinning import some

onnx = pytest.importorskip("onnx", reason="needs the extra 'export'")
ort = pytest.importorskip("onnxruntime", reason="needs the extra 'export'")

CASES: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "lenet_300_100": ("lenet_300_100", {}, (28, 28, 1)),
    "lenet5": ("lenet5", {}, (28, 28, 1)),
    "lenet5_caffe": ("lenet5_caffe", {}, (28, 28, 1)),
    "digits_cnn": ("digits_cnn", {}, (8, 8, 1)),
    "vgg16": ("vgg16", {"width": 0.1}, (32, 32, 3)),
    "vgg16, ImageNet head": ("vgg16", {"width": 0.02, "head": "imagenet", "batch_norm": False}, (64, 64, 3)),
    "resnet20": ("resnet20", {"width": 0.5}, (32, 32, 3)),
    "resnet18": ("resnet18", {"width": 0.1}, (64, 64, 3)),
    "resnet50, odd sizes": ("resnet50", {"width": 0.1}, (45, 39, 3)),
    "mobilenet_v2": ("mobilenet_v2", {"width": 0.25}, (32, 32, 3)),
}


def _variables(module: nn.Module, shape: tuple[int, ...]) -> Any:
    """Random weights and statistics, of a size that activations neither vanish nor explode; nothing is compiled."""
    r = np.random.default_rng(0)

    def draw(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            x = r.normal(size=like.shape) * np.sqrt(1.5 / np.prod(like.shape[:-1]))
        elif name in ("scale", "var"):
            x = r.uniform(0.8, 1.2, like.shape)
        else:
            x = 0.1 * r.normal(size=like.shape)
        return jnp.asarray(x, jnp.float32)

    like = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, *shape)))
    return jax.tree_util.tree_map_with_path(draw, like)


def _onnx(data: bytes) -> Callable[[jax.Array], np.ndarray]:
    session = ort.InferenceSession(data, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": np.asarray(x)})[0]


@pytest.mark.parametrize("case", some(("lenet5", "digits_cnn", "vgg16, ImageNet head", "resnet20", "resnet18"), CASES))
def test_onnxruntime_computes_what_we_compute(case: str) -> None:
    name, options, shape = CASES[case]
    module = models.build(name, classes=10, **options)
    variables = _variables(module, shape)
    run = _onnx(export.onnx(module, variables, shape))
    x = jax.random.normal(jax.random.key(2), (5, *shape))
    ours = np.asarray(jax.jit(module.apply)(variables, x))
    assert 0.01 < np.abs(ours).max() < 100  # neither vanished nor exploded: the comparison means something
    for batch in (5, 1):
        theirs = run(x[:batch])
        assert theirs.shape == (batch, 10)
        np.testing.assert_allclose(theirs, ours[:batch], rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", ["lenet5", "resnet20"])
def test_stablehlo_read_back_computes_what_we_compute(case: str) -> None:
    pytest.importorskip("flatbuffers", reason="needs the extra 'export'")
    name, options, shape = CASES[case]
    module = models.build(name, classes=10, **options)
    variables = _variables(module, shape)
    data = export.stablehlo(module, variables, shape)
    exported = jax.export.deserialize(bytearray(data))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "compressx_conv" not in exported.mlir_module()  # no call to our kernel, which other machines lack
    x = jax.random.normal(jax.random.key(2), (3, *shape))
    np.testing.assert_allclose(exported.call(x), module.apply(variables, x), rtol=0, atol=1e-4)


def test_a_masked_network_keeps_its_zeros_and_its_result() -> None:
    module = models.build("lenet5_caffe", classes=10)
    variables = _variables(module, (28, 28, 1))
    rules = [("params/c2/kernel", cx.filters_and_columns(0.5, 0.3)), ("params/f./kernel", cx.unstructured(0.05))]
    hard = cx.harden(variables, rules, fresh=True).params
    data = export.onnx(module, hard, (28, 28, 1))
    arrays = [onnx.numpy_helper.to_array(t) for t in onnx.load_from_string(data).graph.initializer]
    stored = sorted(np.count_nonzero(a) for a in arrays if a.size > 1000)
    kernels = [x for x in jax.tree.leaves(hard) if x.size > 1000]
    assert stored == sorted(int(jnp.count_nonzero(k)) for k in kernels)
    x = jax.random.normal(jax.random.key(2), (2, 28, 28, 1))
    np.testing.assert_allclose(_onnx(data)(x), module.apply(hard, x), rtol=0, atol=1e-4)


def test_convolutions_are_convolutions() -> None:
    module = models.build("mobilenet_v2", classes=10, width=0.25)
    variables = _variables(module, (32, 32, 3))
    graph = onnx.load_from_string(export.onnx(module, variables, (32, 32, 3))).graph
    convolutions = [n for n in graph.node if n.op_type == "Conv"]
    kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim == 4]
    assert len(convolutions) == len(kernels)
    groups = [next(a.i for a in n.attribute if a.name == "group") for n in convolutions]
    assert sum(g > 1 for g in groups) == 17


class _Net(nn.Module):
    """Whatever `body` does to `[n, 6]`, with a constant vector at hand."""

    body: Callable[[jax.Array, jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return self.body(x, self.param("w", lambda key: jax.random.normal(key, (6,))))


BODIES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "softmax": lambda x, w: jax.nn.softmax(x * w[None]),
    "sigmoid": lambda x, w: jax.nn.sigmoid(x - w[None]) ** 3,
    "leaky": lambda x, w: jax.nn.leaky_relu(x / w[None]),
    "where": lambda x, w: jnp.where(x > w[None], jnp.tanh(x), jnp.exp(-x)),
    "norm": lambda x, w: x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=1, keepdims=True) + 1e-3),
    "take": lambda x, w: x[:, jnp.array([5, 0, 3])],
    "concatenate": lambda x, w: jnp.concatenate([x[:, 1:4], x[:, ::2], jnp.pad(x, ((0, 0), (2, 1)))], axis=1),
    "matrix, other way": lambda x, w: x @ jnp.outer(w, w).T,
    "three axes": lambda x, w: jnp.swapaxes(x.reshape(-1, 2, 3), 1, 2).max(axis=2),
}


@pytest.mark.parametrize("case", BODIES)
def test_operations(case: str) -> None:
    module = _Net(BODIES[case])
    x = jax.random.normal(jax.random.key(2), (4, 6))
    variables = module.init(jax.random.key(0), x)
    np.testing.assert_allclose(
        _onnx(export.onnx(module, variables, (6,)))(x), module.apply(variables, x), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (lambda x, w: jnp.abs(jnp.fft.fft(x)), "the type complex64 has no counterpart here; export StableHLO"),
        (lambda x, w: jax.lax.erf_inv(x), "'erf_inv' .to float32.batch,6.. has no counterpart"),
        (
            lambda x, w: nn.Dropout(0.5, deterministic=False).apply({}, x, rngs={"dropout": jax.random.key(0)}),
            "random numbers are drawn: call the network without dropout",
        ),
        (lambda x, w: x if x.shape[0] > 2 else -x, "depends on the number of its inputs"),
    ],
)
def test_what_has_no_counterpart_is_refused(body: Callable[..., jax.Array], message: str) -> None:
    module = _Net(body)
    variables = module.init(jax.random.key(0), jnp.ones((4, 6)))
    with pytest.raises(ValueError, match=message):
        export.onnx(module, variables, (6,))


def _several(module: Any, variables: Any, shape: Any, x: Any) -> dict[str, np.ndarray]:
    """The outputs of the ONNX model by name, for inputs whose leaves are given in the order of the tree."""
    session = ort.InferenceSession(export.onnx(module, variables, shape), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    fed = dict(zip(names, map(np.asarray, jax.tree.leaves(x)), strict=True))
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, fed), strict=True)) | {
        f"input {name}": value for name, value in fed.items()
    }


class _Decoder(nn.Module):
    """A small decoder of tokens with tied embeddings."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        embed = nn.Embed(16, 8, dtype=self.dtype)
        x = embed(tokens) + nn.Embed(5, 8, dtype=self.dtype)(jnp.arange(5))[None]
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2, dtype=self.dtype)(nn.RMSNorm(dtype=self.dtype)(x), mask=mask)
        return embed.attend(x + nn.Dense(8, dtype=self.dtype)(nn.gelu(nn.Dense(16, dtype=self.dtype)(x))))


@pytest.mark.parametrize(
    ("dtype", "atol"), some([("float32", 1e-4)], [("float32", 1e-4), ("bfloat16", 0.1), ("float16", 0.02)])
)
def test_a_decoder_of_tokens(dtype: str, atol: float) -> None:
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 16, (3, 5)), jnp.int32)
    module = _Decoder(jnp.dtype(dtype))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # flax relies on both
        variables = module.init(jax.random.key(0), tokens)
        data = export.onnx(module, variables, jax.ShapeDtypeStruct((1, 5), jnp.int32))
        assert data == export.onnx(module, variables, (5,)) == export.onnx(module, variables, (5,), dtype=jnp.int32)
        ours = module.apply(variables, tokens).astype(jnp.float32)
    for batch in (3, 1):
        np.testing.assert_allclose(_onnx(data)(tokens[:batch]).astype(np.float32), ours[:batch], atol=atol)
    tables = [t for t in onnx.load_from_string(data).graph.initializer if list(t.dims) == [16, 8]]
    assert len(tables) == 2  # the tied table once, and one dense layer


def test_several_inputs_and_outputs_are_called_by_their_paths() -> None:
    def f(v: Any, x: Any) -> Any:
        return {"a": x["a"] * 2.0, "sum": [x["a"] + x["b"][0], x["b"][1].astype(jnp.float32)]}

    x = {"a": jnp.ones((3, 4)), "b": (jnp.full((3, 4), 2.0), jnp.ones((3, 2), jnp.uint8))}
    shape = {"a": (4,), "b": ((4,), jax.ShapeDtypeStruct((1, 2), jnp.uint8))}
    made = _several(f, {}, shape, x)
    assert set(made) == {"input a", "input b/0", "input b/1", "a_out", "sum/0", "sum/1"}
    np.testing.assert_array_equal(made["a_out"], 2 * np.ones((3, 4)))
    np.testing.assert_array_equal(made["sum/0"], np.full((3, 4), 3))
    pair = _several(lambda v, x: (x[0] @ x[1], x[0]), {}, ((4, 3), (3, 2)), (jnp.ones((2, 4, 3)), jnp.ones((2, 3, 2))))
    assert set(pair) == {"input x0", "input x1", "y0", "y1"}
    np.testing.assert_array_equal(pair["y0"], np.full((2, 4, 2), 3))


def test_small_integers_wrap_and_truth_values_compute() -> None:
    def f(v: Any, x: jax.Array) -> Any:
        odd = x % 2 == 1
        return (x + x) * 3 - x, jnp.where(odd, odd[:, ::-1], ~odd), odd.any(1), (odd ^ odd[:, ::-1]) & (x > 4)

    x = jnp.asarray(np.random.default_rng(0).integers(0, 255, (3, 4)), jnp.uint8)
    made = _several(f, {}, jax.ShapeDtypeStruct((1, 4), jnp.uint8), x)
    for i, ours in enumerate(f({}, x)):
        assert made[f"y{i}"].dtype == ours.dtype
        np.testing.assert_array_equal(made[f"y{i}"], ours)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"a": "32"}, r"shape \['a'\] is '32': give a tuple"),
        (jax.ShapeDtypeStruct((), jnp.float32), "its first axis is the batch, and it has none"),
        ({}, "describes no input"),
    ],
)
def test_a_shape_that_describes_no_input_is_refused(shape: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.onnx(lambda v, x: x, {}, shape)


@pytest.fixture(scope="module")
def narrow() -> tuple[nn.Module, Any, compaction.Compact]:
    """A ResNet-20 with half of its channels pruned, and its compact network."""
    module, x = models.build("resnet20", classes=10, width=0.5), jnp.zeros((1, 32, 32, 3))
    variables = _variables(module, (32, 32, 3))
    groups = compaction.groups(compaction.channels(module, variables, x))
    hard = cx.harden(variables, compaction.coupled_rules(groups, 0.5, vectors=True), fresh=True).params
    return module, hard, compaction.compact(module, hard, x)


def test_a_compacted_network_is_exported_with_smaller_layers(narrow: Any) -> None:
    module, hard, small = narrow
    data = export.onnx(small.apply, small.variables, (32, 32, 3))
    x = jax.random.normal(jax.random.key(2), (4, 32, 32, 3))
    for batch in (4, 1):
        np.testing.assert_allclose(_onnx(data)(x[:batch]), module.apply(hard, x[:batch]), rtol=0, atol=1e-4)
    whole = export.onnx(module, hard, (32, 32, 3))
    weights = [sum(int(np.prod(t.dims)) for t in onnx.load_from_string(d).graph.initializer) for d in (data, whole)]
    assert weights[0] < weights[1] / 2.5


def test_a_compacted_network_is_exported_to_stablehlo(narrow: Any) -> None:
    pytest.importorskip("flatbuffers", reason="needs the extra 'export'")
    module, hard, small = narrow
    exported = jax.export.deserialize(bytearray(export.stablehlo(small.apply, small.variables, (32, 32, 3))))
    assert "compressx_conv" not in exported.mlir_module()
    x = jax.random.normal(jax.random.key(2), (3, 32, 32, 3))
    np.testing.assert_allclose(exported.call(x), module.apply(hard, x), rtol=0, atol=1e-4)


def test_a_compacted_network_with_upsampling_and_three_outputs() -> None:
    """Nearest upsampling broadcasts beside the free batch axis; a detector has three heads."""
    model = models.build("yolov3", classes=1, width=1 / 16, repeats=(1, 0, 0, 0, 0))
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(lambda k: model.init(k, x))(jax.random.key(1))
    small = compaction.compact(model, variables, x)
    data = export.stablehlo(small.apply, small.variables, (32, 32, 3))
    back = jax.export.deserialize(bytearray(data)).call(x)
    ours = jax.tree.leaves(small.apply(small.variables, x))
    for a, b in zip(jax.tree.leaves(back), ours, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    made = ort.InferenceSession(export.onnx(small.apply, small.variables, (32, 32, 3)))
    for a, b in zip(made.run(None, {"x": np.asarray(x)}), ours, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
