"""Whole networks in compressed form against flax, and what is fused."""

import concurrent.futures
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx
from compressx import kernels
from compressx.kernels import graph, native
from compressx.trace import trace
from compressx.tree import paths
from experiments.common import models
from tests.thinning import some


def sparse_variables(model, x, seed=0):
    """Variables with half of the 3x3 kernels gone and batch statistics that do something."""
    rng = np.random.default_rng(seed)

    def change(w):
        w = np.asarray(w)
        if w.ndim == 4 and w.shape[2] > 3:
            return w * (rng.random((1, 1, *w.shape[2:])) < 0.5).astype(np.float32)
        return w + 0.5 * rng.random(w.shape, dtype=np.float32) if w.ndim == 1 else w

    return jax.tree.map(change, jax.device_get(jax.jit(model.init)(jax.random.key(seed), x)))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(np.abs(b).max())))


CASES = {
    "lenet5": ((2, 28, 28, 1), {}),
    "resnet20": ((2, 16, 16, 3), {"width": 0.25}),
    "vgg16": ((1, 32, 32, 3), {"width": 0.0625}),
    "resnet18": ((1, 32, 32, 3), {"width": 0.0625}),
    "darknet53": ((2, 32, 32, 3), {"width": 0.0625, "repeats": (1, 1, 0, 0, 0)}),
}
SLOW = {
    "resnet50": ((1, 64, 64, 3), {"width": 0.125}),
    "mobilenet_v2": ((2, 32, 32, 3), {"width": 0.35}),
}


def agree(name, shape, options):
    model = models.build(name, 10, **options)
    x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    variables = sparse_variables(model, x)
    expected = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    f = kernels.compile(model, variables)
    close(f(x), expected)
    leaves = dict(zip(paths(variables), jax.tree.leaves(variables), strict=True))
    lines = {line.path: line for line in f.layers(x)}
    assert sorted(lines) == sorted(p for p, w in leaves.items() if p.endswith("kernel"))
    for path, line in lines.items():
        ours = np.ndim(leaves[path]) == 4
        assert (line.kind, line.on) == (("convolution", f.path) if ours else ("product", "xla"))


