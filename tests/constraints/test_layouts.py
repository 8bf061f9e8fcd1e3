"""Every family over stacked, attention and transposed leaves: slice by slice what the set gives for the slice alone.

"Alone" is the constraint on an array in Flax's own layout, without rules or axes; the leaf is made from such arrays by
NumPy here, so that nothing of `compressx.axes` is on both sides of a comparison.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from compressx.constraints import KINDS
from compressx.constraints.base import LEVEL, TIE
from compressx.constraints.programs import programs

DENSE, CONV = (8, 12), (3, 3, 4, 6)

# kind -> an example of it, and the shape of a leaf in Flax's layout
SETS: dict[str, tuple[cx.Constraint, tuple[int, ...]]] = {
    "unstructured": (cx.unstructured(0.3), DENSE),
    "n_of_m": (cx.n_of_m(2, 4), DENSE),
    "block": (cx.block((2, 3), 0.4), DENSE),
    "filters": (cx.filters(0.5), DENSE),
    "columns": (cx.columns(0.5), CONV),
    "channels": (cx.channels(0.5), DENSE),
    "filters_and_columns": (cx.filters_and_columns(0.5, 0.25), CONV),
    "pattern": (cx.pattern(k=4), CONV),
    "connectivity": (cx.connectivity(0.3), CONV),
    "pattern_connectivity": (cx.pattern_connectivity(0.3, k=4), CONV),
    "bsp_columns": (cx.bsp_columns(0.4, strips=3), DENSE),
    "bsp_rows": (cx.bsp_rows(keep=3, strips=2), DENSE),
    "bsp": (cx.bsp(0.5, 0.5, column_strips=3, row_strips=2), DENSE),
    "block_max": (cx.block_max(3), DENSE),
    "darb": (cx.darb(0.3, allowed=(1, 2, 4)), DENSE),
    "balanced_block_max": (cx.balanced_block_max(0.5, size=2), DENSE),
    "bank_balanced": (cx.bank_balanced(0.5, 4, axis="inputs"), DENSE),
    "crossbar_aware": (cx.crossbar_aware(0.5, 0.4, rows=4, cols=4), DENSE),
    "polarize": (cx.polarize(4), DENSE),
    "quantize": (cx.quantize(3, per="channel", symmetric=False), DENSE),
    "unify": (cx.unify((2, 3), 0.5), DENSE),
    "prune_blocks": (cx.prune_blocks((2, 3), 0.5), DENSE),
    "unify_and_prune": (cx.unify_and_prune((2, 2), 0.4, 0.3), DENSE),
}
JOINT = ("coupled_filters", "network_structure")  # they say of each leaf which axis makes channels



def _conv_like(x: np.ndarray) -> bool:
    return x.ndim == 4


def middle(slices: list[np.ndarray]) -> np.ndarray:
    """Stacked between taps or inputs and the rest: `[in, stack, out]`, `[kh, kw, stack, in, out]`."""
    return np.stack(slices, 2 if _conv_like(slices[0]) else 1)


def transposed(slices: list[np.ndarray]) -> np.ndarray:
    """`[out, in]` and OIHW."""
    return slices[0].transpose((3, 2, 0, 1) if _conv_like(slices[0]) else (1, 0))


# form -> its axes by the number of a slice's axes, the leaf from its slices in Flax's layout, and how many these are
FORMS: dict[str, tuple[dict[int, str], Callable[[list[np.ndarray]], np.ndarray], int]] = {
    "stacked": ({2: "stack in out", 4: "stack taps taps in out"}, np.stack, 2),
    "stacked in the middle": ({2: "in stack out", 4: "taps taps stack in out"}, middle, 2),
    "transposed": ({2: "out in", 4: "out in taps taps"}, transposed, 1),
    "attention": ({2: "in out out"}, lambda x: x[0].reshape(len(x[0]), 3, -1), 1),
    "attention output": ({2: "in in out"}, lambda x: x[0].reshape(2, -1, x[0].shape[-1]), 1),
}


def test_every_family_is_here() -> None:
    assert set(SETS) | set(JOINT) == set(KINDS)
    assert all(constraint.spec["kind"] == kind and not constraint.joint for kind, (constraint, _) in SETS.items())


def same(constraint: cx.Constraint, got: Any, want: Any) -> None:
    """Equal to the bit; means and scales, which a compiler may add up in another order, to their last bits."""
    close = constraint.stage in (TIE, LEVEL)
    np.testing.assert_allclose(got, want, rtol=1e-6 if close else 0, atol=0)


@pytest.mark.parametrize("kind", SETS)
def test_slice_by_slice_equal_to_the_set_alone(kind: str) -> None:
    constraint, shape = SETS[kind]
    rng = np.random.default_rng(0)
    # magnitudes of the slices differ, so that one choice for all would leave one of them empty
    slices = [np.asarray(rng.standard_normal(shape) * 4.0**i, np.float32) for i in range(2)]
    alone = programs(constraint)
    hard, moved = [], []
    for x in slices:
        structure = alone.init(jnp.asarray(x))
        hard.append(np.asarray(alone.project(jnp.asarray(x), structure)))
        active = alone.freeze(jnp.asarray(hard[-1]), structure)
        moved.append(np.asarray(alone.retract(jnp.asarray(1.1 * hard[-1] + 0.01 * x), active)))
    tried = 0
    for name, (axes, make, number) in FORMS.items():
        if len(shape) not in axes:
            continue
        leaf, tried = jnp.asarray(make(slices[:number])), tried + 1
        rules = [("w", constraint, axes[len(shape)])]
        (bound,) = cx.resolve(rules, {"w": leaf})
        taken = bound.take([leaf])
        structures = bound.choose(taken)
        got = bound.project(taken, structures)
        active = bound.freeze(got, structures)
        back = bound.retract(jnp.asarray(1.1) * got + jnp.asarray(0.01) * taken, active)
        for wanted, x in ((hard, got), (moved, back)):
            out: list[Any] = [None]
            bound.put(out, x)
            assert out[0].shape == leaf.shape, name
            same(constraint, np.asarray(out[0]), make(wanted[:number]))
    assert tried == (5 if len(shape) == 2 else 3)


@pytest.mark.parametrize("kind", JOINT)
def test_sets_over_several_leaves_are_not_stacked_in_silence(kind: str) -> None:
    constraint = {
        "coupled_filters": cx.coupled_filters([(1, [(0, 6)]), (1, [(0, 6)])], 0.5),
        "network_structure": KINDS["network_structure"](
            [{"makes": 1, "makes_units": [[0, 6]], "reads": None, "reads_units": None, "columns": 4}] * 2, [[0, 6, 3]]
        ),
    }[kind]
    leaves = {name: jnp.ones((2, 8, 6)) for name in "ab"}
    with pytest.raises(ValueError, match="several leaves together, which cannot be stacked"):
        cx.resolve([(".", constraint, "stack in out")], leaves)
