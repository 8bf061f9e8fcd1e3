"""The linker: one pass over a document's mentions, each decision becoming context of the next ones.

A mention's candidates e are scored by a small network from up to five numbers each:

    local     how well e fits the text around the mention: attention over words, or convolutions
    prior     log p(e | mention)
    entities  how well e fits the entities already chosen in the document (1 hop)
    types     how well e's type fits the mention's
    words     how well e fits the words of the chosen entities' in-links (2 hops)

`rollout` decides mention after mention in one scan with masked buffers of fixed size. `path_scores` scores all
mentions together given the decisions; it equals the scan on the same decisions, and is what gradients run through.
A batch is rows of T slots; a row holds the mentions of one or more documents, told apart by `document` (-1: an empty
slot).

Source: X. Yang et al., "Learning Dynamic Context Augmentation for Global Entity Linking", 2019; "attention" from
O. Ganea, T. Hofmann, "Deep Joint Entity Disambiguation with Local Neural Attention", 2017; "cnn" from
M. Francis-Landau, G. Durrett, D. Klein, "Capturing Semantic Similarity for Entity Linking with Convolutional Neural
Networks", 2016.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.entity_linking.linking.attention import LOW, Coherence, along, coherence
from experiments.entity_linking.linking.corpus import TYPES
from experiments.entity_linking.linking.knowledge import Knowledge

FEATURES = ("local", "prior", "entities", "types", "words")

Params = Any
Batch = Mapping[str, Array]


@dataclass(frozen=True)
class Linker:
    """What a linker computes; its weights are made by `init`.

    Attributes:
      features: which of `FEATURES` its network reads; for the global baseline "belief" may stand among them.
      local: "attention" (over the words of the context) or "cnn" (convolutions over context and description).
      attention: of both contexts: "soft_hard" softmax over the best few, "soft" over nearly all, "mean" none.
      keep_tokens: words of the text that local attention keeps.
      keep_entities: chosen entities that attention keeps ("soft_hard").
      keep_words: words of in-links that attention keeps ("soft_hard").
      keep_soft: likewise, of both, for "soft" and "mean".
      hidden: units of the scoring network.
      dropout: part of them dropped in training.
      channels: of the convolutions.
      train_vectors: whether the loss moves the vectors of entities and words where they are weights; constraints do.
      damping: share of a new message in "belief".
      iterations: of message passing in "belief".
    """

    features: tuple[str, ...] = FEATURES
    local: str = "attention"
    attention: str = "soft_hard"
    keep_tokens: int = 50
    keep_entities: int = 7
    keep_words: int = 50
    keep_soft: int = 100
    hidden: int = 100
    dropout: float = 0.2
    channels: int = 64
    train_vectors: bool = False
    damping: float = 0.5
    iterations: int = 10

    def __post_init__(self) -> None:
        known = (*FEATURES, "belief")
        if not self.features or set(self.features) - set(known) or len(set(self.features)) < len(self.features):
            raise ValueError(f"features={self.features} is impossible; it must be of {', '.join(known)}, each once")
        if "belief" in self.features and {"entities", "words"} & set(self.features):
            raise ValueError("features: 'belief' decides all mentions together; it has no chosen entities or words")
        for name, value, allowed in (
            ("local", self.local, ("attention", "cnn")),
            ("attention", self.attention, ("soft_hard", "soft", "mean")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is impossible; it must be one of {', '.join(allowed)}")
        for name in ("keep_tokens", "keep_entities", "keep_words", "keep_soft", "hidden", "channels", "iterations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is impossible; it must be 1 or more")
        if not 0 <= self.dropout < 1 or not 0 < self.damping <= 1:
            raise ValueError(f"dropout={self.dropout} must be in [0, 1) and damping={self.damping} in (0, 1]")

    @property
    def dynamic(self) -> bool:
        """Whether earlier decisions change later scores."""
        return bool({"entities", "words"} & set(self.features))

    @property
    def uses_local(self) -> bool:
        """Whether the text around a mention is read."""
        return bool({"local", "belief"} & set(self.features))


class Static(NamedTuple):
    """What does not depend on decisions: candidate vectors `[B, T, n, d]` and features by name, each `[B, T, n]`."""

    vectors: Array
    features: dict[str, Array]


class Rollout(NamedTuple):
    """Decisions int32 `[B, T]` (place among the candidates; -1: none) and scores `[B, T, n]`."""

    choice: Array
    scores: Array


def init(linker: Linker, knowledge: Knowledge, key: Array, vectors: bool = True) -> Params:
    """First weights, `{"params": {...}}`: of all tables and tensors those that the linker uses.

    With `vectors` the tables of entities and words are weights, as compression needs them; without, they are read from
    the facts, and no optimizer carries state for them.
    """
    keys = iter(jax.random.split(key, 8))
    d, one = knowledge.dim, jnp.ones((knowledge.dim,), jnp.float32)

    def uniform(shape: tuple[int, ...], fan_in: int) -> Array:
        bound = 1 / np.sqrt(fan_in)
        return jax.random.uniform(next(keys), shape, jnp.float32, -bound, bound)

    width = len(linker.features)
    params: dict[str, Any] = {
        "hidden": {"kernel": uniform((width, linker.hidden), width), "bias": uniform((linker.hidden,), width)},
        "out": {"kernel": uniform((linker.hidden, 1), linker.hidden), "bias": uniform((1,), linker.hidden)},
    }
    if vectors:
        params["vectors"] = vectors_of(knowledge)
    if linker.uses_local and linker.local == "attention":
        params["local"] = {"attend": one, "score": one}
    if linker.uses_local and linker.local == "cnn":
        kernel = uniform((3, d, linker.channels), 3 * d)
        params["local"] = {"kernel": kernel, "bias": uniform((linker.channels,), 3 * d)}
    for name in ("entities", "words"):
        if name in linker.features:
            params[name] = {"attend": one, "score": one}
    if "types" in linker.features:
        params["types"] = jax.random.normal(next(keys), (len(TYPES), 5), jnp.float32)
    if "belief" in linker.features:
        params["pairs"] = one
    return {"params": params}


def _keep(linker: Linker, few: int) -> tuple[int, bool]:
    return (few if linker.attention == "soft_hard" else linker.keep_soft), linker.attention == "mean"


# -- what does not depend on decisions ---------------------------------------------------------------------------------


def vectors_of(knowledge: Knowledge) -> dict[str, Array]:
    """The tables as weights."""
    return {"entities": jnp.asarray(knowledge.entities), "words": jnp.asarray(knowledge.word_vectors)}


def _tables(linker: Linker, params: Params, facts: "Facts") -> tuple[Array, Array]:
    """Vectors of entities and words: the weights, or where they are none the facts."""
    if "vectors" not in params["params"]:
        assert facts.entities is not None and facts.words is not None
        return facts.entities, facts.words
    pair = params["params"]["vectors"]["entities"], params["params"]["vectors"]["words"]
    return pair if linker.train_vectors else lax.stop_gradient(pair)


def _convolve(words: Array, ids: Array, weights: Mapping[str, Array]) -> Array:
    """Convolution of width 3 over words `[N, L]`, then the maximum over positions: `[N, channels]`; empty texts 0."""
    ids = jnp.pad(ids, ((0, 0), (1, 1)))
    x = words[ids] * (ids > 0)[..., None].astype(jnp.float32)
    y = sum(x[:, i : ids.shape[1] - 2 + i] @ weights["kernel"][i] for i in range(3)) + along(weights["bias"], x)
    there = (ids > 0)[:, 1:-1, None]
    y = jnp.max(jnp.where(there, y, LOW), axis=1)
    return jnp.where(jnp.any(there, axis=1), y, 0.0)


def _local(linker: Linker, params: Params, words: Array, descriptions: Array, e: Array, batch: Batch) -> Array:
    rows, slots, n = batch["candidates"].shape
    weights = params["params"]["local"]
    if linker.local == "attention":
        flat = batch["context"].reshape(rows * slots, -1)
        each = e.reshape(rows * slots, 1, n, e.shape[-1])
        mask = batch["mask"].reshape(rows * slots, 1, n)
        found = coherence(each, mask, words[flat], (flat > 0)[:, None], weights, linker.keep_tokens)
        return found.score.reshape(rows, slots, n)
    context = _convolve(words, batch["context"].reshape(rows * slots, -1), weights).reshape(rows, slots, 1, -1)
    told = descriptions[batch["candidates"]].reshape(rows * slots * n, -1)
    entity = _convolve(words, told, weights).reshape(rows, slots, n, -1)
    norms = jnp.sum(context**2, -1) * jnp.sum(entity**2, -1)
    known = norms > 0
    cosine = jnp.sum(context * entity, -1) / jnp.sqrt(jnp.where(known, norms, 1.0))
    return jnp.where(known & batch["mask"], cosine, 0.0)


def static(linker: Linker, params: Params, facts: "Facts", batch: Batch) -> Static:
    """Everything about the mentions of a batch that no decision changes."""
    entities, words = _tables(linker, params, facts)
    e = entities[batch["candidates"]]
    features = {"prior": batch["log_prior"]}
    if linker.uses_local:
        features["local"] = _local(linker, params, words, facts.descriptions, e, batch)
    if "types" in linker.features:
        table = params["params"]["types"]
        mine, theirs = table[batch["mention_type"]], table[facts.types[batch["candidates"]]]
        features["types"] = jnp.einsum("btk,btnk->btn", mine, theirs)
    return Static(e, features)


class Facts(NamedTuple):
    """What scoring reads beside the weights: types `[E]`, inlinks `[E, L]`, descriptions `[E, D]`, all int32.

    Vectors of entities `[E, d]` and words `[V, d]` stand here where they are no weights.
    """

    types: Array
    inlinks: Array
    descriptions: Array
    entities: Array | None = None
    words: Array | None = None


def facts_of(knowledge: Knowledge, vectors: bool = False) -> Facts:
    """The knowledge base's tables on the device, with its vectors or without."""
    ints = (jnp.asarray(x) for x in (knowledge.types, knowledge.inlinks, knowledge.descriptions))
    return Facts(*ints, **(vectors_of(knowledge) if vectors else {}))


