"""Products of two activations, as attention has them: no array holds either side, and a cost must not forget them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from compressx.crossbar.mapping import Layer


def dynamic_products(closed: ClosedJaxpr, given: int) -> list[Layer]:
    """The matrix products of a traced function whose two sides both depend on its inputs.

    Args:
      closed: the function; its last `given` arguments are inputs, all before them parameters.
      given: how many.

    Returns:
      A layer for each, marked `dynamic`, named after the module that multiplies: `groups` are the batched axes, rows
      and columns those of the right side, uses the rows of the left. What lies in a scan counts once a step.
    """
    count = len(closed.jaxpr.invars)
    found: list[Layer] = []
    seen: Counter[str] = Counter()

    def walk(jaxpr: Jaxpr, fed: Sequence[bool], times: int) -> list[bool]:
        depends = dict(zip(jaxpr.invars, fed, strict=True))
        known = lambda v: not isinstance(v, Literal) and depends.get(v, False)
        for eqn in jaxpr.eqns:
            sides = [known(v) for v in eqn.invars]
            out = [any(sides)] * len(eqn.outvars)
            name, inside = eqn.primitive.name, [p for value in eqn.params.values() for p in _jaxprs(value)]
            if name in ("scan", "while"):  # a carry may come to depend on the inputs in a later turn
                fixed = _fixed(eqn, inside[0]) if name == "scan" else 0
                for each in inside:
                    start = [sides[i] if i < fixed else any(sides) for i in range(len(each.invars))]
                    walk(each, start, times * eqn.params.get("length", 1))
            elif inside and all(len(each.invars) <= len(sides) for each in inside):
                # What comes before the arguments is none of them: the number of a branch.
                ends = [walk(each, sides[len(sides) - len(each.invars) :], times) for each in inside]
                if all(len(end) == len(out) for end in ends):
                    out = [any(each) for each in zip(*ends, strict=True)]
            if eqn.primitive.name == "dot_general" and all(sides):
                found.append(_product(eqn, times, seen))
            depends.update(zip(eqn.outvars, out, strict=True))
        return [known(v) for v in jaxpr.outvars]

    walk(closed.jaxpr, [i >= count - given for i in range(count)], 1)
    return found


def _fixed(eqn: Any, body: Jaxpr) -> int:
    """How many operands of a scan are the same in every step: `trace.scan_parts` for a jaxpr."""
    deeper = lambda outer, inner: sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))
    carried = len(eqn.outvars) - deeper(eqn.outvars, body.outvars)
    return len(eqn.invars) - carried - deeper(eqn.invars, body.invars)


def _jaxprs(value: Any) -> list[Jaxpr]:
    if isinstance(value, ClosedJaxpr):
        return [value.jaxpr]
    if isinstance(value, Jaxpr):
        return [value]
    if isinstance(value, Mapping):
        return [j for v in value.values() for j in _jaxprs(v)]
    return [j for v in value for j in _jaxprs(v)] if isinstance(value, list | tuple) else []


def _product(eqn: Any, times: int, seen: Counter[str]) -> Layer:
    (_, contracted), (_, batched) = eqn.params["dimension_numbers"]
    left, right = (v.aval.shape for v in eqn.invars)
    inner, groups = prod(right[a] for a in contracted), prod(right[a] for a in batched)
    columns = prod(right) // max(1, inner * groups)
    uses = prod(left) // max(1, inner * groups) * times
    name = str(eqn.source_info.name_stack) or "product"
    seen[name] += 1
    name += f"/product_{seen[name]}"
    return Layer(name, np.ones((groups, inner, columns), np.bool_), max(1, uses), dynamic=True)


def traced(apply: Any, variables: Any, *args: Any, **kwargs: Any) -> tuple[ClosedJaxpr, int]:
    """`apply` as a program, and how many of its arguments are inputs."""
    closed = jax.make_jaxpr(lambda v, *a: apply(v, *a, **kwargs))(variables, *args)
    return closed, len(jax.tree.leaves(args))
