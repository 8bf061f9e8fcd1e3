"""What a linker knows of entities and words: numbers, vectors, types, in-link words and descriptions."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from experiments.entity_linking.linking import vectors
from experiments.entity_linking.linking.corpus import TYPES, Document, words

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Knowledge:
    """A knowledge base as arrays; number 0 is the unknown entity and the unknown word.

    Attributes:
      titles: entity names, `titles[0] == ""`.
      words: `words[0] == ""`.
      entities: float32 `[entities, dim]`, unit length, row 0 nearly zero.
      word_vectors: float32 `[words, dim]`, in the same space.
      types: int32 `[entities]`, into `corpus.TYPES`.
      inlinks: int32 `[entities, most]`, numbers of words that name the pages linking to it, each once; 0 where fewer.
      descriptions: int32 `[entities, length]`, numbers of the words that describe it, in order; 0 where fewer.
    """

    titles: tuple[str, ...]
    words: tuple[str, ...]
    entities: vectors.Array
    word_vectors: vectors.Array
    types: IntArray
    inlinks: IntArray
    descriptions: IntArray

    def __post_init__(self) -> None:
        e, w = len(self.titles), len(self.words)
        ok = (
            self.entities.shape[0] == e == len(self.types) == len(self.inlinks) == len(self.descriptions)
            and self.word_vectors.shape == (w, self.entities.shape[1])
            and self.titles[:1] == self.words[:1] == ("",)
        )
        if not ok:
            raise ValueError("the tables of the knowledge base differ in their number of entities or words")

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return int(self.entities.shape[1])

    @cached_property
    def number(self) -> dict[str, int]:
        """Title -> entity; the unknown one is left out."""
        return {t: i for i, t in enumerate(self.titles) if i}

    @cached_property
    def word_number(self) -> dict[str, int]:
        """Word -> its number; the unknown one is left out."""
        return {w: i for i, w in enumerate(self.words) if i}

    @cached_property
    def digest(self) -> str:
        """Names the entities and words in their order: a model fits only the knowledge base it was made for."""
        text = "\n".join(self.titles) + "\0" + "\n".join(self.words)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def pad(rows: Iterable[Sequence[int]], width: int) -> IntArray:
    """Lists as one array, int32 `[n, width]`, cut or filled with 0."""
    rows = list(rows)
    out = np.zeros((len(rows), width), np.int32)
    for i, row in enumerate(rows):
        out[i, : min(len(row), width)] = row[:width]
    return out


def from_links(
    types: Mapping[str, str],
    links: Iterable[tuple[str, str]],
    documents: Sequence[Document],
    *,
    dim: int,
    most_inlinks: int,
    description: int = 16,
    texts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> Knowledge:
    """A knowledge base from types and links alone, for data without trained vectors.

    Entity vectors are factors of the links' positive mutual information. A word's vector is the mean of the entities it
    names: those whose title or text holds it, and the candidates of mentions that hold it, weighted by their priors.
    The words of an entity's in-links are those most of the linking pages have in their titles. No gold is used.

    Args:
      types: title -> one of `TYPES`, for every entity.
      links: pairs of titles (from, to); those with an unknown title are left out.
      documents: whose mentions and candidates say what words name.
      dim: length of a vector.
      most_inlinks: words of in-links kept for an entity.
      description: words of description kept, from the text or, without one, the title.
      texts: title -> description, for those that have one.
      seed: of the factorisation.
    """
    titles = ("", *sorted(types))  # sorted: the order of files says nothing
    number = {t: i for i, t in enumerate(titles)}
    pairs = sorted({(number[a], number[b]) for a, b in links if a in number and b in number and a != b})
    entities = vectors.from_links(len(titles), np.array(pairs, np.int64).reshape(-1, 2), dim, seed)

    own = [words(t.replace("_", " ")) for t in titles]
    told = [words((texts or {}).get(t, "")) or own[i] for i, t in enumerate(titles)]
    named: defaultdict[tuple[str, int], float] = defaultdict(float)
    for i in range(1, len(titles)):
        for w in set(own[i] + told[i]):
            named[w, i] += 1.0
    aliases = {(m.text.lower(), m.candidates) for d in documents for m in d.mentions}
    for text, candidates in sorted(aliases):
        for c in candidates:
            for w in set(words(text)):
                named[w, number[c.title]] += c.prior
    vocabulary = ("", *sorted({w for w, _ in named}))
    word_number = {w: i for i, w in enumerate(vocabulary)}
    weights = [(word_number[w], i, float(x)) for (w, i), x in sorted(named.items())]

    naming: dict[int, Counter[int]] = defaultdict(Counter)
    for a, b in pairs:
        naming[b].update({word_number[w] for w in own[a]})
    first = [sorted(naming[i], key=lambda w: (-naming[i][w], w))[:most_inlinks] for i in range(len(titles))]
    return Knowledge(
        titles=titles,
        words=vocabulary,
        entities=entities,
        word_vectors=vectors.of_words(len(vocabulary), weights, entities),
        types=np.array([0, *(TYPES.index(types[t]) for t in titles[1:])], np.int32),
        inlinks=pad(first, most_inlinks),
        descriptions=pad([[word_number[w] for w in t] for t in told], description),
    )
