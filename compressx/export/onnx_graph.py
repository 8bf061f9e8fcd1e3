"""A traced program as an ONNX model. The tables beside this file say what is written for each primitive."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import onnx
from jax.extend.core import ClosedJaxpr
from onnx import helper

from compressx.export import control, elementwise, indexing, moves, products
from compressx.export.graph import Graph, Rules, Value, held, info, onnx_type
from compressx.trace import flatten

OPSET, IR = 18, 9

RULES = Rules(
    elementwise=elementwise.TABLE,
    whole=moves.TABLE | products.TABLE | indexing.TABLE | control.TABLE,
    exact=elementwise.EXACT | moves.EXACT | products.EXACT | indexing.EXACT | control.EXACT,
)


def outside(dtype: Any) -> str:
    """The type of an input or output of the model: that of the network, but float32 for bfloat16 and smaller floats."""
    kept = str(jnp.dtype(dtype))
    return held(dtype) if jnp.issubdtype(dtype, jnp.floating) else kept


def convert(closed: ClosedJaxpr, inputs: Sequence[str], outputs: Sequence[str], name: str) -> bytes:
    """The ONNX model of a program.

    Args:
      closed: the traced program; the first axis of each input is the batch.
      inputs: names of the inputs.
      outputs: names of the outputs, none of which is an input's.
      name: of the graph.

    Raises:
      ValueError: a primitive without a counterpart, or a model beyond 2 GiB.
    """
    program = flatten(closed)
    g = Graph(RULES, (*inputs, *outputs))
    values, declared = [], []
    for label, number in zip(inputs, program.inputs, strict=True):
        shape, dtype = program.shapes[number], program.dtypes[number]
        declared.append(info(label, shape, outside(dtype)))
        same = held(dtype) == outside(dtype)
        read = g.rounded(label, dtype) if same else g.node("Cast", label, to=onnx_type(held(dtype)))
        values.append(Value(shape, read))
    made = []
    for label, number, value in zip(outputs, program.outputs, g.run(program, values), strict=True):
        shape, dtype = program.shapes[number], program.dtypes[number]
        whole = g.firm(value, shape)
        made.append(info(label, shape, outside(dtype)))
        same = held(dtype) == outside(dtype)
        whole = whole if same else g.node("Cast", whole, to=onnx_type(outside(dtype)))
        g.nodes.append(helper.make_node("Identity", [whole], [label]))
    graph = helper.make_graph([*g.prelude, *g.nodes], name, declared, made, g.initializers)
    opset = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=IR, producer_name="compressx")
    onnx.checker.check_model(model, full_check=True)
    return bytes(model.SerializeToString())
