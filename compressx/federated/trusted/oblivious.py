"""Adding a sparse layer without an access that depends on where its non-zeros are.

Who watches the memory accesses of an aggregator that scatters sparse updates learns their supports, and from these the
labels of a client's data. Here every step reads and writes whole arrays of a fixed length in a fixed order: a routing
network of log2(size) stages, controlled by running counts of the bitmap. Cost: O(n log n) instead of O(non-zeros).

Only what NumPy does is fixed; below it lie the C library and the processor, which no Python program controls.

Source of the attack: F. Kato, Y. Cao, M. Yoshikawa, "Olive: Oblivious Federated Learning on Trusted Execution
Environment against the Risk of Sparsification", 2023. The network: M. T. Goodrich, "Data-Oblivious External-Memory
Algorithms for the Compaction, Selection, and Sorting of Outsourced Data", 2011 (compaction), run backwards.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


def expand(bits: Array, values: Array) -> Array:
    """`out[j] = values[number of set bits before j]` where bit j is set, else 0.

    Args:
      bits: uint8 `[n]`, 0 or 1, k of them set.
      values: float32 `[k]`.

    Returns:
      float32 `[n]`.
    """
    n, k = bits.shape[0], values.shape[0]
    rank = np.cumsum(bits, dtype=np.uint32)
    # how far each set bit lies right of its value; the same for all that follow up to the next set bit
    distance = (np.arange(1, n + 1, dtype=np.uint32) - rank) * bits
    alive = bits.astype(np.uint32)
    stages = max(1, int(n).bit_length())
    moves = []
    for stage in range(stages):  # compact the distances, and remember who moved
        step = 1 << stage
        if step >= n:
            break
        go = (distance >> np.uint32(stage)) & np.uint32(1) & alive
        moves.append(go)
        distance, alive = _left(distance, go, step), _left(alive, go, step)
    out = np.zeros(n, np.uint32)
    out[:k] = values.astype(np.float32).view(np.uint32)
    for stage in range(len(moves) - 1, -1, -1):  # the same moves backwards carry the values
        out = _right(out, moves[stage], 1 << stage)
    keep = np.uint32(0) - bits.astype(np.uint32)
    return (out & keep).view(np.float32)


def _select(mask: Array, a: Array, b: Array) -> Array:
    """a where mask is 1, b where it is 0, without a branch."""
    all_bits = np.uint32(0) - mask
    return (a & all_bits) | (b & ~all_bits)


def _left(x: Array, go: Array, step: int) -> Array:
    """Elements with `go` move `step` positions to the left; what they leave becomes 0."""
    stay = x * (np.uint32(1) - go)
    arriving = np.zeros_like(x)
    arriving[:-step] = (x * go)[step:]
    return stay | arriving


def _right(x: Array, go: Array, step: int) -> Array:
    """The inverse: place p with `go` takes what lies `step` to its left."""
    from_left = np.zeros_like(x)
    from_left[step:] = x[:-step]
    gone = np.zeros_like(go)
    gone[:-step] = go[step:]
    return _select(go, from_left, x * (np.uint32(1) - gone))
