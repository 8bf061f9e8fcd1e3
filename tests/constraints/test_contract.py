"""One contract over every constraint: the table lists an example of each, the tests below hold for all of them."""

import functools
import json
from collections.abc import Callable, Collection
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
    "coupled_filters": (
        cx.coupled_filters([(3, [(0, 6)]), (1, [(1, 4), (-1, 1)])], 0.5),
        ((3, 3, 4, 6), (6, 5)),
    ),
    "network_structure": (
        cx.constraints.KINDS["network_structure"](
            [
                {"makes": 3, "makes_units": [[0, 6]], "reads": None, "reads_units": None, "columns": 20},
                {"makes": None, "makes_units": None, "reads": 0, "reads_units": [[0, 6]], "columns": None},
            ],
            [[0, 6, 3]],
        ),
        ((3, 3, 4, 6), (6, 5)),
    ),
    "pattern natural": (cx.pattern(k=8), (3, 3, 6, 8)),
    "pattern aligned": (cx.pattern("elog", aligned=4), (3, 3, 5, 10)),
    "pattern network": (cx.pattern("all", k=8, scope="network", shrink=0.5), ((3, 3, 4, 6), (3, 3, 6, 4))),
    "connectivity": (cx.connectivity(0.3), (1, 1, 8, 9)),
    "connectivity balanced": (cx.connectivity(keep=2, balance="filter"), (3, 3, 6, 7)),
    "pattern_connectivity": (cx.pattern_connectivity(0.3, k=8), (3, 3, 8, 8)),
    "bsp_columns": (cx.bsp_columns(0.4, strips=3), (11, 7)),
    "bsp_columns gates": (cx.bsp_columns(keep=3, strips=3, gates="together"), ((10, 6), (10, 6))),
    "bsp_rows": (cx.bsp_rows(keep=3, strips=2), (11, 7)),
    "bsp": (cx.bsp(0.5, 0.5, column_strips=3, row_strips=2), (11, 7)),
    "block_max": (cx.block_max(3), (11, 7)),
    "darb": (cx.darb(0.3, allowed=(1, 2, 4, 8)), (11, 7)),
    "balanced_block_max": (cx.balanced_block_max(0.5, size=2), (11, 7)),
    "bank_balanced": (cx.bank_balanced(0.5, 4, axis="inputs"), (11, 7)),
    "crossbar_aware": (cx.crossbar_aware(0.5, 0.4, rows=4, cols=4, cells_per_weight=2), (3, 3, 2, 7)),
    "polarize": (cx.polarize(4), (3, 3, 4, 6)),
    "polarize energy": (cx.polarize(3, "C", "energy"), (8, 6)),
    "quantize": (cx.quantize(3), (6, 8)),
    "quantize channel": (cx.quantize(4, "cells", "channel"), (3, 3, 4, 6)),
    "quantize powers": (cx.quantize(3, "power_of_two", zero_level=True), (6, 8)),
    "quantize codebook": (cx.quantize(3, "codebook"), (3, 3, 4, 6)),
    "unify": (cx.unify((2, 3), 0.5), (7, 8)),
    "unify cubes": (cx.unify((2, 9, 2), 0.5), (3, 3, 4, 5)),
    "prune_blocks": (cx.prune_blocks((2, 3), 0.5), (7, 8)),
    "unify_and_prune": (cx.unify_and_prune((2, 2), 0.4, 0.3), (7, 8)),
    "unify_and_prune exact": (cx.unify_and_prune((2, 2), 0.4, 0.3, "exact"), (7, 8)),
    "filters & polarize & quantize": (cx.filters(0.5) & cx.polarize(4) & cx.quantize(4, "cells"), (3, 3, 4, 6)),
    "unify & quantize": (cx.unify((2, 3), 0.5) & cx.quantize(4), (7, 8)),
    "filters & unstructured": (cx.filters(0.5) & cx.unstructured(0.1), (3, 3, 4, 6)),
    "unstructured global & quantize": (
        cx.unstructured(0.3, scope="global") & cx.quantize(3, per="channel"),
        ((6, 8), (3, 3, 2, 4)),
    ),
    "pattern network & polarize & quantize": (
        cx.quantize(4) & cx.polarize(4) & cx.pattern("scp", scope="network"),
        ((3, 3, 4, 6), (3, 3, 6, 4)),
    ),
    "bsp gates & quantize": (cx.bsp_columns(keep=3, strips=3, gates="together") & cx.quantize(4), ((10, 6), (10, 6))),
    "unstructured global & filters": (
        cx.unstructured(0.3, scope="global") & cx.filters(0.5),
        ((6, 8), (3, 3, 2, 4)),
    ),
    "n_of_m & columns": (cx.n_of_m(2, 4) & cx.columns(0.5), (8, 6)),
}
table = pytest.mark.parametrize("name", list(EXAMPLES))

