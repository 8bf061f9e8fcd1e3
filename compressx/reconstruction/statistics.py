"""Running statistics of batch normalisation for weights that anything has compressed."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from compressx.reconstruction.norms import RULES as NORMS
from compressx.reconstruction.norms import Norm, statistics
from compressx.reconstruction.stream import COMPRESSED, DENSE, Stream


def match_statistics(model: Any, params: Any, compressed: Any, batches: Iterable[Any], norms: str = "match") -> Any:
    """Compressed parameters with running statistics of batch normalisation that fit them.

    Args:
      model: as for `reconstruct`.
      params: the dense network's parameters.
      compressed: the same tree after any compression: projected, hardened, quantized.
      batches: calibration inputs.
      norms: "match" the moments of the dense network, or "estimate" them on the examples.

    Returns:
      `compressed` with new running means and variances, wherever the input of a normalisation has changed.

    Raises:
      ValueError: the trees differ, or the rule is none.

    Example:
      >>> def network(v, x):
      ...     return (x @ v["w"] - v["mean"][None]) * jax.lax.rsqrt(v["var"] + 1e-5)[None]
      >>> dense = {"w": jnp.eye(2), "mean": jnp.zeros(2), "var": jnp.ones(2)}
      >>> halved = {**dense, "w": jnp.eye(2) / 2}
      >>> match_statistics(network, dense, halved, [jax.random.normal(jax.random.key(0), (64, 2))])["var"].tolist()
      [0.25, 0.25]
    """
    if norms not in NORMS:
        raise ValueError(f"norms must be one of {', '.join(NORMS)}, got {norms!r}")
    stream = Stream(model, params, list(batches), (), False)
    leaves, treedef = jax.tree.flatten(compressed)
    trees: list[Any] = [treedef, jax.tree.structure(params)]
    if trees[0] != trees[1]:
        raise ValueError(f"the compressed tree is {trees[0]}, the dense one {trees[1]}")
    for leaf, value in enumerate(leaf for leaf in leaves if hasattr(leaf, "dtype")):
        if not np.array_equal(value, stream.weights[DENSE][leaf]):
            stream.put(leaf, value)
    for number in range(len(stream.network.program.ops)):
        for norm in stream.norms.get(number, ()):
            move_norm(stream, norm, norms)
        stream.run(number)
    new = iter(stream.weights[COMPRESSED])
    return jax.tree.unflatten(treedef, [next(new) if hasattr(leaf, "dtype") else leaf for leaf in leaves])


def move_norm(stream: Stream, norm: Norm, rule: str) -> bool:
    """Moves the statistics of a normalisation whose input has changed; whether it has."""
    held = stream.moments(norm) if rule != "keep" else None
    if held is None:
        return False
    mean, var = (np.asarray(stream.weights[DENSE][leaf]) for leaf in (norm.mean, norm.var))
    for leaf, value in zip((norm.mean, norm.var), statistics(rule, mean, var, *held), strict=True):
        stream.put(leaf, jnp.asarray(value))
    return True
