"""What a network learns about speech: a unit for every frame, or a sequence of units by CTC.

Batches are those of `speech.batches.pad`. Both give a `training.Task`; neither learns from a teacher. Training cuts a
batch to the length of its bucket; scoring, forward only, does not.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from experiments.common.training.state import Batch, Sums, Task
from experiments.gru_speech.speech import batches

Apply = Callable[..., Array]


def frames(apply: Apply, sizes: tuple[int, ...]) -> Task:
    """Cross-entropy of the unit of every labelled frame, its mean over the frames of the batch; accuracy is of frames.

    Args:
      apply: a Linen module's `apply`, logits `[n, t, units]`.
      sizes: the buckets' lengths.
    """

    def sums(logits: Array, labels: Array, smoothing: float = 0.0) -> Sums:
        known = labels >= 0
        wanted = jnp.where(known, labels, 0)
        if smoothing:
            each = optax.softmax_cross_entropy(
                logits, optax.smooth_labels(jax.nn.one_hot(wanted, logits.shape[-1]), smoothing)
            )
        else:
            each = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        right = (jnp.argmax(logits, axis=-1) == wanted) & known
        return Sums(
            jnp.sum(jnp.where(known, each, 0.0)), jnp.sum(right, dtype=jnp.int32), jnp.sum(known, dtype=jnp.int32)
        )

    def loss(params: Any, stats: Any, batch: Batch, key: Array, fit: Any, teacher: Any) -> Any:
        del teacher

        def value(params: Any, batch: Batch, key: Array) -> tuple[Array, Sums]:
            logits = apply(params, batch["inputs"], train=True, rngs={"dropout": key})
            found = sums(logits, batch["labels"], fit.label_smoothing)
            return found.loss / jnp.maximum(found.seen, 1).astype(found.loss.dtype), found

        total, found = batches.with_gradient(value, sizes)(params, batch, key)
        return total, (stats, found)

    def score(params: Any, stats: Any, batch: Batch, valid: Array) -> Sums:
        logits = apply(params, batch["inputs"], train=False)
        return sums(logits, jnp.where(valid[:, None], batch["labels"], -1))

    return Task(loss, score)


def ctc(apply: Apply, sizes: tuple[int, ...]) -> Task:
    """CTC over whole utterances, the loss of an utterance in nats, their mean; accuracy is of whole greedy strings.

    Args:
      apply: a Linen module's `apply`, logits `[n, t, 1 + units]`; output 0 is the blank.
      sizes: the buckets' lengths.

    Source: A. Graves et al., "Connectionist Temporal Classification", 2006.
    """

    def sums(logits: Array, batch: Batch, valid: Array) -> Sums:
        times = jnp.arange(logits.shape[1], dtype=jnp.int32)[None] >= batch["frames"][:, None]
        places = jnp.arange(batch["tokens"].shape[1], dtype=jnp.int32)[None] >= batch["token_count"][:, None]
        each = optax.ctc_loss(
            logits, times.astype(logits.dtype), batch["tokens"], places.astype(logits.dtype), blank_id=0
        )
        right = _strings_match(jnp.where(times, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32)), batch) & valid
        return Sums(
            jnp.sum(jnp.where(valid, each, 0.0)), jnp.sum(right, dtype=jnp.int32), jnp.sum(valid, dtype=jnp.int32)
        )

    def loss(params: Any, stats: Any, batch: Batch, key: Array, fit: Any, teacher: Any) -> Any:
        del fit, teacher

        def value(params: Any, batch: Batch, key: Array) -> tuple[Array, Sums]:
            logits = apply(params, batch["inputs"], train=True, rngs={"dropout": key})
            found = sums(logits, batch, jnp.ones(logits.shape[0], bool))
            return found.loss / logits.shape[0], found

        total, found = batches.with_gradient(value, sizes)(params, batch, key)
        return total, (stats, found)

    def score(params: Any, stats: Any, batch: Batch, valid: Array) -> Sums:
        return sums(apply(params, batch["inputs"], train=False), batch, valid)

    return Task(loss, score)


def _strings_match(path: Array, batch: Batch) -> Array:
    """Whether the greedy path `[n, t]`, collapsed, is the reference; bool `[n]`."""
    n, longest = batch["tokens"].shape
    before = jnp.concatenate([jnp.zeros((n, 1), jnp.int32), path[:, :-1]], axis=1)
    spoken = (path != before) & (path != 0)
    place = jnp.cumsum(spoken, axis=1, dtype=jnp.int32) - 1
    # one place more than the reference has: what goes beyond it, and all that is not spoken, falls off the end
    at = jnp.where(spoken & (place < longest), place, longest)
    found = jax.vmap(lambda at, path: jnp.zeros(longest + 1, jnp.int32).at[at].set(path))(at, path)[:, :longest]
    same = jnp.all(jnp.where(found == batch["tokens"], True, False), axis=1)
    return same & (jnp.sum(spoken, axis=1, dtype=jnp.int32) == batch["token_count"])
