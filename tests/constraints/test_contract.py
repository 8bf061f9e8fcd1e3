"""One contract over every constraint: the table lists an example of each, the tests below hold for all of them."""

import functools
import json
import pickle
from collections.abc import Collection

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx import testing
from compressx.constraints import KINDS, from_spec

Shape = tuple[int, ...]
# name -> (constraint, shape of a leaf, or shapes of the leaves of a joint one)
EXAMPLES: dict[str, tuple[cx.Constraint, Shape | tuple[Shape, ...]]] = {
    "unstructured": (cx.unstructured(0.3), (6, 8)),
    "unstructured conv": (cx.unstructured(keep=11), (3, 3, 4, 5)),
    "unstructured global": (cx.unstructured(0.2, scope="rule"), ((6, 8), (3, 3, 2, 4))),
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
    "pattern network": (cx.pattern("all", k=8, scope="rule", shrink=0.5), ((3, 3, 4, 6), (3, 3, 6, 4))),
    "connectivity": (cx.connectivity(0.3), (1, 1, 8, 9)),
    "connectivity balanced": (cx.connectivity(keep=2, balance="filter"), (3, 3, 6, 7)),
    "pattern_connectivity": (cx.pattern_connectivity(0.3, k=8), (3, 3, 8, 8)),
    "bsp_columns": (cx.bsp_columns(0.4, strips=3), (11, 7)),
    "bsp_columns gates": (cx.bsp_columns(keep=3, strips=3, scope="rule"), ((10, 6), (10, 6))),
    "bsp_rows": (cx.bsp_rows(keep=3, strips=2), (11, 7)),
    "bsp": (cx.bsp(0.5, 0.5, column_strips=3, row_strips=2), (11, 7)),
    "block_max": (cx.block_max(3), (11, 7)),
    "darb": (cx.darb(0.3, allowed=(1, 2, 4, 8)), (11, 7)),
    "balanced_block_max": (cx.balanced_block_max(0.5, size=2), (11, 7)),
    "bank_balanced": (cx.bank_balanced(0.5, 4, axis="inputs"), (11, 7)),
    "crossbar_aware": (cx.crossbar_aware(0.5, 0.4, rows=4, cols=4, cells_per_weight=2), (3, 3, 2, 7)),
    "polarize": (cx.polarize(4), (3, 3, 4, 6)),
    "polarize energy": (cx.polarize(3, order="C", rule="energy"), (8, 6)),
    "quantize": (cx.quantize(3), (6, 8)),
    "quantize channel": (cx.quantize(4, grid="cells", per="channel"), (3, 3, 4, 6)),
    "quantize groups": (cx.quantize(4, per=4), (6, 8)),
    "quantize float8": (cx.quantize(8, grid="float8_e4m3"), (6, 8)),
    "quantize powers": (cx.quantize(3, grid="power_of_two", zero_level=True), (6, 8)),
    "quantize asymmetric": (cx.quantize(3, per="channel", symmetric=False), (6, 8)),
    "quantize codebook": (cx.quantize(3, grid="codebook"), (3, 3, 4, 6)),
    "unify": (cx.unify((2, 3), 0.5), (7, 8)),
    "unify cubes": (cx.unify((2, 9, 2), 0.5), (3, 3, 4, 5)),
    "prune_blocks": (cx.prune_blocks((2, 3), 0.5), (7, 8)),
    "unify_and_prune": (cx.unify_and_prune((2, 2), 0.4, 0.3), (7, 8)),
    "unify_and_prune exact": (cx.unify_and_prune((2, 2), 0.4, 0.3, selection="exact"), (7, 8)),
    "filters & polarize & quantize": (cx.filters(0.5) & cx.polarize(4) & cx.quantize(4, grid="cells"), (3, 3, 4, 6)),
    "unify & quantize": (cx.unify((2, 3), 0.5) & cx.quantize(4), (7, 8)),
    "filters & unstructured": (cx.filters(0.5) & cx.unstructured(0.1), (3, 3, 4, 6)),
    "unstructured global & quantize": (
        cx.unstructured(0.3, scope="rule") & cx.quantize(3, per="channel"),
        ((6, 8), (3, 3, 2, 4)),
    ),
    "pattern network & polarize & quantize": (
        cx.quantize(4) & cx.polarize(4) & cx.pattern("scp", scope="rule"),
        ((3, 3, 4, 6), (3, 3, 6, 4)),
    ),
    "bsp gates & quantize": (cx.bsp_columns(keep=3, strips=3, scope="rule") & cx.quantize(4), ((10, 6), (10, 6))),
    "unstructured global & filters": (
        cx.unstructured(0.3, scope="rule") & cx.filters(0.5),
        ((6, 8), (3, 3, 2, 4)),
    ),
    "n_of_m & columns": (cx.n_of_m(2, 4) & cx.columns(0.5), (8, 6)),
}
table = pytest.mark.parametrize("name", list(EXAMPLES))

