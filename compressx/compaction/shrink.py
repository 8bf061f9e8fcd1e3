"""Operations of a program on operands that lost indices."""

from typing import Any

import jax
import numpy as np
from jax import lax

from compressx.compaction.primitives import Shape, picked
from compressx.trace import Op

Masks = list[np.ndarray | None]


class Pick:
    """A selection of constant indices along some axes, as an operation: what is left of slices and gathers of those."""

    name, multiple_results = "pick", False

    def bind(self, x: jax.Array, *, picks: dict[int, np.ndarray]) -> jax.Array:
        """`x` at `picks[a]` along every axis a."""
        for axis, ids in picks.items():
            steps = np.unique(np.diff(ids))
            if ids.size and steps.size < 2 and (steps >= 1).all():
                stride = int(steps[0]) if steps.size else 1
                x = lax.slice_in_dim(x, int(ids[0]), int(ids[-1]) + 1, stride, axis)
            else:
                x = jax.numpy.take(x, ids, axis=axis, mode="clip")
        return x


PICK = Pick()


def shrink(op: Op, ins: list[Masks], outs: list[Masks], whole: list[Shape], shapes: list[Shape], constants: Any) -> Op:
    """The op on operands that lost indices.

    Args:
      op: of the whole program.
      ins: per operand and axis, a mask of the indices that stay; None where all do.
      outs: the same of the results.
      whole: shapes of the operands in the whole program.
      shapes: of the results that are left.
      constants: values that are known when a program is traced.

    Returns:
      The operation that computes those results.
    """
    p, name, shape = dict(op.params), op.primitive.name, shapes[0]
    if name == "broadcast_in_dim":
        p["shape"] = shape
    elif name == "reshape":
        p["new_sizes"] = shape
    elif name == "slice":
        strides = p["strides"] or (1,) * len(shape)
        if any(m is not None and stride != 1 for m, stride in zip(ins[0], strides, strict=True)):
            spans = zip(p["start_indices"], p["limit_indices"], strides, strict=True)
            spanned = {a: np.arange(*span) for a, span in enumerate(spans) if span != (0, whole[0][a], 1)}
            return _pick(op, spanned, ins[0], outs[0], whole[0])
        for key in ("start_indices", "limit_indices"):
            p[key] = tuple(i if m is None else int(m[:i].sum()) for i, m in zip(p[key], ins[0], strict=True))
    elif name in ("dynamic_slice", "gather"):
        picks = picked(op, whole[0], constants)
        if picks is not None:
            return _pick(op, picks, ins[0], outs[0], whole[0])
        p["slice_sizes"] = tuple(
            size if m is None else int(m.sum()) for size, m in zip(p["slice_sizes"], ins[0], strict=True)
        )
    elif name == "pad":
        config = []
        for (low, high, interior), mask in zip(p["padding_config"], outs[0], strict=True):
            ends = (low, high) if mask is None else (int(mask[:low].sum()), int(mask[mask.size - high :].sum()))
            config.append((*ends, interior))
        p["padding_config"] = tuple(config)
    elif name == "split":
        p["sizes"] = tuple(s[p["axis"]] for s in shapes)
    elif name == "conv_general_dilated" and p["feature_group_count"] != 1:
        mask = ins[0][p["dimension_numbers"].lhs_spec[1]]
        if mask is not None:
            p["feature_group_count"] = int(mask.sum())
    return op._replace(params=p)


def _pick(op: Op, picks: dict[int, np.ndarray], ins: Masks, outs: Masks, shape: Shape) -> Op:
    """The selection of `picks` along the axes of `shape`, where `ins` of the operand and `outs` of the result stay."""
    left = {}
    for axis, ids in picks.items():
        before, after = ins[axis], outs[axis]
        ids = ids if after is None else ids[after]
        ids = ids if before is None else (np.cumsum(before) - 1)[ids]
        size = shape[axis] if before is None else int(before.sum())
        if not np.array_equal(ids, np.arange(size)):
            left[axis] = ids
    return op._replace(primitive=PICK, params={"picks": left}, inputs=op.inputs[:1])
