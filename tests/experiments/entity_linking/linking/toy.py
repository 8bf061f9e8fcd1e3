"""Small random knowledge bases, documents and weights for the tests of linking."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.entity_linking.linking import model
from experiments.entity_linking.linking.knowledge import Knowledge
from experiments.entity_linking.linking.vectors import unit


def knowledge(seed=0, entities=20, words=25, dim=6, inlinks=4, description=5) -> Knowledge:
    rng = np.random.default_rng(seed)
    links = np.zeros((entities, inlinks), np.int32)
    for row in links[1:]:
        few = rng.integers(0, inlinks + 1)
        row[:few] = rng.choice(np.arange(1, words), few, replace=False)
    told = rng.integers(1, words, (entities, description)).astype(np.int32)
    told[:, 3:] *= rng.integers(0, 2, (entities, 1)).astype(np.int32)
    told[0] = 0
    tables = []
    for n in (entities, words):
        table = unit(rng.standard_normal((n, dim)).astype(np.float32))
        table[0] = 1e-10
        tables.append(table)
    return Knowledge(
        titles=("", *(f"E{i}" for i in range(1, entities))),
        words=("", *(f"w{i}" for i in range(1, words))),
        entities=tables[0],
        word_vectors=tables[1],
        types=rng.integers(0, 4, entities).astype(np.int32),
        inlinks=links,
        descriptions=told,
    )


def tables(known: Knowledge) -> dict[str, np.ndarray]:
    """The same for the reference."""
    names = {"entities": known.entities, "words": known.word_vectors}
    return {k: np.asarray(v, float) for k, v in names.items()} | {
        "types": known.types,
        "inlinks": known.inlinks.tolist(),
        "descriptions": known.descriptions.tolist(),
    }


def document(seed, length, known, most=4, context=6):
    """Mentions as the reference reads them; the third has no candidate, the second an unknown one, some no context."""
    rng = np.random.default_rng(seed)
    out = []
    for t in range(length):
        n = int(rng.integers(1, most + 1))
        candidates = rng.choice(np.arange(1, len(known.titles)), n, replace=False).tolist()
        if t == 1:
            candidates[0] = 0
        if t == 2:
            candidates = []
        p = rng.random(len(candidates)) * 0.9 + 0.05
        out.append(
            {
                "candidates": candidates,
                "log_prior": np.log(p).tolist(),
                "type": int(rng.integers(0, 4)),
                "context": rng.integers(1, len(known.words), int(rng.integers(0, context + 1))).tolist(),
                "gold": int(rng.integers(0, n)) if candidates else -1,
            }
        )
    return out


def batch(rows, slots, most=4, context=6):
    """Rows of documents, each a list of mentions, as the library reads them."""
    shape = (len(rows), slots)
    out = {
        "document": np.full(shape, -1, np.int32),
        "candidates": np.zeros((*shape, most), np.int32),
        "mask": np.zeros((*shape, most), bool),
        "log_prior": np.full((*shape, most), np.log(1e-8), np.float32),
        "mention_type": np.zeros(shape, np.int32),
        "context": np.zeros((*shape, context), np.int32),
        "gold": np.full(shape, -1, np.int32),
        "scored": np.zeros(shape, bool),
    }
    for r, documents in enumerate(rows):
        t = 0
        for number, mentions in enumerate(documents):
            for m in mentions:
                n = len(m["candidates"])
                out["document"][r, t] = number
                out["candidates"][r, t, :n] = m["candidates"]
                out["mask"][r, t, :n] = True
                out["log_prior"][r, t, :n] = m["log_prior"]
                out["mention_type"][r, t] = m["type"]
                out["context"][r, t, : len(m["context"])] = m["context"]
                out["gold"][r, t] = m["gold"]
                out["scored"][r, t] = True
                t += 1
    return {k: jnp.asarray(v) for k, v in out.items()}


def weights(linker, known, seed=0):
    """Weights of a linker, the diagonals too drawn at random, with their vectors."""
    params = model.init(linker, known, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    inner = dict(params["params"])
    for name in ("local", "entities", "words", "pairs"):
        if name in inner:
            inner[name] = jax.tree.map(
                lambda w: jnp.asarray((w + 0.5 * rng.standard_normal(w.shape)).astype(np.float32)), inner[name]
            )
    return {"params": inner}
