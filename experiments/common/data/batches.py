"""The order of examples: a pure function of seed, epoch and step, the same on every machine.

A run that stops in the middle of an epoch is resumed with exactly the batch that it would have seen next; nothing else
about the order has to be saved.
"""

import numpy as np

from experiments.common.data.dataset import Array


def epoch_order(seed: int, epoch: int, n: int) -> Array:
    """Returns the permutation of `n` examples in an epoch, int32 `[n]`.

    The order sorts n numbers of 64 bits from the raw stream of Philox with key (seed, epoch). NumPy promises that
    stream across platforms and releases; it does not promise `Generator.permutation`.

    Args:
      seed: 0 to 2**64 - 1.
      epoch: 0 to 2**64 - 1.
      n: number of examples, 0 to 2**31 - 1.
    """
    for name, value, bits in (("seed", seed, 64), ("epoch", epoch, 64), ("n", n, 31)):
        if not 0 <= value < 2**bits:
            raise ValueError(f"{name} must be 0 to 2**{bits} - 1, got {value}")
    bits64 = np.random.Philox(key=np.array([seed, epoch], np.uint64)).random_raw(n)
    return np.argsort(bits64, kind="stable").astype(np.int32)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Returns the number of batches in an epoch: n / batch_size, rounded down."""
    if not 1 <= batch_size <= n:
        raise ValueError(f"batch_size must be 1 to the number of examples ({n}), got {batch_size}")
    return n // batch_size


def epoch_batches(seed: int, epoch: int, n: int, batch_size: int) -> Array:
    """Returns all batches of an epoch, int32 `[steps, batch_size]`.

    With n not a multiple of batch_size, the last n mod batch_size examples of the epoch's order are left out: other
    ones in each epoch.
    """
    steps = steps_per_epoch(n, batch_size)
    return epoch_order(seed, epoch, n)[: steps * batch_size].reshape(steps, batch_size)


def in_order(n: int, lanes: int) -> Array:
    """Returns the batches of examples that follow one another, int32 `[n / lanes, lanes]`.

    The examples are cut into `lanes` runs of equal length; batch t holds the t-th of each, b * (n / lanes) + t.

    Raises:
      ValueError: n is not a multiple of the lanes.
    """
    if lanes < 1 or n % lanes:
        raise ValueError(f"{n} examples in order cannot be cut into {lanes} lanes of equal length")
    return np.arange(n, dtype=np.int32).reshape(lanes, -1).T


def cover(n: int, batch_size: int) -> tuple[Array, Array]:
    """Covers 0..n-1 once and in order with batches of one shape, for evaluation.

    Returns:
      Indices int32 `[steps, batch_size]` and a mask bool of that shape, False where the last batch is filled up
      (with example 0) and must not be counted.
    """
    if n < 0 or batch_size < 1:
        raise ValueError(f"n must not be negative and batch_size at least 1, got {n} and {batch_size}")
    steps = -(-n // batch_size)
    rows = np.arange(steps * batch_size, dtype=np.int32).reshape(steps, batch_size)
    valid = rows < n
    return np.where(valid, rows, 0).astype(np.int32), valid
