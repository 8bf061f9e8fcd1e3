"""A text drawn from a small grammar whose own perplexity can be computed: what a model should come near to.

A sentence is  det (adj) noun (near the noun) verb, and ends or continues with `and`. The verb agrees in number with its
subject, across the noun between; nouns, verbs and adjectives belong to a topic that outlasts sentences. So there is
something to remember over one, five and thirty words. As a hidden Markov model it has 108 states and 127 words.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from experiments.common.data.dataset import Array

# nouns, verbs, adjectives; noun + s is its plural, verb + s its singular
_TOPICS = (
    (("ship", "sailor", "wave", "anchor", "gull"), ("sail", "drift", "sink"), ("salty", "deep", "rough", "grey")),
    (("horse", "farmer", "cart", "hen", "barn"), ("plough", "graze", "trot"), ("muddy", "brown", "fenced", "ripe")),
    (("king", "crown", "knight", "sword", "throne"), ("rule", "fight", "kneel"), ("royal", "brave", "golden", "cruel")),
    (("star", "planet", "comet", "moon", "rocket"), ("shine", "orbit", "glow"), ("distant", "bright", "cold", "round")),
    (("doctor", "nurse", "patient", "pill", "ward"), ("heal", "cough", "sleep"), ("ill", "clean", "feverish", "calm")),
    (("violin", "singer", "drum", "tune", "choir"), ("play", "sing", "hum"), ("loud", "soft", "merry", "slow")),
)
_NOUN, _VERB, _ADJ = (0.35, 0.25, 0.2, 0.12, 0.08), (0.5, 0.3, 0.2), (0.4, 0.3, 0.2, 0.1)
_DET = ({"the": 0.6, "a": 0.4}, {"the": 0.4, "some": 0.4, "many": 0.2})
_SLOTS = ("det", "adj", "noun", "near", "det2", "noun2", "verb", "and", "eos")
_STAY = 0.9  # that the topic outlasts a sentence
SIZES = {"train": 48_000, "validation": 6_000, "test": 6_000}


def _state(topic: int, number: int, slot: str) -> int:
    return (topic * 2 + number) * len(_SLOTS) + _SLOTS.index(slot)


@cache
def _model() -> tuple[Array, Array, tuple[str, ...]]:
    """Transitions `[S, S]`, what each state says `[S, V]`, and the words; all float64."""
    n = len(_TOPICS) * 2 * len(_SLOTS)
    said: list[dict[str, float]] = [{} for _ in range(n)]
    moves = np.zeros((n, n))
    for t, (nouns, verbs, adjectives) in enumerate(_TOPICS):
        for k in (0, 1):
            forms = [noun + "s" * k for noun in nouns]

            def at(slot: str, t: int = t, k: int = k) -> int:
                return _state(t, k, slot)

            said[at("det")] = _DET[k]
            said[at("adj")] = dict(zip(adjectives, _ADJ, strict=True))
            said[at("noun")] = dict(zip(forms, _NOUN, strict=True))
            said[at("near")], said[at("det2")], said[at("and")] = {"near": 1.0}, {"the": 1.0}, {"and": 1.0}
            said[at("noun2")] = {noun + end: p / 2 for noun, p in zip(nouns, _NOUN, strict=True) for end in ("", "s")}
            said[at("verb")] = dict(zip([verb + "s" * (1 - k) for verb in verbs], _VERB, strict=True))
            said[at("eos")] = {"<eos>": 1.0}
            for a, b, p in (
                *(("det", "adj", 0.4), ("det", "noun", 0.6), ("adj", "noun", 1.0)),
                *(("noun", "near", 0.25), ("noun", "verb", 0.75), ("near", "det2", 1.0), ("det2", "noun2", 1.0)),
                *(("noun2", "verb", 1.0), ("verb", "eos", 0.7), ("verb", "and", 0.3)),
            ):
                moves[at(a), at(b)] = p
            for next_k in (0, 1):
                moves[at("and"), _state(t, next_k, "det")] = 0.5
                for next_t in range(len(_TOPICS)):
                    p = _STAY * (next_t == t) + (1 - _STAY) / len(_TOPICS)
                    moves[at("eos"), _state(next_t, next_k, "det")] = p / 2
    words = tuple(sorted({word for each in said for word in each}))
    says = np.zeros((n, len(words)))
    for state, each in enumerate(said):
        for word, p in each.items():
            says[state, words.index(word)] = p
    return moves, says, words


def _start() -> Array:
    """The states of a first word: a determiner, all topics and numbers alike."""
    p = np.zeros(len(_TOPICS) * 2 * len(_SLOTS))
    p[[_state(t, k, "det") for t in range(len(_TOPICS)) for k in (0, 1)]] = 0.5 / len(_TOPICS)
    return p


def draw(seed: int, stream: int, count: int) -> list[str]:
    """So many words, by the raw bits of Philox, which no NumPy release may change."""
    moves, says, words = _model()
    bits = np.random.Philox(key=np.array([seed, stream], np.uint64)).random_raw(2 * count)
    uniform = ((bits >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(count, 2).tolist()
    go, say = np.cumsum(moves, axis=1), np.cumsum(says, axis=1)
    reach, out = np.cumsum(_start()), []
    for u, v in uniform:
        state = min(int(np.searchsorted(reach, u * reach[-1], "right")), len(reach) - 1)
        out.append(words[min(int(np.searchsorted(say[state], v * say[state, -1], "right")), len(words) - 1)])
        reach = go[state]
    return out


@cache
def _parts() -> dict[str, tuple[str, ...]]:
    return {part: tuple(draw(0, stream, count)) for stream, (part, count) in enumerate(SIZES.items())}


def parts() -> dict[str, list[str]]:
    """The words of the train, validation and test parts, drawn with seed 0."""
    return {part: list(words) for part, words in _parts().items()}


def perplexity(text: list[str]) -> float:
    """The source's own perplexity on a text it has drawn, the first word given: the forward algorithm, exact."""
    moves, says, words = _model()
    ids = [words.index(word) for word in text]
    belief = _start() * says[:, ids[0]]
    belief /= belief.sum()
    total = 0.0
    for word in ids[1:]:
        belief = (belief @ moves) * says[:, word]
        likelihood = belief.sum()
        total += float(np.log(likelihood))
        belief /= likelihood
    return float(np.exp(-total / (len(ids) - 1)))
