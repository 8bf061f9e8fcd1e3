"""Sparse convolution: every path and plan against a NumPy loop, gradients, concurrency, hostile arrays."""

import concurrent.futures

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx import formats, kernels
from compressx.kernels import native, pattern_conv, schedule
from compressx.kernels.schedule import Geometry, Plan

PATTERNS = [
    [4, 5, 7, 8],
    [3, 4, 6, 7],
    [1, 2, 4, 5],
    [0, 1, 3, 4],
    [3, 4, 5, 7],
    [1, 4, 5, 7],
    [1, 3, 4, 7],
    [1, 3, 4, 5],
]

needs_native = pytest.mark.skipif(not native.available(), reason="no compiler, so no native kernels")


def weight(rng, kh, kw, cin, cout, keep=0.5, pattern=False):
    w = rng.standard_normal((kh, kw, cin, cout), dtype=np.float32)
    w *= (rng.random((cin, cout)) < keep)[None, None]
    if pattern:
        mask = np.zeros((8, 9), np.float32)
        for row, taps in zip(mask, PATTERNS, strict=True):
            row[taps] = 1
        w *= mask[rng.integers(0, 8, (cin, cout))].transpose(2, 0, 1).reshape(3, 3, cin, cout)
    return w


def check(rng, shape, w, plan=None, residual=True, **options):
    b = rng.standard_normal(w.shape[3], dtype=np.float32)
    x = rng.standard_normal(shape, dtype=np.float32)
    conv = kernels.prepare(w, shape, bias=b, plan=plan, **options)
    h, wide = conv.geometry.out(*shape[1:3])
    r = rng.standard_normal((shape[0], h, wide, w.shape[3]), dtype=np.float32) if residual else None
    act = options.get("activation", "none"), r, options.get("residual_after", False)
    expected = kernels.reference(x, w, conv.geometry, b, *act)
    np.testing.assert_allclose(conv(x, r), expected, rtol=0, atol=2e-6 * max(1, np.abs(expected).max()))
    return conv


def test_reference_is_the_sum_over_the_window():
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((1, 5, 6, 2)), rng.standard_normal((3, 2, 2, 3)).astype(np.float32)
    y = kernels.reference(x, w, Geometry((3, 2), (2, 1), ((1, 1), (0, 1))))
    for (oy, ox, f), value in np.ndenumerate(y[0]):
        total = 0.0
        for i, j, c in np.ndindex(3, 2, 2):
            yy, xx = 2 * oy + i - 1, ox + j
            if 0 <= yy < 5 and 0 <= xx < 6:
                total += x[0, yy, xx, c] * w[i, j, c, f]
        assert value == pytest.approx(total, abs=1e-9)


PLANS = [
    Plan("kernels", 4, 8, 3, 0, True),
    Plan("kernels", 4, 128, 4),
    Plan("runs", 3, 8, 5, 3),
    Plan("runs", 1, 8, 4, 2, True),
    Plan("chunks", 5, 16, 2),
]


@needs_native
@pytest.mark.parametrize("plan", PLANS)
def test_plans_equal_the_reference(plan):
    rng = np.random.default_rng(1)
    w = weight(rng, 3, 3, 7, 18, 0.4, pattern=True)
    check(rng, (2, 19, 13, 7), w, plan, activation="relu")


CASES = {
    "stride 2": ((2, 15, 12, 5), (3, 3, 5, 10), {"strides": 2}),
    "stride 2, PyTorch's pads": ((1, 15, 12, 5), (3, 3, 5, 10), {"strides": 2, "padding": ((1, 1), (1, 1))}),
    "strides differ": ((1, 9, 12, 4), (3, 3, 4, 6), {"strides": (1, 2)}),
    "1x1": ((2, 5, 6, 6), (1, 1, 6, 8), {"padding": "VALID"}),
    "1x1, stride 2": ((2, 11, 6, 6), (1, 1, 6, 8), {"strides": 2, "padding": "VALID"}),
    "stem": ((1, 15, 18, 3), (7, 7, 3, 10), {"strides": 2, "padding": ((3, 3), (3, 3))}),
    "5x5, no pads": ((2, 11, 12, 3), (5, 5, 3, 4), {"padding": "VALID"}),
    "groups": ((1, 8, 9, 6), (3, 3, 2, 12), {"groups": 3}),
    "depthwise, relu6": ((1, 8, 9, 6), (3, 3, 1, 6), {"groups": 6, "activation": "relu6"}),
    "leaky": ((2, 9, 10, 5), (3, 3, 5, 7), {"activation": "leaky"}),
    "leaky, then the residual": ((2, 9, 10, 5), (3, 3, 5, 7), {"activation": "leaky", "residual_after": True}),
    "relu6, stride 2, then the residual": (
        (1, 9, 10, 5),
        (3, 3, 5, 7),
        {"strides": 2, "activation": "relu6", "residual_after": True},
    ),
    "more rows out than in": ((1, 4, 4, 3), (3, 3, 3, 5), {"padding": ((2, 2), (2, 2))}),
    "one pixel": ((1, 1, 1, 3), (3, 3, 3, 5), {}),
}


