"""Leaves that no one thinks of: every set applies to them, or says which leaf it cannot apply to and why."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import compressx as cx
from tests.constraints.test_contract import EXAMPLES

SHAPES: list[tuple[int, ...]] = [
    *((), (1,), (5,), (1, 1), (1, 7), (7, 1), (1, 1, 1, 1), (3, 3, 1, 1), (1, 1, 4, 4), (2, 3, 4), (2, 2, 2, 2, 2)),
    *((0,), (0, 4), (4, 0), (0, 0), (3, 3, 0, 4), (3, 3, 4, 0), (0, 3, 4, 4)),
]


def leaves(constraint: cx.Constraint, number: int, shape: tuple[int, ...], dtype: Any) -> dict[str, Any]:
    """As many leaves as the example has, the first of the shape asked for."""
    rng = np.random.default_rng(0)
    made = {f"layer{i}": jnp.asarray(10 * rng.standard_normal(shape), dtype) for i in range(number)}
    if constraint.joint and number > 1:
        made["layer1"] = jnp.asarray(rng.standard_normal((6, 8)), jnp.float32)
    return made


def refusal(name: str, shape: tuple[int, ...], phases: Callable[[Any, Any], None]) -> str | None:
    """What a call with a leaf of this shape says, which must name the leaf, its shape and, if empty, why; else None."""
    constraint, example = EXAMPLES[name]
    params = leaves(constraint, len(example) if constraint.joint else 1, shape, jnp.float32)
    try:
        phases(params, [("layer.*", constraint)])
    except ValueError as error:
        text = str(error)
    else:
        assert 0 not in shape
        return None
    assert text.startswith("layer0") and str(shape) in text, text
    assert 0 not in shape or "no weights" in text, text
    return text


@pytest.mark.parametrize("name", list(EXAMPLES))
def test_odd_shapes_are_held_or_refused_by_name(name: str) -> None:
    """By the shapes alone, which costs no compilation."""

    def phases(params: Any, rules: Any) -> None:
        jax.eval_shape(lambda p: (cx.structures(p, rules), cx.retrain(rules).init(p), cx.admm(rules).init(p)), params)

    assert any(refusal(name, shape, phases) for shape in SHAPES)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_odd_shapes_that_are_held_pass_every_phase(name: str) -> None:
    def phases(params: Any, rules: Any) -> None:
        structure, hard = cx.structures(params, rules), cx.harden(params, rules, fresh=True).params
        assert {k: x.shape for k, x in hard.items()} == {k: x.shape for k, x in params.items()}
        cx.retrain(rules, structure).init(hard)
        cx.admm(rules).init(params)

    for shape in SHAPES:
        refusal(name, shape, phases)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32, jnp.uint8, jnp.complex64, jnp.bool_])
def test_other_dtypes_are_named(dtype: Any) -> None:
    for constraint, shape in EXAMPLES.values():
        params = leaves(constraint, len(shape) if constraint.joint else 1, (6, 8), dtype)
        with pytest.raises(ValueError, match=rf"layer0: only floating-point .* got {np.dtype(dtype).name}"):
            cx.resolve([("layer.*", constraint)], params)
    for call in (cx.harden, lambda p, r: cx.admm(r).init(p), lambda p, r: cx.retrain(r).init(p)):
        with pytest.raises(ValueError, match="layer0: only floating-point"):
            call({"layer0": jnp.ones((4, 4), dtype)}, [("layer.*", cx.unstructured(0.5))])


def test_an_empty_leaf_is_left_out_by_the_rule_that_the_error_gives() -> None:
    params = {"a": {"kernel": jnp.ones((4, 4))}, "b": {"kernel": jnp.ones((4, 0))}}
    rules = [(".*kernel", cx.unstructured(0.5))]
    with pytest.raises(ValueError, match=r"b/kernel \(4, 0\): it has no weights.*\('b/kernel', None\) before"):
        cx.harden(params, rules, fresh=True)
    hard = cx.harden(params, [("b/kernel", None), *rules], fresh=True).params
    assert hard["b"]["kernel"].shape == (4, 0) and int(jnp.sum(hard["a"]["kernel"] != 0)) == 8


def test_shapes_alone_are_checked_alike() -> None:
    with pytest.raises(ValueError, match=r"w \(4, 0\): it has no weights"):
        cx.resolve([("w", cx.quantize(4))], {"w": jax.ShapeDtypeStruct((4, 0), jnp.float32)})
