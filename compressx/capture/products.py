"""A product of a traced program, `dot_general` or a convolution, as matrices: inputs X, weight W and outputs X W.

Whatever the layout, a product is B matrix products side by side (batch axes of a `dot_general`, feature groups of a
convolution): X `[B, rows, C]`, W `[B, C, F]`. Rows of a convolution are the positions that its stride visits, and its C
runs over the taps, then over the channels of a group.
"""

import itertools
import math
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax

from compressx.trace import Op

Shape = tuple[int, ...]


class Product(NamedTuple):
    """A product and which of its operands is the weight; hashable, so that equal layers share what is compiled.

    Attributes:
      side: the operand that is the weight.
      numbers: the dimension numbers of the operation.
      batch: B.
      free: how many axes of the result come from the weight alone.
      window: of a convolution (taps, strides, padding, dilation of the image, dilation of the taps, extents of the
        output); () for a `dot_general`.
    """

    side: int
    numbers: Any
    batch: int
    free: int
    window: tuple[Any, ...] = ()


def product_of(op: Op, side: int, shapes: tuple[Shape, ...]) -> Product | None:
    """The description of an operation, or None where it is no product that can be read as matrices.

    Args:
      op: any operation.
      side: the operand that is the weight.
      shapes: of the two operands and of the result.
    """
    p = op.params
    if op.primitive.name == "dot_general":
        (left, right), batch = p["dimension_numbers"]
        numbers = ((tuple(left), tuple(right)), (tuple(batch[0]), tuple(batch[1])))
        free = len(shapes[side]) - len(numbers[0][side]) - len(numbers[1][side])
        return Product(side, numbers, math.prod(shapes[side][a] for a in numbers[1][side]), free)
    if op.primitive.name != "conv_general_dilated" or side != 1 or p["batch_group_count"] != 1:
        return None
    numbers = p["dimension_numbers"]
    taps = tuple(shapes[1][a] for a in numbers.rhs_spec[2:])
    out = tuple(shapes[2][a] for a in numbers.out_spec[2:])
    padding = tuple(map(tuple, p["padding"]))
    window = (taps, tuple(p["window_strides"]), padding, tuple(p["lhs_dilation"]), tuple(p["rhs_dilation"]), out)
    return Product(1, numbers, p["feature_group_count"], 1, window)


def kernel(product: Product, k: np.ndarray) -> np.ndarray:
    """The weight operand as `[B, C, F]` (NumPy)."""
    if not product.window:
        (summed, batch), side = product.numbers, product.side
        free = _free(k.ndim, summed[side], batch[side])
        order = (*batch[side], *summed[side], *free)
        sizes = [math.prod(k.shape[a] for a in axes) for axes in (batch[side], summed[side], free)]
        return k.transpose(order).reshape(sizes)
    out, inner, *taps = product.numbers.rhs_spec
    moved = k.transpose(*taps, inner, out)
    grouped = moved.reshape(-1, product.batch, moved.shape[-1] // product.batch)
    return grouped.transpose(1, 0, 2)


def input_lead(product: Product, x: Array) -> Array:
    """The input operand with its rows (of a convolution: its examples) first, to be taken a part at a time."""
    if product.window:
        n, channels, *space = product.numbers.lhs_spec
        return x.transpose(n, *space, channels)
    (summed, batch), other = product.numbers, 1 - product.side
    free = _free(x.ndim, summed[other], batch[other])
    moved = x.transpose(*free, *batch[other], *summed[other])
    return moved.reshape(-1, product.batch, math.prod(x.shape[a] for a in summed[other]))


def input_matrix(product: Product, part: Array) -> Array:
    """A part of what `input_lead` gives as X `[B, rows, C]`."""
    if not product.window:
        return part.transpose(1, 0, 2)
    taps, strides, padding, before, dilation, out = product.window
    pads = [(0, 0, 0), *((lo, hi, d - 1) for (lo, hi), d in zip(padding, before, strict=True)), (0, 0, 0)]
    x = lax.pad(part, np.zeros((), part.dtype), pads)
    cuts = []
    for tap in itertools.product(*map(range, taps)):
        start = [k * d for k, d in zip(tap, dilation, strict=True)]
        stop = [s + (o - 1) * step + 1 for s, o, step in zip(start, out, strides, strict=True)]
        cuts.append(lax.slice(x, (0, *start, 0), (x.shape[0], *stop, x.shape[-1]), (1, *strides, 1)))
    stacked = jax.numpy.stack(cuts, axis=-2)  # [n, out..., taps, channels]
    n, channels = math.prod(stacked.shape[:-2]), stacked.shape[-1] // product.batch
    grouped = stacked.reshape(n, len(cuts), product.batch, channels).transpose(2, 0, 1, 3)
    return grouped.reshape(product.batch, n, len(cuts) * channels)


def output_lead(product: Product, y: Array) -> Array:
    """The result with its rows (of a convolution: its examples) first, in the order of `input_lead`."""
    if product.window:
        n, channels, *space = product.numbers.out_spec
        return y.transpose(n, *space, channels)
    held = len(product.numbers[1][0])
    weight = _free_of_result(product, y.ndim)
    rows = tuple(a for a in range(held, y.ndim) if a not in weight)
    moved = y.transpose(*rows, *range(held), *weight)
    return moved.reshape(-1, product.batch, math.prod(y.shape[a] for a in weight))


def output_matrix(product: Product, part: Array) -> Array:
    """A part of what `output_lead` gives as `[B, rows, F]`."""
    if not product.window:
        return part.transpose(1, 0, 2)
    n, columns = math.prod(part.shape[:-1]), part.shape[-1] // product.batch
    return part.reshape(n, product.batch, columns).transpose(1, 0, 2)


def columns_of(product: Product, ndim: int) -> tuple[int, ...]:
    """The axes of the result along which the outputs of the weight lie, batch axes of a `dot_general` included."""
    if product.window:
        return (product.numbers.out_spec[1],)
    return (*range(len(product.numbers[1][0])), *_free_of_result(product, ndim))


def _free(ndim: int, *taken: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(a for a in range(ndim) if not any(a in axes for axes in taken))


def _free_of_result(product: Product, ndim: int) -> tuple[int, ...]:
    """The axes of a `dot_general`'s result that come from the weight alone."""
    held = len(product.numbers[1][0])
    return tuple(range(held, held + product.free) if product.side == 0 else range(ndim - product.free, ndim))