@pytest.mark.parametrize("name", some(("lenet5", "resnet20", "darknet53"), CASES))
def test_networks_equal_flax(name):
    agree(name, *CASES[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW)
def test_larger_networks_equal_flax(name):
    agree(name, *SLOW[name])


def test_batch_normalisation_residual_and_rectifier_are_fused():
    model = models.build("resnet20", 10, width=0.25)
    x = np.zeros((1, 8, 8, 3), np.float32)
    variables = sparse_variables(model, x)
    steps, _ = graph.steps(trace(model, variables, x), variables)
    convs = [s for s in steps if isinstance(s, graph.Conv)]
    assert len(convs) == 19 and sum(s.residual >= 0 for s in convs) == 9
    assert all(s.activation == "relu" for s in convs)
    left = {s.op.primitive.name for s in steps if isinstance(s, graph.Other)}
    assert not left & {"conv_general_dilated", "rsqrt", "max"}


def test_darknets_rectifier_and_the_shortcut_after_it_are_fused():
    model = models.build("yolov3", 1, width=0.0625, repeats=(1, 0, 2, 0, 0))
    x = np.random.default_rng(1).standard_normal((1, 32, 32, 1), dtype=np.float32)
    variables = sparse_variables(model, x)
    steps, _ = graph.steps(trace(model, variables, x), variables)
    convs = [s for s in steps if isinstance(s, graph.Conv)]
    assert [s.activation for s in convs].count("leaky") == len(convs) - 3 and len(convs) == 35
    assert [(s.residual >= 0, s.residual_after) for s in convs].count((True, True)) == 3
    left = {s.op.primitive.name for s in steps if isinstance(s, graph.Other)}
    assert left == {"broadcast_in_dim", "reshape", "concatenate"}
    expected = jax.jit(model.apply)(variables, x)
    for path in (None, "xla"):
        jax.tree.map(close, kernels.compile(model, variables, path=path)(x), expected)


class Near(nn.Module):
    """What looks like Darknet's leaky ReLU and is not: other slopes, other readers, other operands."""

    case: str

    @nn.compact
    def __call__(self, x, train=False):
        y = nn.Conv(4, (3, 3), name="a")(x)
        if self.case == "another slope":
            return jnp.maximum(y, 0.2 * y)
        if self.case == "the minimum":
            return jnp.minimum(y, 0.1 * y)
        if self.case == "three readers":
            return jnp.maximum(y, 0.1 * y) + y
        if self.case == "the product read twice":
            z = 0.1 * y
            return jnp.maximum(y, z) * z
        if self.case == "another image":
            return jnp.maximum(x[..., :1], 0.1 * y)
        if self.case == "an output":
            return jnp.maximum(y, 0.1 * y), y
        return nn.max_pool(jnp.maximum(y, 0.1 * y), (3, 3), (2, 2), [(1, 1), (1, 1)])  # of negative values too


@pytest.mark.parametrize(
    "case",
    ["another slope", "the minimum", "three readers", "the product read twice", "another image", "an output", "pooled"],
)
def test_only_darknets_rectifier_is_taken_for_it(case):
    model, x = Near(case), np.random.default_rng(4).standard_normal((1, 7, 6, 2), dtype=np.float32) - 2
    variables = model.init(jax.random.key(0), x)
    steps, _ = graph.steps(trace(model, variables, x), variables)
    (conv,) = [s for s in steps if isinstance(s, graph.Conv)]
    assert (conv.activation == "leaky") == (case == "pooled")
    for path in (None, "xla"):
        jax.tree.map(close, kernels.compile(model, variables, path=path)(x), model.apply(variables, x))


def test_a_network_of_the_user():
    class Net(nn.Module):
        """Poolings with padding, two readers of one value, an operation without a kernel, two outputs."""

        @nn.compact
        def __call__(self, x, train=False):
            a = nn.Conv(6, (5, 5), name="a")(x)
            p = nn.max_pool(nn.relu(a), (3, 3), (2, 2), [(1, 1), (1, 1)])
            q = nn.max_pool(a, (3, 3), (2, 2), [(1, 1), (1, 1)])  # of negative values too
            b = nn.Conv(6, (3, 3), kernel_dilation=2, name="b")(p)
            c = nn.Conv(6, (3, 3), name="c")(p) + q
            d = nn.relu6(nn.Conv(6, (1, 1), name="d")(jnp.tanh(c)) + c)
            return {"d": d, "b": b.mean(axis=(1, 2))}

    model, x = Net(), np.random.default_rng(2).standard_normal((2, 11, 9, 2), dtype=np.float32)
    variables = sparse_variables(model, x)
    expected = jax.jit(lambda v, x: model.apply(v, x))(variables, x)
    for path in (None, "xla"):
        jax.tree.map(close, kernels.compile(model, variables, path=path)(x), dict(expected))


def test_a_saved_model_runs(tmp_path):
    model = models.build("digits_cnn", 10)
    x = np.random.default_rng(3).standard_normal((2, 8, 8, 1), dtype=np.float32)
    variables = sparse_variables(model, x)
    about = {"name": "digits_cnn", "options": {"classes": 10}}
    compressx.save_model(tmp_path / "m.safetensors", variables, model=about, layout=[(".*/c2/kernel", "fkw")])
    f = compressx.compile(model, compressx.load_model(tmp_path / "m.safetensors"))
    close(f(x), jax.jit(lambda v, x: model.apply(v, x))(variables, x))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert len({np.asarray(y).tobytes() for y in pool.map(lambda _: f(x), range(16))}) == 1


@pytest.mark.skipif(not native.available(), reason="no compiler, so no native kernels")
def test_tuned_plans_compute_the_same_and_are_kept(tmp_path, monkeypatch):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Conv(8, (3, 3), strides=2, name="a")(x))
            return nn.relu(nn.Conv(8, (1, 1), strides=2, name="c")(nn.Conv(8, (3, 3), name="b")(x)))

    monkeypatch.setenv("COMPRESSX_CACHE", str(tmp_path))
    model, x = Net(), np.random.default_rng(5).standard_normal((1, 13, 10, 4), dtype=np.float32)
    variables = sparse_variables(model, x)
    f = kernels.compile(model, variables, tune=True, threads=1)
    close(f(x), jax.jit(lambda v, x: model.apply(v, x))(variables, x))
    plans = [r.plan for r in f.layers(x)]
    held = json.loads((tmp_path / "tuning" / "plans.json").read_text())
    assert len(plans) == 3 and all(list(plan) in held.values() for plan in plans)


def test_bad_arguments_are_named(tmp_path):
    compressx.save_model(tmp_path / "m.safetensors", {"w": np.ones((2, 2), np.float32)})
    with pytest.raises(ValueError, match=r"compile\(model, saved\)"):
        kernels.compile(compressx.load_model(tmp_path / "m.safetensors"), None)
    with pytest.raises(ValueError, match="no path"):
        kernels.compile(lambda v, x: x, {}, path="gpu")
