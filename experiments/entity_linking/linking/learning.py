"""What the linker learns from: supervised margins with gold or own decisions as context, or REINFORCE on its own.

Source: X. Yang et al., "Learning Dynamic Context Augmentation for Global Entity Linking", 2019.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments.common.training.state import Sums, Task
from experiments.entity_linking.linking import belief, model
from experiments.entity_linking.linking.attention import LOW, along
from experiments.entity_linking.linking.model import Batch, Facts, Linker, Params

METHODS = ("supervised", "reinforce")
BASELINES = ("none", "greedy")


@dataclass(frozen=True)
class Learning:
    """How a linker learns.

    Attributes:
      method: "supervised" (multi-margin) or "reinforce".
      margin: of the multi-margin loss.
      own_decisions: scheduled sampling: the share of mentions that in supervised training leave the linker's own
        decision and not gold as context of later ones; 0 is teacher forcing.
      gamma: discount of "reinforce".
      baseline: what the return is compared with: "none", or "greedy", the return of the best decisions.
      norm: largest norm of each tensor of the scoring network, kept after every supervised step; 0 is any.
    """

    method: str = "supervised"
    margin: float = 0.01
    own_decisions: float = 0.0
    gamma: float = 0.9
    baseline: str = "none"
    norm: float = 4.0

    def __post_init__(self) -> None:
        for name, value, allowed in (("method", self.method, METHODS), ("baseline", self.baseline, BASELINES)):
            if value not in allowed:
                raise ValueError(f"{name}={value!r} is impossible; it must be one of {', '.join(allowed)}")
        if self.margin <= 0 or not 0 <= self.own_decisions <= 1 or not 0 < self.gamma <= 1 or self.norm < 0:
            raise ValueError(
                f"margin={self.margin} must be positive, own_decisions={self.own_decisions} in [0, 1], "
                f"gamma={self.gamma} in (0, 1], norm={self.norm} 0 or more"
            )


def multi_margin(scores: Array, gold: Array, mask: Array, margin: float) -> Array:
    """Each mention's loss, float32 `[B, T]`; 0 where gold is -1.

        1/n sum over candidates i other than gold y of max(0, margin - s_y + s_i)
    """
    right = jnp.take_along_axis(scores, jnp.maximum(gold, 0)[..., None], axis=-1)
    others = mask & (along(jnp.arange(scores.shape[-1]), scores) != gold[..., None])
    each = jnp.where(others, jax.nn.relu(margin - right + scores), 0.0)
    n = jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(jnp.float32)
    return jnp.where(gold >= 0, jnp.sum(each, axis=-1) / n, 0.0)


def returns(reward: Array, document: Array, gamma: float) -> Array:
    """The return of every decision, `[B, T]`: gamma ** (decisions after it) times its document's mean reward.

    Args:
      reward: of every decision.
      document: whose, int32 `[B, T]`; -1 is none, and returns 0.
      gamma: discount.
    """
    used = document >= 0
    same = (document[:, :, None] == document[:, None, :]) & used[:, :, None]
    mean = jnp.einsum("bij,bj->bi", same.astype(jnp.float32), reward) / jnp.maximum(jnp.sum(same, -1), 1).astype(
        jnp.float32
    )
    time = jnp.arange(document.shape[1])
    after = jnp.sum(same & (time[None, :] > time[:, None])[None], axis=-1)
    return jnp.where(used, gamma ** after.astype(jnp.float32) * mean, 0.0)


def sample(key: Array) -> model.Pick:
    """Draws a decision from softmax(scores)."""

    def pick(scores: Array, slot: Array) -> Array:
        drawn = jax.random.categorical(jax.random.fold_in(key, slot), scores, axis=-1).astype(jnp.int32)
        return jnp.where(jnp.max(scores, axis=-1) > LOW / 2, drawn, -1)

    return pick


def scheduled(gold: Array, share: float, key: Array) -> model.Pick:
    """Decides for gold, but for a share of the mentions for the best score."""

    def pick(scores: Array, slot: Array) -> Array:
        own = jax.random.bernoulli(jax.random.fold_in(key, slot), share, scores.shape[:1])
        return jnp.where(own, model.argmax(scores, slot), lax.dynamic_index_in_dim(gold, slot, 1, keepdims=False))

    return pick


def loss_and_decisions(
    linker: Linker, learning: Learning, params: Params, facts: Facts, batch: Batch, key: Array
) -> tuple[Array, Array]:
    """The loss of a batch (scalar, a mean over mentions, or over documents for "reinforce") and the best decisions."""
    drop_key, pick_key = jax.random.split(key)
    keep = model.dropout_mask(linker, batch, drop_key)
    gold, mask, document = batch["gold"], batch["mask"], batch["document"]
    fixed = lax.stop_gradient(params)
    if learning.method == "supervised":
        if "belief" in linker.features:
            scores = belief.global_scores(linker, params, facts, batch, keep)
        else:
            context = gold
            if learning.own_decisions and linker.dynamic:
                pick = scheduled(gold, learning.own_decisions, pick_key)
                context = model.rollout(linker, fixed, facts, batch, pick, keep).choice
            scores = model.path_scores(linker, params, facts, batch, context, keep).scores
        each = multi_margin(scores, gold, mask, learning.margin)
        loss = jnp.sum(each) / jnp.maximum(jnp.sum(gold >= 0), 1).astype(jnp.float32)
        return loss, _best(scores)
    drawn = model.rollout(linker, fixed, facts, batch, sample(pick_key), keep).choice
    value = returns(_reward(drawn, gold), document, learning.gamma)
    if learning.baseline == "greedy":
        best = model.rollout(linker, fixed, facts, batch, model.argmax, keep).choice
        value = value - returns(_reward(best, gold), document, learning.gamma)
    scores = model.path_scores(linker, params, facts, batch, drawn, keep).scores
    log_policy = jnp.take_along_axis(jax.nn.log_softmax(scores), jnp.maximum(drawn, 0)[..., None], axis=-1)[..., 0]
    documents = jnp.maximum(jnp.sum(jnp.max(document, axis=1) + 1), 1).astype(jnp.float32)
    loss = -jnp.sum(jnp.where(drawn >= 0, log_policy * value, 0.0)) / documents
    return loss, _best(scores)


def _best(scores: Array) -> Array:
    return model.argmax(scores, jnp.int32(0))


def _reward(choice: Array, gold: Array) -> Array:
    """0 for a right decision, -1 for a wrong one."""
    return jnp.where((choice == gold) & (gold >= 0), 0.0, -1.0)


def decide(linker: Linker, params: Params, facts: Facts, batch: Batch) -> model.Rollout:
    """The decisions of a trained linker; reads nothing of gold."""
    if "belief" in linker.features:
        scores = belief.global_scores(linker, params, facts, batch)
        return model.Rollout(_best(scores), scores)
    return model.rollout(linker, params, facts, batch)


def decide_along(linker: Linker, params: Params, facts: Facts, batch: Batch, context: Array) -> Array:
    """The best decision int32 `[B, T]` of every mention where those before it are given, `context` int32 `[B, T]`."""
    return _best(model.path_scores(linker, params, facts, batch, context).scores)


def limit_norms(params: Params, largest: float) -> Params:
    """The tensors of the scoring network scaled to a norm of at most `largest`; all others as they are."""

    def limit(w: Array) -> Array:
        return w * jnp.minimum(1.0, largest / jnp.maximum(jnp.linalg.norm(w), 1e-12))

    inner = params["params"]
    return {"params": inner | {name: jax.tree.map(limit, inner[name]) for name in ("hidden", "out")}}


def carried(facts: Facts) -> dict[str, Any]:
    """The facts as they travel beside the weights (as constants of the program they would be compiled into it)."""
    return {"facts": {name: x for name, x in facts._asdict().items() if x is not None}}


def make_task(linker: Linker, learning: Learning) -> Task:
    """Loss and score for `training.train`, with `carried(facts)` as batch_stats; what is counted is mentions."""

    def loss(params: Params, stats: Any, batch: Mapping[str, Array], key: Array, fit: Any, teacher: Any) -> Any:
        del fit, teacher
        value, best = loss_and_decisions(linker, learning, params, Facts(**stats["facts"]), batch, key)
        seen = jnp.sum(batch["gold"] >= 0, dtype=jnp.int32)
        right = jnp.sum((best == batch["gold"]) & (batch["gold"] >= 0), dtype=jnp.int32)
        return value, (stats, Sums(value * seen.astype(jnp.float32), right, seen))

    def score(params: Params, stats: Any, batch: Mapping[str, Array], valid: Array) -> Sums:
        out = decide(linker, params, Facts(**stats["facts"]), batch)
        counted = batch["scored"] & valid[:, None]
        answerable = counted & (batch["gold"] >= 0)
        log_p = jax.nn.log_softmax(out.scores)
        each = -jnp.take_along_axis(log_p, jnp.maximum(batch["gold"], 0)[..., None], axis=-1)[..., 0]
        return Sums(
            jnp.sum(jnp.where(answerable, each, 0.0)),
            jnp.sum((out.choice == batch["gold"]) & answerable, dtype=jnp.int32),
            jnp.sum(counted, dtype=jnp.int32),
        )

    supervised = learning.method == "supervised"
    after = (lambda params: limit_norms(params, learning.norm)) if supervised and learning.norm else None
    return Task(loss, score, after_step=after)
