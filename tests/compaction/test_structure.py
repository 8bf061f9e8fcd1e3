"""Amounts at a rate, the network's structure as a set, and the small network, masked against compacted."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx import compaction
from compressx._harden import harden
from compressx.compaction import gathered, structure
from compressx.constraints import from_spec, network_structure
from compressx.formats import load_model, save_model
from compressx.tree import paths
from experiments.common import models
from experiments.common.models import initial, yolov3
from tests.thinning import some

PATTERN = r"params/(conv_\d+/kernel|bn_\d+/.*)"


def _conv(reads, features, size, stride=1, linear=False):
    return yolov3.Block("conv", (reads,), features, size, stride, linear)


BLOCKS = (
    *(_conv(-1, 8, 3), _conv(0, 16, 3, 2), _conv(1, 8, 1), _conv(2, 16, 3), yolov3.Block("shortcut", (3, 1))),
    *(_conv(4, 24, 3, 2), _conv(5, 12, 1), _conv(6, 24, 3), yolov3.Block("shortcut", (7, 5))),
    *(_conv(8, 18, 1, linear=True), yolov3.Block("yolo", (9,)), _conv(8, 12, 1), yolov3.Block("upsample", (11,))),
    *(yolov3.Block("route", (12, 4)), _conv(13, 20, 3), _conv(14, 18, 1, linear=True), yolov3.Block("yolo", (15,))),
)


class Short(nn.Module):
    """Two stages with shortcuts, an upsampling, a route and two heads: all that YOLOv3 has, in ten convolutions."""

    @nn.compact
    def __call__(self, x, train=False):
        return tuple(yolov3._run(BLOCKS, x, train)[0])


MODEL = Short()
X = jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)


@pytest.fixture(scope="module")
def network():
    """Variables with every statistic and shift away from its start, the groups and the kernels."""
    variables = initial.draw(MODEL, X, 0)
    rng = np.random.default_rng(1)

    def stir(path, leaf):
        name = path[-1].key
        low, high = {"kernel": (0, 0), "mean": (-0.5, 0.5), "bias": (-0.5, 0.5)}.get(name, (0.5, 1.5))
        return leaf if low == high else jnp.asarray(rng.uniform(low, high, leaf.shape), jnp.float32)

    variables = jax.tree_util.tree_map_with_path(stir, variables)
    found = compaction.groups(compaction.channels(MODEL, variables, X))
    return variables, found, compaction.kernels(found, variables)


_PRUNED = {}


def _prune(network, kind, **options):
    """Amounts, rules and pruned variables of the network at 6x; made once."""
    variables, found, convolutions = network
    key = (kind, *options.items())
    if key not in _PRUNED:
        kept = compaction.amounts(found, convolutions, kind, 6.0)
        rules = compaction.structure_rules(found, {"params": variables["params"]}, kept, pattern=PATTERN, **options)
        _PRUNED[key] = kept, rules, {**variables, **harden({"params": variables["params"]}, rules, fresh=True).params}
    return _PRUNED[key]


def test_the_groups_are_those_of_the_configuration() -> None:
    """Full YOLOv3: a group for each stage with its entry, for each bottleneck, for each convolution between."""
    model = models.build("yolov3", classes=1)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = compaction.groups(compaction.channels(model, variables, x))
    layers = model.layers
    # by hand, from the list of blocks: union of what shortcuts add, heads left out
    parent = {i: i for i, b in enumerate(layers) if b.kind == "conv" and not b.linear}
    source = {}  # the convolutions behind each block's channels

    def root(i):
        return i if parent[i] == i else root(parent[i])

    for i, b in enumerate(layers):
        if b.kind == "conv":
            source[i] = [i]
        elif b.kind == "shortcut":
            for p, q in zip(source[b.inputs[0]], source[b.inputs[1]], strict=True):
                parent[root(p)] = root(q)
            source[i] = source[b.inputs[1]]
        else:
            source[i] = [s for k in b.inputs for s in source[k]]
    want = {frozenset(i for i in parent if root(i) == r) for r in map(root, parent)}
    got = {
        frozenset(int(s.path.split("/")[1].removeprefix("conv_")) for s in g.slots if s.role == "out") for g in found
    }
    assert got == want and len(got) == 49
    sizes = {min(m): layers[min(m)].features for m in want}
    assert sorted(g.size for g in found) == sorted(sizes.values())
    # a route's reader reads the channels of both parts
    reads = compaction.kernels(found, variables)
    by_path = {k.path: k for k in reads}
    assert len(by_path["params/conv_87/kernel"].reads) == len(by_path["params/conv_99/kernel"].reads) == 2
    assert all(by_path[f"params/conv_{i}/kernel"].makes == () for i in (81, 93, 105))


def test_36x_is_reached_within_one_per_cent_over_all_convolutions() -> None:
    model = models.build("yolov3", classes=1)
    x = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    found = compaction.groups(compaction.channels(model, variables, x))
    convolutions = compaction.kernels(found, variables)
    for kind, rate in itertools.product(structure.KINDS, (2.0, 8.0, 36.0)):
        kept = compaction.amounts(found, convolutions, kind, rate)
        assert kept.total == 61_471_072
        assert rate <= kept.total / kept.weights < 1.01 * rate
        assert all(1 <= k <= g.size for k, g in zip(kept.channels, found, strict=True))


@pytest.mark.parametrize("kind", some(("combined",), structure.KINDS))
def test_masked_is_compacted_and_its_size_is_as_planned(network, kind) -> None:
    variables, found, convolutions = network
    kept, rules, masked = _prune(network, kind)
    small = compaction.compact(MODEL, masked, X)
    packed, positions = compaction.gather(small.variables)
    held = zip(paths(packed), jax.tree.leaves(packed), strict=True)
    stored = sum(leaf.size for path, leaf in held if "kernel" in path)
    kernels = [leaf for leaf in jax.tree.leaves(masked["params"]) if leaf.ndim == 4]
    assert sum(int((leaf != 0).sum()) for leaf in kernels) == kept.weights <= kept.total / 6
    # a channel that no kept position reads goes too
    assert stored == kept.weights if kind == "filters" else 0.5 * kept.weights < stored <= kept.weights
    assert kind == "filters" or positions  # columns are left
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 32, 32, 1)), jnp.float32)
    want = jax.jit(lambda v: MODEL.apply(v, x))(masked)
    apply = compaction.smaller(MODEL, masked, small.dead, positions=positions)
    run = [jax.jit(small.apply)(small.variables, x)]
    run += [jax.jit(apply)(packed, x)] if positions else []
    for got in run:
        for a, b in zip(got, want, strict=True):
            assert float(jnp.abs(a - b).max()) < 1e-4
    assert max(float(jnp.abs(h).max()) for h in want) > 0.1
    del rules


def test_the_set_is_what_it_says(network) -> None:
    variables, found, convolutions = network
    kept, rules, masked = _prune(network, "combined")
    params = masked["params"]
    for group, k in zip(found, kept.channels, strict=True):  # exactly k channels, the same ones everywhere
        alive = np.zeros(group.size, bool)
        for s in group.slots:
            leaf = masked
            for part in s.path.split("/"):
                leaf = leaf[part]
            there = np.asarray(leaf != 0).any(tuple(a for a in range(leaf.ndim) if a != s.axis))
            if s.path.startswith("params") and s.role != "in":
                alive |= np.bincount(np.maximum(s.units, 0), there & (s.units >= 0), group.size) > 0
        assert alive.sum() == k
        energy = np.zeros(group.size)
        for s in group.slots:
            if s.path.startswith("params") and s.role != "in":
                leaf = variables
                for part in s.path.split("/"):
                    leaf = leaf[part]
                e = (np.asarray(leaf, float) ** 2).sum(tuple(a for a in range(leaf.ndim) if a != s.axis))
                np.add.at(energy, s.units[s.units >= 0], e[s.units >= 0])
        assert set(np.flatnonzero(alive)) == set(np.argsort(-energy, kind="stable")[:k])  # the largest
    for kernel in convolutions:
        used = (np.asarray(params[kernel.path.split("/")[1]]["kernel"]) != 0).any(-1).sum()
        assert used <= kept.columns[kernel.path]
    again = harden({"params": params}, rules, fresh=True).params
    jax.tree.map(np.testing.assert_array_equal, again["params"], params)  # idempotent


def test_random_selection_keeps_as_much_and_other_weights(network) -> None:
    kept, _, energy = _prune(network, "combined")
    _, _, drawn = _prune(network, "combined", selection="random", seed=3)
    sizes = [sum(int((np.asarray(leaf) != 0).sum()) for leaf in jax.tree.leaves(v["params"])) for v in (energy, drawn)]
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)
    norms = [sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(v["params"])) for v in (energy, drawn)]
    assert norms[1] < norms[0]


def test_it_is_saved_and_read_back(network, tmp_path) -> None:
    _, rules, masked = _prune(network, "combined")
    save_model(tmp_path / "m.safetensors", {"params": masked["params"]}, rules)
    saved = load_model(tmp_path / "m.safetensors")
    jax.tree.map(np.testing.assert_array_equal, saved.params["params"], jax.device_get(masked["params"]))
    assert from_spec(rules[0][1].spec).spec == rules[0][1].spec


def test_amounts_refuses_the_impossible(network) -> None:
    _, found, convolutions = network
    with pytest.raises(ValueError, match="kind must be one of filters, columns, combined"):
        compaction.amounts(found, convolutions, "rows", 2.0)
    with pytest.raises(ValueError, match="even 4 of each leaves"):
        compaction.amounts(found, convolutions, "filters", 1000.0, least=4)


def test_a_pattern_must_name_what_the_structure_holds(network) -> None:
    variables, found, convolutions = network
    kept = compaction.amounts(found, convolutions, "filters", 2.0)
    with pytest.raises(ValueError, match="differ in"):
        compaction.structure_rules(found, {"params": variables["params"]}, kept, pattern=".*kernel")


def _member(**given):
    return {"makes": None, "makes_units": None, "reads": None, "reads_units": None, "columns": None, **given}


@pytest.mark.parametrize(
    ("members", "groups", "text"),
    [
        ([_member(makes=3)], [[0, 4, 2]], "both or neither"),
        ([_member(makes=3, makes_units=[[0, 4]])], [[0, 4, 5]], "keep 1..4"),
        ([_member(makes=3, makes_units=[[0, 5]])], [[0, 4, 2]], "beyond the 4"),
        ([{"makes": 3}], [[0, 4, 2]], "has the keys makes"),
    ],
)
def test_a_structure_that_cannot_be(members, groups, text) -> None:
    with pytest.raises(ValueError, match=text):
        network_structure(members, groups)


def test_gathered_convolution_is_the_loop(rng) -> None:
    x = rng.normal(size=(2, 5, 6, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    kernel[rng.uniform(size=(3, 3, 3)) < 0.6] = 0
    used = gathered.used_positions(kernel)
    matrix = kernel.reshape(-1, 4)[used]
    for stride in (1, 2):
        pads = ((1, 1), (1, 1))
        got = gathered.gathered_conv(jnp.asarray(x), jnp.asarray(matrix), used, (3, 3, 3), (stride, stride), pads)
        padded = np.pad(x, ((0, 0), *pads, (0, 0)))
        for n, r, c in itertools.product(range(2), range(got.shape[1]), range(got.shape[2])):
            patch = padded[n, r * stride : r * stride + 3, c * stride : c * stride + 3]
            np.testing.assert_allclose(got[n, r, c], np.einsum("ijc,ijcf->f", patch, kernel), atol=1e-4)


def test_gather_and_scatter_are_inverse(rng) -> None:
    kernel = rng.normal(size=(3, 3, 2, 4)).astype(np.float32)
    kernel[0] = 0
    tree = {"a": jnp.asarray(kernel), "b": jnp.ones((1, 1, 2, 2)), "c": jnp.ones(3)}
    packed, positions = compaction.gather(tree)
    assert list(positions) == ["a"] and packed["a"].shape == (12, 4)
    back = gathered.scatter(packed, positions, {"a": kernel.shape})
    jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_costs_are_the_counts(network) -> None:
    variables, _, _ = network
    rows = compaction.costs(MODEL, variables, X)
    assert len(rows) == sum(b.kind == "conv" for b in BLOCKS)
    first, head = rows[0], next(r for r in rows if r.shape[-1] == 18)
    assert (first.macs, first.weights) == (32 * 32 * 9 * first.shape[3], 9 * first.shape[3])
    assert head.outputs == 64 and head.bytes == 4 * (head.weights + 64 * head.shape[2] + 64 * 18)


def test_the_sheets_multiply_adds() -> None:
    model = models.build("yolov3", classes=1)
    x = jax.ShapeDtypeStruct((1, 416, 416, 3), jnp.float32)
    rows = compaction.costs(model, jax.eval_shape(model.init, jax.random.key(0), x), x)
    assert round(sum(r.macs for r in rows) / 1e9, 1) == 32.6
    assert sum(r.weights for r in rows) == 61_471_072


def test_peak_bytes_by_hand() -> None:
    def two(variables, x):
        y = x @ variables["w"]  # 4 x 8 beside 4 x 2
        return (y * y).sum(axis=1)  # y and its square together

    variables = {"w": jnp.ones((2, 8))}
    assert compaction.peak_bytes(two, variables, jnp.ones((4, 2))) == 4 * (32 + 32)
