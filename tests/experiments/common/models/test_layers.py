import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from compressx.native import conv as native
from compressx.native import convolve
from compressx.native import depthwise as native_depthwise
from experiments.common.models import layers

# images, (h, w), cin, cout, (kh, kw), stride, pads: odd sizes, partial vectors of channels, stride 2, uneven padding
SHAPES = [
    (2, (8, 9), 3, 5, (3, 3), 1, ((1, 1), (1, 1))),
    (3, (9, 8), 4, 20, (5, 5), 2, ((2, 1), (0, 2))),
    (2, (7, 7), 17, 70, (3, 3), 2, ((1, 1), (1, 1))),
    (2, (11, 10), 3, 33, (4, 5), 3, ((2, 0), (1, 3))),
    (2, (5, 6), 1, 1, (2, 3), 1, ((0, 0), (0, 0))),
    (2, (6, 6), 2, 130, (1, 1), 2, ((0, 0), (0, 0))),
    (1, (12, 40), 20, 50, (5, 5), 1, ((0, 0), (0, 0))),
    (20, (4, 4), 16, 16, (3, 3), 1, ((1, 1), (1, 1))),
]


def reference(x, kernel, stride=1, pads="VALID", groups=1, dilation=1):
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        pads,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def operands(n, size, cin, cout, window, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, *size, cin), dtype=np.float32)
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((*window, cin, cout), dtype=np.float32))


def assert_same_with_gradients(f, g, x, kernel):
    """Values and both gradients, under a cotangent that is not constant."""
    y, pull = jax.vjp(f, x, kernel)
    z, pull_reference = jax.vjp(g, x, kernel)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape, dtype=np.float32))
    for a, b in zip((y, *pull(cotangent)), (z, *pull_reference(cotangent)), strict=True):
        scale = float(jnp.abs(b).max())
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale)


def thinned(shapes):
    """Every other shape for `make test`, all of them for `make test-all`."""
    return [s if n % 2 == 0 else pytest.param(s, marks=pytest.mark.slow) for n, s in enumerate(shapes)]


def needs_kernel():
    if jax.default_backend() != "cpu" or not (native.available() and native_depthwise.available()):
        pytest.skip("the compiled kernel needs a CPU and a C++ compiler")


@pytest.mark.parametrize("shape", thinned(SHAPES))
def test_im2col_is_lax(shape):
    n, size, cin, cout, window, stride, pads = shape
    x, kernel = operands(n, size, cin, cout, window)
    f = lambda x, k: convolve.im2col(x, k, (stride, stride), pads)
    assert_same_with_gradients(f, lambda x, k: reference(x, k, stride, pads), x, kernel)


@pytest.mark.parametrize("spread", [False, True])
@pytest.mark.parametrize("shape", thinned(SHAPES))
def test_native_is_lax(shape, spread, monkeypatch):
    needs_kernel()
    monkeypatch.setattr(native, "_spread", lambda *shape: spread)
    n, size, cin, cout, window, stride, pads = shape
    x, kernel = operands(n, size, cin, cout, window)
    f = lambda x, k: native.conv(x, k, stride, pads)
    assert_same_with_gradients(f, lambda x, k: reference(x, k, stride, pads), x, kernel)


@pytest.mark.parametrize("shape", thinned(SHAPES))
def test_native_depthwise_is_lax(shape):
    needs_kernel()
    n, size, _, channels, window, stride, pads = shape
    x, kernel = operands(n, size, channels, channels, window)[0], operands(1, (1, 1), 1, channels, window, seed=2)[1]
    f = lambda x, k: native_depthwise.conv(x, k, stride, pads)
    assert_same_with_gradients(f, lambda x, k: reference(x, k, stride, pads, channels), x, kernel)
    gradient = jax.jit(jax.grad(lambda k: jnp.sin(f(x, k)).sum()))
    np.testing.assert_array_equal(gradient(kernel), gradient(kernel))


def test_native_depthwise_second_derivatives_are_those_of_lax():
    needs_kernel()
    x, kernel = operands(2, (5, 5), 3, 3, (3, 3))[0], operands(1, (1, 1), 1, 3, (3, 3), seed=2)[1]
    pads = ((1, 1), (1, 1))

    def curvature(conv):
        slope = jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), (0, 1))
        norm = lambda x, k: sum(jnp.square(g).sum() for g in slope(x, k))
        return jax.grad(norm, argnums=(0, 1))(x, kernel)

    ours = curvature(lambda x, k: native_depthwise.conv(x, k, 1, pads))
    theirs = curvature(lambda x, k: reference(x, k, 1, pads, 3))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def test_native_second_derivatives_are_those_of_lax():
    needs_kernel()
    x, kernel = operands(2, (5, 5), 2, 3, (3, 3))
    pads = ((1, 1), (1, 1))

    def curvature(conv):
        norm = lambda x, k: jnp.square(jax.grad(lambda x, k: jnp.sin(conv(x, k)).sum(), argnums=1)(x, k)).sum()
        return jax.grad(norm, argnums=(0, 1))(x, kernel)

    ours = curvature(lambda x, k: native.conv(x, k, 1, pads))
    theirs = curvature(lambda x, k: reference(x, k, 1, pads))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * float(jnp.abs(b).max()))


