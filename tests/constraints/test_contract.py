"""One contract over every constraint: the table lists an example of each, the tests below hold for all of them."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import compressx as cx
from compressx.constraints import KINDS, from_spec

Shape = tuple[int, ...]
# name -> (constraint, shape of a leaf, or shapes of the leaves of a joint one)
EXAMPLES: dict[str, tuple[cx.Constraint, Shape | tuple[Shape, ...]]] = {
    "unstructured": (cx.unstructured(0.3), (6, 8)),
    "unstructured conv": (cx.unstructured(keep=11), (3, 3, 4, 5)),
    "unstructured global": (cx.unstructured(0.2, scope="global"), ((6, 8), (3, 3, 2, 4))),
    "n_of_m": (cx.n_of_m(2, 4), (8, 6)),
    "n_of_m conv": (cx.n_of_m(1, 2), (3, 3, 4, 5)),
    "block": (cx.block((2, 3), 0.4), (7, 8)),
    "block conv": (cx.block((4, 2), 0.4), (3, 3, 2, 5)),
    "filters": (cx.filters(0.5), (3, 3, 4, 6)),
    "columns": (cx.columns(0.5), (3, 3, 4, 6)),
    "channels": (cx.channels(0.5), (3, 3, 4, 6)),
    "filters_and_columns": (cx.filters_and_columns(0.5, 0.25), (3, 3, 4, 6)),
    "filters & unstructured": (cx.filters(0.5) & cx.unstructured(0.1), (3, 3, 4, 6)),
    "n_of_m & columns": (cx.n_of_m(2, 4) & cx.columns(0.5), (8, 6)),
}
table = pytest.mark.parametrize(("constraint", "shape"), list(EXAMPLES.values()), ids=list(EXAMPLES))


def draw(constraint: cx.Constraint, shape: Any, seed: int = 0, dtype: Any = jnp.float32) -> Any:
    rng = np.random.default_rng(seed)
    if constraint.joint:
        return tuple(jnp.asarray(rng.standard_normal(s), dtype) for s in shape)
    return jnp.asarray(rng.standard_normal(shape), dtype)


def same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def run(constraint: cx.Constraint, w: Any) -> Any:
    return constraint.project(w, constraint.init(w))


def squared(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.sum(np.square(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs)


def test_every_kind_has_an_example() -> None:
    shown = {p.spec["kind"] for c, _ in EXAMPLES.values() for p in c.sets}
    assert shown == set(KINDS)


@table
def test_projection_is_feasible_and_idempotent_to_the_bit(constraint: cx.Constraint, shape: Any) -> None:
    w = draw(constraint, shape)
    s = constraint.init(w)
    z = constraint.project(w, s)
    same(constraint.project(z, s), z)
    assert int(cx.constraints.violations(constraint, z, s)) == 0
    assert int(cx.constraints.violations(constraint, w, s)) > 0


@table
def test_no_sampled_feasible_point_is_nearer(constraint: cx.Constraint, shape: Any) -> None:
    if constraint.parts or constraint.spec["kind"] == "filters_and_columns":
        pytest.skip("a sequence of projections: feasible, not claimed nearest")
    w = draw(constraint, shape)
    s = constraint.init(w)
    best = squared(constraint.project(w, s), w)
    for seed in range(1, 30):
        mix = jax.tree.map(lambda a, b: a + 0.3 * b, w, draw(constraint, shape, seed))
        assert squared(constraint.project(mix, s), w) >= best * (1 - 1e-6)


@table
def test_shape_and_dtype_are_kept(constraint: cx.Constraint, shape: Any) -> None:
    for dtype in (jnp.float32, jnp.bfloat16):
        w = draw(constraint, shape, dtype=dtype)
        for a, b in zip(jax.tree.leaves(run(constraint, w)), jax.tree.leaves(w), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@table
def test_jit_equals_eager(constraint: cx.Constraint, shape: Any) -> None:
    w = draw(constraint, shape)
    same(jax.jit(lambda w: run(constraint, w))(w), run(constraint, w))


@table
def test_vmap_equals_the_loop(constraint: cx.Constraint, shape: Any) -> None:
    ws = [draw(constraint, shape, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *ws)
    got = jax.vmap(lambda w: run(constraint, w))(stacked)
    same(got, jax.tree.map(lambda *x: jnp.stack(x), *[run(constraint, w) for w in ws]))


@table
def test_zero_stays_zero(constraint: cx.Constraint, shape: Any) -> None:
    w = jax.tree.map(jnp.zeros_like, draw(constraint, shape))
    same(run(constraint, w), w)


@table
def test_spec_survives_json(constraint: cx.Constraint, shape: Any) -> None:
    again = from_spec(json.loads(json.dumps(constraint.spec)))
    assert again.spec == constraint.spec
    w = draw(constraint, shape)
    same(run(again, w), run(constraint, w))


@table
def test_frozen_piece_contains_the_point_and_keeps_updates_inside(constraint: cx.Constraint, shape: Any) -> None:
    w = draw(constraint, shape)
    s = constraint.init(w)
    z = constraint.project(w, s)
    piece = constraint.freeze(z, s)
    same(constraint.retract(z, piece), z)
    moved = jax.tree.map(lambda a, b: a + 0.1 * b, z, draw(constraint, shape, 5))
    inside = constraint.retract(moved, piece)
    same(constraint.retract(inside, piece), inside)
    for a, b in zip(jax.tree.leaves(inside), jax.tree.leaves(z), strict=True):
        assert a.dtype == b.dtype
    # whatever zeros the projection made, retraining keeps
    rules = [(".*", constraint)]
    tx = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-2, momentum=0.9), cx.retrain(rules))
    params = {"w": list(z)} if constraint.joint else {"w": z}
    state = tx.init(params)
    for seed in range(3):
        drawn = draw(constraint, shape, 10 + seed)
        gradient = {"w": list(drawn)} if constraint.joint else {"w": drawn}
        updates, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    masks = jax.tree.map(
        lambda m, p: bool(jnp.all(jnp.where(m, True, p == 0))), _mask(constraint, z, s), _value(params)
    )
    assert all(jax.tree.leaves(masks))


def _value(params: Any) -> Any:
    return tuple(params["w"]) if isinstance(params["w"], list) else params["w"]


def _mask(constraint: cx.Constraint, z: Any, s: Any) -> Any:
    """Where a projected weight may be non-zero: non-zeros, and members of kept groups that happen to be 0."""
    moved = constraint.retract(jax.tree.map(jnp.ones_like, z), constraint.freeze(z, s))
    return jax.tree.map(lambda m, v: (m != 0) | (v != 0), moved, z)


@table
def test_a_second_call_does_not_compile_again(constraint: cx.Constraint, shape: Any) -> None:
    traces = 0

    def counted(w: Any) -> Any:
        nonlocal traces
        traces += 1
        return run(constraint, w)

    f = jax.jit(counted)
    f(draw(constraint, shape, 0))
    f(draw(constraint, shape, 1))
    assert traces == 1


@table
def test_admm_moves_weights_into_the_set(constraint: cx.Constraint, shape: Any) -> None:
    target = draw(constraint, shape, 3)
    params = {"w": target}
    tx = optax.chain(cx.admm([(".*", constraint)], rho=1.0, every=10), optax.sgd(0.1))

    def body(carry: Any, _: None) -> tuple[Any, None]:
        p, s = carry
        gradient = {"w": jax.tree.map(jnp.subtract, p["w"], target)}
        updates, s = tx.update(gradient, s, p)
        return (optax.apply_updates(p, updates), s), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, None, length=400))((params, tx.init(params)))
    assert max(float(v) for k, v in cx.admm_metrics(state).items() if k.startswith("primal")) < 0.2


@table
def test_two_devices_give_the_same_bits(constraint: cx.Constraint, shape: Any) -> None:
    w = draw(constraint, shape)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(x: jax.Array) -> jax.Array:
        axis = next((a for a in range(x.ndim) if x.shape[a] % 2 == 0), None)
        spec = jax.sharding.PartitionSpec(*("x" if a == axis else None for a in range(x.ndim)))
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    same(jax.jit(lambda w: run(constraint, w))(jax.tree.map(spread, w)), run(constraint, w))


def test_unknown_kind_and_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown constraint 'wavelet'"):
        from_spec({"kind": "wavelet"})
    with pytest.raises(ValueError, match="cannot be built"):
        from_spec({"kind": "filters", "wings": 2})