@needs_native
@pytest.mark.parametrize("case", CASES)
def test_geometries_equal_the_reference(case):
    shape, kernel, options = CASES[case]
    rng = np.random.default_rng(2)
    check(rng, shape, weight(rng, *kernel), **options)
    if options.get("groups", 1) == 1:
        check(rng, shape, weight(rng, *kernel), Plan("runs", 3, 4, 3, 2), residual=False, **options)


@needs_native
@pytest.mark.parametrize("isa", native.ISAS)
def test_every_instruction_set(isa, monkeypatch):
    monkeypatch.delenv("COMPRESSX_ISA", raising=False)
    if native.ISAS.index(isa) > native.ISAS.index(native.isa()):
        pytest.skip(f"this processor lacks {isa}")
    monkeypatch.setenv("COMPRESSX_ISA", isa)
    rng = np.random.default_rng(3)
    w = weight(rng, 3, 3, 5, 9, 0.6, pattern=True)
    for plan in PLANS:
        conv = check(rng, (1, 10, 9, 5), w, plan, activation="relu")
    assert conv.path == f"native/{isa}"


@pytest.mark.parametrize("options", [{"activation": "relu6"}, {"activation": "leaky", "residual_after": True}])
def test_xla_path_equals_the_reference(options):
    rng = np.random.default_rng(4)
    conv = check(rng, (1, 6, 7, 3), weight(rng, 3, 3, 3, 4), path="xla", **options)
    assert conv.path == "xla"


def test_the_reference_activates_and_adds_in_the_order_asked_for():
    x, w = np.array([-3.0, 2.0, 9.0]).reshape(1, 1, 3, 1), np.ones((1, 1, 1, 1), np.float32)
    geometry, r = Geometry((1, 1), (1, 1), ((0, 0), (0, 0))), np.full((1, 1, 3, 1), -1.0)
    for activation, after, expected in (
        ("none", False, [-4, 1, 8]),
        ("relu", False, [0, 1, 8]),
        ("relu", True, [-1, 1, 8]),
        ("relu6", True, [-1, 1, 5]),
        ("leaky", False, [-0.4, 1, 8]),
        ("leaky", True, [-1.3, 1, 8]),
    ):
        y = kernels.reference(x, w, geometry, None, activation, r, after)
        np.testing.assert_allclose(y.ravel(), expected, atol=1e-12)


@needs_native
def test_fkw_is_taken_as_it_is():
    rng = np.random.default_rng(5)
    w = weight(rng, 3, 3, 6, 12, 0.5, pattern=True)
    packed = formats.pack(w, format="fkw")
    s = schedule.from_fkw(packed)
    assert schedule.dense(s).tobytes() == w.tobytes()
    x = rng.standard_normal((1, 8, 8, 6), dtype=np.float32)
    a, b = kernels.prepare(packed, x.shape)(x), kernels.prepare(w, x.shape)(x)
    np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("path", ["xla", pytest.param("native", marks=needs_native)])
def test_fkw_with_codes_for_values_gives_the_kernels_floats(path):
    rng = np.random.default_rng(5)
    levels = cx.quantize(4)
    w = jnp.asarray(weight(rng, 3, 3, 6, 12, 0.5, pattern=True))
    scale = levels.init(w)
    w = np.asarray(levels.project(w, scale))
    packed = formats.pack(w, levels, scale, "fkw-coded")
    assert schedule.dense(schedule.from_fkw(packed)).tobytes() == w.tobytes()
    x = rng.standard_normal((1, 8, 8, 6), dtype=np.float32)
    a, b = (kernels.prepare(p, x.shape, path=path)(x) for p in (packed, formats.pack(w, format="fkw")))
    np.testing.assert_array_equal(a, b)


@needs_native
def test_a_layer_without_weights_gives_the_bias():
    conv = kernels.prepare(np.zeros((3, 3, 2, 4), np.float32), (1, 5, 5, 2), bias=np.arange(4, dtype=np.float32))
    y = conv(np.ones((1, 5, 5, 2), np.float32))
    np.testing.assert_array_equal(y, np.broadcast_to(np.arange(4, dtype=np.float32), (1, 5, 5, 4)))