def test_native_works_in_scan_and_vmap():
    needs_kernel()
    x, kernel = operands(2, (6, 6), 3, 3, (3, 3))
    conv = lambda x, k: native.conv(x, k, 1, ((1, 1), (1, 1)))
    want = conv(conv(x, kernel), kernel)
    got, _ = jax.jit(lambda x: lax.scan(lambda y, _: (conv(y, kernel), None), x, length=2))(x)
    np.testing.assert_array_equal(got, want)
    kernels = jnp.stack([kernel, 2 * kernel])
    many = jax.jit(jax.vmap(conv, in_axes=(None, 0)))(x, kernels)
    np.testing.assert_array_equal(many, jnp.stack([conv(x, k) for k in kernels]))


def test_native_gives_the_same_bits_again():
    needs_kernel()
    x, kernel = operands(40, (9, 9), 4, 6, (3, 3))
    grad = jax.jit(jax.grad(lambda k: jnp.sin(native.conv(x, k, 1, ((1, 1), (1, 1)))).sum()))
    first = grad(kernel)
    for _ in range(5):
        np.testing.assert_array_equal(grad(kernel), first)


def test_lax_only_switches_the_kernel_off_and_on(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(native, "available", lambda: True)
    x, kernel = operands(1, (8, 8), 16, 16, (3, 3))
    how = lambda: convolve.formulation(x, kernel, (1, 1), ((1, 1), (1, 1)), 1, True)
    assert how() == "native"
    with convolve.lax_only():
        assert how() == "lax"
    assert how() == "native"


def test_formulation_by_shape(monkeypatch):
    def how(cin, cout, window, stride=(1, 1), groups=1, dtype=jnp.float32, plain=True):
        x, kernel = jnp.zeros((1, 8, 8, cin), dtype), jnp.zeros((*window, cin // groups, cout), dtype)
        pad = (window[0] // 2,) * 2
        return convolve.formulation(x, kernel, stride, (pad, pad), groups, plain)

    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    monkeypatch.setattr(native, "enabled", lambda: True)
    assert how(16, 16, (3, 3)) == how(1, 20, (5, 5)) == how(64, 32, (1, 1)) == "native"
    assert how(256, 256, (3, 3)) == "im2col"
    assert how(16, 16, (3, 3), stride=(1, 2)) == how(16, 16, (3, 3), dtype=jnp.bfloat16) == "lax"
    monkeypatch.setattr(native_depthwise, "enabled", lambda: True)
    assert how(8, 8, (3, 3), groups=8) == "native_depthwise"
    assert how(8, 8, (3, 3), stride=(1, 2), groups=8) == how(8, 8, (3, 3), groups=8, dtype=jnp.bfloat16) == "depthwise"
    assert how(8, 8, (3, 3), groups=2) == how(8, 8, (3, 3), plain=False) == "lax"
    monkeypatch.setattr(native, "enabled", lambda: False)
    monkeypatch.setattr(native_depthwise, "enabled", lambda: False)
    assert how(8, 8, (3, 3), groups=8) == "depthwise"
    assert how(16, 16, (3, 3)) == "lax"
    assert how(3, 16, (3, 3)) == how(20, 50, (5, 5)) == how(64, 32, (1, 1)) == "im2col"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert how(16, 16, (3, 3)) == how(8, 8, (3, 3), groups=8) == "lax"


@pytest.mark.parametrize(
    ("padding", "stride", "dilation", "groups"),
    [("SAME", 1, 1, 1), ("SAME", 2, 1, 1), ("VALID", 2, 1, 1), (((1, 2), (0, 1)), 1, 1, 1), ("SAME", 1, 2, 1)]
    + [
        ("SAME", 1, 1, 2),
        ("SAME", 1, 1, 4),
        (((1, 1), (1, 1)), 2, 1, 4),
        ("VALID", 1, 1, 4),
        (((-1, 0), (0, -1)), 1, 1, 1),
    ],
)
@pytest.mark.parametrize(
    ("kernel_on", "window"),
    [
        (False, (5, 4)),
        (True, (3, 3)),
        *(pytest.param(False, window, marks=pytest.mark.slow) for window in [(1, 1), (3, 3)]),
        *(pytest.param(True, window, marks=pytest.mark.slow) for window in [(1, 1), (5, 4)]),
    ],
)
def test_convolve_is_lax(padding, stride, dilation, groups, window, kernel_on, monkeypatch):
    if kernel_on:
        needs_kernel()
        monkeypatch.setattr(native, "enabled", lambda: True)
    x, kernel = operands(2, (11, 10), 4, 8 if groups < 4 else 4, window)
    kernel = kernel[:, :, : 4 // groups]
    numbers = ("NHWC", "HWIO", "NHWC")

    def ours(x, k):
        return convolve.convolve(x, k, (stride, stride), padding, (1, 1), (dilation, dilation), numbers, groups)

    assert_same_with_gradients(ours, lambda x, k: reference(x, k, stride, padding, groups, dilation), x, kernel)


def test_convolve_leaves_other_layouts_to_lax():
    x, kernel = operands(2, (8, 8), 3, 4, (5, 5))
    numbers = ("NCHW", "HWIO", "NCHW")
    ours = convolve.convolve(x.transpose(0, 3, 1, 2), kernel, (1, 1), "SAME", dimension_numbers=numbers)
    np.testing.assert_allclose(ours.transpose(0, 2, 3, 1), reference(x, kernel, pads="SAME"), rtol=1e-4, atol=1e-4)


def test_conv_has_the_variables_and_values_of_flax():
    x, _ = operands(2, (8, 8), 3, 1, (1, 1))
    ours, theirs = (make(6, (5, 5), strides=2, padding=[(2, 2), (2, 2)], name="c") for make in (layers.Conv, nn.Conv))
    variables = ours.init(jax.random.key(0), x)
    jax.tree.map(np.testing.assert_array_equal, variables, theirs.init(jax.random.key(0), x))
    assert set(variables["params"]) == {"kernel", "bias"} and variables["params"]["kernel"].shape == (5, 5, 3, 6)
    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("train", [False, True])
def test_batch_norm_is_that_of_flax(train):
    x = 3.0 + 2.0 * operands(4, (5, 5), 6, 1, (1, 1))[0]
    ours = layers.BatchNorm()
    theirs = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
    rng = np.random.default_rng(3)
    make = lambda: jnp.asarray(rng.uniform(0.5, 2.0, 6).astype(np.float32))
    variables = {"params": {"scale": make(), "bias": make()}, "batch_stats": {"mean": make(), "var": make()}}
    jax.tree.map(lambda a, b: None, ours.init(jax.random.key(0), x), variables)

    def run(apply):
        def total(params):
            y, new = apply({**variables, "params": params})
            return jnp.sin(y).sum(), (y, dict(new))

        return jax.grad(total, has_aux=True)(variables["params"])

    got = run(lambda v: ours.apply(v, x, train=train, mutable=["batch_stats"]))
    want = run(lambda v: theirs.apply(v, x, mutable=["batch_stats"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)


@pytest.mark.parametrize("size", [(7, 9), *(pytest.param(s, marks=pytest.mark.slow) for s in [(8, 8), (5, 4)])])
def test_max_pool_is_that_of_flax_and_drops_the_rest(size):
    x, _ = operands(2, size, 3, 1, (1, 1))
    for window in ((2, 2), (3, 2)):
        ours, theirs = (lambda x, f=f, w=window: jnp.sin(f(x, w, w)).sum() for f in (layers.max_pool, nn.max_pool))
        np.testing.assert_array_equal(layers.max_pool(x, window), nn.max_pool(x, window, window))
        np.testing.assert_allclose(jax.grad(ours)(x), jax.grad(theirs)(x), atol=1e-6)


def test_max_pool_overlapping_with_padding():
    x, _ = operands(2, (7, 7), 3, 1, (1, 1))
    got = layers.max_pool(x - 10.0, (3, 3), (2, 2), [(1, 1), (1, 1)])
    padded = np.pad(np.asarray(x) - 10.0, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf)
    for i in range(4):
        for j in range(4):
            want = padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].max((1, 2))
            np.testing.assert_allclose(got[:, i, j], want, rtol=1e-6)


def test_max_pool_gives_the_gradient_to_the_first_of_ties_and_keeps_nan():
    x = jnp.asarray([[0.0, 1.0], [1.0, 1.0]]).reshape(1, 2, 2, 1)
    grad = jax.jit(jax.grad(lambda x: layers.max_pool(x, (2, 2)).sum()))(x)
    np.testing.assert_array_equal(grad.reshape(2, 2), [[0, 1], [0, 0]])
    for place in np.ndindex(2, 2):
        assert jnp.isnan(layers.max_pool(x.at[0, *place].set(jnp.nan), (2, 2))).all()


def test_widen():
    assert [layers.widen(16, w) for w in (1.0, 0.5, 0.01, 1.3)] == [16, 8, 1, 21]
    with pytest.raises(ValueError, match="width must be positive, got 0"):
        layers.widen(16, 0)
