"""A little training behind a reconstruction: the compressed network learns the dense one's answers, within its sets."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from compressx._harden import Hardened, check
from compressx._retrain import retract, retrain
from compressx.capture.capture import read
from compressx.reconstruction.norms import norms
from compressx.rules import Rules, pairs
from compressx.trace import function_of

LOSSES = ("divergence", "squares")


class Distilled(NamedTuple):
    """What `distill` did.

    Attributes:
      before: the loss over all batches before it.
      after: behind it.
      trained: how many leaves moved.

    Example:
      >>> compressx.reconstruction.Distilled(0.5, 0.1, 4).after
      0.1
    """

    before: float
    after: float
    trained: int


def distill(
    model: Any,
    params: Any,
    hard: Hardened,
    rules: Rules,
    batches: Iterable[Any],
    *,
    steps: int = 150,
    lr: float = 1e-3,
    temperature: float = 2.0,
    loss: str = "divergence",
    augment: Callable[[Array, Any], Any] | None = None,
    seed: int = 0,
) -> tuple[Hardened, Distilled]:
    """Trains a compressed network on the dense one's outputs, inside the active sets of its weights.

    Kept weights, biases and scales move, by Adam and a cosine schedule; running statistics of batch normalisation do
    not, and neither does what is no float. No labels are needed.

    Args:
      model: as for `reconstruct`; its output is one array.
      params: the dense network's parameters.
      hard: the compressed ones, as `reconstruct` or `harden` returned them.
      rules: those of `hard`.
      batches: inputs, each a step's.
      steps: how many; the batches are gone through in a random order, again and again.
      lr: learning rate of the first step.
      temperature: that both networks' logits are divided by, where the loss is the divergence.
      loss: "divergence", of softmax outputs over the last axis from the dense ones (times the temperature's square); or
        "squares", the mean squared difference.
      augment: `augment(key, x)`, other inputs that the dense network answers too; None: as given.
      seed: of the order and of `augment`.

    Returns:
      The new weights with their structures, in their sets to the bit, and the losses before and after.

    Raises:
      ValueError: there is no batch, or an argument is impossible.
      ConstraintViolation: `hard` does not lie in its sets.

    Source: G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015.

    Example:
      >>> def network(w, x):
      ...     return jax.nn.relu(x @ w["a"]) @ w["b"]
      >>> keys = jax.random.split(jax.random.key(0), 3)
      >>> w = {"a": jax.random.normal(keys[0], (8, 16)), "b": jax.random.normal(keys[1], (16, 4))}
      >>> rules, x = [("a", compressx.n_of_m(2, 4))], jax.random.normal(keys[2], (256, 8))
      >>> hard = compressx.harden(w, rules, fresh=True)
      >>> better, about = compressx.reconstruction.distill(network, w, hard, rules, [x], steps=20, lr=0.01)
      >>> about.after < about.before
      True
    """
    if loss not in LOSSES:
        raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    if steps < 1 or not lr > 0 or not temperature > 0:
        raise ValueError(f"steps={steps}, lr={lr} and temperature={temperature} must be above 0")
    held, rules = list(batches), pairs(rules)
    if not held:
        raise ValueError("there is no batch of inputs")
    network = function_of(model)
    dense = jax.jit(lambda x: network(params, x))
    leaves, treedef = jax.tree.flatten(hard.params)
    free = _trainable(model, hard.params, held[0], leaves)

    def whole(moving: list[Array]) -> Any:
        new = list(leaves)
        for i, leaf in zip(free, moving, strict=True):
            new[i] = leaf
        return jax.tree.unflatten(treedef, new)

    def distance(moving: list[Array], x: Any, wanted: Array) -> Array:
        given = network(whole(moving), x)
        if loss == "squares":
            return jnp.mean(jnp.square(given - wanted))
        target = jax.nn.softmax(wanted / temperature)
        apart = optax.losses.kl_divergence(jax.nn.log_softmax(given / temperature), target)
        return jnp.mean(apart) * temperature**2

    tx, inside = optax.adam(optax.cosine_decay_schedule(lr, steps)), retrain(rules, hard)

    @jax.jit
    def step(moving: list[Array], state: Any, kept: Any, x: Any, wanted: Array) -> tuple[list[Array], Any, Any]:
        updates, state = tx.update(jax.grad(distance)(moving, x, wanted), state, moving)
        every: list[Any] = [None] * len(leaves)
        for i, update in zip(free, updates, strict=True):
            every[i] = update
        moves, kept = inside.update(jax.tree.unflatten(treedef, every), kept, whole(moving))
        landed = treedef.flatten_up_to(moves)  # type: ignore[attr-defined]
        return [w + landed[i] for i, w in zip(free, moving, strict=True)], state, kept

    measure = jax.jit(distance)
    answers = [dense(x) for x in held]
    moving = [jnp.asarray(leaves[i]) for i in free]
    before = float(np.mean([measure(moving, x, y) for x, y in zip(held, answers, strict=True)]))
    state, kept = tx.init(moving), inside.init(hard.params)
    keys = jax.random.split(jax.random.key(seed), steps)
    numbers = np.random.default_rng(seed)
    order = np.concatenate([numbers.permutation(len(held)) for _ in range(-(-steps // len(held)))])[:steps]
    for k, key in zip(order, keys, strict=True):
        x, wanted = held[k], answers[k]
        if augment is not None:
            x = augment(key, x)
            wanted = dense(x)
        moving, state, kept = step(moving, state, kept, x, wanted)
    done = retract(whole(moving), rules, kept)
    check(done, rules)
    moved = [jnp.asarray(jax.tree.leaves(done.params)[i]) for i in free]
    after = float(np.mean([measure(moved, x, y) for x, y in zip(held, answers, strict=True)]))
    return done, Distilled(before, after, len(free))


def _trainable(model: Any, params: Any, x: Any, leaves: list[Any]) -> list[int]:
    """Positions of the leaves that are floats and no running statistics."""
    program, found = read(model, params, x)
    fixed = {leaf for norm in norms(program, found.data) for leaf in (norm.mean, norm.var)}
    numbered = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]
    return [i for k, i in enumerate(numbered) if k not in fixed and jnp.issubdtype(leaves[i].dtype, jnp.floating)]
