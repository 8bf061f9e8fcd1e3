"""Whole networks: what layers aim at, shortcuts, normalisations, biases, loops, and input that is no good.

Most layers here are 6x6 with one of two sets, so that the solver's programs are compiled a few times only.
"""

from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import compressx as cx
from compressx.capture import CaptureError, StateError
from compressx.reconstruction import match_statistics
from experiments.common.models.layers import BatchNorm
from experiments.common.models.resnet import BasicBlock

pytestmark = pytest.mark.filterwarnings("ignore::compressx.constraints.base.KeepsAll")
KEY = jax.random.key(0)
DAMP = 0.01
SPARSE, WHOLE = cx.unstructured(0.4), cx.unstructured(1.0)  # 14 of 36 weights, and all


def drawn(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def correlated(n: int, *shape: int, seed: int = 9) -> Any:
    """Examples whose entries are related, so that a layer can make up for what it loses."""
    size = int(np.prod(shape))
    mixed = drawn(n, size, seed=seed) @ (0.3 * drawn(size, size, seed=seed + 1) + jnp.eye(size))
    return mixed.reshape(n, *shape)


def relative(a: Any, b: Any) -> float:
    return float(jnp.sum((a - b) ** 2) / jnp.sum(b**2))


def aim(dense: Any, compressed: Any, w: Any, missing: Any = 0.0) -> Any:
    """The target of a layer in NumPy: least squares with a ridge towards its own weights."""
    x, y, w = (np.asarray(a, np.float64) for a in (dense, compressed, w))
    h, c = y.T @ y / len(y), y.T @ x / len(y)
    ridge = DAMP * np.mean(np.diag(h)) * np.eye(len(h))
    return np.linalg.solve(h + ridge, c @ w + ridge @ w + y.T @ np.broadcast_to(missing, (len(y), w.shape[1])) / len(y))


def test_a_layer_aims_at_the_dense_output_for_compressed_inputs() -> None:
    def network(v: Any, x: Any) -> Any:
        return jax.nn.relu(x @ v["a"]) @ v["b"]

    v, x = {"a": drawn(6, 6), "b": drawn(6, 6, seed=1)}, correlated(90, 6)
    rules = [("a", SPARSE), ("b", WHOLE)]
    hard, report = cx.reconstruct(network, v, rules, [x[:50], x[50:]])
    assert [layer.inputs for layer in report.layers] == ["compressed", "compressed"]
    target = aim(jax.nn.relu(x @ v["a"]), jax.nn.relu(x @ hard.params["a"]), v["b"])
    np.testing.assert_allclose(hard.params["b"], target, rtol=2e-3, atol=2e-4)
    own, _ = cx.reconstruct(network, v, rules, [x], target="own")
    np.testing.assert_allclose(own.params["b"], v["b"], rtol=1e-3, atol=1e-4)
    # without an error before it the first layer aims at itself, whatever the mode
    np.testing.assert_array_equal(hard.params["a"] != 0, own.params["a"] != 0)
    assert report.output_error < relative(network(own.params, x), network(v, x))


def test_the_last_layer_of_a_block_corrects_the_shortcut() -> None:
    """... through its bias and the factors of a normalisation, wherever in the program the shortcut is computed."""

    def network(v: Any, x: Any) -> Any:
        x = x @ v["first"]
        y = jax.nn.relu(x) @ v["last"] + v["bias"][None]
        y = y * (v["scale"] * jax.lax.rsqrt(v["var"] + 1e-5))[None]
        return y + jnp.tanh(x) * 2.0

    v = {"first": drawn(6, 6), "last": drawn(6, 6, seed=1), "bias": drawn(6, seed=2)}
    v |= {"scale": 1 + jnp.abs(drawn(6, seed=3)), "var": 1 + jnp.abs(drawn(6, seed=4))}
    x = correlated(120, 6)
    rules = [("first", SPARSE), ("last", WHOLE)]
    found = {t: cx.reconstruct(network, v, rules, [x[:60], x[60:]], target=t, norms="keep") for t in ("block", "dense")}
    hard, report = found["block"]
    assert [layer.shortcut for layer in report.layers] == [False, True]
    before, after = x @ v["first"], x @ hard.params["first"]
    gain = v["scale"] / jnp.sqrt(v["var"] + 1e-5)
    missing = 2.0 * (jnp.tanh(before) - jnp.tanh(after)) / gain[None]
    target = aim(jax.nn.relu(before), jax.nn.relu(after), v["last"], missing)
    np.testing.assert_allclose(hard.params["last"], target, rtol=2e-3, atol=5e-4)
    errors = {t: relative(network(h.params, x), network(v, x)) for t, (h, _) in found.items()}
    assert errors["block"] < errors["dense"]
    assert errors["block"] == pytest.approx(report.output_error, rel=1e-3)


def test_a_block_whose_shortcut_has_a_layer_of_its_own() -> None:
    """The convolution in the shortcut comes first, and the large one corrects it."""
    block = BasicBlock(4, stride=2, projection=True)
    x = correlated(12, 6, 6, 4)
    variables = block.init(KEY, x)
    rules = [("params/.*conv.*/kernel", SPARSE)]
    hard, report = cx.reconstruct(block, variables, rules, [x])
    assert [(layer.path.split("/")[1], layer.shortcut) for layer in report.layers] == [
        ("conv1", False),
        ("downsample_conv", False),
        ("conv2", True),
    ]
    assert sorted(report.norms) == [f"batch_stats/{n}/mean" for n in ("bn1", "bn2", "downsample_bn")]
    assert report.output_error < relative(
        block.apply(cx.harden(variables, rules, fresh=True).params, x), block.apply(variables, x)
    )


def _folded(v: Any, x: Any) -> Any:
    return BatchNorm().apply(v["norm"], x)


def _linen(v: Any, x: Any) -> Any:
    return nn.BatchNorm(use_running_average=True).apply(v["norm"], x)


def _divided(v: Any, x: Any) -> Any:
    p, s = v["norm"]["params"], v["norm"]["batch_stats"]
    return (x - s["mean"][None]) / jnp.sqrt(s["var"] + 1e-5)[None] * p["scale"][None] + p["bias"][None]


@pytest.mark.parametrize("norm", [_folded, _linen, _divided])
def test_normalisations_keep_the_moments_of_the_dense_network(norm: Any) -> None:
    """Whatever the running statistics were: mean and deviation behind them are as in the dense network."""

    def network(v: Any, x: Any) -> Any:
        return norm(v, x @ v["w"])

    inner = {"params": {"scale": 1 + jnp.abs(drawn(6)), "bias": drawn(6, seed=1)}}
    inner["batch_stats"] = {"mean": drawn(6, seed=3), "var": 0.5 + jnp.abs(drawn(6, seed=4))}
    v = {"norm": inner, "w": drawn(6, 6, seed=2)}
    x = correlated(200, 6)
    hard, report = cx.reconstruct(network, v, [("w", SPARSE)], [x[:100], x[100:]])
    assert report.norms == ("norm/batch_stats/mean",)
    dense, compressed = network(v, x), network(hard.params, x)
    np.testing.assert_allclose(compressed.mean(0), dense.mean(0), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(compressed.std(0), dense.std(0), rtol=1e-3, atol=1e-3)
    # of a projection alike, and an unchanged network keeps its statistics to the bit
    projected = cx.harden(v, [("w", SPARSE)], fresh=True).params
    moved = network(match_statistics(network, v, projected, [x]), x)
    np.testing.assert_allclose(moved.std(0), dense.std(0), rtol=1e-3, atol=1e-3)
    same = match_statistics(network, v, v, [x])
    jax.tree.map(np.testing.assert_array_equal, same, v)
    estimated = match_statistics(network, v, projected, [x], norms="estimate")["norm"]["batch_stats"]
    np.testing.assert_allclose(estimated["mean"], (x @ projected["w"]).mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(estimated["var"], (x @ projected["w"]).var(0), rtol=1e-4, atol=1e-5)


def test_a_normalisation_of_an_empty_filter_stays_finite() -> None:
    def network(v: Any, x: Any) -> Any:
        return _linen(v, x @ v["w"])

    inner = {"params": {"scale": jnp.ones(3), "bias": drawn(3)}}
    inner["batch_stats"] = {"mean": drawn(3, seed=3), "var": jnp.ones(3)}
    v = {"norm": inner, "w": drawn(4, 3)}
    x = correlated(50, 4)
    empty = match_statistics(network, v, {**v, "w": v["w"].at[:, 1].set(0.0)}, [x])
    y = network(empty, x)
    np.testing.assert_allclose(y[:, 1], float(network(v, x)[:, 1].mean()), rtol=1e-2, atol=1e-2)
    assert float(empty["norm"]["batch_stats"]["var"][1]) > 0


def test_a_bias_without_normalisation_takes_the_mean() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.relu(nn.Dense(6, name="one")(x))
            return nn.Dense(6, name="two")(x)

    x = correlated(100, 6) + 1.0
    v = Net().init(KEY, x)
    rules = [("params/.*/kernel", SPARSE)]
    hard, report = cx.reconstruct(Net(), v, rules, [x[:30], x[30:]])
    assert report.biases == ("params/one/bias", "params/two/bias")
    lost = (Net().apply(hard.params, x) - Net().apply(v, x)).mean(0)
    np.testing.assert_allclose(lost, 0.0, atol=1e-5)
    kept, report = cx.reconstruct(Net(), v, rules, [x], norms="keep")
    assert report.biases == () and not kept.params["params"]["one"]["bias"].any()


def test_attention_with_residual_streams() -> None:
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
            return x + nn.Dense(6, name="down")(nn.gelu(nn.Dense(6, name="up")(nn.LayerNorm()(x))))

    x = correlated(16, 5, 6)
    v = Block().init(KEY, x)
    rules = cx.with_axes([("params/.*/kernel", SPARSE)], v, cx.axes_of(Block(), v, x))
    hard, report = cx.reconstruct(Block(), v, rules, [x])
    assert [layer.path.split("/")[-2] for layer in report.layers][-3:] == ["out", "up", "down"]
    assert {layer.path.split("/")[-2]: layer.shortcut for layer in report.layers}["down"]
    projected = cx.harden(v, rules, fresh=True).params
    assert report.output_error < relative(Block().apply(projected, x), Block().apply(v, x))


def test_recurrent_gates_and_stacked_layers() -> None:
    """Leaves inside loops: each has the inputs of the compressed network up to itself, in all steps."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return jnp.tanh(nn.Dense(6)(x)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.RNN(nn.GRUCell(6), name="rnn")(x)[:, -1]
            deep = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return nn.Dense(6, name="last")(deep(name="layers")(x, None)[0])

    x = correlated(60, 4, 6)
    v = Net().init(KEY, x)
    rules = cx.with_axes([("params/.*/kernel", SPARSE)], v, cx.axes_of(Net(), v, x))
    hard, report = cx.reconstruct(Net(), v, rules, [x])
    assert len(report.layers) == 8 and {layer.inputs for layer in report.layers} == {"compressed"}
    stacked = hard.params["params"]["layers"]["Dense_0"]["kernel"]
    assert [int((w != 0).sum()) for w in stacked] == [14, 14]
    projected = cx.harden(v, rules, fresh=True).params
    assert report.output_error < relative(Net().apply(projected, x), Net().apply(v, x))


def test_depthwise_convolutions() -> None:
    """A matrix of nine inputs for each channel."""
    conv = nn.Conv(4, (3, 3), strides=2, padding="VALID", feature_group_count=4)
    x = correlated(30, 7, 7, 4)
    v = conv.init(KEY, x)
    rules = [("params/kernel", SPARSE)]
    hard, report = cx.reconstruct(conv, v, rules, [x[:10], x[10:20], x[20:]])
    assert report.layers[0].weights == (14, 36) and report.biases == ()
    projected = cx.harden(v, rules, fresh=True).params
    assert report.output_error < relative(conv.apply(projected, x), conv.apply(v, x))


def test_joint_rules_shared_leaves_and_tables() -> None:
    def network(v: Any, x: Any) -> Any:
        h = v["table"][x].sum(1)
        h = jnp.tanh(jnp.tanh(h @ v["twice"]) @ v["twice"])
        return jnp.tanh(h @ v["a"]) @ v["b"]

    v = {"table": drawn(10, 6), "twice": drawn(6, 6, seed=1), "a": drawn(6, 6, seed=2), "b": drawn(6, 6, seed=3)}
    x = jnp.asarray(np.random.default_rng(0).integers(0, 10, (80, 4)))
    rules = [("a|b", cx.unstructured(0.5, scope="rule")), ("table|twice", SPARSE)]
    with pytest.raises(CaptureError, match=r"table \(10, 6\): .*gather.*Leave it out by a rule .'table', None"):
        cx.reconstruct(network, v, rules, [x])
    hard, report = cx.reconstruct(network, v, rules, [x[:40], x[40:]], project_rest=True)
    about = {layer.path: layer.inputs for layer in report.layers}
    assert about == {"a": "dense", "b": "dense", "table": "none", "twice": "dense"}
    assert int((hard.params["a"] != 0).sum() + (hard.params["b"] != 0).sum()) == 36
    cx.check(hard, rules)


def test_trees_of_other_libraries() -> None:
    x = correlated(40, 6)
    model = nnx.Sequential(nnx.Linear(6, 6, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(6, 6, rngs=nnx.Rngs(1)))
    state = nnx.state(model)
    hard, report = cx.reconstruct(model, state, [(".*/kernel", SPARSE)], [x])
    assert len(report.layers) == 2 and isinstance(hard.params, nnx.State)
    assert len(report.biases) == 2 and report.agreement is not None

    mlp = eqx.nn.MLP(6, 6, 6, 1, key=KEY)
    network = lambda m, x: jax.vmap(m)(x)
    rules = [(".*/weight", SPARSE)]
    with pytest.raises(ValueError, match="layers/0/weight.*'out in', the rule says nothing.*with_axes"):
        cx.reconstruct(network, mlp, rules, [x])
    said = cx.with_axes(rules, mlp, cx.axes_of(network, mlp, x))
    hard, report = cx.reconstruct(network, mlp, said, [x])
    assert int((hard.params.layers[0].weight != 0).sum()) == 14
    assert callable(hard.params.activation)


@pytest.mark.slow
def test_an_intersection_lies_in_its_sets_to_the_bit() -> None:
    network = lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"]
    v, x = {"a": drawn(8, 8), "b": drawn(8, 2, seed=1)}, correlated(50, 8)
    hard, report = cx.reconstruct(network, v, [(".*", cx.polarize(4) & cx.quantize(3))], [x])
    assert len(hard.structures["a"]) == 2
    assert report.output_error < relative(
        network(cx.harden(v, [(".*", cx.polarize(4) & cx.quantize(3))], fresh=True).params, x), network(v, x)
    )


def test_same_bits_and_progress() -> None:
    network = lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"]
    v, x = {"a": drawn(6, 6), "b": drawn(6, 6, seed=1)}, correlated(50, 6)
    rules = [(".*", SPARSE)]
    seen: list[Any] = []
    one, report = cx.reconstruct(network, v, rules, [x], progress=lambda *about: seen.append(about))
    two, _ = cx.reconstruct(network, v, rules, [x])
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert [(k, n, layer.path) for k, n, layer in seen] == [(1, 2, "a"), (2, 2, "b")]
    assert report.table().splitlines()[1].startswith("a ")


class _Killed(Exception):
    pass


def test_a_call_that_was_killed_continues_with_the_same_bits(tmp_path: Any) -> None:
    network = lambda v, x: jnp.tanh(x @ v["a"] + v["c"][None]) @ v["b"]
    v, x = {"a": drawn(6, 6), "b": drawn(6, 6, seed=1), "c": drawn(6)}, correlated(50, 6)
    rules, file = [("[ab]", SPARSE)], tmp_path / "state.npz"
    whole, report = cx.reconstruct(network, v, rules, [x])
    assert report.biases == ("c",)

    def killed(*about: Any) -> None:
        if about[0] == 2:
            raise _Killed

    with pytest.raises(_Killed):
        cx.reconstruct(network, v, rules, [x], state=file, save_every=0.0, progress=killed)
    times: list[float] = []
    resumed, again = cx.reconstruct(
        network, v, rules, [x], state=file, save_every=0.0, progress=lambda k, n, layer: times.append(layer.seconds)
    )
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    assert [layer._replace(seconds=0) for layer in again.layers] == [
        layer._replace(seconds=0) for layer in report.layers
    ]
    assert again.biases == ("c",) and len(times) == 2
    third, _ = cx.reconstruct(network, v, rules, [x], state=file)  # all of it is in the file
    jax.tree.map(np.testing.assert_array_equal, whole, third)
    for other, given, text in (
        ({**v, "a": v["a"] + 1}, {}, "another network"),
        (v, {"target": "own"}, "another task"),
    ):
        with pytest.raises(StateError, match=text):
            cx.reconstruct(network, other, rules, [x], state=file, **given)
    with pytest.raises(StateError, match="another calibration"):
        cx.reconstruct(network, v, rules, [x + 1], state=file)


def test_bad_input_is_named() -> None:
    network = lambda v, x: jnp.tanh(x @ v["a"]) @ v["b"] + v["c"][None]
    v, x = {"a": drawn(6, 6), "b": drawn(6, 6, seed=1), "c": drawn(6)}, correlated(50, 6)
    rules = [("[ab]", SPARSE)]
    for bad, given, text in (
        ({"target": "all"}, (rules, [x]), "target must be one of block, dense, own, got 'all'"),
        ({"norms": "no"}, (rules, [x]), "norms must be one of"),
        ({}, (rules, []), "no batch of calibration inputs"),
        ({}, (rules, [x.at[3, 1].set(jnp.nan)]), r"a \(6, 6\): its inputs hold NaN or infinite values"),
        ({}, ([("c", SPARSE)], [x]), r"c \(6,\): no product reads it"),
        ({}, ([("a", None)], [x]), "constrain no leaf"),
    ):
        with pytest.raises(ValueError, match=text):
            cx.reconstruct(network, v, *given, **bad)
    with pytest.raises(ValueError, match="a .*NaN or infinite"):
        cx.reconstruct(network, {**v, "a": v["a"].at[0, 0].set(jnp.inf)}, rules, [x])
    with pytest.warns(cx.reconstruction.TooFewRows, match="a .*6 inputs comes from 2 rows"):
        cx.reconstruct(network, v, [("a", SPARSE)], [x[:2]])
