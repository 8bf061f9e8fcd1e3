"""Pallas kernels, interpreted, against NumPy; their lowering for a GPU and a TPU; and who calls them."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import kernels
from compressx.kernels import pallas
from compressx.kernels.schedule import Geometry
from tests.thinning import some

ONE = ((1, 1), (1, 1))


def block_sparse(rng, shape, block, keep):
    w = rng.standard_normal(shape, dtype=np.float32)
    live = rng.random((*shape[:-2], shape[-2] // block[0], shape[-1] // block[1])) < keep
    return w * np.repeat(np.repeat(live, block[0], axis=-2), block[1], axis=-1)


@pytest.mark.parametrize("backend", pallas.BACKENDS)
@pytest.mark.parametrize("keep", [0.0, 0.4, 1.0])
def test_block_sparse_matmul(keep, backend):
    rng = np.random.default_rng(0)
    w = block_sparse(rng, (24, 16), (4, 8), keep)
    x = rng.standard_normal((6, 24), dtype=np.float32)
    y = pallas.block_sparse_matmul(jnp.asarray(x), pallas.blocks(w, (4, 8)), backend=backend, rows=3, interpret=True)
    np.testing.assert_allclose(y, x @ w, atol=1e-5)


GEOMETRIES = {
    "3x3": Geometry((3, 3), (1, 1), ONE),
    "strides, uneven pads": Geometry((3, 2), (2, 1), ((1, 1), (0, 1))),
    "stride 2": Geometry((3, 3), (2, 2), ((0, 1), (0, 1))),
    "1x1, stride 2": Geometry((1, 1), (2, 2), ((0, 0), (0, 0))),
    "pads beyond the kernel": Geometry((2, 2), (1, 1), ((3, 2), (2, 3))),
}


@pytest.mark.parametrize("backend", pallas.BACKENDS)
@pytest.mark.parametrize("name", some(list(GEOMETRIES)[1::2], GEOMETRIES))
def test_block_sparse_conv(name, backend):
    rng, geometry = np.random.default_rng(1), GEOMETRIES[name]
    w = block_sparse(rng, (*geometry.size, 8, 12), (4, 4), 0.4)
    for image in ((2, 14, 11, 8), (1, 5, 20, 8)):  # tiles that fit and tiles that do not
        x = rng.standard_normal(image, dtype=np.float32)
        held = pallas.blocks(w, (4, 4))
        y = pallas.block_sparse_conv(jnp.asarray(x), held, geometry=geometry, backend=backend, interpret=True)
        np.testing.assert_allclose(y, kernels.reference(x, w, geometry), atol=2e-5)


def test_without_triton_a_gpu_is_refused_by_name_and_layers_stay_with_xla(monkeypatch):
    monkeypatch.setattr(pallas, "triton", None)
    w, geometry = np.ones((3, 3, 16, 16), np.float32), GEOMETRIES["3x3"]
    reason = pallas.supports(w.shape, geometry, (1, 8, 8, 16), "gpu")
    assert isinstance(reason, str)
    assert reason.startswith(f"jax {jax.__version__} has no jax.experimental.pallas.triton")
    assert pallas.prepared(w, geometry, (1, 8, 8, 16)) == reason  # what a dispatcher reads: XLA runs the layer
    assert pallas.supports((3, 3, 128, 128), geometry, (1, 8, 8, 128), "tpu") is True


def test_only_live_blocks_are_stored():
    w = block_sparse(np.random.default_rng(2), (3, 3, 16, 8), (4, 8), 0.3)
    live = w.reshape(9, 4, 4, 8).any(axis=(2, 3)).sum()
    assert int(pallas.blocks(w, (4, 8)).live.sum()) == live == pallas.blocks(w, (4, 8)).weight.shape[1]


def test_blocks_must_divide():
    with pytest.raises(ValueError, match="do not divide"):
        pallas.blocks(np.ones((10, 8), np.float32), (4, 8))
    with pytest.raises(ValueError, match="multiple of 4"):
        pallas.block_sparse_matmul(jnp.zeros((6, 8)), pallas.blocks(np.ones((8, 8)), (4, 8)), backend="gpu", rows=4)


# Lowering needs no device: it makes the Triton or Mosaic program that a device's compiler would be given.
LOWERED = {
    "gpu": ("cuda", "__gpu$xla.gpu.triton", "NVIDIA H100 80GB HBM3"),
    "tpu": ("tpu", "tpu_custom_call", "TPU v5 lite"),
}


def lower(f, backend, *args):
    platform, call, kind = LOWERED[backend]
    device = jax.sharding.AbstractDevice(kind, num_cores=1, platform=backend)  # newer releases want to know which
    mesh = jax.sharding.AbstractMesh((1,), ("all",), (jax.sharding.AxisType.Auto,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(f).trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert re.findall(r"custom_call @([\w.$]+)", text) == [call]


@pytest.mark.parametrize("image", some([1, 14], [1, 7, 8, 14, 16, 28]))
@pytest.mark.parametrize(
    ("backend", "block"), [("gpu", (16, 16)), ("gpu", (32, 64)), ("gpu", (64, 64)), ("tpu", (128, 128))]
)
def test_convolutions_lower(backend, block, image):
    for size, stride in ((3, 1), (3, 2), (1, 1)):
        geometry = Geometry((size, size), (stride, stride), ((size // 2, size // 2),) * 2)
        w = pallas.blocks(np.ones((size, size, 128, 128), np.float32), block)
        x = jax.ShapeDtypeStruct((2, image, image, 128), jnp.float32)
        assert pallas.supports((size, size, 128, 128), geometry, x.shape, backend, block) is True
        f = lambda x, w, g=geometry: pallas.block_sparse_conv(x, w, geometry=g, backend=backend)
        lower(f, backend, x, w)


@pytest.mark.parametrize(("backend", "block"), [("gpu", (16, 16)), ("gpu", (64, 64)), ("tpu", (128, 128))])
@pytest.mark.parametrize("rows", [8, 64, 128])
def test_products_lower(backend, block, rows):
    w = pallas.blocks(np.ones((256, 256), np.float32), block)
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    lower(lambda x, w: pallas.block_sparse_matmul(x, w, backend=backend, rows=rows), backend, x, w)


def test_what_does_not_lower_is_refused_with_its_reason():
    same = GEOMETRIES["3x3"]
    ask = lambda shape, backend, block=None, g=same, image=8: pallas.supports(
        shape, g, (1, image, image, shape[2]), backend, block
    )
    assert ask((3, 3, 64, 64), "gpu") is True and ask((3, 3, 128, 256), "tpu") is True
    assert "64x64" in ask((3, 3, 128, 128), "tpu", (64, 64))
    assert "128x128" in ask((3, 3, 128, 128), "gpu", (128, 128))
    assert "divide 3 channels" in ask((3, 3, 3, 64), "gpu") and "divide" in ask((3, 3, 64, 128), "tpu")
    assert "fast memory" in ask((3, 3, 512, 512), "tpu", image=112)
    assert "groups" in ask((3, 3, 64, 64), "gpu", g=same._replace(groups=2))
    assert "not for cpu" in ask((3, 3, 64, 64), "cpu")
    w = pallas.blocks(np.ones((3, 3, 8, 8), np.float32), (8, 8))
    with pytest.raises(ValueError, match="blocks of 8x8"):
        pallas.block_sparse_conv(jnp.zeros((1, 4, 4, 8)), w, geometry=same, backend="gpu")


def test_prepare_runs_pallas_where_it_is_asked_or_where_it_skips_enough(monkeypatch):
    rng = np.random.default_rng(3)
    w = block_sparse(rng, (3, 3, 32, 64), (32, 64), 0.3)
    x, b = rng.standard_normal((1, 9, 7, 32), dtype=np.float32), rng.standard_normal(64, dtype=np.float32)
    r = rng.standard_normal((1, 9, 7, 64), dtype=np.float32)
    conv = kernels.prepare(w, x.shape, bias=b, activation="relu", path="pallas")
    assert conv.path == "pallas/interpret"
    np.testing.assert_allclose(conv(x, r), kernels.reference(x, w, conv.geometry, b, "relu", r), atol=2e-4)
    plain = kernels.prepare(w, x.shape, bias=b, activation="relu", path="xla")
    ours, theirs = (jax.grad(lambda x, f=f: jnp.square(f(x)).sum())(jnp.asarray(x)) for f in (conv, plain))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    with pytest.raises(ValueError, match="Pallas path does not run: no blocks"):
        kernels.prepare(w[:, :, :8], (1, 9, 7, 8), path="pallas")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # the choice alone: nothing is run
    assert kernels.prepare(w, x.shape).path == "pallas/gpu"
    assert kernels.prepare(np.ones_like(w), x.shape).path == "xla"  # no block to skip
    assert kernels.prepare(w[:, :, :8], (1, 9, 7, 8)).path == "xla"
    assert kernels.prepare(w, x.shape, path="xla").path == "xla"


def test_compile_runs_layers_with_enough_empty_blocks_on_pallas():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.relu(nn.Conv(32, (3, 3), name="a")(x))  # 3 channels: not for Pallas
            y = nn.BatchNorm(use_running_average=True)(nn.Conv(32, (3, 3), strides=2, name="b")(x))
            return nn.relu(y + nn.Conv(32, (1, 1), strides=2, name="c")(x)).mean(axis=(1, 2))

    model, x = Net(), np.random.default_rng(4).standard_normal((2, 12, 10, 3), dtype=np.float32)
    variables = jax.device_get(model.init(jax.random.key(0), x))
    w = variables["params"]["b"]["kernel"].copy()
    w[::2] = 0  # whole taps are empty
    variables["params"]["b"]["kernel"] = w
    f = kernels.compile(model, variables, path="pallas")
    assert f.path == "pallas/interpret"
    np.testing.assert_allclose(f(x), jax.jit(lambda v, x: model.apply(v, x))(variables, x), atol=1e-4)
    where = {r.path.split("/")[1]: r.on for r in f.layers(x)}
    assert where == {"a": "xla", "b": "pallas/interpret", "c": "pallas/interpret"}


def test_compile_takes_pallas_on_a_gpu(monkeypatch):
    variables = {"w": np.zeros((3, 3, 32, 32), np.float32)}
    variables["w"][1, 1] = 1
    f = lambda v, x: jax.lax.conv_general_dilated(
        x, v["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = np.zeros((1, 8, 8, 32), np.float32)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    compiled = kernels.compile(f, variables)
    assert compiled.path == "pallas/gpu" and [r.on for r in compiled.layers(x)] == ["pallas/gpu"]
    dense = kernels.compile(f, {"w": np.ones_like(variables["w"])})
    assert [r.on for r in dense.layers(x)] == ["xla"]
