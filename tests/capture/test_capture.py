"""Gram matrices of every kind of layer, against loops in NumPy that know nothing of the program."""

import itertools
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from numpy.typing import NDArray

from compressx.capture import RANGES, CaptureError, Gram, StateError, capture

Array = NDArray[Any]
KEY = jax.random.key(0)


def drawn(*shape: int, seed: int = 0) -> Any:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def same(gram: Gram, groups: list[Array]) -> None:
    """A Gram matrix equals that of these inputs `[rows, P]`, one for each group."""
    assert gram.h.dtype == np.float64 and gram.rows == len(groups[0])
    for h, mean, x in zip(gram.h, gram.mean, groups, strict=True):
        x = np.asarray(x, np.float64)
        np.testing.assert_allclose(h, x.T @ x / len(x), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5, atol=1e-5)


def grams(model: Any, variables: Any, x: Any, **more: Any) -> dict[str, Gram]:
    """In two batches, the second smaller."""
    n = x.shape[0]
    return capture(model, variables, [x[: n - 1], x[n - 1 :]], **more)


def patches(x: Array, taps: Any, strides: Any, pads: Any, dilation: Any = (1, 1)) -> Array:
    """`[n, h, w, c]` -> `[n * oh * ow, kh * kw * c]`, one entry at a time."""
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    out = [(padded.shape[a + 1] - (taps[a] - 1) * dilation[a] - 1) // strides[a] + 1 for a in range(2)]
    rows = []
    for n, i, j in itertools.product(range(len(x)), range(out[0]), range(out[1])):
        row = [
            padded[n, i * strides[0] + a * dilation[0], j * strides[1] + b * dilation[1]]
            for a in range(taps[0])
            for b in range(taps[1])
        ]
        rows.append(np.concatenate(row))
    return np.stack(rows)


def test_dense_layers_and_what_multiplies_nothing() -> None:
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            x = nn.LayerNorm()(nn.relu(nn.Dense(5)(x)))
            return nn.Dense(3)(x)

    x = drawn(4, 6)
    variables = Net().init(KEY, x)
    found = grams(Net(), variables, x)
    assert sorted(found) == ["params/Dense_0/kernel", "params/Dense_1/kernel"]
    same(found["params/Dense_0/kernel"], [np.asarray(x)])
    inner = variables["params"]["Dense_0"]
    hidden = nn.relu(x @ inner["kernel"])  # the bias is 0
    hidden = nn.LayerNorm().apply({"params": variables["params"]["LayerNorm_0"]}, hidden)
    same(found["params/Dense_1/kernel"], [np.asarray(hidden)])
    for path in ("params/Dense_0/bias", "params/LayerNorm_0/scale"):
        with pytest.raises(CaptureError, match=f"{path}.*no product reads it"):
            capture(Net(), variables, [x], [path])
    with pytest.raises(CaptureError, match="'nothing': the network has no such leaf"):
        capture(Net(), variables, [x], ["nothing"])


@pytest.mark.parametrize("strides", [(1, 1), (2, 1)])
@pytest.mark.parametrize("padding", ["SAME", "VALID", [(0, 2), (1, 0)]])
@pytest.mark.parametrize("dilation", [1, 2])
def test_convolutions(strides: Any, padding: Any, dilation: int) -> None:
    conv = nn.Conv(4, (3, 2), strides=strides, padding=padding, kernel_dilation=dilation)
    x = drawn(3, 7, 6, 2)
    found = grams(conv, conv.init(KEY, x), x)["params/kernel"]
    pads = (
        lax.padtype_to_pads((7, 6), [(3 - 1) * dilation + 1, dilation + 1], strides, padding)
        if isinstance(padding, str)
        else padding
    )
    same(found, [patches(np.asarray(x), (3, 2), strides, pads, (dilation, dilation))])


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_and_depthwise_convolutions(groups: int) -> None:
    conv = nn.Conv(8, (3, 3), padding="VALID", feature_group_count=groups)
    x = drawn(2, 5, 5, 4)
    found = grams(conv, conv.init(KEY, x), x)["params/kernel"]
    cut = np.split(np.asarray(x), groups, axis=-1)
    same(found, [patches(part, (3, 3), (1, 1), ((0, 0), (0, 0))) for part in cut])


def test_transposed_convolution() -> None:
    conv = nn.ConvTranspose(3, (2, 2), strides=(2, 2), padding="VALID")
    x = drawn(2, 3, 3, 2)
    variables = conv.init(KEY, x)
    spread = np.zeros((2, 5, 5, 2))
    spread[:, ::2, ::2] = x
    rows = patches(spread, (2, 2), (1, 1), ((1, 1), (1, 1)))
    same(grams(conv, variables, x)["params/kernel"], [rows])


def test_convolution_over_one_axis_of_another_layout() -> None:
    conv = eqx.nn.Conv1d(2, 3, 3, key=KEY)
    x = drawn(4, 2, 6)
    found = grams(lambda model, x: jax.vmap(model)(x), conv, x)["weight"]
    moved = np.asarray(x).transpose(0, 2, 1)[:, :, None]
    same(found, [patches(moved, (3, 1), (1, 1), ((0, 0), (0, 0)))])


def test_attention() -> None:
    attention = nn.MultiHeadDotProductAttention(num_heads=2)
    x = drawn(3, 5, 8)
    variables = attention.init(KEY, x)
    found = grams(attention, variables, x)
    for name in ("query", "key", "value"):
        same(found[f"params/{name}/kernel"], [np.asarray(x).reshape(-1, 8)])
    q, k, v = (np.einsum("btd,dhk->bthk", x, variables["params"][name]["kernel"]) for name in ("query", "key", "value"))
    scores = np.einsum("bthk,bshk->bhts", q, k) / 2.0
    shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    mixed = np.einsum("bhts,bshk->bthk", shares, v)
    same(found["params/out/kernel"], [mixed.reshape(-1, 8)])


def test_einsums_with_the_weight_on_either_side_and_experts() -> None:
    def network(w: Any, x: Any) -> Any:
        heads = jnp.einsum("dhk,btd->bthk", w["query"], x)
        return jnp.einsum("bthk,hkd->bthd", heads, w["experts"])

    w, x = {"query": drawn(8, 2, 4), "experts": drawn(2, 4, 8, seed=1)}, drawn(3, 5, 8, seed=2)
    found = grams(network, w, x)
    same(found["query"], [np.asarray(x).reshape(-1, 8)])
    heads = np.einsum("dhk,btd->bthk", w["query"], x)
    same(found["experts"], [heads[:, :, h].reshape(-1, 4) for h in range(2)])


def test_gates_that_are_joined_on_the_way_to_the_product() -> None:
    """A GRU that joins its kernels, in a loop over time: every gate sees all steps."""

    def network(w: Any, x: Any) -> Any:
        inputs = x @ jnp.concatenate([w["wz"], w["wh"]], axis=1)

        def step(h: Any, given: Any) -> Any:
            z, c = jnp.split(given + h @ jnp.concatenate([w["uz"], w["uh"]], axis=1), 2, axis=-1)
            z = jax.nn.sigmoid(z)
            h = z * h + (1 - z) * jnp.tanh(c)
            return h, h

        return lax.scan(step, jnp.zeros((x.shape[1], 4)), inputs)[0]

    w = {
        n: drawn(*s, seed=k)
        for k, (n, s) in enumerate({"wz": (3, 4), "wh": (3, 4), "uz": (4, 4), "uh": (4, 4)}.items())
    }
    x = drawn(6, 2, 3, seed=9)
    found = capture(network, w, [x])
    h, states = np.zeros((2, 4)), []
    for t in range(6):
        states.append(h)
        z = 1 / (1 + np.exp(-(x[t] @ w["wz"] + h @ w["uz"])))
        h = z * h + (1 - z) * np.tanh(x[t] @ w["wh"] + h @ w["uh"])
    for name in ("wz", "wh"):
        same(found[name], [np.asarray(x).reshape(-1, 3)])
    for name in ("uz", "uh"):
        same(found[name], [np.concatenate(states)])


def test_flax_gru_and_stacked_layers() -> None:
    """`nn.RNN` around a cell, and a stack of layers in `nn.scan`, which has a matrix for each layer."""
    rnn = nn.RNN(nn.GRUCell(4))
    x = drawn(2, 5, 3)
    variables = rnn.init(KEY, x)
    found = grams(rnn, variables, x)
    outputs = np.asarray(rnn.apply(variables, x))
    before = np.concatenate([np.zeros((2, 1, 4)), outputs[:, :-1]], axis=1)
    same(found["params/cell/hr/kernel"], [before.reshape(-1, 4)])
    same(found["params/cell/in/kernel"], [np.asarray(x).reshape(-1, 3)])

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x: Any, _: Any) -> Any:
            return jnp.tanh(nn.Dense(4)(x)), None

    class Deep(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return stack(name="layers")(x, None)[0]

    x = drawn(5, 4)
    variables = Deep().init(KEY, x)
    dense, seen, h = variables["params"]["layers"]["Dense_0"], [], np.asarray(x)
    for k in range(3):
        seen.append(h)
        h = np.tanh(h @ np.asarray(dense["kernel"][k]))  # the bias is 0
    same(grams(Deep(), variables, x)["params/layers/Dense_0/kernel"], seen)


def test_nested_loops() -> None:
    """Layers that are stacked in one loop, each run over time in another."""

    def network(w: Any, x: Any) -> Any:
        def layer(x: Any, u: Any) -> Any:
            def step(h: Any, given: Any) -> Any:
                h = jnp.tanh(given + h @ u)
                return h, h

            return lax.scan(step, jnp.zeros(x.shape[1:]), x @ w["shared"])[1], None

        return lax.scan(layer, x, w["stacked"])[0]

    w, x = {"shared": drawn(3, 3), "stacked": drawn(2, 3, 3, seed=1)}, drawn(4, 2, 3, seed=2)
    found = capture(network, w, [x])
    seen: list[Any] = [[], []]
    inputs, y = [], np.asarray(x)
    for k in range(2):
        inputs.append(y.reshape(-1, 3))
        h, out = np.zeros((2, 3)), []
        for t in range(4):
            seen[k].append(h)
            h = np.tanh(y[t] @ w["shared"] + h @ w["stacked"][k])
            out.append(h)
        y = np.stack(out)
    same(found["stacked"], [np.concatenate(s) for s in seen])
    same(found["shared"], [np.concatenate(inputs)])


def test_other_trees() -> None:
    x = drawn(3, 4)
    model = nnx.Linear(4, 2, rngs=nnx.Rngs(0))
    same(grams(model, nnx.state(model), x)["kernel"], [np.asarray(x)])
    linear = eqx.nn.Linear(4, 2, key=KEY)
    same(grams(lambda m, x: jax.vmap(m)(x), linear, x)["weight"], [np.asarray(x)])


def test_a_leaf_that_is_used_twice() -> None:
    """In one way: the rows of both. In two ways, or in parts: refused by name."""
    w, x = {"a": drawn(3, 3)}, drawn(4, 3, seed=1)
    twice = grams(lambda w, x: jnp.tanh(x @ w["a"]) @ w["a"], w, x)["a"]
    same(twice, [np.concatenate([x, np.tanh(x @ w["a"])])])
    for network, why in (
        (lambda w, x: jnp.tanh(x @ w["a"]) @ w["a"].T, "used in ways that differ"),
        (lambda w, x: x[:, :2] @ w["a"][:2], "2 of its 3 inputs"),
        (lambda w, x: x @ jnp.tanh(w["a"]), "passes through `tanh`"),
        (lambda w, x: x @ (w["a"] @ w["a"]), "two weights"),
    ):
        with pytest.raises(CaptureError, match=f"a .*{why}"):
            capture(network, w, [x], ["a"])


def test_a_leaf_behind_casts_and_a_factor() -> None:
    w, x = {"a": drawn(3, 2)}, drawn(4, 3, seed=1)
    found = grams(lambda w, x: x.astype(jnp.bfloat16) @ (w["a"] * 0.5).astype(jnp.bfloat16), w, x)["a"]
    same(found, [np.asarray(x.astype(jnp.bfloat16), np.float32)])


def test_many_rows_are_summed_in_double_precision() -> None:
    """Inputs far from zero, of which float32 sums would keep five digits."""
    x = 100.0 + drawn(200_000, 2)
    gram = capture(lambda w, x: x @ w, jnp.ones((2, 1)), [x[:150_000], x[150_000:]])
    exact = np.asarray(x, np.float64)
    centred = gram[""].h[0] - np.outer(gram[""].mean[0], gram[""].mean[0])
    np.testing.assert_allclose(centred, np.cov(exact.T, bias=True), rtol=0.02, atol=0.02)


def test_ranges() -> None:
    x = drawn(3, 4)
    found = capture(lambda w, x: x @ w["a"], {"a": drawn(4, 2)}, [x], observer=RANGES)["a"]
    assert found.low == x.min() and found.high == x.max()


def test_bad_input_is_named() -> None:
    w, x = {"a": drawn(3, 3), "b": drawn(3, 3)}, drawn(2, 3)
    with pytest.raises(CaptureError, match="no batch"):
        capture(lambda w, x: x @ w["a"], w, [])
    with pytest.raises(CaptureError, match="batch 2: its inputs hold NaN"):
        capture(lambda w, x: x @ w["a"], w, [x, x.at[0].set(jnp.nan)])
    with pytest.raises(CaptureError, match=r"b \(3, 3\): its inputs hold NaN or infinite values in batch 2"):
        capture(lambda w, x: jnp.log(x @ w["a"]) @ w["b"], {**w, "a": jnp.eye(3)}, [jnp.abs(x), -jnp.abs(x)])
    with pytest.raises(CaptureError, match="a .*max_bytes is 10"):
        capture(lambda w, x: x @ w["a"], w, [x], max_bytes=10)


def test_bounded_memory_takes_several_passes_and_gives_the_same() -> None:
    w, x = {"a": drawn(3, 3), "b": drawn(3, 3, seed=1)}, drawn(4, 3, seed=2)
    network = lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]
    seen: list[tuple[int, int]] = []
    one = capture(network, w, [x[:2], x[2:]])
    two = capture(network, w, [x[:2], x[2:]], max_bytes=120, progress=lambda k, group: seen.append((k, group)))
    assert seen == [(1, 0), (2, 0), (1, 1), (2, 1)]
    for name in w:
        np.testing.assert_array_equal(one[name].h, two[name].h)
    with pytest.raises(CaptureError, match="2 passes"):
        capture(network, w, iter([x[:2], x[2:]]), max_bytes=120)