def combine(linker: Linker, params: Params, features: Mapping[str, Array], mask: Array, keep: Array | None) -> Array:
    """The scoring network: features to scores `[B, T, n]`, `LOW` where there is no candidate.

    `keep` `[B, T, n, hidden]` scales the hidden units (dropout), or is None.
    """
    p = params["params"]
    x = jnp.stack([features[name] for name in linker.features], axis=-1)
    x = jnp.where(mask[..., None], x, 0.0)
    h = jax.nn.relu(x @ p["hidden"]["kernel"] + along(p["hidden"]["bias"], x))
    if keep is not None:
        h = h * keep
    return jnp.where(mask, (h @ p["out"]["kernel"])[..., 0] + p["out"]["bias"][0], LOW)


def dropout_mask(linker: Linker, batch: Batch, key: Array) -> Array | None:
    """What one training step's dropout multiplies the hidden units with; the same for the scan and the path."""
    if not linker.dropout:
        return None
    keep = jax.random.bernoulli(key, 1 - linker.dropout, (*batch["mask"].shape, linker.hidden))
    return keep.astype(jnp.float32) / (1 - linker.dropout)


# -- the scan ----------------------------------------------------------------------------------------------------------

Pick = Callable[[Array, Array], Array]


def argmax(scores: Array, slot: Array) -> Array:
    """The best candidate, -1 where there is none; ties go to the lower index."""
    del slot
    best = jnp.argmax(scores, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.max(scores, axis=-1) > LOW / 2, best, -1)


