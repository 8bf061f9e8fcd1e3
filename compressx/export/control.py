"""Loops and choices: `scan` is ONNX' Scan, `while` its Loop, `cond` its If.

The weights that a body reads stay outside, stored once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from onnx import helper

from compressx.export.graph import Call, Graph, Rule, Value, held, info
from compressx.trace import Program, flatten, scan_parts


def _subgraph(
    g: Graph, takes: Sequence[tuple[Any, Any]], make: Callable[[list[Value]], list[tuple[str, Any, Any]]]
) -> Any:
    """A body with inputs of these shapes and types; `make` writes it and gives name, shape and type of each output."""
    values = [Value(shape, g.fresh()) for shape, _ in takes]
    with g.body() as nodes:
        made = make(values)
        ends = [(g.node("Identity", name), shape, dtype) for name, shape, dtype in made]  # outputs of its own
    declared = [info(str(v.name), shape, held(dtype)) for v, (shape, dtype) in zip(values, takes, strict=True)]
    return helper.make_graph(nodes, g.fresh(), declared, [info(n, shape, held(dtype)) for n, shape, dtype in ends])


def _written(g: Graph, program: Program, inputs: Sequence[Value]) -> list[tuple[str, Any, Any]]:
    """Runs a program; name, shape and type of each output."""
    outs = zip(g.run(program, inputs), program.outputs, strict=True)
    return [(g.firm(v, program.shapes[n]), program.shapes[n], program.dtypes[n]) for v, n in outs]


def _ends(call: Call, names: Sequence[str]) -> list[Value]:
    return [Value(shape, name) for shape, name in zip(call.out_shapes, names, strict=True)]


def _scan(g: Graph, call: Call) -> list[Value]:
    p, program = call.params, flatten(call.params["jaxpr"])
    fixed, moving = scan_parts(program, call.shapes, call.out_shapes)
    carried = fixed + moving
    sorts = list(zip(call.shapes, call.dtypes, strict=True))
    takes = [*sorts[fixed:carried], *((shape[1:], dtype) for shape, dtype in sorts[carried:])]
    inputs = [g.read(call, i) for i in range(fixed, len(call.values))]
    if len(sorts) == carried:  # ONNX counts the steps by what is scanned
        takes.append(((), np.int32))
        inputs.append(g.node("Expand", g.like(0, np.int32), g.dims([p["length"]])))
    number = len(sorts) - fixed
    body = _subgraph(g, takes, lambda values: _written(g, program, [*call.values[:fixed], *values[:number]]))
    reads, writes = len(inputs) - moving, len(call.out_shapes) - moving
    back = int(p["reverse"])
    names = g.several(
        "Scan",
        inputs,
        len(call.out_shapes),
        body=body,
        num_scan_inputs=reads,
        scan_input_directions=[back] * reads,
        **({"scan_output_directions": [back] * writes} if writes else {}),
    )
    return _ends(call, names)


def _while(g: Graph, call: Call) -> list[Value]:
    p = call.params
    tests, fixed = p["cond_nconsts"], p["cond_nconsts"] + p["body_nconsts"]
    test, step = flatten(p["cond_jaxpr"]), flatten(p["body_jaxpr"])
    first = [Value(call.shapes[i], g.read(call, i)) for i in range(fixed, len(call.values))]
    going = _written(g, test, [*call.values[:tests], *first])[0][0]

    def make(values: list[Value]) -> list[tuple[str, Any, Any]]:
        after = _written(g, step, [*call.values[tests:fixed], *values[2:]])
        carried = [Value(shape, name) for name, shape, _ in after]
        return [*_written(g, test, [*call.values[:tests], *carried]), *after]

    sorts = zip(call.shapes[fixed:], call.dtypes[fixed:], strict=True)
    body = _subgraph(g, [((), np.dtype(np.int64)), ((), np.dtype(bool)), *sorts], make)
    names = g.several("Loop", ["", going, *(str(v.name) for v in first)], len(first), body=body)
    return _ends(call, names)


def _cond(g: Graph, call: Call) -> list[Value]:
    branches = [flatten(branch) for branch in call.params["branches"]]
    index, inputs = call.values[0], call.values[1:]
    if index.array is not None:
        return g.run(branches[int(np.clip(index.array, 0, len(branches) - 1))], inputs)
    which = g.read(call, 0)

    def choose(first: int) -> list[tuple[str, Any, Any]]:
        """The branch `first` or one after it; an index beyond the ends takes the nearest."""
        if first == len(branches) - 1:
            return _written(g, branches[first], inputs)
        taken = g.node("LessOrEqual", which, g.like(first, call.dtypes[0]))
        here = _subgraph(g, [], lambda _: _written(g, branches[first], inputs))
        later = _subgraph(g, [], lambda _: choose(first + 1))
        names = g.several("If", [taken], len(call.out_shapes), then_branch=here, else_branch=later)
        return list(zip(names, call.out_shapes, call.out_dtypes, strict=True))

    return [Value(shape, name) for name, shape, _ in choose(0)]


TABLE: dict[str, Rule] = {"cond": _cond, "scan": _scan, "while": _while}
EXACT = frozenset(TABLE)
