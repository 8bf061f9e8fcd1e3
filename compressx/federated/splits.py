"""How examples are divided among clients: pure functions of a seed; every example goes to exactly one client.

    iid              equal random parts
    dirichlet        each class divided in proportions drawn from Dirichlet(alpha); smaller alpha, more skew
    shards           examples sorted by label, cut into equal shards, so many shards a client
    classes          each client holds so many classes and no other
    quantity         random parts of sizes drawn from Dirichlet(alpha)

A split is a list of index arrays, one a client, sorted, disjoint and complete.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Split = list[Array]


def _check(labels: Array, clients: int, least: int = 1) -> None:
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integers [n], got {labels.dtype} {labels.shape}")
    if clients < 1 or least < 1 or clients * least > len(labels):
        raise ValueError(f"{len(labels)} examples cannot give {clients} clients {least} each")


def _cut(order: Array, sizes: Array) -> Split:
    return [np.sort(part) for part in np.split(order, np.cumsum(sizes)[:-1])]


def _largest_remainder(shares: Array, total: int) -> Array:
    """Whole numbers that add up to total, nearest to `shares * total`; ties to the lower index."""
    exact = shares * total
    sizes = np.floor(exact).astype(np.int64)
    late = np.argsort(-(exact - sizes), kind="stable")[: total - int(sizes.sum())]
    sizes[late] += 1
    return sizes


def iid(seed: int, labels: Array, clients: int) -> Split:
    """Random parts whose sizes differ by at most one.

    Args:
      seed: of the permutation.
      labels: int `[n]`; only their number matters.
      clients: how many, at most n.

    Returns:
      One index array a client.

    Raises:
      ValueError: fewer examples than clients.

    Example:
      >>> from compressx.federated import splits
      >>> [part.size for part in splits.iid(0, np.zeros(7, int), clients=3)]
      [3, 2, 2]
    """
    _check(labels, clients)
    return [np.sort(p) for p in np.array_split(np.random.default_rng(seed).permutation(len(labels)), clients)]


def dirichlet(seed: int, labels: Array, clients: int, alpha: float = 0.5, least: int = 1) -> Split:
    """Each class is divided among the clients in proportions drawn from Dirichlet(alpha, ..., alpha).

    A client with fewer than `least` examples gets what it lacks from the largest one, a random example at a time.

    Args:
      seed: of what is drawn.
      labels: int `[n]`.
      clients: how many.
      alpha: above 0; the smaller, the more skewed.
      least: examples a client has at least.

    Returns:
      One index array a client.

    Raises:
      ValueError: alpha is not positive, or there are too few examples.

    Source: T.-M. H. Hsu, H. Qi, M. Brown, "Measuring the Effects of Non-Identical Data Distribution for Federated
    Visual Classification", 2019 (per client); here per class, as M. Yurochkin et al., "Bayesian Nonparametric Federated
    Learning of Neural Networks", 2019.

    Example:
      >>> from compressx.federated import splits
      >>> split = splits.dirichlet(0, np.arange(100) % 10, clients=4, alpha=0.1)
      >>> sum(part.size for part in split), min(part.size for part in split) >= 1
      (100, True)
    """
    _check(labels, clients, least)
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    rng = np.random.default_rng(seed)
    parts: list[list[Array]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        for part, piece in zip(parts, _cut_unsorted(members, rng.dirichlet(np.full(clients, alpha))), strict=True):
            part.append(piece)
    held = [np.concatenate(part) for part in parts]
    for k in range(clients):
        while len(held[k]) < least:
            rich = int(np.argmax([len(h) for h in held]))
            take = int(rng.integers(len(held[rich])))
            held[k] = np.append(held[k], held[rich][take])
            held[rich] = np.delete(held[rich], take)
    return [np.sort(h) for h in held]


def _cut_unsorted(members: Array, shares: Array) -> list[Array]:
    return np.split(members, np.cumsum(_largest_remainder(shares, len(members)))[:-1])


def shards(seed: int, labels: Array, clients: int, each: int = 2) -> Split:
    """Examples sorted by label are cut into `clients * each` equal shards, and every client gets `each` at random.

    Args:
      seed: of what is drawn.
      labels: int `[n]`.
      clients: how many.
      each: shards of a client.

    Returns:
      One index array a client.

    Raises:
      ValueError: fewer examples than shards.

    Source: H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized Data", 2017.

    Example:
      >>> from compressx.federated import splits
      >>> labels = np.arange(100) % 10
      >>> [len(set(labels[part])) <= 2 for part in splits.shards(0, labels, clients=5, each=2)]
      [True, True, True, True, True]
    """
    _check(labels, clients, max(1, each))
    if each < 1:
        raise ValueError(f"each must be at least 1, got {each}")
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    pieces = np.array_split(order, clients * each)
    drawn = rng.permutation(clients * each).reshape(clients, each)
    return [np.sort(np.concatenate([pieces[i] for i in row])) for row in drawn]


def classes(seed: int, labels: Array, clients: int, each: int = 2) -> Split:
    """Each client holds `each` classes; a class is shared evenly by the clients that hold it.

    Clients take classes in turn from one random order, so that every class is held by as many clients as any other, up
    to one.

    Args:
      seed: of what is drawn.
      labels: int `[n]`.
      clients: how many.
      each: classes of a client.

    Returns:
      One index array a client.

    Raises:
      ValueError: `each` is not in 1..classes, or some class would be held by no client or by more clients than it has
        examples.

    Source: clients of a fixed number of classes: Y. Zhao et al., "Federated Learning with Non-IID Data", 2018.

    Example:
      >>> from compressx.federated import splits
      >>> labels = np.arange(100) % 10
      >>> [len(set(labels[part])) for part in splits.classes(0, labels, clients=5, each=2)]
      [2, 2, 2, 2, 2]
    """
    _check(labels, clients)
    present = np.unique(labels)
    if not 1 <= each <= len(present) or clients * each < len(present):
        raise ValueError(f"{clients} clients of {each} classes cannot hold {len(present)} classes")
    rng = np.random.default_rng(seed)
    order = rng.permutation(present)
    wanted = [[order[(k * each + i) % len(order)] for i in range(each)] for k in range(clients)]
    parts: list[list[Array]] = [[] for _ in range(clients)]
    for label in present:
        holders = [k for k in range(clients) if label in wanted[k]]
        members = rng.permutation(np.flatnonzero(labels == label))
        if len(members) < len(holders):
            raise ValueError(f"class {label} has {len(members)} examples for {len(holders)} clients")
        for k, piece in zip(holders, np.array_split(members, len(holders)), strict=True):
            parts[k].append(piece)
    return [np.sort(np.concatenate(part)) for part in parts]


def quantity(seed: int, labels: Array, clients: int, alpha: float = 1.0, least: int = 1) -> Split:
    """Random parts whose sizes are `least` and a share of the rest drawn from Dirichlet(alpha, ..., alpha).

    Args:
      seed: of what is drawn.
      labels: int `[n]`; only their number matters.
      clients: how many.
      alpha: above 0; the smaller, the more unequal.
      least: examples a client has at least.

    Returns:
      One index array a client.

    Raises:
      ValueError: alpha is not positive, or there are too few examples.

    Source: quantity skew of Q. Li et al., "Federated Learning on Non-IID Data Silos: An Experimental Study", 2022.

    Example:
      >>> from compressx.federated import splits
      >>> split = splits.quantity(0, np.zeros(100, int), clients=4, alpha=0.5, least=5)
      >>> sum(part.size for part in split), min(part.size for part in split) >= 5
      (100, True)
    """
    _check(labels, clients, least)
    if not alpha > 0:
        raise ValueError(f"alpha must be positive, got {alpha}")
    rng = np.random.default_rng(seed)
    free = len(labels) - clients * least
    sizes = least + _largest_remainder(rng.dirichlet(np.full(clients, alpha)), free)
    return _cut(rng.permutation(len(labels)), sizes)


SPLITS: dict[str, Callable[..., Split]] = {
    "iid": iid,
    "dirichlet": dirichlet,
    "shards": shards,
    "classes": classes,
    "quantity": quantity,
}


def table(split: Sequence[Array], labels: Array) -> Array:
    """Examples of every client and label: int64 `[clients, classes]`, classes 0 to the largest label.

    Args:
      split: one index array a client.
      labels: int `[n]`.

    Returns:
      int64 `[clients, classes]`.

    Example:
      >>> from compressx.federated import splits
      >>> splits.table([np.array([0, 1]), np.array([2])], np.array([0, 1, 1])).tolist()
      [[1, 1], [0, 1]]
    """
    n = int(labels.max()) + 1
    return np.stack([np.bincount(labels[part], minlength=n) for part in split])


def heterogeneity(counts: Array) -> float:
    """Mean total variation distance of the clients' label shares from all examples' (weighted by examples).

        sum_k n_k / n * 1/2 * sum_c |p_kc - p_c|;  0 for equal shares, towards 1 - 1/classes for one class a client.

    Args:
      counts: `[clients, classes]` from `table`.

    Returns:
      In 0..1.

    Example:
      >>> from compressx.federated import splits
      >>> splits.heterogeneity(np.array([[4, 0], [0, 4]])), splits.heterogeneity(np.array([[2, 2], [2, 2]]))
      (0.5, 0.0)
    """
    sizes = counts.sum(1)
    overall = counts.sum(0) / counts.sum()
    shares = counts / np.maximum(sizes, 1)[:, None]
    return float(np.sum(sizes / sizes.sum() * 0.5 * np.abs(shares - overall[None]).sum(1)))