# Examples of a kind that another one shows: tests that compile a program of its own for each are slow on these.
VARIANTS = (
    "unstructured conv", "n_of_m conv", "block", "pattern natural", "connectivity", "bsp_columns", "quantize",
    "quantize channel", "quantize powers", "unify cubes", "unify_and_prune exact", "filters & polarize & quantize",
    "unify & quantize", "unstructured global & quantize", "bsp gates & quantize", "unstructured global & filters",
    "n_of_m & columns",
)  # fmt: skip
# An example or two of each way to choose: by magnitudes, over several leaves, by sorting, signs, ties and levels.
SPREAD = (
    "unstructured global", "filters", "network_structure", "pattern aligned", "bsp", "darb", "polarize energy",
    "unify_and_prune", "pattern network & polarize & quantize",
)  # fmt: skip


def mostly_slow(quick: Collection[str], names: Collection[str] = tuple(EXAMPLES)) -> pytest.MarkDecorator:
    """The names as a table, of which all but the quick are slow tests."""
    assert set(quick) <= set(names)
    rows = [n if n in quick else pytest.param(n, marks=pytest.mark.slow) for n in names]
    return pytest.mark.parametrize("name", rows)


kinds = mostly_slow(set(EXAMPLES) - set(VARIANTS))

# Sequences of projections and greedy choices: feasible, not claimed to be nearest.
NOT_NEAREST = (
    "filters_and_columns", "network_structure", "bsp",
    "balanced_block_max", "crossbar_aware", "unify_and_prune",
)


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


@functools.cache
def jitted(name: str, function: str) -> Callable[..., Any]:
    """The functions of an example, compiled once for all tests."""
    constraint = EXAMPLES[name][0]
    if function == "run":
        return lambda w: jitted(name, "project")(w, jitted(name, "init")(w))
    if function == "violations":
        return jax.jit(lambda w, s: cx.constraints.violations(constraint, w, s))
    return jax.jit(getattr(constraint, function))


def squared(a: Any, b: Any) -> float:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.sum(np.square(np.asarray(x, np.float64) - np.asarray(y, np.float64)))) for x, y in pairs)


def test_every_kind_has_an_example() -> None:
    for names in (EXAMPLES, set(EXAMPLES) - set(VARIANTS)):
        assert {p.spec["kind"] for n in names for p in EXAMPLES[n][0].sets} == set(KINDS)


@table
def test_projection_is_feasible_and_idempotent_to_the_bit(name: str) -> None:
    w = draw(*EXAMPLES[name])
    s = jitted(name, "init")(w)
    z = jitted(name, "project")(w, s)
    same(jitted(name, "project")(z, s), z)
    assert int(jitted(name, "violations")(z, s)) == 0
    assert int(jitted(name, "violations")(w, s)) > 0


@table
def test_no_sampled_feasible_point_is_nearer(name: str) -> None:
    constraint, shape = EXAMPLES[name]
    if constraint.parts or constraint.spec["kind"] in NOT_NEAREST:
        pytest.skip("not claimed to be the nearest point")
    w = draw(constraint, shape)
    s = jitted(name, "init")(w)
    project = jitted(name, "project")
    best = squared(project(w, s), w)
    for seed in range(1, 20):
        mix = jax.tree.map(lambda a, b: a + 0.3 * b, w, draw(constraint, shape, seed))
        assert squared(project(mix, s), w) >= best * (1 - 1e-6)


@table
def test_shape_and_dtype_are_kept(name: str) -> None:
    constraint, shape = EXAMPLES[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        w = draw(constraint, shape, dtype=dtype)
        for a, b in zip(
            jax.tree.leaves(jax.eval_shape(functools.partial(run, constraint), w)), jax.tree.leaves(w), strict=True
        ):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)


@kinds
def test_jit_equals_eager_of_numpys_arrays(name: str) -> None:
    w = draw(*EXAMPLES[name])
    same(jitted(name, "run")(w), run(EXAMPLES[name][0], jax.tree.map(np.asarray, w)))


