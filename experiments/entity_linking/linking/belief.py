"""The global baseline: all mentions of a document decided together by loopy belief propagation over all pairs.

    psi_i(e) = local score,  phi_ij(e, e') = 2 / (T - 1) e . (c * e')
    m_ij(e') = max over e of psi_i(e) + phi_ij(e, e') + sum over k not j of mbar_ki(e)
    mbar_ij = log(damping softmax(m_ij) + (1 - damping) exp(mbar_ij before))
    belief_i = softmax of psi_i + sum over k of mbar_ki

The belief stands where the local score stood in the scoring network. Each iteration costs (T n)**2.

Source: O. Ganea, T. Hofmann, "Deep Joint Entity Disambiguation with Local Neural Attention", 2017, equations 10 to 15.
"""

import jax
import jax.numpy as jnp
from jax import Array, lax

from experiments.entity_linking.linking import model
from experiments.entity_linking.linking.attention import LOW, along
from experiments.entity_linking.linking.model import Batch, Facts, Linker, Params, Static


def beliefs(linker: Linker, params: Params, fixed: Static, batch: Batch) -> Array:
    """The belief in every candidate, float32 `[B, T, n]`, a distribution over each mention's candidates."""
    e, mask, document = fixed.vectors, batch["mask"], batch["document"]
    same = (document[:, :, None] == document[:, None, :]) & (document >= 0)[:, :, None]
    pair = same & ~jnp.eye(document.shape[1], dtype=bool)[None]
    others = jnp.sum(pair, axis=-1)
    scale = (2.0 / jnp.maximum(others, 1).astype(jnp.float32))[:, :, None, None, None]
    phi = jnp.einsum("bind,bjmd->bijnm", e * along(params["params"]["pairs"], e), e) * scale
    psi = jnp.where(mask, fixed.features["local"], LOW)
    linked = pair[..., None] & mask[:, None]  # [B, i, j, m]: i tells j about j's candidate m

    def gather(mbar: Array) -> Array:
        return psi + jnp.sum(mbar, axis=1)  # [B, i, n]

    def step(mbar: Array, _: None) -> tuple[Array, None]:
        back = jnp.swapaxes(mbar, 1, 2)  # [B, i, j, n]: what j told i
        source = gather(mbar)[:, :, None] - back
        m = jnp.max(source[..., None] + phi, axis=3)
        m = jax.nn.softmax(jnp.where(linked, m, LOW), axis=-1)
        new = jnp.log(linker.damping * m + (1 - linker.damping) * jnp.exp(mbar) + 1e-20)
        return jnp.where(linked, new, 0.0), None

    candidates = jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(jnp.float32)
    start = jnp.where(linked, -jnp.log(candidates)[:, None, :, None], 0.0)
    mbar, _ = lax.scan(step, start, None, length=linker.iterations)
    return jnp.where(mask, jax.nn.softmax(gather(mbar), axis=-1), 0.0)


def global_scores(linker: Linker, params: Params, facts: Facts, batch: Batch, keep: Array | None = None) -> Array:
    """Scores `[B, T, n]` of the linker whose features hold "belief"."""
    fixed = model.static(linker, params, facts, batch)
    features = fixed.features | {"belief": beliefs(linker, params, fixed, batch)}
    return model.combine(linker, params, features, batch["mask"], keep)
