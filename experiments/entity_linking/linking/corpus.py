"""Documents with mentions and candidates as every reader gives them, and what is done to them before they are numbers.

A document's mentions stand in text order. Nothing here looks at `gold` but `with_counts`, which counts training
documents and leaves each document's own counts out, so that no feature of a mention can hold its own answer.
"""

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

TYPES = ("UNK", "PER", "ORG", "GPE")
ORDERS = ("offset", "size", "random")

_WORD = re.compile(r"[^\W_]+")
# What carries no topic: function words of English news text.
STOP_WORDS = frozenset(
    "a about after all also an and any are as at be been before but by can could did do for from had has have he her "
    "him his how i if in into is it its may me more most my no not of on one or other our out over said she should so "
    "some such than that the their them then there these they this those to two up us was we were what when where "
    "which who will with would you your de la le du and of".split()
)


class Candidate(NamedTuple):
    """An entity that a mention may mean.

    Attributes:
      title: the entity's name, unique in the knowledge base (Wikipedia's title, spaces as underscores).
      prior: p(entity | mention), in [0, 1].
    """

    title: str
    prior: float


class Mention(NamedTuple):
    """A span of text to be linked.

    Attributes:
      text: as it stands in the document.
      candidates: any number, in any order; none means that only NIL can be predicted.
      gold: the right title, or None where it is not known or not in the knowledge base (NIL).
      link: whether it is to be linked at all; spans known to be NIL are left out by the task, as AIDA's are, and are
        context of others.
      left: tokens before it, nearest last.
      right: tokens after it, nearest first.
      type: one of `TYPES`.
    """

    text: str
    candidates: tuple[Candidate, ...]
    gold: str | None = None
    link: bool = True
    left: tuple[str, ...] = ()
    right: tuple[str, ...] = ()
    type: str = "UNK"


class Document(NamedTuple):
    """A name and its mentions in text order."""

    name: str
    mentions: tuple[Mention, ...]


def words(text: str) -> tuple[str, ...]:
    """Lower-case words of a text without stop words, numbers and single letters."""
    found = _WORD.findall(text.lower())
    return tuple(w for w in found if len(w) > 1 and w not in STOP_WORDS and not w.isdecimal())


def canonical(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Candidates by falling prior, then by title: the order in which a file lists them says nothing any more.

    Of candidates with one title that of the largest prior stays.
    """
    best: dict[str, float] = {}
    for c in candidates:
        best[c.title] = max(c.prior, best.get(c.title, 0.0))
    return tuple(Candidate(t, p) for t, p in sorted(best.items(), key=lambda item: (-item[1], item[0])))


def map_mentions(document: Document, change: Callable[[Mention], Mention]) -> Document:
    """The document with every mention changed."""
    return document._replace(mentions=tuple(map(change, document.mentions)))


def without_gold(documents: Sequence[Document]) -> list[Document]:
    """The documents with every gold title blanked: what a linker may see of a test document."""
    return [map_mentions(d, lambda m: m._replace(gold=None)) for d in documents]


def coreference(document: Document, is_person: Callable[[str], bool]) -> Document:
    """Short names of persons take the candidates of the long ones.

    Where a mention is a proper part of others, ending at word bounds, whose most likely candidate is a person, its
    candidates become the average p(e|m) of those others.

    Source: O. Ganea, T. Hofmann, "Deep Joint Entity Disambiguation with Local Neural Attention", 2017 (their data).
    """
    tops = [max(m.candidates, key=lambda c: c.prior).title if m.candidates else "" for m in document.mentions]
    pairs = zip(document.mentions, tops, strict=True)
    persons = [(m.text.lower(), m.candidates) for m, top in pairs if top and is_person(top)]

    def change(m: Mention) -> Mention:
        text = m.text.lower()
        inside = re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")
        longer = [c for t, c in persons if len(t) > len(text) and inside.search(t)]
        if not longer:
            return m
        total: defaultdict[str, float] = defaultdict(float)
        for candidates in longer:
            for c in candidates:
                total[c.title] += c.prior / len(longer)
        return m._replace(candidates=canonical(Candidate(t, p) for t, p in total.items()))

    return map_mentions(document, change)


def with_counts(
    documents: Sequence[Document], training: Sequence[Document], strength: float = 3.0
) -> list[Document]:
    """Priors mixed with how often the same mention meant the candidate in other training documents.

        p'(e|m) = (count(m, e) + strength * p(e|m)) / (count(m) + strength)

    A training document's own mentions are left out of its counts: with them the prior would hold the answer.

    Args:
      documents: any, training documents among them or not (they are known by their names).
      training: the documents whose gold may be used.
      strength: how many counts the prior is worth.
    """

    def count(document: Document) -> Counter[tuple[str, str]]:
        return Counter((m.text.lower(), m.gold) for m in document.mentions if m.gold is not None)

    own = {d.name: count(d) for d in training}
    total: Counter[tuple[str, str]] = Counter()
    for counts in own.values():
        total.update(counts)
    none: Counter[tuple[str, str]] = Counter()

    def change(document: Document) -> Document:
        mine = own.get(document.name, none)

        def mix(m: Mention) -> Mention:
            text = m.text.lower()
            seen = [total[text, c.title] - mine[text, c.title] for c in m.candidates]
            whole = sum(seen) + strength
            mixed = [(n + strength * c.prior) / whole for c, n in zip(m.candidates, seen, strict=True)]
            titles = [c.title for c in m.candidates]
            return m._replace(candidates=canonical(map(Candidate, titles, mixed)))

        return map_mentions(document, mix)

    return [change(d) for d in documents]


def with_neighbours(document: Document, most: int) -> Document:
    """Every mention with the words of the mentions before and after it as its context, where there is no text.

    Args:
      document: its mentions' own contexts are replaced.
      most: words on each side, the nearest kept.
    """
    each = [words(m.text) for m in document.mentions]

    def side(parts: Iterable[tuple[str, ...]]) -> list[str]:
        out: list[str] = []
        for part in parts:
            if len(out) >= most:
                break
            out += part
        return out[:most]

    mentions = []
    for i, m in enumerate(document.mentions):
        left = side(tuple(reversed(p)) for p in reversed(each[:i]))
        mentions.append(m._replace(left=tuple(reversed(left)), right=tuple(side(each[i + 1 :]))))
    return document._replace(mentions=tuple(mentions))


def ordered(document: Document, order: str, seed: int = 0) -> list[int]:
    """The order in which the mentions to be linked are decided, as positions in the document.

    Args:
      document: its mentions.
      order: "offset" is text order; "size" few candidates first, ties in text order; "random" one shuffle per document
        and seed.
      seed: of "random".
    """
    at = [i for i, m in enumerate(document.mentions) if m.link]
    if order == "size":
        return sorted(at, key=lambda i: len(document.mentions[i].candidates))
    if order == "random":
        random.Random(f"{seed} {document.name}").shuffle(at)
        return at
    if order != "offset":
        raise ValueError(f"order={order!r} is impossible; it must be one of {', '.join(ORDERS)}")
    return at