@kinds
def test_vmap_equals_the_loop(name: str) -> None:
    constraint, shape = EXAMPLES[name]
    ws = [draw(constraint, shape, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *ws)
    got = jax.jit(jax.vmap(lambda w: run(constraint, w)))(stacked)
    want = jax.tree.map(lambda *x: jnp.stack(x), *[jitted(name, "run")(w) for w in ws])
    if constraint.stage in (cx.TIE, cx.LEVEL):  # sums in another order: means and scales may differ in the last bit
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    else:
        same(got, want)


@table
def test_zero_stays_zero(name: str) -> None:
    w = jax.tree.map(jnp.zeros_like, draw(*EXAMPLES[name]))
    same(jitted(name, "run")(w), w)


@table
def test_spec_survives_json(name: str) -> None:
    constraint = EXAMPLES[name][0]
    again = from_spec(json.loads(json.dumps(constraint.spec)))
    assert again.spec == constraint.spec
    assert (again.stage, again.joint, len(again.parts)) == (constraint.stage, constraint.joint, len(constraint.parts))


@kinds
def test_retraining_moves_only_inside_the_frozen_piece(name: str) -> None:
    constraint, shape = EXAMPLES[name]
    w = draw(constraint, shape)
    s = jitted(name, "init")(w)
    z = jitted(name, "project")(w, s)
    piece = jitted(name, "freeze")(z, s)
    retract = jitted(name, "retract")
    same(retract(z, piece), z)
    inside = retract(jax.tree.map(lambda a, b: a + 0.1 * b, z, draw(constraint, shape, 5)), piece)
    same(retract(inside, piece), inside)
    # through the optax transform, against weight decay and momentum: what may not move stays exactly 0
    params = list(z) if constraint.joint else [z]
    tx = optax.chain(
        optax.add_decayed_weights(0.1),
        optax.sgd(1e-2, momentum=0.9),
        cx.retrain([(".*", constraint)], {".*": s, "0": s}),
    )
    state = tx.init(params)
    update = jax.jit(tx.update)
    for seed in range(3):
        gradient = draw(constraint, shape, 10 + seed)
        updates, state = update(list(gradient) if constraint.joint else [gradient], state, params)
        params = optax.apply_updates(params, updates)
    after = tuple(params) if constraint.joint else params[0]
    for free, x in zip(jax.tree.leaves(_free(z, retract, piece)), jax.tree.leaves(after), strict=True):
        assert bool(jnp.all(jnp.where(free, True, x == 0)))


def _free(z: Any, retract: Callable[..., Any], piece: Any) -> Any:
    """Where a projected weight may be non-zero: non-zeros, and members of kept groups that happen to be 0."""
    up, down = (retract(jax.tree.map(lambda x, a=a: jnp.full_like(x, a), z), piece) for a in (1.0, -1.0))
    return jax.tree.map(lambda a, b, v: (a != 0) | (b != 0) | (v != 0), up, down, z)


@table
def test_a_second_call_does_not_compile_again(name: str) -> None:
    for seed in range(2):
        jitted(name, "run")(draw(*EXAMPLES[name], seed=seed))
    for function in ("init", "project"):
        assert jitted(name, function)._cache_size() == 1  # type: ignore[attr-defined]


@kinds
def test_admm_moves_weights_into_the_set(name: str) -> None:
    constraint, shape = EXAMPLES[name]
    target = draw(constraint, shape, 3)
    params = {"w": target}
    # rho * U grows with rho here: with the dual kept instead, two sets at once can settle between them
    pull = cx.admm([(".*", constraint)], rho=cx.schedules.staged(0.1, 1.15, 1, 20.0), every=10, rescale_dual=False)
    tx = optax.chain(pull, optax.sgd(0.02))

    def body(carry: Any, _: None) -> tuple[Any, None]:
        p, s = carry
        gradient = {"w": jax.tree.map(jnp.subtract, p["w"], target)}
        updates, s = tx.update(gradient, s, p)
        return (optax.apply_updates(p, updates), s), None

    (params, state), _ = jax.jit(lambda c: jax.lax.scan(body, c, None, length=600))((params, tx.init(params)))
    assert max(float(v) for k, v in cx.admm_metrics(state).items() if k.startswith("primal")) < 0.2


@mostly_slow(SPREAD)
def test_two_devices_give_the_same_bits(name: str) -> None:
    w = draw(*EXAMPLES[name])
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(x: jax.Array) -> jax.Array:
        axis = next((a for a in range(x.ndim) if x.shape[a] % 2 == 0), None)
        spec = jax.sharding.PartitionSpec(*("x" if a == axis else None for a in range(x.ndim)))
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    same(jax.jit(functools.partial(run, EXAMPLES[name][0]))(jax.tree.map(spread, w)), jitted(name, "run")(w))


def test_unknown_kind_and_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown constraint 'wavelet'"):
        from_spec({"kind": "wavelet"})
    with pytest.raises(ValueError, match="cannot be built"):
        from_spec({"kind": "filters", "wings": 2})
