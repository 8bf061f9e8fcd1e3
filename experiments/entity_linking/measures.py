"""What trained linkers score on every set, and the tables and pages of `experiments.entity_linking`."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common.data import batches
from experiments.common.report import format as fmt
from experiments.common.report import html
from experiments.entity_linking import linking
from experiments.entity_linking.linking import encode, learning, metrics, page
from experiments.entity_linking.linking.files import Corpora


class Linked(NamedTuple):
    """A set as a linker linked it."""

    encoded: linking.Encoded
    choice: np.ndarray
    predictions: list[list[str | None]]


@functools.lru_cache(maxsize=16)
def _decide(linker: linking.Linker) -> Any:
    def run(params: Any, carried: Any, batch: Any) -> Any:
        return learning.decide(linker, params, linking.model.Facts(**carried["facts"]), batch).choice

    return jax.jit(run)


@functools.lru_cache(maxsize=16)
def _explain(linker: linking.Linker) -> Any:
    def run(params: Any, carried: Any, batch: Any, choice: Any) -> Any:
        facts = linking.model.Facts(**carried["facts"])
        return linking.path_scores(linker, params, facts, batch, choice).contexts["entities"]

    return jax.jit(run)


@functools.lru_cache(maxsize=16)
def _decide_with_gold(linker: linking.Linker) -> Any:
    def run(params: Any, carried: Any, batch: Any) -> Any:
        context = jnp.where(batch["gold"] >= 0, batch["gold"], batch["own"])
        return learning.decide_along(linker, params, linking.model.Facts(**carried["facts"]), batch, context)

    return jax.jit(run)


def link(
    linker: linking.Linker,
    params: Any,
    carried: Any,
    documents: Sequence[linking.Document],
    rows: linking.Encoded,
    batch: int,
) -> Linked:
    """Links all documents of a set, in batches of rows."""
    arrays = {name: x for name, x in encode.batch_of(rows).items() if name not in ("gold", "scored")}
    n = len(arrays["document"])
    choice = np.full(arrays["document"].shape, -1, np.int32)
    for picked, valid in zip(*batches.cover(n, min(batch, n)), strict=True):
        part = {name: jnp.asarray(x[picked]) for name, x in arrays.items()}
        choice[picked[valid]] = np.asarray(_decide(linker)(params, carried, part))[valid]
    return Linked(rows, choice, metrics.titles(documents, rows, choice))


def figures(found: metrics.Score) -> dict[str, float]:
    """Accuracy, precision, F1 and mentions."""
    return dict(metrics.figures(found))


def most_likely(corpora: Corpora) -> dict[str, dict[str, Any]]:
    """The baselines that learn nothing: the candidate of the most in-links, and of the largest prior."""
    both = {"most_inlinked": corpora.plain, "prior": corpora.documents}
    return {
        name: {s: figures(metrics.score(ds, metrics.prior_only(ds))) for s, ds in sets.items() if s != "train"}
        for name, sets in both.items()
    }


def coverage(corpora: Corpora) -> dict[str, dict[str, int]]:
    """By set: documents, mentions to be linked, those with a candidate, those with gold among the candidates."""
    out = {}
    for name, documents in corpora.documents.items():
        linked = [m for d in documents for m in d.mentions if m.link]
        out[name] = {
            "documents": len(documents),
            "mentions": len(linked),
            "with_candidates": sum(bool(m.candidates) for m in linked),
            "with_gold": sum(m.gold is not None and m.gold in {c.title for c in m.candidates} for m in linked),
        }
    return out


NAMES = {
    "most_inlinked": "most in-links, nothing learned",
    "prior": "largest prior, nothing learned",
    "dense": "dense, the main linker",
}


def called(name: str) -> str:
    """An arm's name for people."""
    return NAMES.get(name, name.replace("_", " "))


def table(arms: Mapping[str, Mapping[str, Any]], sets: Sequence[str]) -> html.Table:
    """A row for every arm: micro F1 on every set."""
    rows = [
        (called(name), *(fmt.percent(row[s]["f1"]) if s in row else "–" for s in sets))
        for name, row in arms.items()
    ]
    return html.Table(("linker", *(s.replace("_", " ") for s in sets)), rows, (False, *[True] * len(sets)))


def error_table(found: Mapping[str, Mapping[str, int]]) -> html.Table:
    """Kinds of errors, a column for every linker."""
    rows = [(told, *(str(f[kind]) for f in found.values())) for kind, told in metrics.KINDS.items()]
    rows.append(("all errors", *(str(sum(f.values())) for f in found.values())))
    return html.Table(("error", *(name.replace("_", " ") for name in found)), rows, (False, *[True] * len(found)))


def by_size(documents: Sequence[linking.Document], predictions: metrics.Predictions) -> html.Table:
    """Accuracy by the number of candidates and by the mentions already decided in the document."""
    bins: dict[tuple[str, str], list[bool]] = {}
    for document, mine in zip(documents, predictions, strict=True):
        seen = 0
        for m, title in zip(document.mentions, mine, strict=True):
            if m.link and m.gold is not None:
                for what, value in (("candidates", len(m.candidates)), ("mentions before", seen)):
                    low = 0 if value < 1 else 2 ** (value.bit_length() - 1)
                    name = str(low) if low < 2 else f"{low} to {2 * low - 1}"
                    bins.setdefault((what, name), []).append(title == m.gold)
                seen += 1

    def place(key: tuple[str, str]) -> tuple[str, int]:
        return key[0], int(key[1].split()[0])

    rows = [
        (f"{what}: {name}", str(len(bins[what, name])), fmt.percent(float(np.mean(bins[what, name]))))
        for what, name in sorted(bins, key=place)
    ]
    return html.Table(("where", "mentions", "accuracy"), rows, (False, True, True))


def pages(
    linker: linking.Linker, params: Any, carried: Any, documents: Sequence[linking.Document], found: Linked, most: int
) -> html.Html:
    """Linked documents with the context that spoke for each decision."""
    used: page.Context = page.Context({})
    if "entities" in linker.features:
        arrays = {n: jnp.asarray(x) for n, x in encode.batch_of(found.encoded).items()}
        run = _explain(linker)
        parts = []
        for start in range(0, len(found.choice), 16):
            rows = np.minimum(np.arange(start, start + 16), len(found.choice) - 1)
            seen = run(params, carried, {n: x[rows] for n, x in arrays.items()}, jnp.asarray(found.choice[rows]))
            parts.append((np.asarray(seen.member), np.asarray(seen.weight)))
        member, weight = (np.concatenate([p[i] for p in parts])[: len(found.choice)] for i in (0, 1))
        used = page.context_of(found.encoded, found.choice, member, weight)
    return html.Html(page.documents_html(documents, found.encoded, found.predictions, used, most))


def gold_context(
    linker: linking.Linker, params: Any, carried: Any, documents: Sequence[linking.Document], found: Linked
) -> dict[str, float] | None:
    """The same linker where every decision before is replaced by gold: what its own errors cost it (exposure bias)."""
    if not linker.dynamic:
        return None
    run = _decide_with_gold(linker)
    arrays = {n: jnp.asarray(x) for n, x in encode.batch_of(found.encoded).items()} | {"own": jnp.asarray(found.choice)}
    choice = []
    for start in range(0, len(found.choice), 16):
        rows = np.minimum(np.arange(start, start + 16), len(found.choice) - 1)
        choice.append(np.asarray(run(params, carried, {n: x[rows] for n, x in arrays.items()})))
    best = np.concatenate(choice)[: len(found.choice)]
    return figures(metrics.score(documents, metrics.titles(documents, found.encoded, best)))

