"""What becomes part of a convolution computes the same as before, and all becomes part that can."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from compressx import kernels
from compressx.kernels import graph
from compressx.trace import trace
from experiments.common import models
from tests.kernels import chains

V, X = jax.tree.map(jnp.asarray, chains.variables()), chains.inputs()


def same(case, got, expected, tolerance=1e-5):
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True, err_msg=str(case))


def check(*case):
    f = chains.function(*case)
    same(case, chains.evaluate(f, V, X), f(V, jnp.asarray(X)))


@given(st.sampled_from(list(chains.LAYERS)), st.lists(st.sampled_from(list(chains.OPERATIONS)), min_size=1, max_size=4))
@example("point", ["relu", "+ x", "min 6"])
@example("conv", ["relu", "conv +", "min 6"])
@example("conv", ["relu", "pool far", "v *"])
def test_any_chain_behind_any_layer_computes_the_same(layer, chain):
    check(layer, tuple(chain))


def test_every_pair_of_the_operations_that_are_folded_computes_the_same():
    for chain in chains.chains(2):
        check("conv", chain)


@pytest.mark.slow
def test_every_chain_of_up_to_four_computes_the_same():
    for number, chain in enumerate(chains.chains(4)):
        if number % 500 == 0:
            jax.clear_caches()
        check("conv", chain)


def compiled(path, seed, count):
    """Many chains in one program; the seed in the message says which."""
    rng = np.random.default_rng(seed)
    cases = [("point", ("relu", "+ x", "min 6")), *(chains.sampled(rng, 4) for _ in range(count))]
    f = chains.together(cases)
    got, expected = kernels.compile(f, V, path=path)(X), jax.jit(f)(V, X)
    for case, a, b in zip(cases, got, expected, strict=True):
        same(f"seed {seed}: {case}", a, b)


@pytest.mark.parametrize("path", [None, "xla", "pallas"])
def test_compiled_chains_compute_the_same(path):
    compiled(path, 0, 16)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_many_compiled_chains_compute_the_same(seed):
    for path in (None, "xla"):
        compiled(path, seed, 100)


FOLLOWS = {
    "+ v": "+ v",
    "- v": "- v",
    "* v": "* v",
    "/ v": "/ v",
    "+ r": "+ x",
    "max 0": "relu",
    "min 6": "min 6",
    "max 0.1 y": "leaky",
}
FORMS = {
    "y": (),
    "y + r": ("+ x",),
    "relu(y)": ("relu",),
    "relu(y + r)": ("+ x", "relu"),
    "relu6(y)": ("relu", "min 6"),
    "relu6(y + r)": ("+ x", "relu", "min 6"),
    "leaky(y)": ("leaky",),
    "leaky(y + r)": ("+ x", "leaky"),
    "relu(y) + r": ("relu", "+ x"),
    "relu6(y) + r": ("relu", "min 6", "+ x"),
    "leaky(y) + r": ("leaky", "+ x"),
}


@pytest.mark.parametrize("follows", FOLLOWS)
@pytest.mark.parametrize("form", FORMS)
def test_an_operation_is_folded_where_the_table_has_a_row_and_nowhere_else(form, follows):
    f = chains.function("conv", (*FORMS[form], FOLLOWS[follows]))
    (conv,) = (s for s in graph.steps(trace(f, V, X), V)[0] if isinstance(s, graph.Conv))
    assert graph.form(conv) == graph.RULES.get((form, follows), form)
    more = 0 if (form, follows) not in graph.RULES else 2 if follows == "max 0.1 y" else 1
    assert chains.folded(f, V, X) == chains.folded(chains.function("conv", FORMS[form]), V, X) + more
    check("conv", (*FORMS[form], FOLLOWS[follows]))


def test_every_form_in_the_table_is_one_that_a_convolution_can_have():
    assert {form for form, _ in graph.RULES} | set(graph.RULES.values()) == set(FORMS)
    assert {follows for _, follows in graph.RULES} == set(FOLLOWS)


# Operations that convolutions take in, by network: as many as before the rules became a table.
FOLDED = {
    "digits_cnn": ((8, 8, 1), {}, 4),
    "lenet_300_100": ((28, 28, 1), {}, 0),
    "lenet5": ((28, 28, 1), {}, 4),
    "lenet5_caffe": ((28, 28, 1), {}, 2),
    "vgg16": ((32, 32, 3), {"width": 0.0625}, 39),
    "resnet20": ((16, 16, 3), {"width": 0.25}, 66),
    "resnet18": ((32, 32, 3), {"width": 0.0625}, 65),
    "mobilenet_v2": ((32, 32, 3), {"width": 0.25}, 185),
}
MORE_FOLDED = {
    "resnet32": ((16, 16, 3), {"width": 0.25}, 108),
    "resnet56": ((16, 16, 3), {"width": 0.25}, 192),
    "resnet50": ((64, 64, 3), {"width": 0.0625}, 171),
    "darknet53": ((32, 32, 3), {"width": 0.0625}, 231),
    "yolov3": ((64, 64, 3), {"width": 0.0625}, 314),
}


def count(name, shape, options):
    model, x = models.build(name, 10, **options), jnp.zeros((1, *shape))
    rng, spec = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0), x)
    variables = jax.tree.map(lambda s: jnp.asarray(rng.uniform(0.5, 1.5, s.shape), s.dtype), spec)
    return chains.folded(lambda v, x: model.apply(v, x, train=False), variables, x)


@pytest.mark.parametrize("name", FOLDED)
def test_networks_are_folded_as_far_as_ever(name):
    shape, options, expected = FOLDED[name]
    assert count(name, shape, options) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE_FOLDED)
def test_large_networks_are_folded_as_far_as_ever(name):
    shape, options, expected = MORE_FOLDED[name]
    assert count(name, shape, options) == expected


EXTREMES = st.lists(
    st.tuples(st.sampled_from("+-*/"), st.sampled_from([-120, -90, -60, -30, -1, 0, 1, 24, 60, 90, 120])),
    min_size=1,
    max_size=4,
)


@given(EXTREMES, st.sampled_from([-100, -30, 0, 30]))
@example([("+", -60), ("-", -60)], -100)
@example([("+", 24), ("-", 24)], 0)
@example([("*", -90), ("*", 90)], 0)
@example([("*", 120), ("*", -120)], 30)
def test_numbers_near_the_ends_of_the_range_are_not_moved_where_that_changes_the_result(chain, size):
    """Powers of two, so that every result is exact unless it is rounded away, too large or too small."""
    arithmetic = {"+": jnp.add, "-": jnp.subtract, "*": jnp.multiply, "/": jnp.divide}

    def f(v, x):
        y = chains.LAYERS["point"](x, chains.State(v, x, x))
        for sign, power in chain:
            y = arithmetic[sign](y, jnp.float32(2.0**power))
        return (y,)

    v = {**V, "point": V["point"] * jnp.float32(2.0**size)}
    expected = np.asarray(f(v, jnp.asarray(X))[0])
    got = np.asarray(chains.evaluate(f, v, X)[0])
    scale = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6 * scale + 1e-37)
