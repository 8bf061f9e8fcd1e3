"""NaN and infinities: every path of every kernel against sums over the terms that a packed layer has.

A case is drawn from a seed, which a failure prints: small layers of every kind, format, order of execution and
instruction set, with NaN, infinities and signed zeros in inputs, weights, biases and residuals, borders more often.
"""

import contextlib
import itertools
import os
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import compressx as cx
from compressx import formats, kernels
from compressx.kernels import exact, native, pallas, pattern_conv, recurrent, schedule, tuning, unified
from compressx.kernels.schedule import Geometry

# a case compiles programs of its own for tenths of a second
budget = settings.default.max_examples
few = settings(max_examples=budget if budget > 40 else 3)
seeds = st.integers(0, 2**32 - 1)
ODD = np.array([np.nan, np.inf, -np.inf], np.float32)


def spoiled(rng, x, share=0.6):
    """A copy with NaN or infinities at a few positions, borders more often; sometimes as it was."""
    x = np.array(x, np.float32)
    if not x.size or rng.random() > share:
        return x
    for _ in range(rng.choice([1, 1, 2, 4])):
        ends = rng.random(x.ndim) < 0.4
        at = tuple(
            int(rng.choice([0, n - 1])) if end else int(rng.integers(n)) for n, end in zip(x.shape, ends, strict=True)
        )
        x[at] = rng.choice(ODD)
    return x


def same(got, expected, about=""):
    """NaN at the same positions, the same infinities, and near elsewhere."""
    got, expected = np.asarray(got), np.asarray(expected)
    assert got.shape == expected.shape
    odd, right = np.isnan(got), np.isnan(expected)
    assert (odd == right).all(), f"{about}: NaN at {np.argwhere(odd)[:6]}, right at {np.argwhere(right)[:6]}"
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-4, err_msg=str(about))


@np.errstate(invalid="ignore")
def convolution(x, w, geometry):
    """Sums of the terms that exist, one by one: weights that are not zero at elements of the image."""
    (kh, kw), (sh, sw), ((top, _), (left, _)), groups = geometry
    (n, h, wide, _), (oh, ow) = x.shape, geometry.out(*x.shape[1:3])
    cin, cout = w.shape[2], w.shape[3]
    y = np.zeros((n, oh, ow, cout))
    for oy, ox, i, j in np.ndindex(oh, ow, kh, kw):
        iy, ix = sh * oy + i - top, sw * ox + j - left
        if 0 <= iy < h and 0 <= ix < wide:
            for f in range(cout):
                first = f // (cout // groups) * cin
                for c in np.flatnonzero(w[i, j, :, f] != 0):
                    y[:, oy, ox, f] += x[:, iy, ix, first + c].astype(np.float64) * w[i, j, c, f]
    return y


@np.errstate(invalid="ignore")
def finished(y, bias, activation, residual, after):
    """What follows the sums, a value at a time, in the words of the activation."""
    y = y if bias is None else y + bias
    if residual is not None and not after:
        y = y + residual

    def activate(v):
        if np.isnan(v) or activation == "none":
            return v
        if activation == "leaky":
            return v if v > 0 else 0.1 * v
        return min(max(v, 0.0), 6.0 if activation == "relu6" else np.inf)

    y = np.vectorize(activate, otypes=[float])(y)
    return y + residual if residual is not None and after else y