def test_two_devices_give_what_one_gives() -> None:
    """Inputs that are sharded over two devices are summed over both."""
    conv = nn.Conv(4, (3, 3), strides=2)
    x = drawn(6, 8, 8, 3)
    variables = conv.init(KEY, x)
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    split = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    one, two = (capture(conv, variables, [given])["params/kernel"] for given in (x, split))
    np.testing.assert_allclose(one.h, two.h, rtol=1e-6, atol=1e-6)
    assert one.rows == two.rows == 6 * 16


class _Killed(Exception):
    pass


def test_resumes_after_a_kill_and_refuses_what_is_another(tmp_path: Any) -> None:
    w = {"a": drawn(3, 3), "b": drawn(3, 3, seed=1)}
    batches = [drawn(2, 3, seed=k) for k in range(5)]
    network = lambda w, x: jnp.tanh(x @ w["a"]) @ w["b"]
    whole = capture(network, w, batches, max_bytes=120)
    file, steps = tmp_path / "state.npz", []

    def killed(k: int, group: int) -> None:
        steps.append((k, group))
        if len(steps) == 7:
            raise _Killed

    with pytest.raises(_Killed):
        capture(network, w, batches, max_bytes=120, state=file, save_every=0.0, progress=killed)
    more: list[tuple[int, int]] = []
    resumed = capture(
        network, w, batches, max_bytes=120, state=file, save_every=0.0, progress=lambda *k: more.append(k)
    )
    assert more == [(2, 1), (3, 1), (4, 1), (5, 1)]  # the step in which it was killed is done again
    for name in w:
        np.testing.assert_array_equal(whole[name].h, resumed[name].h)
    with pytest.raises(StateError, match="another network"):
        capture(network, {**w, "b": w["b"] + 1}, batches, max_bytes=120, state=file)
    with pytest.raises(StateError, match="other batches"):
        capture(network, w, batches[::-1], max_bytes=120, state=file)
    with pytest.raises(StateError, match="holds 5 batches, 2 were given"):
        capture(network, w, batches[:2], max_bytes=120, state=file)
    with pytest.raises(StateError, match="another choice of leaves"):
        capture(network, w, batches, ["a"], max_bytes=120, state=file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(StateError, match="no readable state"):
        capture(network, w, batches, max_bytes=120, state=file)
