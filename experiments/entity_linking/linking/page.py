"""Linked documents for people: every mention with what was chosen, what was right, and which context spoke for it."""

import html
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments.entity_linking.linking.corpus import Document
from experiments.entity_linking.linking.encode import Encoded
from experiments.entity_linking.linking.metrics import Predictions


class Context(NamedTuple):
    """What attention gave weight to, by mention number: pairs (title of an entity chosen before, weight)."""

    used: dict[int, list[tuple[str, float]]]


def context_of(
    encoded: Encoded, choice: np.ndarray, member: np.ndarray, weight: np.ndarray, most: int = 3
) -> Context:
    """The entities that entity coherence used: members and weights are `[R, T, K]`, member 0 is the unknown one."""
    used: dict[int, list[tuple[str, float]]] = {}
    numbers = encoded.arrays["place"]
    for r, t in zip(*np.nonzero(numbers >= 0), strict=True):
        found = []
        for m, w in zip(member[r, t], weight[r, t], strict=True):
            if m > 0 and w > 0:
                place, best = encoded.places[numbers[r, m - 1]], choice[r, m - 1]
                found.append((place.candidates[best].title, float(w)))
        used[int(numbers[r, t])] = sorted(found, key=lambda pair: (-pair[1], pair[0]))[:most]
    return Context(used)


_STYLE = (
    "<style>.el{line-height:1.9}.el span{padding:1px 4px;border-radius:4px;border:1px solid}"
    ".el .ok{border-color:#2a8a4a}.el .bad{border-color:#c0392b;border-width:2px}.el .nil{border-style:dashed}"
    ".el small{opacity:.75}</style>"
)


def documents_html(
    documents: Sequence[Document], encoded: Encoded, predictions: Predictions, context: Context, most: int = 12
) -> str:
    """Markup of the first documents, those with errors first; every text escaped.

    A mention is in a frame: right ones say "right", wrong ones name the choice and gold, so that no colour is needed.
    """
    number = {(p.document, p.mention): i for i, p in enumerate(encoded.places)}

    def wrong(i: int) -> int:
        pairs = zip(documents[i].mentions, predictions[i], strict=True)
        return sum(m.link and title != m.gold for m, title in pairs)

    order = sorted((i for i in range(len(documents)) if documents[i].mentions), key=lambda i: (-wrong(i), i))[:most]
    out = [_STYLE]
    for i in order:
        linked = sum(m.link for m in documents[i].mentions)
        out.append(f"<h3>{_text(documents[i].name)}: {linked - wrong(i)} of {linked} right</h3><p class='el'>")
        for j, (m, title) in enumerate(zip(documents[i].mentions, predictions[i], strict=True)):
            if not m.link:
                out.append(f"<span class='nil'>{_text(m.text)}</span> <small>not to be linked</small> ")
                continue
            right = title == m.gold
            verdict = "right" if right else f"wrong, gold is {_title(m.gold)}"
            why = context.used.get(number.get((i, j), -1), [])
            seen = "; context " + ", ".join(f"{_title(t)} {w:.2f}" for t, w in why) if why else ""
            kind = "ok" if right else "bad"
            out.append(
                f"<span class='{kind}'>{_text(m.text)}</span> "
                f"<small>→ {_title(title)} ({verdict}, of {len(m.candidates)}{seen})</small> "
            )
        out.append("</p>")
    return "\n".join(out)


def _title(title: str | None) -> str:
    return "NIL" if title is None else _text(title.replace("_", " "))


def _text(value: Any) -> str:
    return html.escape(str(value).encode("utf-8", "replace").decode())