def layer(rng):
    """A convolution: weights, its geometry and the shape of the images."""
    kh, kw = [(1, 1), (3, 3), (3, 3), (2, 3), (5, 5), (1, 4)][rng.integers(6)]
    groups = int(rng.choice([1, 1, 1, 2, 3]))
    cin = int(rng.choice([1, 2, 3, 5])) if groups == 1 else int(rng.choice([1, 2]))
    cout = groups * int(rng.choice([1, 2, 3, 9 if groups == 1 else 4]))
    strides = tuple(int(v) for v in rng.choice([1, 1, 2], 2))
    pads = tuple(tuple(int(v) for v in rng.integers(0, k + 1, 2)) for k in (kh, kw))
    shape = (int(rng.integers(1, 4)), *(int(v) for v in rng.integers(1, 8, 2)), cin * groups)
    geometry = Geometry((kh, kw), strides, pads, groups)
    if min(geometry.out(*shape[1:3])) < 1:
        return layer(rng)
    w = rng.standard_normal((kh, kw, cin, cout)).astype(np.float32)
    kind = rng.integers(5)
    if kind == 0:
        w *= rng.random(w.shape) < 0.4
    if kind == 1:
        w *= (rng.random((cin, cout)) < 0.6)[None, None]
    if kind >= 3:  # a few patterns
        masks = rng.random((3, kh, kw)) < 0.5
        w *= masks[rng.integers(0, 3, (cin, cout))].transpose(2, 3, 0, 1)
    return np.where(w == 0, 0, spoiled(rng, w, 0.4)), geometry, shape


@contextlib.contextmanager
def instruction_set(rng):
    """One that this processor has, for what is prepared within."""
    with mock.patch.dict(os.environ):
        os.environ.pop("COMPRESSX_ISA", None)
        if native.available():
            here = native.ISAS[: native.ISAS.index(native.isa()) + 1]
            os.environ["COMPRESSX_ISA"] = str(rng.choice(here))
        yield


def paths():
    return ["native", "xla"] if native.available() else ["xla"]


def plan_for(rng, w, geometry, shape):
    """One of the plans that the tuner may choose, or none; narrow tiles and short runs more often."""
    if rng.random() < 0.3:
        return None
    grid = pattern_conv.layer_grid(geometry, shape[:3], native.LANES[native.isa()] if native.available() else 4)
    pool = tuning.candidates(schedule.from_weight(w), geometry, grid)
    plan = pool[rng.integers(len(pool))]
    if plan.order == "runs":
        return plan._replace(taps=int(rng.integers(1, 4)), filters=int(rng.integers(1, 9)))
    return plan._replace(filters=int(rng.integers(1, 9)), width=int(rng.integers(1, plan.width + 1)))


def check_convolution(seed):
    rng = np.random.default_rng(seed)
    w, geometry, shape = layer(rng)
    bias = None if rng.random() < 0.3 else spoiled(rng, rng.standard_normal(w.shape[3]), 0.2)
    activation, after = str(rng.choice(pattern_conv.ACTIVATIONS)), bool(rng.random() < 0.5)
    options = {"strides": geometry.strides, "padding": geometry.pads, "groups": geometry.groups, "bias": bias}
    options |= {"activation": activation, "residual_after": after}
    held = w
    if rng.random() < 0.3 and (w != 0).any() and np.isfinite(w).all():
        with contextlib.suppress(ValueError):  # more patterns than the format holds
            held = formats.pack(w, format="fkw")
    with instruction_set(rng):
        plan = plan_for(rng, w, geometry, shape)
        convs = [kernels.prepare(held, shape, plan=plan, path=p, **options) for p in paths()]
        for _ in range(4):
            x = spoiled(rng, rng.standard_normal(shape), 0.8)
            x[rng.random(shape) < 0.2] = rng.choice([0.0, -0.0])
            out = (shape[0], *geometry.out(*shape[1:3]), w.shape[3])
            residual = None if rng.random() < 0.5 else spoiled(rng, rng.standard_normal(out), 0.4)
            expected = finished(convolution(x, w, geometry), bias, activation, residual, after)
            same(kernels.reference(x, w, geometry, bias, activation, residual, after), expected, "reference")
            for conv in convs:
                same(conv(x, residual), expected, (conv.path, conv.plan))


@few
@given(seeds)
def test_convolutions_spread_what_their_terms_have(seed):
    check_convolution(seed)


def check_blocks(seed):
    rng = np.random.default_rng(seed)
    w, geometry, shape = layer(rng)
    w = np.concatenate([w, np.where(rng.random(w.shape) < 0.5, w, 0)], axis=2)
    w = np.concatenate([w, np.where(rng.random((1, 1, *w.shape[2:])) < 0.5, w, 0)], axis=3).astype(np.float32)
    geometry, shape = geometry._replace(groups=1), (*shape[:3], w.shape[2])
    held = pallas.blocks(w, (2, 2))
    for backend, _ in itertools.product(pallas.BACKENDS, range(2)):
        x = spoiled(rng, rng.standard_normal(shape), 0.8)
        y = pallas.block_sparse_conv(jnp.asarray(x), held, geometry=geometry, backend=backend, interpret=True)
        same(y, convolution(x, w, geometry), backend)


