"""Views are bijections, and put the entries where their docstrings say."""

import jax.numpy as jnp
import numpy as np
import pytest

from compressx import views

VIEWS = {
    "identity": (views.identity(), (3, 2, 4, 5)),
    "gemm conv": (views.gemm(), (3, 2, 4, 5)),
    "gemm dense": (views.gemm(), (7, 5)),
    "channels conv": (views.channels(), (3, 2, 4, 5)),
    "channels dense": (views.channels(), (7, 5)),
    "kernels": (views.kernels(), (3, 2, 4, 5)),
    "blocks": (views.blocks((4, 3)), (3, 2, 4, 5)),
    "blocks ragged": (views.blocks((5, 4)), (7, 6)),
}


@pytest.mark.parametrize(("view", "shape"), list(VIEWS.values()), ids=list(VIEWS))
def test_back_of_to_is_the_weight_bit_for_bit(view: views.View, shape: tuple[int, ...]) -> None:
    w = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    np.testing.assert_array_equal(view.back(view.to(w), w.shape), w)


def test_entries_are_where_the_docstrings_say() -> None:
    kh, kw, cin, cout = 2, 3, 4, 5
    w = jnp.arange(kh * kw * cin * cout, dtype=jnp.float32).reshape(kh, kw, cin, cout)
    i, j, c, f = 1, 2, 3, 4
    value = w[i, j, c, f]
    assert views.gemm().to(w)[(i * kw + j) * cin + c, f] == value
    assert views.channels().to(w)[c, (i * kw + j) * cout + f] == value
    assert views.kernels().to(w)[c, f, i * kw + j] == value
    assert (
        views.blocks((4, 2)).to(w)[((i * kw + j) * cin + c) // 4, f // 2, ((i * kw + j) * cin + c) % 4, f % 2] == value
    )


def test_shapes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match=r"kernel view needs a convolution weight .* got shape \(3, 4\)"):
        views.kernels().to(jnp.ones((3, 4)))
    with pytest.raises(ValueError, match=r"GEMM view needs a weight of at least 2 axes, got shape \(3,\)"):
        views.gemm().to(jnp.ones(3))
    with pytest.raises(ValueError, match="at least 1x1"):
        views.blocks((0, 3))