# Examples of a kind that another one shows: tests that compile a program of its own for each are slow on these.
VARIANTS = (
    "unstructured conv", "n_of_m conv", "block", "pattern natural", "connectivity", "bsp_columns", "quantize",
    "quantize channel", "quantize groups", "quantize float8", "quantize powers", "quantize asymmetric", "unify cubes",
    "unify_and_prune exact", "filters & polarize & quantize",
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


# Sequences of projections and greedy choices: feasible, not claimed to be nearest.
NOT_NEAREST = (
    "filters_and_columns", "network_structure", "bsp",
    "balanced_block_max", "crossbar_aware", "unify_and_prune",
)


@functools.cache
def contract(name: str) -> testing.Contract:
    """An example's contract, whose functions are compiled once for all tests."""
    constraint, shape = EXAMPLES[name]
    like = tuple(jnp.zeros(s) for s in shape) if constraint.joint else jnp.zeros(shape)  # type: ignore[arg-type]
    return testing.Contract(constraint, like)


def test_every_kind_has_an_example() -> None:
    for names in (EXAMPLES, set(EXAMPLES) - set(VARIANTS)):
        assert {p.spec["kind"] for n in names for p in EXAMPLES[n][0].sets} == set(KINDS)


COSTLY = ("eager", "mapped", "trained")  # programs of their own, that share nothing with the other checks


def by_default(name: str, check: str) -> bool:
    """Whether `make test` runs a check: on an example of each kind, the costly ones on one of each way to choose."""
    return check == "shapes" or (name not in VARIANTS and (check not in COSTLY or name in SPREAD))



@pytest.mark.parametrize(
    ("name", "check"),
    [
        pytest.param(n, c, marks=[] if by_default(n, c) else pytest.mark.slow)
        for n in EXAMPLES
        for c in testing.CHECKS
    ],
)
def test_contract(name: str, check: str) -> None:
    constraint = EXAMPLES[name][0]
    if check == "nearest" and (constraint.parts or constraint.spec["kind"] in NOT_NEAREST):
        pytest.skip("not claimed to be the nearest point")
    getattr(contract(name), check)()


@table
def test_a_spec_makes_the_set_again(name: str) -> None:
    constraint = EXAMPLES[name][0]
    for again in (from_spec(json.loads(json.dumps(constraint.spec))), pickle.loads(pickle.dumps(constraint))):
        assert again.spec == constraint.spec
        assert (again.stage, again.joint, len(again.parts)) == (
            constraint.stage,
            constraint.joint,
            len(constraint.parts),
        )


BROKEN: dict[str, tuple[cx.Constraint, str]] = {
    "feasible": (cx.filters(0.5)._replace(project=lambda w, _: 0.5 * w), "are not equal"),
    "shapes": (cx.filters(0.5)._replace(project=lambda w, _: jnp.zeros(w.shape)), "bfloat16 .* becomes float32"),
    "eager": (cx.filters(0.5)._replace(project=lambda w, _: w * (2.0 - isinstance(w, jax.core.Tracer))), "equal"),
    "zeros": (cx.filters(0.5)._replace(project=lambda w, _: w + 1), "are not equal"),
    "spec": (cx.filters(0.5)._replace(spec={"kind": "mine", "sizes": (1, 2)}), "mark its function @factory"),
    "active": (cx.filters(0.5)._replace(retract=lambda w, _: 0.5 * w), "are not equal"),
    "nearest": (
        cx.filters(0.5)._replace(project=lambda w, _: -cx.filters(0.5).project(w, ())),
        "a nearer point was found",
    ),
}


@pytest.mark.parametrize("check", BROKEN)
def test_what_breaks_the_contract_is_said(check: str) -> None:
    constraint, text = BROKEN[check]
    with pytest.raises(AssertionError, match=f"(?s){text}"):
        getattr(testing.Contract(constraint, jnp.zeros((4, 6))), check)()


def test_a_set_of_ones_own_is_checked_whole() -> None:
    @cx.factory
    def first_rows(number: int) -> cx.Constraint:
        return cx.support(lambda w: jnp.broadcast_to(jnp.arange(w.shape[0])[:, None] < number, w.shape))

    testing.check_constraint(first_rows(3), jnp.zeros((8, 6)))
    with pytest.raises(AssertionError, match=r"^feasible: first_rows\(number=8\): a drawn weight lies in the set"):
        testing.check_constraint(first_rows(8), jnp.zeros((8, 6)))


@mostly_slow(SPREAD[::2])
def test_two_devices_give_the_same_bits(name: str) -> None:
    held = contract(name)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))

    def spread(x: jax.Array) -> jax.Array:
        axis = next((a for a in range(x.ndim) if x.shape[a] % 2 == 0), None)
        spec = jax.sharding.PartitionSpec(*("x" if a == axis else None for a in range(x.ndim)))
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    w = held.draw()
    over_two, over_one = jax.jit(held.run)(jax.tree.map(spread, w)), held.jitted["run"](w)
    for a, b in zip(jax.tree.leaves(over_two), jax.tree.leaves(over_one), strict=True):
        np.testing.assert_array_equal(a, b)


def test_unknown_kind_and_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="unknown constraint 'wavelet'"):
        from_spec({"kind": "wavelet"})
    with pytest.raises(ValueError, match="cannot be built"):
        from_spec({"kind": "filters", "wings": 2})
