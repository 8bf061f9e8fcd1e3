"""Sensitivity agrees with pruning one leaf at a time by hand, and the allocation with a search of all choices."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compressx import harden
from compressx.budget import allocate
from compressx.budget.sensitivity import Row, sensitivity
from compressx.constraints import filters, unstructured

DENSITIES = (0.25, 0.5, 1.0)


@pytest.fixture
def net(rng):
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in (("a", (5, 8)), ("b", (8, 4)))}
    x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((16, 5), (16, 4)))
    traces = []

    def loss(p):
        traces.append(1)
        return jnp.mean(jnp.square(jnp.tanh(x @ p["a"]) @ p["b"] - y))

    return params, loss, traces


@pytest.mark.parametrize("at_once", [None, 1])
@pytest.mark.parametrize(("structure", "constraint"), [("weights", unstructured), ("filters", filters)])
def test_rows_are_the_losses_of_leaves_pruned_by_hand(net, structure, constraint, at_once) -> None:
    params, loss, _ = net
    rows = sensitivity(loss, params, ["b", "a"], DENSITIES, structure, at_once)
    assert [(r.path, r.density) for r in rows] == list(itertools.product(["b", "a"], DENSITIES))
    dense = float(loss(params))
    for row in rows:
        pruned = constraint(row.density).project(params[row.path], ())
        assert row.weights == int(jnp.count_nonzero(pruned))
        assert row.value == pytest.approx(float(loss({**params, row.path: pruned})), rel=1e-5)
        assert row.change == pytest.approx(row.value - dense, abs=1e-5)


def test_a_leaf_whose_axes_are_said_is_pruned_as_a_rule_would(rng) -> None:
    """`[heads, head_dim, d]`, `[out, in]`, and a stack whose slices differ in size: each slice keeps as many."""
    shapes = {"o": (2, 4, 8), "t": (8, 4), "s": (3, 4, 8)}
    axes = {"o": "in in out", "t": "out in", "s": "stack in out"}
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    params["s"] = params["s"] * jnp.array([1.0, 10.0, 100.0])[:, None, None]
    scale = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
    loss = lambda p: sum(jnp.sum(scale[k] * p[k]) for k in shapes)
    for row in sensitivity(loss, params, list(shapes), [0.5], "filters", axes=axes):
        rules = [(row.path, filters(0.5), axes[row.path])]
        pruned = harden(params, rules, fresh=True).params
        assert row.weights == int(jnp.count_nonzero(pruned[row.path]))
        assert row.value == pytest.approx(float(loss(pruned)), rel=1e-5)
    with pytest.raises(ValueError, match=r"s \(3, 4, 8\): filters of 3 axes: say in `axes`"):
        sensitivity(loss, params, ["s"], [0.5], "filters")


def test_all_layers_and_rates_are_one_compiled_program(net) -> None:
    params, loss, traces = net
    sensitivity(loss, params, ["a", "b"], [0.1 * k for k in range(1, 11)])
    assert len(traces) <= 3  # once for the dense loss and once for all pruned ones, whatever their number


def test_ties_go_to_the_lower_index() -> None:
    rows = sensitivity(lambda p: jnp.sum(p["a"] * jnp.arange(4.0)), {"a": jnp.ones(4)}, ["a"], [0.5])
    assert rows[0].value == 0 + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((["z"], [0.5]), "no leaf z; the paths are a, b"),
        ((["a"], []), "at least one leaf and one density"),
        ((["a"], [1.5]), "must be in"),
        ((["a"], [0.5], "rows"), "structure must be one of weights"),
        ((["a"], [0.001]), "keeps none"),
    ],
)
def test_bad_requests_are_named(net, arguments, message) -> None:
    params, loss, _ = net
    with pytest.raises(ValueError, match=message):
        sensitivity(loss, params, *arguments)


def _row(path: str, k: int, change: float) -> Row:
    return Row(path, k / 8, k, 8, 3 * k, change, change)


options = st.lists(
    st.lists(st.tuples(st.integers(1, 8), st.integers(-3, 30)), min_size=1, max_size=4, unique_by=lambda o: o[0]),
    min_size=1,
    max_size=4,
)


@given(options, st.integers(0, 60))
def test_the_allocation_is_the_best_of_all_choices(leaves, spare) -> None:
    rows = [_row(f"l{i}", k, float(v)) for i, choices in enumerate(leaves) for k, v in choices]
    cost = allocate.bytes_cost(value_bytes=2)
    every = list(itertools.product(*([r for r in rows if r.path == f"l{i}"] for i in range(len(leaves)))))
    budget = min(sum(map(cost, c)) for c in every) + spare
    best = min(sum(r.change for r in c) for c in every if sum(map(cost, c)) <= budget)
    for states in (4096, 2):  # with two states only the budget and the leaves are sure
        chosen = allocate.by_sensitivity(rows, cost, budget, states)
        assert [r.path for r in chosen] == [f"l{i}" for i in range(len(leaves))]
        assert sum(map(cost, chosen)) <= budget
        if states > 2:
            assert sum(r.change for r in chosen) == best


def test_costs_count_bytes_operations_and_measured_time() -> None:
    row = _row("a", 4, 0.0)
    assert allocate.bytes_cost(4, 1.0)(row) == 12 * 4 + 1
    assert allocate.flops_cost({"a": 100})(row) == 1200
    assert allocate.table_cost({("a", 4): 0.25})(row) == 0.25
    with pytest.raises(ValueError, match="positions is missing a"):
        allocate.flops_cost({})(row)
    with pytest.raises(ValueError, match="no entry for a with 4 of 8"):
        allocate.table_cost({})(row)
    with pytest.raises(ValueError, match="a budget of 5 is below 12"):
        allocate.by_sensitivity([row], lambda r: r.weights, 5)
    with pytest.raises(ValueError, match="must be finite"):
        allocate.by_sensitivity([_row("a", 4, np.nan)], lambda r: r.weights, 50)
