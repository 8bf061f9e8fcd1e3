"""Products with unified weights: signs are summed first, then one multiplication a block and output.

In a unified block all weights have one magnitude a, so its part of output f is `a sum_p s_pf x_p` with s = +-1:
additions and a single multiplication, where a free block takes a multiplication for every weight and a pruned one
takes nothing. A block of more outputs than inputs multiplies its inputs first instead, `sum_p s_pf (a x_p)`.
That saves multiplications, which is worth circuits and energy in hardware made for it. A processor with fused
multiply-add pays the same for either, so there is no native path: `counts` is the result here.

Source: S. Lin et al., "Efficient Micro-Structured Weight Unification and Pruning for Neural Network Compression", 2021.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from compressx import formats
from compressx.formats.base import CompressedFileError, Packed
from compressx.formats.unified import block_order
from compressx.kernels import exact


class Unified(NamedTuple):
    """A matrix `[P, F]` in groups of positions that the blocks cut, m positions a group at most.

    Attributes:
      positions: int32 `[Q, m]`, P where a group is shorter.
      signs: int8 `[Q, m, F]`, 0 outside unified blocks.
      magnitudes: float32 `[Q, F]`, that of the block that holds the group at output f; 0 where it is not unified.
      free: float32 `[P, F]`, weights outside unified blocks.
    """

    positions: Any
    signs: Any
    magnitudes: Any
    free: Any


class Counts(NamedTuple):
    """Operations of one product with one vector."""

    multiplications: int
    additions: int


def _blocks(packed: Packed) -> tuple[np.ndarray, np.ndarray]:
    """The weight as `[P, F]`, and the block of each of its entries."""
    if packed.format != "unified":
        raise CompressedFileError(f"{packed.format}: not unified")
    w = formats.unpack(packed)
    order, sizes = block_order(w.shape, packed.meta["block"])
    ids = np.zeros(w.size, np.int64)
    ids[order] = np.repeat(np.arange(sizes.size), sizes)
    shape = (math.prod(w.shape[:-1]), w.shape[-1])
    return w.astype(np.float32).reshape(shape), ids.reshape(shape)


def _uniform(w: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Which blocks have one magnitude, not zero and finite: bool, one a block."""
    n = int(ids.max()) + 1
    high, low = np.zeros(n, np.float32), np.full(n, np.inf, np.float32)
    np.maximum.at(high, ids.reshape(-1), np.abs(w).reshape(-1))
    np.minimum.at(low, ids.reshape(-1), np.abs(w).reshape(-1))
    return (high == low) & (high > 0) & np.isfinite(high)


def prepare_unified(packed: Packed) -> Unified:
    """Splits a packed weight into signs, magnitudes and what is free."""
    w, ids = _blocks(packed)
    unified = _uniform(w, ids)[ids]
    # positions that share the block of output 0 share every block: blocks are boxes
    _, group = np.unique(ids[:, 0], return_inverse=True)
    sizes = np.bincount(group.reshape(-1))
    positions = np.full((sizes.size, int(sizes.max())), w.shape[0], np.int32)
    for q in range(sizes.size):
        positions[q, : sizes[q]] = np.flatnonzero(group == q)
    padded = np.concatenate([np.where(unified, w, 0), np.zeros((1, w.shape[1]), np.float32)])
    cut = padded[positions]
    return Unified(
        positions,
        np.sign(cut).astype(np.int8),
        np.abs(cut).max(axis=1).astype(np.float32),
        np.where(unified, 0, w).astype(np.float32),
    )


@np.errstate(invalid="ignore")
def reference(packed: Packed, x: np.ndarray) -> np.ndarray:
    """The definition, block after block, in NumPy float64: `x [n, P] -> [n, F]`."""
    w, ids = _blocks(packed)
    uniform = _uniform(w, ids)
    x = x.astype(np.float64)
    y = np.zeros((x.shape[0], w.shape[1]))
    for block in range(uniform.size):
        rows, columns = (np.unique(v) for v in np.nonzero(ids == block))
        part = w[np.ix_(rows, columns)]
        if uniform[block]:
            y[:, columns] += np.float64(abs(part[0, 0])) * (x[:, rows] @ np.sign(part).astype(np.float64))
        elif part.any():
            y[:, columns] += exact.reference(x[:, rows], part.astype(np.float64))
    return y


@functools.partial(jax.jit)
def product(u: Unified, x: Array) -> Array:
    """`x [n, P] -> [n, F]`: sums of signed inputs by group, one multiplication each, and the free weights' product.

    Differentiable in x; u is what a packed weight says.
    """
    wide = jnp.concatenate([x, jnp.zeros((x.shape[0], 1), x.dtype)], axis=1)
    sums = jnp.einsum("nqm,qmf->nqf", wide[:, u.positions], jnp.asarray(u.signs).astype(x.dtype))
    tied = jnp.einsum("nqf,qf->nf", sums, jnp.asarray(u.magnitudes))
    return exact.checked(tied + x @ jnp.asarray(u.free), jnp.matmul, x, lambda: _dense(u))


def _dense(u: Unified) -> Array:
    """The weight again, `[P, F]`."""
    free, signs = jnp.asarray(u.free), jnp.asarray(u.signs)
    tied = signs.astype(free.dtype) * jnp.asarray(u.magnitudes)[:, None]
    return jnp.pad(free, ((0, 1), (0, 0))).at[jnp.asarray(u.positions)].add(tied)[:-1]


def _distinct(ids: np.ndarray, places: np.ndarray, among: np.ndarray) -> np.ndarray:
    """How many different positions each block has among some of its entries: int, one a block."""
    pairs = np.unique(np.stack([ids[among], places[among]]), axis=1)
    return np.bincount(pairs[0], minlength=int(ids.max()) + 1)


def counts(packed: Packed) -> Counts:
    """Operations of a product with one vector.

    A unified block of m positions and f outputs takes m f signed additions and min(m, f) multiplications: of each
    output's sum, or of each input before it is added to or taken from the outputs. A free one takes m f of both, a
    pruned one nothing. (The first addition of an output is to zero and counts.)
    """
    w, ids = _blocks(packed)
    uniform = _uniform(w, ids)
    members = uniform[ids]
    pruned = np.bincount(ids.reshape(-1), weights=(w != 0).reshape(-1)) == 0
    free = ~members & ~pruned[ids]
    rows, columns = np.arange(w.shape[0])[:, None], np.arange(w.shape[1])[None]
    positions, outputs = (_distinct(ids, np.broadcast_to(places, w.shape), members) for places in (rows, columns))
    tied, macs = int(np.minimum(positions, outputs).sum()), int(free.sum())
    return Counts(tied + macs, int(members.sum()) + macs)
