"""Compacted networks give the masked networks' outputs, with every channel gone that can go."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.compaction import CompactionError, NothingRemoved, channels, compact, dead, groups
from compressx.compaction.primitives import reaches_border
from compressx.tree import paths
from experiments.common import models

SMALL = {
    "lenet5": (models.LeNet5(), (28, 28, 1)),
    "lenet300": (models.LeNet300(width=0.1), (6, 6, 1)),
    "vgg16": (models.VGG16(width=0.1), (32, 32, 3)),
    "resnet20": (models.CifarResNet(blocks=3, width=0.5), (8, 8, 3)),
    "resnet18": (models.ResNet(blocks=(2, 2, 2, 2), classes=7, width=0.1), (32, 32, 3)),
    "resnet50": (models.ResNet(blocks=(2, 1, 1, 1), bottleneck=True, classes=7, width=0.06), (32, 32, 3)),
    "mobilenet_v2": (models.MobileNetV2(classes=5, width=0.25, stem="cifar"), (8, 8, 3)),
}


def _lively(model, shape, rng):
    """Variables with every leaf random, statistics included."""
    spec = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.float32))

    def draw(path, leaf):
        name = path[-1].key
        if name in ("var", "scale"):
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
        fan = np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 10
        return jnp.asarray(rng.normal(0, (2 / fan) ** 0.5, leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, spec)


def _zero_units(variables, found, rng):
    """Empties about half the units of every group: filters, and what scales and shifts them; statistics stay."""
    flat, treedef = jax.tree.flatten(variables)
    names, leaves = paths(variables), [np.array(x) for x in flat]
    removed = []
    for group in found:
        gone = rng.permutation(group.size)[: group.size // 2]
        removed.append(gone.size)
        for slot in group.slots:
            if slot.role != "in" and slot.path.startswith("params"):
                leaf = leaves[names.index(slot.path)]
                np.moveaxis(leaf, slot.axis, 0)[np.isin(slot.units, gone)] = 0
    return jax.tree.unflatten(treedef, [jnp.asarray(x) for x in leaves]), removed


def _images(shape, rng, n=3):
    return jnp.asarray(rng.normal(size=(n, *shape)), jnp.float32)


def _same(model, variables, small, x, tolerance=1e-5):
    before = jax.jit(lambda v, x: model.apply(v, x, train=False))(variables, x)
    after = jax.jit(small.apply)(small.variables, x)
    scale = max(1.0, float(jnp.abs(before).max()))
    np.testing.assert_allclose(after, before, atol=tolerance * scale, rtol=0)


# a chain, one of residual blocks, and one of depthwise convolutions
QUICK = ("lenet5", "resnet20", "mobilenet_v2")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in SMALL])
def test_masked_and_compacted_networks_agree(name, rng) -> None:
    model, shape = SMALL[name]
    variables = _lively(model, shape, rng)
    one = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    found = groups(channels(model, variables, one))
    masked, removed = _zero_units(variables, found, rng)
    small = compact(model, masked, one)
    _same(model, masked, small, _images(shape, rng))
    # every group lost exactly the emptied units, in every slot
    sizes = dict(zip(paths(small.variables), jax.tree.leaves(small.variables), strict=True))
    for group, gone in zip(found, removed, strict=True):
        for slot in group.slots:
            if slot.role == "out" and (slot.units >= 0).all() and slot.units.size == group.size:
                assert sizes[slot.path].shape[slot.axis] == group.size - gone
    count = sum(x.size for x in jax.tree.leaves(small.variables["params"]))
    assert count < 0.75 * sum(x.size for x in jax.tree.leaves(masked["params"]))


def test_parameters_of_a_compacted_lenet_are_those_of_the_smaller_lenet(rng) -> None:
    model, shape = SMALL["lenet5"]
    masked = _lively(model, shape, rng)
    for layer, gone in (("c1", [1, 4]), ("c2", [0, 5, 15]), ("f1", range(20)), ("f2", [83])):
        p = masked["params"][layer]
        for leaf in ("kernel", "bias"):
            p[leaf] = p[leaf].at[..., jnp.asarray(list(gone))].set(0)
    small = compact(model, masked, jnp.zeros((1, *shape)))
    shapes = {k: v.shape for k, v in zip(paths(small.variables), jax.tree.leaves(small.variables), strict=True)}
    assert shapes["params/c1/kernel"] == (5, 5, 1, 4)
    assert shapes["params/c2/kernel"] == (5, 5, 4, 13)
    assert shapes["params/f1/kernel"] == (25 * 13, 100)
    assert shapes["params/f2/kernel"] == (100, 83)
    assert shapes["params/f3/kernel"] == (83, 10)
    _same(model, masked, small, _images(shape, rng))


def test_nothing_goes_from_a_dense_network(rng) -> None:
    model, shape = SMALL["resnet20"]
    variables = _lively(model, shape, rng)
    small = compact(model, variables, jnp.zeros((1, *shape)))
    assert small.dead == ({}, {}, {})
    jax.tree.map(np.testing.assert_array_equal, small.variables, variables)


def test_channels_of_a_residual_join_stay_while_one_branch_uses_them(rng) -> None:
    model, shape = SMALL["resnet20"]
    variables = _lively(model, shape, rng)
    block = variables["params"]["layer1_1"]
    for leaf in (("conv2", "kernel"), ("bn2", "scale"), ("bn2", "bias")):
        block[leaf[0]][leaf[1]] = block[leaf[0]][leaf[1]].at[..., 2].set(0)
    assert dead(model, variables, jnp.zeros((1, *shape))).kept == {}


def test_what_feeds_only_removed_channels_goes_too(rng) -> None:
    model = models.LeNet5()
    variables = _lively(model, (28, 28, 1), rng)
    p = variables["params"]
    p["f2"]["kernel"] = p["f2"]["kernel"].at[7].set(0)  # nobody reads unit 7 of f1
    p["f1"]["kernel"] = p["f1"]["kernel"].at[:, :7].set(0).at[:, 8:].set(0)  # f1 passes on only unit 7
    p["f1"]["bias"] = jnp.zeros(120)
    small = compact(model, variables, jnp.zeros((1, 28, 28, 1)))
    # all of c1, c2 and f1 is useless; one unit of f1 and c2, and what it reads, stays because no array may be empty
    assert small.variables["params"]["c1"]["kernel"].shape == (5, 5, 1, 6)
    assert small.variables["params"]["c2"]["kernel"].shape == (5, 5, 6, 1)
    assert small.variables["params"]["f1"]["kernel"].shape == (25, 1)
    _same(model, variables, small, _images((28, 28, 1), rng))


class _Net(nn.Module):
    """Two convolutions, normalised; padding and taps of the second are chosen."""

    padding: str = "VALID"
    size: int = 3
    norm: bool = True

    @nn.compact
    def __call__(self, x, train=False):
        x = models.layers.Conv(6, (3, 3), padding="SAME", use_bias=False, name="a")(x)
        x = nn.leaky_relu(models.layers.BatchNorm(name="an")(x, train))
        x = models.layers.Conv(5, (self.size, self.size), padding=self.padding, use_bias=False, name="b")(x)
        if self.norm:
            x = models.layers.BatchNorm(name="bn")(x, train)
        return nn.Dense(3, name="c")(nn.relu(x).mean((1, 2)))


def _blank(model, rng, gone=(1, 3)):
    """Variables with empty filters in layer a whose normalisation still shifts them."""
    variables = _lively(model, (7, 7, 2), rng)
    kernel = variables["params"]["a"]["kernel"]
    variables["params"]["a"]["kernel"] = kernel.at[..., jnp.asarray(gone)].set(0)
    return variables


@pytest.mark.parametrize(("padding", "size"), [("VALID", 3), ("SAME", 1)])
def test_constant_maps_are_folded_into_the_next_normalisation(padding, size, rng) -> None:
    model = _Net(padding, size)
    variables = _blank(model, rng)
    small = compact(model, variables, jnp.zeros((1, 7, 7, 2)))
    assert small.variables["params"]["a"]["kernel"].shape == (3, 3, 2, 4)
    assert list(small.dead.folded) == ["params/bn/bias"]
    _same(model, variables, small, _images((7, 7, 2), rng))


def test_a_constant_map_behind_zero_padding_stays(rng) -> None:
    model = _Net("SAME")
    variables = _blank(model, rng)
    reads = {"params/a/kernel[3]": "conv_general_dilated reads it"}
    assert dead(model, variables, jnp.zeros((1, 7, 7, 2))) == ({}, {}, reads)
    # of channel 3 the next layer reads only the centre tap, which never meets the padding
    kernel = variables["params"]["b"]["kernel"]
    variables["params"]["b"]["kernel"] = kernel.at[:, :, 3].set(jnp.zeros((3, 3, 5)).at[1, 1].set(kernel[1, 1, 3]))
    small = compact(model, variables, jnp.zeros((1, 7, 7, 2)))
    np.testing.assert_array_equal(small.dead.kept["params/a/kernel"][3], [0, 1, 2, 4, 5])
    _same(model, variables, small, _images((7, 7, 2), rng))


def test_a_constant_map_that_no_bias_can_take_stays(rng) -> None:
    model = _Net(norm=False)
    reads = {"params/a/kernel[3]": "conv_general_dilated reads it"}
    assert dead(model, _blank(model, rng), jnp.zeros((1, 7, 7, 2))) == ({}, {}, reads)


def test_constants_are_folded_through_flax_normalisation_and_dense_bias(rng) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.Dense(6, name="a")(x)
            x = nn.Dense(5, use_bias=False, name="b")(nn.relu(x))
            x = nn.BatchNorm(use_running_average=not train, name="n")(x)
            return nn.Dense(4, name="c")(nn.silu(x))

    variables = _lively(Net(), (3,), rng)
    p = variables["params"]
    p["a"]["kernel"] = p["a"]["kernel"].at[:, 2].set(0)
    p["a"]["bias"] = p["a"]["bias"].at[2].set(1.5)
    p["b"]["kernel"] = p["b"]["kernel"].at[:, 4].set(0)
    small = compact(Net(), variables, jnp.zeros((1, 3)))
    assert set(small.dead.folded) == {"batch_stats/n/mean", "params/c/bias"}
    assert small.variables["params"]["b"]["kernel"].shape == (5, 4)
    _same(Net(), variables, small, _images((3,), rng))


class _Routes(nn.Module):
    """Branches that are concatenated, upsampled, sliced and multiplied, as routes of detectors are."""

    @nn.compact
    def __call__(self, x, train=False):
        a = nn.relu(models.layers.Conv(4, (3, 3), name="a")(x))
        b = models.layers.Conv(6, (3, 3), strides=2, name="b")(a)
        b = jnp.repeat(jnp.repeat(b, 2, 1), 2, 2)
        y = jnp.concatenate([a, b], -1)
        left, right = jnp.split(models.layers.Conv(10, (1, 1), name="c")(y), 2, axis=-1)
        y = left * nn.sigmoid(right) + models.layers.Conv(5, (1, 1), name="d")(y[..., 1:7])
        y = nn.max_pool(y, (2, 2), (2, 2))
        return {"out": models.layers.Conv(3, (1, 1), name="e")(y), "sum": y.mean()}


def test_concatenation_splits_and_slices_are_followed(rng) -> None:
    model = _Routes()
    variables = _lively(model, (6, 6, 2), rng)
    one = jnp.zeros((1, 6, 6, 2))
    found = groups(channels(lambda v, x: model.apply(v, x)["out"], variables, one))
    by_first = {next(s.path for s in g.slots if s.role == "out"): g for g in found}
    assert {k: g.size for k, g in by_first.items()} == {
        "params/a/kernel": 4,
        "params/b/kernel": 6,
        "params/c/kernel": 5,
    }
    c = next(s for s in by_first["params/c/kernel"].slots if s.path == "params/c/kernel" and s.role == "out")
    np.testing.assert_array_equal(c.units, [0, 1, 2, 3, 4] * 2)  # both halves meet in a product, and the sum with d
    reads = {s.path: s.units.tolist() for s in by_first["params/b/kernel"].slots if s.role == "in"}
    assert reads["params/c/kernel"] == [-1] * 4 + [0, 1, 2, 3, 4, 5]
    assert reads["params/d/kernel"] == [-1] * 3 + [0, 1, 2]
    masked, _ = _zero_units(variables, found, rng)
    small = compact(lambda v, x: model.apply(v, x)["out"], masked, one)
    x = _images((6, 6, 2), rng)
    np.testing.assert_allclose(small.apply(small.variables, x), model.apply(masked, x)["out"], atol=1e-5)
    assert small.variables["params"]["a"]["kernel"].shape[-1] == 2
    assert small.variables["params"]["b"]["kernel"].shape[-1] == 3


def test_stages_joined_by_padded_shortcuts_are_one_group() -> None:
    model, shape = models.CifarResNet(blocks=1, width=0.25), (8, 8, 3)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *shape)))
    first, *inner = groups(channels(model, variables, jnp.zeros((1, *shape))))
    assert first.size == 16
    assert [g.size for g in inner] == [4, 8, 16]
    units = {s.path: s.units for s in first.slots if s.role == "out"}
    assert set(units) == {f"params/{p}/kernel" for p in ("conv1", "layer1_0/conv2", "layer2_0/conv2", "layer3_0/conv2")}
    # half the padding lies on each side: channel i of stage 1 is channel i + 2 of stage 2, and i + 6 of stage 3
    np.testing.assert_array_equal(units["params/layer2_0/conv2/kernel"][2:6], units["params/conv1/kernel"])
    np.testing.assert_array_equal(units["params/layer3_0/conv2/kernel"][4:12], units["params/layer2_0/conv2/kernel"])


def test_an_unknown_operation_is_refused_by_name_or_left_whole(rng) -> None:
    def model(v, x):
        y = jnp.tanh(x @ v["a"])
        y = jax.lax.while_loop(lambda c: c.max() > 1, lambda c: c * 0.5, y)
        return jnp.tanh(y @ v["b"]) @ v["c"]

    v = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("a", (3, 4)), ("b", (4, 5)), ("c", (5, 2)))}
    v["a"], v["b"] = v["a"].at[:, 1].set(0), v["b"].at[:, 1].set(0)
    with pytest.raises(CompactionError, match=r"operation 'while' \(operands \(1, 4\)\).*keep=\('while',\)"):
        dead(model, v, jnp.zeros((1, 3)))
    small = compact(model, v, jnp.zeros((1, 3)), keep=("while",))
    assert {k: x.shape for k, x in small.variables.items()} == {"a": (3, 4), "b": (4, 4), "c": (4, 2)}
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    np.testing.assert_allclose(small.apply(small.variables, x), model(v, x), atol=1e-6)


def test_variables_of_the_whole_network_are_refused_by_the_small_one(rng) -> None:
    model = _Net()
    variables = _blank(model, rng)
    small = compact(model, variables, jnp.zeros((1, 7, 7, 2)))
    with pytest.raises(CompactionError, match=r"batch_stats/an/mean: has shape \(6,\), expected \(4,\)"):
        small.apply(variables, jnp.zeros((1, 7, 7, 2)))


def test_channels_that_are_normalised_together_go_where_they_are_zero(rng) -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            x = nn.LayerNorm(name="n")(nn.Dense(6, name="a")(x))
            return nn.Dense(2, name="b")(x)

    variables, one = _lively(Net(), (3,), rng), jnp.zeros((1, 3))
    p = variables["params"]
    (group,) = groups(channels(Net(), variables, one))
    assert {(s.path, s.axis, s.role) for s in group.slots} == {
        ("params/a/bias", 0, "along"),
        ("params/a/kernel", 1, "out"),
        ("params/b/kernel", 0, "in"),
        ("params/n/bias", 0, "along"),
        ("params/n/scale", 0, "along"),
    }
    p["a"] = {"kernel": p["a"]["kernel"].at[:, 2].set(0), "bias": p["a"]["bias"].at[2].set(0)}
    found = dead(Net(), variables, one)  # the norm shifts it
    assert found.kept == {} and found.stuck == {"params/a/kernel[1]": "dot_general reads it"}
    p["n"] = {k: leaf.at[2].set(0) for k, leaf in p["n"].items()}
    small = compact(Net(), variables, one)
    assert small.variables["params"]["b"]["kernel"].shape == (5, 2)
    x = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32)
    np.testing.assert_allclose(small.apply(small.variables, x), Net().apply(variables, x), atol=1e-5)


def test_channels_that_are_compared_with_each_other_are_fixed(rng) -> None:
    f = lambda v, x: jax.nn.softmax(x @ v["a"]) @ v["b"]
    v = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("a", (3, 6)), ("b", (6, 2)))}
    v["a"] = v["a"].at[:, 2].set(0)
    found = channels(f, v, jnp.zeros((1, 3)))
    assert groups(found) == () and "reduce_max runs over it" in found.reasons.values()
    assert dead(f, v, jnp.zeros((1, 3))) == ({}, {}, {"a[1]": "reduce_max runs over it"})
    with pytest.warns(NothingRemoved, match=r"weights are 0 along whole indices of 1 axes: a\[1\]: reduce_max"):
        compact(f, v, jnp.zeros((1, 3)))


@pytest.mark.parametrize(
    ("size", "taps", "stride", "pad", "dilation"), [(7, 3, 1, 1, 1), (8, 3, 2, 1, 1), (9, 5, 2, 1, 2)]
)
def test_taps_at_the_border_are_those_that_meet_padding(size, taps, stride, pad, dilation) -> None:
    out = (size + 2 * pad - dilation * (taps - 1) - 1) // stride + 1
    expected = [any(not 0 <= o * stride + k * dilation - pad < size for o in range(out)) for k in range(taps)]
    assert reaches_border(size, out, taps, stride, pad, dilation) == expected
