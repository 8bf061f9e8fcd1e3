"""Documents as arrays: candidates pruned to a few, mentions packed into rows of one length.

A document longer than a row is cut, and each part starts with an empty context. Short documents share a row; `document`
tells them apart, so that nothing passes from one to another.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.entity_linking.linking.corpus import TYPES, Candidate, Document, Mention, canonical, ordered
from experiments.entity_linking.linking.knowledge import Knowledge, pad

LOWEST, ABSENT = 1e-3, 1e-8  # p(e|m) is clipped below at the first; empty positions have the second


class Place(NamedTuple):
    """Where a slot's mention stands: document, its position there, and the candidates kept, in slot order."""

    document: int
    mention: int
    candidates: tuple[Candidate, ...]


class Encoded(NamedTuple):
    """Rows of T slots.

    Attributes:
      arrays: `document` int32 `[R, T]`, -1 in empty slots; `place` int32 `[R, T]`, into `places`, -1 likewise;
        `candidates` int32 `[R, T, n]`; `mask` bool and `log_prior` float32 likewise; `mention_type` int32 `[R, T]`;
        `context` int32 `[R, T, words]`; `gold` int32 `[R, T]`, place among the candidates, -1 where absent or unknown;
        `scored` bool `[R, T]`: has a gold title, found among the candidates or not.
      positions: what the mentions are.
    """

    arrays: dict[str, np.ndarray]
    places: list[Place]


def prune(mention: Mention, knowledge: Knowledge, keep: int, most: int = 50, near: int = 25) -> tuple[Candidate, ...]:
    """At most `keep` candidates: half by prior, half by the words around the mention, filled up by prior.

    Args:
      mention: its candidates, in any order.
      knowledge: vectors.
      keep: candidates left.
      most: only so many by prior are looked at.
      near: words on each side.

    Raises:
      ValueError: vectors that are not finite.
    """
    found = canonical(mention.candidates)[:most]
    if len(found) <= keep:
        return found
    around = (*mention.left[-near:], *mention.right[:near])
    ids = [knowledge.word_number[w] for w in around if w in knowledge.word_number]
    first = set(range((keep + 1) // 2))
    if ids:
        e = knowledge.entities[[knowledge.number.get(c.title, 0) for c in found]]
        with np.errstate(invalid="ignore"):  # NumPy warned once here of numbers that a later run found finite
            fit = e @ knowledge.word_vectors[ids].mean(0)
        if not np.isfinite(fit).all():
            raise ValueError(f"{mention.text!r}: the vectors of its candidates or its words hold NaN or infinity")
        first |= set(np.argsort(-fit, kind="stable")[: keep // 2].tolist())
    first |= set([i for i in range(len(found)) if i not in first][: keep - len(first)])
    return tuple(found[i] for i in sorted(first))


def encode(
    documents: Sequence[Document],
    knowledge: Knowledge,
    *,
    slots: int,
    candidates: int = 8,
    context: int = 100,
    order: str = "offset",
    seed: int = 0,
    answerable: bool = False,
) -> Encoded:
    """Documents to rows.

    Args:
      documents: in any number; mentions with `link` False are left out.
      knowledge: numbers of entities and words; those it does not know are number 0.
      slots: T, mentions of a row.
      candidates: n, candidates of a mention.
      context: words around a mention, half on each side.
      order: of decisions, see `corpus.ordered`.
      seed: of a random order.
      answerable: leave out mentions whose gold is not among the candidates kept; for training only, as it reads gold.
    """
    if slots < 1 or candidates < 1 or context < 0:
        raise ValueError(f"slots={slots} and candidates={candidates} must be 1 or more, context={context} 0 or more")
    places: list[Any] = []
    pieces: list[Any] = []
    for number, document in enumerate(documents):
        mine = []
        for i in ordered(document, order, seed):
            kept = prune(document.mentions[i], knowledge, candidates)
            gold = document.mentions[i].gold
            if answerable and gold not in [c.title for c in kept]:
                continue
            mine.append(Place(number, i, kept))
        for start in range(0, len(mine), slots):
            part = mine[start : start + slots]
            pieces.append(list(range(len(places), len(places) + len(part))))
            places += part
    rows = _pack([len(p) for p in pieces], slots)
    shape = (len(rows), slots)
    arrays = {
        "document": np.full(shape, -1, np.int32),
        "place": np.full(shape, -1, np.int32),
        "candidates": np.zeros((*shape, candidates), np.int32),
        "mask": np.zeros((*shape, candidates), bool),
        "log_prior": np.full((*shape, candidates), np.log(ABSENT), np.float32),
        "mention_type": np.zeros(shape, np.int32),
        "context": np.zeros((*shape, context), np.int32),
        "gold": np.full(shape, -1, np.int32),
        "scored": np.zeros(shape, bool),
    }
    for r, row in enumerate(rows):
        t = 0
        for segment, piece in enumerate(row):
            for place in pieces[piece]:
                _fill(arrays, r, t, segment, place, places[place], documents, knowledge)
                t += 1
    return Encoded(arrays, places)


def _fill(
    arrays: dict[str, np.ndarray],
    r: int,
    t: int,
    segment: int,
    number: int,
    place: Place,
    documents: Sequence[Document],
    knowledge: Knowledge,
) -> None:
    mention, kept = documents[place.document].mentions[place.mention], place.candidates
    arrays["document"][r, t], arrays["place"][r, t] = segment, number
    arrays["candidates"][r, t] = pad([[knowledge.number.get(c.title, 0) for c in kept]], arrays["mask"].shape[2])[0]
    arrays["mask"][r, t, : len(kept)] = True
    arrays["log_prior"][r, t, : len(kept)] = np.log(np.clip([c.prior for c in kept], LOWEST, 1.0))
    arrays["mention_type"][r, t] = TYPES.index(mention.type)
    width = arrays["context"].shape[2]
    left = [knowledge.word_number[w] for w in mention.left if w in knowledge.word_number]
    right = [knowledge.word_number[w] for w in mention.right if w in knowledge.word_number]
    left, right = left[len(left) - min(len(left), width // 2) :], right[: width - width // 2]
    arrays["context"][r, t] = pad([[*left, *right]], width)[0]
    arrays["scored"][r, t] = mention.gold is not None
    titles = [c.title for c in kept]
    if mention.gold in titles:
        arrays["gold"][r, t] = titles.index(mention.gold)


def _pack(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Pieces into rows, longest first, each into the fullest row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for piece in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        fits = [r for r in range(len(rows)) if room[r] >= lengths[piece]]
        if fits:
            r = min(fits, key=lambda r: (room[r], r))
        else:
            rows.append([])
            room.append(size)
            r = len(rows) - 1
        rows[r].append(piece)
        room[r] -= lengths[piece]
    return rows


def batch_of(encoded: Encoded, rows: slice = slice(None)) -> dict[str, np.ndarray]:
    """The arrays of some rows, without what only people read."""
    return {name: x[rows] for name, x in encoded.arrays.items() if name != "place"}