@few
@given(seeds)
def test_blocks_on_pallas_spread_what_their_terms_have(seed):
    check_blocks(seed)


class Chain(nn.Module):
    """Convolutions with what networks put around them; `seed` decides what."""

    seed: int

    @nn.compact
    def __call__(self, x, train=False):
        rng = np.random.default_rng(self.seed)
        activations = [nn.relu, jax.nn.relu6, lambda y: jnp.maximum(y, 0.1 * y), lambda y: y, jnp.tanh]
        act = lambda y: activations[rng.integers(len(activations))](y)
        for _ in range(rng.integers(1, 4)):
            channels, before = x.shape[-1], x
            kind = rng.integers(4)
            features = channels if kind in (0, 1) else int(rng.integers(1, 7))
            groups = channels if kind == 0 else 1
            kernel = (1, 1) if kind == 2 else (3, 3)
            strides = int(rng.choice([1, 1, 2])) if kind == 3 else 1
            x = nn.Conv(features, kernel, strides, feature_group_count=groups, use_bias=bool(rng.integers(2)))(x)
            if rng.random() < 0.6:
                x = nn.BatchNorm(use_running_average=True)(x)
            late = rng.random() < 0.5
            x = x if late else act(x)
            if kind in (0, 1) and rng.random() < 0.7:
                x = x + before
            x = act(x) if late else x
            pool = rng.integers(6)
            pads = [(1, 1), (1, 1)] if rng.random() < 0.5 else "VALID"
            if pool < 2 and min(x.shape[1:3]) > 2:
                x = nn.max_pool(x, *([(2, 2), (2, 2)] if pool else [(3, 3), (2, 1)]), pads)
            elif pool == 2 and min(x.shape[1:3]) > 2:
                x = nn.avg_pool(x, (2, 2), (1, 2))
        return (x, nn.Dense(3)(x.mean(axis=(1, 2)))) if rng.random() < 0.5 else x


def eager_convolution(x, w, window_strides, padding, *_, feature_group_count=1, **__):
    size = w.shape[:2]
    pads = jax.lax.padtype_to_pads(x.shape[1:3], size, window_strides, padding) if isinstance(padding, str) else padding
    geometry = Geometry(size, tuple(window_strides), tuple(tuple(p) for p in pads), feature_group_count)
    return jnp.asarray(convolution(np.asarray(x), np.asarray(w), geometry), jnp.float32)


def check_network(seed):
    rng = np.random.default_rng(seed)
    model = Chain(seed)
    shape = (int(rng.integers(1, 4)), *(int(v) for v in rng.integers(3, 10, 2)), int(rng.integers(1, 5)))
    rough = jax.device_get(model.init(jax.random.key(seed), jnp.zeros(shape)))

    def change(path, w):
        w = np.array(w)
        if w.ndim == 4:
            w *= rng.random(w.shape if rng.random() < 0.5 else (1, 1, *w.shape[2:])) < 0.6
            return np.where(w == 0, 0, spoiled(rng, w, 0.15))
        if w.ndim == 1:
            w = w + 0.5 * rng.random(w.shape, np.float32)
            if path[-1].key == "scale" and rng.random() < 0.5:
                w[rng.integers(w.size)] = 0
            return spoiled(rng, w, 0.1)
        return w

    variables = jax.tree_util.tree_map_with_path(change, rough)
    with instruction_set(rng):
        nets = [kernels.compile(model, variables, path=p) for p in paths()]
        for _ in range(3):
            x = spoiled(rng, rng.standard_normal(shape), 0.8)
            # all but the convolutions is XLA's
            with mock.patch.object(jax.lax, "conv_general_dilated", eager_convolution):
                expected = model.apply(variables, jnp.asarray(x))
            for f in nets:
                for got, right in zip(jax.tree.leaves(f(x)), jax.tree.leaves(expected), strict=True):
                    same(got, right, f.path)