class _Buffers(NamedTuple):
    """Context so far: numbers, owners (document; -1: not in the set) and vectors of entities and of words.

    Slot 0 is the unknown entity or word, in every document's set; slot 1 + t what mention t brought.
    """

    entity: Array
    entity_owner: Array
    entity_vector: Array
    word: Array
    word_owner: Array
    word_vector: Array


def _new(number: Array, owner: Array, old: Array, old_owner: Array) -> Array:
    """Which of new members `[B, L]` are in no set yet: known, and not among the document's old ones `[B, S]`."""
    same = (number[:, :, None] == old[:, None]) & (owner[:, None, None] == old_owner[:, None])
    return (number > 0) & (owner >= 0)[:, None] & ~jnp.any(same, axis=-1)


def rollout(
    linker: Linker,
    params: Params,
    facts: Facts,
    batch: Batch,
    pick: Pick = argmax,
    keep: Array | None = None,
) -> Rollout:
    """Decides mention after mention, each touched once: a scan over slots whose buffers hold the context so far.

    Args:
      linker: what is computed.
      params: its weights.
      facts: tables of the knowledge base.
      batch: see `encode.Encoded`.
      pick: `(scores [B, n], slot) -> choice [B]`.
      keep: dropout of the hidden units, or None.
    """
    fixed = static(linker, params, facts, batch)
    if not linker.dynamic:
        scores = combine(linker, params, fixed.features, batch["mask"], keep)
        order = jnp.arange(scores.shape[1])
        return Rollout(jax.vmap(pick, in_axes=(1, 0), out_axes=1)(scores, order), scores)
    entities, words = _tables(linker, params, facts)
    rows, slots, _ = batch["candidates"].shape
    inlinks = facts.inlinks if "words" in linker.features else facts.inlinks[:, :0]
    most, d = inlinks.shape[1], entities.shape[1]

    def step(buffers: _Buffers, slot: Array) -> tuple[_Buffers, tuple[Array, Array]]:
        def at(x: Array) -> Array:
            return lax.dynamic_slice_in_dim(x, slot, 1, axis=1)

        mask, owner = at(batch["mask"]), at(batch["document"])[:, 0]
        features = {name: at(x) for name, x in fixed.features.items()}
        pools = {
            "entities": (buffers.entity_vector, buffers.entity_owner, linker.keep_entities),
            "words": (buffers.word_vector, buffers.word_owner, linker.keep_words),
        }
        for name, (pool, owners, few) in pools.items():
            if name in linker.features:
                belongs = (owners == owner[:, None]) | (jnp.arange(owners.shape[1]) == 0)[None]
                found = coherence(
                    at(fixed.vectors), mask, pool, belongs[:, None], params["params"][name], *_keep(linker, few)
                )
                features[name] = found.score
        scores = combine(linker, params, features, mask, None if keep is None else at(keep))[:, 0]
        choice = jnp.where(owner >= 0, pick(scores, slot), -1)
        chosen = _chosen(at(batch["candidates"]), choice[:, None])
        linked = inlinks[chosen[:, 0]]
        new = _new(chosen, owner, buffers.entity, buffers.entity_owner)
        fresh = _new(linked, owner, buffers.word, buffers.word_owner)
        place, first = slot + 1, slot * most + 1

        def put(old: Array, value: Array, start: Array) -> Array:
            return lax.dynamic_update_slice_in_dim(old, value, start, axis=1)

        buffers = _Buffers(
            put(buffers.entity, chosen, place),
            put(buffers.entity_owner, jnp.where(new, owner[:, None], -1), place),
            put(buffers.entity_vector, entities[chosen], place),
            put(buffers.word, linked, first),
            put(buffers.word_owner, jnp.where(fresh, owner[:, None], -1), first),
            put(buffers.word_vector, words[linked], first),
        )
        return buffers, (choice, scores)

    size = 1 + slots * most
    start = _Buffers(
        jnp.zeros((rows, 1 + slots), jnp.int32),
        jnp.full((rows, 1 + slots), -1, jnp.int32),
        jnp.broadcast_to(entities[:1, None], (rows, 1 + slots, d)),
        jnp.zeros((rows, size), jnp.int32),
        jnp.full((rows, size), -1, jnp.int32),
        jnp.broadcast_to(words[:1, None], (rows, size, d)),
    )
    _, (choice, scores) = lax.scan(step, start, jnp.arange(slots, dtype=jnp.int32))
    return Rollout(choice.T, jnp.moveaxis(scores, 0, 1))


