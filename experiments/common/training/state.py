"""The state of a training run and one step of it, as pure functions.

A batch is chosen by its number: the step takes the epoch's order of examples and gathers its rows, so data stay on the
device and nothing about the order is saved. Keys too are functions of (phase, step).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from experiments.common.data import batches

Params = Any
Batch = dict[str, Array]


class Sums(NamedTuple):
    """Sums over examples since the last record (float32 loss, int32 counts)."""

    loss: Array
    correct: Array
    seen: Array

    @classmethod
    def zero(cls) -> "Sums":
        """No example seen yet."""
        return cls(jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


class TrainState(NamedTuple):
    """All that changes while a phase trains.

    Attributes:
      params: the weights, any pytree; for Linen `{"params": ...}`, so that a leaf's path is `params/c1/kernel`.
      batch_stats: the model's other collections, `{"batch_stats": ...}`; `{}` where it has none.
      opt_state: the optimizer's state, ADMM's Z and U and retraining's masks included.
      step: int32 [], steps done in this phase.
      key: the phase's key; a step's own is folded from it and `step`.
      sums: since the last record.
    """

    params: Params
    batch_stats: Any
    opt_state: Any
    step: Array
    key: Array
    sums: Sums


class Task(NamedTuple):
    """What is learned: the two functions that a driver gives to the training.

    Attributes:
      loss: `loss(params, batch_stats, batch, key, fit, teacher) -> (scalar, (batch_stats, Sums of this batch))`;
        `teacher` is None or the dense network's (params, batch_stats).
      score: `score(params, batch_stats, batch, valid) -> Sums`; `valid` bool [n] says which rows count.
      begin: for examples that follow one another (windows of a text), None for all others. A batch then holds the next
        example of each of its lanes (`batches.in_order`), and what one step leaves for the next travels in batch_stats:
        `begin(lanes)` is that before the first, and `score` returns (Sums, batch_stats).
      after_step: what is done to the weights after every step (a limit of norms, say), None for nothing.
    """

    loss: Callable[..., tuple[Array, tuple[Any, Sums]]]
    score: Callable[[Params, Any, Batch, Array], Any]
    begin: Callable[[int], Any] | None = None
    after_step: Callable[[Params], Params] | None = None


def classification(
    apply: Callable[..., Any],
    prepare: Callable[[Array], Array],
    augment: Callable[[Array, Array], Array] | None = None,
) -> Task:
    """Softmax classification: batches `{"inputs": [n, ...], "labels": int32 [n]}`.

        loss = (1 - s) * CE(logits, labels) + s * T^2 * KL(softmax(teacher / T) || softmax(logits / T))

    Args:
      apply: a Linen module's `apply`.
      prepare: stored inputs to what the network reads (normalisation).
      augment: `(key, stored inputs) -> stored inputs`, or None.

    Source of the second term: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """

    def loss(
        params: Params, stats: Any, batch: Batch, key: Array, fit: Any, teacher: Any
    ) -> tuple[Array, tuple[Any, Sums]]:
        inputs, labels = batch["inputs"], batch["labels"]
        if augment is not None and fit.augment:
            inputs = augment(key, inputs)
        x = prepare(inputs)
        if stats:
            logits, stats = apply({**params, **stats}, x, train=True, mutable=list(stats))
        else:
            logits = apply(params, x, train=True)
        if fit.label_smoothing:
            target = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), fit.label_smoothing)
            value = jnp.mean(optax.softmax_cross_entropy(logits, target))
        else:
            value = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))
        if teacher is not None:
            wanted = jax.lax.stop_gradient(apply({**teacher[0], **teacher[1]}, x, train=False))
            t = fit.temperature
            gap = optax.kl_divergence(jax.nn.log_softmax(logits / t), jax.nn.softmax(wanted / t))
            value = (1 - fit.distill) * value + fit.distill * t * t * jnp.mean(gap)
        correct = jnp.sum(jnp.argmax(logits, -1) == labels, dtype=jnp.int32)
        n = labels.shape[0]
        return value, (stats, Sums(value * n, correct, jnp.int32(n)))

    def score(params: Params, stats: Any, batch: Batch, valid: Array) -> Sums:
        logits = apply({**params, **stats}, prepare(batch["inputs"]), train=False)
        each = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        right = (jnp.argmax(logits, -1) == batch["labels"]) & valid
        return Sums(
            jnp.sum(jnp.where(valid, each, 0.0)), jnp.sum(right, dtype=jnp.int32), jnp.sum(valid, dtype=jnp.int32)
        )

    return Task(loss, score)


def plain_loss(task: Task, fit: Any) -> Callable[..., tuple[Array, Any]]:
    """A task's loss as `loss(params, state, batch, key) -> (scalar, state)`, for loops of other makes.

    Args:
      task: the loss.
      fit: the `config.Fit` that the loss reads; there is no teacher.
    """

    def loss(params: Params, state: Any, batch: Batch, key: Array) -> tuple[Array, Any]:
        value, (state, _) = task.loss(params, state, batch, key, fit, None)
        return value, state

    return loss


Step = Callable[[TrainState, Batch, Array, Any], TrainState]


def make_step(
    task: Task, tx: optax.GradientTransformation, fit: Any, place: Callable[[Batch], Batch] = lambda batch: batch
) -> Step:
    """One step: `step(state, data, order, teacher) -> state`, pure, not yet jitted.

    Args:
      task: loss of a batch.
      tx: the phase's optimizer, constraints included.
      fit: the phase's `config.Fit`, read by the loss.
      place: lays the gathered batch out over devices.

    Returns:
      A function of the state, the whole data set (leading axis n), the order int32 `[steps, batch]` of the epoch, and
      the teacher (None or a pair of trees). The batch is row `state.step mod steps`.
    """

    def step(state: TrainState, data: Batch, order: Array, teacher: Any) -> TrainState:
        rows = jax.lax.dynamic_index_in_dim(order, state.step % order.shape[0], keepdims=False)
        batch = place({name: x[rows] for name, x in data.items()})
        key = jax.random.fold_in(state.key, state.step)
        grad = jax.value_and_grad(task.loss, has_aux=True)
        (_, (stats, sums)), gradient = grad(state.params, state.batch_stats, batch, key, fit, teacher)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(
            params if task.after_step is None else task.after_step(params),
            stats,
            opt_state,
            state.step + 1,
            state.key,
            jax.tree.map(jnp.add, state.sums, sums),
        )

    return step


def make_runner(step: Step) -> Callable[[TrainState, Batch, Array, Any, int], TrainState]:
    """`run(state, data, order, teacher, count)` does `count` steps, in the form that is fastest on this backend.

    On CPU a jitted step in a Python loop: inside a scan XLA's CPU convolutions take a path 3 to 80 times slower, and
    the loop's dispatch is hidden behind the step before. Elsewhere one scan over the steps. The state is donated.
    """
    if jax.default_backend() == "cpu":
        jitted = jax.jit(step, donate_argnums=0)

        def run(state: TrainState, data: Batch, order: Array, teacher: Any, count: int) -> TrainState:
            for _ in range(count):
                state = jitted(state, data, order, teacher)
            return state

        return run

    def scan(state: TrainState, data: Batch, order: Array, teacher: Any, count: int) -> TrainState:
        return jax.lax.scan(lambda s, _: (step(s, data, order, teacher), None), state, None, length=count)[0]

    return jax.jit(scan, static_argnums=4, donate_argnums=0)


def make_evaluate(
    task: Task, batch_size: int, place: Callable[[Batch], Batch] = lambda batch: batch
) -> Callable[[Params, Any, Batch], dict[str, float]]:
    """`evaluate(params, batch_stats, data) -> {"loss", "accuracy"}` over every example, a ragged last batch too.

    Examples that follow one another are scored in `batch_size` lanes, each from its beginning to its end; with one lane
    nothing is cut. Their number must be a multiple of the lanes.
    """

    @jax.jit
    def score(params: Params, stats: Any, data: Batch, rows: Array, valid: Array) -> Any:
        return task.score(params, stats, place({name: x[rows] for name, x in data.items()}), valid)

    def evaluate(params: Params, stats: Any, data: Batch) -> dict[str, float]:
        n = int(jax.tree.leaves(data)[0].shape[0])
        parts = []
        if task.begin is not None:
            stats = task.begin(batch_size)
            for r in batches.in_order(n, batch_size):
                part, stats = score(params, stats, data, r, np.ones(batch_size, bool))
                parts.append(part)
        else:
            rows, valid = batches.cover(n, min(batch_size, n))
            parts = [score(params, stats, data, r, v) for r, v in zip(rows, valid, strict=True)]
        return averages(jax.tree.map(lambda *each: sum(each), *jax.device_get(parts)))

    return evaluate


@jax.jit
def all_finite(tree: Any) -> Array:
    """Whether no leaf holds NaN or infinity (bool [])."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]))


def averages(sums: Sums) -> dict[str, float]:
    """Mean loss and accuracy of what was summed; fetches from the device."""
    loss, correct, seen = jax.device_get(sums)
    return {"loss": float(loss) / max(int(seen), 1), "accuracy": int(correct) / max(int(seen), 1)}
