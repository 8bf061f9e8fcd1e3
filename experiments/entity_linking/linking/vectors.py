"""Entity vectors from a link graph, and word vectors from the entities that words name; one space, unit length.

Where no trained vectors are at hand: two pages are alike if their links are. Factorising the positive mutual
information of links is what skip-gram on them would approximate.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

Array = npt.NDArray[np.float32]
UNKNOWN = 1e-10  # every coordinate of row 0, the unknown entity or word


def ppmi(counts: sp.csr_matrix, power: float = 0.75) -> sp.csr_matrix:
    """Positive pointwise mutual information of a table of counts.

        max(0, log(p(i, j) / (p(i) q(j)))),  q(j) ~ (column sum j) ** power

    Source: O. Levy, Y. Goldberg, I. Dagan, "Improving Distributional Similarity with Lessons Learned from Word
    Embeddings", 2015 (the smoothed context distribution).
    """
    table = counts.tocoo()
    rows = np.asarray(table.sum(1), np.float64).ravel()
    columns = np.asarray(table.sum(0), np.float64).ravel() ** power
    columns /= max(columns.sum(), 1e-300)
    with np.errstate(divide="ignore"):
        value = np.log(table.data / rows[table.row] / columns[table.col])
    keep = value > 0
    return sp.csr_matrix((value[keep].astype(np.float32), (table.row[keep], table.col[keep])), table.shape)


def factorise(matrix: sp.csr_matrix, dim: int, seed: int = 0, rounds: int = 3) -> Array:
    """Rows of U sqrt(S) of a truncated singular value decomposition, float32 `[rows, dim]`, by subspace iteration.

    Source: N. Halko, P. Martinsson, J. Tropp, "Finding Structure with Randomness", 2011, algorithm 4.4.
    """
    rows, columns = matrix.shape
    if not 1 <= dim <= min(rows, columns):
        raise ValueError(f"dim={dim} is impossible; a {rows} x {columns} table has 1 to {min(rows, columns)} factors")
    width = min(dim + 8, rows, columns)
    start = np.random.default_rng(seed).standard_normal((columns, width)).astype(np.float32)
    transposed = matrix.T.tocsr()
    basis, _ = np.linalg.qr(matrix @ start)
    for _ in range(rounds):
        other, _ = np.linalg.qr(transposed @ basis)
        basis, _ = np.linalg.qr(matrix @ other)
    u, s, _ = np.linalg.svd((transposed @ basis).T, full_matrices=False)
    return np.asarray((basis @ u[:, :dim]) * np.sqrt(s[:dim]), np.float32)


def unit(table: Array) -> Array:
    """Rows scaled to length 1; rows of zeros become the unknown one's."""
    length = np.linalg.norm(table, axis=1, keepdims=True)
    return np.where(length > 0, table / np.maximum(length, 1e-30), UNKNOWN).astype(np.float32)


def from_links(pages: int, links: npt.NDArray[np.int64], dim: int, seed: int = 0) -> Array:
    """Vectors of linked pages, float32 `[pages, dim]`, unit length.

    Args:
      pages: how many there are; page 0 is the unknown one and has no links.
      links: int64 `[n, 2]`, (from, to), each once.
      dim: length of a vector.
      seed: of the factorisation's start.
    """
    one = np.ones(len(links), np.float32)
    graph = sp.csr_matrix((one, (links[:, 0], links[:, 1])), (pages, pages))
    both = ((graph + graph.T) > 0).astype(np.float32) + sp.identity(pages, np.float32, format="csr")
    table = unit(factorise(ppmi(both.tocsr()), dim, seed))
    table[0] = UNKNOWN
    return table


def of_words(count: int, named: Sequence[tuple[int, int, float]], entities: Array) -> Array:
    """A word's vector is the weighted mean of those of the entities it names, float32 `[count, dim]`, unit length.

    Args:
      count: words; word 0 is the unknown one.
      named: (word, entity, weight).
      entities: their vectors.
    """
    rows, columns, weights = (np.array(x) for x in zip(*named, strict=True)) if named else (np.zeros(0, int),) * 3
    table = sp.csr_matrix((weights.astype(np.float32), (rows, columns)), (count, len(entities)))
    out = unit(np.asarray(table @ entities, np.float32))
    out[0] = UNKNOWN
    return out