@needs_native
def test_gradient_is_that_of_the_dense_convolution():
    rng = np.random.default_rng(6)
    w = weight(rng, 3, 3, 3, 4)
    x = jnp.asarray(rng.standard_normal((1, 5, 6, 3), dtype=np.float32))
    ours, theirs = kernels.prepare(w, x.shape, activation="relu"), kernels.prepare(w, x.shape, path="xla")
    a = jax.grad(lambda x: jnp.sum(ours(x) * jnp.cos(ours(x))))(x)
    b = jax.grad(lambda x: jnp.sum((y := jnp.maximum(theirs(x), 0)) * jnp.cos(y)))(x)
    np.testing.assert_allclose(a, b, atol=1e-4)


@needs_native
def test_concurrent_calls_and_threads_give_the_same_bits():
    rng = np.random.default_rng(7)
    w = weight(rng, 3, 3, 16, 32, 0.5, pattern=True)
    x = rng.standard_normal((1, 20, 20, 16), dtype=np.float32)
    plan = Plan("kernels", 4, 8, 3)
    one, many = kernels.prepare(w, x.shape, plan=plan, threads=1), kernels.prepare(w, x.shape, plan=plan, threads=4)
    expected = np.asarray(one(x)).tobytes()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert {np.asarray(y).tobytes() for y in pool.map(lambda i: (one, many)[i % 2](x), range(64))} == {expected}


def corrupt(rng, arrays):
    """One array with a few bytes changed, or cut, or empty."""
    arrays = dict(arrays)
    name = rng.choice(["members", "visits", "starts", "offsets", "places", "order", "weight", "valid", "real"])
    a = np.array(arrays[name])
    if rng.random() < 0.3 or not a.size:
        a = a[: rng.integers(0, a.shape[0] + 1)] if a.ndim else a
    else:
        flat = np.ascontiguousarray(a).view(np.uint8).reshape(-1)
        flat[rng.integers(0, flat.size, 3)] = rng.integers(0, 256, 3)
    arrays[name] = a
    return arrays


def attack(tries, seed=0):
    """Calls the native loops with corrupted arrays; returns how many calls were refused."""
    rng = np.random.default_rng(seed)
    w = weight(rng, 3, 3, 6, 10, 0.6, pattern=True)
    geometry = Geometry((3, 3), (1, 1), ((1, 1), (1, 1)))
    g = pattern_conv.layer_grid(geometry, (1, 7, 6), native.LANES[native.isa()])
    x = jnp.asarray(rng.standard_normal((6, g.plane, g.lanes), dtype=np.float32))
    x = [x, x.at[::2, ::3].set(jnp.nan)]  # the second is computed twice, see `ExactSums`
    refused = 0
    for i in range(tries):
        plan = [Plan("kernels", 4, 4, 2), Plan("runs", 3, 4, 2, 3), Plan("chunks", 4, 4, 2)][i % 3]
        ready = pattern_conv.layer(schedule.from_weight(w), geometry, g, plan)
        try:
            jax.block_until_ready(pattern_conv.run(ready.fixed, corrupt(rng, ready.arrays), x[i // 3 % 2]))
        except (jax.errors.JaxRuntimeError, ValueError) as e:
            refused += "pattern convolution" in str(e)
    return refused


@needs_native
def test_corrupted_arrays_are_refused_or_harmless():
    assert attack(40) > 10


@needs_native
@pytest.mark.slow
def test_corrupted_arrays_under_the_address_sanitizer(under_address_sanitizer):
    assert under_address_sanitizer(__file__, "attack(300, seed=1)") > 50


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shape": (1, 5, 5, 3)}, "do not fit kernels"),
        ({"strides": 1, "padding": "VALID", "shape": (1, 2, 2, 2)}, "do not fit|prepared"),
        ({"bias": np.zeros(3, np.float32)}, "bias"),
        ({"activation": "tanh"}, "no activation"),
        ({"path": "cuda"}, "no path"),
        ({"groups": 0}, "groups"),
    ],
)
def test_bad_arguments_are_named(change, text):
    options = {"shape": (1, 5, 5, 2), "path": "xla"} | change
    with pytest.raises(ValueError, match=text):
        kernels.prepare(np.ones((3, 3, 2, 4), np.float32), options.pop("shape"), **options)


def test_the_wrong_image_is_refused():
    conv = kernels.prepare(np.ones((3, 3, 2, 4), np.float32), (1, 5, 5, 2))
    with pytest.raises(ValueError, match="prepared for float32"):
        conv(np.zeros((1, 5, 6, 2), np.float32))
