"""Utterances of varying length as arrays of one shape: padding, buckets of like lengths, and the order of training.

A batch holds utterances of one bucket, and is cut to the bucket's length inside the compiled step: `lax.switch` over a
few lengths, so that there is one program, and short utterances do not pay for the longest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.common.data import batches
from experiments.gru_speech.speech.corpus import Corpus
from experiments.gru_speech.speech.features import FrontEnd

Batch = dict[str, Array]
_ROUND = 8  # frames: lengths of buckets are multiples of it


def frame_labels(
    segments: Sequence[tuple[int, int, str]], of: dict[str, int], frames: int, rate: int, front: FrontEnd
) -> np.ndarray:
    """The unit at the middle of every frame, int32 `[frames]`; -1 where there is none or it is not trained."""
    window, hop = front.samples(rate)
    middle = np.arange(frames) * hop + window // 2
    out = np.full(frames, -1, np.int32)
    for first, after, label in segments:
        out[(middle >= first) & (middle < after)] = of[label]
    return out


def pad(
    features: Sequence[np.ndarray], labels: Sequence[np.ndarray], tokens: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """Arrays with a leading axis n, for training.

    Returns:
      `inputs` float32 `[n, t, f]`, `frames` int32 `[n]`, `labels` int32 `[n, t]` (-1: none), `tokens` int32 `[n, l]`
      (units from 1 on, 0 is padding) and `token_count` int32 `[n]`; t is a multiple of 8.
    """
    n, t = len(features), -(-max(len(f) for f in features) // _ROUND) * _ROUND
    longest = max(1, max(len(x) for x in tokens))
    out = {
        "inputs": np.zeros((n, t, features[0].shape[1]), np.float32),
        "frames": np.array([len(f) for f in features], np.int32),
        "labels": np.full((n, t), -1, np.int32),
        "tokens": np.zeros((n, longest), np.int32),
        "token_count": np.array([len(x) for x in tokens], np.int32),
    }
    for i, (f, y, x) in enumerate(zip(features, labels, tokens, strict=True)):
        out["inputs"][i, : len(f)] = f
        out["labels"][i, : len(y)] = y
        out["tokens"][i, : len(x)] = np.asarray(x, np.int32) + 1
    return out


def lengths(frames: np.ndarray, buckets: int) -> tuple[int, ...]:
    """The lengths of at most so many buckets with about equally many utterances: rising multiples of 8."""
    ends = np.quantile(frames, np.arange(1, buckets + 1) / buckets, method="higher")
    return tuple(sorted({-(-int(e) // _ROUND) * _ROUND for e in ends}))


def order(frames: np.ndarray, batch: int, buckets: tuple[int, ...]) -> Callable[[int, int], np.ndarray]:
    """`order(seed, epoch) -> int32 [steps, batch]`: shuffled, every batch from one bucket.

    What a bucket leaves over joins the next longer one, so that only n mod batch utterances sit out an epoch, as
    without buckets (drawn from the longest bucket's; other ones in every epoch).
    """
    home = np.searchsorted(buckets, frames)

    def rows(seed: int, epoch: int) -> np.ndarray:
        shuffled = batches.epoch_order(seed, epoch, len(frames))
        made: list[np.ndarray] = []
        left = np.zeros(0, np.int32)
        for k in range(len(buckets)):
            mine = np.concatenate([left, shuffled[home[shuffled] == k]])
            whole = len(mine) // batch * batch
            made += list(mine[:whole].reshape(-1, batch))
            left = mine[whole:]
        mixed = batches.epoch_order(seed, epoch, len(made))  # another permutation: of the batches
        return np.stack([made[i] for i in mixed]).astype(np.int32)

    return rows


def cut(batch: Batch, length: int) -> Batch:
    """The batch's first frames."""
    return batch | {"inputs": batch["inputs"][:, :length], "labels": batch["labels"][:, :length]}


def at_length(run: Callable[..., Any], sizes: tuple[int, ...], batch: Batch, *args: Any) -> Any:
    """`run(batch cut to the shortest of the lengths that holds it, *args)`; the result has one shape for all."""
    if len(sizes) == 1:
        return run(cut(batch, sizes[0]), *args)
    index = jnp.searchsorted(jnp.asarray(sizes[:-1], jnp.int32), jnp.max(batch["frames"]))
    branches = [lambda b, *a, size=size: run(cut(b, size), *a) for size in sizes]
    return lax.switch(index, branches, batch, *args)


def with_gradient(run: Callable[..., Any], sizes: tuple[int, ...]) -> Callable[..., Any]:
    """`f(params, batch, key) -> (value, aux)`, `run` at the batch's length, differentiable in params.

    Each length's gradient is taken inside its branch: through the switch, autodiff would keep room for what every
    branch saves for its backward pass.
    """

    @jax.custom_vjp
    def f(params: Any, batch: Batch, key: Array) -> Any:
        return at_length(lambda b, p, k: run(p, b, k), sizes, batch, params, key)

    def forward(params: Any, batch: Batch, key: Array) -> Any:
        both = jax.value_and_grad(run, has_aux=True)
        return at_length(lambda b, p, k: both(p, b, k), sizes, batch, params, key)

    def backward(gradient: Any, cotangent: Any) -> Any:
        return jax.tree.map(lambda g: g * cotangent[0].astype(g.dtype), gradient), None, None

    f.defvjp(forward, backward)
    return f


def arrays(corpus: Corpus, features: Sequence[np.ndarray], front: FrontEnd) -> dict[str, np.ndarray]:
    """`pad` of a corpus and its features: frame labels from its segments, tokens from its labels."""
    of = corpus.inventory.of
    pairs = list(zip(corpus.utterances, features, strict=True))
    labels = [frame_labels(u.segments, of, len(f), corpus.rate, front) for u, f in pairs]
    return pad(features, labels, [corpus.inventory.trained(u.labels) for u in corpus.utterances])
