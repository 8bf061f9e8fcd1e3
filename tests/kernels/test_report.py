"""What `layers` says of a network: a line for every operation with parameters, where it runs and why."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx
from compressx import kernels
from compressx.kernels import native
from compressx.tree import paths
from experiments.common import models
from tests.kernels.networks import network
from tests.thinning import some

FEW = settings(max_examples=max(5, settings.default.max_examples // 5))


def leaves_of(lines):
    return [path for line in lines for path in (line.path, *line.others) if path]


def agree(seed, path):
    """The compiled network computes the same, of an empty batch too, and has the lines that it must have."""
    net = network(np.random.default_rng(seed))
    expected = jax.jit(net.apply)(net.variables, net.x)
    f = kernels.compile(net.apply, net.variables, path=path)
    tolerance = 2e-2 if "bf16" in str(jax.make_jaxpr(net.apply)(net.variables, net.x)) else 1e-5
    for a, b in zip(f(net.x), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1.0, float(jnp.abs(b).max(initial=0))))
    for a, b in zip(f(net.x[:0]), expected, strict=True):
        assert (a.shape, a.dtype) == ((0, *b.shape[1:]), b.dtype)
    for x in (net.x, net.x[:0]):
        lines = f.layers(x)
        weighted = [line for line in lines if line.kind in ("convolution", "product")]
        assert sorted(line.path or "" for line in weighted) == sorted(net.kernels)
        assert set(leaves_of(lines)) == set(paths(net.variables))
        assert all(line.why and line.on in ("xla", "constant", f.path) for line in lines)
        assert all(line.on != "xla" or line.why.startswith("XLA runs it: ") for line in lines)
    ours = sorted(line.path for line in f.layers(net.x) if line.on.startswith("native"))
    assert ours == (sorted(net.native) if f.path.startswith("native") else [])


@FEW
@given(st.integers(0, 2**32 - 1))
def test_any_network_is_computed_and_every_weight_has_a_line(seed):
    agree(seed, None)


@FEW
@given(st.integers(0, 2**32 - 1), st.sampled_from(["xla", "pallas"]))
def test_so_it_is_on_other_paths(seed, path):
    agree(seed, path)


class Layer(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, x, train=False):
        return self.inner(x)


ONE = {
    "dilated": (nn.Conv(8, (3, 3), kernel_dilation=2), (2, 8, 8, 4), "its kernel is dilated by 2x2"),
    "transposed": (
        nn.ConvTranspose(8, (3, 3), strides=(2, 1)),
        (2, 8, 8, 4),
        "transposed: its image is dilated by 2x1",
    ),
    "bfloat16": (nn.Conv(8, (3, 3), dtype=jnp.bfloat16), (2, 8, 8, 4), "computes in bfloat16"),
    "one axis": (nn.Conv(8, (3,)), (2, 8, 4), "slides along one axis"),
    "causal": (nn.Conv(8, (3,), padding="CAUSAL"), (2, 8, 4), "slides along one axis"),
    "three axes": (nn.Conv(8, (3, 3, 3)), (2, 4, 4, 4, 4), "slides along 3 axes"),
    "negative padding": (nn.Conv(8, (3, 3), padding=((-1, 1), (0, 0))), (2, 8, 8, 4), "cuts the image"),
    "too small": (nn.Conv(8, (3, 3), padding="VALID"), (2, 2, 8, 4), "nothing to compute"),
    "dense": (nn.Dense(8), (2, 4), "only convolutions have kernels"),
    "normalisation": (nn.LayerNorm(), (2, 4), "no convolution takes it in"),
    "recurrent": (nn.RNN(nn.SimpleCell(3)), (2, 5, 4), "inside of scan"),
}
NATIVE = {
    "plain": nn.Conv(8, (3, 3)),
    "uneven": nn.Conv(8, (3, 3), padding=((1, 2), (0, 3))),
    "grouped": nn.Conv(8, (3, 3), feature_group_count=2),
    "depthwise": nn.Conv(4, (3, 3), feature_group_count=4),
    "circular": nn.Conv(8, (3, 3), padding="CIRCULAR"),
    "strided": nn.Conv(8, (3, 3), strides=2),
}


@pytest.mark.parametrize("case", ONE)
def test_what_stays_with_xla_says_why(case):
    inner, shape, why = ONE[case]
    model, x = Layer(inner), jnp.ones(shape)
    variables = jax.jit(model.init)(jax.random.key(0), x)
    f = kernels.compile(model, variables)
    np.testing.assert_allclose(
        np.asarray(f(x), np.float32), np.asarray(model.apply(variables, x), np.float32), atol=1e-5
    )
    lines = f.layers(x)
    assert len(lines) == 1 + (case == "recurrent") and set(leaves_of(lines)) == set(paths(variables))
    assert all(line.on == "xla" and why in line.why and not line.packed for line in lines)


@pytest.mark.skipif(not native.available(), reason="no compiler, so no native kernels")
@pytest.mark.parametrize("case", NATIVE)
def test_what_the_kernels_run_has_one_line_with_its_bias(case):
    model, x = Layer(NATIVE[case]), jnp.ones((2, 8, 8, 4))
    variables = model.init(jax.random.key(0), x)
    (line,) = kernels.compile(model, variables).layers(x)
    assert line.path == "params/inner/kernel" and line.others == ("params/inner/bias",) and line.plan is not None
    assert line.on == native.active_path() and line.why == "the native kernels run it from its weight"
    (line,) = kernels.compile(model, variables, path="xla").layers(x)
    assert line.on == "xla" and line.why == "XLA runs it: path='xla' was asked for"


def test_packed_weights_say_whether_they_are_run_as_they_are_stored(tmp_path):
    model = models.build("digits_cnn", 10)
    x = np.random.default_rng(3).standard_normal((2, 8, 8, 1), dtype=np.float32)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda w: np.asarray(w) * (rng.random(w.shape) < 0.5).astype(np.float32),
        jax.jit(model.init)(jax.random.key(0), x),
    )
    about = {"name": "digits_cnn", "options": {"classes": 10}}
    layout = [(".*/c1/kernel", "csr"), (".*/c2/kernel", "fkw"), (".*/f.*/kernel", "csr")]
    compressx.save_model(tmp_path / "m.safetensors", variables, model=about, layout=layout)
    f = compressx.compile(model, compressx.load_model(tmp_path / "m.safetensors"))
    lines = {line.path: line for line in f.layers(x)}
    held = {path: line.why.rpartition("its packed form ")[2] for path, line in lines.items()}
    ours = f.path.startswith("native")
    assert {path for path, line in lines.items() if line.packed} == ({"params/c2/kernel"} if ours else set())
    assert held["params/c1/kernel"] == "(csr) is expanded"
    assert held["params/c2/kernel"] == (
        "the native kernels run it from its packed arrays" if ours else "(fkw) is expanded"
    )
    assert all(held[path] == "(csr) is expanded" for path in lines if "/f" in path)


class Whole(nn.Module):
    """A convolution whose normalisation it takes in, one behind which it cannot, and the rest of a network."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(4, (3, 3), use_bias=False, name="a")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="an")(x))
        x = nn.BatchNorm(use_running_average=True, name="alone")(x)
        x = nn.GroupNorm(2, name="groups")(nn.Conv(4, (1, 1), kernel_dilation=2, name="b")(x))
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x.reshape(x.shape[0], -1, 4)) + nn.Embed(
            3, 4, name="table"
        )(jnp.argmax(x[..., :3].reshape(x.shape[0], -1, 3), -1))
        return nn.Dense(2, name="head")(nn.RNN(nn.GRUCell(3), name="rnn")(x))


