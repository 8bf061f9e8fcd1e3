"""The network of the sheet: blocks, parameters, shapes; Darknet weight files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.common import models
from experiments.common.models import darknet, initial, yolov3
from experiments.common.models.convert import CheckpointError

SMALL = models.build("yolov3", classes=1, width=1 / 32, repeats=(1, 0, 0, 0, 0))


def _shapes(model, size=416):
    x = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    return variables, jax.eval_shape(lambda v, x: model.apply(v, x), variables, x)


@pytest.mark.parametrize(("classes", "parameters"), [(1, 61_523_734), (80, 61_949_149)])
def test_the_sheets_numbers(classes, parameters) -> None:
    model = models.build("yolov3", classes=classes)
    variables, heads = _shapes(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == parameters
    depth = 3 * (5 + classes)
    assert [h.shape for h in heads] == [(1, 13, 13, depth), (1, 26, 26, depth), (1, 52, 52, depth)]


def test_the_blocks_are_the_published_ones() -> None:
    layers = models.build("yolov3", classes=1).layers
    kinds = [layer.kind for layer in layers]
    counts = {kind: kinds.count(kind) for kind in set(kinds)}
    assert len(layers) == 107
    assert counts == {"conv": 75, "shortcut": 23, "route": 4, "upsample": 2, "yolo": 3}
    assert [i for i, k in enumerate(kinds) if k == "yolo"] == [82, 94, 106]
    assert [(i, b.inputs) for i, b in enumerate(layers) if b.kind == "route"] == [
        (83, (79,)),
        (86, (85, 61)),
        (95, (91,)),
        (98, (97, 36)),
    ]
    assert [i for i, b in enumerate(layers) if b.stride == 2] == [1, 5, 12, 37, 62]
    assert [layers[i].features for i in (81, 93, 105)] == [18, 18, 18]
    weights = {1: 0, 3: 0}
    for leaf in jax.tree.leaves(_shapes(models.build("yolov3", classes=1))[0]["params"]):
        if leaf.ndim == 4:
            weights[leaf.shape[0]] += leaf.size
    assert sum(weights.values()) == 61_471_072 and round(100 * weights[3] / sum(weights.values()), 1) == 90.6


def test_width_and_depth_scale() -> None:
    variables, heads = _shapes(models.build("yolov3", classes=2, width=0.25), 96)
    assert variables["params"]["conv_62"]["kernel"].shape == (3, 3, 128, 256)
    assert [h.shape for h in heads] == [(1, 3, 3, 21), (1, 6, 6, 21), (1, 12, 12, 21)]
    with pytest.raises(ValueError, match="five numbers"):
        yolov3.blocks(18, repeats=(1, 2))
    with pytest.raises(ValueError, match="multiples of 32"):
        _shapes(SMALL, 100)


def test_upsampling_repeats_rows_and_columns(rng) -> None:
    x = rng.normal(size=(2, 3, 2, 5)).astype(np.float32)
    np.testing.assert_array_equal(yolov3.upsample(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))


def test_the_trunk_classifies() -> None:
    model = models.build("darknet53", classes=3, width=1 / 32, repeats=(0, 1, 0, 0, 0))
    x = jnp.zeros((2, 28, 28, 1))
    assert jax.eval_shape(lambda v: model.apply(v, x), initial.draw(model, x, 0)).shape == (2, 3)


def test_weights_drawn_on_the_host_are_he_normal() -> None:
    variables = initial.draw(models.build("yolov3", classes=1, width=0.25), jnp.zeros((1, 32, 32, 3)), 5)
    kernel = np.asarray(variables["params"]["conv_62"]["kernel"])
    assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * 128)), rel=0.01) and abs(kernel.mean()) < 1e-3
    assert (variables["params"]["bn_0"]["scale"] == 1).all() and (variables["batch_stats"]["bn_0"]["mean"] == 0).all()
    other = initial.draw(SMALL, jnp.zeros((1, 32, 32, 3)), 6)
    assert not (np.asarray(other["params"]["conv_0"]["kernel"]) == 0).any()


@pytest.fixture
def weights(tmp_path, rng):
    """A small network's variables with every number its own, and their file."""
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 1, x.shape), jnp.float32),
        jax.eval_shape(SMALL.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)),
    )
    path = tmp_path / "small.weights"
    darknet.save_darknet(path, SMALL, variables, seen=7)
    return variables, path


def test_darknet_files_come_back(weights) -> None:
    variables, path = weights
    got, header = darknet.load_darknet(path, SMALL)
    assert header == (0, 2, 0, 7)
    jax.tree.map(np.testing.assert_array_equal, got, variables)


def test_the_order_in_the_file_is_darknets(weights) -> None:
    variables, path = weights
    numbers = np.frombuffer(path.read_bytes()[20:], "<f4")
    params, stats = variables["params"], variables["batch_stats"]["bn_0"]
    kernel = np.asarray(params["conv_0"]["kernel"])
    f, c, i, j = 0, 2, 1, 0
    want = [params["bn_0"]["bias"], params["bn_0"]["scale"], stats["mean"], stats["var"]]
    n = kernel.shape[3]
    for k, part in enumerate(want):
        np.testing.assert_array_equal(numbers[k * n : (k + 1) * n], part)
    assert numbers[4 * n + ((f * 3 + c) * 3 + i) * 3 + j] == kernel[i, j, c, f]


def test_a_file_of_the_first_layers_fills_those(weights, tmp_path) -> None:
    variables, path = weights
    n = variables["params"]["conv_0"]["kernel"].size + 4 * variables["params"]["bn_0"]["bias"].size
    part = tmp_path / "part.weights"
    part.write_bytes(path.read_bytes()[: 20 + 4 * n])
    zeros = jax.tree.map(jnp.zeros_like, variables)
    got, _ = darknet.load_darknet(part, SMALL, variables=zeros)
    np.testing.assert_array_equal(got["params"]["conv_0"]["kernel"], variables["params"]["conv_0"]["kernel"])
    assert not np.asarray(got["params"]["conv_1"]["kernel"]).any()
    with pytest.raises(CheckpointError, match="ends inside conv_1"):
        darknet.load_darknet(part, SMALL)


def _damage(data: bytes, kind: str) -> bytes:
    if kind == "nan":
        return data[:40] + b"\xff\xff\xff\x7f" + data[44:]
    if kind == "variance":
        return data[:20] + np.full(8, -1, "<f4").tobytes() + data[52:]
    return {
        "empty": b"",
        "short header": data[:14],
        "header only": data[:20],
        "truncated": data[:-40],
        "odd": data[:-3],
        "longer": data + b"\0" * 400,
        "text": b"<html>not found</html>" * 40,
        "version": b"\xff\xff\xff\xff" + data[4:],
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["empty", "short header", "header only", "truncated", "odd", "longer", "text", "version", "nan", "variance"],
)
def test_a_hostile_file_is_refused(weights, tmp_path, kind) -> None:
    bad = tmp_path / "bad.weights"
    bad.write_bytes(_damage(weights[1].read_bytes(), kind))
    with pytest.raises(CheckpointError, match=r"bad\.weights"):
        darknet.load_darknet(bad, SMALL)


def test_a_missing_file_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.weights"):
        darknet.load_darknet(tmp_path / "none.weights", SMALL)
