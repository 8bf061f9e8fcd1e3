"""How good decisions are: in-KB accuracy, micro precision, recall and F1, and what kinds of errors there are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.entity_linking.linking.corpus import Document
from experiments.entity_linking.linking.encode import Encoded

Predictions = Sequence[Sequence[str | None]]  # by document and mention; None is NIL


class Score(NamedTuple):
    """Counts over documents.

    Attributes:
      right: predicted title equals gold, and is not NIL.
      predicted: predictions that are not NIL.
      gold: mentions with a gold title.
    """

    right: int
    predicted: int
    gold: int

    @property
    def precision(self) -> float:
        """right / predicted; 0 without predictions."""
        return self.right / self.predicted if self.predicted else 0.0

    @property
    def recall(self) -> float:
        """right / gold, which is the in-KB accuracy; 0 without gold."""
        return self.right / self.gold if self.gold else 0.0

    @property
    def f1(self) -> float:
        """The harmonic mean of the two; equals the accuracy where every gold mention, and no other, is predicted."""
        return 2 * self.right / (self.predicted + self.gold) if self.predicted + self.gold else 0.0


def score(documents: Sequence[Document], predictions: Predictions) -> Score:
    """Scores the mentions to be linked; one whose gold is None (NIL) counts as predicted where it is linked."""
    right = predicted = gold = 0
    for document, mine in zip(documents, predictions, strict=True):
        for mention, title in zip(document.mentions, mine, strict=True):
            if mention.link:
                predicted += title is not None
                gold += mention.gold is not None
                right += title is not None and title == mention.gold
    return Score(right, predicted, gold)


def titles(documents: Sequence[Document], encoded: Encoded, choice: np.ndarray) -> list[list[str | None]]:
    """Decisions int32 `[R, T]` as titles by document and mention; NIL where nothing was decided."""
    out: list[list[str | None]] = [[None] * len(d.mentions) for d in documents]
    for number, best in zip(encoded.arrays["place"].ravel(), choice.ravel(), strict=True):
        if number >= 0 and best >= 0:
            place = encoded.places[number]
            out[place.document][place.mention] = place.candidates[best].title
    return out


def prior_only(documents: Sequence[Document]) -> list[list[str | None]]:
    """The candidate of the largest prior, by title among equals; NIL without candidates."""
    return [
        [min(m.candidates, key=lambda c: (-c.prior, c.title)).title if m.candidates else None for m in d.mentions]
        for d in documents
    ]


KINDS = {
    "no_candidates": "there is no candidate",
    "not_listed": "gold is not among the candidates",
    "pruned": "gold was pruned from the candidates",
    "left_the_prior": "gold is the most likely a priori, another was chosen",
    "kept_to_the_prior": "the most likely a priori was chosen, gold is less likely",
    "another": "neither gold nor the choice is the most likely a priori",
    "nil_linked": "there is no gold, an entity was chosen",
}


def errors(documents: Sequence[Document], encoded: Encoded, predictions: Predictions) -> dict[str, int]:
    """How many errors there are of each of `KINDS`."""
    kept = {(p.document, p.mention): [c.title for c in p.candidates] for p in encoded.places}
    found: Counter[str] = Counter()
    for i, document in enumerate(documents):
        for j, (mention, title) in enumerate(zip(document.mentions, predictions[i], strict=True)):
            if not mention.link or title == mention.gold:
                continue
            listed = [c.title for c in mention.candidates]
            top = min(mention.candidates, key=lambda c: (-c.prior, c.title)).title if listed else None
            if mention.gold is None:
                kind = "nil_linked"
            elif not listed:
                kind = "no_candidates"
            elif mention.gold not in listed:
                kind = "not_listed"
            elif mention.gold not in kept.get((i, j), []):
                kind = "pruned"
            elif mention.gold == top:
                kind = "left_the_prior"
            else:
                kind = "kept_to_the_prior" if title == top else "another"
            found[kind] += 1
    return {kind: found[kind] for kind in KINDS}


def figures(found: Score) -> Mapping[str, float]:
    """A score as plain numbers."""
    return {"accuracy": found.recall, "precision": found.precision, "f1": found.f1, "mentions": found.gold}
