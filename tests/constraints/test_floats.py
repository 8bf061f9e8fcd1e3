"""Numbers by their bits: against NumPy, which neither flushes denormals nor rounds where it need not."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from compressx.constraints import floats

EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-40, -1e-40, 1.1754942e-38, 1.1754944e-38, -1.2e-38, 1.0, -1.5, 3.4028235e38]
_ALL = (floats.nonzero, floats.negative, floats.differ, floats.bits, floats.lift, floats.scale)
JITTED = {f: jax.jit(f) for f in _ALL}
anything = st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from(EDGES))


@pytest.mark.parametrize("compiled", [False, True])
@hypothesis.given(values=st.lists(anything, min_size=1, max_size=12), data=st.data())
def test_zeros_signs_and_changes_are_read_from_the_bits(compiled, values, data):
    def run(function):
        return JITTED[function] if compiled else function

    x = np.array(values, np.float32)
    y = np.array(data.draw(st.lists(anything, min_size=x.size, max_size=x.size)), np.float32)
    y = np.where(data.draw(st.booleans()), np.where(np.arange(x.size) % 2 == 0, x, y), y).astype(np.float32)
    np.testing.assert_array_equal(run(floats.nonzero)(x), x != 0)
    np.testing.assert_array_equal(run(floats.negative)(x), x < 0)
    np.testing.assert_array_equal(run(floats.differ)(x, y), x != y)
    order = np.argsort(np.abs(x), kind="stable")
    np.testing.assert_array_equal(np.argsort(np.asarray(run(floats.bits)(x)), kind="stable"), order)


@pytest.mark.parametrize("compiled", [False, True])
@hypothesis.given(
    values=st.lists(anything, min_size=6, max_size=6), n=st.lists(st.integers(-300, 300), min_size=6, max_size=6)
)
def test_scaling_is_ldexp_and_exponents_are_frexp(compiled, values, n):
    x, n = np.array(values, np.float32), np.array(n, np.int32)
    scale = JITTED[floats.scale] if compiled else floats.scale
    with np.errstate(over="ignore", under="ignore"):
        want = np.ldexp(x.astype(np.float64), n).astype(np.float32)  # float64 holds every one of these products
    got = np.asarray(scale(x, n))
    np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    near, m = np.asarray(JITTED[floats.lift](x, np.clip(n, -250, 250))), np.clip(n, -250, 250)
    with np.errstate(over="ignore", under="ignore"):
        want = np.ldexp(x.astype(np.float64), m).astype(np.float32)
    tiny = np.abs(want) < np.finfo(np.float32).tiny
    np.testing.assert_array_equal(near[~tiny], want[~tiny])
    assert (np.abs(near[tiny]) < np.finfo(np.float32).tiny).all()
    finite = np.where(np.isfinite(x), x, np.float32(1))
    top = np.abs(finite).max()
    assert int(floats.exponent(finite)) == (np.frexp(np.float64(top))[1] if top else -149)


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_narrow_dtypes_are_taken_whole(dtype):
    size = np.dtype(dtype).itemsize
    x = np.arange(256**size, dtype=f"uint{8 * size}").view(dtype)
    exact = x.astype(np.float32)
    finite = np.isfinite(exact)
    for function in (lambda f: f, jax.jit):
        np.testing.assert_array_equal(np.asarray(function(floats.nonzero)(x))[finite], exact[finite] != 0)
        np.testing.assert_array_equal(np.asarray(function(floats.negative)(x))[finite], exact[finite] < 0)
        back = np.asarray(function(lambda v: floats.scale(v, jnp.int32(0)))(x))
        np.testing.assert_array_equal(back[finite].view(np.uint32), exact[finite].view(np.uint32))


def test_float64_has_the_same_rules():
    with jax.enable_x64(True):
        x = np.array([0.0, 5e-324, -1e-310, 2.3e-308, 1.0, -1e300, np.inf])
        assert jnp.asarray(x).dtype == np.float64
        np.testing.assert_array_equal(jax.jit(floats.nonzero)(x), x != 0)
        np.testing.assert_array_equal(jax.jit(floats.negative)(x), x < 0)
        for n in (-1100, -60, 0, 40, 1100):
            with np.errstate(over="ignore", under="ignore"):
                want = np.ldexp(x, n)
            np.testing.assert_array_equal(np.asarray(jax.jit(floats.scale)(x, np.int32(n))), want)
        assert [int(floats.exponent(v)) for v in x[1:-1]] == [np.frexp(v)[1] for v in x[1:-1]]


def test_scaling_has_its_gradient():
    x = jnp.asarray([1.5, -2.0, 0.0])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(floats.scale(x, jnp.int32(-3))))(x), np.full(3, 0.125))
