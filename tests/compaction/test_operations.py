"""Operations that move, repeat, mix and order channels: the compact network is the same function, or is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax import lax

from compressx import harden, unstructured
from compressx.compaction import CompactionError, channels, compact, dead, groups
from compressx.constraints import filters
from compressx.tree import paths
from tests.compaction import networks

pytestmark = pytest.mark.filterwarnings("ignore::compressx.compaction.NothingRemoved")  # told in test_transformers
FEW = settings(max_examples=max(6, settings.default.max_examples // 4))
SEEDS = st.integers(0, 2**32 - 1)


def inputs(net, rng, n):
    if net.names[0] == "tokens":
        return jnp.asarray(rng.integers(0, 7, (n, *net.shape)), jnp.int32)
    return jnp.asarray(rng.standard_normal((n, *net.shape)), jnp.float32)


def refused(f, *arguments):
    """The result, and the reason where there is none."""
    try:
        return f(*arguments), ""
    except CompactionError as error:
        return None, str(error)


def agree(net, hard, small, rng):
    """The same outputs for a batch of three, and the shapes of none for a batch of none."""
    x = inputs(net, rng, 3)
    got, reason = refused(jax.jit(small.apply), small.variables, x)
    if got is None:
        assert "inputs of this shape need channels" in reason
        return
    expected = jax.jit(net.apply)(hard, x)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1.0, float(jnp.abs(b).max())))
    if not isinstance(expected, dict):  # the mean over nothing is none
        assert small.apply(small.variables, x[:0]).shape == (0, *expected.shape[1:])


@FEW
@given(SEEDS)
def test_channels_that_are_zero_go_from_any_network_that_keeps_them_zero(seed):
    rng = np.random.default_rng(seed)
    net = networks.network(rng, networks.KEEPS)
    one = inputs(net, rng, 1)
    found = groups(channels(net.apply, net.variables, one))
    hard, gone = networks.emptied(net.variables, found, rng)
    small = compact(net.apply, hard, one)
    agree(net, hard, small, rng)
    sizes = {path: leaf.shape for path, leaf in zip(paths(hard), jax.tree.leaves(small.variables), strict=True)}
    for group, empty in zip(found, gone, strict=True):
        for slot in group.slots:
            if slot.role == "out":  # what nobody reads goes too
                assert sizes[slot.path][slot.axis] <= (~np.isin(slot.units, empty)).sum()


@FEW
@given(SEEDS)
def test_any_network_is_the_same_function_when_it_is_compacted(seed):
    rng = np.random.default_rng(seed)
    net = networks.network(rng, networks.KEEPS | networks.MIXES)
    hard = networks.thinned(net.variables, rng)
    agree(net, hard, compact(net.apply, hard, inputs(net, rng, 1)), rng)


@FEW
@given(SEEDS)
def test_what_no_rule_follows_is_refused_by_name(seed):
    rng = np.random.default_rng(seed)
    net = networks.network(rng, networks.KEEPS | networks.REFUSED)
    hard, one = networks.thinned(net.variables, rng), inputs(net, rng, 1)
    small, reason = refused(compact, net.apply, hard, one)
    if small is None:
        assert "channels pass through the operation" in reason and set(net.names) & set(networks.REFUSED)
    else:
        agree(net, hard, small, rng)


def widths(f, variables, x):
    """Shapes after half of the filters of `a`, and what shifts them, are zero; and that the function is the same."""
    hard = dict(variables)
    for name in ("a", "shift"):
        if name in hard:
            hard[name] = hard[name].at[..., ::2].set(0)
    small = compact(f, hard, x)
    np.testing.assert_allclose(jax.jit(small.apply)(small.variables, x), jax.jit(f)(hard, x), atol=1e-5)
    return {name: leaf.shape for name, leaf in small.variables.items()}


def draw(**shapes):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}


SINGLE = networks.KEEPS


@pytest.mark.parametrize("name", SINGLE)
def test_half_of_the_channels_go_through_each_operation(name):
    f = lambda v, x: jax.nn.relu(SINGLE[name](x @ v["a"]) @ v["b"]) @ v["c"]
    width = jax.eval_shape(SINGLE[name], jax.ShapeDtypeStruct((2, 5, 6), jnp.float32)).shape[-1]
    found = widths(f, draw(a=(3, 6), b=(width, 4), c=(4, 2)), jnp.ones((2, 5, 3)))
    assert found["a"][1] <= 3 and found["b"][0] <= -(-width // 2) + 1


def test_positions_that_depend_on_no_weight_have_no_channels():
    def decoder(v, x):
        at = jnp.tile(jnp.arange(x.shape[1]), (x.shape[0], 1))
        return jax.nn.relu((v["embedding"][x] + v["position"][at]) @ v["up"]) @ v["down"]

    v = draw(embedding=(64, 16), position=(8, 16), up=(16, 32), down=(32, 16))
    v["up"] = v["up"].at[:, 16:].set(0)
    v["embedding"], v["position"] = (v[k].at[:, 3].set(0) for k in ("embedding", "position"))
    x = jnp.ones((2, 8), jnp.int32)
    small = compact(decoder, v, x)
    shapes = {name: leaf.shape for name, leaf in small.variables.items()}
    assert shapes == {"embedding": (64, 15), "position": (8, 15), "up": (15, 16), "down": (16, 16)}
    np.testing.assert_allclose(small.apply(small.variables, x), decoder(v, x), atol=1e-5)


UNTOUCHED = {
    "tiled": lambda x: jnp.tile(x, (1, 1, 2))[..., :3],
    "sorted": lambda x: jnp.sort(x, -1),
    "scanned": lambda x: lax.scan(lambda c, row: (c + row, c), jnp.zeros_like(x[0]), x)[1],
    "looped": lambda x: lax.fori_loop(0, 2, lambda i, s: 0.5 * s, x[:, None])[:, 0],
    "transformed": lambda x: jnp.fft.fft(x).real,
    "random": lambda x: x + jax.random.uniform(jax.random.key(0), x.shape),
    "branched": lambda x: lax.cond(x.sum() > 0, lambda y: y, lambda y: -y, x),
}


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_happens_to_the_input_alone_hinders_nothing(name):
    found = widths(
        lambda v, x: jax.nn.relu(UNTOUCHED[name](x) @ v["a"]) @ v["b"], draw(a=(3, 6), b=(6, 2)), jnp.ones((2, 5, 3))
    )
    assert found == {"a": (3, 3), "b": (3, 2)}


def test_constants_along_channels_are_cut_with_them():
    def f(v, x):
        y = x @ v["a"] * (1.0 + jnp.tile(jnp.arange(3.0), 2))[None]
        return (y + jax.random.normal(jax.random.key(0), (6,))[None] * jnp.sign(y)) @ v["b"]

    assert widths(f, draw(a=(3, 6), b=(6, 2)), jnp.ones((2, 3))) == {"a": (3, 3), "b": (3, 2)}


@pytest.mark.parametrize("mode", ["promise_in_bounds", "clip", "fill"])
@pytest.mark.parametrize("ids", [[0, 2, 2, 5], [5, 4, 1], [0, 1, 2], [1, -1], [3, 9]])
def test_channels_taken_by_constant_indices_are_followed(mode, ids):
    if mode == "promise_in_bounds" and max(ids) > 5:
        pytest.skip("a broken promise")
    f = lambda v, x: jnp.nan_to_num((x @ v["a"]).at[:, np.array(ids)].get(mode=mode), nan=1.5) @ v["b"]
    v = draw(a=(3, 6), b=(len(ids), 2))
    v["a"] = v["a"].at[:, jnp.array([0, 5])].set(0)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)
    small = compact(f, v, x)
    np.testing.assert_allclose(small.apply(small.variables, x), f(v, x), atol=1e-5)
    if 0 <= min(ids) and max(ids) < 6:
        live = sorted({k for k in ids if k not in (0, 5)})
        assert small.variables["a"].shape[1] == max(1, len(live))


def test_a_row_that_the_input_picks_keeps_zero_channels_zero():
    def f(v, x):
        y = x @ v["a"]
        row = lax.dynamic_slice_in_dim(y, jnp.argmax(x.sum((0, 2))), 1, 1)
        return (row * y + y[:, jnp.argmax(x[0, :, 0])][:, None]) @ v["b"]

    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 3)), jnp.float32)
    assert widths(f, draw(a=(3, 6), b=(6, 2)), x) == {"a": (3, 3), "b": (3, 2)}


def test_reasons_name_the_operation_that_keeps_channels_whole():
    f = lambda v, x: jnp.sort(x @ v["a"], -1) @ v["b"]
    found = channels(f, draw(a=(3, 6), b=(6, 2)), jnp.ones((2, 3)))
    assert set(found.reasons.values()) & {"sort orders along it"}


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.lists(st.integers(0, 3), min_size=1, max_size=4))
@example([2, 0, 3], [0, 6])
def test_inputs_that_hold_nothing_are_refused_by_name(a, b):
    shape = (2, *a, 3)
    if 0 not in shape:
        return
    with pytest.raises(CompactionError, match="hold nothing"):
        dead(lambda v, x: x @ v["a"], draw(a=(3, 6)), jnp.ones(shape))


def test_hardened_networks_with_stacks_and_tiles_lose_their_filters():
    def f(v, x):
        y = jnp.stack([y := x @ v["a"], 2 * y]).sum(0)
        return jnp.tile(jax.nn.relu(y) @ v["b"], (1, 2)) @ v["c"]

    v = draw(a=(3, 8), b=(8, 4), c=(8, 2))
    hard = harden(v, [("a", filters(0.5)), ("b", unstructured(0.5))], fresh=True).params
    small = compact(f, hard, jnp.ones((1, 3)))
    assert small.variables["a"].shape == (3, 4) and small.variables["b"].shape[0] == 4
    x = jnp.asarray(np.random.default_rng(1).standard_normal((5, 3)), jnp.float32)
    np.testing.assert_allclose(small.apply(small.variables, x), f(hard, x), atol=1e-5)