def test_a_line_names_all_that_is_part_of_it():
    x = jnp.ones((2, 4, 4, 3))
    variables = jax.jit(Whole().init)(jax.random.key(0), x)
    lines = kernels.compile(Whole(), variables).layers(x)
    by_path = {line.path: line for line in lines}
    a = by_path["params/a/kernel"]
    assert set(a.others) == {"batch_stats/an/mean", "batch_stats/an/var", "params/an/bias", "params/an/scale"}
    kinds = [(line.kind, (line.path or "").split("/")[1]) for line in lines]
    assert kinds == [
        ("convolution", "a"),
        ("elementwise", "alone"),
        ("convolution", "b"),
        ("elementwise", "groups"),
        *[("product", "attention")] * 4,
        ("lookup", "table"),
        *[("product", "GRUCell_0")] * 6,
        ("product", "head"),
    ]
    assert sorted(leaves_of(lines)) == sorted(paths(variables))
    inside = [line for line in lines if "GRUCell" in (line.path or "")]
    assert all(line.macs == 2 * 16 * np.prod(line.shape) for line in inside)  # of all steps of the sequence


@pytest.mark.parametrize("path", [None, "xla", "pallas"])
@pytest.mark.parametrize("name", some(["digits_cnn"], ["digits_cnn", "resnet20", "mobilenet_v2"]))
def test_a_batch_of_nothing_has_an_output_of_nothing(name, path):
    model = models.build(name, 10, **({} if name == "digits_cnn" else {"width": 0.25}))
    x = jnp.zeros((1, 8, 8, 1 if name == "digits_cnn" else 3))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    f = kernels.compile(model, variables, path=path)
    empty = f(x[:0])
    assert (empty.shape, empty.dtype) == ((0, 10), jnp.float32)
    assert [line.path for line in f.layers(x[:0])] == [line.path for line in f.layers(x)]
    assert f(x).shape == (1, 10)


def test_compiled_networks_are_called_within_jit_and_with_arrays_of_other_machines():
    model, x = Layer(nn.Conv(4, (3, 3))), np.random.default_rng(0).standard_normal((2, 5, 5, 3), dtype=np.float32)
    variables = model.init(jax.random.key(0), x)
    f, expected = kernels.compile(model, variables), model.apply(variables, x)
    np.testing.assert_allclose(jax.jit(f)(x), expected, atol=1e-5)
    np.testing.assert_allclose(f(x.astype(">f4")), expected, atol=1e-5)
    np.testing.assert_allclose(f(x.astype(np.float64)), expected, atol=1e-5)