def _chosen(candidates: Array, choice: Array) -> Array:
    """The chosen entities int32 `[B, T]`; 0 where nothing was chosen."""
    number = jnp.take_along_axis(candidates, jnp.maximum(choice, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(choice >= 0, number, 0)


# -- all mentions together --------------------------------------------------------------------------------------------


def _first(number: Array, owner: Array) -> Array:
    """Which of `[B, S]` are the first of their number in their document; numbers of 0 and owners of -1 are none."""

    def one(number: Array, owner: Array) -> Array:
        order = jnp.lexsort((number, owner))  # stable: equal pairs stay in their order
        n, o = number[order], owner[order]
        repeat = jnp.concatenate([jnp.zeros((1,), bool), (n[1:] == n[:-1]) & (o[1:] == o[:-1])])
        return jnp.zeros_like(repeat).at[order].set(~repeat) & (number > 0) & (owner >= 0)

    return jax.vmap(one)(number, owner)


class Path(NamedTuple):
    """Scores `[B, T, n]` along given decisions, and the coherences behind them by feature name."""

    scores: Array
    contexts: dict[str, Coherence]
    features: dict[str, Array]


def path_scores(
    linker: Linker, params: Params, facts: Facts, batch: Batch, choice: Array, keep: Array | None = None
) -> Path:
    """Scores of every mention given all decisions `choice` int32 `[B, T]`; its context are those before it.

    Equals the scores of a `rollout` that makes these decisions; matrix products over whole rows take the scan's place.
    """
    fixed = static(linker, params, facts, batch)
    features, contexts = dict(fixed.features), {}
    if linker.dynamic:
        entities, words = _tables(linker, params, facts)
        rows, slots = choice.shape
        chosen, document = _chosen(batch["candidates"], choice), batch["document"]
        time = jnp.arange(slots)
        earlier = (time[None, :] < time[:, None])[None] & (document[:, :, None] == document[:, None, :])
        pools = {"entities": (chosen[..., None], entities, linker.keep_entities)}
        pools["words"] = (facts.inlinks[chosen], words, linker.keep_words)
        for name, (number, table, few) in pools.items():
            if name not in linker.features:
                continue
            each = number.shape[-1]
            flat = number.reshape(rows, slots * each)
            first = _first(flat, jnp.repeat(document, each, axis=1))
            belongs = jnp.repeat(earlier, each, axis=2) & first[:, None]
            unknown = jnp.zeros((rows, 1), jnp.int32)
            pool = table[jnp.concatenate([unknown, flat], axis=1)]
            belongs = jnp.concatenate([jnp.ones((rows, slots, 1), bool), belongs], axis=2)
            found = coherence(
                fixed.vectors, batch["mask"], pool, belongs, params["params"][name], *_keep(linker, few)
            )
            features[name], contexts[name] = found.score, found
    return Path(combine(linker, params, features, batch["mask"], keep), contexts, features)
