"""What a network costs, by layer: weights, multiply-adds, bytes moved; and the most memory its activations take."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from compressx.trace import Function, trace

_WORD = 4  # bytes of float32


class LayerCost(NamedTuple):
    """A convolution, or a product with a matrix of weights, for one image.

    Attributes:
      path: of the weight.
      shape: of the weight, `[kh, kw, cin, cout]` or `[in, out]`.
      image: of what it reads, without the batch: `(h, w, cin)`.
      stride: rows of the image a row of the output.
      outputs: positions at which the weight is used (rows times columns of the output).
      positions: rows of the GEMM view that are used.
      weights: `positions * cout`.
      macs: multiply-adds, `weights * outputs`.
      bytes: weights, image and output, each moved once, in float32.

    Example:
      >>> dense = lambda v, x: x @ v["kernel"]
      >>> (line,) = compressx.compaction.costs(dense, {"kernel": jnp.ones((8, 4))}, jnp.zeros((1, 8)))
      >>> line.weights, line.macs, line.bytes  # 4 bytes of each weight, input and output
      (32, 32, 176)
    """

    path: str
    shape: tuple[int, ...]
    image: tuple[int, ...]
    stride: int
    outputs: int
    positions: int
    weights: int
    macs: int
    bytes: int


def costs(
    model: nn.Module | Function, variables: Any, x: Any, used: Mapping[str, np.ndarray] | None = None
) -> list[LayerCost]:
    """Every convolution and weight matrix of a network, in the order in which they run, for inputs of batch 1.

    Args:
      model: a flax module (in evaluation mode, see `trace.function_of`), or any `f(variables, x)`.
      variables: arrays or shapes; kernels as they are (not gathered).
      x: inputs of batch 1, arrays or shapes.
      used: path -> positions that are not all zero, for kernels of which only those are stored; the rest use all.

    Returns:
      A `LayerCost` for each.

    Example:
      >>> dense = lambda v, x: x @ v["kernel"]
      >>> [c.macs for c in compressx.compaction.costs(dense, {"kernel": jnp.ones((8, 4))}, jnp.zeros((1, 8)))]
      [32]
    """
    program = trace(model, variables, x)
    leaves = len(program.paths)
    out = []
    for op in program.ops:
        if op.primitive.name not in ("conv_general_dilated", "dot_general") or op.inputs[1] >= leaves:
            continue
        path, shape = program.paths[op.inputs[1]], program.shapes[op.inputs[1]]
        image, result = program.shapes[op.inputs[0]], program.shapes[op.outputs[0]]
        conv = op.primitive.name == "conv_general_dilated"
        places = math.prod(result) // shape[-1]
        positions = math.prod(shape[:-1]) if used is None or path not in used else len(used[path])
        weights = positions * shape[-1]
        moved = _WORD * (weights + math.prod(image) + math.prod(result))
        stride = int(op.params["window_strides"][0]) if conv else 1
        sizes = (places, positions, weights, weights * places, moved)
        out.append(LayerCost(path, shape, tuple(image[1:]), stride, *sizes))
    return out


def peak_bytes(model: nn.Module | Function, variables: Any, x: Any) -> int:
    """The most bytes that values between operations take at any time, each freed after its last use, in float32.

    Values that depend on the variables alone are not counted; elementwise operations are taken to write their result
    beside their operands, which a compiler may avoid: an upper bound without tiling.

    Args:
      model: a flax module (in evaluation mode), or any `f(variables, x)`.
      variables: arrays or shapes.
      x: inputs, arrays or shapes; their batch counts.

    Returns:
      Bytes.

    Example:
      >>> dense = lambda v, x: x @ v["kernel"]
      >>> compressx.compaction.peak_bytes(dense, {"kernel": jnp.ones((8, 4))}, jnp.zeros((1, 8)))  # 8 inputs, 4 outputs
      48
    """
    program = trace(model, variables, x)
    fixed = set(range(len(program.paths))) | set(program.constants)
    last = {v: number for number, op in enumerate(program.ops) for v in op.inputs}
    last |= dict.fromkeys(program.outputs, len(program.ops))
    alive = {v: math.prod(program.shapes[v]) * _WORD for v in program.inputs}
    most = sum(alive.values())
    for number, op in enumerate(program.ops):
        if all(v in fixed for v in op.inputs):
            fixed |= set(op.outputs)
            continue
        alive |= {v: math.prod(program.shapes[v]) * _WORD for v in op.outputs}
        most = max(most, sum(alive.values()))
        for v in (*op.inputs, *op.outputs):
            if last.get(v, number) <= number:
                alive.pop(v, None)
    return most
