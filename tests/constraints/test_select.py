"""Exact top-k by bit search, against a sort in NumPy."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from compressx.constraints import select
from compressx.constraints.select import top_k_mask, top_k_masks
from tests.thinning import some


def oracle(scores: np.ndarray, k: int) -> np.ndarray:
    """Stable sort by falling magnitude: the first k stay, ties in index order."""
    flat = np.abs(scores.reshape(-1).astype(np.float64))
    order = np.argsort(-flat, kind="stable")
    mask = np.zeros(flat.size, bool)
    mask[order[:k]] = True
    return mask.reshape(scores.shape)


# few distinct values, so that ties are the rule and not the exception
values = st.sampled_from([0.0, 1.0, 1.0000001, 0.5, 3e-40, 1e30, 2.0])


@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 7), st.integers(1, 9)), elements=values), st.data())
def test_whole_array_equals_stable_sort(x: np.ndarray, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, x.size))
    np.testing.assert_array_equal(top_k_mask(jnp.asarray(x), k), oracle(x, k))


@pytest.mark.parametrize("length", some([1, 9], [1, 3, 8, 9, 40]))
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_along_an_axis_equals_stable_sort_of_every_line(length: int, axis: int, rng: np.random.Generator) -> None:
    shape = [3, 4, 2]
    shape[axis] = length
    x = rng.integers(0, 5, shape).astype(np.float32)
    for k in {0, 1, length // 2, length}:
        got = np.moveaxis(np.asarray(top_k_mask(jnp.asarray(x), k, axis)), axis, -1)
        lines = np.moveaxis(x, axis, -1)
        want = np.stack([[oracle(line, k) for line in plane] for plane in lines])
        np.testing.assert_array_equal(got, want)


def test_k_may_differ_from_line_to_line(rng: np.random.Generator) -> None:
    x = rng.integers(0, 4, (6, 20)).astype(np.float32)
    k = np.array([0, 1, 5, 10, 19, 20], np.int32)
    got = top_k_mask(jnp.asarray(x), jnp.asarray(k)[:, None], axis=1)
    np.testing.assert_array_equal(got, np.stack([oracle(line, int(n)) for line, n in zip(x, k, strict=True)]))


@given(st.lists(st.integers(0, 6), min_size=1, max_size=4), st.data())
def test_several_arrays_rank_together(sizes: list[int], data: st.DataObject) -> None:
    arrays = [data.draw(hnp.arrays(np.float32, (n,), elements=values)) for n in sizes]
    k = data.draw(st.integers(0, sum(sizes)))
    got = top_k_masks([jnp.asarray(a) for a in arrays], k)
    want = oracle(np.concatenate(arrays), k) if sum(sizes) else np.zeros(0, bool)
    np.testing.assert_array_equal(np.concatenate([np.asarray(g) for g in got]), want)


def test_unrolled_search_of_a_large_array_equals_stable_sort(rng: np.random.Generator) -> None:
    x = rng.standard_normal((1025, 1024)).astype(np.float32)
    k = x.size // 7
    np.testing.assert_array_equal(jax.jit(lambda v: top_k_mask(v, k))(jnp.asarray(x)), oracle(x, k))


MORE = [pytest.param(shape, marks=pytest.mark.slow) for shape in ((40,), (3, 3, 4, 11))]


@pytest.mark.parametrize("shape", [(30, 17), *MORE])
def test_one_device_counts_in_one_pass_and_selects_alike(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], rng: np.random.Generator
) -> None:
    monkeypatch.setattr(select, "_alone", lambda: True)
    x = rng.integers(-6, 6, shape).astype(np.float32)
    x.reshape(-1)[3] = 1e-42
    rows = x.reshape(-1, shape[-1])
    several = jax.vmap(lambda v: top_k_mask(v, 9))
    for k in (1, x.size // 3, x.size - 1):
        np.testing.assert_array_equal(top_k_mask(jnp.asarray(x), k), oracle(x, k))
        got = top_k_masks([jnp.asarray(x), jnp.asarray(x[:1] + 1)], k)
        want = oracle(np.concatenate([x.reshape(-1), x[:1].reshape(-1) + 1]), k)
        np.testing.assert_array_equal(np.concatenate([np.asarray(g).reshape(-1) for g in got]), want)
    got = np.asarray(top_k_mask(jnp.asarray(x), 9, axis=-1)).reshape(rows.shape)
    np.testing.assert_array_equal(got, np.stack([oracle(row, 9) for row in rows]))
    np.testing.assert_array_equal(several(jnp.asarray(rows)), np.stack([oracle(row, 9) for row in rows]))


def test_counts_beyond_32_bits_compare_exactly() -> None:
    from compressx.constraints.select import _reaches

    big = jnp.asarray(2**31 - 1, jnp.int32)
    total = 5 * (2**31 - 1)
    assert bool(_reaches([big] * 5, total))
    assert not bool(_reaches([big] * 5, total + 1))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_low_precision_keeps_exact_counts(dtype: jnp.dtype, rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.standard_normal(300), dtype)
    assert int(top_k_mask(x, 77).sum()) == 77


def test_all_equal_keeps_the_lowest_indices() -> None:
    np.testing.assert_array_equal(top_k_mask(jnp.ones((4, 5)), 7).reshape(-1), np.arange(20) < 7)


def test_vmap_equals_the_loop(rng: np.random.Generator) -> None:
    x = jnp.asarray(rng.integers(0, 3, (5, 30)).astype(np.float32))
    np.testing.assert_array_equal(
        jax.vmap(lambda v: top_k_mask(v, 11))(x), np.stack([oracle(np.asarray(v), 11) for v in x])
    )


def test_impossible_counts_are_named() -> None:
    with pytest.raises(ValueError, match="cannot keep 7 of 6"):
        top_k_mask(jnp.ones(6), 7)
    with pytest.raises(ValueError, match="cannot keep -1 of 3 entries along axis 1"):
        top_k_mask(jnp.ones((2, 3)), -1, axis=1)


def test_what_is_quick_on_one_cpu_is_lowered_for_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled here for a TPU, counts are sums of whole arrays in a loop: partial counts of rows would be gathered."""
    monkeypatch.setattr(select, "_alone", lambda: True)
    traced = jax.jit(lambda x: top_k_mask(x, 100)).trace(jax.ShapeDtypeStruct((1024, 1024), jnp.float32))
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "tpu")}
    reductions = {name: re.findall(r"stablehlo\.reduce\(.*?dimensions = \[([\d, ]+)\]", t) for name, t in texts.items()}
    assert reductions["cpu"].count("1") == 16  # three candidates a pass, along the lines
    assert set(reductions["tpu"]) == {"0, 1"} and len(reductions["tpu"]) < 8
