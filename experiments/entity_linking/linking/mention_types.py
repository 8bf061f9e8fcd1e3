"""Mention types where no tagger's are at hand: naive Bayes on the letters of a mention and the words around it.

Learned from the types of gold entities in training documents. Training documents are typed by a model that has not seen
them (in folds), so that a training mention's type says as little about its own gold as a test mention's.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from experiments.entity_linking.linking.corpus import Document, Mention, map_mentions, words


def _marks(mention: Mention) -> list[str]:
    text = mention.text
    inner = f"<{text.lower()}>"
    grams = [f"3{inner[i : i + 3]}" for i in range(len(inner) - 2)]
    shape = "".join("A" if c.isupper() else "a" if c.islower() else "0" if c.isdigit() else c for c in text)
    near = [f"n{w}" for w in (*mention.left[-6:], *mention.right[:6])]
    return [*grams, *(f"w{w}" for w in words(text)), f"s{shape[:6]}", f"l{text.count(' ')}", *near]


def _learn(documents: Iterable[Document], types: Mapping[str, str]) -> tuple[Counter[str], dict[str, Counter[str]]]:
    prior: Counter[str] = Counter()
    marks: dict[str, Counter[str]] = defaultdict(Counter)
    for document in documents:
        for m in document.mentions:
            if m.gold is not None and m.gold in types:
                prior[types[m.gold]] += 1
                marks[types[m.gold]].update(_marks(m))
    return prior, marks


def _typed(documents: Iterable[Document], model: tuple[Counter[str], dict[str, Counter[str]]]) -> list[Document]:
    prior, marks = model
    seen = {mark for counts in marks.values() for mark in counts}
    whole = sum(prior.values())
    totals = {t: sum(counts.values()) + len(seen) for t, counts in marks.items()}

    def change(m: Mention) -> Mention:
        found = [mark for mark in _marks(m) if mark in seen]
        best = [
            (math.log(prior[t] / whole) + sum(math.log((marks[t][k] + 1) / totals[t]) for k in found), t) for t in prior
        ]
        return m._replace(type=max(best)[1]) if best else m

    return [map_mentions(d, change) for d in documents]


def with_types(
    training: Sequence[Document], others: Sequence[Document], types: Mapping[str, str], folds: int = 5
) -> tuple[list[Document], list[Document]]:
    """Documents with their mentions' types.

    Args:
      training: documents whose gold may be read.
      others: typed by a model of all training documents; their gold is not read.
      types: title -> one of `corpus.TYPES`.
      folds: training document i is typed by the model of the documents j with j % folds != i % folds.
    """
    out: list[Document] = list(training)
    for fold in range(folds):
        model = _learn([d for i, d in enumerate(training) if i % folds != fold], types)
        out[fold::folds] = _typed(training[fold::folds], model)
    return out, _typed(others, _learn(training, types))
