"""A generated world: topics, entities that share names, links, and documents about a topic. Needs no data.

Names are ambiguous across topics, popularity misleads, the words around a mention say little: what a mention means is
mostly told by the other mentions of its document.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from experiments.entity_linking.linking.corpus import Candidate, Document, Mention

_SYLLABLES = ("ba", "do", "ke", "li", "mo", "nu", "ra", "si", "ta", "ve", "zo", "pe", "gi", "hu", "fa", "jo")


@dataclass(frozen=True)
class Sizes:
    """How large the world is.

    Attributes:
      topics: number of topics.
      names: names of entities; each is shared by `sharing` entities of different topics.
      sharing: entities of one name.
      links: links from an entity, nine of ten to its own topic.
      documents: in train, dev and test.
      mentions: least and most in a document.
      stray: share of a document's mentions that are of any topic.
      popular: power of an entity's popularity with which it is mentioned; at 1 the prior says all it can.
      words: words around a mention.
      told: share of these words that belong to the topic.
    """

    topics: int = 12
    names: int = 96
    sharing: int = 4
    links: int = 6
    documents: tuple[int, int, int] = (240, 60, 80)
    mentions: tuple[int, int] = (4, 24)
    stray: float = 0.15
    popular: float = 1.0
    words: int = 6
    told: float = 0.08


class World(NamedTuple):
    """The generated knowledge base and documents by split."""

    types: dict[str, str]
    links: list[tuple[str, str]]
    texts: dict[str, str]
    documents: dict[str, list[Document]]


def _word(number: int) -> str:
    out = ""
    for _ in range(3):
        number, place = divmod(number, len(_SYLLABLES))
        out += _SYLLABLES[place]
    return out


def generate(sizes: Sizes, seed: int = 0) -> World:
    """A world of its own for every seed; the same on every machine and NumPy release that keeps PCG64's streams."""
    rng = np.random.Generator(np.random.PCG64(seed))
    if sizes.sharing > sizes.topics:
        raise ValueError(f"sharing={sizes.sharing} entities of a name need as many topics; there are {sizes.topics}")
    kinds = ("PER", "ORG", "GPE")
    names = [_word(1000 + 7 * i).title() for i in range(sizes.names)]
    topic_words = [[_word(2000 + 40 * t + i) for i in range(12)] for t in range(sizes.topics)]
    common = [_word(500 + i) for i in range(120)]
    titles: list[str] = []
    topic_of: list[int] = []
    popularity: list[float] = []
    bearing: dict[str, list[int]] = {}
    for name in names:
        for topic in np.argsort(rng.random(sizes.topics))[: sizes.sharing]:
            bearing.setdefault(name, []).append(len(titles))
            titles.append(f"{name}_({topic_words[topic][0]})")
            topic_of.append(int(topic))
            popularity.append(float(np.exp(rng.standard_normal())))
    entities = len(titles)
    members = [[i for i in range(entities) if topic_of[i] == t] for t in range(sizes.topics)]
    types = {t: kinds[int(k)] for t, k in zip(titles, rng.integers(0, 3, entities), strict=True)}
    links = []
    for i in range(entities):
        for _ in range(sizes.links):
            pool = members[topic_of[i]] if rng.random() < 0.9 else range(entities)
            links.append((titles[i], titles[int(pool[int(rng.integers(len(pool)))])]))
    texts = {titles[i]: " ".join(rng.choice(topic_words[topic_of[i]], 5)) for i in range(entities)}
    name_of = {i: name for name, group in bearing.items() for i in group}

    def mention(entity: int, topic: int) -> Mention:
        group = bearing[name_of[entity]]
        whole = sum(popularity[i] for i in group)
        around = [
            str(rng.choice(topic_words[topic] if rng.random() < sizes.told else common)) for _ in range(sizes.words)
        ]
        half = sizes.words // 2
        return Mention(
            text=name_of[entity],
            candidates=tuple(Candidate(titles[i], popularity[i] / whole) for i in group),
            gold=titles[entity],
            left=tuple(around[:half]),
            right=tuple(around[half:]),
            type=types[titles[entity]] if rng.random() < 0.7 else "UNK",
        )

    def document(name: str) -> Document:
        topic = int(rng.integers(sizes.topics))
        mentions = []
        for _ in range(int(rng.integers(sizes.mentions[0], sizes.mentions[1] + 1))):
            pool = range(entities) if rng.random() < sizes.stray else members[topic]
            share = np.array([popularity[i] for i in pool]) ** sizes.popular
            mentions.append(mention(int(pool[int(rng.choice(len(pool), p=share / share.sum()))]), topic))
        return Document(name, tuple(mentions))

    splits = zip(("train", "dev", "test"), sizes.documents, strict=True)
    return World(types, links, texts, {s: [document(f"{s}{i}") for i in range(n)] for s, n in splits})
