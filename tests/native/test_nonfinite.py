"""NaN and infinities in training's convolutions and their gradients: sums over the pairs of pixels that exist.

A case is drawn from a seed, which a failure prints. XLA's own convolution multiplies with the zeros around an image, so
that NaN in a kernel or a cotangent spreads there too: it is the oracle for NaN in images, and for padding that is none.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from compressx.native import conv as native
from compressx.native import convolve
from compressx.native import depthwise as native_depthwise
from experiments.common.models import layers

budget = settings.default.max_examples
few = settings(max_examples=budget if budget > 40 else 8)
ODD = np.array([np.nan, np.inf, -np.inf], np.float32)


def needs_kernel():
    if jax.default_backend() != "cpu" or not (native.available() and native_depthwise.available()):
        pytest.skip("the compiled kernel needs a CPU and a C++ compiler")


def spoiled(rng, shape, share):
    x = rng.standard_normal(shape).astype(np.float32)
    for _ in range(rng.integers(1, 4) if rng.random() < share else 0):
        x[tuple(int(rng.choice([0, n - 1, rng.integers(n)])) for n in shape)] = rng.choice(ODD)
    return x


def same(got, expected, about=""):
    got, expected = np.asarray(got), np.asarray(expected)
    odd, right = np.isnan(got), np.isnan(expected)
    assert (odd == right).all(), f"{about}: NaN at {np.argwhere(odd)[:6]}, right at {np.argwhere(right)[:6]}"
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3, err_msg=about)


@np.errstate(invalid="ignore")
def pairs(x, w, g, stride, pads, depthwise):
    """The convolution, and its gradients for cotangents g, one pair of pixels after another."""
    (n, h, wide, _), (kh, kw) = x.shape, w.shape[:2]
    y, dx, dw = np.zeros(g.shape), np.zeros(x.shape), np.zeros(w.shape)
    x, w, g = (a.astype(np.float64) for a in (x, w, g))
    for oy, ox, i, j in np.ndindex(*g.shape[1:3], kh, kw):
        iy, ix = stride * oy + i - pads[0][0], stride * ox + j - pads[1][0]
        if not (0 <= iy < h and 0 <= ix < wide):
            continue
        for b in range(n):
            a, c = x[b, iy, ix], g[b, oy, ox]
            if depthwise:
                y[b, oy, ox] += a * w[i, j, 0]
                dx[b, iy, ix] += c * w[i, j, 0]
                dw[i, j, 0] += a * c
            else:
                y[b, oy, ox] += (a[:, None] * w[i, j]).sum(axis=0)
                dx[b, iy, ix] += (c[None] * w[i, j]).sum(axis=1)
                dw[i, j] += a[:, None] * c[None]
    return y, dx, dw


def check_training_convolution(seed):
    rng = np.random.default_rng(seed)
    depthwise = bool(rng.random() < 0.3)
    kh, kw = [(1, 1), (3, 3), (3, 3), (5, 4), (2, 3)][rng.integers(5)]
    stride, channels = int(rng.integers(1, 4)), int(rng.choice([1, 2, 3, 8, 17]))
    pads = tuple(tuple(int(v) for v in rng.integers(0, k, 2)) for k in (kh, kw))
    if rng.random() < 0.3:
        pads = ((0, 0), (0, 0))
    size = tuple(int(v) for v in rng.integers(max(kh, kw), max(kh, kw) + 6, 2))
    shape = (int(rng.integers(1, 4)), *size, channels)
    kernel = (kh, kw, 1, channels) if depthwise else (kh, kw, channels, int(rng.choice([1, 3, 8, 19, 33])))
    conv = native_depthwise.conv if depthwise else native.conv
    f = jax.jit(lambda x, w, g: (lambda y, pull: (y, *pull(g)))(*jax.vjp(lambda x, w: conv(x, w, stride, pads), x, w)))
    dense = lambda x, w: lax.conv_general_dilated(
        *(x, w, (stride, stride), pads),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=channels if depthwise else 1,
    )
    out = jax.eval_shape(dense, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in (shape, kernel))).shape
    for share in ((0.9, 0.0, 0.0), (0.0, 0.9, 0.0), (0.0, 0.0, 0.9), (0.5, 0.3, 0.5)):
        x, w, g = (spoiled(rng, s, q) for s, q in zip((shape, kernel, out), share, strict=True))
        found = f(*map(jnp.asarray, (x, w, g)))
        for name, a, b in zip(("y", "dx", "dw"), found, pairs(x, w, g, stride, pads, depthwise), strict=True):
            same(a, b, f"{name} {share}")
        if np.isfinite(w).all():
            same(found[0], dense(jnp.asarray(x), jnp.asarray(w)), "y, XLA")


@few
@given(st.integers(0, 2**32 - 1))
def test_convolutions_and_gradients_spread_what_their_pairs_have(seed):
    needs_kernel()
    check_training_convolution(seed)


@pytest.mark.parametrize(("window", "strides", "padding"), [((2, 2), None, "VALID"), ((3, 3), (2, 2), "SAME")])
def test_pooling_keeps_nan_and_infinities(window, strides, padding):
    for seed in range(20):
        x = jnp.asarray(spoiled(np.random.default_rng(seed), (2, 6, 8, 3), 1.0))
        with convolve.lax_only():
            expected = layers.max_pool(x, window, strides, padding)
        same(layers.max_pool(x, window, strides, padding), expected)
