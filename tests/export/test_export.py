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


@pytest.mark.parametrize("case", CASES)
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
        (lambda x, w: jnp.sort(x), "the operation 'sort' has no counterpart"),
        (lambda x, w: jnp.cumsum(x, axis=1), "the operation 'cumsum' has no counterpart"),
        (lambda x, w: jnp.concatenate([x, jnp.broadcast_to(w, x.shape)], 1), "broadcast over the batch"),
        (lambda x, w: jnp.broadcast_to(w, x.shape), "the output reads a value broadcast"),
        (lambda x, w: jnp.einsum("bij,bjk->bik", x.reshape(-1, 2, 3), x.reshape(-1, 3, 2)), "the product .* has no"),
    ],
)
def test_what_has_no_counterpart_is_refused(body: Callable[..., jax.Array], message: str) -> None:
    module = _Net(body)
    variables = module.init(jax.random.key(0), jnp.ones((4, 6)))
    with pytest.raises(ValueError, match=message):
        export.onnx(module, variables, (6,))


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


def test_a_compacted_network_with_upsampling_goes_to_stablehlo_and_several_outputs_not_to_onnx() -> None:
    """Nearest upsampling broadcasts beside the free batch axis; a detector has three heads."""
    model = models.build("yolov3", classes=1, width=1 / 16, repeats=(1, 0, 0, 0, 0))
    x = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = jax.jit(lambda k: model.init(k, x))(jax.random.key(1))
    small = compaction.compact(model, variables, x)
    data = export.stablehlo(small.apply, small.variables, (32, 32, 3))
    back = jax.export.deserialize(bytearray(data)).call(x)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(small.apply(small.variables, x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    with pytest.raises(ValueError, match="3 outputs"):
        export.onnx(model, variables, (32, 32, 3))
