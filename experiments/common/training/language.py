"""Language models in training: the loss of a window with what was carried into it, exact perplexity, sampling.

Truncated back-propagation through time: a gradient runs through one window; h and c go on into the next window of the
lane as numbers. Where a lane begins (`fresh`), they are zero.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from experiments.common.data import text
from experiments.common.training.state import Sums, Task

LOSSES = ("word", "window")


@jax.custom_vjp
def cross_entropy(logits: Array, labels: Array) -> Array:
    """-log softmax(logits)[label] of every row: `[n, V]`, int32 `[n] -> [n]`; first derivatives only.

    For large vocabularies: the gradient, exp(logits - logsumexp) - 1[label], is made in one pass and the ones are put
    into it where they belong (what that gains on a CPU: docs/notes/open.md).
    """
    return _cross_entropy(logits, labels)[0]


def _cross_entropy(logits: Array, labels: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    most = jnp.max(logits, axis=-1)
    whole = jnp.log(jnp.sum(jnp.exp(logits - most[:, None]), axis=-1)) + most
    return whole - jnp.take_along_axis(logits, labels[:, None], axis=-1)[:, 0], (logits, labels, whole)


def _cross_entropy_back(saved: tuple[Array, Array, Array], g: Array) -> tuple[Array, None]:
    logits, labels, whole = saved
    share = jnp.exp(logits - whole[:, None]) * g[:, None]
    return share.at[jnp.arange(len(labels)), labels].add(-g), None


cross_entropy.defvjp(_cross_entropy, _cross_entropy_back)


def language(model: Any, loss: str = "word") -> Task:
    """The task of `models.lstm.LanguageModel`: batches as `data.text.windows` makes them.

        "word"     - mean over all positions of log p(next word)
        "window"   - mean over lanes of the sum over a window's positions, as in the paper: its learning rate of 1 and
                     its limits of the gradient's norm are for this one

    Dropout is drawn where `Fit.augment` is on. Sums count positions, so that `exp(loss)` of a record is a perplexity.

    Raises:
      ValueError: no such loss.
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")

    def run(params: Any, stats: Any, batch: Any, train: bool, key: Array | None) -> tuple[Sums, Any]:
        fresh = batch["fresh"][:, None]
        carry = jax.tree.map(lambda x: jnp.where(fresh, jnp.zeros((), x.dtype), x), stats["carry"])
        rngs = {"dropout": key} if train else None
        logits, carry = model.apply(params, batch["inputs"], carry, train, rngs=rngs)
        labels = batch["labels"]
        counted = labels >= 0
        rows = logits.reshape(-1, logits.shape[-1])
        each = cross_entropy(rows, jnp.maximum(labels, 0).reshape(-1)).reshape(labels.shape)
        right = (jnp.argmax(logits, -1) == labels) & counted
        sums = Sums(
            jnp.sum(jnp.where(counted, each, 0.0)),
            jnp.sum(right, dtype=jnp.int32),
            jnp.sum(counted, dtype=jnp.int32),
        )
        return sums, {"carry": jax.lax.stop_gradient(carry)}

    def loss_of(
        params: Any, stats: Any, batch: Any, key: Array, fit: Any, teacher: Any
    ) -> tuple[Array, tuple[Any, Sums]]:
        if teacher is not None or fit.label_smoothing:
            raise ValueError("distill and label_smoothing are not for language models")
        sums, stats = run(params, stats, batch, fit.augment, key)
        lanes, steps = batch["labels"].shape
        return sums.loss / (lanes * steps if loss == "word" else lanes), (stats, sums)

    def score(params: Any, stats: Any, batch: Any, valid: Array) -> tuple[Sums, Any]:
        del valid  # positions past the end of the text have the label -1
        return run(params, stats, batch, False, None)

    return Task(loss_of, score, begin=lambda lanes: {"carry": model.begin(lanes)})


class Perplexity(NamedTuple):
    """`value` = exp(`nats` / `places`): of a text read from its first word to its last, the first word given."""

    value: float
    nats: float
    places: int


def make_perplexity(model: Any, steps: int = 512) -> Callable[[Any, np.ndarray], Perplexity]:
    """`perplexity(params, ids)`: exact, in one lane, nothing cut and nothing dropped; sums in float64.

    The number does not depend on `steps`, the words taken at a time, but for rounding.
    """
    task = language(model)
    score = jax.jit(task.score)

    def perplexity(params: Any, ids: np.ndarray) -> Perplexity:
        cut = text.windows(ids, 1, min(steps, max(len(ids) - 1, 1)), whole=True)
        assert task.begin is not None
        state, parts = task.begin(1), []
        for t in range(len(cut["fresh"])):
            sums, state = score(params, state, {k: x[t : t + 1] for k, x in cut.items()}, np.ones(1, bool))
            parts.append(sums)
        done = jax.device_get(parts)
        nats, places = math.fsum(float(s.loss) for s in done), sum(int(s.seen) for s in done)
        return Perplexity(math.exp(min(nats / places, 700.0)), nats, places)

    return perplexity


def sample(
    model: Any, params: Any, prompt: Sequence[int], count: int, seed: int = 0, never: Sequence[int] = ()
) -> list[int]:
    """Words drawn from the model's own distribution, each read back before the next.

    Args:
      model: a `LanguageModel`.
      params: its variables.
      prompt: ids read first, at least one.
      count: words to draw, at least 1.
      seed: of the draws; the same seed gives two networks the same draws.
      never: ids that are not drawn, `<unk>`'s say.

    Returns:
      The drawn ids, the prompt left out.
    """
    if not prompt or count < 1:
        raise ValueError(f"a sample needs a prompt and count >= 1, got {len(prompt)} words and count={count}")

    @jax.jit
    def run(params: Any, prompt: Array, key: Array) -> Array:
        logits, carry = model.apply(params, prompt[None])

        def draw(logits: Array, key: Array) -> Array:
            for i in never:
                logits = logits.at[i].set(-jnp.inf)
            return jax.random.categorical(key, logits).astype(jnp.int32)

        def step(state: Any, key: Array) -> tuple[Any, Array]:
            word, carry = state
            logits, carry = model.apply(params, word[None, None], carry)
            following = draw(logits[0, 0], key)
            return (following, carry), following

        keys = jax.random.split(key, count)
        first = draw(logits[0, -1], keys[0])
        _, rest = jax.lax.scan(step, (first, carry), keys[1:])
        return jnp.concatenate([first[None], rest])

    drawn = run(params, jnp.asarray(prompt, jnp.int32), jax.random.key(seed))
    return [int(i) for i in np.asarray(drawn)]