@few
@given(seeds)
def test_networks_spread_what_their_terms_have(seed):
    check_network(seed)


class Largest(nn.Module):
    """Windows over the image itself."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.max_pool(nn.max_pool(x, (2, 3), (1, 2)), (1, 2))


@pytest.mark.parametrize("isa", native.ISAS)
def test_pools_keep_nan_infinities_and_the_signs_of_zeros(isa, monkeypatch):
    monkeypatch.delenv("COMPRESSX_ISA", raising=False)
    if not native.available() or native.ISAS.index(isa) > native.ISAS.index(native.isa()):
        pytest.skip(f"no native kernels, or this processor lacks {isa}")
    monkeypatch.setenv("COMPRESSX_ISA", isa)
    rng, f = np.random.default_rng(0), kernels.compile(Largest(), {})
    for _ in range(20):
        x = rng.choice(np.array([np.nan, np.inf, -np.inf, 0, -0.0, -0.0, -0.0, -1], np.float32), (2, 7, 9, 3))
        got, expected = np.asarray(f(x)), np.asarray(Largest().apply({}, x))
        np.testing.assert_array_equal(got, expected)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.signbit(got)[number], np.signbit(expected)[number])


def matrix(rng, inputs, outputs):
    """A matrix, and the same packed: dense, single weights, or blocks."""
    w = rng.standard_normal((inputs, outputs)).astype(np.float32)
    kind = rng.integers(4)
    if kind == 0:
        w *= rng.random(w.shape) < 0.2
    if kind == 1:
        w *= rng.random(w.shape) < 0.8
    if kind >= 2:
        for start in range(0, outputs, 5):
            part = w[:, start : start + 5]
            part *= (rng.random(inputs) < 0.5)[:, None] & (rng.random(part.shape[1]) < 0.8)[None]
    w = np.where(w == 0, 0, spoiled(rng, w, 0.2))
    if kind == 3 and np.isfinite(w).all():
        return w, formats.pack(w, format=str(rng.choice(["bspc", "csr", "dense"])))
    return w, w


@np.errstate(invalid="ignore")
def product(x, w):
    """Sums over the weights that are not zero."""
    y = np.zeros((len(x), w.shape[1]))
    for c, f in np.argwhere(w != 0):
        y[:, f] += x[:, c].astype(np.float64) * w[c, f]
    return y


def check_product(seed):
    rng = np.random.default_rng(seed)
    w, held = matrix(rng, *(int(v) for v in rng.integers(1, 40, 2)))
    with instruction_set(rng):
        products = [kernels.prepare_product(held, path=p) for p in paths()]
    for _ in range(4):
        x = spoiled(rng, rng.standard_normal((int(rng.integers(1, 4)), len(w))), 0.8)
        expected = product(x, w)
        same(exact.reference(x.astype(np.float64), w), expected, "reference")
        for p in products:
            same(p(jnp.asarray(x)), expected, p.path)


@few
@given(seeds)
def test_products_spread_what_their_terms_have(seed):
    check_product(seed)


@np.errstate(invalid="ignore")
def cell_steps(cell, x, u, h, c, bias):
    """The recurrences of `models.gru` and `models.lstm`, with `product`."""
    sigmoid = lambda v: 1 / (1 + np.exp(-v))
    m, states = h.shape[1], []
    h, c = h.astype(np.float64), c.astype(np.float64)
    for step in x.astype(np.float64):
        gates = [step[:, k * m : (k + 1) * m] for k in range(x.shape[2] // m)]
        parts = np.split(u, len(gates), axis=1)
        if cell == "lstm":
            i, f, g, o = (a + product(h, p) for a, p in zip(gates, parts, strict=True))
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        else:
            z, r = (sigmoid(a + product(h, p)) for a, p in zip(gates[:2], parts[:2], strict=True))
            inner = r * (product(h, parts[2]) + bias) if cell == "gru_after" else product(r * h, parts[2])
            h = z * h + (1 - z) * np.tanh(gates[2] + inner)
        states.append(h)
    return np.stack(states), c if cell == "lstm" else h


def check_cell(seed):
    rng = np.random.default_rng(seed)
    cell, m = str(rng.choice(recurrent.CELLS)), int(rng.integers(1, 23))
    gates = [matrix(rng, m, m) for _ in range(4 if cell == "lstm" else 3)]
    u = np.concatenate([w for w, _ in gates], axis=1)
    steps, n = int(rng.integers(1, 4)), int(rng.integers(1, 4))
    with instruction_set(rng):
        cells = [kernels.prepare_recurrent(cell, [held for _, held in gates], path=p) for p in paths()]
    for _ in range(4):
        draw = lambda shape, share: spoiled(rng, rng.standard_normal(shape), share)
        x, h, c = draw((steps, n, u.shape[1]), 0.5), draw((n, m), 0.5), draw((n, m), 0.3)
        bias = draw(m, 0.2)
        expected = cell_steps(cell, x, u, h, c, bias)
        for a, b in zip(recurrent.reference(cell, x, u, h, c, bias), expected, strict=True):
            same(a, b, "reference")
        for f in cells:
            for a, b in zip(f(*map(jnp.asarray, (x, h, c, bias))), expected, strict=True):
                same(a, b, (cell, f.path))


@few
@given(seeds)
def test_cells_spread_what_their_terms_have(seed):
    check_cell(seed)


def check_unified(seed):
    rng = np.random.default_rng(seed)
    shape, block = tuple(int(v) for v in rng.integers(2, 13, 2)), tuple(int(v) for v in rng.integers(1, 4, 2))
    constraint = cx.unify_and_prune(block, 0.5, 0.25)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    structure = constraint.init(w)
    w = constraint.project(w, structure)
    packed = formats.pack(w, constraint, structure, "unified")
    held = unified.prepare_unified(packed)
    for _ in range(3):
        x = spoiled(rng, rng.standard_normal((2, shape[0])), 0.8)
        same(unified.reference(packed, x), product(x, np.asarray(w)), "reference")
        same(unified.product(held, jnp.asarray(x)), product(x, np.asarray(w)), "xla")


@few
@given(seeds)
def test_unified_products_spread_what_their_terms_have(seed):
    check_unified(seed)


def test_derivatives_are_those_of_the_dense_product_and_batches_those_of_its_rows():
    rng = np.random.default_rng(0)
    x, w, d = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((3, 4), (4, 5), (3, 4)))
    w = w * jnp.asarray(rng.random((4, 5)) < 0.5, jnp.float32)
    ours, plain = (lambda x, w: exact.linear(jnp.matmul, x, w)), jnp.matmul
    for f in (lambda p: jax.vjp(p, x, w)[1](jnp.ones((3, 5))), lambda p: jax.jvp(p, (x, w), (d, w))[1]):
        jax.tree.map(np.testing.assert_array_equal, f(ours), f(plain))
    one = lambda p: jax.grad(lambda x: jnp.sum(jnp.sin(p(x, w))))(x)
    np.testing.assert_array_equal(one(ours), one(plain))
    broken = x.at[1, 2].set(jnp.nan)
    same(jax.vmap(ours, (0, None))(broken[:, None], w)[:, 0], product(np.asarray(broken), np.asarray(w)))


@pytest.mark.parametrize("cell", recurrent.CELLS)
def test_derivatives_of_cells_are_those_of_the_dense_recurrence(cell):
    rng = np.random.default_rng(1)
    f = kernels.prepare_recurrent(cell, [np.eye(4, dtype=np.float32)] * (4 if cell == "lstm" else 3), path="xla")
    x, h = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in ((2, 3, f.u.shape[1]), (3, 4)))
    zeros = (jnp.zeros((3, 4)), jnp.zeros(4))
    ours = jax.grad(lambda x, h: jnp.sum(jnp.sin(f(x, h)[0])), (0, 1))(x, h)
    plain = jax.grad(lambda x, h: jnp.sum(jnp.sin(recurrent.dense(cell, x, f.u, h, *zeros)[0])), (0, 1))(x, h)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, plain)
